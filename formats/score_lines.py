"""Lines of scores.jsonl, read and checked: what a judge said of each solution.

    for where, line in read_score_lines("scores.jsonl"):
        line.solution.label, line.analyses[0][0].p_yes
"""
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

from formats.readers import read_solution
from formats.rows import Solution
from formats.samples import read_analyses
from plumbing.errors import BadInput
from plumbing.files import expect, get_field, read_jsonl
from rprm import Analysis, reward

REWARD_TOLERANCE = 1e-6


@dataclass(frozen=True)
class ScoreLine:
    source: str  # the file that the solution is from
    solution: Solution
    analyses: list[list[Analysis]]  # K of each judged step; a judge may stop before the last step
    rewards: list[float | None]  # of each judged step


def read_score_lines(path: str | Path) -> Iterator[tuple[str, ScoreLine]]:
    """("FILE:LINE", line) for each line, as a stream."""
    for where, row in read_jsonl(path):
        yield where, read_score_line(row, where)


def read_score_line(row: dict, where: str) -> ScoreLine:
    """Raises BadInput unless each judged step has analyses, and its reward is the mean of their P(Yes)."""
    solution = read_solution(row, where)
    samples = get_field(row, "samples", list, where)
    if not 1 <= len(samples) <= len(solution.steps):
        raise BadInput(
            f"{where}: field 'samples': has {len(samples)} steps where the solution has "
            f"{len(solution.steps)}; judge it again"
        )
    analyses = []
    for number, step in enumerate(samples, 1):
        here = f"{where}: field 'samples', step {number}"
        found = read_analyses({"analyses": step}, here)
        if not found:
            raise BadInput(f"{here}: has no analyses; judge it again")
        analyses.append(found)
    rewards = read_rewards(row, analyses, where)
    return ScoreLine(get_field(row, "source", str, where), solution, analyses, rewards)


def read_rewards(row: dict, analyses: list[list[Analysis]], where: str) -> list[float | None]:
    """The means of P(Yes), which the file must agree with: a page shows no other numbers than its file."""
    claimed = get_field(row, "rewards", list, where)
    if len(claimed) != len(analyses):
        raise BadInput(
            f"{where}: field 'rewards': has {len(claimed)} of them for {len(analyses)} judged steps; "
            f"judge it again"
        )
    rewards = []
    for number, (value, step) in enumerate(zip(claimed, analyses, strict=True), 1):
        here = f"{where}: field 'rewards', step {number}"
        mean = reward(step)
        agrees = value is None and mean is None
        if value is not None and mean is not None:
            agrees = math.isclose(expect(value, float, here), mean, abs_tol=REWARD_TOLERANCE)
        if not agrees:
            raise BadInput(
                f"{here}: {str(value)[:40]} is not the mean of the samples' P(Yes), {mean}; judge it again"
            )
        rewards.append(mean)
    return rewards
