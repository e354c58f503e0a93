"""R-PRM's own rows, each of which is one step with the steps before it.

    seed rows         {id, query, previous-steps, now-step, expert-judge: Positive | Negative}
    evaluation rows   {id, origin_id, question, previous_steps, now_step, label}

Evaluation rows of one origin_id make a solution. The previous steps are one text, "Step 1: ...\\nStep 2:
...", or a sentence that says that there are none.
"""
from collections import Counter

from formats.rows import (
    AFTER_FIRST_WRONG,
    BLANK_STEP,
    MARK,
    OUT_OF_RANGE,
    Defect,
    Labelled,
    Solution,
    label_of,
    make_solution,
    name_of,
    split_numbered,
    text_of,
    without_number,
)
from plumbing.errors import BadInput
from plumbing.files import expect, get_field
from rprm import Case


def seed_row(row: dict, where: str, counts: Counter) -> Labelled:
    judge = get_field(row, "expert-judge", str, where)
    if judge not in ("Positive", "Negative"):
        raise Defect(OUT_OF_RANGE,
                     f"{where}: field 'expert-judge': {judge[:40]!r} is not Positive or Negative; correct it")
    previous, now = _previous_and_now(row, "previous-steps", "now-step", where)
    return [("0", Case(text_of(row, "query", where), previous, now, judge == "Positive"))]


def evaluation_row(row: dict, where: str, counts: Counter) -> Labelled:
    """label = index of the solution's first wrong step, -1 = none: what comes after it is dropped."""
    problem = text_of(row, "question", where)
    previous, now = _previous_and_now(row, "previous_steps", "now_step", where)
    label = label_of(row, where)
    if label is None:
        raise Defect("without a label", f"{where}: field 'label' is missing; add it or remove the line")
    if label < -1:
        raise Defect(OUT_OF_RANGE, f"{where}: field 'label': {label} is out of range (-1 = none); correct it")
    if label != -1 and len(previous) > label:
        counts[AFTER_FIRST_WRONG] += 1
        return []
    return [(str(len(previous)), Case(problem, previous, now, len(previous) != label))]


def _previous_and_now(row: dict, previous_name: str, now_name: str,
                      where: str) -> tuple[tuple[str, ...], str]:
    """The previous steps, from one text or a list, and the step after them, whose number must be the next."""
    previous = row.get(previous_name) or []
    here = f"{where}: field '{previous_name}'"
    if isinstance(previous, str):
        steps = split_numbered(previous, here)
    else:
        steps = []
        for number, step in enumerate(expect(previous, list, here), 1):
            steps.append(without_number(expect(step, str, here), number, here))
    if not all(steps):
        raise Defect(BLANK_STEP, f"{here}: has an empty step; correct it")
    here = f"{where}: field '{now_name}'"
    now = without_number(get_field(row, now_name, str, where), len(steps) + 1, here)
    if not now:
        raise Defect(BLANK_STEP, f"{here} is empty; fill it in or remove the line")
    return tuple(steps), now


# ---------------------------------------------------------------------------------------------- joining steps

def is_evaluation_row(row: dict) -> bool:
    return all(row.get(name) is not None for name in ("origin_id", "question", "now_step"))


def join_steps(rows: list[tuple[str, dict]]) -> Solution:
    """The solution whose steps are these evaluation rows, (where, row) in any order. They must agree."""
    ordered = _in_order(rows)
    first_where, first = ordered[0]
    steps = []
    for number, (where, row) in enumerate(ordered, 1):
        name = name_of(row)
        for field in ("question", "label"):
            if row.get(field) != first.get(field):
                raise BadInput(f"{where}: field '{field}' is not that of {first_where}, another step of "
                               f"{name!r}; correct it")
        previous = row.get("previous_steps")
        if steps and isinstance(previous, str) and not _are_alike(previous, steps):
            raise BadInput(f"{where}: field 'previous_steps' does not have the steps of the other rows of "
                           f"{name!r}; correct it")
        steps.append(without_number(row["now_step"], number, f"{where}: field 'now_step'"))
    return make_solution(first, first_where, "question", "now_step", steps, label_of(first, first_where))


def _in_order(rows: list[tuple[str, dict]]) -> list[tuple[str, dict]]:
    """The rows in the order of their steps, which must be all from the first to the last."""
    found = {}
    for where, row in rows:
        mark = MARK.match(get_field(row, "now_step", str, where).lstrip())
        if mark:
            number = int(mark[1][:9])
        else:
            previous, _ = _previous_and_now(row, "previous_steps", "now_step", where)
            number = len(previous) + 1
        if number in found:
            raise BadInput(f"{where}: field 'now_step': step {number} of {name_of(row)!r} stands in "
                           f"{found[number][0]} already; remove one")
        found[number] = where, row
    for number in range(1, len(found) + 1):
        if number not in found:
            where, row = rows[0]
            raise BadInput(f"{where}: field 'origin_id': step {number} of {name_of(row)!r} is missing; "
                           "add its row")
    return [found[number] for number in sorted(found)]


def _are_alike(previous: str, steps: list[str]) -> bool:
    """Is a text of previous steps that of these steps, white space apart?"""
    expected = "".join(f"Step {number}: {step}" for number, step in enumerate(steps, 1))
    return "".join(previous.split()) == "".join(expected.split())
