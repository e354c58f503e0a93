"""Rewards of a solution or of a benchmark, and what is done with them.

    python score.py --problem "Tom has 3 apples and buys 4. How many?" --step "He has 3 + 4 = 8 apples."
    python score.py --model FOLDER --input gsm8k.json math.json --k 1 4 10 --out scores.jsonl
    python score.py threshold --scores validation.scores.jsonl --apply scores.jsonl
    python score.py best      --scores candidates.scores.jsonl --out best.jsonl
    python score.py report    --scores scores.jsonl --out report.html

Judging, the command without a name (or `judge`), gives one file of scores. The other commands make of it what
is wanted and need no model.

A step is predicted wrong when its reward is below the threshold; the prediction is the first such step, -1 if
there is none. A solution is judged no further than its first step predicted wrong, which gives the same
prediction (--all-steps goes on).
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from tqdm import tqdm

import fast
from checkpoint.flags import ServedConfig
from data import load_sampler
from formats import best_of_n
from formats.commands import BestConfig, ReportConfig, ThresholdConfig, best, report, threshold
from formats.inputs import Inputs
from formats.readers import Solution, read_solution
from formats.samples import print_too_long
from formats.score_lines import check_line, item_of, predict, score_line, too_long_steps
from formats.solution_text import print_solution
from formats.split import SPLITS
from formats.tables import Tally, print_rows
from plumbing import ranks
from plumbing.cli import print_config, run
from plumbing.errors import BadInput
from plumbing.files import write_json
from plumbing.journal import Journal, NoJournal
from plumbing.rounds import in_order, round_size, rounds
from rprm import DEFAULT_MODEL, Analysis, Case, Sampler, reward

# ---------------------------------------------------------------------------------------------- judge


@dataclass(frozen=True, kw_only=True)
class JudgeConfig(ServedConfig):
    model: Annotated[str, "checkpoint: a Hugging Face folder; with --server: the model's name there"] = str(
        DEFAULT_MODEL)
    problem: Annotated[str | None, "one solution: the problem's text"] = None
    step: Annotated[tuple[str, ...], "one solution: its steps (--step A --step B, or --step A B)"] = ()
    input: Annotated[tuple[str, ...],
                     "files, folders of shards, or - (standard input) with solutions: ProcessBench, "
                     "PRMBench, Math-Shepherd, OpenR, TRL's stepwise rows, R-PRM's evaluation rows, raw "
                     "text, several candidates for a problem (docs/formats.md)"] = ()
    split: Annotated[str, "raw text has a step between blank lines, or for each number, line or sentence",
                     SPLITS] = "blank"
    out: Annotated[str | None, "scores.jsonl to write; the table goes beside it"] = None
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


def judge(config: JudgeConfig) -> None:
    """solutions -> scores.jsonl: a reward for each step, and the benchmarks' tables (the default command)."""
    ranks.join(config.device, config.rank_timeout)
    check_flags(config)
    if config.direct:
        config = replace(config, k=(1,))
    print_config(config)
    if not config.plain:
        fast.keep_freed_memory()
    if config.step:
        given = {"id": "0", "problem": config.problem, "steps": list(config.step)}
        judge_solution(config, "command line", read_solution(given, "command line"))
        return
    inputs = Inputs(config.input, config.limit, config.split)
    inputs.print_split()
    if len(inputs) == 1 and ranks.count() == 1:
        judge_solution(config, *inputs[0])
    else:
        judge_benchmark(config, inputs)


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


def judge_solution(config: JudgeConfig, source: str, solution: Solution) -> None:
    """Judge one solution and print its steps. With --out its line is written too."""
    journal = Journal(config.out, config) if config.out else NoJournal()
    checked = journal.check([item_of(source, solution)])
    lines = [check_line(line, config.k, where) for where, line in checked]  # what a killed run left
    sampler = load_sampler(config, max(config.k), config.force, direct=config.direct)
    start = time.perf_counter()
    with journal:
        if not lines:
            lines = list(in_order(judge_all(sampler, [(source, solution)], extent_of(config))))
            journal.write(lines[0])
    print_solution(lines[0], config.threshold, config.show)
    print_too_long(too_long_steps(lines[0]))
    print_work(config, sampler, time.perf_counter() - start)


def judge_benchmark(config: JudgeConfig, inputs: Inputs) -> None:
    """Judge many solutions, write their lines, and print the tables. Several ranks have a share each."""
    own = ranks.share(range(len(inputs)))
    size = round_size(config.batch_size, config.device, config.server is not None)
    tally = Tally(config.k, config.thresholds)
    journal = Journal(config.out, config, size or 1) if config.out else NoJournal()
    items = (item_to_judge(*inputs[i], config.best) for i in own)
    for where, line in journal.check(items):  # what a killed run left
        tally.add(check_line(line, config.k, where))

    sampler = load_sampler(config, max(config.k), config.force, direct=config.direct)
    start = time.perf_counter()
    bar = tqdm(total=len(own), initial=journal.done, desc="score", unit="solution", disable=ranks.rank() > 0)
    with journal, bar:
        for numbers in rounds(own, journal.done, size):
            found = judge_all(sampler, map(inputs.__getitem__, numbers), extent_of(config))
            for line in in_order(found):
                tally.add(line)
                journal.write(line)
                figure = tally.so_far(line, max(config.k))
                speed = sampler.engine.new_tokens / (time.perf_counter() - start)
                bar.update()
                bar.set_postfix_str(f"{figure}, {speed:.0f} tokens/s")
        tally = Tally.sum(ranks.gather(tally))
        rows = tally.rows(inputs.sources)
        # Before the scores are complete: a kill between the two would leave no table.
        if config.out and ranks.rank() == 0:
            write_json(Path(config.out).with_suffix(".summary.json"), rows)
    print_rows(rows)
    print_too_long(tally.too_long)
    tally.print_left()
    print_work(config, sampler, time.perf_counter() - start)


def item_to_judge(source: str, solution: Solution, best: bool) -> dict:
    if best and solution.label is not None:
        raise BadInput(
            f"{source} {solution.id}: has a label, and --best may leave a solution before the step that it "
            "names; leave --best out"
        )
    return item_of(source, solution)


def print_work(config: JudgeConfig, sampler: Sampler, seconds: float) -> None:
    """The last lines: what was computed, over all ranks."""
    [tokens] = ranks.total(sampler.engine.new_tokens)
    rate = tokens / seconds
    print(f"model: {config.model}; {seconds:.1f} s, {tokens:.0f} tokens sampled ({rate:.0f} tokens/s)")
    if config.server:
        print(sampler.engine.tally())


# --------------------------------------------------------------------------------------------- judging steps


@dataclass(frozen=True)
class Extent:
    """How far solutions are judged.

    all_steps: to the last step; else up to the first that is predicted wrong at every K
    at_once:   all steps are asked for at once, since answers are cheap, even if not all are wanted
    leave_by:  a candidate is left when it can no longer be the best of its problem by this aggregate; None:
               none is left
    """

    ks: tuple[int, ...]
    threshold: float
    all_steps: bool
    at_once: bool
    leave_by: str | None


def extent_of(config: JudgeConfig) -> Extent:
    leave_by = config.aggregate if config.best else None
    return Extent(config.k, config.threshold, config.all_steps or config.best, config.direct, leave_by)


@dataclass
class Judging:
    """A solution that is being judged, and the analyses of its steps that have come."""

    source: str
    solution: Solution
    extent: Extent
    analyses: dict[int, list[Analysis]] = field(default_factory=dict)  # of each step

    @property
    def all_steps(self) -> bool:
        return self.extent.all_steps or self.solution.needs_all_steps

    @property
    def at_once(self) -> bool:
        """Do the steps not wait for each other?"""
        return self.extent.at_once or (self.all_steps and self.extent.leave_by is None)

    @property
    def steps(self) -> list[list[Analysis]]:
        return [self.analyses[t] for t in sorted(self.analyses)]

    def n_wanted(self) -> int:
        """How many steps are wanted: all, or those up to the first that is predicted wrong at every K."""
        predictions = [predict(self.steps, k, self.extent.threshold) for k in self.extent.ks]
        if self.all_steps or min(predictions) == -1:
            return len(self.solution.steps)
        return max(predictions) + 1

    def is_complete(self) -> bool:
        if self.at_once:
            return len(self.analyses) == len(self.solution.steps)
        return len(self.analyses) == self.n_wanted()

    def line(self) -> dict:
        steps = self.steps[:self.n_wanted()]
        return score_line(self.source, self.solution, steps, self.extent.ks, self.extent.threshold)


def judge_all(
    sampler: Sampler, solutions: Iterable[tuple[str, Solution]], extent: Extent
) -> Iterator[tuple[int, dict]]:
    """(index of the solution, its line of scores.jsonl), as the solutions are completed. `solutions` is read
    as room is found.

    Many solutions are judged side by side. The steps of one come one after the other if it may be left after
    any of them. A step whose prompt is longer than the context has no analyses.
    """
    coming = enumerate(solutions)
    judgings: dict[int, Judging] = {}  # by index of the solution
    waiting: deque[tuple[int, int]] = deque()  # (index of the solution, step) to ask for
    asked: dict[int, tuple[int, int]] = {}  # request id -> (index of the solution, step)
    race = best_of_n.Race(extent.leave_by)
    sampler.restart()
    while True:
        while sampler.has_room:
            if not waiting and (new := next(coming, None)):
                i, (source, solution) = new
                judgings[i] = Judging(source, solution, extent)
                first_steps = len(solution.steps) if judgings[i].at_once else 1
                waiting.extend((i, t) for t in range(first_steps))
            if not waiting:
                break
            i, t = waiting.popleft()
            request_id = sampler.add(case_of_step(judgings[i].solution, t))
            asked[request_id] = i, t
        if not sampler.busy:
            return
        for request_id, analyses in sampler.step():
            ranks.sign_of_life()  # a line may take its solution's many steps, or wait for those before it
            i, t = asked.pop(request_id)
            one = judgings[i]
            one.analyses[t] = analyses
            if one.is_complete():
                race.finish(i, one.solution, one.steps)
                yield i, one.line()
                del judgings[i]
            elif race.is_lost(i, one.solution, one.steps):
                yield i, one.line() | {"left": extent.leave_by}
                del judgings[i]
            elif not one.at_once:
                waiting.appendleft((i, t + 1))  # before new solutions, so that few are open at a time


def case_of_step(solution: Solution, t: int) -> Case:
    return Case(solution.problem, solution.steps[:t], solution.steps[t])


# -------------------------------------------------------------------------------------- from other programs


class Judge:
    """The rewards of solutions' steps, for other programs. PYTHONPATH names this file's folder.

        from score import Judge
        judge = Judge("runs/dpo/model", k=10)
        judge.rewards("1 + 1 + 1?", ["1 + 1 = 2.", "2 + 1 = 4."])          # [0.97, 0.02]
        judge.rewards_of([(problem, steps), (problem, other_steps)])       # many: [[...], [...]]
        judge.judge([Case(problem, tuple(steps[:-1]), steps[-1])])         # the last step alone: [0.02]

    The same call gives the same rewards, whatever was judged before it, up to rounding. A reward is None
    where no analysis has a P(Yes), as where the prompt is longer than the model's context.
    """

    def __init__(self, model: str, k: int = 10, name: str = "", force: bool = True, **flags):
        """model: a checkpoint's folder, or a server's URL. flags: other fields of ServedConfig, as seed=1.

        With a URL `name` is the model's there, and tokenizer="FOLDER" is needed. Raises BadInput.
        """
        if "://" in model:
            config = ServedConfig(model=name, server=model, **flags)
        else:
            config = ServedConfig(model=model, **flags)
        self.sampler = load_sampler(config, k, force)

    def rewards(self, problem: str, steps: Sequence[str]) -> list[float | None]:
        """The reward of each step of a solution."""
        return self.rewards_of([(problem, steps)])[0]

    def rewards_of(self, solutions: Iterable[tuple[str, Sequence[str]]]) -> list[list[float | None]]:
        """The rewards of each (problem, steps), all judged side by side."""
        cases = []
        ends = []  # ends[i]: where the cases of solution i end
        for problem, steps in solutions:
            cases += [Case(problem, tuple(steps[:t]), step) for t, step in enumerate(steps)]
            ends.append(len(cases))
        rewards = self.judge(cases)
        return [rewards[start:end] for start, end in zip([0, *ends], ends)]

    def judge(self, cases: Iterable[Case]) -> list[float | None]:
        """The reward of each case. The same case is judged once."""
        cases = list(cases)
        different = list(dict.fromkeys(cases))
        found = in_order(self.sampler.analyses(different))
        rewards = {case: reward(analyses) for case, analyses in zip(different, found, strict=True)}
        return [rewards[case] for case in cases]


if __name__ == "__main__":
    run(
        (JudgeConfig, judge),
        (ThresholdConfig, threshold),
        (BestConfig, best),
        (ReportConfig, report),
        default="judge",
    )
