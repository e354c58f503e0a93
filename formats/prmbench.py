"""PRMBench's protocol: which steps of a solution are wrong, in nine classes of errors?

A step is predicted right when its reward is at least the threshold; positive = right. The steps of a class
are pooled, the first wrong one and those after it alike, so every step must be judged:

    F1            of the right steps; negative F1: of the wrong ones
    PRMScore      the mean of the two; F1 alone for multi_solutions, whose steps are all right
    groups        the means of their classes' PRMScores
    overall       the PRMScore of the steps of all nine classes pooled, which is not the mean of the classes

Where the numbers could be read in several ways, they are read as the official script does:

- An F1 that is undefined is -1, here -100 percent. So are precision and recall, before F1 is taken of them.
- `redundency` is not inverted: that is for judges that give a redundancy label of their own.
- Error steps beyond the last step are ignored (the reader counts 100 such rows).
- Rows of the class `correct`, the originals, have a line of their own and are not in the overall figures.

Five multi_solutions problems have two rows with one idx and different solutions. Both count here; the
official script drops the second. A step with a null reward is predicted neither right nor wrong: it is left
out, and counted as null.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from formats import analyses, calibration
from formats.calibration import LabelledRewards
from formats.columns import Column, print_columns

GROUPS = {
    "simplicity": ("redundency", "circular"),
    "soundness": ("counterfactual", "step_contradiction", "domain_inconsistency", "confidence"),
    "sensitivity": ("missing_condition", "deception", "multi_solutions"),
}
CLASSES = tuple(name for names in GROUPS.values() for name in names)
ALL_RIGHT = "multi_solutions"  # the class without wrong steps
SOURCE = "PRMBench"  # what the table calls the rows of all its files
KINDS = ("TP", "FP", "TN", "FN")


# ---------------------------------------------------------------------------------------------- figures


def kinds_of(rewards: Sequence[float | None], right: Sequence[bool], threshold: float) -> Counter[str]:
    """How many steps are predicted right and are so (TP), predicted right and are wrong (FP), and so on."""
    kinds = Counter()
    for reward, is_right in zip(rewards, right, strict=True):
        if reward is None:
            continue
        if reward >= threshold:
            kinds["TP" if is_right else "FP"] += 1
        else:
            kinds["FN" if is_right else "TN"] += 1
    return kinds


def f1_score(hits, false_alarms, misses) -> np.ndarray:
    """F1 in percent, of numbers or of arrays of them: -100 where it is undefined."""
    hits = np.asarray(hits, dtype=float)
    precision = ratio(hits, hits + false_alarms)
    recall = ratio(hits, hits + misses)
    return 100 * ratio(2 * precision * recall, precision + recall)


def ratio(number, of) -> np.ndarray:
    """number / of, or -1 where that is undefined."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(of == 0, -1.0, number / of) + 0.0  # -0 becomes 0


def prm_scores(tp, fp, tn, fn, classification: str | None = None) -> dict[str, np.ndarray]:
    """F1, negative F1 and PRMScore in percent."""
    f1 = f1_score(tp, fp, fn)
    negative_f1 = f1_score(tn, fn, fp)
    prm_score = f1 if classification == ALL_RIGHT else (f1 + negative_f1) / 2
    return {"f1": f1, "negative_f1": negative_f1, "prm_score": prm_score}


# ------------------------------------------------------------------------------------------- the table's rows


class PRMBench:
    """What the table needs of lines of scores.jsonl: numbers to be summed, and the rewards of the steps."""

    def __init__(self, ks: Sequence[int], thresholds: Sequence[float]):
        self.ks = sorted(set(ks))
        self.thresholds = sorted(set(thresholds))
        self.counts = Counter()  # (K, name); (class, K, name); (class, K, threshold, one of KINDS)
        self.steps = {k: LabelledRewards() for k in self.ks}

    def add(self, line: dict) -> None:
        classification = line["classification"]
        right = analyses.labelled_steps(len(line["steps"]), line["label"], line["error_steps"])
        for k in self.ks:
            rewards = analyses.rewards_of(line, k)
            for threshold in self.thresholds:
                for kind, number in kinds_of(rewards, right, threshold).items():
                    self.counts[classification, k, threshold, kind] += number
            numbers = analyses.numbers_of(line, k)
            for name in ("solutions", "steps"):
                self.counts[classification, k, name] += numbers[name]
            if classification in CLASSES:
                for name, number in numbers.items():
                    self.counts[k, name] += number
                self.steps[k].add(rewards, right)

    def update(self, other: "PRMBench") -> None:
        """Add what another rank has counted."""
        self.counts.update(other.counts)
        for k in self.ks:
            self.steps[k].update(other.steps[k])

    def rows(self) -> list[dict]:
        """A row for each K and threshold."""
        if not self.counts:
            return []
        rows = []
        for k in self.ks:
            of_steps = self.steps[k].figures()
            rows += [self.row(k, threshold) | of_steps for threshold in self.thresholds]
        return rows

    def row(self, k: int, threshold: float) -> dict:
        classes = self.classes(k, threshold)
        groups = {}
        for group, names in GROUPS.items():
            values = [classes[name]["prm_score"] for name in names if name in classes]
            groups[group] = sum(values) / len(names) if len(values) == len(names) else None
        return {
            "source": SOURCE,
            "k": k,
            "threshold": threshold,
            "solutions": self.counts[k, "solutions"],
            "steps": self.counts[k, "steps"],
            **self.scores(CLASSES, k, threshold),
            "groups": groups,
            "classes": classes,
            **analyses.rates(lambda name: self.counts[k, name]),
        }

    def classes(self, k: int, threshold: float) -> dict[str, dict]:
        """The figures of each class that has rows: first PRMBench's nine, then others, as `correct`."""
        found = sorted({key[0] for key in self.counts if isinstance(key[0], str)})
        classes = {}
        for name in [
            *(name for name in CLASSES if name in found),
            *(name for name in found if name not in CLASSES),
        ]:
            classes[name] = {
                "solutions": self.counts[name, k, "solutions"],
                "steps": self.counts[name, k, "steps"],
                **self.scores([name], k, threshold),
            }
        return classes

    def scores(self, classifications: Sequence[str], k: int, threshold: float) -> dict[str, float]:
        """The figures of the pooled steps of these classes."""
        pooled = {
            kind: sum(self.counts[name, k, threshold, kind] for name in classifications) for kind in KINDS
        }
        only = classifications[0] if len(classifications) == 1 else None
        scores = prm_scores(pooled["TP"], pooled["FP"], pooled["TN"], pooled["FN"], only)
        return {name: float(value) for name, value in scores.items()}

    def so_far(self, k: int) -> float:
        """The overall PRMScore of what was added until now, at the lowest threshold."""
        return self.scores(CLASSES, k, self.thresholds[0])["prm_score"]


# ---------------------------------------------------------------------------------------------- printing


def print_rows(rows: list[dict]) -> None:
    """A table for each K, with columns for each threshold, and what the analyses were like."""
    for k in dict.fromkeys(row["k"] for row in rows):
        print_table([row for row in rows if row["k"] == k])
    print(
        "(in percent; F1-: of the wrong steps; PRMScore: the mean of F1 and F1-, for multi_solutions F1;\n"
        " groups: the means of their classes; overall: the steps of all nine classes pooled; -100:\n"
        " undefined, as in the official script)"
    )
    print()
    one_for_each_k = [row for row in rows if row["threshold"] == rows[0]["threshold"]]
    print_columns(one_for_each_k, ANALYSES)
    print()
    calibration.print_rows(one_for_each_k, CALIBRATION)


def print_table(rows: list[dict]) -> None:
    """The table of one K: `rows` differ in their thresholds."""
    columns = [
        Column(f"PRMBench, K = {rows[0]['k']}", "name", 22, "s"),
        Column("solutions", "solutions", 11, "d"),
        Column("steps", "steps", 8, "d"),
    ]
    for row in rows:
        threshold = row["threshold"]
        columns += [
            Column(f"F1 at {threshold:g}", f"f1 {threshold}", 13, ".1f"),
            Column("F1-", f"negative_f1 {threshold}", 8, ".1f"),
            Column("PRMScore", f"prm_score {threshold}", 10, ".1f"),
        ]
    thresholds = [row["threshold"] for row in rows]
    lines = []
    for name in rows[0]["classes"]:
        lines.append(side_by_side(name, thresholds, [row["classes"][name] for row in rows]))
    for group in GROUPS:
        lines.append(
            side_by_side(
                f"{group} (group)", thresholds, [{"prm_score": row["groups"][group]} for row in rows]
            )
        )
    lines.append(side_by_side("overall", thresholds, rows))
    print()
    print_columns(lines, columns)


def side_by_side(name: str, thresholds: list[float], figures: list[dict]) -> dict:
    """A printed line: {"f1": 80.0} at 0.5 and {"f1": 70.0} at 0.61 -> {"f1 0.5": 80.0, "f1 0.61": 70.0}."""
    line = {"name": name, "solutions": figures[0].get("solutions"), "steps": figures[0].get("steps")}
    for threshold, own in zip(thresholds, figures, strict=True):
        for field, value in own.items():
            line[f"{field} {threshold}"] = value
    return line


SOURCE_AND_K = (Column("PRMBench", "source", 16, "s"), Column("K", "k", 4, "d"))
ANALYSES = (SOURCE_AND_K[0], *analyses.COLUMNS)
CALIBRATION = (*SOURCE_AND_K, *calibration.COLUMNS)
