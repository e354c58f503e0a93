"""What `score.py threshold` finds, prints and draws: the sweep, the choice, what it gives elsewhere, and the
calibration.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from formats import calibration, plots
from formats.calibration import LabelledRewards, figures, fit_temperature, log_loss, reliability, scaled
from formats.columns import Column, print_columns
from formats.scores import Scored
from formats.threshold_sweep import GRID, USUAL, Sweep, at, choose, difference, sweeps_of
from plumbing.errors import BadInput

SHOWN = 5  # each so many thresholds of the grid are printed
TITLES = {  # benchmark -> figure -> its title in a table, the main one first
    "ProcessBench": {"f1": "F1", "error_accuracy": "error acc.", "correct_accuracy": "correct acc."},
    "PRMBench": {"prm_score": "PRMScore", "f1": "F1 of right steps", "negative_f1": "F1 of wrong steps"},
}


@dataclass
class Choice:
    """What was found for one benchmark."""

    benchmark: str
    main: str  # the figure by which the threshold is chosen
    solutions: int
    threshold: dict[str, float]  # with its interval
    sweep: list[dict]  # a row for each threshold of the grid
    rows: list[
        dict
    ]  # the main figure at the chosen threshold and at 0.5: by which it was chosen, and elsewhere


@dataclass
class Calibration:
    """temperature: fitted to the rewards by which the threshold is chosen; None without --calibrate."""

    temperature: float | None
    rows: list[dict]  # figures, before and after
    curves: dict[str, tuple[np.ndarray, np.ndarray]] = field(
        default_factory=dict
    )  # name -> (rewards, right), to be drawn


@dataclass
class Study:
    choices: list[Choice]
    calibration: Calibration


# ---------------------------------------------------------------------------------------------- finding


def study(chosen_on: Sequence[Scored], applied_to: Sequence[Scored], calibrate: bool) -> Study:
    """applied_to: scores for which the chosen threshold is reported besides; there may be none."""
    others = {sweep.benchmark: sweep for sweep in sweeps_of(applied_to)} if applied_to else {}
    choices = []
    for sweep in sweeps_of(chosen_on):
        if applied_to and sweep.benchmark not in others:
            raise BadInput(
                f"{applied_to[0].where}: --apply has no labelled solution of {sweep.benchmark}, as --scores "
                f"has; give scores of the same benchmark"
            )
        choices.append(study_sweep(sweep, others.get(sweep.benchmark)))
    return Study(choices, study_calibration(chosen_on, applied_to, calibrate))


def study_sweep(sweep: Sweep, other: Sweep | None) -> Choice:
    chosen = choose(sweep)
    rows = [compared("--scores", sweep, chosen["threshold"])]
    if other is not None:
        rows.append(compared("--apply", other, chosen["threshold"]))
    return Choice(sweep.benchmark, sweep.main, len(sweep.scores), chosen, at(sweep, GRID), rows)


def compared(name: str, sweep: Sweep, threshold: float) -> dict:
    """The main figure at a threshold and at 0.5, and the difference: each with its interval."""
    row = {"scores": name, "solutions": len(sweep.scores)}
    for key, own in zip(("chosen", "usual"), at(sweep, [threshold, USUAL]), strict=True):
        for end in ("", "_low", "_high"):
            row[f"{key}{end}"] = own[f"{sweep.main}{end}"]
    return row | difference(sweep, threshold)


def study_calibration(
    chosen_on: Sequence[Scored], applied_to: Sequence[Scored], calibrate: bool
) -> Calibration:
    """Figures of the rewards of labelled steps; with `calibrate` also after a temperature fitted to those of
    chosen_on.
    """
    temperature = None
    if calibrate:
        temperature = fit_temperature(*labelled_rewards(chosen_on, must_be_judged=True).arrays())
    found = Calibration(temperature, [])
    for name, scores in (("--scores", chosen_on), ("--apply", applied_to)):
        if not scores:
            continue
        collected = labelled_rewards(scores, must_be_judged=calibrate)
        rewards, right = collected.arrays()
        found.rows.append(
            {"scores": name, "rewards": "as they are", "steps": len(rewards)} | collected.figures()
        )
        if collected.unjudged or not len(rewards):
            continue
        found.rows[-1]["log_loss"] = log_loss(rewards, right)
        found.curves[name] = rewards, right
        if temperature is not None:
            after = scaled(rewards, temperature)
            found.rows.append(
                {
                    "scores": name,
                    "rewards": f"T = {temperature:.3f}",
                    "steps": len(after),
                    **figures(after, right, np.array(collected.sizes)),
                    "log_loss": log_loss(after, right),
                }
            )
            found.curves[f"{name}, T = {temperature:.2f}"] = after, right
    return found


def labelled_rewards(scores: Sequence[Scored], must_be_judged: bool) -> LabelledRewards:
    collected = LabelledRewards()
    for line in scores:
        if must_be_judged:
            line.check_judged(len(line.right))
        values = [None if np.isnan(value) else float(value) for value in line.rewards]
        collected.add(values, line.right.tolist())
    if must_be_judged and not collected.rewards:
        raise BadInput(
            f"{scores[0].where}: neither this solution nor any other has a labelled step with a reward; "
            "give scores of labelled solutions"
        )
    return collected


# ---------------------------------------------------------------------------------------------- showing


def print_study(found: Study, chosen_is_reported: bool) -> None:
    """chosen_is_reported: there are no other scores than those by which the threshold was chosen."""
    for choice in found.choices:
        print_choice(choice)
    if chosen_is_reported:
        print(
            "The threshold was chosen by the solutions for which it is reported, so its figures flatter it:"
        )
        print("give other solutions with --apply.")
    print()
    print_columns(found.calibration.rows, CALIBRATION)
    print("(over labelled steps: up to the first wrong one, in PRMBench all; -: not all of them were judged)")


def print_choice(choice: Choice) -> None:
    """The sweep, the best threshold, and what it gives."""
    best = choice.threshold["threshold"]
    low = choice.threshold["threshold_low"]
    high = choice.threshold["threshold_high"]
    main = TITLES[choice.benchmark][choice.main]
    columns = [Column("threshold", "threshold", 9, ".2f")]
    for name, title in TITLES[choice.benchmark].items():
        columns.append(Column(title, name, 24, ".1f", interval=True))
    shown = [row for i, row in enumerate(choice.sweep) if i % SHOWN == 0 or row["threshold"] == best]
    print(f"\n{choice.benchmark}, {choice.solutions} solutions; in percent; 95%: bootstrap over solutions")
    print_columns(shown, columns)
    print(f"\nbest threshold by {main}: {best:.2f} (95%: {low:.2f} to {high:.2f})")
    print_columns(
        choice.rows,
        [
            Column("scores", "scores", 10, "s"),
            Column("solutions", "solutions", 10, "d"),
            Column(f"{main} at {best:.2f}", "chosen", 24, ".1f", True),
            Column(f"{main} at {USUAL}", "usual", 24, ".1f", True),
            Column("difference", "difference", 24, "+.1f", True),
        ],
    )


CALIBRATION = (
    Column("scores", "scores", 10, "s"),
    Column("rewards", "rewards", 14, "s"),
    Column("steps", "steps", 9, "d"),
    *calibration.COLUMNS,
    Column("log loss", "log_loss", 10, ".3f"),
)


def as_json(found: Study) -> dict:
    """What threshold.json holds."""
    return {
        "choices": [vars(choice) for choice in found.choices],
        "calibration": {
            "temperature": found.calibration.temperature,
            "rows": found.calibration.rows,
            "reliability": {name: reliability(*curve) for name, curve in found.calibration.curves.items()},
        },
    }


def draw(found: Study, out: Path) -> None:
    """threshold.json -> threshold.ProcessBench.png, threshold.PRMBench.png, threshold.reliability.png."""
    for choice in found.choices:
        title = f"{choice.benchmark}: {TITLES[choice.benchmark][choice.main]} (95%: bootstrap over solutions)"
        path = out.with_suffix(f".{choice.benchmark}.png")
        plots.draw_sweep(choice.sweep, choice.main, title, choice.threshold["threshold"], path)
    if found.calibration.curves:
        plots.draw_reliability(found.calibration.curves, out.with_suffix(".reliability.png"))
