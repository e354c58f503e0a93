"""The tables of a run of judging: ProcessBench's, PRMBench's, or both, as the lines are.

    tally = Tally(ks=(1, 4), thresholds=(0.5, 0.61))
    for line in lines:                       # of scores.jsonl
        tally.add(line)
    rows = tally.rows(sources=["gsm8k"])     # as they are saved
    print_rows(rows)

A tally holds sums, and the rewards of labelled steps, so that any number of lines can pass, and those of
several ranks can be added.
"""

from collections.abc import Iterable, Sequence

from formats import prmbench, processbench
from formats.prmbench import PRMBench
from formats.processbench import ProcessBench


class Tally:
    """ks, thresholds: the tables' numbers of analyses, and PRMBench's thresholds."""

    def __init__(self, ks: Sequence[int], thresholds: Sequence[float]):
        self.processbench = ProcessBench(ks)
        self.prmbench = PRMBench(ks, thresholds)

    def add(self, line: dict) -> None:
        benchmark = self.prmbench if is_prmbench(line) else self.processbench
        benchmark.add(line)

    @classmethod
    def sum(cls, tallies: Iterable["Tally"]) -> "Tally":
        first, *others = tallies
        for other in others:
            first.processbench.update(other.processbench)
            first.prmbench.update(other.prmbench)
        return first

    def rows(self, sources: Sequence[str]) -> list[dict]:
        """sources: ProcessBench's files, in the order of their rows."""
        return self.processbench.rows(sources) + self.prmbench.rows()

    def so_far(self, line: dict, k: int) -> str:
        """The figure of the benchmark that a line belongs to, of what was added until now: "F1 61.2"."""
        if is_prmbench(line):
            return f"PRMScore {self.prmbench.so_far(k):.1f}"
        return f"F1 {self.processbench.f1_so_far(line['source'], k):.1f}"


def is_prmbench(line: dict) -> bool:
    return "classification" in line


def print_rows(rows: list[dict]) -> None:
    own = [row for row in rows if "classes" not in row]
    if own:
        processbench.print_rows(own)
    own = [row for row in rows if "classes" in row]
    if own:
        prmbench.print_rows(own)
