"""Sampling against Transformers' `generate`, vLLM and llama.cpp: K continuations of each of 16 verification prompts.

    python bench/sampling.py --model FOLDER --data gsm8k.json            # the peer on one batch of them
    python bench/sampling.py --model FOLDER --data gsm8k.json --full     # the peer on all of them, in batches of 1, 4 and 16
    python bench/sampling.py --model FOLDER --data gsm8k.json --peers vllm llama.cpp     # they do all of them in any case
    python bench/sampling.py --model SMALL --data test.jsonl --natural-ends --prompts 200 --new-tokens 200

Each side is the best of its dtypes, and the peer of its batch sizes too; the note has fp32 against fp32. Figures are
tokens per second, so the peer may do fewer prompts. Without --natural-ends the end-of-text token is switched off and both
sides sample the same number.
"""
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Callable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's modules; this folder is `bench`
import torch

from bench.common import (Clock, PeersConfig, Row, further_peers, in_turn, linear_rate, median_run, peak_mb, prompt_ids,
                          rows_of_further_peers, run_side_or_all, scattered_cases)
from checkpoint import DTYPES, load_model
from plumbing.cli import run
from plumbing.queues import answers_of
import fast
from generate import Engine, Request
from rprm import analysis_seed, yes_no_ids


@dataclass(frozen=True, kw_only=True)
class Config(PeersConfig):
    prompts: Annotated[int, "cases, drawn at random", (1, None)] = 16
    k: Annotated[int, "continuations of each", (1, None)] = 10
    new_tokens: Annotated[int, "tokens per continuation (at most, with --natural-ends)", (2, None)] = 64
    rows: Annotated[int, "continuations that ours decodes side by side", (1, None)] = 160
    natural_ends: Annotated[bool, "continuations end where the model ends them"] = False
    temperature: Annotated[float, "sampling temperature", (0.01, None)] = 0.95
    top_p: Annotated[float, "nucleus", (0.01, 1)] = 0.95
    dtypes: Annotated[tuple[str, ...], "dtypes that ours tries", ("float32", "bfloat16")] = ("float32", "bfloat16")
    peer_prompts: Annotated[int, "how many of the prompts the peer does, a batch at least", (1, None)] = 1
    peer_batches: Annotated[tuple[int, ...], "prompts side by side that the peer tries", (1, None)] = (1, 2)
    full: Annotated[bool, "the peer does all prompts, in batches of 1, 4 and 16"] = False


def main(config: Config) -> None:
    run_side_or_all(config, {"ours": ours, "plain": plain, "peer": peer, "vllm": vllm, "llama": llama}, measure)


def measure(config: Config) -> list[Row]:
    if config.full:
        config = replace(config, peer_prompts=config.prompts, peer_batches=(1, 4, 16))
    sides = {f"ours, {dtype}": replace(config, side="ours", dtypes=(dtype,)) for dtype in config.dtypes}
    sides |= {f"plain, {dtype}": replace(config, side="plain", dtypes=(dtype,)) for dtype in config.dtypes}
    sides |= {f"peer, {dtype}, batches of {size}": replace(config, side="peer", peer_batches=(size,), peer_dtypes=(dtype,))
              for size in config.peer_batches for dtype in config.peer_dtypes}
    sides |= further_peers(config)
    found = in_turn(__file__, sides, config.repeats)
    medians = {name: median_run(runs, "tokens_per_second") for name, runs in found.items()}

    def best_of(side: str, dtypes: tuple[str, ...] = ("float32", "bfloat16")) -> tuple[str, dict]:
        own = [(name, m) for name, m in medians.items() if name.startswith(side) and any(dtype in name for dtype in dtypes)]
        return max(own, key=lambda item: item[1]["tokens_per_second"])
    (our_name, our), (_, plainly), (best_name, best) = best_of("ours"), best_of("plain"), best_of("peer")
    ratio = our["tokens_per_second"] / best["tokens_per_second"]
    shares = {name: m["decode_tokens_per_second"] / m["linear_tokens_per_second"] for name, m in medians.items() if name.startswith("ours")}
    share = shares[our_name]
    each = our["tokens"] / config.prompts, best["tokens"] / best["prompts"]
    bar = config.natural_ends or (share >= 0.6 and each[0] == each[1])
    note = (f"{our_name}: {our['tokens']} tokens in {our['seconds']:.1f} s ({our['prefill_seconds']:.1f} s of it prefill: "
            f"{our['prefill_tokens']} of {our['prompt_tokens']} prompt tokens computed); tokens per prompt {each[0]:.0f} / {each[1]:.0f}; "
            f"decoding {our['decode_tokens_per_second']:.0f} tokens/s, the linear layers alone {our['linear_tokens_per_second']:.0f} "
            f"at {our['linear_rows']} rows ({', '.join(f'{name} {own:.0%}' for name, own in shares.items())} of it); "
            f"{best_name} on {best['prompts']} of the {config.prompts} prompts; all: "
            + ", ".join(f"{name} {m['tokens_per_second']:.1f}" for name, m in medians.items()))
    if {"float32"} <= set(config.dtypes) & set(config.peer_dtypes):
        fp32, peer32 = (best_of(side, ("float32",))[1]["tokens_per_second"] for side in ("ours", "peer"))
        note += f"; fp32 against fp32: {fp32 / peer32:.1f}×"
    ends = "natural ends" if config.natural_ends else f"{config.new_tokens} tokens"
    row = Row(f"sampling {config.prompts} prompts × K={config.k}, {ends}", "tokens/s", our["tokens_per_second"],
              "≥ 8×" if config.natural_ends else "≥ 8×, roofline ≥ 60%", ratio >= 8 and bar, plainly["tokens_per_second"], best["tokens_per_second"], ratio,
              None if config.natural_ends else share, our["peak_mb"], best["peak_mb"], note, found)
    return [row, *rows_of_further_peers(row, medians, "tokens_per_second")]


def ours(config: Config) -> dict:
    return timed(config, is_plain=False)


def plain(config: Config) -> dict:
    return timed(config, is_plain=True)


def timed(config: Config, is_plain: bool) -> dict:
    """The project's sampling, fast or as generate.py and model.py read."""
    cases = scattered_cases(config.data, config.prompts, config.seed)
    tokenizer, prompts = prompt_ids(config, cases)
    model = load_model(config.model, DTYPES[config.dtypes[0]], "cpu")
    engine_class = Engine
    if not is_plain:
        fast.keep_freed_memory()
        engine_class = fast.for_sampling(model)
    eos = tokenizer.eos_ids if config.natural_ends else []

    def engine(new_tokens: int) -> Engine:
        return engine_class(model, eos, yes_no_ids(tokenizer), config.temperature, config.top_p, new_tokens, config.rows)
    requests = [Request(ids, [analysis_seed(config.seed, case, k) for k in range(config.k)]) for ids, case in zip(prompts, cases)]
    list(answers_of(engine(4), requests[:1]))  # warm up
    it, prefill = engine(config.new_tokens), Clock()
    prefill_of = "prefill" if is_plain else "prefill_waiting"
    setattr(it, prefill_of, prefill.around(getattr(it, prefill_of)))
    start = time.perf_counter()
    for _ in answers_of(it, requests):
        pass
    seconds, peak = time.perf_counter() - start, peak_mb()
    drawn_by_prefill, rows = config.prompts * config.k, min(config.rows, config.prompts * config.k)
    return {"seconds": seconds, "tokens": it.new_tokens, "tokens_per_second": it.new_tokens / seconds, "prefill_seconds": prefill.seconds,
            "prompt_tokens": it.prompt_tokens, "prefill_tokens": it.prefill_tokens,
            "decode_tokens_per_second": (it.new_tokens - drawn_by_prefill) / (seconds - prefill.seconds),
            "linear_rows": rows, "linear_tokens_per_second": linear_rate(model, rows), "peak_mb": peak}


def peer(config: Config) -> dict:
    from bench.peer import generate, load
    [dtype], [size] = config.peer_dtypes, config.peer_batches
    tokenizer, prompts = prompt_ids(config, scattered_cases(config.data, config.prompts, config.seed)[:max(size, config.peer_prompts)])
    model = load(config.model, dtype)
    eos = tokenizer.eos_ids if config.natural_ends else []
    generate(model, prompts[:1], 2, 2, eos, config.temperature, config.top_p)  # warm up
    torch.manual_seed(config.seed)
    start, tokens = time.perf_counter(), 0
    for first in range(0, len(prompts), size):
        rows = generate(model, prompts[first:first + size], config.k, config.new_tokens, eos, config.temperature, config.top_p)
        tokens += sum(map(len, rows))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds, "prompts": len(prompts),
            "prompt_tokens": sum(map(len, prompts))}


def vllm(config: Config) -> dict:
    from bench import peer_vllm
    [dtype] = config.peer_dtypes
    model = peer_vllm.load(config.model, dtype, config.vllm_compiled)
    found = further_peer(config, partial(peer_vllm.generate, model))
    return found | {"peak_mb": peer_vllm.peak_mb()}


def llama(config: Config) -> dict:
    from bench import peer_llama
    model = peer_llama.Llama(config.model, torch.get_num_threads(), config.slots, config.slot_context)
    return further_peer(config, partial(peer_llama.generate, model))


def further_peer(config: Config, generate: Callable) -> dict:
    tokenizer, prompts = prompt_ids(config, scattered_cases(config.data, config.prompts, config.seed))
    eos = tokenizer.eos_ids if config.natural_ends else []
    generate([prompts[0][::-1]], config.k, 4, eos, config.temperature, config.top_p)  # warm up, with a prompt that shares nothing
    start = time.perf_counter()
    rows = generate(prompts, config.k, config.new_tokens, eos, config.temperature, config.top_p)
    seconds = time.perf_counter() - start
    tokens = sum(len(row) for of_prompt in rows for row in of_prompt)
    return {"seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds, "prompts": len(prompts),
            "prompt_tokens": sum(map(len, prompts))}


if __name__ == "__main__":
    run((Config, main))
