"""R-PRM: a process reward model that reasons before it judges (arXiv 2503.21295), equation by equation.

A case is a problem, the previous steps and the step to judge. The model writes K analyses of it. Each ends in
a verdict, "Verification: Is the step correct (Yes/No)? Yes" (formats/verdicts.py). The reward of the step is
the mean probability of Yes there:

    R = 1/K * sum_k P(Yes | case, analysis_k)

where P(Yes) is a softmax over the logits of " Yes" and " No" alone (generate.yes_against_no).

Run it to see the method at work on one case (--problem and --step, or a built-in one):

    python rprm.py
    python rprm.py --model FOLDER --problem "Tom has 3 apples and buys 4." --step "He has 3 + 4 = 8 apples."
"""
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed_in_backward

import fast
from checkpoint import DTYPES, ChatTokenizer, load_for_sampling, load_tokenizer, read_template_args
from checkpoint.flags import SamplerConfig
from checkpoint.prompt import read_prompt, split_prompt, tell_conversation, travelled_prompt
from formats.case_text import print_judged
from formats.verdicts import VERIFICATION, before_verdict, find_verdict, parse_verdict
from generate import Continuation, Engine, Request
from model import Decoder, Tree, head_chunk
from plumbing.cli import print_config, run
from plumbing.errors import BadInput
from plumbing.files import fingerprint
from plumbing.queues import Relay, answers_of
from plumbing.threads import choose_threads

DEFAULT_MODEL = Path(__file__).parent / "examples/arithmetic/base"


# ------------------------------------------------------------------------------------------ cases and prompts

@dataclass(frozen=True)
class Case:
    """What is judged: `now_step`, the step that follows `previous_steps` in a solution of `problem`."""
    problem: str
    previous_steps: tuple[str, ...]
    now_step: str
    label: bool | None = None  # is now_step correct? None = unknown


class Prompt:
    """The prompt: a text with {problem} {previous_steps} {now_step}, or with three bare {} in that order.

    >>> prompt = Prompt("{problem} | {previous_steps} | {now_step}", "an example")
    >>> prompt.fill(Case("1 + 1 + 1?", ("1 + 1 = 2.",), "2 + 1 = 4."))
    '1 + 1 + 1? | Step 1: 1 + 1 = 2. | Step 2: 2 + 1 = 4.'
    """

    def __init__(self, text: str, where: str):
        """where: the name of the text's file, for errors."""
        self.text = text
        self.pieces = split_prompt(text, where)  # words, field, words, field, words, field, words

    def fill(self, case: Case) -> str:
        """The user's message for a case."""
        return "".join(text for text, _ in self.fill_pieces(case)).strip()

    def fill_pieces(self, case: Case) -> list[tuple[str, bool]]:
        """The filled prompt in pieces: (text, is it the prompt's own?). Braces in a problem stay.

        The prompt's own words may hold special tokens; what looks like one in a case is ordinary text.
        """
        previous = [f"Step {i}: {step.strip()}" for i, step in enumerate(case.previous_steps, 1)]
        values = {
            "problem": case.problem.strip(),
            "previous_steps": "\n".join(previous) or "There are no previous steps.",
            "now_step": f"Step {len(previous) + 1}: {case.now_step.strip()}",
        }
        return [(values[piece], False) if i % 2 else (piece, True) for i, piece in enumerate(self.pieces)]


# ---------------------------------------------------------------------------------------------- analyses

@dataclass(frozen=True)
class Analysis:
    """One sampled analysis."""
    text: str
    verdict: bool | None  # what the final verification line says; None = missing or ambiguous
    p_yes: float | None   # P(Yes) against P(No) at the verdict; None = it was not read, or no server tells it
    n_tokens: int
    finished: bool        # False: cut off at max_new_tokens or at the end of the context
    forced: bool = False  # no verdict was written: p_yes was read after an added verification line


def reward(analyses: Sequence[Analysis]) -> float | None:
    """R = 1/K * sum_k P(Yes | case, analysis_k) over the analyses that have a P(Yes); None if none has."""
    p_yes = [a.p_yes for a in analyses if a.p_yes is not None]
    return sum(p_yes) / len(p_yes) if p_yes else None


def yes_no_ids(tokenizer: ChatTokenizer) -> tuple[int, int]:
    """The token ids of " Yes" and " No" after the verification question. BadInput if either is not one."""
    question = tokenizer.encode(VERIFICATION)
    yes = tokenizer.encode(VERIFICATION + " Yes")
    no = tokenizer.encode(VERIFICATION + " No")
    if yes[:-1] != question or no[:-1] != question or yes[-1] == no[-1]:
        raise BadInput("tokenizer.json: ' Yes' and ' No' are not single tokens after the verification line; "
                       "use another tokenizer")
    return yes[-1], no[-1]


def reserved_tokens(tokenizer: ChatTokenizer) -> int:
    """How many tokens of the context are kept free, for a verdict to be read."""
    return len(tokenizer.encode("\n" + VERIFICATION)) + 1


@dataclass(frozen=True)
class Sampling:
    """How analyses are sampled; the defaults are the paper's (K = 10 in its tables)."""
    k: int = 10
    temperature: float = 0.95
    top_p: float = 0.95
    max_new_tokens: int = 4096  # 0: no analysis, P(Yes) straight after the prompt: a direct PRM
    seed: int = 0
    batch_size: int = 16  # cases side by side
    force: bool = True    # give an analysis without a verdict the verification line and read P(Yes) there


def without_analysis(sampling: Sampling) -> Sampling:
    """The same for a direct PRM, with as many cases side by side as there would be analyses."""
    return replace(sampling, k=1, max_new_tokens=0, batch_size=sampling.batch_size * sampling.k, force=True)


class TooLong(BadInput):
    """The prompt of a case leaves no room in the model's context for an analysis."""


class Sampler(Relay):
    """K analyses per case: one operation for the teacher, for preferences and for rewards.

        sampler.add(case)                               # -> its request id: 0, 1, 2, ...
        while sampler.busy:
            for request_id, analyses in sampler.step():     # the cases that are complete
                ...

    (`Relay`, plumbing/queues.py, has `add`, `busy` and `step`. It hands on what `request_of` and `answer_of`
    make.) The analyses of a case depend on the seed, the case and the sample's number. A case whose prompt is
    longer than the context has none: [].

    engine_class: generate.Engine, the plain one, or that of fast.for_sampling(model)
    revise: what is made of a case's analyses before they are given out, as by formats/samples.add_verdicts
    """

    revise: Callable[..., list[Analysis]] | None = None

    def __init__(self, model: Decoder, tokenizer: ChatTokenizer, prompt: Prompt, sampling: Sampling,
                 engine_class: type[Engine] = Engine):
        self.model = model
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.sampling = sampling
        self.reserve = reserved_tokens(tokenizer)
        self.engine = engine_class(
            model, tokenizer.eos_ids, yes_no_ids(tokenizer), sampling.temperature, sampling.top_p,
            sampling.max_new_tokens, max_rows=sampling.batch_size * sampling.k, reserve=self.reserve,
            suffix_of=self.missing_verification)
        self.restart()

    def prompt_ids(self, case: Case) -> list[int]:
        """The prompt's token ids. Raises TooLong."""
        ids = self.tokenizer.prompt(self.prompt.fill_pieces(case))
        most = self.engine.max_positions  # of the context, without those that are kept free
        if len(ids) >= most:
            raise TooLong(
                f"problem {case.problem[:50]!r}: the prompt has {len(ids)} tokens, and "
                f"{self.reserve + 1} more are needed, but the model's context is {most + self.reserve}; "
                f"leave this case out or use a model with a longer context")
        return ids

    def analyses(self, cases: Iterable[Case]) -> Iterator[tuple[int, list[Analysis]]]:
        """(index of the case, its K analyses), as they are completed. `cases` is read as room is found."""
        return answers_of(self, cases)

    def request_of(self, case: Case) -> Request | None:
        """What the engine is asked for a case. None: its prompt is longer than the context."""
        try:
            ids = self.prompt_ids(case)
        except TooLong:
            return None
        return Request(ids, [analysis_seed(self.sampling.seed, case, k) for k in range(self.sampling.k)])

    def answer_of(self, request: Request, continuations: list[Continuation]) -> list[Analysis]:
        """The continuations of a case's prompt as its analyses, with P(Yes)."""
        found = self.to_analyses(request.ids, continuations)
        if self.revise is None:
            return found
        return self.revise(found, request.seeds, partial(self.p_yes_after, request.ids))

    def to_analyses(self, prompt_ids: list[int], continuations: list[Continuation]) -> list[Analysis]:
        """The continuations as analyses. P(Yes) always compares the tokens " Yes" and " No". It is read:

        verdict in one of these tokens       where the verdict was sampled
        verdict in others (yes, **Yes)       in a second pass, with the verification line in its place
        no verdict                           after the text and the verification line, if --force
        """
        found = []
        unread = {}  # index of the analysis -> the text after which P(Yes) is read
        for i, c in enumerate(continuations):
            text = self.tokenizer.decode(c.ids)
            finished = c.finished or self.sampling.max_new_tokens == 0
            verdict = find_verdict(text)
            if verdict is None:
                p_yes = c.p_yes_after_suffix
                found.append(Analysis(text, None, p_yes, len(c.ids), finished, forced=p_yes is not None))
                continue
            at = self.tokenizer.tokens_within(c.ids, verdict.letter)  # so many stand before the verdict's
            found.append(Analysis(text, verdict.yes, c.p_yes[at], len(c.ids), finished))
            if c.ids[at] not in self.engine.yes_no:
                unread[i] = before_verdict(text)
        for i, p_yes in zip(unread, self.p_yes_after(prompt_ids, list(unread.values())), strict=True):
            found[i] = replace(found[i], p_yes=p_yes)
        return found

    def p_yes_after(self, prompt_ids: list[int], texts: list[str]) -> list[float | None]:
        """P(Yes) after the prompt, each text and the verification line. None: a server may not know it."""
        return self.engine.read_p_yes([self.with_verification(prompt_ids, text) for text in texts])

    def with_verification(self, prompt_ids: list[int], text: str) -> list[int]:
        """The ids of the prompt, a text behind it and the verification line."""
        return prompt_ids + self.tokenizer.continuation(prompt_ids, text) + self.verification_ids(text)

    @cached_property
    def prompt_end(self) -> list[int]:
        """The last token of every prompt, on which the tokens of an analysis's first word may depend."""
        return self.tokenizer.prompt(self.prompt.fill_pieces(BUILT_IN))[-1:]

    def missing_verification(self, ids: list[int]) -> list[int]:
        """The verification line, the engine's suffix, if a verdict is missing and is to be forced."""
        text = self.tokenizer.decode(ids)
        if self.sampling.force and parse_verdict(text) is None:
            return self.verification_ids(text)
        return []

    def verification_ids(self, text: str) -> list[int]:
        """The verification line for an analysis that lacks it, on a line of its own."""
        on_own_line = not text or text.endswith("\n")
        line = VERIFICATION if on_own_line else "\n" + VERIFICATION
        return self.tokenizer.continuation(text or self.prompt_end, line)


def analysis_seed(seed: int, case: Case, k: int) -> int:
    """The seed of an analysis, an int64: from the seed, what the case says, and the sample's number."""
    number = fingerprint(seed, case.problem, tuple(case.previous_steps), case.now_step, k)
    return number - 2 ** 64 if number >= 2 ** 63 else number


# --------------------------------------------------------------------------------------------- the two losses

def response_logprobs(model: Decoder, tree: Tree, starts: list[int]) -> Tensor:
    """log π(response | prompt) of each sequence of a tree, summed over its response. -> (S,) at least fp32.

    starts: where each sequence's response begins (at least 1). Each response token is predicted at the token
    before it. Only those pass the LM head, some at a time (head_chunk), and the backward pass makes their
    logits again.
    """
    tree = tree.to(model.device)
    spans = list(zip(tree.paths, starts, strict=True))
    predictors = np.concatenate([path[start - 1:-1] for path, start in spans])
    responses = np.concatenate([path[start:] for path, start in spans])

    hidden = model(tree.ids, tree.positions, model.tree_attention(tree.end))  # (T, C)
    hidden = hidden.index_select(0, torch.from_numpy(predictors).to(model.device))  # (N, C)
    target = tree.ids[torch.from_numpy(responses).to(model.device)]                 # (N,)
    chunk = head_chunk(model.device, len(tree))
    logprobs = []  # those of all responses, (N,) together
    for some_hidden, some_target in zip(hidden.split(chunk), target.split(chunk), strict=True):
        logprobs.append(recomputed_in_backward(model.logprobs, some_hidden, some_target, use_reentrant=False))
    lengths = [len(path) - start for path, start in spans]
    return torch.stack([of_response.sum() for of_response in torch.cat(logprobs).split(lengths)])


def sft_loss(logprobs: Tensor, n_tokens: int) -> Tensor:
    """L = -sum_j log p(y_j | case, y_<j) / n_tokens (the paper's SFT objective).

    logprobs (S,): each response's sum; n_tokens: the supervised tokens of the whole optimizer step.
    """
    return -logprobs.sum() / n_tokens


def dpo_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor,
             chosen_lengths: Tensor, beta: float, label_smoothing: float = 0.0, ipo: bool = False,
             nll: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """The preference loss per pair and the implicit rewards of chosen and rejected, all (pairs,).

    chosen, rejected: log π(y | case) under the policy, summed over tokens; ref_*: the same under the frozen
    reference. DPO (arXiv 2305.18290, eq. 7) or IPO (arXiv 2310.12036, eq. 17; its log-ratios are means per
    token in some libraries, sums here). With label smoothing: the expected loss if that share of the pairs is
    the wrong way round ("conservative" DPO). Plus `nll` times the chosen response's mean NLL.
    """
    chosen_ratio = chosen - ref_chosen  # log π / π_ref
    rejected_ratio = rejected - ref_rejected
    margin = chosen_ratio - rejected_ratio
    if ipo:
        right_way = (margin - 1 / (2 * beta)) ** 2
        wrong_way = (-margin - 1 / (2 * beta)) ** 2
    else:
        right_way = -F.logsigmoid(beta * margin)
        wrong_way = -F.logsigmoid(-beta * margin)
    losses = right_way * (1 - label_smoothing) + wrong_way * label_smoothing
    losses = losses - nll * chosen / chosen_lengths
    return losses, beta * chosen_ratio.detach(), beta * rejected_ratio.detach()


# ---------------------------------------------------------------------------------- from a checkpoint folder

def load_prompt(prompt_file: str | None, travelled: Path | None, direct: bool = False) -> Prompt:
    """The prompt of --prompt-file; else the one saved with the checkpoint or the data; else the project's."""
    return Prompt(*read_prompt(prompt_file, travelled, direct))


def load_local_sampler(config: SamplerConfig, k: int, force: bool, direct: bool = False,
                       batch_size: int = 1) -> Sampler:
    """The sampler of a checkpoint folder, with its tokenizer and its prompt.

    direct: it asks for a verdict without an analysis (the direct PRM of the paper's comparison)
    """
    prompt = load_prompt(config.prompt_file, travelled_prompt(config.model, config.adapter), direct)
    sampling = Sampling(
        k, config.temperature, config.top_p, config.max_new_tokens, config.seed, batch_size, force)
    if direct:
        sampling = without_analysis(sampling)
    model = load_for_sampling(
        config.model, config.adapter, DTYPES[config.dtype], config.device, config.context)
    tokenizer = load_tokenizer(config.model, config.system, read_template_args(config.template_args))
    choose_threads(model)
    tell_conversation(prompt.text, tokenizer)
    engine_class = Engine if config.plain else fast.for_sampling(model)
    return Sampler(model, tokenizer, prompt, sampling, engine_class)


# -------------------------------------------------------------------------------------------- one case, shown

@dataclass(frozen=True, kw_only=True)
class Config(SamplerConfig):
    model: Annotated[str, "checkpoint: a Hugging Face folder"] = str(DEFAULT_MODEL)
    problem: Annotated[str | None, "the problem's text (default: a built-in case)"] = None
    step: Annotated[tuple[str, ...], "the solution's steps; the last one is judged (with --problem)"] = ()
    k: Annotated[int, "analyses", (1, None)] = 10
    max_new_tokens: Annotated[int, "tokens per analysis at most", (1, None)] = 512
    html: Annotated[str | None, "page to write: the analyses as the tree in which they branch"] = None
    force: Annotated[bool, "read P(Yes) after an added verification line where an analysis has no "
                           "verdict"] = True


BUILT_IN = Case("At first Mia has 34 shells. Then Tom gives 27 to Mia. Now Mia sells to Ann 18. "
                "How many shells does Mia have now?", ("After Tom: 34+27=61.",), "After Ann: 61-18=53.")


def main(config: Config) -> None:
    print_config(config)
    case = given_case(config.problem, config.step)
    if not config.plain:
        fast.keep_freed_memory()
    sampler = load_local_sampler(config, config.k, config.force)
    sampler.prompt_ids(case)  # says so, if it is longer than the context
    start = time.perf_counter()
    [(_, analyses)] = sampler.analyses([case])
    seconds = time.perf_counter() - start
    print(f"model:   {config.model}")
    print_judged(case, analyses, reward(analyses))
    if config.html:
        from formats.case_page import write_sampled_case  # here, as nothing else needs it
        write_sampled_case(Path(config.html), sampler, case, analyses, reward(analyses))
        print(f"page:   {config.html}")
    n = sampler.engine.new_tokens
    print(f"time:   {seconds:.2f} s, {n} tokens sampled, {n / seconds:.0f} tokens/s")


def given_case(problem: str | None, steps: tuple[str, ...]) -> Case:
    """The case of --problem and --step, or the built-in one."""
    if (problem is None) != (not steps):
        raise BadInput("--problem and --step go together: give both, or neither for the built-in case")
    if problem is None:
        return BUILT_IN
    if not all(text.strip() for text in (problem, *steps)):
        raise BadInput(
            "--problem and --step must not be empty: write the text, or leave both out for the built-in case"
        )
    return Case(problem, steps[:-1], steps[-1])


if __name__ == "__main__":
    run((Config, main))
