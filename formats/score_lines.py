"""Lines of scores.jsonl: what a judge said of each solution. Written, and read and checked.

    for where, line in read_score_lines("scores.jsonl"):
        line.solution.label, line.analyses[0][0].p_yes
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Iterator

from formats.processbench import first_below
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
    analyses: list[list[Analysis]]  # K of each judged step, none if it is too long; a judge may stop early
    rewards: list[float | None]  # of each judged step
    left: str | None = None  # the aggregate by which it could no longer be the best, so that it was left


def read_score_lines(path: str | Path) -> Iterator[tuple[str, ScoreLine]]:
    """("FILE:LINE", line) for each line, as a stream."""
    for where, row in read_jsonl(path):
        yield where, read_score_line(row, where)


def read_score_line(row: dict, where: str) -> ScoreLine:
    """Raises BadInput unless the reward of each judged step is that of its analyses (`rprm.reward`)."""
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
        analyses.append(read_analyses({"analyses": step}, here))
    rewards = read_rewards(row, analyses, where)
    left = get_field(row, "left", str, where) if "left" in row else None
    return ScoreLine(get_field(row, "source", str, where), solution, analyses, rewards, left)


def read_rewards(row: dict, analyses: list[list[Analysis]], where: str) -> list[float | None]:
    """The rewards, made of the samples again. The file must agree, so that all tables say the same of it."""
    claimed = get_field(row, "rewards", list, where)
    if len(claimed) != len(analyses):
        raise BadInput(
            f"{where}: field 'rewards': has {len(claimed)} of them for {len(analyses)} judged steps; "
            f"judge it again"
        )
    rewards = []
    for number, (value, step) in enumerate(zip(claimed, analyses, strict=True), 1):
        here = f"{where}: field 'rewards', step {number}"
        own = reward(step)
        agrees = value is None and own is None
        if value is not None and own is not None:
            agrees = math.isclose(expect(value, float, here), own, abs_tol=REWARD_TOLERANCE)
        if not agrees:
            raise BadInput(
                f"{here}: {str(value)[:40]} is not the reward of the samples, {own}; judge it again"
            )
        rewards.append(own)
    return rewards


# ---------------------------------------------------------------------------------------------- written


def item_of(source: str, solution: Solution) -> dict:
    """What a line says of its solution, before it is judged."""
    return {
        "source": source,
        "id": solution.id,
        "problem": solution.problem,
        "steps": list(solution.steps),
        "label": solution.label,
        **solution.extra,
    }


def score_line(
    source: str, solution: Solution, steps: list[list[Analysis]], ks: tuple[int, ...], threshold: float
) -> dict:
    """The line of a judged solution: rewards and prediction at the largest K, predictions at each.

    steps: the analyses of each step that was judged.
    """
    return item_of(source, solution) | {
        "rewards": [reward(analyses) for analyses in steps],
        "prediction": predict(steps, max(ks), threshold),
        "predictions": {str(k): predict(steps, k, threshold) for k in ks},
        "samples": [[asdict(analysis) for analysis in analyses] for analyses in steps],
    }


def predict(steps: list[list[Analysis]], k: int, threshold: float) -> int:
    """The first step whose reward, over its first k analyses, is below the threshold; -1 if none is."""
    return first_below([reward(analyses[:k]) for analyses in steps], threshold)


# -------------------------------------------------------------------------------------------- of a killed run


def check_line(line: dict, ks: tuple[int, ...], where: str) -> dict:
    """A line that a killed run left. Raises BadInput unless the tables can be made of it."""
    for analyses in get_field(line, "samples", list, where):
        read_analyses({"analyses": analyses}, where)
    predictions = get_field(line, "predictions", dict, where)
    if not line["samples"] or set(predictions) != {str(k) for k in ks} or "rewards" not in line:
        raise BadInput(f"{where}: not a line of these scores; give --overwrite to start anew")
    return line


def too_long_steps(line: dict) -> list[str]:
    """The names of the steps that were not judged, since their prompts are longer than the context."""
    return [
        f"{line['source']} {line['id']} step {t}"
        for t, analyses in enumerate(line["samples"], 1)
        if not analyses
    ]
