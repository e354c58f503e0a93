"""The peer llama.cpp: its server in this process (pip install xllamacpp gguf), with the weights in fp32.

Its own defaults otherwise: keys and values of 16 bits, flash attention, prompts kept in their slots. The K
continuations of a prompt are one request, so that the prompt is computed once and copied to K slots.
"""
import math
import sys
from functools import partial
from pathlib import Path

from bench.common import ROOT
from server import Server, side_by_side

sys.path.append(str(ROOT / "tests" / "server"))
from llama_server import start


class Llama:
    """The server, and how many sequences it takes side by side."""

    def __init__(self, folder: str, threads: int, slots: int, context: int):
        self.process = start(Path(folder), slots=slots, context=context, threads=threads, exact=False)
        self.slots = slots
        url = self.process.listening_address
        self.client = Server(url, key=None, timeout=3600.0, retries=0, concurrency=slots)

    def complete(self, ids: list[int], n: int, n_predict: int, **fields) -> list[dict]:
        body = fields | {"prompt": ids, "n_cmpl": n, "n_predict": n_predict, "return_tokens": True,
                         "cache_prompt": True}
        answer = self.client.ask("/completion", body, lambda answer: answer)
        return answer if isinstance(answer, list) else [answer]


def generate(llama: Llama, prompts: list[list[int]], k: int, new_tokens: int, eos_ids: list[int],
             temperature: float, top_p: float) -> list[list[list[int]]]:
    """k continuations of each prompt; [] for eos_ids turns ends off."""
    settings = dict(samplers=["temperature", "top_p"], temperature=temperature, top_p=top_p,
                    ignore_eos=not eos_ids)
    requests = [partial(llama.complete, ids, k, new_tokens, **settings) for ids in prompts]
    answers = side_by_side(requests, max(1, llama.slots // k))
    return [[answer["tokens"] for answer in of_prompt] for of_prompt in answers]


def p_yes(llama: Llama, sequences: list[list[int]], yes_no: tuple[int, int]) -> list[float]:
    """P(Yes) against P(No) after each sequence, from the log-probabilities of all tokens."""
    requests = [partial(read, llama, ids, yes_no) for ids in sequences]
    return side_by_side(requests, llama.slots)


def read(llama: Llama, ids: list[int], yes_no: tuple[int, int]) -> float:
    [answer] = llama.complete(ids, 1, 1, n_probs=1000)
    shown = {entry["id"]: entry["logprob"] for entry in answer["completion_probabilities"][0]["top_logprobs"]}
    least = min(shown.values())  # a word beyond the first thousand is no likelier
    yes, no = (shown.get(token, least) for token in yes_no)
    return 1 / (1 + math.exp(no - yes))
