"""JSON over HTTP, with patience: an answer is asked for again as long as the failure may pass.

    server = Server("http://localhost:8000", key=None, timeout=600.0, retries=6, concurrency=16)
    choices = server.ask("/v1/completions", {"model": "judge", "prompt": [1, 2, 3]}, read_choices)

What may pass: no connection, a lost one, a timeout, status 408, 429 or 5xx, an answer that is no JSON or that
`read_choices` finds broken. Everything else ends the program with one line.
"""
import json
import random
import re
from collections import Counter
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from threading import BoundedSemaphore, Event, Lock
from time import monotonic
from typing import Any, Callable

from plumbing.address import parse_url
from plumbing.errors import BadInput

CONNECT_TIMEOUT = 30.0  # seconds, for a connection and for the first answer
LONGEST_PAUSE = 60.0  # seconds between two tries, unless the server asks for more
LARGEST_ANSWER = 2 ** 30  # bytes


# ---------------------------------------------------------------------------------------------- requests

class Refused(BadInput):
    """The server understood the request and will not answer it (400, 413, 422): it would refuse it again."""


class NotFound(BadInput):
    """Status 404: the server has no such model, or no such path."""


class Again(Exception):
    """A failure that may pass. kind: for counting; after: seconds that the server asks to wait."""

    def __init__(self, kind: str, detail: str = "", after: float = 0.0):
        super().__init__(f"{kind} ({detail})" if detail else kind)
        self.kind = kind
        self.after = after


class Server:
    """A server that many threads ask; at most `concurrency` requests are under way at a time.

    Requests go straight to the address: no proxy of the environment and no redirection is followed, so the
    key goes nowhere else. `repeated` counts the requests that were tried again, by the kind of failure.
    """

    def __init__(self, url: str, key: str | None, timeout: float, retries: int, concurrency: int):
        self.address = parse_url(url)
        self.url = self.address.geturl()
        self.key = key
        self.timeout = timeout
        self.retries = retries
        self.concurrency = concurrency
        self.slots = BoundedSemaphore(concurrency)
        self.stopped = Event()  # nobody waits for the answers any more
        self.pause: Callable[[float], Any] = self.stopped.wait  # seconds
        self.repeated: Counter[str] = Counter()
        self.lock = Lock()  # of the counter

    def models(self) -> dict[str, dict] | None:
        """The server's description of each model that it lists, by name; None if it keeps no list.

        Raises BadInput if nobody answers.
        """
        try:
            answer = self._ask_once("/v1/models", None, CONNECT_TIMEOUT)
        except (Refused, NotFound):
            return None
        except Again as failure:
            if failure.kind in ("no connection", "timeout"):
                raise BadInput(f"{self.url}: no server answers there: {failure}; "
                               "check the address, and that the server is up") from None
            answer = self.ask("/v1/models", None, lambda answer: answer)
        listed = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(listed, list):
            return None
        return {str(model.get("id")): model for model in listed if isinstance(model, dict)} or None

    def read_page(self, path: str) -> str | None:
        """The text of a page that a server may have or not; None if it gives none."""
        try:
            with self.slots:
                response, content = self._exchange(path, None, CONNECT_TIMEOUT)
        except Again:
            return None
        return content.decode("utf-8", "replace") if response.status == 200 else None

    def ask(self, path: str, body: dict | None, read: Callable[[Any], Any]) -> Any:
        """What `read` makes of the answer's JSON. It raises Again if that is broken. BadInput in the end."""
        for attempt in range(self.retries + 1):
            try:
                return read(self._ask_once(path, body, self.timeout))
            except Again as failure:
                last = failure
            if self.stopped.is_set() or attempt == self.retries:
                break
            with self.lock:
                self.repeated[last.kind] += 1
            pause = min(LONGEST_PAUSE, 2.0 ** attempt) * random.uniform(0.5, 1)
            wish = min(last.after, self.timeout)
            self.pause(max(pause, wish))
        raise BadInput(f"{self.url}{path}: {last}, {attempt + 1} times in a row; look at the server, and see "
                       "--timeout, --concurrency and --retries (what is in --out stays: --resume goes on)")

    def _ask_once(self, path: str, body: dict | None, timeout: float) -> Any:
        """The JSON of the answer to one request: a POST with a body, else a GET."""
        with self.slots:
            response, content = self._exchange(path, body, timeout)
        if response.status != 200:
            raise self._failure(f"{self.url}{path}", response, content)
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise Again("broken answer", "not JSON") from None

    def _exchange(self, path: str, body: dict | None, timeout: float) -> tuple[HTTPResponse, bytes]:
        """Send one request. -> the response and its content. Raises Again if none comes."""
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        kind = HTTPSConnection if self.address.scheme == "https" else HTTPConnection
        connection = kind(self.address.hostname, self.address.port, timeout=min(timeout, CONNECT_TIMEOUT))
        trouble = "no connection"
        try:
            connection.connect()
            trouble = "connection lost"
            connection.sock.settimeout(timeout)
            method = "POST" if body else "GET"
            connection.request(method, self.address.path + path, json.dumps(body) if body else None, headers)
            response = connection.getresponse()
            return response, _content(response, monotonic() + timeout)
        except TimeoutError:
            raise Again("timeout", f"nothing for {timeout:g} s") from None
        except (OSError, HTTPException, UnicodeError) as error:
            raise Again(trouble, self._clean(str(error) or type(error).__name__)) from None
        finally:
            connection.close()

    def _failure(self, where: str, response: HTTPResponse, content: bytes) -> Exception:
        """The error that a status other than 200 stands for."""
        status = response.status
        said = self._said(content)
        if status in (408, 429) or status >= 500:
            after = response.getheader("Retry-After", "")
            is_seconds = re.fullmatch(r"\d{1,6}(\.\d*)?", after)  # it may be a date
            return Again(f"status {status}", said, float(after) if is_seconds else 0.0)
        if status in (401, 403):
            remedy = "name the variable that holds it: --api-key-env"
            if self.key:
                remedy = "set the variable of --api-key-env to the right one"
            return BadInput(f"{where}: status {status}, the server refuses the key ({said}); {remedy}")
        if status == 404:
            return NotFound(f"{where}: status 404, no such model or path ({said}); "
                            "check --server and --model")
        if 300 <= status < 400:
            location = self._clean(response.getheader("Location", "?"))
            return BadInput(f"{where}: moved to {location}; give that address as --server")
        return Refused(f"{where}: status {status}, the server refuses the request ({said})")

    def _said(self, content: bytes) -> str:
        """The server's own words: those in {"error": {"message": WORDS}} and the like, or the content."""
        text = content.decode("utf-8", "replace")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return self._clean(text)
        for name in ("error", "message", "detail"):
            if isinstance(value, dict):
                value = value.get(name, value)
        return self._clean(value if isinstance(value, str) else text)

    def _clean(self, text: str) -> str:
        """A stranger's text for our messages: without the key, on one line, and short."""
        if self.key:
            text = text.replace(self.key, "***")
        printable = "".join(c if c.isprintable() else " " for c in text[:10000])
        return " ".join(printable.split())[:200] or "no reason given"


def _content(response: HTTPResponse, deadline: float) -> bytes:
    """The whole content. Raises TimeoutError past the deadline, also if a byte comes now and then."""
    content = bytearray()
    while piece := response.read1(2 ** 16):
        content += piece
        if monotonic() > deadline:
            raise TimeoutError
        if len(content) > LARGEST_ANSWER:
            raise Again("broken answer", f"more than {LARGEST_ANSWER} bytes")
    return bytes(content)
