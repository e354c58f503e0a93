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

import numpy as np

from formats.columns import Column

COLUMNS = (  # what a table shows of the calibration
    Column("ECE", "ece", 8, ".3f"),
    Column("Brier", "brier", 8, ".3f"),
    Column("AUROC", "auroc", 8, ".3f"),
)
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
    is missing.

    It is the Mann-Whitney statistic: the sum of the right steps' ranks, less the least that it can be, over
    the number of pairs.
    """
    n_right = int(right.sum())
    n_wrong = len(right) - n_right
    if not n_right or not n_wrong:
        return np.nan
    order = np.sort(rewards)
    below = np.searchsorted(order, rewards, "left")
    not_above = np.searchsorted(order, rewards, "right")
    ranks = (below + not_above + 1) / 2  # equal rewards share the mean of their ranks
    return float((ranks[right].sum() - n_right * (n_right + 1) / 2) / (n_right * n_wrong))


def ece(rewards: np.ndarray, right: np.ndarray) -> float:
    """The expected calibration error: |mean reward - share of right steps| of each bin, weighted by its
    steps.
    """
    gaps = [row["steps"] * abs(row["reward"] - row["right"]) for row in reliability(rewards, right)]
    return float(sum(gaps) / len(rewards))


def reliability(rewards: np.ndarray, right: np.ndarray) -> list[dict]:
    """The diagram's rows: of each bin that has steps, its mean reward and the share of right steps.

    The bins are [0, 0.1), [0.1, 0.2), ..., [0.9, 1].
    """
    bin_of = np.minimum((rewards * BINS).astype(int), BINS - 1)
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
        self.unjudged = 0  # labelled steps that were not judged

    def add(self, rewards: list[float | None], right: list[bool]) -> None:
        """A solution's: `rewards` of its first steps that were judged, `right` of its first steps that are
        labelled.

        A null reward is left out.
        """
        self.unjudged += max(0, len(right) - len(rewards))
        for value, is_right in zip(rewards, right, strict=False):
            if value is not None:
                self.rewards.append(value)
                self.right.append(is_right)

    def update(self, other: "LabelledRewards") -> None:
        """Add what another one has collected."""
        self.rewards.extend(other.rewards)
        self.right.extend(other.right)
        self.unjudged += other.unjudged

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """(rewards, right)."""
        return np.array(self.rewards), np.array(self.right, dtype=bool)

    def figures(self) -> dict[str, float | None]:
        """ECE, Brier score and AUROC; None where not all labelled steps were judged.

        A solution that was left at its first step predicted wrong has judged steps of a certain kind: figures
        over these would say something else.
        """
        if self.unjudged or not self.rewards:
            return {"ece": None, "brier": None, "auroc": None}
        return figures(*self.arrays())


def figures(rewards: np.ndarray, right: np.ndarray) -> dict[str, float | None]:
    area = auroc(rewards, right)
    return {
        "ece": ece(rewards, right),
        "brier": brier(rewards, right),
        "auroc": None if np.isnan(area) else area,
    }
