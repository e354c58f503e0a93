"""The table and the plots at the end of the demo, from scores.jsonl files and the runs' metrics.

    python examples/arithmetic/report.py --scores base.jsonl direct.jsonl sft.jsonl dpo.jsonl \\
        --names base "direct PRM" "R-PRM SFT" "R-PRM DPO" --out runs/demo

Scores are made with score.py --all-steps, so every K up to the sampled one can be read off the same analyses.
"""
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))  # the project's scripts, which are no package
from formats.analyses import labelled_steps, rewards_of
from formats.bootstrap import interval, resamples
from formats.calibration import LabelledRewards, auroc, brier
from formats.plots import import_pyplot, reliability_points
from formats.processbench import accuracies, first_below
from plumbing.cli import run
from plumbing.errors import BadInput
from plumbing.files import read_jsonl, write_json

THRESHOLD = 0.5
BOOTSTRAPS = 500


@dataclass(frozen=True)
class Config:
    scores: Annotated[tuple[str, ...], "scores.jsonl files, one per model"]
    names: Annotated[tuple[str, ...], "the models' names, in the same order"]
    out: Annotated[str, "folder for table.json and the plots"]
    runs: Annotated[tuple[str, ...], "folders of training runs whose curves are drawn"] = ()
    k: Annotated[tuple[int, ...], "analyses per step, a row each", (1, None)] = (1, 4, 10)
    plots: Annotated[bool, "draw the plots (needs matplotlib, in requirements-dev.txt)"] = True


def main(config: Config) -> None:
    if len(config.scores) != len(config.names):
        raise BadInput(f"{len(config.scores)} --scores but {len(config.names)} --names; give one name per file")
    models = {name: [line for _, line in read_jsonl(path)] for name, path in zip(config.names, config.scores)}
    rows = [measure(name, lines, k) for name, lines in models.items() for k in ks_of(lines, config.k)]
    Path(config.out).mkdir(parents=True, exist_ok=True)
    write_json(Path(config.out) / "table.json", rows)
    print_table(rows)
    if config.plots:
        draw(config, models)


def ks_of(lines: list[dict], ks: tuple[int, ...]) -> list[int]:
    """The Ks that were sampled; a direct PRM has one number per step."""
    most = len(lines[0]["samples"][0])
    return [k for k in ks if k <= most]


# ---------------------------------------------------------------------------------------------- measures

def step_rewards(lines: list[dict], k: int) -> list[np.ndarray]:
    """The rewards of each solution's steps over their first k analyses; nan where none counts."""
    return [np.array(rewards_of(line, k), dtype=float) for line in lines]


def labelled_rewards(lines: list[dict], rewards: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(rewards, labels) of the steps up to the first wrong one, as far as they were judged; null rewards left out."""
    collected = LabelledRewards()
    for line, own in zip(lines, rewards):
        values = [None if np.isnan(value) else value for value in own]
        collected.add(values, labelled_steps(len(own), line["label"]))
    return collected.arrays()


def predictions(rewards: list[np.ndarray]) -> np.ndarray:
    """The first step below the threshold of each solution, -1 if none."""
    return np.array([first_below(own, THRESHOLD) for own in rewards])


def figures_of(predicted: np.ndarray, labels: np.ndarray, weights: np.ndarray | int = 1) -> dict[str, float]:
    """error_accuracy, correct_accuracy and f1, in percent; each solution counts as often as its weight says."""
    hit = predicted == labels
    wrong = labels >= 0
    numbers = [(which * weights).sum() for which in (hit & wrong, wrong, hit & ~wrong, ~wrong)]
    return {name: float(value) for name, value in accuracies(*numbers).items()}


def f1_of(predicted: np.ndarray, labels: np.ndarray, weights: np.ndarray | int = 1) -> float:
    return figures_of(predicted, labels, weights)["f1"]


def measure(name: str, lines: list[dict], k: int) -> dict:
    labels = np.array([line["label"] for line in lines])
    rewards = step_rewards(lines, k)
    predicted = predictions(rewards)
    values, right = labelled_rewards(lines, rewards)
    low, high = interval([f1_of(predicted, labels, weights) for weights in resamples(len(lines), BOOTSTRAPS)])
    analyses = [a for line in lines for step in line["samples"] for a in step[:k]]
    unparsed = [a["verdict"] is None and not (a["forced"] and a["n_tokens"] == 0) for a in analyses]
    return {
        "model": name,
        "k": k,
        "solutions": len(lines),
        **figures_of(predicted, labels),
        "f1_low": low,
        "f1_high": high,
        "auroc": auroc(values, right),
        "brier": brier(values, right),
        "unparsed": 100 * float(np.mean(unparsed)),
        "tokens_per_step": sum(a["n_tokens"] for a in analyses) / sum(len(line["samples"]) for line in lines),
    }


def print_table(rows: list[dict]) -> None:
    print(f"\n{'model':<14}{'K':>3}{'error acc.':>12}{'correct acc.':>14}{'F1 [95%]':>20}{'AUROC':>8}{'Brier':>8}"
          f"{'unparsed %':>12}{'tokens/step':>13}")
    for r in rows:
        print(f"{r['model']:<14}{r['k']:>3}{r['error_accuracy']:>12.1f}{r['correct_accuracy']:>14.1f}"
              f"{r['f1']:>8.1f} [{r['f1_low']:4.1f}, {r['f1_high']:4.1f}]{r['auroc']:>8.3f}{r['brier']:>8.3f}"
              f"{r['unparsed']:>12.1f}{r['tokens_per_step']:>13.0f}")
    print(f"({rows[0]['solutions']} solutions; accuracies and F1 in percent; intervals: bootstrap over solutions; "
          f"AUROC and Brier over the steps up to the first wrong one)")


# ---------------------------------------------------------------------------------------------- plots

def draw(config: Config, models: dict[str, list[dict]]) -> None:
    plt = import_pyplot()
    drawn = {"f1_against_k": f1_figure, "rewards": reward_figure} | ({"training": training_figure} if config.runs else {})
    for name, figure in drawn.items():
        path = Path(config.out) / f"{name}.png"
        figure(plt, config, models).savefig(path, dpi=130, bbox_inches="tight")
        print("plot:", path)


def f1_figure(plt, config: Config, models: dict[str, list[dict]]):
    """F1 against odd K; a direct PRM is a level line.

    At an even K half of the samples can say Yes and half No. Their mean lies next to the threshold then, mostly just below
    it: through all K the curve would zigzag.
    """
    figure, axis = plt.subplots(figsize=(6, 4))
    for colour, (name, lines) in enumerate(models.items()):
        most = len(lines[0]["samples"][0])
        rows = [measure(name, lines, k) for k in ([1] if most == 1 else range(1, most + 1, 2))]
        if most == 1:
            axis.axhline(rows[0]["f1"], color=f"C{colour}", linestyle="--", label=name)
            axis.axhspan(rows[0]["f1_low"], rows[0]["f1_high"], color=f"C{colour}", alpha=0.1)
        else:
            f1 = np.array([r["f1"] for r in rows])
            spread = np.abs(np.array([[r["f1_low"], r["f1_high"]] for r in rows]).T - f1)
            axis.errorbar([r["k"] for r in rows], f1, spread, color=f"C{colour}", marker="o", markersize=3, capsize=2, label=name)
    axis.set(xlabel="K, analyses per step", ylabel="F1 (%)", title="F1 against K (bars: 95% bootstrap over solutions)")
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def reward_figure(plt, config: Config, models: dict[str, list[dict]]):
    """Above: the rewards of right and wrong steps; below: how often a step of a given reward is right."""
    figure, axes = plt.subplots(2, len(models), figsize=(3.4 * len(models), 6), squeeze=False, sharex=True)
    bins = np.linspace(0, 1, 11)
    for column, (name, lines) in enumerate(models.items()):
        values, right = labelled_rewards(lines, step_rewards(lines, max(config.k)))
        top, bottom = axes[:, column]
        top.hist([values[right], values[~right]], bins=bins, density=True, color=["tab:green", "tab:red"],
                 label=["right steps", "wrong steps"])
        top.set(title=name, ylabel="density")
        top.legend()
        bottom.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        bottom.errorbar(*reliability_points(values, right), marker="o", capsize=2)
        bottom.set(xlabel="reward (mean P(Yes))", ylabel="share of right steps", ylim=(-0.05, 1.05))
    figure.suptitle("Rewards at the largest K, and their reliability (bars: 95%)")
    figure.tight_layout()
    return figure


def training_figure(plt, config: Config, models: dict[str, list[dict]]):
    """Loss per optimizer step of each run, with its validation losses."""
    figure, axes = plt.subplots(1, len(config.runs), figsize=(4.2 * len(config.runs), 3.4), squeeze=False)
    for axis, folder in zip(axes[0], config.runs):
        lines = [line for _, line in read_jsonl(Path(folder) / "metrics.jsonl")]
        for split, style in (("train", {"linewidth": 0.8}), ("validation", {"marker": "o"})):
            own = [line for line in lines if line["split"] == split]
            axis.plot([line["step"] + 1 for line in own], [line["loss"] for line in own], label=split, **style)
        axis.set(title=Path(folder).name, xlabel="optimizer step", ylabel="loss (nats per token, or per pair for DPO)")
        axis.legend()
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    run((Config, main))
