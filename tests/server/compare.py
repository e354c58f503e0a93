"""The rewards of a checkpoint behind a server against those of the same checkpoint here: `make served`.

    python tests/server/compare.py --model models/smollm2 --data models/gsm8k.json           # starts vLLM on this CPU
    python tests/server/compare.py --model FOLDER --data gsm8k.json --server http://localhost:8000 --name judge

Greedy analyses must have the same tokens. Where two tokens are as likely but for rounding, they may part: then it is
said how far the log-probabilities of the two lie apart here. P(Yes) of everything that the server wrote, greedy and
sampled, is read again here after the same tokens, in one full pass each, and must be the same but for rounding.
"""
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's modules
import torch

from checkpoint.flags import ServedConfig
from data import load_sampler
from formats.readers import read_solutions
from formats.verdicts import before_verdict, find_verdict
from generate import Request, last_tokens
from model import Tree
from plumbing.cli import print_config, run
from plumbing.errors import BadInput
from plumbing.queues import answers_of
from rprm import Analysis, Case, Sampler, reward, analysis_seed
from server import side_by_side

sys.path.append(str(Path(__file__).parent))
import vllm_server


@dataclass(frozen=True, kw_only=True)
class Config:
    model: Annotated[str, "checkpoint: a Hugging Face folder"]
    data: Annotated[str | None, "solutions whose steps are the cases (default: some of the small world)"] = None
    cases: Annotated[int, "the first so many of them", (1, None)] = 12
    k: Annotated[int, "sampled analyses of each", (1, None)] = 10
    max_new_tokens: Annotated[int, "tokens per analysis at most", (1, None)] = 96
    dtype: Annotated[str, "of the weights, here and in vLLM", ("float32", "bfloat16")] = "float32"
    concurrency: Annotated[int, "requests under way at a time", (1, None)] = 4
    most: Annotated[float, "largest difference of P(Yes), and of log-probabilities where texts part", (0, None)] = 1e-3
    server: Annotated[str | None, "URL of a server that is up (default: start vLLM)"] = None
    name: Annotated[str, "the model's name there"] = "model"
    vllm: Annotated[str, "the Python of an environment with vLLM"] = ".venv-vllm/bin/python"
    logprobs_mode: Annotated[str, "what vLLM is to report", ("raw_logprobs", "processed_logprobs")] = "raw_logprobs"
    threads: Annotated[int, "of vLLM", (1, None)] = 2


class Parting(NamedTuple):
    """Where two greedy analyses part."""
    case: int         # its number
    token: int        # the index of the first token that differs
    here: str         # that token here
    there: str
    gap: float        # how much likelier ours is here, as a difference of log-probabilities


class Comparison(NamedTuple):
    partings: list[Parting]  # of greedy analyses
    p_yes: list[float]       # differences of P(Yes) after the same tokens, of every analysis of the server
    rewards: list[float]     # of the rewards made of them


def main(config: Config) -> None:
    print_config(config)
    cases = read_cases(config.data)[:config.cases]
    with server_of(config) as url:
        greedy = compare(config, url, cases, k=1, temperature=0.0)
        print(f"greedy: {len(cases) - len(greedy.partings)} of {len(cases)} analyses are the same tokens")
        for parting in greedy.partings:
            print("  case {0.case} parts at token {0.token}: {0.here!r} here, {0.there!r} there, as likely here but "
                  "for {0.gap:.1e} in log-probability".format(parting))
        tell("greedy", greedy)
        sampled = compare(config, url, cases, config.k, temperature=0.95)
        tell(f"sampled, K = {config.k}", sampled)
    worst = max(greedy.p_yes + sampled.p_yes + [abs(parting.gap) for parting in greedy.partings])
    if worst > config.most:
        raise BadInput(f"{config.name}: differs from {config.model} by up to {worst:.1e}, which is more than rounding "
                       f"(--most {config.most:g}); is it the same checkpoint, in --dtype {config.dtype}?")


def tell(which: str, found: Comparison) -> None:
    print(f"{which}: P(Yes) of {len(found.p_yes)} analyses differs by at most {max(found.p_yes):.1e}, "
          f"the rewards by at most {max(found.rewards):.1e}")


def read_cases(data: str | None) -> list[Case]:
    if data is None:
        return small_world_cases()
    return [Case(solution.problem, solution.steps[:t], solution.steps[t])
            for _, solution in read_solutions(data) for t in range(len(solution.steps))]


def small_world_cases() -> list[Case]:
    """Some of the small world's, which the embedded model was trained for; some of the steps are wrong."""
    cases = []
    for a, b, wrong in [(34, 27, 0), (34, 27, 1), (50, 31, 0), (62, 19, 10), (25, 25, 0), (71, 8, 0)]:
        problem = (f"At first Mia has {a} shells. Then Tom gives {b} to Mia. Now to Ann, Mia sells 18. "
                   "How many shells does Mia have now?")
        previous = f"After Tom: {a}+{b}={a + b}."
        cases.append(Case(problem, (previous,), f"With Ann: {a + b}-18={a + b - 18 + wrong}."))
    return cases


@contextmanager
def server_of(config: Config) -> Iterator[str]:
    """The URL of --server, or of a vLLM that ends with the block."""
    if config.server is not None:
        yield config.server
        return
    with tempfile.TemporaryDirectory() as aside:
        flags = ("--logprobs-mode", config.logprobs_mode)
        with vllm_server.serve(Path(config.vllm), Path(config.model), Path(aside) / "vllm.log", config.threads,
                               config.dtype, flags) as url:
            yield url


# ---------------------------------------------------------------------------------------------- comparing

def compare(config: Config, url: str, cases: list[Case], k: int, temperature: float) -> Comparison:
    common = dict(temperature=temperature, max_new_tokens=config.max_new_tokens)
    here = load_sampler(ServedConfig(model=config.model, device="cpu", dtype=config.dtype, **common), k, force=True)
    there = load_sampler(ServedConfig(model=config.name, server=url, tokenizer=config.model,
                                      concurrency=config.concurrency, **common), k, force=True)
    prompts = [there.prompt_ids(case) for case in cases]
    asked = [partial(ask, there, prompt, [analysis_seed(0, case, i) for i in range(k)])
             for case, prompt in zip(cases, prompts)]
    answers = side_by_side(asked, config.concurrency)
    partings = find_partings(here, prompts, answers) if temperature == 0 else []
    p_yes = []
    rewards = []
    for prompt, (analyses, ids) in zip(prompts, answers):
        again = read_again(here, prompt, analyses, ids)
        p_yes += [abs(a.p_yes - b.p_yes) for a, b in zip(analyses, again)]
        rewards.append(abs(reward(analyses) - reward(again)))
    return Comparison(partings, p_yes, rewards)


def ask(there: Sampler, prompt: list[int], seeds: list[int]) -> tuple[list[Analysis], list[list[int]]]:
    """The server's analyses of a case, and the token ids of each."""
    choices = there.engine.sample(prompt, seeds)
    ids = [there._ids(there._own_tokens(choice), choice.text) for choice in choices]
    return there.to_analyses(prompt, choices), ids


def read_again(here: Sampler, prompt: list[int], analyses: list[Analysis], ids: list[list[int]]) -> list[Analysis]:
    """The analyses with P(Yes) read here: at the verdict, or after the verification line in its place."""
    sequences = []
    for analysis, own in zip(analyses, ids):
        verdict = find_verdict(analysis.text)
        if verdict is None:
            sequences.append(prompt + own + here.verification_ids(analysis.text))
            continue
        at = here.tokenizer.tokens_within(own, verdict.letter)
        if own[at] in here.engine.yes_no:
            sequences.append(prompt + own[:at])
        else:
            before = before_verdict(analysis.text)
            sequences.append(prompt + here.tokenizer.continuation(prompt, before) + here.verification_ids(before))
    return [replace(analysis, p_yes=p_yes)
            for analysis, p_yes in zip(analyses, here.engine.read_p_yes(sequences), strict=True)]


def find_partings(here: Sampler, prompts: list[list[int]], answers: list) -> list[Parting]:
    """Where the server's greedy analyses are not those of here."""
    requests = [Request(prompt, [0]) for prompt in prompts]
    ours = {i: continuation.ids for i, [continuation] in answers_of(here.engine, requests)}
    end = here.tokenizer.eos_ids[:1]
    partings = []
    for i, (prompt, (_, [theirs])) in enumerate(zip(prompts, answers)):
        if ours[i] == theirs:
            continue
        pairs = zip(ours[i] + end, theirs + end)  # one may have ended where the other went on
        token = next(t for t, (a, b) in enumerate(pairs) if a != b)
        a, b = (ours[i] + end)[token], (theirs + end)[token]
        logprobs = logprobs_after(here, prompt + theirs[:token])
        gap = float(logprobs[a] - logprobs[b])
        partings.append(Parting(i, token, here.tokenizer.decode([a]), here.tokenizer.decode([b]), gap))
    return partings


@torch.no_grad()
def logprobs_after(here: Sampler, ids: list[int]) -> torch.Tensor:
    """Of all tokens after a sequence: (V,)."""
    tree = Tree([ids])
    hidden = here.model(tree.ids, tree.positions, here.model.tree_attention(tree.end))
    return torch.log_softmax(here.model.logits(hidden[last_tokens(tree)])[0].double(), dim=-1)


if __name__ == "__main__":
    run((Config, main))
