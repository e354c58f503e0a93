"""Rewards for one solution, or a benchmark in ProcessBench's format.

    python score.py --problem "Tom has 3 apples and buys 4. How many?" --step "He has 3 + 4 = 8 apples."
    python score.py --model FOLDER --input gsm8k.json math.json --k 1 4 10 --out scores.jsonl

A step is predicted wrong when its reward is below the threshold; the prediction is the first such step, -1 if there is
none. Error accuracy (exact match where there is an error), correct accuracy, and F1, their harmonic mean. A solution
is judged no further than its first step predicted wrong, which gives the same prediction (--all-steps goes on).
"""
import time
from bisect import bisect
from collections import Counter, deque
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Annotated, Iterable, Iterator

from tqdm import tqdm

from plumbing import ranks
from plumbing.cli import print_config, run
from plumbing.errors import BadInput
from plumbing.files import get_field, write_json
from plumbing.journal import Journal
from data import ServedConfig, in_order, load_sampler, read_analyses, round_size, rounds
from formats.readers import Solution, read_solution, read_solutions
from rprm import DEFAULT_MODEL, Analysis, Case, Sampler, reward, show_p_yes, show_verdict


@dataclass(frozen=True, kw_only=True)
class Config(ServedConfig):
    model: Annotated[str, "checkpoint: a Hugging Face folder; with --server: the model's name there"] = str(DEFAULT_MODEL)
    problem: Annotated[str | None, "one solution: the problem's text"] = None
    step: Annotated[tuple[str, ...], "one solution: its steps (--step A --step B, or --step A B)"] = ()
    input: Annotated[tuple[str, ...], "files, folders of shards, or - (standard input) with solutions: ProcessBench, PRMBench, "
                                      "Math-Shepherd, OpenR, TRL's stepwise rows, R-PRM's evaluation rows"] = ()
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
    ranks.join(config.device, config.rank_timeout)
    print_config(config)
    found, counts = Solutions(config), Counter()
    if ranks.count() > 1 and not config.out:
        raise BadInput("several ranks need --out, where their scores are merged")
    own, alone, size = ranks.share(range(len(found))), len(found) == 1, round_size(config)
    journal, done = Journal(config.out, config, size or 1) if config.out else nullcontext(), 0
    items = ({"source": source, "id": s.id, "problem": s.problem, "steps": list(s.steps), "label": s.label}
             for source, s in map(found.__getitem__, own))
    lines = journal.check(items) if config.out else deque(items, maxlen=0)  # either way a bad solution is named before the work
    for done, (where, line) in enumerate(lines, 1):
        count_line(counts, check_line(config, line, where), config.k)
    sampler = load_sampler(config, max(config.k), config.force, direct=config.direct)
    start = time.perf_counter()
    with journal, tqdm(total=len(own), initial=done, desc="score", unit="solution", disable=alone or ranks.rank() > 0) as bar:
        for some in rounds(own, done, size):
            for source, solution, judged in in_order(judge_all(sampler, config, map(found.__getitem__, some))):
                line = score_line(config, source, solution, judged)
                count_line(counts, line, config.k)
                if config.out:
                    journal.write(line)
                bar.update()
                bar.set_postfix_str(f"F1 {summary_row(counts, source, max(config.k))['f1'] or 0:.1f}, {rate(sampler, start)}")
        rows = summary(sum(ranks.gather(counts), Counter()), found.sources, config.k)
        if config.out and not alone and ranks.rank() == 0:  # before the scores are complete: a kill between the two would leave no table
            write_json(Path(config.out).with_suffix(".summary.json"), rows)
    seconds, [tokens] = time.perf_counter() - start, ranks.total(sampler.engine.new_tokens)
    if ranks.rank():
        return
    if alone:
        print_solution(config, line)
    else:
        print_summary(rows)
    print(f"model: {config.model}; {seconds:.1f} s, {tokens:.0f} tokens sampled ({tokens / seconds:.0f} tokens/s)")
    if config.server:
        print(sampler.engine.tally())


def rate(sampler: Sampler, start: float) -> str:
    return f"{sampler.engine.new_tokens / (time.perf_counter() - start):.0f} tokens/s"


class Solutions:
    """The solution of the command line, or those of the input files, read on demand. solutions[i] -> (source, Solution)."""

    def __init__(self, config: Config):
        if bool(config.step) != (config.problem is not None) or bool(config.step) == bool(config.input):
            raise BadInput("give either --problem with its --step, or --input FILE")
        if config.resume and not config.out:
            raise BadInput("--resume goes on with a file of scores; name it with --out")
        stems = [Path(path).stem for path in config.input]
        self.sources = [stem if stems.count(stem) == 1 else path for stem, path in zip(stems, config.input)]
        self.files = [read_solutions(path) for path in config.input]
        if config.step:
            self.sources = ["command line"]
            given = {"id": "0", "problem": config.problem, "steps": list(config.step)}
            self.files = [[("command line", read_solution(given, "command line"))]]
        if empty := [path for path, rows in zip(config.input, self.files) if not len(rows)]:
            raise BadInput(f"{empty[0]}: has no solutions; check the file")
        self.ends = list(accumulate(min(len(rows), config.limit or len(rows)) for rows in self.files))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: int) -> tuple[str, Solution]:
        n = bisect(self.ends, i)
        _, solution = self.files[n][i - (self.ends[n - 1] if n else 0)]
        return self.sources[n], solution


# ---------------------------------------------------------------------------------------------- judging

Judged = tuple[str, Solution, list[list[Analysis]]]  # source, solution, the analyses of each judged step


def judge_all(sampler: Sampler, config: Config, found: Iterable[tuple[str, Solution]]) -> Iterator[tuple[int, Judged]]:
    """(index of the solution, what was judged of it), as the solutions are completed. `found` is read as room is found.

    Many solutions are judged side by side. The steps of one come one after the other, since none is needed after the
    first predicted wrong; with --all-steps they need not wait for each other.
    """
    if config.direct:
        yield from judge_directly(sampler, config, found)
        return
    coming = enumerate(found)
    waiting: deque[tuple[int, int]] = deque()  # (solution, step) to ask for
    asked: dict[int, tuple[int, int]] = {}     # ticket -> (solution, step) under way
    judged: dict[int, tuple[str, Solution, dict[int, list[Analysis]]]] = {}  # solution -> ..., step -> analyses
    sampler.restart()
    while True:
        while sampler.has_room:
            if not waiting and (new := next(coming, None)):
                i, (source, solution) = new
                judged[i] = source, solution, {}
                waiting.extend((i, t) for t in range(len(solution.steps) if config.all_steps else 1))
            if not waiting:
                break
            i, t = waiting.popleft()
            asked[sampler.add(case_of(judged[i][1], t))] = i, t
        if not sampler.busy:
            return
        for ticket, analyses in sampler.step():
            ranks.sign_of_life()  # a line may take its solution's many steps, or wait for those before it
            i, t = asked.pop(ticket)
            source, solution, by_step = judged[i]
            by_step[t] = analyses
            steps = [by_step[t] for t in sorted(by_step)]
            if complete(config, solution, steps):
                yield i, (source, solution, steps)
                del judged[i]
            elif not config.all_steps:
                waiting.appendleft((i, t + 1))  # before new solutions, so that few are open at a time


def judge_directly(sampler: Sampler, config: Config, found: Iterable[tuple[str, Solution]]) -> Iterator[tuple[int, Judged]]:
    """The same without analyses: a batch of solutions at a time, all of their steps."""
    coming = enumerate(found)
    while some := list(islice(coming, config.batch_size)):
        answers = iter(sampler.direct([case_of(solution, t) for _, (_, solution) in some for t in range(len(solution.steps))]))
        for i, (source, solution) in some:
            steps = []
            for analysis in islice(answers, len(solution.steps)):
                if not complete(config, solution, steps):
                    steps.append([analysis])
            yield i, (source, solution, steps)


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
            "label": solution.label, "rewards": [reward(analyses) for analyses in steps],
            "prediction": predict(steps, max(config.k), config.threshold),
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

def count_line(counts: Counter, line: dict, ks: tuple[int, ...]) -> None:
    """Add what the tables say of a line, to counts[source, k, name] for each K."""
    for k in set(ks):
        prediction, label, steps = line["predictions"][str(k)], line["label"], [analyses[:k] for analyses in line["samples"]]
        analyses = [a for step in steps for a in step]
        kind = "unlabelled" if label is None else "correct" if label == -1 else "wrong"
        counts.update({(line["source"], k, name): number for name, number in {
            "solutions": 1, kind: 1, f"{kind}, predicted so": label is not None and prediction == label,
            "steps": len(steps), "null_rewards": sum(all(a["p_yes"] is None for a in step) for step in steps),
            "analyses": len(analyses), "unparsed": sum(a["verdict"] is None for a in analyses),
            "truncated": sum(not a["finished"] for a in analyses), "forced": sum(a["forced"] for a in analyses),
            "tokens": sum(a["n_tokens"] for a in analyses)}.items()})


def accuracies(found: int, wrong: int, kept: int, correct: int) -> dict[str, float | None]:
    """ProcessBench's three numbers in percent. None where there is nothing to take them over.

    found: of the `wrong` solutions, those whose first wrong step was predicted; kept: of the `correct` ones, those with none.
    """
    error = 100 * found / wrong if wrong else None
    right = 100 * kept / correct if correct else None
    f1 = None if error is None or right is None else 2 * error * right / (error + right) if error + right else 0.0
    return {"error_accuracy": error, "correct_accuracy": right, "f1": f1}


def summary(counts: Counter, sources: list[str], ks: tuple[int, ...]) -> list[dict]:
    """A row per source and K, and the average over the sources where there are several."""
    rows = []
    for k in sorted(set(ks)):
        own = [summary_row(counts, source, k) for source in dict.fromkeys(sources)]  # a file given twice is one source
        rows += own
        if len(own) > 1 and all(row["f1"] is not None for row in own):
            means = ("error_accuracy", "correct_accuracy", "f1", "unparsed", "truncated", "tokens_per_step")
            sums = ("solutions", "unlabelled", "forced", "null_rewards")
            rows.append({"source": "average", "k": k} | {name: sum(row[name] for row in own) / len(own) for name in means}
                        | {name: sum(row[name] for row in own) for name in sums})
    return rows


def summary_row(counts: Counter, source: str, k: int) -> dict:
    """The accuracies of one file at one K, and what its analyses were like (rates in percent)."""
    def n(name: str) -> int:
        return counts[source, k, name]
    return {"source": source, "k": k, "solutions": n("solutions"), "unlabelled": n("unlabelled"),
            **accuracies(n("wrong, predicted so"), n("wrong"), n("correct, predicted so"), n("correct")),
            "unparsed": 100 * n("unparsed") / n("analyses"), "truncated": 100 * n("truncated") / n("analyses"),
            "forced": n("forced"), "null_rewards": n("null_rewards"), "tokens_per_step": n("tokens") / n("steps")}


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
