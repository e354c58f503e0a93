"""Chat templates: programs that come with a checkpoint, and are therefore run within bounds.

jinja2's sandbox bounds what a template can reach: no file, no module, no internals. It does not bound what a
template can use up: `'a' * 10 ** 10` or three nested loops need a few characters. So a template is rendered
in a child process, which has a limit on processor time and one on memory. The child is a copy of this process
(fork), since a new interpreter would take a tenth of a second to start; it only renders, sends the texts back
through a pipe and exits. A fork copies one thread alone, so the child must not call what other threads may
have locked: it calls no PyTorch.

The alternative is to price every operation of jinja2 before it runs. That took 128 lines, which had to follow
jinja2's internals, and a method that a new version of Python adds to `str` would have been free. The
operating system's limits bound whatever a template does, a crash of the interpreter included.

Where there is no fork (Windows), a template is rendered in this process: in the sandbox, without the limits.
"""
import ctypes
import datetime
import gc
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from plumbing.errors import BadInput
from plumbing.files import expect

SECONDS = 1.0  # of processor time; the longest of published templates take a tenth of a second
STANDSTILL = 30  # so many times that, by the clock, and a child that has not ended is taken to stand still
TRIES = 3
MEMORY = 500_000_000  # bytes beyond what this process has already
LONGEST = 1_000_000  # characters of a text
TODAY = datetime.date(2024, 7, 26)  # on every day, so that a prompt stays the same; Llama 3.1's default


# -------------------------------------------------------------------------------- a checkpoint's template

# Stands for the user's message while a template is rendered. A template that quotes, escapes or cuts what it
# is given changes it, and is refused.
MARK = '\ue000the "message"\nof <a> & b\ue001'
START, END = "\n\x0b", "\x0b\n"  # white space around it, which is gone where a template strips the message


@dataclass(frozen=True)
class Frame:
    """What a template puts around the user's message."""
    before: str
    after: str
    strips_start: bool = False  # whether the message's own white space is taken away
    strips_end: bool = False
    turn_end: str = ""          # what follows an answer: "<|im_end|>\n"

    def fit(self, message: str) -> str:
        """The message as the template shows it."""
        if self.strips_start:
            message = message.lstrip()
        if self.strips_end:
            message = message.rstrip()
        return message


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a checkpoint. It sees `variables` beside the messages; `where` names its file."""
    source: str
    where: str
    variables: dict[str, Any]

    def frame(self, system: str | None = None) -> Frame:
        """What stands around the message of a user who says one thing, with a system message or without."""
        user = {"role": "user", "content": START + MARK + END}
        question = [user] if system is None else [{"role": "system", "content": system}, user]
        answer = {"role": "assistant", "content": MARK}
        text, without_system, answered = self.render(
            {"messages": question, "add_generation_prompt": True},
            {"messages": [user], "add_generation_prompt": True},
            {"messages": [{"role": "user", "content": "Hi"}, answer], "add_generation_prompt": False})
        if isinstance(text, TemplateError):
            raise BadInput(f"{self.where}: the chat template fails on one user message ({str(text)[:80]}); "
                           "correct it")
        if system is not None and text == without_system:
            raise BadInput(f"{self.where}: the chat template does not show a system message; leave it out")
        if text.count(MARK) != 1:
            raise BadInput(f"{self.where}: the chat template shows the user's message {text.count(MARK)} "
                           "times, not once and as it is; correct it")
        before, after = text.split(MARK)
        turn_end = ""
        if isinstance(answered, str) and MARK in answered:
            _, turn_end = answered.rsplit(MARK, 1)
        return Frame(
            before=before.removesuffix(START),
            after=after.removeprefix(END),
            strips_start=not before.endswith(START),
            strips_end=not after.startswith(END),
            turn_end=turn_end)

    def render(self, *given: dict[str, Any]) -> list[str | TemplateError]:
        """What Transformers renders for each of some conversations."""
        always = {"tools": None, "documents": None} | self.variables
        return render_each(self.source, [always | variables for variables in given])


def read_template(folder: Path, tokenizer_config: dict, variables: dict[str, Any]) -> ChatTemplate | None:
    """The template of a checkpoint folder: chat_template.jinja, else the field of tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return ChatTemplate(path.read_text(encoding="utf-8"), str(path), variables)
        except ValueError:
            raise BadInput(f"{path}: not a text in UTF-8; download it again") from None
    path = folder / "tokenizer_config.json"
    where = f"{path}: field 'chat_template'"
    source = tokenizer_config.get("chat_template")
    if isinstance(source, list):
        source = default_template(source, where)
    if source is None:
        return None
    return ChatTemplate(expect(source, str, where), str(path), variables)


def default_template(named: list, where: str) -> str:
    """The template called "default" of a list of {"name", "template"}."""
    for item in named:
        if expect(item, dict, where).get("name") == "default":
            return expect(item.get("template"), str, where)
    raise BadInput(f"{where}: none of its {len(named)} templates is called default; rename one")


# -------------------------------------------------------------------------------- within bounds

def render(source: str, **variables: Any) -> str:
    """The text that a template makes of the variables. Raises TemplateError where it fails or overspends."""
    [text] = render_each(source, [variables])
    if isinstance(text, TemplateError):
        raise text
    return text


def render_each(source: str, given: list[dict[str, Any]]) -> list[str | TemplateError]:
    """The text, or the error, that a template makes of each of the given; the limits are for all of them."""
    if not hasattr(os, "fork"):
        return [render_here(source, variables) for variables in given]
    for _ in range(TRIES):
        answer, status = ask_child(source, given)
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM):
            break  # else it stood still: at a lock that a thread of its parent held, which it has no copy of
    if status != 0:  # the child was killed
        return [TemplateError(f"it takes more than {SECONDS:g} s or {MEMORY // 10 ** 6} MB")] * len(given)
    return [text if is_text else TemplateError(text) for is_text, text in json.loads(answer)]


def ask_child(source: str, given: list[dict[str, Any]]) -> tuple[bytes, int]:
    """What a child process answers, and its exit status."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        answer_and_exit(writer, source, given)
    os.close(writer)
    with open(reader, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    return answer, status


def answer_and_exit(writer: int, source: str, given: list[dict[str, Any]]) -> NoReturn:
    """The child's whole life: it writes (true, text) or (false, error) for each of the given variables."""
    try:
        gc.disable()  # a collection would write to every object of the parent, and so copy its memory
        limit_this_process()
        found = [render_here(source, variables) for variables in given]
        answer = json.dumps([(isinstance(text, str), str(text)) for text in found])
        with open(writer, "wb") as pipe:
            pipe.write(answer.encode())
        os._exit(0)
    finally:  # whatever happens, the child never goes on with its parent's work
        os._exit(1)


def limit_this_process() -> None:
    """From here on, this process is killed after SECONDS, and gets MemoryError beyond MEMORY."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # processor time; RLIMIT_CPU counts in whole seconds
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, STANDSTILL * SECONDS)
    if sys.platform != "linux":  # macOS does not enforce RLIMIT_AS
        return
    import resource  # here, as Windows has no such module

    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # freed memory that glibc keeps would not count below
    with open("/proc/self/statm", "rb") as file:
        pages = int(file.read().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + MEMORY
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


# -------------------------------------------------------------------------------- jinja2, as in Transformers

def render_here(source: str, variables: dict[str, Any]) -> str | TemplateError:
    """The text of a template, or its error, within jinja2's sandbox and without limits."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = TODAY.strftime
    try:
        text = environment.from_string(source).render(**variables)
    except Exception as error:  # a template is a program: whatever it raises is its own fault
        return TemplateError(str(error) or type(error).__name__)
    if len(text) > LONGEST:
        return TemplateError(f"its text has {len(text)} characters, more than {LONGEST}")
    return text


class Generation(Extension):
    """{% generation %} ... {% endgeneration %}, by which training templates mark answers, shows its text."""
    tags = {"generation"}  # noqa: RUF012, as jinja2 names it

    def parse(self, parser: Parser) -> nodes.Scope:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
           separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    """JSON as text. jinja2's own filter is for HTML, and escapes "<"."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
