"""The threshold below which a step is predicted wrong: swept and chosen on one file, and applied to another.

    [sweep] = sweeps_of(read_scores(["validation.scores.jsonl"]))
    choose(sweep)              # {"threshold": 0.47, "threshold_low": 0.31, "threshold_high": 0.58}
    at(sweep, [0.47, 0.5])     # [{"threshold": 0.47, "f1": 61.9, "f1_low": 57.2, ...}, ...]
"""

from collections.abc import Sequence

import numpy as np

from formats.bootstrap import interval, weights_of
from formats.prmbench import CLASSES, prm_scores
from formats.processbench import accuracies
from formats.scores import Scored
from plumbing.errors import BadInput

GRID = np.arange(101) / 100  # the thresholds that are swept
USUAL = 0.5


class F1Sweep:
    """ProcessBench's figures over thresholds, of labelled solutions. Each is the mean over the sources.

    Two numbers of a solution tell at which thresholds its prediction is right: above the reward of the first
    wrong step, and not above any reward before it. So the sweep is exact.
    """

    benchmark = "ProcessBench"
    main = "f1"

    def __init__(self, scores: Sequence[Scored]):
        self.scores = [line for line in scores if line.solution.label is not None]
        bounds = [right_between(line) for line in self.scores]
        self.low = np.array([low for low, _ in bounds])
        self.high = np.array([high for _, high in bounds])
        self.wrong = np.array([line.solution.label >= 0 for line in self.scores])
        sources = np.array([line.source for line in self.scores])
        self.groups = [sources == source for source in dict.fromkeys(sources.tolist())]
        for own in self.groups:
            if self.wrong[own].all() or not self.wrong[own].any():
                missing = "without" if self.wrong[own].all() else "with"
                where = self.scores[int(own.argmax())].where
                raise BadInput(
                    f"{where}: no solution of this source is {missing} a wrong step, so F1 is undefined; "
                    f"give more solutions"
                )

    def figures(self, thresholds: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Each figure at T thresholds, where the n solutions count as often as B rows of weights say: (B, n)
        -> (B, T).
        """
        self.check_judged(float(np.min(thresholds)))
        hits = (self.low[:, None] < thresholds) & (thresholds <= self.high[:, None])  # (n, T)
        of_sources = []
        for own in self.groups:
            wrong = own & self.wrong
            correct = own & ~self.wrong
            of_sources.append(
                accuracies(
                    weights[:, wrong] @ hits[wrong].astype(float),
                    weights[:, wrong].sum(axis=1, keepdims=True),
                    weights[:, correct] @ hits[correct].astype(float),
                    weights[:, correct].sum(axis=1, keepdims=True),
                )
            )
        return {
            name: np.mean([of_source[name] for of_source in of_sources], axis=0) for name in of_sources[0]
        }

    def check_judged(self, threshold: float) -> None:
        """Raise BadInput if the prediction of a solution at this threshold depends on steps that were not
        judged.
        """
        for line in self.scores:
            if not (line.rewards < threshold).any():
                line.check_judged(steps_needed(line))


def steps_needed(line: Scored) -> int:
    """How many steps tell whether the prediction is right at any threshold: those up to the first wrong one.
    """
    return len(line.right)


def right_between(line: Scored) -> tuple[float, float]:
    """(low, high): the prediction is right at thresholds above low and not above high.

    rewards 0.9 0.6 0.2, label 2    ->   (0.2, 0.6)
    rewards 0.9 0.6 0.2, label -1   ->   (-inf, 0.2)

    A null reward is never below the threshold. A solution that was left before its first wrong step, at one
    predicted wrong, is right at no threshold for which that is known.
    """
    if len(line.rewards) < steps_needed(line):
        return np.inf, -np.inf
    label = line.solution.label
    before = line.rewards if label == -1 else line.rewards[:label]
    high = np.min(before[~np.isnan(before)], initial=np.inf)
    if label == -1:
        return -np.inf, high
    low = line.rewards[label]
    return (np.inf if np.isnan(low) else low), high


class PRMScoreSweep:
    """PRMBench's overall figures over thresholds."""

    benchmark = "PRMBench"
    main = "prm_score"

    def __init__(self, scores: Sequence[Scored]):
        self.scores = [line for line in scores if line.solution.extra["classification"] in CLASSES]
        for line in self.scores:
            line.check_judged(len(line.solution.steps))
        self.groups = [np.ones(len(self.scores), dtype=bool)]
        self.rewards = np.concatenate([line.rewards for line in self.scores])  # (N,), of all steps
        self.right = np.concatenate([line.right for line in self.scores])
        self.owner = np.repeat(
            np.arange(len(self.scores)), [len(line.rewards) for line in self.scores]
        )  # step -> solution

    def figures(self, thresholds: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Each figure at T thresholds, where the n solutions count as often as B rows of weights say: (B, n)
        -> (B, T).
        """
        tp, fn = self.counts(self.right, thresholds, weights)
        fp, tn = self.counts(~self.right, thresholds, weights)
        return prm_scores(tp, fp, tn, fn)

    def counts(
        self, which: np.ndarray, thresholds: np.ndarray, weights: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """How many of these steps are predicted right, and wrong: (B, T) each. Null rewards are neither."""
        which = which & ~np.isnan(self.rewards)
        owner = self.owner[which]
        rewards = self.rewards[which]
        n = len(self.scores)
        predicted_right = np.stack(
            [np.bincount(owner, rewards >= threshold, minlength=n) for threshold in thresholds], axis=1
        )
        steps = np.bincount(owner, minlength=n)[:, None] - predicted_right  # (n, T)
        return weights @ predicted_right, weights @ steps


Sweep = F1Sweep | PRMScoreSweep


def sweeps_of(scores: Sequence[Scored]) -> list[Sweep]:
    """A sweep for each benchmark that the solutions are from. Raises BadInput if there is no labelled one."""
    sweeps: list[Sweep] = []
    processbench = [line for line in scores if not line.is_prmbench]
    prmbench = [line for line in scores if line.is_prmbench]
    if any(line.solution.label is not None for line in processbench):
        sweeps.append(F1Sweep(processbench))
    if any(line.solution.extra["classification"] in CLASSES for line in prmbench):
        sweeps.append(PRMScoreSweep(prmbench))
    if not sweeps:
        raise BadInput(
            f"{scores[0].where}: neither this solution nor any other has a label, so no threshold can be "
            f"chosen; give scores of labelled solutions"
        )
    return sweeps


# ---------------------------------------------------------------------------------------------- choosing


def at(sweep: Sweep, thresholds: Sequence[float]) -> list[dict]:
    """A row for each threshold: its figures with their 95% intervals, over solutions."""
    thresholds = np.asarray(thresholds, dtype=float)
    figures = sweep.figures(thresholds, np.ones((1, len(sweep.scores)), dtype=float))
    draws = sweep.figures(thresholds, weights_of(sweep.groups))
    rows = []
    for column, threshold in enumerate(thresholds):
        row = {"threshold": float(threshold)}
        for name, values in figures.items():
            row[name] = float(values[0, column])
            row[f"{name}_low"], row[f"{name}_high"] = interval(draws[name][:, column])
        rows.append(row)
    return rows


def choose(sweep: Sweep) -> dict[str, float]:
    """The best threshold of GRID, of equals the one nearest to 0.5, with the interval that it has over
    solutions drawn anew.
    """
    own = sweep.figures(GRID, np.ones((1, len(sweep.scores)), dtype=float))[sweep.main]
    drawn = sweep.figures(GRID, weights_of(sweep.groups))[sweep.main]
    low, high = interval(best_thresholds(drawn))
    return {"threshold": float(best_thresholds(own)[0]), "threshold_low": low, "threshold_high": high}


def best_thresholds(figures: np.ndarray) -> np.ndarray:
    """The threshold of the highest figure in each row, (B, T) -> (B,); of equals the one nearest to 0.5."""
    order = np.argsort(np.abs(GRID - USUAL), kind="stable")
    best = np.argmax(np.nan_to_num(figures, nan=-np.inf)[:, order], axis=1)
    return GRID[order[best]]


def difference(sweep: Sweep, threshold: float) -> dict[str, float]:
    """By how much the main figure at a threshold is above that at 0.5, on the same solutions."""
    thresholds = np.array([threshold, USUAL])
    [own] = sweep.figures(thresholds, np.ones((1, len(sweep.scores)), dtype=float))[sweep.main]
    drawn = sweep.figures(thresholds, weights_of(sweep.groups))[sweep.main]
    low, high = interval(drawn[:, 0] - drawn[:, 1])
    return {"difference": float(own[0] - own[1]), "difference_low": low, "difference_high": high}
