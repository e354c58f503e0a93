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
from formats.tables import accuracies as accuracies_of
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
    def mean(analyses):
        p = [a["p_yes"] for a in analyses[:k] if a["p_yes"] is not None]
        return sum(p) / len(p) if p else np.nan
    return [np.array([mean(analyses) for analyses in line["samples"]]) for line in lines]


def labelled_steps(lines: list[dict], rewards: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(rewards, labels) of the steps whose label is known: up to and with the first wrong one; null rewards left out."""
    values, labels = [], []
    for line, own in zip(lines, rewards):
        last = len(own) if line["label"] == -1 else line["label"] + 1
        values.append(own[:last])
        labels.append(np.arange(len(own[:last])) != line["label"])
    values, labels = np.concatenate(values), np.concatenate(labels)
    return values[~np.isnan(values)], labels[~np.isnan(values)]


def predictions(rewards: list[np.ndarray]) -> np.ndarray:
    """The first step below the threshold of each solution, -1 if none."""
    return np.array([next((t for t, value in enumerate(own) if value < THRESHOLD), -1) for own in rewards])


def accuracies(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """error_accuracy, correct_accuracy and f1, in percent; nan where there is nothing to take them over."""
    hit, wrong = predicted == labels, labels >= 0
    found = accuracies_of(*(int(n) for n in ((hit & wrong).sum(), wrong.sum(), (hit & ~wrong).sum(), (~wrong).sum())))
    return {name: np.nan if value is None else value for name, value in found.items()}


def f1_of(predicted: np.ndarray, labels: np.ndarray) -> float:
    return accuracies(predicted, labels)["f1"]


def auroc(values: np.ndarray, labels: np.ndarray) -> float:
    """The chance that a right step has the higher reward than a wrong one; ties count half (Mann-Whitney)."""
    order = np.sort(values)
    ranks = (np.searchsorted(order, values, "left") + np.searchsorted(order, values, "right") + 1) / 2
    right, wrong = labels.sum(), (~labels).sum()
    return float((ranks[labels].sum() - right * (right + 1) / 2) / (right * wrong))


def bootstrap_f1(predicted: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """95% interval of F1 over solutions drawn with replacement."""
    rng = np.random.default_rng(0)
    draws = [rng.integers(len(labels), size=len(labels)) for _ in range(BOOTSTRAPS)]
    low, high = np.percentile([f1_of(predicted[d], labels[d]) for d in draws], [2.5, 97.5])
    return float(low), float(high)


def measure(name: str, lines: list[dict], k: int) -> dict:
    labels, rewards = np.array([line["label"] for line in lines]), step_rewards(lines, k)
    predicted = predictions(rewards)
    values, right = labelled_steps(lines, rewards)
    low, high = bootstrap_f1(predicted, labels)
    analyses = [a for line in lines for step in line["samples"] for a in step[:k]]
    steps = sum(len(line["samples"]) for line in lines)
    return {"model": name, "k": k, "solutions": len(lines), **accuracies(predicted, labels), "f1_low": low, "f1_high": high,
            "auroc": auroc(values, right), "brier": float(np.mean((values - right) ** 2)),
            "unparsed": 100 * float(np.mean([a["verdict"] is None and not (a["forced"] and a["n_tokens"] == 0) for a in analyses])),
            "tokens_per_step": sum(a["n_tokens"] for a in analyses) / steps}


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

def import_pyplot():
    """matplotlib, which is asked for only where something is drawn, and never opens a window."""
    try:
        import matplotlib
    except ImportError:
        raise BadInput("matplotlib is not installed: pip install -r requirements-dev.txt for the plots, or give --no-plots") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def draw(config: Config, models: dict[str, list[dict]]) -> None:
    plt = import_pyplot()
    drawn = {"f1_against_k": f1_figure, "rewards": reward_figure} | ({"training": training_figure} if config.runs else {})
    for name, figure in drawn.items():
        path = Path(config.out) / f"{name}.png"
        figure(plt, config, models).savefig(path, dpi=130, bbox_inches="tight")
        print("plot:", path)


def f1_figure(plt, config: Config, models: dict[str, list[dict]]):
    """F1 against K; a direct PRM is a level line."""
    figure, axis = plt.subplots(figsize=(6, 4))
    for colour, (name, lines) in enumerate(models.items()):
        most = len(lines[0]["samples"][0])
        rows = [measure(name, lines, k) for k in ([1] if most == 1 else range(1, most + 1))]
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
        values, right = labelled_steps(lines, step_rewards(lines, max(config.k)))
        top, bottom = axes[:, column]
        top.hist([values[right], values[~right]], bins=bins, density=True, color=["tab:green", "tab:red"],
                 label=["right steps", "wrong steps"])
        top.set(title=name, ylabel="density")
        top.legend()
        place = np.clip(np.digitize(values, bins) - 1, 0, 9)
        used = [b for b in range(10) if (place == b).sum() >= 5]
        share = np.array([right[place == b].mean() for b in used])
        error = np.array([1.96 * np.sqrt(max(s * (1 - s), 0.01) / (place == b).sum()) for b, s in zip(used, share)])
        bottom.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        bottom.errorbar([values[place == b].mean() for b in used], share, error, marker="o", capsize=2)
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
