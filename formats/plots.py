"""Plots of what is made of scores, with matplotlib, which is asked for only where something is drawn."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from formats.calibration import reliability
from plumbing.errors import BadInput

FEWEST = 5  # steps of a bin: the share of right ones among fewer says nothing


def import_pyplot():
    """matplotlib.pyplot, which never opens a window here."""
    try:
        import matplotlib
    except ImportError:
        raise BadInput(
            "matplotlib is not installed: pip install matplotlib for the plots, or give --no-plots"
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure, path: Path) -> None:
    figure.savefig(path, dpi=130, bbox_inches="tight")
    print("plot:", path)


def draw_sweep(rows: Sequence[dict], main: str, title: str, threshold: float, path: Path) -> None:
    """The main figure over thresholds with its 95% band, and the two figures that it is made of."""
    plt = import_pyplot()
    figure, axis = plt.subplots(figsize=(6, 4))
    thresholds = [row["threshold"] for row in rows]
    others = [
        name
        for name in rows[0]
        if name != "threshold" and not name.endswith(("_low", "_high")) and name != main
    ]
    for name in others:
        axis.plot(thresholds, [row[name] for row in rows], linewidth=1, label=name.replace("_", " "))
    axis.plot(thresholds, [row[main] for row in rows], color="black", label=main.replace("_", " "))
    axis.fill_between(
        thresholds,
        [row[f"{main}_low"] for row in rows],
        [row[f"{main}_high"] for row in rows],
        color="black",
        alpha=0.12,
        label="95%",
    )
    axis.axvline(threshold, color="tab:red", linestyle="--", linewidth=1, label=f"chosen: {threshold:g}")
    axis.set(xlabel="threshold", ylabel="percent", title=title)
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    save(figure, path)
    plt.close(figure)


def reliability_points(rewards: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean reward, share of right steps, half of its 95% interval) of the bins that have at least FEWEST
    steps.
    """
    rows = [row for row in reliability(rewards, right) if row["steps"] >= FEWEST]
    share = np.array([row["right"] for row in rows])
    n = np.array([row["steps"] for row in rows])
    error = 1.96 * np.sqrt(np.maximum(share * (1 - share), 0.01) / n)
    return np.array([row["reward"] for row in rows]), share, error


def draw_reliability(curves: dict[str, tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """How often a step of a given reward is right. curves: name -> (rewards, right)."""
    plt = import_pyplot()
    figure, axis = plt.subplots(figsize=(5, 4))
    axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    for name, (rewards, right) in curves.items():
        axis.errorbar(*reliability_points(rewards, right), marker="o", capsize=2, label=name)
    axis.set(
        xlabel="reward (mean P(Yes))",
        ylabel="share of right steps",
        ylim=(-0.05, 1.05),
        title="Reliability (bars: 95%)",
    )
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    save(figure, path)
    plt.close(figure)
