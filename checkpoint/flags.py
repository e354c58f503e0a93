"""The flags of scripts that ask a model: which checkpoint, or which server, and how it samples."""
import dataclasses
from dataclasses import dataclass
from typing import Annotated

import torch

from plumbing.address import parse_url, read_key
from plumbing.cli import LOWER_IF_MEMORY_RUNS_OUT, MAY_CHANGE
from plumbing.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """The flags of sampling from a checkpoint."""
    model: Annotated[str, "checkpoint: a Hugging Face folder"]
    adapter: Annotated[str | None, "folder of a LoRA adapter for --model, merged into its weights"] = None
    temperature: Annotated[float, "sampling temperature; 0 = greedy", (0, None)] = 0.95
    top_p: Annotated[
        float, "nucleus: sample from the most likely tokens that hold this probability", (0.01, 1)
    ] = 0.95
    max_new_tokens: Annotated[int, "tokens per analysis at most", (1, None)] = 4096
    seed: Annotated[int, "seed of the sampling"] = 0
    prompt_file: Annotated[str | None, "the words around the case "
                                       "(default: the checkpoint's own, else prompts/verify.txt)"] = None
    dtype: Annotated[str, "of the weights", ("float32", "bfloat16")] = "float32"
    device: Annotated[str, "where to run"] = "cuda" if torch.cuda.is_available() else "cpu"
    context: Annotated[int | None, "tokens of prompt and analysis at most, instead of config.json's "
                                   "max_position_embeddings", (1, None)] = None
    system: Annotated[str | None, "a system message (default: the chat template's own, if it has one)"] = None
    template_args: Annotated[str | None, "JSON object of further variables of the chat template, "
                                         "as '{\"enable_thinking\": false}'"] = None
    plain: Annotated[
        bool, "run generate.py and model.py as they read, without fast/: the same numbers, slower"
    ] = False


@dataclass(frozen=True, kw_only=True)
class ServedConfig(SamplerConfig):
    """The flags of everything that samples from a checkpoint here or from a model behind a server."""
    model: Annotated[str, "checkpoint: a Hugging Face folder; with --server: the model's name there"]
    batch_size: Annotated[int, "cases side by side", (1, None), LOWER_IF_MEMORY_RUNS_OUT] = 16
    rank_timeout: Annotated[
        float,
        "seconds after which the other ranks give up one that shows no sign of work",
        (1, 10**9),
        MAY_CHANGE,
    ] = 1800.0
    server: Annotated[
        str | None,
        "URL of an OpenAI-compatible server (vLLM, SGLang, llama.cpp) that samples instead",
        MAY_CHANGE,
    ] = None
    tokenizer: Annotated[str | None, "with --server: folder with the model's tokenizer and chat template "
                                     "(no weights needed)"] = None
    concurrency: Annotated[int, "with --server: requests under way at a time", (1, None), MAY_CHANGE] = 16
    timeout: Annotated[float, "with --server: seconds to wait for an answer", (0.1, None), MAY_CHANGE] = 600.0
    retries: Annotated[int, "with --server: further tries after 429, 5xx, a timeout or a broken answer",
                       (0, None), MAY_CHANGE] = 6
    api_key_env: Annotated[str | None, "with --server: NAME of the environment variable that holds its key",
                           MAY_CHANGE] = None

    def __post_init__(self):
        """BadInput where flags do not go together, before anything is printed or saved (a key must not be).
        """
        given = {
            field.name for field in dataclasses.fields(self) if getattr(self, field.name) != field.default
        }
        if self.server is None:
            meaningless = ("tokenizer", "concurrency", "timeout", "retries", "api_key_env")
            why = "needs --server; give both or neither"
        else:
            meaningless = ("adapter", "batch_size", "dtype", "device", "plain")
            why = "has no meaning with --server, where the server decides; leave it out"
        for name in meaningless:
            if name in given:
                raise BadInput(f"--{name.replace('_', '-')} {why}")
        if self.server is not None:
            parse_url(self.server)
            read_key(self.api_key_env)
            if self.tokenizer is None:
                raise BadInput(
                    "--server needs --tokenizer FOLDER, with the model's tokenizer.json and chat template "
                    "(no weights needed)"
                )
