"""Rewards for one solution, or a benchmark in ProcessBench's format.

    python score.py --problem "Tom has 3 apples and buys 4. How many?" --step "He has 3 + 4 = 8 apples."
    python score.py --model FOLDER --input gsm8k.json math.json --k 1 4 10 --out scores.jsonl

A step is predicted wrong when its reward is below the threshold; the prediction is the first such step, -1 if there is
none. Error accuracy (exact match where there is an error), correct accuracy, and F1, their harmonic mean. A solution
is judged no further than its first step predicted wrong, which gives the same prediction (--all-steps goes on).
"""
import time
from collections import deque
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Iterator

from tqdm import tqdm

import ranks
from cli import BadInput, Journal, get_field, print_config, run, write_json
from data import in_order, read_analyses, round_size, rounds
from readers import Solution, read_rows, read_solution
from rprm import DEFAULT_MODEL, Analysis, Case, Sampler, reward, show_p_yes, show_verdict
from server import ServedConfig, load_sampler


@dataclass(frozen=True, kw_only=True)
class Config(ServedConfig):
    model: Annotated[str, "checkpoint: a Hugging Face folder; with --server: the model's name there"] = str(DEFAULT_MODEL)
    problem: Annotated[str | None, "one solution: the problem's text"] = None
    step: Annotated[tuple[str, ...], "one solution: its steps (--step A --step B, or --step A B)"] = ()
    input: Annotated[tuple[str, ...], "files in ProcessBench's format (one object: that solution alone)"] = ()
    out: Annotated[str | None, "scores.jsonl to write; the table goes beside it"] = None
    k: Annotated[tuple[int, ...], "analyses per step; several: a row each, the first ones of the largest", (1, None)] = (10,)
    threshold: Annotated[float, "a step with a lower reward is predicted wrong", (0, 1)] = 0.5
    all_steps: Annotated[bool, "judge the steps after the first one predicted wrong too"] = False
    direct: Annotated[bool, "read P(Yes) straight after the prompt, with no analysis (for a direct PRM)"] = False
    show: Annotated[bool, "print the analyses"] = False
    limit: Annotated[int | None, "only the first so many solutions of each file", (1, None)] = None
    force: Annotated[bool, "read P(Yes) after an added verification line where an analysis has no verdict"] = True
    resume: Annotated[bool, "go on with a killed run (with --out)"] = False
    overwrite: Annotated[bool, "replace an existing output"] = False


def main(config: Config) -> None:
    ranks.join(config.device, timedelta(days=30))  # the first rank that is done waits for the last one
    print_config(config)
    found = solutions(config)
    if ranks.count() > 1 and not config.out:
        raise BadInput("several ranks need --out, where their scores are merged")
    own, alone, size = ranks.share(found), len(found) == 1, round_size(config)
    journal = Journal(config.out, config, size or 1) if config.out else None
    lines = []
    if journal:
        journal.check({"source": source, "id": s.id, "problem": s.problem, "steps": list(s.steps), "label": s.label} for source, s in own)
        lines += [check_line(config, line, where) for where, line in journal.lines()]
    sampler = load_sampler(config, max(config.k), config.force, direct=config.direct)
    start = time.perf_counter()
    with journal or nullcontext(), tqdm(total=len(own), initial=len(lines), desc="score", unit="solution",
                                         disable=alone or ranks.rank() > 0) as bar:
        for some in rounds(own, len(lines), size):
            for (source, solution), judged in zip(some, in_order(judge_all(sampler, config, [s for _, s in some]))):
                lines.append(score_line(config, source, solution, judged))
                if journal:
                    journal.write(lines[-1])
                bar.update()
                bar.set_postfix_str(f"F1 {accuracies(lines, max(config.k))['f1'] or 0:.1f}, {rate(sampler, start)}")
        if ranks.count() > 1:
            lines = journal.everything()
        if journal and not alone and ranks.rank() == 0:  # before the scores are complete: a kill between the two would leave no table
            write_json(Path(config.out).with_suffix(".summary.json"), summary(lines, config.k))
    seconds, [tokens] = time.perf_counter() - start, ranks.total(sampler.engine.new_tokens)
    if ranks.rank():
        return
    if alone:
        print_solution(config, lines[0])
    else:
        print_summary(summary(lines, config.k))
    print(f"model: {config.model}; {seconds:.1f} s, {tokens:.0f} tokens sampled ({tokens / seconds:.0f} tokens/s)")
    if config.server:
        print(sampler.engine.tally())


def rate(sampler: Sampler, start: float) -> str:
    return f"{sampler.engine.new_tokens / (time.perf_counter() - start):.0f} tokens/s"


def solutions(config: Config) -> list[tuple[str, Solution]]:
    """(source, solution): of the command line, or of all rows of the input files."""
    if bool(config.step) != (config.problem is not None) or bool(config.step) == bool(config.input):
        raise BadInput("give either --problem with its --step, or --input FILE")
    if config.step:
        return [("command line", read_solution({"id": "0", "problem": config.problem, "steps": list(config.step)}, "command line"))]
    found, stems = [], [Path(path).stem for path in config.input]
    for path in config.input:
        source = Path(path).stem if stems.count(Path(path).stem) == 1 else path
        rows = [(source, read_solution(row, where)) for where, row in read_rows(path)]
        if not rows:
            raise BadInput(f"{path}: has no solutions; check the file")
        found += rows[:config.limit]
    return found


# ---------------------------------------------------------------------------------------------- judging

def judge_all(sampler: Sampler, config: Config, found: list[Solution]) -> Iterator[tuple[int, list[list[Analysis]]]]:
    """(index of the solution, the analyses of each judged step), as the solutions are completed.

    Many solutions are judged side by side. The steps of one come one after the other, since none is needed after the
    first predicted wrong; with --all-steps they need not wait for each other.
    """
    if config.direct:
        steps = [[] for _ in found]  # solution -> judged steps -> analyses
        for first in range(0, len(found), config.batch_size):
            some = [(i, t) for i in range(first, min(first + config.batch_size, len(found))) for t in range(len(found[i].steps))]
            for (i, t), analysis in zip(some, sampler.direct([case_of(found[i], t) for i, t in some])):
                if not complete(config, found[i], steps[i]):
                    steps[i].append([analysis])
            yield from ((i, steps[i]) for i in dict(some))
        return
    judged: list[dict[int, list[Analysis]]] = [{} for _ in found]  # solution -> step -> analyses
    first = ((i, t) for i, solution in enumerate(found) for t in range(len(solution.steps) if config.all_steps else 1))
    waiting, asked, answered = deque(first), [], 0  # (solution, step)s that may be judged; those that were asked for, in order

    def cases() -> Iterator[Case | None]:
        while waiting or answered < len(asked):
            if waiting:
                asked.append(waiting.popleft())
                yield case_of(found[asked[-1][0]], asked[-1][1])
            else:
                yield None  # a case is being judged, and its answer may ask for another

    for n, analyses in sampler.analyses(cases()):
        i, t = asked[n]
        judged[i][t] = analyses
        answered += 1
        steps = [judged[i][t] for t in sorted(judged[i])]
        if complete(config, found[i], steps):
            yield i, steps
        elif not config.all_steps:
            waiting.appendleft((i, t + 1))  # before new solutions, so that few are open at a time


def case_of(solution: Solution, t: int) -> Case:
    return Case(solution.problem, solution.steps[:t], solution.steps[t])


def complete(config: Config, solution: Solution, steps: list[list[Analysis]]) -> bool:
    """Is there nothing more to judge: all steps done, or a step predicted wrong at every K?"""
    return len(steps) == len(solution.steps) or (
        not config.all_steps and all(predict(steps, k, config.threshold) >= 0 for k in config.k))


def predict(steps: list[list[Analysis]], k: int, threshold: float) -> int:
    """The first step whose reward over its first k analyses is below the threshold; -1 if none. A null reward predicts nothing."""
    for t, analyses in enumerate(steps):
        value = reward(analyses[:k])
        if value is not None and value < threshold:
            return t
    return -1


def score_line(config: Config, source: str, solution: Solution, steps: list[list[Analysis]]) -> dict:
    """The line of scores.jsonl; rewards and prediction at the largest K, predictions at each."""
    return {"source": source, "id": solution.id, "problem": solution.problem, "steps": list(solution.steps),
            "label": solution.label, "rewards": [reward(analyses) for analyses in steps], "prediction": predict(steps, max(config.k), config.threshold),
            "predictions": {str(k): predict(steps, k, config.threshold) for k in config.k},
            "samples": [[asdict(a) for a in analyses] for analyses in steps]}


def check_line(config: Config, line: dict, where: str) -> dict:
    """A line that a killed run left. Raises BadInput unless the tables can be made of it."""
    for analyses in get_field(line, "samples", list, where):
        read_analyses({"analyses": analyses}, where)
    predictions = get_field(line, "predictions", dict, where)
    if not line["samples"] or set(predictions) != {str(k) for k in config.k} or "rewards" not in line:
        raise BadInput(f"{where}: not a line of these scores; give --overwrite to start anew")
    return line


# ---------------------------------------------------------------------------------------------- tables

def accuracies(lines: list[dict], k: int) -> dict[str, float | None]:
    """ProcessBench's three numbers in percent over labelled solutions. None where there is nothing to take them over."""
    def percent(hits: list[bool]) -> float | None:
        return 100 * sum(hits) / len(hits) if hits else None
    error = percent([line["predictions"][str(k)] == line["label"] for line in lines if line["label"] not in (-1, None)])
    correct = percent([line["predictions"][str(k)] == -1 for line in lines if line["label"] == -1])
    f1 = None if error is None or correct is None else 2 * error * correct / (error + correct) if error + correct else 0.0
    return {"error_accuracy": error, "correct_accuracy": correct, "f1": f1}


def summary(lines: list[dict], ks: tuple[int, ...]) -> list[dict]:
    """A row per source and K, and the average over the sources where there are several."""
    sources = list(dict.fromkeys(line["source"] for line in lines))
    rows = []
    for k in sorted(ks):
        own = [summary_row(source, [line for line in lines if line["source"] == source], k) for source in sources]
        rows += own
        if len(own) > 1 and all(row["f1"] is not None for row in own):
            means = ("error_accuracy", "correct_accuracy", "f1", "unparsed", "truncated", "tokens_per_step")
            sums = ("solutions", "unlabelled", "forced", "null_rewards")
            rows.append({"source": "average", "k": k} | {name: sum(row[name] for row in own) / len(own) for name in means}
                        | {name: sum(row[name] for row in own) for name in sums})
    return rows


def summary_row(source: str, lines: list[dict], k: int) -> dict:
    """The accuracies of one file at one K, and what its analyses were like (rates in percent)."""
    steps = [analyses[:k] for line in lines for analyses in line["samples"]]
    analyses = [a for step in steps for a in step]
    return {"source": source, "k": k, "solutions": len(lines), "unlabelled": sum(line["label"] is None for line in lines),
            **accuracies(lines, k),
            "unparsed": 100 * sum(a["verdict"] is None for a in analyses) / len(analyses),
            "truncated": 100 * sum(not a["finished"] for a in analyses) / len(analyses),
            "forced": sum(a["forced"] for a in analyses),
            "null_rewards": sum(all(a["p_yes"] is None for a in step) for step in steps),
            "tokens_per_step": sum(a["n_tokens"] for a in analyses) / len(steps)}


COLUMNS = (("K", "k", 4, "d"), ("solutions", "solutions", 11, "d"), ("error acc.", "error_accuracy", 12, ".1f"),
           ("correct acc.", "correct_accuracy", 14, ".1f"), ("F1", "f1", 7, ".1f"), ("unparsed %", "unparsed", 12, ".1f"),
           ("truncated %", "truncated", 13, ".1f"), ("forced", "forced", 8, "d"), ("null", "null_rewards", 6, "d"),
           ("tokens/step", "tokens_per_step", 13, ".0f"))


def print_summary(rows: list[dict]) -> None:
    print(f"\n{'source':<16}" + "".join(f"{title:>{width}}" for title, _, width, _ in COLUMNS))
    for row in rows:
        cells = (f"{'-' if row[name] is None else format(row[name], form):>{width}}" for _, name, width, form in COLUMNS)
        print(f"{row['source']:<16}" + "".join(cells))
    print("(error and correct accuracy and F1 in percent; unparsed: analyses without a verdict of their own; forced: those of\n"
          " them that were read after an added verification line; null: steps without any P(Yes), never predicted wrong)")
    if unlabelled := sum(row["unlabelled"] for row in rows if row["k"] == rows[0]["k"] and row["source"] != "average"):
        print(f"{unlabelled} solutions have no label and count in no accuracy")


def print_solution(config: Config, line: dict) -> None:
    """A line per step, the prediction, and on --show the analyses."""
    print(f"\nproblem: {line['problem']}")
    for t, (step, raw) in enumerate(zip(line["steps"], line["samples"])):
        analyses = read_analyses({"analyses": raw}, f"step {t + 1}")
        value = line["rewards"][t]
        counts = [sum(a.verdict is verdict for a in analyses) for verdict in (True, False, None)]
        shown = "null " if value is None else f"{value:.3f}"
        print(f"Step {t + 1}: reward {shown}  {'wrong' if value is not None and value < config.threshold else 'right'}  "
              f"verdicts {counts[0]} Yes, {counts[1]} No, {counts[2]} missing  | {step}")
        for i, a in enumerate(analyses if config.show else [], 1):
            print(f"  --- analysis {i}: verdict {show_verdict(a)}, {show_p_yes(a)}, {a.n_tokens} tokens"
                  + ("" if a.finished else ", cut off") + "\n    " + a.text.replace("\n", "\n    "))
    judged = len(line["samples"])
    if judged < len(line["steps"]):
        print(f"(steps {judged + 1} to {len(line['steps'])} not judged: --all-steps goes on)")
    print("first step predicted wrong: " + (f"step {line['prediction'] + 1}" if line["prediction"] >= 0 else "none"))


if __name__ == "__main__":
    run((Config, main))
