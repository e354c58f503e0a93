"""The flags of judging (score.py), and which of them go together."""
from dataclasses import dataclass
from typing import Annotated

from checkpoint.flags import ServedConfig
from formats import best_of_n
from formats.rows import Solution
from formats.score_lines import item_of
from formats.split import SPLITS
from plumbing import ranks
from plumbing.cli import INPUT
from plumbing.errors import BadInput
from rprm import DEFAULT_MODEL


@dataclass(frozen=True, kw_only=True)
class JudgeConfig(ServedConfig):
    model: Annotated[str, "checkpoint: a Hugging Face folder; with --server: the model's name there"] = str(
        DEFAULT_MODEL)
    problem: Annotated[str | None, "one solution: the problem's text"] = None
    step: Annotated[tuple[str, ...], "one solution: its steps (--step A --step B, or --step A B)"] = ()
    input: Annotated[tuple[str, ...],
                     "files, folders of shards, or - (standard input) with solutions: ProcessBench, "
                     "PRMBench, Math-Shepherd, OpenR, TRL's stepwise rows, R-PRM's evaluation rows, raw "
                     "text, several candidates for a problem (docs/formats.md)", INPUT] = ()
    split: Annotated[str, "raw text has a step between blank lines, or for each number, line or sentence",
                     SPLITS] = "blank"
    out: Annotated[str | None, "scores.jsonl to write; the table of several solutions goes beside it"] = None
    k: Annotated[tuple[int, ...], "analyses per step; several: a row each, the first ones of the largest",
                 (1, None)] = (10,)
    threshold: Annotated[float, "a step with a lower reward is predicted wrong", (0, 1)] = 0.5
    thresholds: Annotated[tuple[float, ...], "PRMBench: the table at each of these (the paper's, and that "
                                             "of the official script)", (0, 1)] = (0.5, 0.61)
    all_steps: Annotated[bool, "judge the steps after the first one predicted wrong too (PRMBench's rows, "
                               "and rows with several candidates, always are)"] = False
    best: Annotated[bool, "candidates for a problem: leave one as soon as it can no longer be the best by "
                          "--aggregate. The picks are those of judging all steps"] = False
    aggregate: Annotated[str, "with --best: how the steps' rewards make a candidate's score",
                         best_of_n.FALLING] = "min"
    direct: Annotated[bool, "read P(Yes) straight after the prompt, with no analysis (for a direct "
                            "PRM)"] = False
    show: Annotated[bool, "print the analyses"] = False
    limit: Annotated[int | None, "only the first so many solutions of each file", (1, None)] = None
    force: Annotated[bool, "read P(Yes) after an added verification line where an analysis has no "
                           "verdict"] = True
    resume: Annotated[bool, "go on with a killed run (with --out)"] = False
    overwrite: Annotated[bool, "replace an existing output"] = False


def check_flags(config: JudgeConfig) -> None:
    one_is_given = bool(config.step)
    if one_is_given != (config.problem is not None) or one_is_given == bool(config.input):
        raise BadInput("give either --problem with its --step, or --input FILE")
    if config.resume and not config.out:
        raise BadInput("--resume goes on with a file of scores; name it with --out")
    if config.best and (len(set(config.k)) > 1 or config.direct):
        raise BadInput("--best leaves candidates by their rewards at one --k, and not with --direct; "
                       "give one --k")
    if config.direct and config.k not in ((1,), JudgeConfig.k):
        raise BadInput("--direct reads P(Yes) once, with no analysis to take several of; leave --k out")
    if ranks.count() > 1 and not config.out:
        raise BadInput("several ranks need --out, where their scores are merged")
    if ranks.count() > 1 and one_is_given:
        raise BadInput("one solution is judged by one process; leave torchrun out")


def item_to_judge(source: str, solution: Solution, best: bool) -> dict:
    """What a line of scores.jsonl says of its solution, before it is judged. best: --best"""
    if best and solution.label is not None:
        raise BadInput(
            f"{source} {solution.id}: has a label, and --best may leave a solution before the step that it "
            "names; leave --best out"
        )
    return item_of(source, solution)
