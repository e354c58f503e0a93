"""What the readers of public formats share: the solution that a row is read into, its defects and its values.

What takes a value out of a row raises BadInput where the value is not what it should be. `where` is
"FILE:LINE", and `here` names the field too.
"""
import re
from dataclasses import dataclass, field
from typing import Any

from plumbing.errors import BadInput
from plumbing.files import expect, get_field
from rprm import Case

Labelled = list[tuple[str, Case]]  # the labelled steps of a row: (step's name, case)
MAX_STEPS = 1000  # Each is a case that repeats all before it: a hostile line of 1 MB could become 1 TB.
MARK = re.compile(r"(?:^|\n)[^\S\n]*Step ([0-9]+):")  # a line that begins with a step's number
NO_PREVIOUS_STEPS = re.compile(r"\bno previous steps?\b", re.IGNORECASE)
# reasons, as the table has them
AFTER_FIRST_WRONG = "dropped: step after the first wrong one"
BLANK_STEP = "with a blank step"
OUT_OF_RANGE = "label out of range"


@dataclass(frozen=True)
class Solution:
    """A whole solution: `label` is the index of the first wrong step, -1 = none, None = unknown.

    extra: what its format says besides, which goes into its line of scores.jsonl: PRMBench's "classification"
    and "error_steps"; "candidate", its number among those for its problem; "answer", "final_answer",
    "correct".
    """
    id: str
    problem: str
    steps: tuple[str, ...]
    label: int | None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def needs_all_steps(self) -> bool:
        """Are steps after the first one predicted wrong needed: for PRMBench's figures, or to choose the
        best?
        """
        return "classification" in self.extra or "candidate" in self.extra


class Defect(BadInput):
    """A row that its format does not allow, or that can be read in two ways. `reason` names its kind."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


# ---------------------------------------------------------------------------------------------- single values

def text_of(row: dict, name: str, where: str) -> str:
    """row[name], a text that is not blank."""
    text = get_field(row, name, str, where)
    if not text.strip():
        raise Defect(f"with a blank {name}",
                     f"{where}: field '{name}' is empty; fill it in or remove the line")
    return text


def whole_number(row: dict, name: str, where: str) -> int:
    """row[name]; pandas writes 1 as 1.0 in a column that has gaps."""
    if name not in row:
        get_field(row, name, int, where)  # says that it is missing
    return whole(row[name], f"{where}: field '{name}'")


def whole(value: Any, here: str) -> int:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return expect(value, int, here)


def truth(value: Any, here: str) -> bool:
    """true or false, or 1 or 0, as pandas may have it."""
    if value in (0, 1):
        return bool(value)
    return expect(value, bool, here)


def label_of(row: dict, where: str) -> int | None:
    return None if row.get("label") is None else whole_number(row, "label", where)


def first_wrong(correct: list[bool]) -> int:
    """The label of a solution whose steps are so: [True, False, True] -> 1; -1 if all are correct."""
    return correct.index(False) if False in correct else -1


def name_of(row: dict) -> str | None:
    """What a row calls its solution; None where it has no name."""
    if row.get("now_step") is not None and row.get("origin_id") is not None:  # one of R-PRM's evaluation rows
        return shown(row["origin_id"])
    if row.get("idx") is not None and row.get("classification") is not None:
        return f"{shown(row['classification'])}-{shown(row['idx'])}"  # PRMBench has an idx in several classes
    return None if row.get("id") is None else shown(row["id"])


def shown(name: Any) -> str:
    """A name as a text; what pandas made 3.0 was 3."""
    return str(int(name)) if isinstance(name, float) and name.is_integer() else str(name)


# ---------------------------------------------------------------------------------------------- steps

def make_solution(row: dict, where: str, problem: str, field: str, steps: list,
                  label: int | None) -> Solution:
    """The solution of the problem in the field `problem`, whose steps were found in `field`.

    Raises Defect unless there are steps, none is blank, and the label is one of theirs.
    """
    here = f"{where}: field '{field}'"
    if not steps:
        raise Defect("without steps", f"{here}: needs at least one step and no empty ones; correct it")
    for step in steps:
        if not expect(step, str, here).strip():
            raise Defect(BLANK_STEP, f"{here}: needs at least one step and no empty ones; correct it")
    check_number(steps, here)
    if label is not None and not -1 <= label < len(steps):
        here = f"{where}: field 'label'"
        raise Defect(OUT_OF_RANGE, f"{here}: {label} is out of range (-1 to {len(steps) - 1}); correct it")
    return Solution(name_of(row) or where, text_of(row, problem, where), tuple(steps), label)


def check_number(steps: list, here: str) -> None:
    if len(steps) > MAX_STEPS:
        raise Defect(f"of more than {MAX_STEPS} steps",
                     f"{here}: {len(steps)} steps, more than {MAX_STEPS}; remove the line")


def without_number(text: str, number: int, here: str) -> str:
    """A step's text without the "Step N:" that it may begin with; N must be the step's number."""
    text = text.strip()
    mark = MARK.match(text)
    if mark is None:
        return text
    if mark[1] != str(number):
        raise Defect("with step numbers that do not fit",
                     f"{here}: 'Step {mark[1][:20]}:' stands where step {number} is expected; correct it")
    return text[mark.end():].strip()


def split_numbered(text: str, here: str) -> list[str]:
    """The steps of "Step 1: ...\\nStep 2: ...", which may go over several lines.

    A step begins where a line begins with the next expected number, as a step may have such lines of its own:

        Step 1: Plan:\\nStep 1: add\\nStep 2: multiply\\nStep 2: So 5.   ->   two steps

    A sentence may say that there are none.
    """
    marks = []
    for mark in MARK.finditer(text):
        if mark[1] == str(len(marks) + 1):
            marks.append(mark)
    if not marks and (not text.strip() or NO_PREVIOUS_STEPS.search(text)):
        return []
    if not marks or text[:marks[0].start()].strip():
        raise Defect("previous steps that do not begin with Step 1:",
                     f"{here}: does not begin with 'Step 1:'; correct it")
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [text[mark.end():end].strip() for mark, end in zip(marks, ends)]
