"""The peer vLLM on CPU, through its Python API. It runs in an environment of its own (`make vllm`).

Prefix caching is on. The K continuations of a prompt are one request, so that vLLM computes the prompt once,
and all requests are there at once, so that vLLM batches them as it likes.
"""
import os
import sys

import numpy as np
import psutil
import torch

from bench.common import ROOT, peak_mb_of

sys.path.append(str(ROOT / "tests" / "server"))
from vllm_server import environment


def load(folder: str, dtype: str, compiled: bool):
    """vllm.LLM of the checkpoint; compiled: by torch.compile."""
    os.environ.update(environment(torch.get_num_threads()))  # vLLM reads them when it is imported
    from vllm import LLM
    return LLM(folder, skip_tokenizer_init=True, dtype=dtype, enforce_eager=not compiled,
               enable_prefix_caching=True, kv_cache_memory_bytes=4 * 2 ** 30)


def generate(llm, prompts: list[list[int]], k: int, new_tokens: int, eos_ids: list[int], temperature: float,
             top_p: float) -> list[list[list[int]]]:
    """k continuations of each prompt, the end-of-text token included; [] for eos_ids turns ends off."""
    from vllm import SamplingParams
    params = SamplingParams(n=k, max_tokens=new_tokens, temperature=temperature, top_p=top_p,
                            detokenize=False, ignore_eos=True, stop_token_ids=eos_ids)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return [[list(continuation.token_ids) for continuation in output.outputs] for output in outputs]


def p_yes(llm, sequences: list[list[int]], yes_no: tuple[int, int]) -> list[float]:
    """P(Yes) against P(No) after each sequence, from the log-probabilities of these two tokens."""
    from vllm import SamplingParams
    params = SamplingParams(max_tokens=1, detokenize=False, logprob_token_ids=list(yes_no))
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in sequences], params, use_tqdm=False)
    found = [output.outputs[0].logprobs[0] for output in outputs]
    yes, no = (np.array([tokens[token].logprob for tokens in found]) for token in yes_no)
    return (1 / (1 + np.exp(no - yes))).tolist()


def peak_mb() -> float:
    """The most memory that this process and vLLM's own processes have held, each at its peak."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(peak_mb_of(process.pid) for process in processes)
