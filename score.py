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
from itertools import chain, islice
from pathlib import Path

import fast
from checkpoint.flags import ServedConfig
from data import load_sampler
from formats import best_of_n
from formats.commands import BestConfig, ReportConfig, ThresholdConfig, best, report, threshold
from formats.inputs import Inputs
from formats.judging import JudgeConfig, check_flags, item_to_judge
from formats.readers import Solution, read_solution
from formats.samples import print_too_long
from formats.score_lines import check_line, item_of, predict, score_line, too_long_steps
from formats.solution_text import print_solution
from formats.tables import Tally, print_rows
from plumbing import ranks
from plumbing.cli import print_config, run
from plumbing.files import write_json
from plumbing.journal import Journal, NoJournal
from plumbing.progress import Progress
from plumbing.rounds import in_order, round_size, rounds
from rprm import Analysis, Case, Sampler, reward

# ---------------------------------------------------------------------------------------------- judge

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


def judge_solution(config: JudgeConfig, source: str, solution: Solution) -> None:
    """Judge one solution and print its steps. With --out its line is written too."""
    journal = Journal(config.out, config, 1) if config.out else NoJournal()
    checked = journal.check([item_of(source, solution)])
    lines = [check_line(line, config.k, where) for where, line in checked]  # what a killed run left
    sampler = load_sampler(config, max(config.k), config.force, direct=config.direct)
    start = time.perf_counter()
    with journal:
        if not lines:
            lines = list(in_order(judge_all(sampler, [(source, solution)], config)))
            journal.write(lines[0])
    print_solution(lines[0], config.threshold, config.show)
    print_too_long(too_long_steps(lines[0]))
    print_work(config, sampler, time.perf_counter() - start)


def judge_benchmark(config: JudgeConfig, inputs: Inputs) -> None:
    """Judge many solutions, write their lines, and print the tables. Several ranks have a share each."""
    own = ranks.share(range(len(inputs)))
    size = round_size(config.batch_size, config.device, config.server is not None)
    tally = Tally(config.k, config.thresholds)
    journal = Journal(config.out, config, len(own), size or 1) if config.out else NoJournal()
    items = (item_to_judge(*inputs[i], config.best) for i in own)
    for where, line in journal.check(items):  # what a killed run left
        tally.add(check_line(line, config.k, where))

    sampler = load_sampler(config, max(config.k), config.force, direct=config.direct)
    with journal, Progress("score", "solution", len(own), journal.done, sampler.engine) as progress:
        for numbers in rounds(own, journal.done, size):
            found = judge_all(sampler, map(inputs.__getitem__, numbers), config)
            for line in in_order(found):
                journal.write(line)
                tally.add(line)
                progress.step(tally.so_far(line, max(config.k)))
        tally = Tally.sum(ranks.gather(tally))
        rows = tally.rows(inputs.sources)
        # The table goes first, then the journal names the scores: a kill in between loses neither.
        if config.out and ranks.rank() == 0:
            write_json(Path(config.out).with_suffix(".summary.json"), rows)
    print_rows(rows)
    print_too_long(tally.too_long)
    tally.print_left()
    print_work(config, sampler, progress.seconds)


def print_work(config: JudgeConfig, sampler: Sampler, seconds: float) -> None:
    """The last lines: what was computed, over all ranks."""
    [n] = ranks.total(sampler.engine.new_tokens)
    print(f"model: {config.model}; {seconds:.1f} s, {n:.0f} tokens sampled ({n / seconds:.0f} tokens/s)")
    if config.server:
        print(sampler.engine.tally())


# --------------------------------------------------------------------------------------------- judging steps

@dataclass
class OpenSolution:
    """A solution that is being judged, and the analyses of its steps that have come."""
    index: int  # among the solutions that are judged together
    source: str
    solution: Solution
    config: JudgeConfig
    analyses: dict[int, list[Analysis]] = field(default_factory=dict)  # of each step

    @property
    def all_steps(self) -> bool:
        """Is every step wanted, and not as many as each K needs to predict its first wrong step?"""
        return self.config.all_steps or self.config.best or self.solution.needs_all_steps

    @property
    def at_once(self) -> bool:
        """Are all steps asked for at once? Not if it may be left before its end, unless answers are cheap."""
        return self.config.direct or (self.all_steps and not self.config.best)

    @property
    def judged(self) -> list[list[Analysis]]:
        """The analyses of the steps that have come, in order."""
        return [self.analyses[t] for t in sorted(self.analyses)]

    def n_wanted(self) -> int:
        """The steps that its line holds, as far as is known by now."""
        predictions = [predict(self.judged, k, self.config.threshold) for k in self.config.k]
        if self.all_steps or min(predictions) == -1:
            return len(self.solution.steps)
        return max(predictions) + 1

    def is_complete(self) -> bool:
        wanted = len(self.solution.steps) if self.at_once else self.n_wanted()
        return len(self.analyses) == wanted

    def line(self) -> dict:
        judged = self.judged[:self.n_wanted()]
        return score_line(self.source, self.solution, judged, self.config.k, self.config.threshold)


def judge_all(sampler: Sampler, solutions: Iterable[tuple[str, Solution]],
              config: JudgeConfig) -> Iterator[tuple[int, dict]]:
    """(index of the solution, its line of scores.jsonl), as the solutions are completed. `solutions` is read
    as room is found.

    Many solutions are judged side by side. The steps of one come one after the other if it may be left after
    any of them. A step whose prompt is longer than the context has no analyses.
    """
    coming = enumerate(solutions)
    waiting: deque[tuple[OpenSolution, int]] = deque()  # steps to ask for
    asked: dict[int, tuple[OpenSolution, int]] = {}  # by request id
    race = best_of_n.Race(config.aggregate if config.best else None)
    sampler.restart()
    while True:
        while sampler.has_room:
            if not waiting and (new := next(coming, None)):
                i, (source, solution) = new
                one = OpenSolution(i, source, solution, config)
                first_steps = len(solution.steps) if one.at_once else 1
                waiting.extend((one, t) for t in range(first_steps))
            if not waiting:
                break
            one, t = waiting.popleft()
            steps = one.solution.steps
            case = Case(one.solution.problem, steps[:t], steps[t])
            asked[sampler.add(case)] = one, t
        if not sampler.busy:
            return
        for request_id, analyses in sampler.step():
            ranks.sign_of_life()  # for the ranks that wait: no line may be written for long
            one, t = asked.pop(request_id)
            one.analyses[t] = analyses
            if one.is_complete():
                race.finish(one.index, one.solution, one.judged)
                yield one.index, one.line()
            elif race.is_lost(one.index, one.solution, one.judged):
                yield one.index, one.line() | {"left": config.aggregate}
            elif not one.at_once:
                waiting.appendleft((one, t + 1))  # before new solutions, so that few are open at a time


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
        where = {"model": name, "server": model} if "://" in model else {"model": model}
        self.sampler = load_sampler(ServedConfig(**where, **flags), k, force)

    def rewards(self, problem: str, steps: Sequence[str]) -> list[float | None]:
        """The reward of each step of a solution."""
        return self.rewards_of([(problem, steps)])[0]

    def rewards_of(self, solutions: Iterable[tuple[str, Sequence[str]]]) -> list[list[float | None]]:
        """The rewards of each (problem, steps), all judged side by side."""
        cases = []
        for problem, steps in solutions:
            cases.append([Case(problem, tuple(steps[:t]), step) for t, step in enumerate(steps)])
        rewards = iter(self.judge(chain.from_iterable(cases)))
        return [list(islice(rewards, len(own))) for own in cases]

    def judge(self, cases: Iterable[Case]) -> list[float | None]:
        """The reward of each case. The same case is judged once."""
        cases = list(cases)
        different = list(dict.fromkeys(cases))
        found = in_order(self.sampler.analyses(different))
        rewards = {case: reward(analyses) for case, analyses in zip(different, found, strict=True)}
        return [rewards[case] for case in cases]


if __name__ == "__main__":
    run((JudgeConfig, judge), (ThresholdConfig, threshold), (BestConfig, best), (ReportConfig, report),
        default="judge")
