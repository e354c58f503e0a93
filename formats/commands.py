"""What score.py does with a file of scores, one command each: threshold, best, report. None needs a model."""
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from formats import best_of_n, threshold_study
from formats.plots import import_pyplot
from formats.scores import read_scores
from plumbing.cli import INPUT, print_config
from plumbing.files import json_line, refuse_existing, write_json, writing

# ---------------------------------------------------------------------------------------------- threshold


@dataclass(frozen=True)
class ThresholdConfig:
    scores: Annotated[
        tuple[str, ...],
        "scores.jsonl files by which the threshold is chosen (judged with --all-steps)",
        INPUT,
    ]
    apply: Annotated[tuple[str, ...], "scores.jsonl files for which it is reported, beside 0.5", INPUT] = ()
    k: Annotated[int | None, "use the first so many analyses of each step (default: all)", (1, None)] = None
    calibrate: Annotated[
        bool,
        "fit a temperature to the rewards of --scores, and show what it does to the calibration of --apply",
    ] = False
    out: Annotated[str | None, "threshold.json to write; the plots go beside it"] = None
    plots: Annotated[bool, "with --out: draw the sweep and the reliability diagram (needs matplotlib)"] = True
    overwrite: Annotated[bool, "replace an existing output"] = False


def threshold(config: ThresholdConfig) -> None:
    """scores.jsonl -> the threshold that is best for them, what it gives on other scores, and the
    calibration.
    """
    print_config(config)
    if config.out:
        refuse_existing(config.out, config.overwrite)
        if config.plots:
            import_pyplot()  # says so now, if it is missing
    chosen_on = read_scores(config.scores, config.k)
    applied_to = read_scores(config.apply, config.k)
    found = threshold_study.study(chosen_on, applied_to, config.calibrate)
    is_reported = not config.apply or bool(set(config.apply) & set(config.scores))
    threshold_study.print_study(found, chosen_is_reported=is_reported)
    if config.out:
        if config.plots:
            threshold_study.draw(found, Path(config.out))
        write_json(config.out, threshold_study.as_json(found))


# ---------------------------------------------------------------------------------------------- best


@dataclass(frozen=True)
class BestConfig:
    scores: Annotated[
        tuple[str, ...],
        "scores.jsonl files with several candidates for a problem, judged with --all-steps",
        INPUT,
    ]
    out: Annotated[str, "best.jsonl to write: the pick of each problem"] = "best.jsonl"
    aggregate: Annotated[
        tuple[str, ...],
        "the score of a candidate: an aggregate of its steps' rewards. The highest is picked, of equals the "
        "first. Null rewards are left out; a candidate without any (for `last`: without that of the last "
        "step) is picked last",
        best_of_n.AGGREGATES,
    ] = best_of_n.AGGREGATES
    by: Annotated[
        str,
        "candidates are for one problem if they share its text, or their source and id",
        ("problem", "id"),
    ] = "problem"
    k: Annotated[int | None, "use the first so many analyses of each step (default: all)", (1, None)] = None
    overwrite: Annotated[bool, "replace an existing output"] = False


def best(config: BestConfig) -> None:
    """scores.jsonl -> best.jsonl: the best candidate for each problem; and, where it is known, how often it
    is right.
    """
    print_config(config)
    refuse_existing(config.out, config.overwrite)
    scores = read_scores(config.scores, config.k)
    aggregates = tuple(dict.fromkeys(config.aggregate))
    best_of_n.check_left(scores, config.by, config.k, aggregates)
    problems = best_of_n.group(scores, config.by)
    with writing(config.out) as file:
        for problem in problems:
            file.write(json_line(best_of_n.picks(problem, aggregates)))
    best_of_n.print_table(problems, aggregates)


# ---------------------------------------------------------------------------------------------- report


@dataclass(frozen=True)
class ReportConfig:
    scores: Annotated[tuple[str, ...], "scores.jsonl files, one for each judge that is compared", INPUT]
    out: Annotated[str, "the page to write"] = "report.html"
    runs: Annotated[tuple[str, ...], "folders of training runs whose curves are drawn"] = ()
    threshold: Annotated[float, "where the page's slider begins", (0, 1)] = 0.5
    overwrite: Annotated[bool, "replace an existing output"] = False


def report(config: ReportConfig) -> None:
    """scores.jsonl -> report.html: one page to look at scores with."""
    from formats.page import write_page  # here, as nothing else needs it

    print_config(config)
    refuse_existing(config.out, config.overwrite)
    scores = [Path(path) for path in config.scores]
    runs = [Path(path) for path in config.runs]
    print(write_page(scores, Path(config.out), runs, config.threshold))
