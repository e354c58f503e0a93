"""ProcessBench's protocol: does a judge find the first wrong step, and leave correct solutions alone?

The prediction for a solution is its first step whose reward is below the threshold, -1 if there is none.
Three figures, for each file and on average:

    error accuracy     of the solutions with a wrong step, those whose first wrong step is the prediction
    correct accuracy   of the solutions without one, those for which the prediction is -1
    F1                 the harmonic mean of the two, which is not the usual F1
"""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from formats import analyses, calibration
from formats.bootstrap import DRAWS, number_of, with_intervals
from formats.calibration import LabelledRewards
from formats.columns import Column, print_columns

FIGURES = ("error_accuracy", "correct_accuracy", "f1")


def first_below(rewards: Sequence[float | None], threshold: float) -> int:
    """The first step whose reward is below the threshold, -1 if there is none. A null reward predicts
    nothing.
    """
    for step, reward in enumerate(rewards):
        if reward is not None and reward < threshold:
            return step
    return -1


def accuracies(found, wrong, kept, correct) -> dict[str, np.ndarray]:
    """The three figures in percent, of numbers or of arrays of them. nan where there is nothing to take them
    over.

    found: of the `wrong` solutions, those whose first wrong step was predicted
    kept: of the `correct` ones, those in which no step was predicted wrong
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.divide(100.0 * found, wrong)
        right = np.divide(100.0 * kept, correct)
        f1 = np.where(error + right == 0, 0.0, 2 * error * right / (error + right))
    return {"error_accuracy": error, "correct_accuracy": right, "f1": f1}


def accuracy_draws(found: int, wrong: int, kept: int, correct: int, seed: int = 0) -> dict[str, np.ndarray]:
    """The three figures of DRAWS bootstrap samples of the solutions, each (DRAWS,).

    Drawing solutions with replacement is drawing how many there are of each of their four kinds: a
    multinomial.
    """
    kinds = np.array([found, wrong - found, kept, correct - kept])
    if not kinds.sum():
        return accuracies(*np.zeros((4, DRAWS)))
    drawn = np.random.default_rng(seed).multinomial(kinds.sum(), kinds / kinds.sum(), size=DRAWS).T
    return accuracies(drawn[0], drawn[0] + drawn[1], drawn[2], drawn[2] + drawn[3])


# ------------------------------------------------------------------------------------------- the table's rows


class ProcessBench:
    """What the table needs of lines of scores.jsonl: sums, and the rewards of labelled steps."""

    def __init__(self, ks: Sequence[int]):
        self.ks = sorted(set(ks))
        self.counts: Counter[tuple[str, int, str]] = Counter()  # (source, K, name)
        self.steps: dict[tuple[str, int], LabelledRewards] = defaultdict(LabelledRewards)  # (source, K)

    def add(self, line: dict) -> None:
        source = line["source"]
        for k in self.ks:
            numbers = analyses.numbers_of(line, k) | kind_of(line["label"], line["predictions"][str(k)])
            for name, number in numbers.items():
                self.counts[source, k, name] += number
            right = analyses.labelled_steps(len(line["steps"]), line["label"])
            self.steps[source, k].add(analyses.rewards_of(line, k), right)

    def update(self, other: "ProcessBench") -> None:
        """Add what another rank has counted."""
        self.counts.update(other.counts)
        for key, steps in other.steps.items():
            self.steps[key].update(steps)

    def rows(self, sources: Sequence[str]) -> list[dict]:
        """A row for each source and K, and the average over the sources if there are several."""
        rows = []
        for k in self.ks:
            own = [
                self.row(source, k)
                for source in dict.fromkeys(sources)
                if self.counts[source, k, "solutions"]
            ]
            rows += own
            if len(own) > 1 and all(row["f1"] is not None for row in own):
                rows.append(self.average(own))
        return rows

    def row(self, source: str, k: int) -> dict:
        """The accuracies of one source at one K, with their intervals, and what its analyses were like."""

        def n(name: str) -> int:
            return self.counts[source, k, name]

        kinds = self.kinds(source, k)
        return {
            "source": source,
            "k": k,
            "solutions": n("solutions"),
            "unlabelled": n("unlabelled"),
            **with_intervals(accuracies(*kinds), accuracy_draws(*kinds)),
            **analyses.rates(n),
            **self.steps[source, k].figures(),
        }

    def kinds(self, source: str, k: int) -> tuple[int, int, int, int]:
        """(found, wrong, kept, correct), as `accuracies` takes them."""
        names = ("wrong, predicted so", "wrong", "correct, predicted so", "correct")
        return tuple(self.counts[source, k, name] for name in names)

    def draws(self, source: str, k: int, seed: int) -> dict[str, np.ndarray]:
        """All figures of DRAWS bootstrap samples of the source's solutions."""
        return accuracy_draws(*self.kinds(source, k), seed) | self.steps[source, k].draws(seed)

    def f1_so_far(self, source: str, k: int) -> float:
        """F1 of what was added until now; 0 where it is undefined."""
        return number_of(accuracies(*self.kinds(source, k))["f1"]) or 0.0

    def average(self, rows: list[dict]) -> dict:
        """The mean of the sources' figures; numbers of solutions and steps are summed."""
        k = rows[0]["k"]
        draws = [self.draws(row["source"], k, seed) for seed, row in enumerate(rows)]
        names = (*FIGURES, *calibration.FIGURES)
        figures = {name: mean_of(rows, name) for name in names}
        drawn = {name: np.mean([draw[name] for draw in draws], axis=0) for name in names}
        sums = {
            name: sum(row[name] for row in rows)
            for name in ("solutions", "unlabelled", "forced", "null_rewards")
        }
        means = {name: mean_of(rows, name) for name in ("unparsed", "truncated", "tokens_per_step")}
        return {"source": "average", "k": k, **sums, **with_intervals(figures, drawn), **means}


def kind_of(label: int | None, prediction: int) -> dict[str, int]:
    """What a solution counts as: {"wrong": 1, "wrong, predicted so": 0}, say."""
    if label is None:
        return {"unlabelled": 1}
    kind = "correct" if label == -1 else "wrong"
    return {kind: 1, f"{kind}, predicted so": int(prediction == label)}


def mean_of(rows: list[dict], name: str) -> float | None:
    values = [row[name] for row in rows]
    return None if None in values else sum(values) / len(values)


# ---------------------------------------------------------------------------------------------- printing

ACCURACIES = (
    Column("source", "source", 16, "s"),
    Column("K", "k", 4, "d"),
    Column("solutions", "solutions", 11, "d"),
    Column("error acc.", "error_accuracy", 21, ".1f", interval=True),
    Column("correct acc.", "correct_accuracy", 21, ".1f", interval=True),
    Column("F1", "f1", 21, ".1f", interval=True),
)
ANALYSES = (Column("source", "source", 16, "s"), *analyses.COLUMNS)
CALIBRATION = (*ACCURACIES[:2], *calibration.COLUMNS)


def print_rows(rows: list[dict]) -> None:
    print()
    print_columns(rows, ACCURACIES)
    print("(in percent; F1: the harmonic mean of both accuracies; [95%: bootstrap over solutions])")
    files = [row for row in rows if row["k"] == rows[0]["k"] and row["source"] != "average"]
    unlabelled = sum(row["unlabelled"] for row in files)
    if unlabelled:
        print(f"{unlabelled} solutions have no label and count in no accuracy")
    print()
    print_columns(rows, ANALYSES)
    print(
        "(unparsed: analyses without a verdict of their own; forced: those of them that were read after an\n"
        " added verification line; null: steps without any P(Yes), never predicted wrong)"
    )
    print()
    calibration.print_rows(rows, CALIBRATION)
