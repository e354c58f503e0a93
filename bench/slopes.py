"""How does the time of a reward grow with K, with the prompt, with a problem's candidates, with the steps?

    python bench/slopes.py --model models/smollm2 --data models/gsm8k.json
    python bench/slopes.py --what prompt --sizes 1000 4000

One of the four changes, the others stay: K = 10, a prompt of about 700 tokens, one candidate, one step.
End-of-text is off, so every analysis has --new-tokens tokens. The exponent is the slope between two sizes, of
log seconds over log size: 1 is linear, 0 free.
"""
import math
import statistics
import sys
import time
from dataclasses import dataclass, replace
from itertools import chain, cycle, islice, pairwise
from pathlib import Path
from typing import Annotated, Callable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's modules
import torch

import fast
from bench.common import BenchConfig, Row, in_turn, load_words, run_side_or_all
from checkpoint import load_model
from formats.columns import Column, print_columns
from formats.readers import read_solutions
from plumbing.cli import run
from rprm import Case, Sampler, Sampling

SIZES = {
    "k": (1, 2, 4, 8, 16, 32, 64),
    "prompt": (500, 1000, 2000, 4000, 7500),  # tokens of the problem; some 560 more are instructions
    "candidates": (1, 2, 4, 8, 16, 32),
    "steps": (1, 2, 4, 8, 16, 32),
}
COLUMNS = (
    Column("", "what", 12, "s"),
    Column("size", "size", 8, "d"),
    Column("seconds", "seconds", 10, ".2f"),
    Column("a unit", "each", 10, ".3f"),
    Column("exponent", "exponent", 10, ".2f"),
    Column("prompt tokens", "prompt_tokens", 15, "d"),
    Column("computed", "prefill_tokens", 10, "d"),
    Column("sampled", "new_tokens", 9, "d"),
)


@dataclass(frozen=True, kw_only=True)
class Config(BenchConfig):
    what: Annotated[tuple[str, ...], "what grows", tuple(SIZES)] = tuple(SIZES)
    sizes: Annotated[tuple[int, ...], "instead of the usual ones", (1, None)] = ()
    new_tokens: Annotated[int, "tokens per analysis", (2, None)] = 32


def main(config: Config) -> None:
    run_side_or_all(config, {"ours": ours}, measure)


def measure(config: Config) -> list[Row]:
    rows = []
    lines = []
    for what in config.what:
        side = replace(config, side="ours", what=(what,), repeats=1)
        found = in_turn(__file__, {what: side}, config.repeats)[what]
        points = [median_point(points) for points in zip(*(run["points"] for run in found), strict=True)]
        with_exponents(points)
        lines += [{"what": what} | point for point in points]
        last = points[-1]
        each = ", ".join(f"{point['size']}: {point['seconds']:.2f} s" for point in points)
        rows.append(Row(f"growth with {what}, to {last['size']}", "s", last["seconds"], "–", met=None,
                        note=each, raw={what: found}))
    print()
    print_columns(lines, COLUMNS)
    return rows


def median_point(points: tuple[dict, ...]) -> dict:
    return points[0] | {"seconds": statistics.median(point["seconds"] for point in points)}


def with_exponents(points: list[dict]) -> None:
    """Adds to each point its seconds a unit, and the exponent between the one before and itself."""
    for point in points:
        point["each"] = point["seconds"] / point["size"]
    for before, point in pairwise(points):
        growth = math.log(point["seconds"] / before["seconds"])
        point["exponent"] = growth / math.log(point["size"] / before["size"])


def ours(config: Config) -> dict:
    """The time of each size, in one process."""
    [what] = config.what
    words = load_words(config)
    model = load_model(config.model)
    fast.keep_freed_memory()
    fast.speed_up(model)
    solutions = [solution for _, solution in read_solutions(config.data)]
    timed(model, words, cases_of(what, 1, solutions, words), k=2, new_tokens=2)  # warm up
    points = []
    for size in config.sizes or SIZES[what]:
        k = size if what == "k" else 10
        cases = cases_of(what, size, solutions, words)
        points.append({"size": size} | timed(model, words, cases, k, config.new_tokens))
    return {"seconds": sum(point["seconds"] for point in points), "points": points}


def timed(model: torch.nn.Module, words: tuple, cases: list[Case], k: int, new_tokens: int) -> dict:
    sampling = Sampling(k=k, max_new_tokens=new_tokens, batch_size=16)
    sampler = Sampler(model, *words, sampling, fast.engine_for(model))
    engine = sampler.engine
    engine.eos = engine.eos[:0]  # end-of-text off
    start = time.perf_counter()
    for _ in sampler.analyses(cases):
        pass
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "prompt_tokens": engine.prompt_tokens,
        "prefill_tokens": engine.prefill_tokens,
        "new_tokens": engine.new_tokens,
    }


# ------------------------------------------------------------------------------------------ cases

def cases_of(what: str, size: int, solutions: list, words: tuple) -> list[Case]:
    if what == "prompt":
        tokenizer, _ = words
        return [long_case(solutions, lambda text: len(tokenizer.encode(text)), size)]
    if what == "candidates":
        return candidates(solutions, size)
    if what == "steps":
        return cases_of_steps(solutions[0].problem, many_steps(solutions, size))
    return [first_case(solutions)]


def first_case(solutions: list) -> Case:
    return Case(solutions[0].problem, [], solutions[0].steps[0])


def long_case(solutions: list, length_of: Callable[[str], int], n_tokens: int) -> Case:
    """A case with a problem of n tokens: other problems stand before its own."""
    text = solutions[0].problem
    for other in cycle(solutions[1:]):
        if length_of(text) >= n_tokens:
            break
        text = f"{other.problem}\n{text}"
    return replace(first_case(solutions), problem=text)


def candidates(solutions: list, n: int) -> list[Case]:
    """The steps of n solutions of three steps, as if all were of the first problem."""
    problem = solutions[0].problem
    found = []
    for solution in islice((s for s in cycle(solutions) if len(s.steps) >= 3), n):
        found += cases_of_steps(problem, solution.steps[:3])
    return found


def cases_of_steps(problem: str, steps: list[str]) -> list[Case]:
    return [Case(problem, steps[:t], steps[t]) for t in range(len(steps))]


def many_steps(solutions: list, n: int) -> list[str]:
    """The first n steps of all solutions, one after the other."""
    return list(islice(chain.from_iterable(solution.steps for solution in solutions), n))


if __name__ == "__main__":
    run((Config, main))
