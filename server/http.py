"""JSON over HTTP, with patience: retries, deadlines, and many requests side by side."""
import json
import os
import random
import re
from collections import Counter
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from queue import SimpleQueue
from threading import BoundedSemaphore, Event, Lock, Thread
from time import monotonic
from typing import Any, Callable, Iterable, Iterator
from urllib.parse import SplitResult, urlsplit

from plumbing.errors import BadInput

CONNECT_TIMEOUT = 30.0  # seconds, for a connection and for the first answer
LONGEST_PAUSE = 60.0    # seconds between two tries, unless the server asks for more
LARGEST_ANSWER = 2 ** 30  # bytes

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


class Refused(BadInput):
    """The server understood and will not (400, 413, 422): the same request would be refused again."""


class NotFound(BadInput):
    """404: the model or the path."""


class Again(Exception):
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
        except Again as failure:
            if failure.kind in ("no connection", "timeout"):
                raise BadInput(f"{self.url}: no server answers there: {failure}; check the address, and that the server is up") from None
            answer = self.ask("/v1/models", None, lambda answer: answer)
        listed = answer.get("data") if isinstance(answer, dict) else None
        listed = [m for m in listed if isinstance(m, dict)] if isinstance(listed, list) else []
        return {str(model.get("id")): model for model in listed} or None

    def ask(self, path: str, body: dict | None, read: Callable[[Any], Any]) -> Any:
        """What `read` makes of the answer; it raises Again where that is broken. BadInput after the last try."""
        for attempt in range(self.retries + 1):
            try:
                return read(self._once(path, body, self.timeout))
            except Again as failure:
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
                raise Again("timeout", f"nothing for {timeout:g} s") from None
            except (OSError, HTTPException, UnicodeError) as error:
                raise Again(broken, self._clean(str(error) or type(error).__name__)) from None
            finally:
                connection.close()
        if response.status == 200:
            try:
                return json.loads(content)
            except (ValueError, RecursionError):
                raise Again("broken answer", "not JSON") from None
        self._fail(f"{self.url}{path}", response, content)

    def _fail(self, where: str, response: HTTPResponse, content: bytes) -> None:
        """Raise what a status other than 200 means."""
        status, said = response.status, self._said(content)
        if status in (408, 429) or status >= 500:
            after = response.getheader("Retry-After", "")
            raise Again(f"status {status}", said, float(after) if re.fullmatch(r"\d{1,6}(\.\d*)?", after) else 0.0)
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
            raise Again("broken answer", f"more than {LARGEST_ANSWER} bytes")
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
