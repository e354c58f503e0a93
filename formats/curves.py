"""The curves of a training run, read from its metrics.jsonl for formats/page.py to draw.

    read_curves("runs/dpo") -> {"name": "dpo", "steps": 26, "panels": [
        {"title": "Loss", "series": [{"name": "train", "points": [[1, 0.78], [2, 0.75], ...]},
                                     {"name": "validation", "points": [[5, 0.77], ...]}]}, ...]}

A point's step counts the optimizer steps that were made. A long curve is thinned: each of its points is then
the mean of as many steps in a row.
"""
import math
from pathlib import Path

from plumbing.errors import BadInput
from plumbing.files import expect, get_field, read_jsonl

METRICS = {  # the panels, and the metrics in each
    "Loss": ("loss",),
    "Accuracy": ("accuracy",),
    "Margin": ("margin",),
    "Log-probability": ("chosen_logprob", "rejected_logprob"),
    "Yes rate": ("yes_rate",),
}
NAMES = [metric for metrics in METRICS.values() for metric in metrics]
SPLITS = ("train", "validation")
MOST_POINTS = 400  # of a curve; more would not be seen

Points = list[list[float]]  # [step, value]


def read_curves(run: str | Path) -> dict:
    """The curves of a run, given as its folder or its metrics.jsonl. What was not logged has no panel."""
    path = Path(run)
    if path.is_dir():
        path = path / "metrics.jsonl"
    points, steps, not_finite = read_points(path)
    panels = []
    for title, metrics in METRICS.items():
        series = []
        for metric in metrics:
            for split in SPLITS:
                found = points[metric, split]
                if found:
                    series.append({"name": series_name(metrics, metric, split), "points": thinned(found)})
        if series:
            panels.append({"title": title, "series": series})
    if not panels:
        raise BadInput(f"{path}: has no {', '.join(NAMES)}; give the folder of a training run")
    return {"name": path.absolute().parent.name, "steps": steps, "not_finite": not_finite, "panels": panels}


def read_points(path: Path) -> tuple[dict[tuple[str, str], Points], int, int]:
    """The points of each (metric, split), the number of steps, and how many values are not finite."""
    points = {(metric, split): [] for metric in NAMES for split in SPLITS}
    steps = 0
    not_finite = 0
    for where, row in read_jsonl(path):
        step = get_field(row, "step", int, where) + 1
        split = get_field(row, "split", str, where)
        if split not in SPLITS:
            raise BadInput(
                f"{where}: field 'split': {split[:40]!r} is neither {' nor '.join(SPLITS)}; correct it"
            )
        steps = max(steps, step)
        for metric in NAMES:
            if row.get(metric) is None:
                continue
            value = expect(row[metric], float, f"{where}: field '{metric}'")
            if math.isfinite(value):
                points[metric, split].append([step, value])
            else:
                not_finite += 1
    return points, steps, not_finite


def series_name(metrics: tuple[str, ...], metric: str, split: str) -> str:
    """ "validation", or where a panel has several metrics "chosen, validation"."""
    if len(metrics) == 1:
        return split
    return f"{metric.split('_')[0]}, {split}"


def thinned(points: Points) -> Points:
    """At most MOST_POINTS: the means of equally many points in a row."""
    width = math.ceil(len(points) / MOST_POINTS)
    found = []
    for start in range(0, len(points), width):
        group = points[start : start + width]
        step = sum(point[0] for point in group) / len(group)
        value = sum(point[1] for point in group) / len(group)
        found.append([step, value])
    return found
