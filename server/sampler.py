"""K analyses per case from a server: to its callers what `rprm.Sampler` is.

    sampler = load_served(config, k=10, force=True)
    for index, analyses in sampler.analyses(cases):
        ...

Each case has a thread of its own, which asks for the K continuations and for P(Yes), and mostly waits.
"""
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

from checkpoint import PROMPT_FILE, ChatTokenizer, load_tokenizer, read_template_args
from checkpoint.prompt import tell_conversation
from formats.verdicts import before_verdict, has_usual_word, parse_verdict, verdict_letter
from plumbing import ranks
from plumbing.address import read_key
from plumbing.errors import BadInput
from rprm import (
    Analysis,
    Case,
    Prompt,
    Sampler,
    Sampling,
    load_prompt,
    reserved_tokens,
    without_analysis,
    yes_no_ids,
)
from server.completions import Choice, ServerEngine, Token, YesNo
from server.http import Refused, Server
from server.jobs import Jobs


class ServerSampler(Sampler):
    """K analyses per case from a server.

    The same seed asks for the same samples. The server may still give others, as it rounds otherwise in
    another batch.
    """

    def __init__(self, engine: ServerEngine, tokenizer: ChatTokenizer, prompt: Prompt, sampling: Sampling,
                 reserve: int):
        self.engine = engine
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.sampling = sampling
        self.reserve = reserve
        self.jobs = Jobs()

    # ------------------------------------------------------------------------------------------ pushed

    def restart(self) -> None:
        """Forget the cases before; request ids count from 0 again."""
        self.jobs = Jobs()

    def add(self, case: Case) -> int:
        """Start the work on a case. -> its request id: 0, 1, 2, ..."""
        return self.jobs.start(partial(self.ask, case))

    @property
    def has_room(self) -> bool:
        """Would one more case be worked on now?"""
        return self.jobs.running < self.engine.server.concurrency

    @property
    def busy(self) -> bool:
        """Is a case not answered yet?"""
        return self.jobs.running > 0

    def step(self) -> list[tuple[int, list[Analysis]]]:
        """Wait for the next answer. -> (request id, the case's K analyses), once."""
        try:
            return [self.jobs.next()]
        except BaseException:  # also Ctrl-C: nobody waits for what the other threads ask for
            self.engine.server.stopped.set()
            raise

    # ------------------------------------------------------------------------------------------ one case

    def ask(self, case: Case) -> list[Analysis]:
        """The K analyses of a case; none if its prompt is longer than the context."""
        request = self.request_of(case)
        if request is None:
            return []
        try:
            choices = self.engine.sample(request.ids, request.seeds)
        except Refused as error:
            raise BadInput(f"problem {case.problem[:50]!r}, {len(request.ids)} tokens: {error}; "
                           "leave this case out or lower --max-new-tokens") from None
        return self.answer_of(request, choices)

    def to_analyses(self, prompt: list[int], choices: list[Choice]) -> list[Analysis]:
        """The choices as analyses, with P(Yes) from their log-probabilities, or by requests of its own.

        A request is needed if the log-probabilities are those after temperature, if the tokens do not tell
        which of them is the verdict, and, where a verdict is to be forced, if the choice has none.
        """
        found = []
        unread: dict[int, list[int]] = {}  # index of the analysis -> the text after which P(Yes) is asked for
        for i, choice in enumerate(choices):
            tokens = self._own_tokens(choice)
            verdict = parse_verdict(choice.text)
            p_yes = None
            if verdict is not None and not has_usual_word(choice.text):
                unread[i] = self.with_verification(prompt, before_verdict(choice.text))
            elif verdict is not None:
                letter = verdict_letter(choice.text)
                at = self._verdict_token(tokens, choice.text[letter:]) if self.engine.raw else None
                if at is not None and self.engine.yes_no.has(tokens[at]):
                    p_yes = self.engine.yes_no.p_yes(choice.top[at])
                else:
                    unread[i] = prompt + self.tokenizer.continuation(
                        prompt, choice.text[:letter].rstrip(" "))
            elif self.sampling.force:
                ids = self._ids(prompt, tokens, choice.text)
                unread[i] = prompt + ids + self.verification_ids(choice.text)
            found.append(Analysis(choice.text, verdict, p_yes, len(tokens), choice.finished))
        for i, p_yes in zip(unread, self.engine.read_p_yes(list(unread.values())), strict=True):
            found[i] = replace(found[i], p_yes=p_yes, forced=found[i].verdict is None)
        return found

    def _own_tokens(self, choice: Choice) -> list[Token]:
        """The tokens without the end-of-text token, which some servers list and others do not."""
        if not (choice.finished and choice.tokens):
            return choice.tokens
        last = choice.tokens[-1]
        if isinstance(last, int):
            is_end = last in self.tokenizer.eos_ids
        else:
            is_end = last == "" or not choice.text.endswith(last)
        return choice.tokens[:-1] if is_end else choice.tokens

    def _ids(self, prompt: list[int], tokens: list[Token], text: str) -> list[int]:
        """The ids of the tokens, if the server told them; else those of the text."""
        has_ids = all(isinstance(token, int) for token in tokens)
        return tokens if has_ids else self.tokenizer.continuation(prompt, text)

    def _verdict_token(self, tokens: list[Token], rest: str) -> int | None:
        """The index of the token with the verdict's first letter; the text from there on is `rest`.

        None if the tokens do not tell: no last ones of them say `rest`, but for what stands before it.
        """
        for i in reversed(range(len(tokens))):
            text = self._text(tokens[i:])
            if len(text) >= len(rest):
                return i if text.endswith(rest) else None
        return None

    def _text(self, tokens: list[Token]) -> str:
        """The text of tokens that are all ids or all texts."""
        if all(isinstance(token, int) for token in tokens):
            return self.tokenizer.decode(tokens)
        return "".join(map(str, tokens))


def context_of(model: dict) -> float:
    """The context's length, from a server's description of a model; inf if it is not told.

    vLLM and SGLang tell it as max_model_len, llama.cpp as meta.n_ctx.
    """
    meta = model.get("meta")
    n_ctx = meta.get("n_ctx") if isinstance(meta, dict) else None
    told = model.get("max_model_len") or n_ctx
    return told if isinstance(told, int) else math.inf


def load_served(config, k: int, force: bool, direct: bool = False) -> Sampler:
    """The sampler of --model at --server. config: ServedConfig."""
    if ranks.count() > 1:
        raise BadInput("--server: one process asks for all; leave torchrun out and raise --concurrency")
    tokenizer = load_tokenizer(config.tokenizer, config.system, read_template_args(config.template_args))
    prompt = load_prompt(config.prompt_file, Path(config.tokenizer) / PROMPT_FILE, direct)
    sampling = Sampling(k, config.temperature, config.top_p, config.max_new_tokens, config.seed,
                        config.concurrency, force)
    if direct:
        sampling = without_analysis(sampling)
    key = read_key(config.api_key_env)
    server = Server(config.server, key, config.timeout, config.retries, config.concurrency)
    models = server.models()
    if models is not None and config.model not in models:
        raise BadInput(f"{server.url}: no model {config.model!r}; --model may be {', '.join(sorted(models))}")
    reserve = reserved_tokens(tokenizer)
    context = config.context or context_of((models or {}).get(config.model, {}))
    yes_id, no_id = yes_no_ids(tokenizer)
    yes_no = YesNo((yes_id, " Yes"), (no_id, " No"))
    engine = ServerEngine(server, config.model, yes_no, sampling, context - reserve)
    said = engine.probe(tokenizer.chat("Is 1 + 1 = 2?"))
    print(f"server: {server.url}, model {config.model}; {said}")
    tell_conversation(prompt.text, tokenizer)
    return ServerSampler(engine, tokenizer, prompt, sampling, reserve)
