"""The answers of solutions: found in their texts, and compared.

    find_answer("So x is \\boxed{\\frac{1}{2}}.")   ->   "\\frac{1}{2}"
    find_answer("2 + 1 = 3\\n#### 3")                 ->   "3"
    same_answer("\\frac{1}{2}", "0.5")               ->   True, if math-verify is installed

What a row says of answers goes on into scores.jsonl:

    answer         the problem's true answer ("3", or a text that ends in \\boxed{3} or #### 3)
    final_answer   the answer of the solution; else it is taken from its text
    correct        is the solution's answer right: true or false
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

from formats.rows import shown, truth
from plumbing.errors import BadInput
from plumbing.files import expect

BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
HASHES = re.compile(r"####\s*(.+)")
# what changes how an answer looks, and not what it says
LOOKS = re.compile(r"\\left|\\right|\\!|\\,|\\;|\\ |\\(?:text|mathrm|textbf|mbox)\s*(?=\{)|\s+|\$")
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:/[1-9]\d*)?")


# ---------------------------------------------------------------------------------------------- in rows


def answers_of(row: dict, where: str) -> dict[str, Any]:
    """What a row of one solution says of the answers."""
    found = {}
    if row.get("answer") is not None:
        found["answer"] = true_answer(row["answer"], f"{where}: field 'answer'")
    if row.get("final_answer") is not None:
        found["final_answer"] = as_text(row["final_answer"], f"{where}: field 'final_answer'")
    if row.get("correct") is not None:
        found["correct"] = is_correct(row["correct"], f"{where}: field 'correct'")
    return found


def true_answer(value: Any, here: str) -> str:
    text = as_text(value, here)
    return find_answer(text) or text.strip()


def as_text(value: Any, here: str) -> str:
    """An answer, which may be a number."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return shown(value)
    return expect(value, str, here)


def is_correct(value: Any, here: str) -> bool:
    if value not in (0, 1):
        raise BadInput(
            f"{here}: expected true or false (is the answer right?), found {str(value)[:40]}; correct it"
        )
    return truth(value, here)


# ---------------------------------------------------------------------------------------------- in texts


def find_answer(text: str) -> str | None:
    """What stands in the last \\boxed{...}; else what follows the last ####; None if the text has neither."""
    for start in reversed([match.end() for match in BOXED.finditer(text)]):
        inside = up_to_closing(text[start:])
        if inside is not None:
            return inside.strip()
    lines = HASHES.findall(text)
    return lines[-1].strip() if lines else None


def up_to_closing(text: str) -> str | None:
    """The text up to the brace that closes one before it; None if there is none."""
    depth = 1
    for end, letter in enumerate(text):
        if letter in "{}" and text[end - 1 : end] != "\\":
            depth += 1 if letter == "{" else -1
        if depth == 0:
            return text[:end]
    return None


# ---------------------------------------------------------------------------------------------- compared


def has_math_verify() -> bool:
    """Is math-verify installed, which knows that \\frac{1}{2} is 0.5?"""
    try:
        import math_verify  # noqa: F401, as it is only asked for
    except ImportError:
        return False
    return True


@lru_cache(maxsize=100_000)
def same_answer(one: str, other: str) -> bool:
    """Do two answers say the same? As numbers, as plain text, and with math-verify, if it is installed, as
    mathematics.
    """
    one = plain(one)
    other = plain(other)
    if one == other:
        return True
    if NUMBER.fullmatch(one) and NUMBER.fullmatch(other):
        return value_of(one) == value_of(other)
    if not has_math_verify():
        return False
    from math_verify import parse, verify

    return verify(parse(f"${one}$"), parse(f"${other}$"))


def plain(answer: str) -> str:
    """An answer without what is only looks: "$\\left(1,\\ 2\\right).$" -> "(1,2)"."""
    text = LOOKS.sub("", answer).rstrip(".")
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    return THOUSANDS.sub("", text)


def value_of(number: str) -> Fraction:
    numerator, _, denominator = number.partition("/")
    return Fraction(numerator) / int(denominator or 1)


def answer_classes(answers: Sequence[str | None]) -> list[int | None]:
    """The number of each answer's class, in the order of the classes' first members: "2", "3", "2.0" -> 0, 1,
    0.

    None where there is no answer.
    """
    firsts: list[str] = []
    classes = []
    for answer in answers:
        if answer is None:
            classes.append(None)
            continue
        for number, first in enumerate(firsts):
            if same_answer(first, answer):
                classes.append(number)
                break
        else:
            classes.append(len(firsts))
            firsts.append(answer)
    return classes
