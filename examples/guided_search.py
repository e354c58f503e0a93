"""Search guided by rewards: the policy proposes N next steps, the judge rewards each, and the best one goes on.

    python examples/guided_search.py --policy FOLDER --judge runs/dpo/model --problems problems.jsonl --out solutions.jsonl

problems.jsonl has lines {"problem"}; where they have an "answer" too, the share of solved ones is printed. The
defaults are the paper's: 8 candidates for a step, 10 analyses of each, the highest mean P(Yes) goes on, 30 steps at
most. With --beams B the B best partial solutions go on, each with its own candidates. --policy and --judge are
checkpoint folders, or the URLs of servers (then with the model's name there and a folder with its tokenizer).

    Policy   what may follow a partial solution: sampled up to the separator of steps, or to the end of the answer
    Judge    the rewards of steps (score.py)
    search   the loop over both
"""
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's scripts, which are no package
from tqdm import tqdm

import fast
from checkpoint import DTYPES, load_model, load_tokenizer
from formats.answers import find_answer, same_answer, true_answer
from generate import Continuation, Request
from plumbing.cli import INPUT, print_config, run
from plumbing.errors import BadInput
from plumbing.files import get_field, json_line, read_jsonl, refuse_existing, writing
from plumbing.queues import answers_of
from rprm import Case, analysis_seed
from score import Judge

PROMPT = ("Solve the problem step by step. Leave an empty line between two steps, "
          "and put the answer into \\boxed{}.\n\n{problem}")


@dataclass(frozen=True, kw_only=True)
class Config:
    policy: Annotated[str, "checkpoint folder, or a server's URL"]
    judge: Annotated[str, "checkpoint folder, or a server's URL"]
    problems: Annotated[str, "lines {\"problem\"}, perhaps with \"id\" and \"answer\"", INPUT]
    out: Annotated[str, "solutions.jsonl to write"]
    n: Annotated[int, "candidates for the next step of a partial solution", (1, None)] = 8
    k: Annotated[int, "analyses of each candidate", (1, None)] = 10
    beams: Annotated[int, "partial solutions of a problem that go on", (1, None)] = 1
    max_steps: Annotated[int, "steps of a solution at most", (1, None)] = 30
    max_step_tokens: Annotated[int, "tokens of a step at most", (1, None)] = 512
    max_new_tokens: Annotated[int, "tokens of an analysis at most", (1, None)] = 4096
    temperature: Annotated[float, "of the policy's steps", (0, None)] = 0.95
    top_p: Annotated[float, "nucleus of the policy's steps", (0.01, 1)] = 0.95
    separator: Annotated[str, "what stands between two steps; \\n is a line break"] = "\\n\\n"
    policy_prompt: Annotated[str, "file with {problem}, the words that ask the policy (default: step by step, \\boxed)"] = ""
    policy_name: Annotated[str, "with a URL: the model's name there"] = ""
    policy_tokenizer: Annotated[str, "with a URL: a folder with its tokenizer"] = ""
    judge_name: Annotated[str, "with a URL: the model's name there"] = ""
    judge_tokenizer: Annotated[str, "with a URL: a folder with its tokenizer"] = ""
    side_by_side: Annotated[int, "problems searched side by side", (1, None)] = 64
    limit: Annotated[int | None, "only the first so many problems", (1, None)] = None
    seed: Annotated[int, "seed of steps and analyses"] = 0
    dtype: Annotated[str, "of the weights", tuple(DTYPES)] = "float32"
    device: Annotated[str, "where to run"] = "cpu"
    overwrite: Annotated[bool, "replace an existing output"] = False


# ---------------------------------------------------------------------------------------------- the policy

class Step(NamedTuple):
    ids: list[int]  # its tokens, those of the separator among them
    text: str       # without the separator
    is_last: bool   # the policy ended its answer here


class Policy:
    """Next steps from a checkpoint folder.

    The engine ends a continuation at every token whose text holds the separator, as at the end of the answer. A
    separator that is made of two tokens shows in the text: the step is cut there.
    """

    def __init__(self, folder: str, separator: str, temperature: float, top_p: float, max_step_tokens: int,
                 max_rows: int = 160, dtype: str = "float32", device: str = "cpu"):
        model = load_model(folder, DTYPES[dtype], device)
        self.tokenizer = load_tokenizer(folder)
        self.separator = separator
        separators = [i for i in range(self.tokenizer.vocab_size) if separator in self.tokenizer.decode([i])]
        self.engine = fast.for_sampling(model)(
            model,
            [*self.tokenizer.eos_ids, *separators],
            (0, 1),  # P(Yes) is not asked for
            temperature,
            top_p,
            max_step_tokens,
            max_rows,
        )

    @property
    def new_tokens(self) -> int:
        return self.engine.new_tokens

    def has_room(self, ids: list[int]) -> bool:
        """May anything follow these tokens within the model's context?"""
        return len(ids) < self.engine.max_positions

    def propose(self, prefixes: Sequence[list[int]], seeds: Sequence[list[int]]) -> list[list[Step]]:
        """What may follow each prefix (token ids): a step for each of its seeds."""
        requests = [Request(ids, list(own)) for ids, own in zip(prefixes, seeds, strict=True)]
        steps: list[list[Step]] = [[] for _ in requests]
        for i, continuations in answers_of(self.engine, requests):
            steps[i] = [self.step_of(continuation) for continuation in continuations]
        return steps

    def step_of(self, continuation: Continuation) -> Step:
        ids = continuation.ids
        is_last = continuation.end in self.tokenizer.eos_ids
        if continuation.end is not None and not is_last:
            ids = [*ids, continuation.end]
        text = self.tokenizer.decode(ids)
        if self.separator not in text.lstrip():
            return Step(ids, text.strip(), is_last)
        for n in range(1, len(ids) + 1):
            text = self.tokenizer.decode(ids[:n])
            if self.separator in text.lstrip():
                break
        return Step(ids[:n], text.lstrip().split(self.separator)[0].strip(), False)


class ServedPolicy:
    """Next steps from a server that tells what ended a text: vLLM (stop_reason) or SGLang (matched_stop)."""

    def __init__(self, url: str, name: str, tokenizer: str, separator: str, temperature: float, top_p: float,
                 max_step_tokens: int, concurrency: int = 16):
        from server import Server, takes_seeds  # here, as nothing else needs it
        self.server = Server(url, key=None, timeout=600.0, retries=6, concurrency=concurrency)
        self.name = name
        self.tokenizer = load_tokenizer(tokenizer)
        self.separator = separator
        self.sampling = {"temperature": temperature, "top_p": top_p, "max_tokens": max_step_tokens}
        self.seeded = takes_seeds(self.server)
        self.new_tokens = 0

    def has_room(self, ids: list[int]) -> bool:
        return True  # the server refuses what is too long

    def propose(self, prefixes: Sequence[list[int]], seeds: Sequence[list[int]]) -> list[list[Step]]:
        """What may follow each prefix (token ids): a step for each of its seeds, with a request for each."""
        from server import side_by_side
        requests = [
            partial(self._step, ids, seed) for ids, own in zip(prefixes, seeds, strict=True) for seed in own
        ]
        steps = iter(side_by_side(requests, self.server.concurrency))
        return [list(islice(steps, len(own))) for own in seeds]

    def _step(self, ids: list[int], seed: int) -> Step:
        body = self.sampling | {"model": self.name, "prompt": ids, "n": 1, "stop": [self.separator]}
        if self.seeded:
            body["seed"] = seed % 2 ** 31
        text, is_last, tokens = self.server.ask("/v1/completions", body, self._read)
        self.new_tokens += tokens
        between = "" if is_last else self.separator
        return Step(self.tokenizer.continuation(ids, text + between), text.strip(), is_last)

    def _read(self, answer: Any) -> tuple[str, bool, int]:
        """A step's text, whether it is the last one, and its number of tokens."""
        choice = answer["choices"][0]
        if choice["finish_reason"] == "stop" and not {"stop_reason", "matched_stop"} & choice.keys():
            raise BadInput(f"{self.server.url}: does not tell whether a step or the answer has ended "
                           "(stop_reason or matched_stop); serve the policy with vLLM or SGLang")
        ended_by = choice.get("stop_reason", choice.get("matched_stop"))
        is_last = choice["finish_reason"] == "stop" and ended_by != self.separator
        return choice["text"], is_last, answer["usage"]["completion_tokens"]


# ---------------------------------------------------------------------------------------------- the search

class Partial(NamedTuple):
    """A partial solution: the token ids of prompt and steps, and what the judge is shown of them."""
    ids: list[int]
    steps: tuple[str, ...] = ()
    rewards: tuple[float | None, ...] = ()
    is_complete: bool = False


AsStep = Callable[[str, tuple[str, ...], str], str]  # (problem, previous steps, the policy's text) -> the step


def as_it_is(problem: str, previous_steps: tuple[str, ...], text: str) -> str:
    return text


def search(policy: Policy | ServedPolicy, judge: Judge, problems: Sequence[str], prompt: str, n: int, beams: int = 1,
           max_steps: int = 30, seed: int = 0, as_step: AsStep = as_it_is) -> list[Partial]:
    """The best solution of each problem, all of them searched side by side.

    prompt: asks the policy, with {problem}
    as_step: how the judge is shown a step, if it knows another form than the policy writes
    """
    # the partial solutions of each problem that are kept, the best one first
    kept = [[Partial(policy.tokenizer.chat(prompt.replace("{problem}", problem)))] for problem in problems]
    for _ in range(max_steps):
        growing = [(i, one) for i, beam in enumerate(kept) for one in beam if may_grow(policy, beam, one)]
        if not growing:
            break
        prefixes = [one.ids for _, one in growing]
        seeds = [seeds_of(seed, problems[i], one, n) for i, one in growing]
        longer: dict[int, list[Partial]] = {}  # index of the problem -> its longer solutions
        for (i, one), steps in zip(growing, policy.propose(prefixes, seeds), strict=True):
            longer.setdefault(i, []).extend(extended(one, steps, partial(as_step, problems[i])))
        rewards = rewards_of(judge, problems, longer)
        for i, solutions in longer.items():
            complete = [one for one in kept[i] if one.is_complete]
            rewarded = [with_reward(one, rewards[i, one.steps]) for one in solutions]
            kept[i] = best(complete + rewarded, beams) or kept[i]
    return [beam[0] for beam in kept]


def may_grow(policy: Policy | ServedPolicy, beam: list[Partial], one: Partial) -> bool:
    """A problem is solved when its best solution is complete."""
    return not beam[0].is_complete and not one.is_complete and policy.has_room(one.ids)


def seeds_of(seed: int, problem: str, one: Partial, n: int) -> list[int]:
    return [analysis_seed(seed, Case(problem, one.steps, ""), number) for number in range(n)]


def extended(one: Partial, steps: list[Step], as_step: Callable[[tuple[str, ...], str], str]) -> list[Partial]:
    """A partial solution with each of the steps behind it. An empty step ends the answer, or is left out."""
    found = []
    for step in steps:
        ids = one.ids + step.ids
        if step.text:
            found.append(Partial(ids, (*one.steps, as_step(one.steps, step.text)), one.rewards, step.is_last))
        elif step.is_last and one.steps:
            found.append(Partial(ids, one.steps, one.rewards[:-1], True))
    return found


def rewards_of(judge: Judge, problems: Sequence[str], longer: dict[int, list[Partial]]) -> dict[tuple, float | None]:
    """(index of the problem, steps) -> the reward of the last step. The same steps are judged once."""
    keys = list(dict.fromkeys((i, one.steps) for i, solutions in longer.items() for one in solutions))
    cases = [Case(problems[i], steps[:-1], steps[-1]) for i, steps in keys]
    return dict(zip(keys, judge.judge(cases), strict=True))


def with_reward(one: Partial, reward: float | None) -> Partial:
    return one._replace(rewards=(*one.rewards, reward))


def best(solutions: list[Partial], beams: int) -> list[Partial]:
    """The solutions whose last steps have the highest rewards, of equals the first; a null reward is the lowest."""
    return sorted(solutions, key=lambda one: -1 if one.rewards[-1] is None else one.rewards[-1], reverse=True)[:beams]


# ---------------------------------------------------------------------------------------------- the script

def main(config: Config) -> None:
    print_config(config)
    refuse_existing(config.out, config.overwrite)
    rows = list(islice(read_problems(config.problems), config.limit))
    if not rows:
        raise BadInput(f"{config.problems}: has no problems; check the file")
    prompt = Path(config.policy_prompt).read_text(encoding="utf-8") if config.policy_prompt else PROMPT
    if "{problem}" not in prompt:
        raise BadInput(f"{config.policy_prompt}: has no {{problem}}; write it where the problem belongs")
    policy = load_policy(config)
    judge = load_judge(config)
    solved = []
    bar = tqdm(total=len(rows), desc="search", unit="problem")
    with writing(config.out) as file, bar:
        for first in range(0, len(rows), config.side_by_side):
            some = rows[first:first + config.side_by_side]
            problems = [row["problem"] for row in some]
            found = search(policy, judge, problems, prompt, config.n, config.beams, config.max_steps, config.seed)
            for row, one in zip(some, found, strict=True):
                line = row | {"steps": one.steps, "rewards": one.rewards, "finished": one.is_complete}
                line["final_answer"] = find_answer("\n".join(one.steps))
                if "answer" in row:
                    line["correct"] = line["final_answer"] is not None and same_answer(line["final_answer"], row["answer"])
                    solved.append(line["correct"])
                file.write(json_line(line))
            bar.update(len(some))
            if solved:
                bar.set_postfix_str(f"solved {sum(solved) / len(solved):.0%}")
    print(f"{len(rows)} problems, {policy.new_tokens:,} tokens by the policy, {judge.sampler.engine.new_tokens:,} by the judge")
    if solved:
        print(f"solved: {sum(solved)} of {len(solved)}")


def read_problems(path: str) -> Iterator[dict]:
    """{"problem"} and, if the line has them, "id" and "answer"."""
    for where, row in read_jsonl(path):
        found = {"problem": get_field(row, "problem", str, where)}
        if row.get("id") is not None:
            found["id"] = row["id"]
        if row.get("answer") is not None:
            found["answer"] = true_answer(row["answer"], f"{where}: field 'answer'")
        yield found


def load_policy(config: Config) -> Policy | ServedPolicy:
    separator = config.separator.replace("\\n", "\n")
    sampling = (separator, config.temperature, config.top_p, config.max_step_tokens)
    if "://" in config.policy:
        return ServedPolicy(config.policy, config.policy_name, config.policy_tokenizer, *sampling)
    return Policy(config.policy, *sampling, dtype=config.dtype, device=config.device)


def load_judge(config: Config) -> Judge:
    flags: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "seed": config.seed}
    if "://" in config.judge:
        return Judge(config.judge, config.k, config.judge_name, tokenizer=config.judge_tokenizer, **flags)
    return Judge(config.judge, config.k, dtype=config.dtype, device=config.device, **flags)


if __name__ == "__main__":
    run((Config, main))
