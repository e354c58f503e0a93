"""Chat templates that would take for ever or fill the memory are refused; others render as in jinja2."""
import os
import resource
import signal
import threading
from pathlib import Path

import pytest
import torch
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from checkpoint import template
from checkpoint.template import LONGEST, render

GIVEN = dict(messages=[{"role": "user", "content": "Hello"}], add_generation_prompt=True, bos_token="<s>",
             eos_token="</s>")

GROWING = "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}STEP{% endfor %}{{ ns.x }}"
BOMBS = [
    "{% for i in range(10 ** 9) %}x{% endfor %}",
    "{% for i in range(9999) %}{% for j in range(9999) %}{% for k in range(9999) %}x{% endfor %}{% endfor %}"
    "{% endfor %}",
    "{% set r = range(1000) | list %}{% for i in r %}{% for j in r %}{% for k in r %}x{% endfor %}"
    "{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    GROWING.replace("STEP", "{% set ns.x = ns.x ~ ns.x %}"),
    GROWING.replace("STEP", "{% set ns.x = ns.x + ns.x %}"),
    GROWING.replace("STEP", "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
    GROWING.replace("STEP", "{% set ns.x = [ns.x, ns.x] %}"),
    GROWING.replace("STEP", "{% set ns.x = ns.x | replace('a', 'aa') %}"),
    GROWING.replace("STEP", "{% set ns.x = ns.x.replace('a', 'aa') %}"),
    GROWING.replace("STEP", "{% set ns.x = [ns.x, ns.x] | join %}"),
    GROWING.replace("STEP", "{% set ns.x = (ns.x, ns.x) | string %}"), "{{ 'a' * 10 ** 10 }}",
    "{{ 10 ** 10 * 'a' }}", "{{ [1] * 10 ** 10 }}", "{{ 10 ** (10 ** 10) }}",
    "{{ 'a' | center(10 ** 10) }}", "{{ 'a'.center(10 ** 10) }}", "{{ 'a'.zfill(10 ** 10) }}",
    "{{ '\t'.expandtabs(10 ** 10) }}", "{{ '%9999999999d' % 1 }}", "{{ '%*d' % (10 ** 10, 1) }}",
    "{{ '%9999999999s' | format('a') }}", "{{ '{:9999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10 ** 10) }}", "{{ '{a:9999999999}'.format_map({'a': 1}) }}",
    "{{ [1] | tojson(indent=10 ** 10) }}", "{{ 'a' | indent(10 ** 10, true) }}",
    "{{ 1.5 | round(10 ** 9, 'ceil') }}", "{{ [1] | batch(10 ** 10, 'x') | list }}",
    "{{ [1] | slice(10 ** 10) | list }}", "{{ lipsum(10 ** 6) }}",
    "{{ (['a' * 1000] * 1000) | join('b' * 1000) }}",
    "{{ range(10 ** 5) | map('string') | map('center', 100) | join }}",
    "{% set x = 'a' * 900000 %}{{ [" + "x[:-1]," * 3000 + "] | length }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{{ messages }}" * 10000,
]


@pytest.mark.slow
@pytest.mark.parametrize("source", BOMBS, ids=[source[:40] for source in BOMBS])
def test_a_bomb_is_refused(source, monkeypatch):
    """Without a bound each of them never ends, or ends this process: so none is run without one."""
    monkeypatch.setattr(template, "SECONDS", 0.3)
    with pytest.raises(TemplateError):
        render(source, **GIVEN)


@pytest.mark.parametrize("source", [
    "{{ bos_token }}{% for m in messages %}[{{ m.role | upper ~ ':' ~ m['content'] | trim }}]{% endfor %}",
    "{{ messages[0].content[1:3] }}{{ messages[::-1] | length }}",
    "{% macro show(m, end='.') %}{{ m.content + end }}{% endmacro %}{{ show(messages[0]) }}"
    "{{ show(messages[0], end='!') }}",
    "{% for m in messages if m.role == 'user' %}{{ loop.index0 }}{{ loop.last }}{{ loop.length }}"
    "{{ loop.cycle('a', 'b') }}{% else %}none{% endfor %}",
    "{% set ns = namespace(found=false, n=0) %}{% for i in range(5) %}{% set ns.n = ns.n + i %}"
    "{% if i == 3 %}{% break %}{% endif %}{% endfor %}{{ ns.n }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(', ') }}"
    "{{ nothing | default('x') }}",
    "{{ '%s-%d' % ('a', 3) }}{{ '{:>5}'.format('b') }}{{ 'a,b'.split(',')[-1].lstrip('b') }}"
    "{% filter upper %}abc{% endfilter %}",
    "{% set x %}{{ messages[0].content }}{% endset %}{{ x ~ 1 ~ none ~ [1, 'a'] }}"
    "{% for k, v in messages[0].items() %}{{ k }}{{ v }}{% endfor %}",
    "{% for k in messages[0] | dictsort %}{{ k }}{% endfor %}"
    "{{ 7 // 2 }}{{ 7 % 4 }}{{ -1 * 2 }}{{ 2 ** 5 }}{{ 'a' in 'abc' }}{{ not messages }}",
])
def test_the_bound_changes_nothing_else(source):
    plain = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    assert render(source, **GIVEN) == plain.from_string(source).render(**GIVEN) != ""


def test_a_long_system_prompt_is_within_the_bound(monkeypatch):
    """20,000 characters of source, joined, trimmed and shown, take less than a tenth of time and memory."""
    text = "You solve problems. " * 1000
    source = "{% set system %}" + text + "{% endset %}"
    source += "{% for m in messages %}{{ '<start>' + system | trim + '<end>' ~ m.content }}{% endfor %}"
    monkeypatch.setattr(template, "SECONDS", template.SECONDS / 10)
    monkeypatch.setattr(template, "MEMORY", template.MEMORY // 10)
    assert render(source, **GIVEN).count("You solve") == 1000


def test_a_text_that_is_too_long_is_refused():
    assert render("x" * LONGEST, **GIVEN) == "x" * LONGEST
    with pytest.raises(TemplateError, match=f"{LONGEST + 1} characters"):
        render("x" * (LONGEST + 1), **GIVEN)


# -------------------------------------------------------------------------------- the child process

def test_time_and_memory_are_the_childs(monkeypatch):
    """This process does not end with the child's time and memory, and is left no process and no file."""
    files = len(os.listdir("/proc/self/fd"))
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")  # another test's browser may be one
    others = children.read_text()
    endless = "{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}"
    for source, said, seconds in ((endless, "0.1 s or 500 MB", 0.1), ("{{ 'a' * 600000000 }}", "MemoryError", 60),
                                  ("{{ nothing.at.all }}", "undefined", 60), ("{% if %}", "expression", 60)):
        monkeypatch.setattr(template, "SECONDS", seconds)
        with pytest.raises(TemplateError, match=said):
            render(source, **GIVEN)
        assert len(os.listdir("/proc/self/fd")) == files
        assert children.read_text() == others
    assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
    assert len("a" * 600_000_000) == 600_000_000


@pytest.mark.parametrize("standing", [2, 3])
def test_a_child_that_stands_still_is_replaced(monkeypatch, tmp_path, standing):
    """As one does that was forked while a thread held a lock: twice, and the third answers; or all three."""
    render_here = template.render_here

    def stand_still(source, variables):
        (tmp_path / str(os.getpid())).touch()
        if len(list(tmp_path.iterdir())) <= standing:
            os.kill(os.getpid(), signal.SIGALRM)  # the end of its time by the clock
        return render_here(source, variables)
    monkeypatch.setattr(template, "render_here", stand_still)
    if standing == 2:
        assert render("{{ messages | length }}", **GIVEN) == str(len(GIVEN["messages"]))
    else:
        with pytest.raises(TemplateError, match="more than"):
            render("{{ messages | length }}", **GIVEN)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("written", [b"", b"+half of the te"])
def test_a_child_that_dies_gives_no_text(monkeypatch, written):
    """Half of a text is not taken for the whole of it."""
    def die(writer, source, variables):
        os.write(writer, written)
        os.kill(os.getpid(), signal.SIGKILL)
    monkeypatch.setattr(template, "answer_and_exit", die)
    with pytest.raises(TemplateError, match="more than"):
        render("x", **GIVEN)


def test_an_interrupt_ends_the_child(monkeypatch, tmp_path):
    """Did it not, two processes would go on with the same work from here."""
    def interrupt(source, variables):
        raise KeyboardInterrupt
    here, escaped = os.getpid(), tmp_path / "escaped"
    monkeypatch.setattr(template, "render_here", interrupt)
    try:
        with pytest.raises(TemplateError, match="more than"):
            render("x", **GIVEN)
    finally:
        if os.getpid() != here:
            escaped.touch()
            os._exit(0)
    assert not escaped.exists()


@pytest.mark.slow
def test_a_template_renders_beside_threads():
    """PyTorch's threads, and one of Python's that holds a lock most of the time."""
    def work():
        while not done.is_set():
            with lock:
                torch.ones(100, 100) @ torch.ones(100, 100)
    lock, done = threading.Lock(), threading.Event()
    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(20):
            assert render("{{ messages[0].content }}", **GIVEN) == "Hello"
    finally:
        done.set()
        thread.join()


def test_without_fork_a_template_renders_in_this_process(monkeypatch):
    monkeypatch.delattr(os, "fork")
    assert render("{{ messages[0].content }}", **GIVEN) == "Hello"
    with pytest.raises(TemplateError, match="no users"):
        render("{{ raise_exception('no users') }}", **GIVEN)
    with pytest.raises(TemplateError, match="unsafe"):
        render("{{ ''.__class__.__mro__[0] }}", **GIVEN)


def test_any_text_comes_back_as_it_is():
    text = "é ½ 中文 🙂 \x00 \ud800 + - \n\n"
    assert render("{{ messages[0].content }}", messages=[{"content": text}]) == text
    assert render("", **GIVEN) == ""
