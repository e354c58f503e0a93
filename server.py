"""A model behind a server: K analyses and P(Yes) from an OpenAI-compatible completions endpoint (vLLM, SGLang, llama.cpp).

    vllm serve MODEL --served-model-name judge
    python score.py --server http://localhost:8000 --model judge --tokenizer FOLDER --input gsm8k.json --out scores.jsonl

The chat template is rendered here, with the tokenizer of FOLDER (no weights needed), and prompts travel as token ids: no
text in them can become a special token, and no server adds a second begin-of-text token. P(Yes) comes from the top
log-probabilities at the verdict. What the server can do is tried out before the first case, not assumed.
"""
import json
import math
import os
import random
import re
from collections import Counter
from dataclasses import dataclass, fields, replace
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from queue import SimpleQueue
from threading import BoundedSemaphore, Event, Lock, Thread
from time import monotonic
from typing import Annotated, Any, Callable, Iterable, Iterator, NamedTuple
from urllib.parse import SplitResult, urlsplit

import ranks
import rprm
from checkpoint import PROMPT_FILE, ChatTokenizer, load_tokenizer
from cli import BadInput
from rprm import Analysis, Case, Prompt, Sampler, SamplerConfig, Sampling, load_prompt, parse_verdict, row_seed, verdict_letter, yes_no_ids

CONNECT_TIMEOUT = 30.0  # seconds, for a connection and for the first answer
LONGEST_PAUSE = 60.0    # seconds between two tries, unless the server asks for more
LARGEST_ANSWER = 2 ** 30  # bytes
STANDARD_TOP = 5        # top log-probabilities that the protocol promises
TOP = 20                # and what vLLM gives unless it is told otherwise
# Beyond the protocol: the nucleus alone decides, whatever the server's or the model's own defaults are; and tokens are
# named by id (vLLM; llama.cpp always does). Servers ignore what they do not know; one that refuses gets the protocol alone.
EXTRAS = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "repeat_penalty": 1.0, "return_tokens_as_token_ids": True}


@dataclass(frozen=True, kw_only=True)
class ServedConfig(SamplerConfig):
    """The flags of everything that samples from a checkpoint here or from a model behind a server."""
    model: Annotated[str, "checkpoint: a Hugging Face folder; with --server: the model's name there"]
    rank_timeout: Annotated[float, "seconds after which the other ranks give up one that shows no sign of work", (1, 10 ** 9)] = 1800.0
    server: Annotated[str | None, "URL of an OpenAI-compatible server (vLLM, SGLang, llama.cpp) that samples instead"] = None
    tokenizer: Annotated[str | None, "with --server: folder with the model's tokenizer and chat template (no weights needed)"] = None
    concurrency: Annotated[int, "with --server: requests under way at a time", (1, None)] = 16
    timeout: Annotated[float, "with --server: seconds to wait for an answer", (0.1, None)] = 600.0
    retries: Annotated[int, "with --server: further tries after 429, 5xx, a timeout or a broken answer", (0, None)] = 6
    api_key_env: Annotated[str | None, "with --server: NAME of the environment variable that holds its key"] = None

    def __post_init__(self):
        """BadInput where flags do not go together, before anything is printed or saved (a key must not be)."""
        set_to = {field.name for field in fields(self) if getattr(self, field.name) != field.default}
        here, there = ("batch_size", "dtype", "device"), ("tokenizer", "concurrency", "timeout", "retries", "api_key_env")
        for name in there if self.server is None else here:
            if name in set_to:
                raise BadInput(f"--{name.replace('_', '-')} " + ("needs --server; give both or neither" if self.server is None else
                                                                "has no meaning with --server, where the server decides; leave it out"))
        if self.server is not None:
            parse_url(self.server)
            read_key(self.api_key_env)
            if self.tokenizer is None:
                raise BadInput("--server needs --tokenizer FOLDER, with the model's tokenizer.json and chat template (no weights needed)")


def parse_url(url: str) -> SplitResult:
    """The parts of a server's address. "/v1" and "/v1/completions" at its end may be left out."""
    if re.search(r"[@?#]", url):  # and do not show it: there may be a password in it
        raise BadInput("--server: give the address alone, as http://HOST:PORT; a key goes into an environment variable (--api-key-env)")
    try:
        parts = urlsplit(re.sub(r"/*(/v1)?(/completions)?/*$", "", url))
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:
        known = False
    if not known or not re.fullmatch(r"[!-~]+", url):
        raise BadInput(f"--server {url!r}: not an address; give it as http://HOST:PORT")
    return parts


def read_key(name: str | None) -> str | None:
    """The key in the environment variable `name`. The messages show neither: the key may stand in the wrong place."""
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise BadInput("--api-key-env: give the NAME of an environment variable that is set, not the key itself")
    if not re.fullmatch(r"[!-~]+", key):
        raise BadInput("--api-key-env: the variable's value has characters that no key has (blanks or beyond ASCII); set it anew")
    return key


# ---------------------------------------------------------------------------------------------- HTTP, with patience

class Refused(BadInput):
    """The server understood and will not (400, 413, 422): the same request would be refused again."""


class NotFound(BadInput):
    """404: the model or the path."""


class _Again(Exception):
    """A failure that may pass. kind: for counting; after: seconds that the server asks to wait."""

    def __init__(self, kind: str, detail: str = "", after: float = 0.0):
        super().__init__(f"{kind} ({detail})" if detail else kind)
        self.kind, self.after = kind, after


class Server:
    """JSON over HTTP, asked by many threads; at most `concurrency` requests are under way at a time.

    Straight to the address: no proxy of the environment and no redirection, so that the key goes nowhere else.
    `repeated` counts why requests were tried again.
    """

    def __init__(self, url: str, key: str | None, timeout: float, retries: int, concurrency: int):
        self.address, self.key, self.timeout, self.retries, self.concurrency = parse_url(url), key, timeout, retries, concurrency
        self.url = self.address.geturl()
        self.slots = BoundedSemaphore(concurrency)
        self.stopped = Event()
        self.pause: Callable[[float], Any] = self.stopped.wait  # seconds
        self.repeated: Counter[str] = Counter()
        self.lock = Lock()  # of the counter

    def models(self) -> dict[str, dict] | None:
        """name -> description of the models that the server lists; None where it keeps no list. BadInput if nobody answers."""
        try:
            answer = self._once("/v1/models", None, CONNECT_TIMEOUT)
        except (Refused, NotFound):
            return None
        except _Again as failure:
            if failure.kind in ("no connection", "timeout"):
                raise BadInput(f"{self.url}: no server answers there: {failure}; check the address, and that the server is up") from None
            answer = self.ask("/v1/models", None, lambda answer: answer)
        listed = answer.get("data") if isinstance(answer, dict) else None
        listed = [m for m in listed if isinstance(m, dict)] if isinstance(listed, list) else []
        return {str(model.get("id")): model for model in listed} or None

    def ask(self, path: str, body: dict | None, read: Callable[[Any], Any]) -> Any:
        """What `read` makes of the answer; it raises _Again where that is broken. BadInput after the last try."""
        for attempt in range(self.retries + 1):
            try:
                return read(self._once(path, body, self.timeout))
            except _Again as failure:
                last = failure
            if self.stopped.is_set() or attempt == self.retries:
                break
            with self.lock:
                self.repeated[last.kind] += 1
            self.pause(max(min(LONGEST_PAUSE, 2.0 ** attempt) * random.uniform(0.5, 1), min(last.after, self.timeout)))
        raise BadInput(f"{self.url}{path}: {last}, {attempt + 1} times in a row; look at the server, and see --timeout, --concurrency and "
                       "--retries (what is in --out stays: --resume goes on)")

    def _once(self, path: str, body: dict | None, timeout: float) -> Any:
        kind = HTTPSConnection if self.address.scheme == "https" else HTTPConnection
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        with self.slots:
            connection = kind(self.address.hostname, self.address.port, timeout=min(timeout, CONNECT_TIMEOUT))
            broken = "no connection"
            try:
                connection.connect()
                broken = "connection lost"
                connection.sock.settimeout(timeout)
                connection.request("POST" if body else "GET", self.address.path + path, body and json.dumps(body), headers)
                response = connection.getresponse()
                content = _content(response, monotonic() + timeout)
            except TimeoutError:
                raise _Again("timeout", f"nothing for {timeout:g} s") from None
            except (OSError, HTTPException, UnicodeError) as error:
                raise _Again(broken, self._clean(str(error) or type(error).__name__)) from None
            finally:
                connection.close()
        if response.status == 200:
            try:
                return json.loads(content)
            except (ValueError, RecursionError):
                raise _Again("broken answer", "not JSON") from None
        self._fail(f"{self.url}{path}", response, content)

    def _fail(self, where: str, response: HTTPResponse, content: bytes) -> None:
        """Raise what a status other than 200 means."""
        status, said = response.status, self._said(content)
        if status in (408, 429) or status >= 500:
            after = response.getheader("Retry-After", "")
            raise _Again(f"status {status}", said, float(after) if re.fullmatch(r"\d{1,6}(\.\d*)?", after) else 0.0)
        if status in (401, 403):
            remedy = "set the variable of --api-key-env to the right one" if self.key else "name the variable that holds it: --api-key-env"
            raise BadInput(f"{where}: status {status}, the server refuses the key ({said}); {remedy}")
        if status == 404:
            raise NotFound(f"{where}: status 404, no such model or path ({said}); check --server and --model")
        if 300 <= status < 400:
            raise BadInput(f"{where}: moved to {self._clean(response.getheader('Location', '?'))}; give that address as --server")
        raise Refused(f"{where}: status {status}, the server refuses the request ({said})")

    def _said(self, content: bytes) -> str:
        """The server's own words for an error."""
        text = content.decode("utf-8", "replace")
        try:
            value = json.loads(text)
            for name in ("error", "message", "detail"):
                value = value.get(name, value) if isinstance(value, dict) else value
            text = value if isinstance(value, str) else text
        except (ValueError, RecursionError):
            pass
        return self._clean(text)

    def _clean(self, text: str) -> str:
        """A stranger's text for our messages: without the key, on one line, and short."""
        text = (text.replace(self.key, "***") if self.key else text)[:10000]
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:200] or "no reason given"


def _content(response: HTTPResponse, deadline: float) -> bytes:
    """The whole body. TimeoutError past the deadline, also where a byte comes now and then."""
    content = bytearray()
    while piece := response.read1(2 ** 16):
        content += piece
        if monotonic() > deadline:
            raise TimeoutError
        if len(content) > LARGEST_ANSWER:
            raise _Again("broken answer", f"more than {LARGEST_ANSWER} bytes")
    return bytes(content)


def side_by_side(jobs: Iterable[Callable[[], Any] | None], limit: int) -> Iterator[tuple[int, Any]]:
    """(number of the job, what it returns), as they are done; at most `limit` run at a time, each in a thread of its own.

    Where `jobs` gives None, it has nothing at present and is asked again after the next result. The threads are
    daemons: an exception or Ctrl-C ends the program without waiting for answers.
    """
    jobs, done, running, started = iter(jobs), SimpleQueue(), 0, 0

    def work(number: int, job: Callable[[], Any]) -> None:
        try:
            done.put((number, job(), None))
        except BaseException as error:  # it belongs to the one who waits for the result
            done.put((number, None, error))

    while True:
        while running < limit and (job := next(jobs, None)) is not None:
            Thread(target=work, args=(started, job), daemon=True).start()
            running, started = running + 1, started + 1
        if not running:
            return
        number, result, error = done.get()
        running -= 1
        if error is not None:
            raise error
        yield number, result


# ---------------------------------------------------------------------------------------------- the completions protocol

class Choice(NamedTuple):
    """One continuation. Tokens are ids where the server tells them, else texts."""
    text: str
    tokens: list[int | str]
    top: list[dict[int | str, float]] | None  # per token: log-probabilities of the most likely ones; None: not given
    finished: bool                            # False: cut off at max_tokens


def read_choices(answer: Any) -> list[Choice]:
    """The choices of an answer, in order. _Again where it is not what the protocol promises."""
    try:
        return [_read_choice(raw) for raw in sorted(answer["choices"], key=lambda raw: raw.get("index", 0))]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _Again("broken answer", f"{type(error).__name__} {str(error)[:60]}") from None


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
                raise _Again("broken answer", "no log-probabilities" if choices else "no choices")
            return choices
        return self.server.ask("/v1/completions", self.extras | {
            "model": self.model, "prompt": prompt, "n": n, "max_tokens": max_tokens, "temperature": temperature, "top_p": top_p,
            "seed": seed % 2 ** 31, "logprobs": self.top}, read)


# ---------------------------------------------------------------------------------------------- the sampler

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


def load_sampler(config: ServedConfig, k: int, force: bool, complete: bool = False, direct: bool = False) -> Sampler:
    """The sampler of a checkpoint folder, or with --server that of the model there."""
    if config.server is None:
        return rprm.load_sampler(config, k, force, complete, direct)
    if ranks.count() > 1:
        raise BadInput("--server: one process asks for all; leave torchrun out and raise --concurrency")
    tokenizer = load_tokenizer(config.tokenizer)
    prompt = load_prompt(config.prompt_file, Path(config.tokenizer) / PROMPT_FILE, direct)
    sampling = Sampling(k, config.temperature, config.top_p, config.max_new_tokens, config.seed, config.concurrency, force, complete)
    server = Server(config.server, read_key(config.api_key_env), config.timeout, config.retries, config.concurrency)
    models = server.models()
    if models is not None and config.model not in models:
        raise BadInput(f"{server.url}: no model {config.model!r}; --model may be {', '.join(sorted(models))}")
    room = len(tokenizer.encode("\n" + rprm.VERIFICATION)) + 1
    words = tuple(zip(yes_no_ids(tokenizer), (" Yes", " No")))
    engine = ServerEngine(server, config.model, words, sampling, context_of((models or {}).get(config.model, {})) - room)
    said = engine.probe(tokenizer.chat("Is 1 + 1 = 2?"))
    print(f"server: {server.url}, model {config.model}; {said}")
    return ServerSampler(engine, tokenizer, prompt, sampling, room)
