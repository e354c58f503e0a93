"""The completions protocol: token ids in, K continuations out, and P(Yes) at a place."""
import math
import re
from functools import partial
from threading import Lock
from typing import Any, Iterable, NamedTuple

from plumbing.errors import BadInput
from rprm import Sampling
from server.http import Again, Refused, Server, side_by_side

STANDARD_TOP = 5        # top log-probabilities that the protocol promises
TOP = 20                # and what vLLM gives unless it is told otherwise
# Beyond the protocol: the nucleus alone decides, whatever the server's or the model's own defaults are; and tokens are
# named by id (vLLM; llama.cpp always does). Servers ignore what they do not know; one that refuses gets the protocol alone.
EXTRAS = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "repeat_penalty": 1.0, "return_tokens_as_token_ids": True}


class Choice(NamedTuple):
    """One continuation. Tokens are ids where the server tells them, else texts."""
    text: str
    tokens: list[int | str]
    top: list[dict[int | str, float]] | None  # per token: log-probabilities of the most likely ones; None: not given
    finished: bool                            # False: cut off at max_tokens


def read_choices(answer: Any) -> list[Choice]:
    """The choices of an answer, in order. Again where it is not what the protocol promises."""
    try:
        return [_read_choice(raw) for raw in sorted(answer["choices"], key=lambda raw: raw.get("index", 0))]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Again("broken answer", f"{type(error).__name__} {str(error)[:60]}") from None


def _read_choice(raw: dict) -> Choice:
    text, logprobs = raw["text"], raw.get("logprobs")
    if not isinstance(text, str) or raw["finish_reason"] not in ("stop", "length"):
        raise ValueError(f"finish_reason {raw['finish_reason']!r}")
    if not logprobs:
        tokens, top = [], None if text else []
    elif "content" in logprobs:  # llama.cpp answers in the chat form
        tokens = [entry.get("id", entry["token"]) for entry in logprobs["content"]]
        top = [_top((t.get("id", t["token"]), t["logprob"]) for t in entry["top_logprobs"]) for entry in logprobs["content"]]
    else:
        tokens = [_token(name) for name in logprobs["tokens"]]
        top = [_top((_token(name), logprob) for name, logprob in (entry or {}).items()) for entry in logprobs["top_logprobs"]]
    if top is not None and len(tokens) != len(top):
        raise ValueError(f"{len(tokens)} tokens, {len(top)} log-probabilities")
    return Choice(text, tokens, top, raw["finish_reason"] == "stop")


def _token(name: str) -> int | str:
    """vLLM's "token_id:7" is the id 7; any other name is the token's text."""
    match = re.fullmatch(r"token_id:(\d+)", name)
    return int(match[1]) if match else name


def _top(pairs: Iterable[tuple[int | str, float | None]]) -> dict[int | str, float]:
    """Without the impossible tokens, which servers show as null, -inf, -9999 or the least float."""
    return {name: float(logprob) for name, logprob in pairs if logprob is not None and float(logprob) > -1000}


class ServerEngine:
    """Token ids in, K continuations out, and P(Yes) at a place: what `generate.Engine` is here, from a server.

    words: (id, text) of " Yes" and " No". context: the positions that may be used; inf where the server does not tell.
    The counters say what was asked for, and how P(Yes) was known.
    """

    def __init__(self, server: Server, model: str, words: tuple[tuple[int, str], tuple[int, str]], sampling: Sampling, context: float):
        self.server, self.model, self.words, self.sampling, self.context = server, model, words, sampling, context
        self.extras, self.top, self.per_request = EXTRAS, TOP, sampling.k
        self.raw = True          # log-probabilities are the model's own, before temperature and top-p
        self.has_logprobs = False  # seen so far
        self.new_tokens = 0
        self.bounded, self.unknown, self.widest_bound, self.refusal = 0, 0, 0.0, ""
        self.lock = Lock()  # of the counters

    def probe(self, prompt: list[int]) -> str:
        """Try out what the server can do, with a few tokens, and say it. BadInput where P(Yes) cannot be had."""
        for self.extras, self.top in ((EXTRAS, TOP), (EXTRAS, STANDARD_TOP), ({}, STANDARD_TOP)):
            try:
                first = self._complete(prompt, 1, 1, 1.0, 1.0, 0)[0]
                break
            except Refused:
                if not self.extras:
                    raise
        if not first.top or not first.top[0]:
            raise BadInput(f"{self.server.url}: the answer has no log-probabilities, so P(Yes) is unknown; let the server give `logprobs`")
        self.has_logprobs = True
        n = self.sampling.k if self.sampling.temperature else 1
        while True:
            try:
                hot = self._complete(prompt, n, 16, 2.0, 1.0, 0)
                break
            except Refused:  # llama.cpp gives one request no more than it has slots
                if n == 1:
                    raise
                n //= 2
        alike = len(hot) > 1 and len({choice.text for choice in hot}) == 1  # one seed for all of them
        self.per_request = 1 if alike else min(n, len(hot))
        cold, warm = first.top[0], hot[0].top[0] if hot[0].top else {}  # at temperatures 1 and 2
        both = cold.keys() & warm.keys()
        self.raw = len(both) > 1 and all(abs(cold[token] - warm[token]) < 0.25 for token in both)
        return (f"top {self.top} log-probabilities, "
                + ("read where the verdict is sampled" if self.raw else "after temperature: P(Yes) is read with requests of its own, at 1")
                + f"; analyses a request: {self.per_request}"
                + ("" if self.extras else "; it refuses further fields, so its own top-k, min-p and penalties apply"))

    def sample(self, prompt: list[int], seeds: list[int]) -> list[Choice]:
        """A continuation per seed. Greedy ones are all the same, so one is asked for."""
        s, wanted = self.sampling, seeds if self.sampling.temperature else seeds[:1]
        most = min(s.max_new_tokens, self.context - len(prompt))

        def some(seeds: list[int]) -> list[Choice]:
            found = []
            while len(found) < len(seeds):  # a server may give fewer than n
                found += self._complete(prompt, len(seeds) - len(found), most, s.temperature, s.top_p, seeds[len(found)])
            return found
        groups = [wanted[i:i + self.per_request] for i in range(0, len(wanted), self.per_request)]
        found = dict(side_by_side((partial(some, group) for group in groups), len(groups)))
        choices = [choice for i in range(len(groups)) for choice in found[i]]
        with self.lock:
            self.new_tokens += sum(len(choice.tokens) for choice in choices)
        return choices * (len(seeds) // len(choices))

    def read_p_yes(self, texts: list[list[int]]) -> list[float | None]:
        """P(Yes) against P(No) after each text: a request of one token each, at temperature 1. None where it cannot be known."""
        found = dict(side_by_side((partial(self._read_one, ids) for ids in texts), self.server.concurrency))
        return [found[i] for i in range(len(texts))]

    def _read_one(self, ids: list[int]) -> float | None:
        try:
            choice = self._complete(ids, 1, 1, 1.0, 1.0, 0)[0]
        except Refused as error:  # what stands before the verdict fills the context
            self.refusal = str(error)
            return self.p_yes({})
        return self.p_yes(choice.top[0] if choice.top else {})

    def p_yes(self, top: dict[int | str, float]) -> float | None:
        """P(Yes) / (P(Yes) + P(No)) from the top log-probabilities of one place.

        One of the two words absent: it counts as likely as the least likely token shown. It is no likelier, so the value
        lies between the true one and 0.5, unless that token is the word that was drawn, from beyond the top: then the value
        is 0.5. Both absent: None. Either is counted.
        """
        yes, no = (top.get(token_id, top.get(text)) for token_id, text in self.words)
        if yes is None and no is None:
            with self.lock:
                self.unknown += 1
            return None
        if yes is not None and no is not None:
            return 0.5 + 0.5 * math.tanh((yes - no) / 2)
        shown = yes if no is None else no
        odds = 0.5 + 0.5 * math.tanh((min(top.values()) - shown) / 2)  # of the absent one
        with self.lock:
            self.bounded += 1
            self.widest_bound = max(self.widest_bound, odds)
        return 1 - odds if no is None else odds

    def tally(self) -> str:
        """What a reader of the results should know, for the end of a run."""
        said = f"server: {sum(self.server.repeated.values())} requests tried again"
        said += "".join(f", {kind}: {n}" for kind, n in sorted(self.server.repeated.items()))
        said += f"; P(Yes) bounded {self.bounded}"
        if self.bounded:
            said += f" (one word not among the top {self.top}; at most {self.widest_bound:.1e} off)"
        said += f", unknown {self.unknown}"
        if self.unknown:
            said += f" (neither word there{f'; or refused, as {self.refusal}' if self.refusal else ''})"
        return said

    def _complete(self, prompt: list[int], n: int, max_tokens: int, temperature: float, top_p: float, seed: int) -> list[Choice]:
        """Up to n choices, at least one."""
        def read(answer: Any) -> list[Choice]:
            choices = read_choices(answer)[:n]
            if not choices or self.has_logprobs and any(choice.top is None for choice in choices):
                raise Again("broken answer", "no log-probabilities" if choices else "no choices")
            return choices
        return self.server.ask("/v1/completions", self.extras | {
            "model": self.model, "prompt": prompt, "n": n, "max_tokens": max_tokens, "temperature": temperature, "top_p": top_p,
            "seed": seed % 2 ** 31, "logprobs": self.top}, read)
