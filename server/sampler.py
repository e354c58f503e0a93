"""K analyses per case from a server: to its callers what `rprm.Sampler` is."""
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Iterable, Iterator

from checkpoint import PROMPT_FILE, ChatTokenizer, load_tokenizer
from plumbing import ranks
from plumbing.errors import BadInput
from rprm import (VERIFICATION, Analysis, Case, Prompt, Sampler, Sampling, before_verdict, has_usual_word, load_prompt,
                  parse_verdict, row_seed, verdict_letter, yes_no_ids)
from server.completions import Choice, ServerEngine
from server.http import Refused, Server, read_key, side_by_side


class ServerSampler(Sampler):
    """K analyses per case from a server: to its callers what `Sampler` is.

    The same seed asks for the same samples; whether it gets them is the server's matter (batches of another size round
    differently).
    """

    def __init__(self, engine: ServerEngine, tokenizer: ChatTokenizer, prompt: Prompt, sampling: Sampling, room: int):
        self.engine, self.tokenizer, self.prompt, self.sampling, self.room = engine, tokenizer, prompt, sampling, room

    @property
    def context(self) -> float:
        return self.engine.context + self.room

    def analyses(self, cases: Iterable[Case | None]) -> Iterator[tuple[int, list[Analysis]]]:
        jobs = (None if case is None else partial(self._analyse, case) for case in cases)
        try:
            yield from side_by_side(jobs, self.engine.server.concurrency)
        except BaseException:  # nobody waits for what the other threads are doing
            self.engine.server.stopped.set()
            raise

    def _analyse(self, case: Case) -> list[Analysis]:
        prompt = self.prompt_ids(case)
        try:
            choices = self.engine.sample(prompt, [row_seed(self.sampling.seed, case, k) for k in range(self.sampling.k)])
        except Refused as error:
            raise BadInput(f"problem {case.problem[:50]!r}, {len(prompt)} tokens: {error}; "
                           "leave this case out or lower --max-new-tokens") from None
        return self._judge(case, prompt, choices)

    def _judge(self, case: Case, prompt: list[int], choices: list[Choice]) -> list[Analysis]:
        found, unread, to_read = [], [], {}  # to_read: analysis -> the text after which its P(Yes) is asked for
        for i, choice in enumerate(choices):
            tokens, verdict = self._own_tokens(choice), parse_verdict(choice.text)
            found.append(Analysis(choice.text, verdict, None, len(tokens), choice.finished))
            if verdict is None:
                unread.append(i)
                continue
            if not has_usual_word(choice.text):
                before = before_verdict(choice.text)
                to_read[i] = prompt + self.tokenizer.encode(before) + self._verification(before)
                continue
            letter = verdict_letter(choice.text)
            place = self._place(tokens, choice.text[letter:]) if self.engine.raw else None
            if place is None:
                to_read[i] = prompt + self.tokenizer.encode(choice.text[:letter].rstrip(" "))
            else:
                found[i] = replace(found[i], p_yes=self.engine.p_yes(choice.top[place]))
        if self.sampling.force and not self.sampling.complete:
            to_read |= {i: prompt + self._ids(choices[i]) + self._verification(found[i].text) for i in unread}
        for i, p_yes in zip(to_read, self.engine.read_p_yes(list(to_read.values()))):
            found[i] = replace(found[i], p_yes=p_yes, forced=found[i].verdict is None)
        return self._complete(case, prompt, found, unread) if self.sampling.complete else found

    def _own_tokens(self, choice: Choice) -> list[int | str]:
        """Without the end-of-text token, which some servers list and others do not."""
        last = choice.tokens[-1] if choice.finished and choice.tokens else None
        ends = last in self.tokenizer.eos_ids if isinstance(last, int) else last is not None and not (last and choice.text.endswith(last))
        return choice.tokens[:-1] if ends else choice.tokens

    def _ids(self, choice: Choice) -> list[int]:
        tokens = self._own_tokens(choice)
        return tokens if all(isinstance(token, int) for token in tokens) else self.tokenizer.encode(choice.text)

    def _place(self, tokens: list[int | str], rest: str) -> int | None:
        """Which token holds the verdict's first letter, where the text from there on is `rest`. None if the tokens do not tell."""
        tail = ""
        for place in reversed(range(len(tokens))):
            token = tokens[place]
            tail = (self.tokenizer.decode([token]) if isinstance(token, int) else token) + tail
            if len(tail) >= len(rest):
                return place if tail.endswith(rest) else None
        return None


def context_of(model: dict) -> float:
    """The context's length in a server's description of a model (vLLM, SGLang: max_model_len; llama.cpp: n_ctx), else inf."""
    meta = model.get("meta")
    told = model.get("max_model_len") or (meta.get("n_ctx") if isinstance(meta, dict) else None)
    return told if isinstance(told, int) else math.inf


def load_served(config, k: int, force: bool, complete: bool = False, direct: bool = False) -> Sampler:
    """The sampler of --model at --server. config: data.ServedConfig."""
    if ranks.count() > 1:
        raise BadInput("--server: one process asks for all; leave torchrun out and raise --concurrency")
    tokenizer = load_tokenizer(config.tokenizer)
    prompt = load_prompt(config.prompt_file, Path(config.tokenizer) / PROMPT_FILE, direct)
    sampling = Sampling(k, config.temperature, config.top_p, config.max_new_tokens, config.seed, config.concurrency, force, complete)
    server = Server(config.server, read_key(config.api_key_env), config.timeout, config.retries, config.concurrency)
    models = server.models()
    if models is not None and config.model not in models:
        raise BadInput(f"{server.url}: no model {config.model!r}; --model may be {', '.join(sorted(models))}")
    room = len(tokenizer.encode("\n" + VERIFICATION)) + 1
    words = tuple(zip(yes_no_ids(tokenizer), (" Yes", " No")))
    engine = ServerEngine(server, config.model, words, sampling, context_of((models or {}).get(config.model, {})) - room)
    said = engine.probe(tokenizer.chat("Is 1 + 1 = 2?"))
    print(f"server: {server.url}, model {config.model}; {said}")
    return ServerSampler(engine, tokenizer, prompt, sampling, room)
