"""Solutions as people have them: raw text, and several candidates for a problem in one row.

    {"problem": "1 + 1 + 1?", "solution": "1 + 1 = 2.\\n\\n2 + 1 = 3."}
    {"problem": ..., "solutions": [TEXT or [STEP, ...], ...]}
    {"question": ..., "steps": [[STEP, ...], ...], "labels": [true, false, ...]}

Raw text is split into steps (split.py). A row may say more of the answers (answers.py): "answer", the
problem's true one, and "final_answer" and "correct" for one solution, or lists "final_answers" and "correct"
(or "labels") for several.
"""

from bisect import bisect
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from formats.answers import answers_of
from formats.containers import Rows
from formats.rows import Defect, Solution, make_solution
from formats.split import split_steps
from plumbing.errors import BadInput
from plumbing.files import expect, get_field

# lists with a value for each candidate of a row, and what the value is called in a row of one solution
LISTS = {"final_answers": "final_answer", "correct": "correct", "labels": "correct"}


def is_text(row: dict) -> bool:
    """Does the row hold raw text?"""
    several = row.get("solutions")
    return isinstance(row.get("solution"), str) or (
        isinstance(several, list) and any(isinstance(s, str) for s in several)
    )


def holds_candidates(row: dict) -> bool:
    """Does the row have several solutions of its problem?"""
    steps = row.get("steps")
    is_nested = isinstance(steps, list) and bool(steps) and isinstance(steps[0], list)
    return row.get("solutions") is not None or is_nested


def read_text(row: dict, where: str, split: str) -> Solution:
    """The solution of a row in raw text."""
    steps = split_steps(get_field(row, "solution", str, where), split)
    if row.get("label") is not None:
        raise Defect(
            "with a label of steps that are not made yet",
            f"{where}: field 'label' numbers steps, and 'solution' is one text; give 'steps', a list",
        )
    solution = make_solution(row, where, problem_field(row), "solution", steps, None)
    return replace(solution, extra=answers_of(row, where))


def read_candidates(row: dict, where: str, split: str) -> list[Solution]:
    """The solutions of a row with several of them. They share its id."""
    field = "steps" if row.get("solutions") is None else "solutions"
    given = get_field(row, field, list, where)
    if not given:
        raise Defect(
            "without solutions", f"{where}: field '{field}' is empty; add a solution or remove the line"
        )
    found = []
    for number, (solution, own) in enumerate(zip(given, own_values(row, where, len(given)), strict=True)):
        name = f"{field}[{number}]"
        if isinstance(solution, str):
            steps = split_steps(solution, split)
        else:
            steps = expect(solution, list, f"{where}: field '{name}'")
        made = make_solution(row, where, problem_field(row), name, steps, None)
        found.append(replace(made, extra={"candidate": number} | answers_of(own, where)))
    return found


def own_values(row: dict, where: str, n: int) -> list[dict[str, Any]]:
    """What the row says of the answers of each of its n candidates, in the fields of a row of one."""
    own = [{"answer": row.get("answer")} for _ in range(n)]
    for name, single in LISTS.items():
        if row.get(name) is None:
            continue
        values = get_field(row, name, list, where)
        if len(values) != n:
            raise Defect(
                "with another number of labels than of solutions",
                f"{where}: field '{name}': {len(values)} values for {n} solutions; correct it",
            )
        for of_one, value in zip(own, values, strict=True):
            of_one[single] = value
    return own


def problem_field(row: dict) -> str:
    return "problem" if row.get("problem") is not None else "question"


class CandidateRows(Sequence):
    """The solutions of rows that have several each, read on demand: found[i] -> ("FILE:ROW", Solution)."""

    def __init__(self, rows: Rows, split: str):
        self.rows = rows
        self.split = split
        self.ends = list(accumulate(len(self.solutions(number)) for number in range(len(rows))))
        self.last = -1, []  # the row that was read last, and its solutions

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: int) -> tuple[str, Solution]:
        number = bisect(self.ends, i)
        if self.last[0] != number:
            self.last = number, self.solutions(number)
        _, solutions = self.last
        before = self.ends[number - 1] if number else 0
        where, _ = self.rows[number]
        return where, solutions[i - before]

    def solutions(self, number: int) -> list[Solution]:
        where, row = self.rows[number]
        if not holds_candidates(row):
            raise BadInput(
                f"{where}: has no list of solutions, as the rows before it have; give it in a file of its own"
            )
        return read_candidates(row, where, self.split)
