"""The settings of a training run, and what must be so before it begins."""
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from lora import TARGETS, LoRA
from plumbing import ranks
from plumbing.cli import (
    GIVE_IF_MEMORY_RUNS_OUT,
    INPUT,
    LOWER_IF_MEMORY_RUNS_OUT,
    MAY_CHANGE,
    Mark,
    flag_of,
    inputs_of,
    marked,
    print_config,
    resolved,
)
from plumbing.errors import BadInput
from plumbing.files import content_hash, expect, files_in, read_json, refuse_unwritable

DATA = Mark("a file, or a folder of files, whose content a resumed run must find as it was")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The settings that SFT and DPO share; the scripts add their own and set the paper's learning rates."""
    out: Annotated[str, "folder of the run to write"]
    validation: Annotated[str | None, "file like --train, for the validation loss; the lowest decides which "
                                      "model is kept", INPUT, DATA] = None
    prompt_file: Annotated[str | None, "the words around the case, which go with the trained model (default: "
                                       "those beside --train, else the model's own)", INPUT, DATA] = None
    lr: Annotated[float, "peak learning rate", (0, None)]
    batch_size: Annotated[int, "examples (or pairs) per optimizer step, over all ranks", (1, None)] = 128
    micro_tokens: Annotated[int, "tokens per forward pass of a rank: lower it if memory runs out; "
                                 "a longer example is left out", (16, None), LOWER_IF_MEMORY_RUNS_OUT] = 8192
    epochs: Annotated[int, "passes over the training data", (1, None)] = 1
    max_steps: Annotated[int | None, "stop after so many optimizer steps", (1, None)] = None
    warmup: Annotated[float, "share of the steps in which the learning rate rises from 0", (0, 1)] = 0.03
    schedule: Annotated[str, "of the learning rate after the warm-up", ("cosine", "constant")] = "cosine"
    weight_decay: Annotated[float, "of matrices, decoupled (AdamW)", (0, None)] = 0.0
    beta2: Annotated[float, "AdamW's second decay rate", (0, 1)] = 0.999
    adamw_8bit: Annotated[bool, "keep AdamW's moments in 8 bits: 10 bytes a parameter, not 16"] = False
    clip: Annotated[float, "largest norm of the gradient", (1e-9, None)] = 1.0
    eval_every: Annotated[int, "optimizer steps between validations (and after the last step)",
                          (1, None)] = 100
    save_every: Annotated[int, "optimizer steps between checkpoints", (1, None), MAY_CHANGE] = 100
    keep: Annotated[int, "checkpoints kept", (1, None), MAY_CHANGE] = 1
    checkpoint_activations: Annotated[bool, "recompute each layer in the backward pass: less memory, "
                                            "a third more time", MAY_CHANGE, GIVE_IF_MEMORY_RUNS_OUT] = False
    lora_rank: Annotated[int | None, "train adapters of this rank (LoRA), and leave the weights as they are",
                         (1, None)] = None
    lora_alpha: Annotated[float | None, "with --lora-rank: adapters are scaled by alpha / rank "
                                        "(default: twice the rank)", (1e-9, 1e9)] = None
    lora_targets: Annotated[tuple[str, ...], "with --lora-rank: a layer's products that have adapters",
                            TARGETS] = TARGETS
    adapter: Annotated[str | None, "train these adapters for --model on: the folder of an earlier run, or of "
                                   "PEFT", INPUT, DATA] = None
    merge: Annotated[bool, "with adapters: write OUT/model too, whole, with the adapters merged in"] = False
    save_dtype: Annotated[str, "of the file in OUT/model", ("float32", "bfloat16")] = "float32"
    seed: Annotated[int, "seed of the order of the data (and of the weights from scratch)"] = 0
    device: Annotated[str, "where to train; matrix products are bf16 on cuda",
                      MAY_CHANGE] = "cuda" if torch.cuda.is_available() else "cpu"
    rank_timeout: Annotated[float, "seconds after which the other ranks give up one that does not answer",
                            (1, 10 ** 9), MAY_CHANGE] = 1800.0
    context: Annotated[int | None, "tokens of a sequence at most, instead of config.json's "
                                   "max_position_embeddings", (1, None)] = None
    system: Annotated[str | None, "a system message for rows that have none "
                                  "(default: the chat template's own, if it has one)"] = None
    template_args: Annotated[str | None, "JSON object of further variables of the chat template"] = None
    plain: Annotated[bool, "compute with model.py as it reads, without fast/: "
                           "the same numbers, slower"] = False
    tensorboard: Annotated[bool, "write the metrics for TensorBoard too, to OUT/tensorboard "
                                 "(needs the package tensorboard)", MAY_CHANGE] = False
    resume: Annotated[bool, "go on from the last checkpoint in --out", MAY_CHANGE] = False
    overwrite: Annotated[bool, "replace an existing --out", MAY_CHANGE] = False


def check_out(config: TrainConfig) -> dict[str, Any]:
    """Refuse an existing folder, or one that was made with other settings. Prints the config.

    Returns the settings as the run's config.json holds them: the fields, and a hash of each data file.
    """
    print_config(config)
    if config.tensorboard:
        summary_writer_class()  # says so now, if it is missing
    out = Path(config.out)
    settings = resolved(config) | hashes(config)
    if out.exists() and not (config.resume or config.overwrite):
        raise BadInput(f"{out}: exists already; "
                       "give --resume to go on, --overwrite to replace it, or another --out")
    refuse_unwritable(out)
    if config.overwrite:
        refuse_to_remove(out, config)
    if config.resume and (out / "config.json").exists():
        refuse_other_settings(out / "config.json", settings, free=marked(config, MAY_CHANGE))
    ranks.wait()  # before rank 0 changes the folder that the others still look at
    return settings


def lora_settings(config: TrainConfig) -> LoRA | None:
    """The new adapters that the flags ask for; None: no new ones. BadInput where flags do not go together."""
    if config.adamw_8bit and (config.lora_rank is not None or config.adapter is not None):
        raise BadInput("--adamw-8bit is for the moments of all weights; adapters have few: leave it out")
    if config.lora_rank is None:
        if config.lora_alpha is not None or config.lora_targets != TARGETS:
            raise BadInput("--lora-alpha and --lora-targets say how new adapters are; give --lora-rank too")
        if config.merge and config.adapter is None:
            raise BadInput("--merge merges adapters; give --lora-rank or --adapter too, or leave it out")
        return None
    if config.adapter is not None:
        raise BadInput(f"--lora-rank begins new adapters, and --adapter {config.adapter} has its own rank; "
                       "give one of them")
    alpha = config.lora_alpha or 2.0 * config.lora_rank
    return LoRA(config.lora_rank, alpha, config.lora_targets)


def summary_writer_class() -> type:
    """PyTorch's writer of TensorBoard files, which needs a package that is not among the requirements."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise BadInput("--tensorboard needs the package tensorboard: pip install tensorboard, "
                       "or leave the flag out (metrics.jsonl has the same)") from None
    return SummaryWriter


def hashes(config: TrainConfig) -> dict[str, str]:
    """A hash of each data file: a resumed run must not meet other data behind the same path.

    With adapters, of the model too, which checkpoints then do not hold.
    """
    found = {}
    names = marked(config, DATA)
    if config.lora_rank or config.adapter:
        names.append("model")
    for name in names:
        path = getattr(config, name)
        if path and Path(path).exists():  # if it is not there, the script will say so when it reads it
            found[f"content of {flag_of(name)}"] = hash_of(Path(path))
    return found


def hash_of(path: Path) -> str:
    """16 hexadecimal digits from the content of a file, or of all files in a folder."""
    if path.is_dir():
        return content_hash("", files_in(path))
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:16]


def refuse_to_remove(out: Path, config: TrainConfig) -> None:
    """--overwrite removes the folder of a run; no folder of another kind, and none with an input in it."""
    is_run = (out / "checkpoints").is_dir() and (out / "config.json").is_file()
    if out.exists() and any(out.iterdir()) and not is_run:
        raise BadInput(f"{out}: is not the folder of a training run, so --overwrite leaves it alone; "
                       "remove it yourself or give another --out")
    for flag, path in inputs_of(config):
        if path.resolve().is_relative_to(out.resolve()):
            raise BadInput(f"{out}: holds {flag} {path}, which --overwrite would remove; "
                           "give another --out")


def refuse_other_settings(path: Path, settings: dict[str, Any], free: list[str]) -> None:
    """A resumed run must have the settings in `path`, which it was begun with. free: what may differ."""
    before = expect(read_json(path), dict, str(path))
    for name, value in settings.items():
        if name.startswith("content of "):
            if before.get(name, value) != value:
                raise BadInput(f"{path}: the {name} is not what the run was begun with; "
                               "put the file back, or give --overwrite")
        elif name not in free and before.get(name) != value:
            raise BadInput(f"{path}: the run was begun with another {flag_of(name)} "
                           f"({before.get(name)!r}); resume with the same settings")
