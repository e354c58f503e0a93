"""The completions protocol: token ids in, K continuations out, and P(Yes) after a text.

A request for two analyses, and vLLM's answer:

    {"model": "judge", "prompt": [1, 2, 3], "n": 2, "max_tokens": 4096, "temperature": 0.95, "top_p": 0.95,
     "seed": 7, "logprobs": 20}

    {"choices": [{"index": 0, "text": " Yes", "finish_reason": "stop", "logprobs": {
        "tokens": ["token_id:9"], "top_logprobs": [{"token_id:9": -0.1, "token_id:4": -2.4}]}}, ...]}

Servers differ in how they name tokens, in the most that `n` and `logprobs` may be, in the fields that they
refuse, in whether log-probabilities are those before or after temperature, in whether they give those of the
tokens that one names, and one of them dies of a seed: see `ServerEngine.probe`.
"""
import math
import re
from functools import partial
from threading import Lock
from typing import Any, Iterable, NamedTuple

from plumbing.errors import BadInput
from rprm import Sampling
from server.http import Again, Refused, Server
from server.jobs import side_by_side

STANDARD_TOP = 5  # top log-probabilities that the protocol promises
TOP = 20  # those that vLLM gives unless it is told otherwise
IMPOSSIBLE = -1000  # or less: servers show an impossible token with null, -inf, -9999 or the least float
METRICS = "/metrics"  # vLLM's page of metrics, which lists the settings of its cache
# Fields beyond the protocol. The nucleus alone decides, whatever defaults the server or the model has. Tokens
# are named by id (vLLM; llama.cpp always does so). Servers ignore fields that they do not know, or refuse the
# request.
EXTRAS = {
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "repeat_penalty": 1.0,
    "return_tokens_as_token_ids": True,
}

Token = int | str  # its id if the server tells it, else its text
TopLogprobs = dict[Token, float]  # log-probabilities of the most likely tokens


# ------------------------------------------------------------------------------------------ reading an answer

class Choice(NamedTuple):
    """One continuation."""
    text: str
    tokens: list[Token]
    top: list[TopLogprobs] | None  # one for each token; None: not given
    finished: bool  # False: cut off at max_tokens


NOTHING = Choice("", [], None, finished=True)  # a continuation of no tokens


def read_choices(answer: Any) -> list[Choice]:
    """The choices of an answer, in order. Raises Again if the answer is not what the protocol promises."""
    try:
        in_order = sorted(answer["choices"], key=lambda raw: raw.get("index", 0))
        return [_read_choice(raw) for raw in in_order]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Again("broken answer", f"{type(error).__name__} {str(error)[:60]}") from None


def _read_choice(raw: dict) -> Choice:
    text = raw["text"]
    reason = raw["finish_reason"]
    if not isinstance(text, str) or reason not in ("stop", "length"):
        raise ValueError(f"finish_reason {reason!r}")
    tokens, top = _read_logprobs(raw.get("logprobs"))
    if top is None and not text:
        top = []  # no tokens, so none without log-probabilities
    if top is not None and len(tokens) != len(top):
        raise ValueError(f"{len(tokens)} tokens, {len(top)} log-probabilities")
    return Choice(text, tokens, top, finished=reason == "stop")


def _read_logprobs(logprobs: dict | None) -> tuple[list[Token], list[TopLogprobs] | None]:
    """The tokens and the top log-probabilities of each."""
    if not logprobs:
        return [], None
    if "content" in logprobs:  # llama.cpp answers as in a chat
        content = logprobs["content"]
        tokens = [_token_in_chat(entry) for entry in content]
        top = [_top((_token_in_chat(likely), likely["logprob"]) for likely in entry["top_logprobs"])
               for entry in content]
    else:
        tokens = [_token(name) for name in logprobs["tokens"]]
        top = [_top((_token(name), logprob) for name, logprob in (likely or {}).items())
               for likely in logprobs["top_logprobs"]]
    return tokens, top


def _token(name: str) -> Token:
    """vLLM's "token_id:7" is the id 7; any other name is the token's text."""
    match = re.fullmatch(r"token_id:(\d+)", name)
    return int(match[1]) if match else name


def _token_in_chat(entry: dict) -> Token:
    return entry.get("id", entry["token"])


def _top(pairs: Iterable[tuple[Token, float | None]]) -> TopLogprobs:
    """The log-probabilities by token, without those of impossible tokens."""
    found = {}
    for token, logprob in pairs:
        if logprob is not None and float(logprob) > IMPOSSIBLE:
            found[token] = float(logprob)
    return found


# ---------------------------------------------------------------------------------------------- P(Yes)

class YesNo:
    """P(Yes) from the top log-probabilities of one token; counts where it is not exact.

    yes and no are the names of the words: (id, text). If one is missing among the top log-probabilities, it
    counts as likely as the least likely token shown. It is no likelier, so P(Yes) lies between the true value
    and 0.5, unless that token is the other word, drawn from beyond the top: then P(Yes) is 0.5. If both are
    missing, P(Yes) is None.
    """

    def __init__(self, yes: tuple[int, str], no: tuple[int, str]):
        self.yes = yes
        self.no = no
        self.bounded = 0  # how often one word was missing
        self.widest_bound = 0.0  # how far P(Yes) may be off there, at most
        self.unknown = 0  # how often both were missing
        self.lock = Lock()  # of the counters

    def has(self, token: Token) -> bool:
        """Is a token, by its id or its text, one of the two words?"""
        return token in self.yes or token in self.no

    def p_yes(self, top: TopLogprobs) -> float | None:
        """P(Yes) / (P(Yes) + P(No))."""
        yes = _find(self.yes, top)
        no = _find(self.no, top)
        if yes is None and no is None:
            with self.lock:
                self.unknown += 1
            return None
        if yes is not None and no is not None:
            return sigmoid(yes - no)
        least = min(top.values())
        shown = yes if no is None else no
        p_missing = sigmoid(least - shown)
        with self.lock:
            self.bounded += 1
            self.widest_bound = max(self.widest_bound, p_missing)
        return 1 - p_missing if no is None else p_missing


def _find(names: tuple[int, str], top: TopLogprobs) -> float | None:
    token_id, text = names
    return top.get(token_id, top.get(text))


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), in a form that cannot overflow."""
    return 0.5 + 0.5 * math.tanh(x / 2)


# ---------------------------------------------------------------------------------------------- the engine

class ServerEngine:
    """Token ids in, K continuations out, and P(Yes) after a text: what `generate.Engine` is for a model here.

    max_positions: those that may be used; inf if the server does not tell.
    """

    def __init__(self, server: Server, model: str, yes_no: YesNo, sampling: Sampling, max_positions: float):
        self.server = server
        self.model = model
        self.yes_no = yes_no
        self.sampling = sampling
        self.max_positions = max_positions
        self.new_tokens = 0
        self.refusal = ""  # what the server said when it refused to read P(Yes)
        self.lock = Lock()  # of the counter
        # what the server can do, which `probe` finds out
        self.extras = EXTRAS  # the fields beyond the protocol that it takes
        self.top = TOP  # the log-probabilities that it gives
        self.per_request = sampling.k  # the analyses that one request may ask for
        self.seeded = True  # requests carry a seed, so that a run can be repeated
        self.raw = True  # log-probabilities are the model's own, before temperature and top-p
        self.has_logprobs = False  # seen so far: an answer without them is broken

    # ------------------------------------------------------------------------------------------ trying it out

    def probe(self, prompt: list[int]) -> str:
        """Try out what the server can do, with a few tokens. -> what to print of it.

        Raises BadInput if P(Yes) cannot be known.
        """
        self.seeded = takes_seeds(self.server)  # first: a request might kill it
        first = self._find_fields(prompt)
        if not first.top or not first.top[0]:
            raise BadInput(f"{self.server.url}: the answer has no log-probabilities, so P(Yes) is unknown; "
                           "let the server give `logprobs`")
        self.has_logprobs = True
        choices = self._find_per_request(prompt)
        at_one = first.top[0]
        at_two = choices[0].top[0] if choices[0].top else {}
        self.raw = _are_alike(at_one, at_two)
        where = "after temperature: P(Yes) is read with requests of its own, at 1"
        if self.raw:
            where = "read where the verdict is sampled"
        which = f"top {self.top} log-probabilities"
        if self.extras and self._gives_named_tokens(prompt, len(at_one)):
            self.extras = self.extras | self._named_tokens()
            which = "log-probabilities of Yes and No themselves"
        said = f"{which}, {where}; analyses a request: {self.per_request}"
        if not self.extras:
            said += "; it refuses further fields, so its own top-k, min-p and penalties apply"
        if not self.seeded and self.sampling.temperature:
            said += ("; without seeds, as vLLM on a CPU dies of one where it cuts a prompt: "
                     "another run gives other analyses (docs/server.md has a remedy)")
        return said

    def _named_tokens(self) -> dict[str, list[int]]:
        """vLLM's field for the tokens whose log-probabilities are wanted in place of the top ones."""
        return {"logprob_token_ids": [self.yes_no.yes[0], self.yes_no.no[0]]}

    def _gives_named_tokens(self, prompt: list[int], n_top: int) -> bool:
        """Does the server give the log-probabilities of Yes and No, and of the drawn token, alone?

        A server that does not know the field refuses the request, or gives as many top ones as without it.
        """
        try:
            choice = self._next_token(prompt, self._named_tokens())
        except Refused:
            return False
        shown = choice.top[0] if choice.top else {}
        return {self.yes_no.yes[0], self.yes_no.no[0]} <= shown.keys() and len(shown) <= 3 < n_top

    def _find_fields(self, prompt: list[int]) -> Choice:
        """Find the fields that the server takes. -> a token at temperature 1."""
        for extras, top in ((EXTRAS, TOP), (EXTRAS, STANDARD_TOP)):
            self.extras = extras
            self.top = top
            try:
                return self._next_token(prompt)
            except Refused:
                continue
        self.extras = {}
        return self._next_token(prompt)

    def _find_per_request(self, prompt: list[int]) -> list[Choice]:
        """Find how many analyses a request may ask for. -> so many choices, at temperature 2."""
        n = self.sampling.k if self.sampling.temperature else 1
        while True:
            try:
                choices = self._complete(prompt, n=n, max_tokens=16, temperature=2.0, top_p=1.0, seed=0)
                break
            except Refused:  # llama.cpp gives one request no more than it has slots
                if n == 1:
                    raise
                n //= 2
        texts = {choice.text for choice in choices}
        has_one_seed_for_all = len(choices) > 1 and len(texts) == 1
        self.per_request = 1 if has_one_seed_for_all else min(n, len(choices))
        return choices

    # ----------------------------------------------------------------------------------------- what it is for

    def sample(self, prompt: list[int], seeds: list[int]) -> list[Choice]:
        """A continuation for each seed. Greedy ones are all the same, so one is asked for."""
        if self.sampling.max_new_tokens == 0:
            return [NOTHING] * len(seeds)
        wanted = seeds if self.sampling.temperature else seeds[:1]
        groups = [wanted[i:i + self.per_request] for i in range(0, len(wanted), self.per_request)]
        requests = [partial(self._sample_group, prompt, group) for group in groups]
        choices = [choice for group in side_by_side(requests, len(groups)) for choice in group]
        with self.lock:
            self.new_tokens += sum(len(choice.tokens) for choice in choices)
        return choices * (len(seeds) // len(choices))

    def _sample_group(self, prompt: list[int], seeds: list[int]) -> list[Choice]:
        """A continuation for each seed, in one request if the server gives as many as are asked for."""
        s = self.sampling
        max_tokens = min(s.max_new_tokens, self.max_positions - len(prompt))
        choices = []
        while len(choices) < len(seeds):
            choices += self._complete(prompt, n=len(seeds) - len(choices), max_tokens=max_tokens,
                                      temperature=s.temperature, top_p=s.top_p, seed=seeds[len(choices)])
        return choices

    def read_p_yes(self, texts: list[list[int]]) -> list[float | None]:
        """P(Yes) against P(No) after each text, by a request of one token. None where it cannot be known."""
        requests = [partial(self._read_p_yes_after, ids) for ids in texts]
        return side_by_side(requests, self.server.concurrency)

    def _read_p_yes_after(self, ids: list[int]) -> float | None:
        top: TopLogprobs = {}
        try:
            choice = self._next_token(ids)
            top = choice.top[0] if choice.top else {}
        except Refused as error:  # the text fills the context
            self.refusal = str(error)
        return self.yes_no.p_yes(top)

    def tally(self) -> str:
        """What a reader of the results should know, for the end of a run."""
        repeated = self.server.repeated
        said = f"server: {sum(repeated.values())} requests tried again"
        for kind, n in sorted(repeated.items()):
            said += f", {kind}: {n}"
        said += f"; P(Yes) bounded {self.yes_no.bounded}"
        if self.yes_no.bounded:
            said += f" (one word not among the top {self.top}; at most {self.yes_no.widest_bound:.1e} off)"
        said += f", unknown {self.yes_no.unknown}"
        if self.yes_no.unknown:
            refused = f"; or refused, as {self.refusal}" if self.refusal else ""
            said += f" (neither word there{refused})"
        return said

    # ------------------------------------------------------------------------------------------ one request

    def _next_token(self, prompt: list[int], fields: dict[str, Any] | None = None) -> Choice:
        """One token more, at temperature 1, with its top log-probabilities. fields: further ones to try."""
        return self._complete(prompt, n=1, max_tokens=1, temperature=1.0, top_p=1.0, seed=0, fields=fields)[0]

    def _complete(self, prompt: list[int], n: int, max_tokens: int, temperature: float, top_p: float,
                  seed: int, fields: dict[str, Any] | None = None) -> list[Choice]:
        """Up to n choices, at least one."""
        body = self.extras | (fields or {}) | {
            "model": self.model,
            "prompt": prompt,
            "n": n,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "logprobs": self.top,
        }
        if self.seeded:
            body["seed"] = seed % 2 ** 31
        return self.server.ask("/v1/completions", body, lambda answer: self._check(read_choices(answer)[:n]))

    def _check(self, choices: list[Choice]) -> list[Choice]:
        if not choices:
            raise Again("broken answer", "no choices")
        if self.has_logprobs and any(choice.top is None for choice in choices):
            raise Again("broken answer", "no log-probabilities")
        return choices


def takes_seeds(server: Server) -> bool:
    """May a request have a seed? Read from a page, as a vLLM on a CPU may die of one."""
    return not is_vllm_on_cpu(server.read_page(METRICS))


def is_vllm_on_cpu(metrics: str | None) -> bool:
    """Is this page of metrics one of a vLLM that computes on a CPU?

    Its engine dies of a seed where it computes a prompt in more than one step (chunked prefill: the prompts
    that wait are longer together than --max-num-batched-tokens). It then asks the seed's generator for its
    offset, and one on a CPU has none (vLLM 0.32). No page tells what it computes on; but the blocks of its
    cache have 128 tokens if nobody chose another size, and on a GPU 16.
    """
    line = re.search(r"^vllm:cache_config_info\{(.*)\}", metrics or "", re.M)
    signs = {'block_size="128"', 'user_specified_block_size="False"'}
    return line is not None and signs <= set(line[1].split(","))


def _are_alike(first: TopLogprobs, second: TopLogprobs) -> bool:
    """Are the log-probabilities of the tokens that both have the same, with two such tokens at least?"""
    both = first.keys() & second.keys()
    return len(both) > 1 and all(abs(first[token] - second[token]) < 0.25 for token in both)
