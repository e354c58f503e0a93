"""What the analyses in a line of scores.jsonl say of its steps, and what they were like.

A line's `samples` hold the analyses of each judged step. The first K of them are those of a run with this K.
"""

from collections.abc import Callable
from dataclasses import fields

from formats.columns import Column
from rprm import Analysis, reward

FIELDS = tuple(field.name for field in fields(Analysis))
COLUMNS = (  # what a table shows of the analyses
    Column("K", "k", 4, "d"),
    Column("unparsed %", "unparsed", 12, ".1f"),
    Column("truncated %", "truncated", 13, ".1f"),
    Column("forced", "forced", 8, "d"),
    Column("null", "null_rewards", 6, "d"),
    Column("tokens/step", "tokens_per_step", 13, ".0f"),
)


def rewards_of(line: dict, k: int) -> list[float | None]:
    """The reward of each judged step over its first k analyses; None where none of them has a P(Yes)."""
    steps = [[analysis_of(raw) for raw in analyses[:k]] for analyses in line["samples"]]
    return [reward(analyses) for analyses in steps]


def analysis_of(raw: dict) -> Analysis:
    """An analysis as it stands in a line that is checked already; fields that others have added stay out."""
    return Analysis(**{name: raw.get(name) for name in FIELDS})


def labelled_steps(n_steps: int, label: int | None, error_steps: list[int] | None = None) -> list[bool]:
    """Is the step right, for the first steps of a solution, as far as is known: up to the first wrong one.

    label 2                             ->   [True, True, False]
    4 steps, error_steps [2, 4]         ->   [True, False, True, False]     in PRMBench's rows, of all steps
    """
    if error_steps is not None:
        return [number not in error_steps for number in range(1, n_steps + 1)]
    if label is None:
        return []
    if label == -1:
        return [True] * n_steps
    return [True] * label + [False]


def numbers_of(line: dict, k: int) -> dict[str, int]:
    """What the first k analyses of each step were like: numbers, to be summed over lines."""
    steps = [analyses[:k] for analyses in line["samples"]]
    analyses = [analysis for step in steps for analysis in step]
    return {
        "solutions": 1,
        "steps": len(steps),
        "null_rewards": rewards_of(line, k).count(None),
        "analyses": len(analyses),
        "unparsed": sum(analysis["verdict"] is None for analysis in analyses),
        "truncated": sum(not analysis["finished"] for analysis in analyses),
        "forced": sum(analysis["forced"] for analysis in analyses),
        "tokens": sum(analysis["n_tokens"] for analysis in analyses),
    }


def rates(n: Callable[[str], int]) -> dict[str, float | None]:
    """The same as a table has them: rates in percent, None where there is nothing to take them over.

    n: the sum over the lines of each of the numbers, by its name.
    """
    analyses = n("analyses")
    return {
        "unparsed": 100 * n("unparsed") / analyses if analyses else None,
        "truncated": 100 * n("truncated") / analyses if analyses else None,
        "forced": n("forced"),
        "null_rewards": n("null_rewards"),
        "tokens_per_step": n("tokens") / n("steps") if n("steps") else None,
    }
