"""Rewards for one solution, or for a benchmark in ProcessBench's format.

    python score.py --problem "Tom has 3 apples and buys 4. How many?" --step "He has 3 + 4 = 8 apples."
    python score.py --model FOLDER --input gsm8k.json math.json --k 1 4 10 --out scores.jsonl

A step is predicted wrong when its reward is below the threshold; the prediction is the first such step, -1 if
there is none. Error accuracy (exact match where there is an error), correct accuracy, and F1, their harmonic
mean. A solution is judged no further than its first step predicted wrong, which gives the same prediction
(--all-steps goes on).
"""
import time
from bisect import bisect
from collections import Counter, deque
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Annotated, Iterable, Iterator, NamedTuple

from tqdm import tqdm

from data import ServedConfig, in_order, load_sampler, print_too_long, round_size, rounds
from formats import tables
from formats.readers import Solution, read_solution, read_solutions
from formats.samples import read_analyses
from plumbing import ranks
from plumbing.cli import print_config, run
from plumbing.errors import BadInput
from plumbing.files import get_field, write_json
from plumbing.journal import Journal
from rprm import DEFAULT_MODEL, Analysis, Case, Sampler, TooLong, reward, show_p_yes, show_verdict


@dataclass(frozen=True, kw_only=True)
class Config(ServedConfig):
    model: Annotated[str, "checkpoint: a Hugging Face folder; with --server: the model's name there"] = str(
        DEFAULT_MODEL
    )
    problem: Annotated[str | None, "one solution: the problem's text"] = None
    step: Annotated[tuple[str, ...], "one solution: its steps (--step A --step B, or --step A B)"] = ()
    input: Annotated[
        tuple[str, ...],
        "files, folders of shards, or - (standard input) with solutions: ProcessBench, PRMBench, "
        "Math-Shepherd, OpenR, TRL's stepwise rows, R-PRM's evaluation rows",
    ] = ()
    out: Annotated[str | None, "scores.jsonl to write; the table goes beside it"] = None
    k: Annotated[
        tuple[int, ...], "analyses per step; several: a row each, the first ones of the largest", (1, None)
    ] = (10,)
    threshold: Annotated[float, "a step with a lower reward is predicted wrong", (0, 1)] = 0.5
    all_steps: Annotated[bool, "judge the steps after the first one predicted wrong too"] = False
    direct: Annotated[bool, "read P(Yes) straight after the prompt, with no analysis (for a direct PRM)"] = (
        False
    )
    show: Annotated[bool, "print the analyses"] = False
    limit: Annotated[int | None, "only the first so many solutions of each file", (1, None)] = None
    force: Annotated[
        bool, "read P(Yes) after an added verification line where an analysis has no verdict"
    ] = True
    resume: Annotated[bool, "go on with a killed run (with --out)"] = False
    overwrite: Annotated[bool, "replace an existing output"] = False


def main(config: Config) -> None:
    ranks.join(config.device, config.rank_timeout)
    print_config(config)
    check_flags(config)
    solutions = Solutions(config.problem, config.step, config.input, config.limit)
    if len(solutions) == 1 and ranks.count() == 1:
        judge_solution(config, *solutions[0])
    else:
        judge_benchmark(config, solutions)


def check_flags(config: Config) -> None:
    one_is_given = bool(config.step)
    if one_is_given != (config.problem is not None) or one_is_given == bool(config.input):
        raise BadInput("give either --problem with its --step, or --input FILE")
    if config.resume and not config.out:
        raise BadInput("--resume goes on with a file of scores; name it with --out")
    if ranks.count() > 1 and not config.out:
        raise BadInput("several ranks need --out, where their scores are merged")


def judge_solution(config: Config, source: str, solution: Solution) -> None:
    """Judge one solution and print its steps. With --out its line is written too."""
    journal = nullcontext()
    lines = []
    if config.out:
        journal = Journal(config.out, config)
        checked = journal.check([item_of(source, solution)])
        lines = [check_line(line, config.k, where) for where, line in checked]  # what a killed run left
    sampler = load_sampler(config, max(config.k), config.force, direct=config.direct)
    start = time.perf_counter()
    with journal:
        if not lines:
            lines = list(
                score_lines(
                    sampler, [(source, solution)], config.k, config.threshold, config.all_steps, config.direct
                )
            )
            if config.out:
                journal.write(lines[0])
    print_solution(lines[0], config.threshold, config.show)
    print_too_long(too_long_steps(lines[0]))
    print_work(config, sampler, time.perf_counter() - start)


def judge_benchmark(config: Config, solutions: "Solutions") -> None:
    """Judge many solutions, write their lines, and print the table over them. Several ranks have a share
    each.
    """
    own = ranks.share(range(len(solutions)))
    size = round_size(config)
    counts = Counter()
    too_long = []
    journal = nullcontext()
    done = 0
    items = (item_of(*solutions[i]) for i in own)
    if config.out:
        journal = Journal(config.out, config, size or 1)
        for where, line in journal.check(items):  # what a killed run left
            tables.count_line(counts, check_line(line, config.k, where), config.k)
            too_long += too_long_steps(line)
        done = journal.done
    deque(items, maxlen=0)  # the rest of them: a bad solution is named before the work

    sampler = load_sampler(config, max(config.k), config.force, direct=config.direct)
    start = time.perf_counter()
    bar = tqdm(total=len(own), initial=done, desc="score", unit="solution", disable=ranks.rank() > 0)
    with journal, bar:
        for numbers in rounds(own, done, size):
            some = map(solutions.__getitem__, numbers)
            for line in score_lines(
                sampler, some, config.k, config.threshold, config.all_steps, config.direct
            ):
                tables.count_line(counts, line, config.k)
                too_long += too_long_steps(line)
                if config.out:
                    journal.write(line)
                f1 = tables.summary_row(counts, line["source"], max(config.k))["f1"] or 0
                speed = sampler.engine.new_tokens / (time.perf_counter() - start)
                bar.update()
                bar.set_postfix_str(f"F1 {f1:.1f}, {speed:.0f} tokens/s")
        rows = tables.summary(sum(ranks.gather(counts), Counter()), solutions.sources, config.k)
        # Before the scores are complete: a kill between the two would leave no table
        if config.out and ranks.rank() == 0:
            write_json(Path(config.out).with_suffix(".summary.json"), rows)
    tables.print_summary(rows)
    print_too_long([name for names in ranks.gather(too_long) for name in names])
    print_work(config, sampler, time.perf_counter() - start)


def print_work(config: Config, sampler: Sampler, seconds: float) -> None:
    """The last lines: what was computed, over all ranks."""
    [tokens] = ranks.total(sampler.engine.new_tokens)
    print(
        f"model: {config.model}; {seconds:.1f} s, {tokens:.0f} tokens sampled "
        f"({tokens / seconds:.0f} tokens/s)"
    )
    if config.server:
        print(sampler.engine.tally())


class Solutions:
    """The solutions of the input files, or that of the command line, read on demand. solutions[i] -> (source,
    Solution).
    """

    def __init__(
        self, problem: str | None, steps: tuple[str, ...], paths: tuple[str, ...], limit: int | None
    ):
        stems = [Path(path).stem for path in paths]
        self.sources = [stem if stems.count(stem) == 1 else path for stem, path in zip(stems, paths)]
        self.files = [read_solutions(path) for path in paths]
        if steps:
            given = {"id": "0", "problem": problem, "steps": list(steps)}
            self.sources = ["command line"]
            self.files = [[("command line", read_solution(given, "command line"))]]
        for path, found in zip(paths, self.files):
            if not len(found):
                raise BadInput(f"{path}: has no solutions; check the file")
        self.ends = list(accumulate(min(len(found), limit or len(found)) for found in self.files))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: int) -> tuple[str, Solution]:
        file = bisect(self.ends, i)
        before = self.ends[file - 1] if file else 0
        _, solution = self.files[file][i - before]
        return self.sources[file], solution


# ---------------------------------------------------------------------------------------------- judging

class Judged(NamedTuple):
    source: str
    solution: Solution
    steps: list[list[Analysis]]  # the analyses of each step that was judged


def judge_all(
    sampler: Sampler,
    solutions: Iterable[tuple[str, Solution]],
    ks: tuple[int, ...],
    threshold: float,
    all_steps: bool,
) -> Iterator[tuple[int, Judged]]:
    """(index of the solution, what was judged of it), as the solutions are completed. `solutions` is read as
    room is found.

    Many solutions are judged side by side. The steps of one come one after the other, since none is needed
    after the first predicted wrong; with all_steps they need not wait for each other. A step whose prompt is
    longer than the context has no analyses.
    """
    numbered = enumerate(solutions)
    waiting: deque[tuple[int, int]] = deque()  # (index of the solution, step) to ask for
    asked: dict[int, tuple[int, int]] = {}     # ticket -> (index of the solution, step)
    # Index -> source, solution, analyses by step
    open_ones: dict[int, tuple[str, Solution, dict[int, list[Analysis]]]] = {}
    sampler.restart()
    while True:
        answers: list[tuple[int, int, list[Analysis]]] = []  # (index of the solution, step, its analyses)
        while sampler.has_room:
            if not waiting and (new := next(numbered, None)):
                i, (source, solution) = new
                open_ones[i] = source, solution, {}
                first_ones = len(solution.steps) if all_steps else 1
                waiting.extend((i, t) for t in range(first_ones))
            if not waiting:
                break
            i, t = waiting.popleft()
            _, solution, _ = open_ones[i]
            try:
                ticket = sampler.add(case_of(solution, t))
                asked[ticket] = i, t
            except TooLong:
                answers.append((i, t, []))
        if not answers and not sampler.busy:
            return
        if sampler.busy:
            answers += [(*asked.pop(ticket), analyses) for ticket, analyses in sampler.step()]
        for i, t, analyses in answers:
            ranks.sign_of_life()  # a line may take its solution's many steps, or wait for those before it
            source, solution, by_step = open_ones[i]
            by_step[t] = analyses
            steps = [by_step[t] for t in sorted(by_step)]
            if is_complete(steps, len(solution.steps), ks, threshold, all_steps):
                yield i, Judged(source, solution, steps)
                del open_ones[i]
            elif not all_steps:
                waiting.appendleft((i, t + 1))  # before new solutions, so that few are open at a time


def judge_directly(
    sampler: Sampler,
    solutions: Iterable[tuple[str, Solution]],
    ks: tuple[int, ...],
    threshold: float,
    all_steps: bool,
) -> Iterator[tuple[int, Judged]]:
    """The same without analyses: all steps of a batch of solutions at a time."""
    numbered = enumerate(solutions)
    while batch := list(islice(numbered, sampler.sampling.batch_size)):
        cases = [case_of(solution, t) for _, (_, solution) in batch for t in range(len(solution.steps))]
        answers = iter(direct_answers(sampler, cases))
        for i, (source, solution) in batch:
            steps = []
            for analyses in islice(answers, len(solution.steps)):
                if not is_complete(steps, len(solution.steps), ks, threshold, all_steps):
                    steps.append(analyses)
            yield i, Judged(source, solution, steps)


def direct_answers(sampler: Sampler, cases: list[Case]) -> list[list[Analysis]]:
    """[its one analysis] for each case; [] where the prompt is longer than the context."""
    answers: list[list[Analysis]] = [[] for _ in cases]
    fitting = []  # indices of the cases that can be judged
    for i, case in enumerate(cases):
        with suppress(TooLong):
            sampler.prompt_ids(case)
            fitting.append(i)
    for i, analysis in zip(fitting, sampler.direct([cases[i] for i in fitting])):
        answers[i] = [analysis]
    return answers


def case_of(solution: Solution, t: int) -> Case:
    return Case(solution.problem, solution.steps[:t], solution.steps[t])


def is_complete(
    steps: list[list[Analysis]], n_steps: int, ks: tuple[int, ...], threshold: float, all_steps: bool
) -> bool:
    """Is there nothing more to judge: all steps are judged, or at every K one is predicted wrong?"""
    if len(steps) == n_steps:
        return True
    return not all_steps and all(predict(steps, k, threshold) >= 0 for k in ks)


def predict(steps: list[list[Analysis]], k: int, threshold: float) -> int:
    """The first step with a reward below the threshold, over its first k analyses; -1 if none is.

    A null reward predicts nothing.
    """
    for t, analyses in enumerate(steps):
        value = reward(analyses[:k])
        if value is not None and value < threshold:
            return t
    return -1


# -------------------------------------------------------------------------------------- lines of scores.jsonl

def score_lines(
    sampler: Sampler,
    solutions: Iterable[tuple[str, Solution]],
    ks: tuple[int, ...],
    threshold: float,
    all_steps: bool,
    direct: bool,
) -> Iterator[dict]:
    """Judge solutions -> their lines of scores.jsonl, in order."""
    judge = judge_directly if direct else judge_all
    for judged in in_order(judge(sampler, solutions, ks, threshold, all_steps)):
        yield score_line(judged, ks, threshold)


def item_of(source: str, solution: Solution) -> dict:
    """What a line of scores.jsonl says of its solution, before it is judged."""
    return {
        "source": source,
        "id": solution.id,
        "problem": solution.problem,
        "steps": list(solution.steps),
        "label": solution.label,
    }


def score_line(judged: Judged, ks: tuple[int, ...], threshold: float) -> dict:
    """The line of scores.jsonl: rewards and prediction at the largest K, predictions at each."""
    source, solution, steps = judged
    return item_of(source, solution) | {
        "rewards": [reward(analyses) for analyses in steps],
        "prediction": predict(steps, max(ks), threshold),
        "predictions": {str(k): predict(steps, k, threshold) for k in ks},
        "samples": [[asdict(analysis) for analysis in analyses] for analyses in steps],
    }


def check_line(line: dict, ks: tuple[int, ...], where: str) -> dict:
    """A line that a killed run left. Raises BadInput unless the tables can be made of it."""
    for analyses in get_field(line, "samples", list, where):
        read_analyses({"analyses": analyses}, where)
    predictions = get_field(line, "predictions", dict, where)
    if not line["samples"] or set(predictions) != {str(k) for k in ks} or "rewards" not in line:
        raise BadInput(f"{where}: not a line of these scores; give --overwrite to start anew")
    return line


def too_long_steps(line: dict) -> list[str]:
    """The names of the steps that were not judged, since their prompts are longer than the context."""
    return [
        f"{line['source']} {line['id']} step {t}"
        for t, analyses in enumerate(line["samples"], 1)
        if not analyses
    ]


def print_solution(line: dict, threshold: float, show: bool) -> None:
    """A text line for each judged step, the prediction, and with `show` the analyses."""
    print(f"\nproblem: {line['problem']}")
    for t, (raw, value) in enumerate(zip(line["samples"], line["rewards"])):
        analyses = read_analyses({"analyses": raw}, f"step {t + 1}")
        yes, no, missing = (sum(a.verdict is verdict for a in analyses) for verdict in (True, False, None))
        shown = "null " if value is None else f"{value:.3f}"
        predicted = "wrong" if value is not None and value < threshold else "right"
        print(
            f"Step {t + 1}: reward {shown}  {predicted}  verdicts {yes} Yes, {no} No, {missing} missing  "
            f"| {line['steps'][t]}"
        )
        if show:
            print_analyses(analyses)
    judged = len(line["samples"])
    if judged < len(line["steps"]):
        print(f"(steps {judged + 1} to {len(line['steps'])} not judged: --all-steps goes on)")
    print(
        "first step predicted wrong: "
        + (f"step {line['prediction'] + 1}" if line["prediction"] >= 0 else "none")
    )


def print_analyses(analyses: list[Analysis]) -> None:
    for number, analysis in enumerate(analyses, 1):
        cut_off = "" if analysis.finished else ", cut off"
        print(f"  --- analysis {number}: verdict {show_verdict(analysis)}, {show_p_yes(analysis)}, "
              f"{analysis.n_tokens} tokens{cut_off}")
        print("    " + analysis.text.replace("\n", "\n    "))


if __name__ == "__main__":
    run((Config, main))
