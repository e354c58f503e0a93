"""The tables of a run of judging: ProcessBench's, PRMBench's, or both, as the lines are.

    tally = Tally(ks=(1, 4), thresholds=(0.5, 0.61))
    for line in lines:                       # of scores.jsonl
        tally.add(line)
    rows = tally.rows(sources=["gsm8k"])     # as they are saved
    print_rows(rows)

A tally holds sums, and the rewards of labelled steps, so that any number of lines can pass, and those of
several ranks can be added.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from formats import prmbench, processbench
from formats.prmbench import PRMBench
from formats.processbench import ProcessBench
from formats.score_lines import too_long_steps


class Tally:
    """ks, thresholds: the tables' numbers of analyses, and PRMBench's thresholds."""

    def __init__(self, ks: Sequence[int], thresholds: Sequence[float]):
        self.processbench = ProcessBench(ks)
        self.prmbench = PRMBench(ks, thresholds)
        self.too_long: list[str] = []  # names of steps that could not be judged
        self.numbers = Counter()  # of steps judged and left out by --best, and of the tokens of the former

    def add(self, line: dict) -> None:
        benchmark = self.prmbench if is_prmbench(line) else self.processbench
        benchmark.add(line)
        self.too_long += too_long_steps(line)
        self.numbers["judged"] += len(line["samples"])
        self.numbers["tokens"] += sum(a["n_tokens"] for analyses in line["samples"] for a in analyses)
        if "left" in line:
            self.numbers["left"] += 1
            self.numbers["not judged"] += len(line["steps"]) - len(line["samples"])

    @classmethod
    def sum(cls, tallies: Iterable["Tally"]) -> "Tally":
        first, *others = tallies
        for other in others:
            first.processbench.update(other.processbench)
            first.prmbench.update(other.prmbench)
            first.too_long += other.too_long
            first.numbers.update(other.numbers)
        return first

    def rows(self, sources: Sequence[str]) -> list[dict]:
        """sources: ProcessBench's files, in the order of their rows."""
        return self.processbench.rows(sources) + self.prmbench.rows()

    def so_far(self, line: dict, k: int) -> str:
        """The figure of the benchmark that a line belongs to, of what was added until now: "F1 61.2"."""
        if is_prmbench(line):
            return f"PRMScore {self.prmbench.so_far(k):.1f}"
        return f"F1 {self.processbench.f1_so_far(line['source'], k):.1f}"


    def print_left(self) -> None:
        """What --best has saved: the steps that were not judged would have taken tokens like the others."""
        n = self.numbers
        if n["left"]:
            saved = n["not judged"] * n["tokens"] / n["judged"]
            print(
                f"{n['left']} candidates were left when they could no longer be the best: {n['not judged']} "
                f"of {n['judged'] + n['not judged']} steps were not judged, about {saved:.0f} tokens"
            )


def is_prmbench(line: dict) -> bool:
    return "classification" in line


def print_rows(rows: list[dict]) -> None:
    own = [row for row in rows if "classes" not in row]
    if own:
        processbench.print_rows(own)
    own = [row for row in rows if "classes" in row]
    if own:
        prmbench.print_rows(own)
