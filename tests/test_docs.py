"""The pages: command lines have flags that exist, links lead somewhere, figures are those of ratios.json."""
import functools
import json
import re
import runpy
import shlex
import sys

import pytest

import plumbing.cli
from bench import plot
from conftest import ROOT

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in (".", "docs", "bench", "examples/arithmetic", "examples/rl")
    for path in (ROOT / folder).glob("*.md")
)
COMMAND = re.compile(r"(?:python|torchrun .* --) +([\w/]+\.py)( .*)?")


def code_lines(text: str) -> list[str]:
    """The lines of indented and fenced blocks, those that end in a backslash joined with the next."""
    lines = []
    fenced = False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            lines.append(line.strip())
    return re.sub(r" *(#[^\n]*)?\\\n *", " ", "\n".join(lines)).splitlines()


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(script, its arguments) of each command line, e.g. ("score.py", ["--model", "judge"])."""
    found = []
    for line in code_lines(text):
        match = COMMAND.search(line)
        if match:
            words = shlex.split((match[2] or "").replace("$COMMON", ""), comments=True)
            words = [word for word in words if word not in ("&", "...")]
            found.append((match[1], words))
    return found


@functools.cache
def commands_of(script: str) -> tuple[tuple, str | None]:
    """What a script hands to plumbing.cli.run: (config class, main) pairs, and the default one. No main runs.
    """
    given = []
    real = plumbing.cli.run
    plumbing.cli.run = lambda *pairs, default=None: given.append((pairs, default))
    path = list(sys.path)
    sys.path.insert(0, str((ROOT / script).parent))
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        plumbing.cli.run = real
        sys.path[:] = path
    return given[0]


def parse(monkeypatch, script: str, words: list[str]) -> object:
    """The config that a command line makes."""
    made = []

    def keeping(main):
        @functools.wraps(main)
        def keep(config):
            made.append(config)
        return keep
    monkeypatch.setattr(plumbing.cli, "check_device", lambda config: None)
    pairs, default = commands_of(script)
    plumbing.cli.run(*((kind, keeping(main)) for kind, main in pairs), default=default, argv=words)
    return made[0]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_line_of_a_page_is_accepted(monkeypatch, page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for script, words in commands(text):
        if script == "tests/server/llama_server.py":  # takes a folder and a port, without flags
            continue
        if words == ["sample", "--model", "Llama-3.3-70B-Instruct"]:  # shown in part
            words = [*words, "--cases", "c", "--out", "o"]
        assert parse(monkeypatch, script, words), (script, words)


def test_a_command_line_with_an_unknown_flag_is_noticed(monkeypatch):
    page = "    python score.py --model judge --input a.json \\\n        --kk 1 --out o   # a comment\n"
    found = commands(page)
    assert found == [("score.py", ["--model", "judge", "--input", "a.json", "--kk", "1", "--out", "o"])]
    with pytest.raises(SystemExit):
        parse(monkeypatch, *found[0])


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings: "## 6. Sampling, and P(Yes)" -> "6-sampling-and-pyes"."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), target


def test_the_figures_of_speed_are_those_of_the_results():
    rows = json.loads((ROOT / "bench/ratios.json").read_text(encoding="utf-8"))
    page = (ROOT / "bench/README.md").read_text(encoding="utf-8")
    assert plot.replace_table(page, plot.table(rows), "") == page, "run python bench/plot.py"
    for row in rows:
        assert row["ratio"] == pytest.approx(row["ours"] / row["rate"], rel=0.01)
    ratios = {f"{row['ratio']:.1f}×" for row in rows}
    front = (ROOT / "README.md").read_text(encoding="utf-8")
    quoted = re.findall(r"[\d.]+×(?= \|)", front)
    assert len(quoted) == 3 and set(quoted) <= ratios


@pytest.mark.slow
def test_the_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    page = tmp_path / "README.md"
    page.write_text(f"before\n{plot.BEGIN}\nold\n{plot.END}\nafter\n")
    plot.main(plot.Config(page=str(page), out=str(tmp_path / "plot.svg")))
    text = page.read_text()
    assert text.startswith(f"before\n{plot.BEGIN}\n| work |")
    assert text.endswith(f"|\n{plot.END}\nafter\n")
    assert (tmp_path / "plot.svg").read_text().count("<svg") == 1
