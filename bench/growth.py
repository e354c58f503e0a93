"""Does a case cost the same in a long run? Time per case and peak memory for 10, 100 and 1,000 cases.

    python bench/growth.py                                         # a tiny random model and random prompts
    python bench/growth.py --model SMALL --data test.jsonl

Each size has a process of its own. The end-of-text token is off and ten cases are decoded side by side, so that the
batch is as full at 10 cases as at 1,000.
"""
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Callable, Iterator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's modules; this folder is `bench`
import numpy as np
import torch

from bench.common import BenchConfig, Row, consecutive_cases, in_turn, load_words, median_run, run_side_or_all
from checkpoint import load_model
from checkpoint.scratch import init_weights
from plumbing.cli import LOWER_IF_MEMORY_RUNS_OUT, run
from plumbing.queues import answers_of
import fast
from generate import Request
from model import Decoder, ModelConfig
from rprm import Sampler, Sampling

TINY = ModelConfig(model_type="llama", vocab_size=2000, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
                   num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-6, rope_theta=1e4, rope_scaling=None, tie_word_embeddings=True,
                   max_position_embeddings=4096, qkv_bias=False, qk_norm=False)


@dataclass(frozen=True, kw_only=True)
class Config(BenchConfig):
    model: Annotated[str | None, "a small checkpoint (default: a random one, made on the spot)"] = None
    data: Annotated[str | None, "solutions for it, in ProcessBench's format"] = None
    sizes: Annotated[tuple[int, ...], "numbers of cases", (1, None)] = (10, 100, 1000)
    k: Annotated[int, "continuations per case", (1, None)] = 4
    new_tokens: Annotated[int, "tokens per continuation", (2, None)] = 32
    batch_size: Annotated[int, "cases side by side", (1, None), LOWER_IF_MEMORY_RUNS_OUT] = 10


def main(config: Config) -> None:
    run_side_or_all(config, {"ours": ours}, measure)


def measure(config: Config) -> list[Row]:
    sides = {f"{n} cases": replace(config, side="ours", sizes=(n,)) for n in config.sizes}
    found = in_turn(__file__, sides, config.repeats)
    medians = [median_run(runs, "ms_per_case") for runs in found.values()]
    times, peaks = [m["ms_per_case"] for m in medians], [m["peak_mb"] for m in medians]
    flat = (max(times) - min(times)) / (max(times) + min(times))  # the distance of both extremes from their middle
    note = "; ".join(f"{n} cases: {t:.1f} ms each, peak {p:.0f} MB" for n, t, p in zip(config.sizes, times, peaks)) + (
        "" if config.model else "; a random model")
    return [Row(f"growth, {config.sizes[0]} to {config.sizes[-1]} cases", "ms/case", times[-1], "flat ± 20%, memory flat",
                flat <= 0.2 and max(peaks) <= 1.2 * min(peaks), memory=max(peaks), note=f"± {flat:.0%}: {note}", raw=found)]


def ours(config: Config) -> dict:
    work = of_checkpoint(config) if config.model else of_random_model(config)
    [n] = config.sizes
    for _ in work(config.batch_size, 2):  # warm up
        pass
    start = time.perf_counter()
    done = sum(1 for _ in work(n, config.new_tokens))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "cases": done, "ms_per_case": 1000 * seconds / done}


def of_checkpoint(config: Config) -> Callable[[int, int], Iterator]:
    """(n, new_tokens) -> the analyses of n cases by a checkpoint, as they are completed."""
    (tokenizer, prompt), model = load_words(config), fast.speed_up(load_model(config.model))

    def work(n: int, new_tokens: int) -> Iterator:
        sampler = Sampler(model, tokenizer, prompt, Sampling(k=config.k, max_new_tokens=new_tokens, seed=config.seed,
                                                             batch_size=config.batch_size, force=False), fast.engine_for(model))
        sampler.engine.eos = sampler.engine.eos[:0]  # end-of-text off
        return sampler.analyses(consecutive_cases(config.data, n))
    return work


def of_random_model(config: Config) -> Callable[[int, int], Iterator]:
    """The same for continuations of random prompts of official length: 500 shared tokens, 100 to 300 of their own."""
    model = fast.speed_up(Decoder(TINY))
    init_weights(model, torch.Generator().manual_seed(config.seed))

    def work(n: int, new_tokens: int) -> Iterator:
        engine = fast.engine_for(model)(model, [], (0, 1), max_new_tokens=new_tokens, max_rows=config.batch_size * config.k)
        rng = np.random.default_rng(config.seed)
        shared = rng.integers(TINY.vocab_size, size=500).tolist()
        return answers_of(engine, (Request(shared + rng.integers(TINY.vocab_size, size=rng.integers(100, 300)).tolist(),
                                  list(range(i, i + config.k))) for i in range(n)))
    return work


if __name__ == "__main__":
    run((Config, main))
