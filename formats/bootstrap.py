"""95% intervals by the bootstrap: how a figure varies over solutions that are drawn anew, with replacement.

    interval([f1(weights) for weights in resamples(len(solutions))])   # (58.1, 66.9)

Whole solutions are drawn (or whole problems, with all their candidates), since the steps of one are not
independent.
"""

from collections.abc import Iterator, Sequence

import numpy as np

DRAWS = 1000


def resamples(n: int, draws: int = DRAWS, seed: int = 0) -> Iterator[np.ndarray]:
    """How often each of n solutions is drawn: (n,) whole numbers that sum to n, once for each draw.

    Every run draws the same. What is averaged over several files must be drawn with several seeds, as their
    draws would rise and fall together.
    """
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        yield np.bincount(rng.integers(n, size=n), minlength=n)


def weights_of(groups: Sequence[np.ndarray], draws: int = DRAWS) -> np.ndarray:
    """The resamples as the rows of one matrix, (draws, n), for figures that are made of sums over solutions.

    groups: (n,) bool for each file, which solutions are its own. Each file is drawn by itself.
    """
    weights = np.zeros((draws, len(groups[0])), dtype=float)
    for seed, own in enumerate(groups):
        for draw, drawn in zip(weights, resamples(int(own.sum()), draws, seed), strict=True):
            draw[own] = drawn
    return weights


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The middle 95% of a figure's values. A draw for which the figure is undefined (nan) does not count."""
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    if not len(values):
        return np.nan, np.nan
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def with_intervals(figures: dict, draws: dict[str, np.ndarray]) -> dict[str, float | None]:
    """{"f1": 61.2} and its draws -> {"f1": 61.2, "f1_low": 57.9, "f1_high": 64.6}; None for what is
    undefined.
    """
    found = {}
    for name, value in figures.items():
        found[name] = number_of(value)
        low, high = interval(draws[name])
        found[f"{name}_low"] = number_of(low) if found[name] is not None else None
        found[f"{name}_high"] = number_of(high) if found[name] is not None else None
    return found


def number_of(value) -> float | None:
    """A figure as JSON has it: None for nan."""
    return None if value is None or np.isnan(value) else float(value)
