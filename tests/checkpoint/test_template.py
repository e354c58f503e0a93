"""Chat templates that would take for ever or fill the memory are refused; others render as in plain jinja2."""
import pytest
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from checkpoint import template
from checkpoint.template import BUDGET, LONGEST, render

GIVEN = dict(messages=[{"role": "user", "content": "Hello"}], add_generation_prompt=True, bos_token="<s>", eos_token="</s>")

GROWING = "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}STEP{% endfor %}{{ ns.x }}"
BOMBS = [
    "{% for i in range(10 ** 9) %}x{% endfor %}",
    "{% for i in range(9999) %}{% for j in range(9999) %}{% for k in range(9999) %}x{% endfor %}{% endfor %}{% endfor %}",
    "{% set r = range(1000) | list %}{% for i in r %}{% for j in r %}{% for k in r %}x{% endfor %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    GROWING.replace("STEP", "{% set ns.x = ns.x ~ ns.x %}"), GROWING.replace("STEP", "{% set ns.x = ns.x + ns.x %}"),
    GROWING.replace("STEP", "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"), GROWING.replace("STEP", "{% set ns.x = [ns.x, ns.x] %}"),
    GROWING.replace("STEP", "{% set ns.x = ns.x | replace('a', 'aa') %}"),
    GROWING.replace("STEP", "{% set ns.x = ns.x.replace('a', 'aa') %}"),
    GROWING.replace("STEP", "{% set ns.x = [ns.x, ns.x] | join %}"), GROWING.replace("STEP", "{% set ns.x = (ns.x, ns.x) | string %}"),
    "{{ 'a' * 10 ** 10 }}", "{{ 10 ** 10 * 'a' }}", "{{ [1] * 10 ** 10 }}", "{{ 10 ** 10 ** 10 }}", "{{ 'a' | center(10 ** 10) }}",
    "{{ 'a'.center(10 ** 10) }}",
    "{{ 'a'.zfill(10 ** 10) }}", "{{ '\t'.expandtabs(10 ** 10) }}", "{{ '%9999999999d' % 1 }}", "{{ '%*d' % (10 ** 10, 1) }}",
    "{{ '%9999999999s' | format('a') }}",
    "{{ '{:9999999999}'.format(1) }}", "{{ '{:{}}'.format(1, 10 ** 10) }}", "{{ '{a:9999999999}'.format_map({'a': 1}) }}",
    "{{ [1] | tojson(indent=10 ** 10) }}",
    "{{ 'a' | indent(10 ** 10, true) }}", "{{ 1.5 | round(10 ** 9, 'ceil') }}", "{{ [1] | batch(10 ** 10, 'x') | list }}",
    "{{ [1] | slice(10 ** 10) | list }}",
    "{{ lipsum(10 ** 6) }}", "{{ (['a' * 1000] * 1000) | join('b' * 1000) }}",
    "{{ range(10 ** 5) | map('string') | map('center', 100) | join }}",
    "{% set x = 'a' * 900000 %}{{ [" + "x[:-1]," * 3000 + "] | length }}", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ messages }}" * 10000,
]


@pytest.mark.parametrize("source", BOMBS, ids=[source[:40] for source in BOMBS])
def test_a_bomb_is_refused(source):
    """A test of any one of these that is not bounded never ends, or ends this process: so none is run without the bound."""
    with pytest.raises((TemplateError, RecursionError)):
        render(source, **GIVEN)


@pytest.mark.parametrize("source", [
    "{{ bos_token }}{% for m in messages %}[{{ m.role | upper ~ ':' ~ m['content'] | trim }}]{% endfor %}",
    "{{ messages[0].content[1:3] }}{{ messages[::-1] | length }}",
    "{% macro show(m, end='.') %}{{ m.content + end }}{% endmacro %}{{ show(messages[0]) }}{{ show(messages[0], end='!') }}",
    "{% for m in messages if m.role == 'user' %}{{ loop.index0 }}{{ loop.last }}{{ loop.length }}"
    "{{ loop.cycle('a', 'b') }}{% else %}none{% endfor %}",
    "{% set ns = namespace(found=false, n=0) %}{% for i in range(5) %}{% set ns.n = ns.n + i %}"
    "{% if i == 3 %}{% break %}{% endif %}{% endfor %}{{ ns.n }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(', ') }}"
    "{{ nothing | default('x') }}{{ messages | tojson(indent=2) }}",
    "{{ '%s-%d' % ('a', 3) }}{{ '{:>5}'.format('b') }}{{ 'a,b'.split(',')[-1].lstrip('b') }}{% filter upper %}abc{% endfilter %}",
    "{% set x %}{{ messages[0].content }}{% endset %}{{ x ~ 1 ~ none ~ [1, 'a'] }}"
    "{% for k, v in messages[0].items() %}{{ k }}{{ v }}{% endfor %}",
    "{% for k in messages[0] | dictsort %}{{ k }}{% endfor %}"
    "{{ 7 // 2 }}{{ 7 % 4 }}{{ -1 * 2 }}{{ 2 ** 5 }}{{ 'a' in 'abc' }}{{ not messages }}",
])
def test_the_bound_changes_nothing_else(source):
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    assert render(source, **GIVEN) == plain.from_string(source).render(**GIVEN) != ""


def test_a_long_system_prompt_is_within_the_bound(monkeypatch):
    """20,000 characters of source, joined, trimmed and shown a few times, are within a tenth of the budget."""
    text = "You solve problems. " * 1000
    source = "{% set system %}" + text + "{% endset %}"
    source += "{% for m in messages %}{{ '<|im_start|>system\n' + system | trim + '<|im_end|>' ~ m.content }}{% endfor %}"
    assert render(source, **GIVEN).count("You solve") == 1000
    monkeypatch.setattr(template, "BUDGET", BUDGET // 10)
    assert render(source, **GIVEN).count("You solve") == 1000


def test_a_source_too_long_to_compile_is_refused():
    assert render("x" * LONGEST, **GIVEN) == "x" * LONGEST
    with pytest.raises(TemplateError, match=f"{LONGEST + 1} characters"):
        render("x" * (LONGEST + 1), **GIVEN)
