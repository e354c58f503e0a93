"""docs/reading.md: its code runs, in order, and prints what the page says."""
import contextlib
import io
import re

import pytest

from conftest import ROOT

PAGE = ROOT / "docs" / "reading.md"
BLOCK = re.compile(r"```python\n(.*?)```\n(?:```text\n(.*?)```\n)?", re.S)
NUMBER = re.compile(r"-?\d+\.\d+")


def test_the_page_prints_what_it_says(monkeypatch):
    """Texts and whole numbers to the letter; others to one in their last digit, as processors round."""
    monkeypatch.chdir(ROOT)
    namespace = {}
    page = PAGE.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(page))
    assert len(blocks) == page.count("```python")
    assert sum(1 for block in blocks if block[2]) == page.count("```text")  # right behind their code
    for block in blocks:
        lines_before = page.count("\n", 0, block.start(1))  # so that an error names the page's line
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * lines_before + block[1], str(PAGE), "exec"), namespace)
        same(printed.getvalue(), block[2] or "")


def same(printed: str, said: str) -> None:
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", said)
    for number, expected in zip(NUMBER.findall(printed), NUMBER.findall(said), strict=True):
        last_digit = 10.0 ** -len(expected.split(".")[1])
        assert float(number) == pytest.approx(float(expected), abs=1.01 * last_digit), printed


def test_another_number_or_word_is_noticed():
    same("R = 0.7979 of 10\n", "R = 0.7978 of 10\n")
    for said in ("R = 0.7978 of 9\n", "R = 0.7988 of 10\n", "R = 0.7978 in 10\n"):
        with pytest.raises(AssertionError):
            same("R = 0.7978 of 10\n", said)
