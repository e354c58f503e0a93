"""scores.jsonl as numbers: what thresholds, calibration and best-of-N are made of."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from formats.analyses import labelled_steps
from formats.rows import Solution
from formats.score_lines import ScoreLine, read_score_lines
from plumbing.errors import BadInput
from rprm import reward


@dataclass(frozen=True)
class Scored:
    """A line of scores.jsonl, without its analyses."""

    where: str  # FILE:LINE
    source: str
    solution: Solution
    rewards: np.ndarray  # (judged steps,) in [0, 1]; nan = null
    left: str | None  # the aggregate by which it could no longer be the best, and was left (judge --best)
    right: np.ndarray  # (labelled steps,) bool: those up to the first wrong one; in PRMBench's rows all

    @property
    def is_prmbench(self) -> bool:
        return "classification" in self.solution.extra

    def check_judged(self, n: int) -> None:
        """Raise BadInput unless the first n steps were judged."""
        if len(self.rewards) < n:
            raise BadInput(
                f"{self.where}: of {len(self.solution.steps)} steps only the first {len(self.rewards)} were "
                f"judged, up to one predicted wrong; judge the solutions anew with --all-steps"
            )


def read_scores(paths: Iterable[str | Path], k: int | None = None) -> list[Scored]:
    """The lines of these files; rewards over the first k analyses of each step, or over all. Raises BadInput.
    """
    found = []
    for path in paths:
        before = len(found)
        for where, line in read_score_lines(path):
            found.append(scored(line, where, k))
        if len(found) == before:
            raise BadInput(f"{path}: has no scores; check the file")
    return found


def scored(line: ScoreLine, where: str, k: int | None) -> Scored:
    rewards = line.rewards
    if k is not None:
        for analyses in line.analyses:
            if 0 < len(analyses) < k:
                raise BadInput(
                    f"{where}: has {len(analyses)} analyses of a step, fewer than --k {k}; give a lower --k"
                )
        rewards = [reward(analyses[:k]) for analyses in line.analyses]
    right = labelled_steps(
        len(line.solution.steps), line.solution.label, line.solution.extra.get("error_steps")
    )
    values = [np.nan if value is None else value for value in rewards]
    return Scored(
        where=where,
        source=line.source,
        solution=line.solution,
        rewards=np.array(values, dtype=float),
        left=line.left,
        right=np.array(right, dtype=bool),
    )
