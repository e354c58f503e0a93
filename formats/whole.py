"""Rows of public formats that are whole solutions: each reader gives a row's Solution, or raises BadInput.

    {"problem": "Tom has 3 pens.", "steps": ["He buys 4.", "He has 8."], "label": 1}   a row of ProcessBench
    Solution(id="FILE:1", problem="Tom has 3 pens.", steps=("He buys 4.", "He has 8."), label=1)
"""
import re
from collections import Counter
from dataclasses import replace
from typing import Any

from formats.answers import answers_of
from formats.rows import (
    BLANK_STEP,
    OUT_OF_RANGE,
    Defect,
    Solution,
    check_number,
    first_wrong,
    label_of,
    make_solution,
    name_of,
    truth,
    whole,
    without_number,
)
from plumbing.files import expect, get_field

SHEPHERD_TAG = "ки"                # Math-Shepherd's mark at the end of each step
OPENR_TAG = re.compile(r"\n{5,}")  # OpenR's


def processbench(row: dict, where: str, counts: Counter) -> Solution:
    """{problem, steps, label}: label = index of the first wrong step, -1 = none. So is a line of
    scores.jsonl.
    """
    steps = get_field(row, "steps", list, where)
    solution = make_solution(row, where, "problem", "steps", steps, label_of(row, where))
    return replace(solution, extra=own_extra(row, where) | answers_of(row, where))


def own_extra(row: dict, where: str) -> dict[str, Any]:
    """What a line of scores.jsonl has kept of its solution's format."""
    extra = {}
    for name, kind in (("candidate", int), ("classification", str), ("error_steps", list)):
        if name in row:
            extra[name] = get_field(row, name, kind, where)
    for number in extra.get("error_steps", ()):
        expect(number, int, f"{where}: field 'error_steps'")
    return extra


def prmbench(row: dict, where: str, counts: Counter) -> Solution:
    """{modified_question, modified_process: [step], error_steps: [number of a wrong step, from 1]}.

    Some rows name error steps beyond the last one. They are ignored. Where there are no others, the label
    is unknown.
    """
    steps = get_field(row, "modified_process", list, where)
    here = f"{where}: field 'error_steps'"
    wrong = None
    present = []
    label = None
    if row.get("error_steps") is not None:
        wrong = [whole(number, here) for number in get_field(row, "error_steps", list, where)]
    if wrong == []:
        label = -1
    elif wrong:
        if min(wrong) < 1:
            raise Defect(OUT_OF_RANGE, f"{here}: {min(wrong)} is no step's number (from 1 on); correct it")
        present = [number for number in wrong if number <= len(steps)]
        counts["ignored: error step beyond the last step"] += len(wrong) - len(present)
        label = min(present) - 1 if present else None
    solution = make_solution(row, where, "modified_question", "modified_process", steps, label)
    if wrong is None or row.get("classification") is None:
        return solution
    classification = get_field(row, "classification", str, where)
    return replace(solution, extra={"classification": classification, "error_steps": present})


def stepwise(row: dict, where: str, counts: Counter) -> Solution:
    """TRL's {prompt, completions: [step], labels: [is it correct?]}. The steps may bear their numbers."""
    here = f"{where}: field 'completions'"
    steps = []
    for number, step in enumerate(get_field(row, "completions", list, where), 1):
        steps.append(without_number(expect(step, str, here), number, here))
    here = f"{where}: field 'labels'"
    correct = [truth(label, here) for label in get_field(row, "labels", list, where)]
    _check_count(correct, steps, here)
    return make_solution(row, where, "prompt", "completions", steps, first_wrong(correct))


def openr(row: dict, where: str, counts: Counter) -> Solution:
    """OpenR's {question, process, label: [+ | -]}: a tag follows each step of process, ки or 5 line ends."""
    process = get_field(row, "process", str, where)
    here = f"{where}: field 'label'"
    correct = [_sign(label, here) for label in get_field(row, "label", list, where)]
    pieces = process.split(SHEPHERD_TAG) if SHEPHERD_TAG in process else OPENR_TAG.split(process)
    if not pieces[-1].strip():
        pieces.pop()
    elif len(pieces) == len(correct) + 1:
        pieces.pop()
        counts["dropped: text after the last tag"] += 1
    _check_count(correct, pieces, here)
    steps = _tagged_steps(pieces, f"{where}: field 'process'")
    return make_solution(row, where, "question", "process", steps, first_wrong(correct))


def math_shepherd(row: dict, where: str, counts: Counter) -> Solution:
    """{input, label}: input is "PROBLEM Step 1: STEP ки\\nStep 2: ..."; label has + or - for each tag."""
    here = f"{where}: field 'input'"
    *pieces, rest = get_field(row, "input", str, where).split(SHEPHERD_TAG)
    check_number(pieces, here)
    correct = _shepherd_signs(pieces, get_field(row, "label", str, where), where)
    counts["dropped: text after Math-Shepherd's last tag"] += bool(rest.strip())
    needs = f"{here}: needs a problem, then 'Step 1: ... {SHEPHERD_TAG}' and so on, no step empty; correct it"
    if not pieces:
        raise Defect("without a tag", needs)
    problem, mark, first = pieces[0].partition("Step 1:")
    if not mark:
        raise Defect("without Step 1:", needs)
    if not problem.strip():
        raise Defect("without a problem", needs)
    if "Step 1:" in first:
        raise Defect("two steps in one piece, or Step 1: in the problem",
                     f"{here}: 'Step 1:' stands there twice; correct it")
    steps = _tagged_steps([first, *pieces[1:]], here)
    if not all(steps):
        raise Defect(BLANK_STEP, needs)
    return Solution(name_of(row) or where, problem.strip(), tuple(steps), first_wrong(correct))


def _shepherd_signs(pieces: list[str], label: str, where: str) -> list[bool]:
    """The sign in place of the tag after each piece: only these count, not the + and - of the text."""
    signs = []
    start = 0
    for piece in pieces:
        end = start + len(piece)
        if label[start:end] != piece or label[end:end + 1] not in ("+", "-"):
            raise Defect("label that is not the input",
                         f"{where}: field 'label' is not 'input' with + or - in place of each tag "
                         f"(from character {end}); correct it")
        signs.append(label[end] == "+")
        start = end + 1
    return signs


def _tagged_steps(pieces: list[str], here: str) -> list[str]:
    """The texts between the tags without their numbers. The next step's number in one means a missing tag."""
    steps = []
    for number, piece in enumerate(pieces, 1):
        step = without_number(piece, number, here)
        if f"Step {number + 1}:" in step:
            raise Defect("two steps in one piece (a tag is missing)",
                         f"{here}: no tag stands between step {number} and step {number + 1}; correct it")
        steps.append(step)
    return steps


def _sign(value: Any, here: str) -> bool:
    """OpenR's + or -, or 1 or 0."""
    if isinstance(value, str) and value.strip() in ("+", "-"):
        return value.strip() == "+"
    return truth(value, here)


def _check_count(labels: list, steps: list, here: str) -> None:
    if len(labels) != len(steps):
        raise Defect("with another number of labels than of steps",
                     f"{here}: {len(labels)} labels for {len(steps)} steps; correct it")
