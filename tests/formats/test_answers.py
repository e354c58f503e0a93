"""Answers: found in texts, and compared as numbers, as text, and as mathematics where math-verify is
installed.
"""

import sys

import pytest

from formats.answers import answer_classes, answers_of, find_answer, has_math_verify, plain, same_answer
from plumbing.errors import BadInput


@pytest.fixture()
def without_math_verify(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    same_answer.cache_clear()
    yield
    same_answer.cache_clear()


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"So it is \boxed{3}.", "3"),
        (r"\boxed{3} or rather \boxed{4}", "4"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\fbox{ 7 }", "7"),
        (r"\boxed {7}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        ("2+1=3\n#### 3", "3"),
        ("#### 3\n#### 1,000 \nbye", "1,000"),
        (r"#### 3, that is \boxed{4}", "4"),
        (r"\boxed{3} and \boxed{cut", "3"),
        ("It is 3.", None),
        ("####", None),
        ("", None),
    ],
)
def test_the_answer_is_found_in_the_text(text, answer):
    assert find_answer(text) == answer


SAME = [
    ("3", "3.0"),
    ("1,000", "1000"),
    (" 3 ", "3"),
    ("$3$", "3"),
    ("3.", "3"),
    ("1/2", "0.5"),
    ("-2", "-2.00"),
    (".5", "0.5"),
    (r"\left( 1, 2\right)", "(1,2)"),
    (r"\dfrac{1}{2}", r"\frac{1}{2}"),
    (r"\text{east}", "{east}"),
    ("12,345,678", "12345678"),
]
OTHER = [("3", "4"), ("3", "-3"), ("1,2", "12"), ("0.3", "0.30001"), ("1/3", "0.33"), ("a", "b"), ("", "0")]


@pytest.mark.parametrize("one, other", SAME)
def test_the_same_answer_in_plain_text(without_math_verify, one, other):
    assert same_answer(one, other) and same_answer(other, one)


@pytest.mark.parametrize("one, other", OTHER)
def test_other_answers(without_math_verify, one, other):
    assert not same_answer(one, other) and not same_answer(other, one)


@pytest.mark.parametrize(
    "one, other, same",
    [
        (r"\frac{1}{2}", "0.5", True),
        (r"\sqrt{8}", r"2\sqrt{2}", True),
        (r"x = 3", "3", True),
        (r"\{1,2\}", r"\{2,1\}", True),
        (r"\frac{1}{2}", r"\frac{1}{3}", False),
        (r"\sqrt{2}", r"\sqrt{3}", False),
        ("3", "4", False),
    ],
)
def test_the_same_mathematics(one, other, same):
    pytest.importorskip("math_verify")
    assert has_math_verify() and same_answer(one, other) == same


def test_without_math_verify_there_is_plain_text(without_math_verify):
    assert not has_math_verify()
    assert not same_answer(r"\frac{1}{2}", "0.5")
    assert plain(r"$\left(1,\ 2\right).$") == "(1,2)"


def test_classes_of_answers():
    assert answer_classes(["2", None, "3", "2.0", "3", "4"]) == [0, None, 1, 0, 1, 2]
    assert answer_classes([None, None]) == [None, None] and answer_classes([]) == []


def test_what_a_row_says_of_answers():
    assert answers_of({"problem": "P"}, "f:1") == {}
    row = {"answer": "He has 3 + 4.\n#### 7", "final_answer": 8.0, "correct": 0}
    assert answers_of(row, "f:1") == {"answer": "7", "final_answer": "8", "correct": False}
    assert answers_of({"answer": 7, "correct": None}, "f:1") == {"answer": "7"}


@pytest.mark.parametrize(
    "row, said",
    [
        ({"answer": [7]}, "f:1: field 'answer': expected a text"),
        ({"final_answer": True}, "field 'final_answer'"),
        ({"correct": "yes"}, "f:1: field 'correct': expected true or false"),
        ({"correct": 2}, "found 2"),
    ],
)
def test_a_bad_answer_is_named(row, said):
    with pytest.raises(BadInput, match=said):
        answers_of(row, "f:1")
