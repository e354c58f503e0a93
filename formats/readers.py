"""The formats in the wild: ProcessBench, PRM800K, Math-Shepherd and the official R-PRM seed rows -> cases.

A reader takes one row and gives the labelled steps in it as (step's name, Case), and counts what it drops.
"""
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator

from plumbing.errors import BadInput
from plumbing.files import Lines, expect, get_field, parse_json
from rprm import Case

Labelled = list[tuple[str, Case]]
TAG = "ки"  # Math-Shepherd's mark at the end of each step
MAX_STEPS = 1000  # of a solution: each step is a case that repeats all steps before it, so a hostile line of 1 MB could become 1 TB


@dataclass(frozen=True)
class Solution:
    """A line of ProcessBench: `label` is the index of the first wrong step, -1 = none, None = unknown."""
    id: str
    problem: str
    steps: tuple[str, ...]
    label: int | None


def read_rows(path: str | Path) -> Lines | list[tuple[str, dict]]:
    """("FILE:ROW", object) of each row of a JSON array, a single JSON object, or JSON lines.

    JSON lines are read on demand. An array is read whole, which takes about six times the file's size in memory: 2 GB at 300 MB.
    ProcessBench, whose form it is, has some MB; give larger files as JSON lines.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: no such file; check the path")
    with open(path, "rb") as file:
        first = file.readline().strip()
        while not first and (line := file.readline()):
            first = line.strip()
    if first.startswith(b"[") or first == b"{":  # one value over many lines
        value = parse_json(path.read_bytes(), str(path))
        rows = [(f"{path}: row {number}", row) for number, row in enumerate(value if isinstance(value, list) else [value], 1)]
        return [(where, expect(row, dict, where)) for where, row in rows]
    return Lines(path)


def read_solution(row: dict, where: str, need_label: bool = False) -> Solution:
    """A ProcessBench row. Raises BadInput for empty steps or a label out of range."""
    steps = get_field(row, "steps", list, where)
    if not steps or any(not isinstance(s, str) or not s.strip() for s in steps):
        raise BadInput(f"{where}: field 'steps': needs at least one step and no empty ones; correct it")
    _check_number(steps, f"{where}: field 'steps'")
    label = get_field(row, "label", int, where) if need_label or row.get("label") is not None else None
    if label is not None and not -1 <= label < len(steps):
        raise BadInput(f"{where}: field 'label': {label} is out of range (-1 to {len(steps) - 1}); correct it")
    return Solution(str(row.get("id", where)), _text(row, "problem", where), tuple(steps), label)


def read_case(row: dict, where: str) -> Case:
    """A line of cases.jsonl, or the "case" of a line of samples.jsonl."""
    expect(row, dict, f"{where}: field 'case'")
    previous = get_field(row, "previous_steps", list, where)
    label = row.get("label")
    return Case(_text(row, "problem", where), tuple(expect(s, str, f"{where}: field 'previous_steps'") for s in previous),
                _text(row, "now_step", where), None if label is None else expect(label, bool, f"{where}: field 'label'"))


def _text(row: dict, name: str, where: str) -> str:
    text = get_field(row, name, str, where)
    if not text.strip():
        raise BadInput(f"{where}: field '{name}' is empty; fill it in or remove the line")
    return text


def _check_number(steps: list, where: str) -> None:
    if len(steps) > MAX_STEPS:
        raise BadInput(f"{where}: {len(steps)} steps, more than {MAX_STEPS}; remove the line")


def read_labelled_steps(path: str | Path, counts: Counter) -> Iterator[tuple[str, Labelled]]:
    """(id, [(step's name, case)]) for each row of a file; which format it is, its fields say."""
    read = None
    for where, row in read_rows(path):
        read = read or choose_reader(row, where)
        found = read(row, where, counts)
        yield str(row.get("id", where.rpartition("/")[2].replace(": row ", ":"))), found


def choose_reader(row: dict, where: str) -> Callable:
    readers = {("steps", "label"): processbench, ("question", "label"): prm800k, ("input", "label"): math_shepherd,
               ("query", "now-step"): seed_row}
    for names, reader in readers.items():
        if all(name in row for name in names):
            return reader
    raise BadInput(f"{where}: fields {', '.join(map(str, row))[:80]} are no known format (ProcessBench, PRM800K, Math-Shepherd, "
                   f"R-PRM seed rows); convert the file")


def _until_first_error(problem: str, steps: list[str], correct: list[bool], counts: Counter) -> Labelled:
    """A case per step up to the first wrong one: after it the previous steps are no longer to be trusted."""
    last = correct.index(False) if False in correct else len(steps) - 1
    counts["dropped: step after the first wrong one"] += len(steps) - 1 - last
    return [(str(i), Case(problem, tuple(steps[:i]), steps[i], correct[i])) for i in range(last + 1)]


def processbench(row: dict, where: str, counts: Counter) -> Labelled:
    """{problem, steps, label}: label = index of the first wrong step, -1 = none."""
    s = read_solution(row, where, need_label=True)
    return _until_first_error(s.problem, list(s.steps), [s.label == -1 or i < s.label for i in range(len(s.steps))], counts)


def prm800k(row: dict, where: str, counts: Counter) -> Labelled:
    """Each rated completion is a case whose previous steps are the chosen ones before it. Rating 1, -1; 0 = neutral, dropped."""
    for name, reason in (("is_quality_control_question", "quality control"), ("is_initial_screening_question", "screening")):
        if row.get(name):
            counts[f"dropped: {reason} row"] += 1
            return []
    problem = _text(get_field(row, "question", dict, where), "problem", f"{where}: field 'question'")
    found, previous = [], ()
    steps = get_field(get_field(row, "label", dict, where), "steps", list, f"{where}: field 'label'")
    _check_number(steps, f"{where}: field 'label.steps'")
    for i, step in enumerate(steps):
        here = f"{where}: field 'label.steps'[{i}]"
        completions = expect(step, dict, here).get("completions") or []
        for j, completion in enumerate(expect(completions, list, f"{here}.completions")):
            text = get_field(expect(completion, dict, f"{here}.completions[{j}]"), "text", str, f"{here}.completions[{j}]")
            rating = completion.get("rating")
            if rating not in (1, 0, -1, None) or isinstance(rating, bool):
                raise BadInput(f"{here}.completions[{j}]: field 'rating': {rating!r} is not 1, 0 or -1; correct it")
            if rating in (1, -1) and text.strip():
                found.append((f"{i}-{j}", Case(problem, previous, text, rating == 1)))
            else:
                counts["dropped: neutral step" if rating == 0 else "dropped: step without a rating"] += 1
        chosen, human = step.get("chosen_completion"), step.get("human_completion")
        if chosen is not None:
            if isinstance(chosen, bool) or not isinstance(chosen, int) or not 0 <= chosen < len(completions):
                raise BadInput(f"{here}: field 'chosen_completion': {chosen!r} is out of range (0 to {len(completions) - 1}); correct it")
            previous += (completions[chosen]["text"],)
        elif human is not None:
            human = human.get("text") if isinstance(human, dict) else human
            previous += (expect(human, str, f"{here}: field 'human_completion'"),)
        else:
            break  # the solution ends here
    return found


def math_shepherd(row: dict, where: str, counts: Counter) -> Labelled:
    """`input` has a tag at the end of each step; `label` is the same text with + or - in place of each tag."""
    text, label = get_field(row, "input", str, where), get_field(row, "label", str, where)
    pieces = text.split(TAG)
    _check_number(pieces[:-1], f"{where}: field 'input'")
    signs, at = [], 0
    for piece in pieces[:-1]:
        at += len(piece)
        if label[at - len(piece):at] != piece or label[at:at + 1] not in ("+", "-"):
            raise BadInput(f"{where}: field 'label' is not 'input' with + or - in place of each tag (from character {at}); correct it")
        signs.append(label[at] == "+")
        at += 1
    counts["dropped: text after Math-Shepherd's last tag"] += bool(pieces[-1].strip())
    head, mark, first = pieces[0].rpartition("Step 1:")
    steps = [re.sub(r"^\s*Step \d+:", "", piece).strip() for piece in [first, *pieces[1:-1]]]
    if not mark or not head.strip() or not signs or not all(steps):
        raise BadInput(f"{where}: field 'input': needs a problem, then 'Step 1: ... {TAG}' and so on, no step empty; correct it")
    return _until_first_error(head.strip(), steps, signs, counts)


def seed_row(row: dict, where: str, counts: Counter) -> Labelled:
    """The official R-PRM rows {id, query, previous-steps, now-step, expert-judge: Positive | Negative}."""
    judge = get_field(row, "expert-judge", str, where)
    if judge not in ("Positive", "Negative"):
        raise BadInput(f"{where}: field 'expert-judge': {judge[:40]!r} is not Positive or Negative; correct it")
    previous = row.get("previous-steps") or []
    if isinstance(previous, str):
        previous = re.split(r"(?:^|\n)[^\S\n]*Step \d+:", previous)
    here = f"{where}: field 'previous-steps'"
    steps = [re.sub(r"^\s*Step \d+:", "", expect(s, str, here)).strip() for s in expect(previous, list, here)]
    now = re.sub(r"^\s*Step \d+:", "", get_field(row, "now-step", str, where)).strip()
    if not now:
        raise BadInput(f"{where}: field 'now-step' is empty; fill it in or remove the line")
    return [("0", Case(_text(row, "query", where), tuple(s for s in steps if s), now, judge == "Positive"))]
