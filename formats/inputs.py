"""The solutions of several files as one sequence."""

from bisect import bisect
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from formats.candidates import is_text
from formats.readers import read_solutions
from formats.rows import Solution
from plumbing.errors import BadInput


class Inputs(Sequence):
    """The first `limit` solutions of each file, read on demand: inputs[i] -> (source, Solution).

    A source is a file's name without its ending, or its path where two files have one name.
    """

    def __init__(self, paths: Sequence[str], limit: int | None, split: str):
        stems = [Path(path).stem for path in paths]
        self.sources = [stem if stems.count(stem) == 1 else path for stem, path in zip(stems, paths)]
        self.files = [read_solutions(path, split) for path in paths]
        self.split = split
        for path, solutions in zip(paths, self.files):
            if not len(solutions):
                raise BadInput(f"{path}: has no solutions; check the file")
        self.ends = list(accumulate(min(len(solutions), limit or len(solutions)) for solutions in self.files))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: int) -> tuple[str, Solution]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        file = bisect(self.ends, i)
        before = self.ends[file - 1] if file else 0
        _, solution = self.files[file][i - before]
        return self.sources[file], solution

    def print_split(self) -> None:
        """Show the steps that were made of each file's first row, if it is raw text."""
        for solutions in self.files:
            where, row = solutions.rows[0]
            if not is_text(row):
                continue
            _, first = solutions[0]
            print(f"{where}: raw text, split into {len(first.steps)} steps (--split {self.split}):")
            for number, step in enumerate(first.steps, 1):
                print(f"  Step {number}: {step}")
