"""Is a reward of 0.8 right in eight of ten steps?

    rewards, right = np.array([0.9, 0.6, 0.2]), np.array([True, True, False])
    brier(rewards, right)    # 0.07: the mean squared error
    ece(rewards, right)      # 0.23: how far the mean reward is from the share of right steps, bin by bin
    auroc(rewards, right)    # 1.0: how often a right step has the higher reward than a wrong one

Temperature scaling corrects rewards that are too sure (T > 1) or not sure enough (T < 1):
sigmoid(logit(reward) / T). It keeps their order and leaves 0.5 where it is, so it changes neither AUROC nor a
prediction at the threshold 0.5.

In all functions: rewards (N,) in [0, 1], right (N,) bool.
"""

from array import array
from collections.abc import Iterable

import numpy as np

from formats.bootstrap import DRAWS, resamples, with_intervals
from formats.columns import Column, print_columns

COLUMNS = (  # what a table shows of the calibration
    Column("ECE", "ece", 23, ".3f", interval=True),
    Column("Brier", "brier", 23, ".3f", interval=True),
    Column("AUROC", "auroc", 23, ".3f", interval=True),
)
FIGURES = ("ece", "brier", "auroc")
BINS = 10  # of equal width, for the ECE and the diagram
LEAST = 1e-6  # a reward of exactly 0 or 1 has no logit
LOWEST, HIGHEST = 0.01, 100.0  # temperatures


# ---------------------------------------------------------------------------------------------- figures


def brier(rewards: np.ndarray, right: np.ndarray) -> float:
    """The mean squared error of the rewards as probabilities that the step is right."""
    return float(np.mean((rewards - right) ** 2))


def log_loss(rewards: np.ndarray, right: np.ndarray) -> float:
    """-log of the probability that the rewards give to what is so, on average, in nats."""
    p = np.clip(rewards, LEAST, 1 - LEAST)
    return float(-np.mean(np.where(right, np.log(p), np.log(1 - p))))


def auroc(rewards: np.ndarray, right: np.ndarray) -> float:
    """The chance that a right step has the higher reward than a wrong one; ties count half. nan if one kind
    is missing: the Mann-Whitney statistic.
    """
    rank = np.unique(rewards, return_inverse=True)[1]  # (N,), the same number for equal rewards
    return auroc_of(np.bincount(rank, right), np.bincount(rank, ~right))


def auroc_of(n_right: np.ndarray, n_wrong: np.ndarray) -> float:
    """AUROC from the numbers of right and of wrong steps with each reward, the lowest first."""
    pairs = n_right.sum() * n_wrong.sum()
    if not pairs:
        return np.nan
    wrong_below = n_wrong.cumsum() - n_wrong
    return float((n_right * (wrong_below + n_wrong / 2)).sum() / pairs)


def ece(rewards: np.ndarray, right: np.ndarray) -> float:
    """The expected calibration error: |mean reward - share of right steps| of each bin, weighted by its
    steps, which is |sum of (reward - right)| over the number of all steps.
    """
    return float(np.abs(np.bincount(bins(rewards), rewards - right)).sum() / len(rewards))


def bins(rewards: np.ndarray) -> np.ndarray:
    """The bin of each reward: [0, 0.1), [0.1, 0.2), ..., [0.9, 1]. (N,) int"""
    return np.minimum((rewards * BINS).astype(int), BINS - 1)


def reliability(rewards: np.ndarray, right: np.ndarray) -> list[dict]:
    """The diagram's rows: of each bin that has steps, its mean reward and the share of right steps."""
    bin_of = bins(rewards)
    rows = []
    for number in range(BINS):
        own = bin_of == number
        if own.any():
            rows.append(
                {
                    "low": number / BINS,
                    "high": (number + 1) / BINS,
                    "steps": int(own.sum()),
                    "reward": float(rewards[own].mean()),
                    "right": float(right[own].mean()),
                }
            )
    return rows


def figures(rewards: np.ndarray, right: np.ndarray, sizes: np.ndarray) -> dict[str, float | None]:
    """ECE, Brier score and AUROC with their intervals: {"ece": 0.07, "ece_low": 0.05, "ece_high": 0.1, ...}.

    sizes (S,): how many of the steps each solution has, in their order
    """
    found = {"ece": ece(rewards, right), "brier": brier(rewards, right), "auroc": auroc(rewards, right)}
    return with_intervals(found, figure_draws(rewards, right, sizes))


def figure_draws(
    rewards: np.ndarray, right: np.ndarray, sizes: np.ndarray, seed: int = 0
) -> dict[str, np.ndarray]:
    """The three figures of bootstrap samples of the solutions, each (DRAWS,); nan where a sample has none."""
    solution = np.repeat(np.arange(len(sizes)), sizes)  # (N,), of each step
    # Drawn in an order that does not depend on which rank has judged which
    totals, of_right = (
        np.bincount(solution, values, minlength=len(sizes)) for values in (rewards, rewards * right)
    )
    place = np.lexsort((of_right, totals, sizes)).argsort()
    solution = place[solution]
    bin_of = bins(rewards)
    rank = np.unique(rewards, return_inverse=True)[1]
    gaps = rewards - right
    found = []
    for drawn in resamples(len(sizes), seed=seed):
        weights = drawn[solution].astype(float)  # (N,), how often each step is drawn
        n = weights.sum() or np.nan
        found.append((
            np.abs(np.bincount(bin_of, weights * gaps)).sum() / n,
            weights @ gaps ** 2 / n,
            auroc_of(np.bincount(rank, weights * right), np.bincount(rank, weights * ~right)),
        ))
    return dict(zip(FIGURES, np.array(found).T, strict=True))


# ---------------------------------------------------------------------------------------------- temperature


def scaled(rewards: np.ndarray, temperature: float) -> np.ndarray:
    """sigmoid(logit(reward) / temperature)."""
    p = np.clip(rewards, LEAST, 1 - LEAST)
    logits = np.log(p) - np.log1p(-p)
    return 1 / (1 + np.exp(-logits / temperature))


def fit_temperature(rewards: np.ndarray, right: np.ndarray) -> float:
    """The temperature with the least log loss.

    The log loss is convex in 1 / T, so that it has one minimum, which a golden-section search encloses.
    """
    ratio = (np.sqrt(5) - 1) / 2
    low = np.log(LOWEST)
    high = np.log(HIGHEST)
    while high - low > 1e-6:
        third = high - ratio * (high - low)
        two_thirds = low + ratio * (high - low)
        if log_loss(scaled(rewards, np.exp(third)), right) <= log_loss(
            scaled(rewards, np.exp(two_thirds)), right
        ):
            high = two_thirds
        else:
            low = third
    return float(np.exp((low + high) / 2))


# ---------------------------------------------------------------------------------------------- collecting


class LabelledRewards:
    """The rewards of labelled steps, collected solution by solution."""

    def __init__(self):
        self.rewards = array("d")
        self.right = array("b")
        self.sizes = array("q")  # how many of them each solution has
        self.unjudged = 0  # labelled steps that were not judged

    def add(self, rewards: list[float | None], right: list[bool]) -> None:
        """A solution's: `rewards` of its first steps that were judged, `right` of its first steps that are
        labelled.

        A null reward is left out.
        """
        self.unjudged += max(0, len(right) - len(rewards))
        before = len(self.rewards)
        for value, is_right in zip(rewards, right, strict=False):
            if value is not None:
                self.rewards.append(value)
                self.right.append(is_right)
        self.sizes.append(len(self.rewards) - before)

    def update(self, other: "LabelledRewards") -> None:
        """Add what another one has collected."""
        self.rewards.extend(other.rewards)
        self.right.extend(other.right)
        self.sizes.extend(other.sizes)
        self.unjudged += other.unjudged

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """(rewards, right)."""
        return np.array(self.rewards), np.array(self.right, dtype=bool)

    @property
    def has_figures(self) -> bool:
        return bool(self.rewards) and not self.unjudged

    def draws(self, seed: int = 0) -> dict[str, np.ndarray]:
        """The figures of bootstrap samples of the solutions: see figure_draws."""
        if not self.has_figures:
            return dict.fromkeys(FIGURES, np.full(DRAWS, np.nan))
        return figure_draws(*self.arrays(), np.array(self.sizes), seed)

    def figures(self) -> dict[str, float | None]:
        """ECE, Brier score and AUROC, with intervals; None where not all labelled steps were judged.

        A solution that was left at its first step predicted wrong has judged steps of a certain kind: figures
        over these would say something else.
        """
        if not self.has_figures:
            return with_intervals(dict.fromkeys(FIGURES), self.draws())
        return figures(*self.arrays(), np.array(self.sizes))


def print_rows(rows: list[dict], columns: Iterable[Column]) -> None:
    """The table of `columns`, if any row has figures."""
    if all(row["ece"] is None for row in rows):
        print("(ECE, Brier score and AUROC want the rewards of all labelled steps: --all-steps)")
        return
    print_columns(rows, columns)
    print(
        "(of the rewards of labelled steps, in ProcessBench those up to the first wrong one;\n"
        " -: not all of them were judged: --all-steps)"
    )
