"""Chat templates: programs that come with a checkpoint, and are therefore run within bounds.

jinja2's sandbox bounds what a template can reach: no file, no module, no internals. It does not bound what a
template can use up: `'a' * 10 ** 10` or three nested loops need a few characters. So a template is rendered
in a child process, which has a limit on processor time and one on memory. The child is a copy of this process
(fork), since a new interpreter would take a tenth of a second to start; it only renders, sends the text back
through a pipe and exits. A fork copies one thread alone, so the child must not call what other threads may
have locked: it calls no PyTorch.

The alternative is to price every operation of jinja2 before it runs. That took 128 lines, which had to follow
jinja2's internals, and a method that a new version of Python adds to `str` would have been free. The
operating system's limits bound whatever a template does, a crash of the interpreter included.

Where there is no fork (Windows), a template is rendered in this process: in the sandbox, without the limits.
"""
import gc
import os
import signal
import sys
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 1.0  # of processor time; the longest of published templates take a tenth of a second
MEMORY = 500_000_000  # bytes beyond what this process has already
LONGEST = 1_000_000  # characters of the text


def render(source: str, **variables: Any) -> str:
    """The text that a template makes of the variables. Raises TemplateError where it fails or overspends."""
    if not hasattr(os, "fork"):
        return render_here(source, variables)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        answer_and_exit(writer, source, variables)
    os.close(writer)
    with open(reader, "rb") as pipe:
        answer = pipe.read().decode("utf-8", "surrogatepass")
    _, status = os.waitpid(child, 0)
    if status != 0:  # the child was killed
        raise TemplateError(f"it takes more than {SECONDS:g} s or {MEMORY // 10 ** 6} MB")
    kind, text = answer[0], answer[1:]
    if kind == "-":
        raise TemplateError(text)
    return text


def answer_and_exit(writer: int, source: str, variables: dict) -> NoReturn:
    """The child's whole life: it writes "+" and the text, or "-" and what went wrong."""
    try:
        try:
            gc.disable()  # a collection would write to every object of the parent, and so copy its memory
            limit_this_process()
            answer = "+" + render_here(source, variables)
        except BaseException as error:  # a template is a program: it can raise anything
            answer = "-" + (str(error) or type(error).__name__)
        with open(writer, "wb") as pipe:
            pipe.write(answer.encode("utf-8", "surrogatepass"))
        os._exit(0)
    finally:  # whatever happens, the child never goes on with its parent's work
        os._exit(1)


def limit_this_process() -> None:
    """From here on, this process is killed after SECONDS, and gets MemoryError beyond MEMORY."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # processor time; RLIMIT_CPU counts in whole seconds
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 100 * SECONDS)  # in case a thread that is not copied held a lock
    if sys.platform != "linux":  # macOS does not enforce RLIMIT_AS
        return
    import resource  # here, as Windows has no such module

    with open("/proc/self/statm", "rb") as file:
        pages = int(file.read().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + MEMORY
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def render_here(source: str, variables: dict) -> str:
    """The text of a template, within jinja2's sandbox and without limits."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = raise_exception
    text = environment.from_string(source).render(**variables)
    if len(text) > LONGEST:
        raise TemplateError(f"its text has {len(text)} characters, more than {LONGEST}")
    return text


def raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
