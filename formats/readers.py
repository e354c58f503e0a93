"""The formats in the wild -> cases to learn from, and solutions to judge.

A row says by the fields that it has of which format it is, so that one file may hold several.

    format                     fields                                                    a row is
    ProcessBench               {problem, steps, label}                                   a solution
    PRMBench                   {modified_question, modified_process, error_steps}        a solution
    TRL's stepwise rows        {prompt, completions, labels: [true | false]}             a solution
    OpenR, Math-APS            {question, process, label: [+ | -]}                       a solution
    Math-Shepherd              {input, label}                                            a solution
    R-PRM's evaluation rows    {origin_id, question, previous_steps, now_step, label}    a step of a solution
    R-PRM's seed rows          {query, previous-steps, now-step, expert-judge}           a step
    PRM800K                    {question: {problem}, label: {steps}}                     a tree of steps

A reader takes one row and gives its Solution, or the labelled steps in it as (step's name, Case). It counts what it
leaves out. A row that does not say clearly what it means raises Defect: no row is read as something that it does not say.
"""
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Sequence

from plumbing.errors import BadInput
from formats.containers import Rows, read_rows
from plumbing.files import expect, get_field
from rprm import Case

Labelled = list[tuple[str, Case]]
SHEPHERD_TAG = "ки"                      # Math-Shepherd's mark at the end of each step
OPENR_TAG = re.compile(r"\n{5,}")        # OpenR's
MARK = re.compile(r"(?:^|\n)[^\S\n]*Step ([0-9]+):")  # where a line begins with a step's number
NO_PREVIOUS_STEPS = re.compile(r"\bno previous steps?\b", re.IGNORECASE)
NEUTRAL = "neutral step"
# Each step of a solution is a case that repeats all steps before it: a hostile line of 1 MB could become 1 TB.
MAX_STEPS = 1000


@dataclass(frozen=True)
class Solution:
    """A whole solution: `label` is the index of the first wrong step, -1 = none, None = unknown."""
    id: str
    problem: str
    steps: tuple[str, ...]
    label: int | None


class Defect(BadInput):
    """A row that its format does not allow, or that can be read in two ways. `reason` names the kind in a table."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


# ---------------------------------------------------------------------------------------------- inputs

def read_labelled_steps(path: str | Path, counts: Counter, strict: bool = False,
                        firsts: dict[str, str] | None = None) -> Iterator[tuple[str, Labelled]]:
    """(id, [(step's name, case)]) for each row of an input.

    A row with a defect is dropped and counted by reason, and firsts[reason] says where the first one stands and what
    is wrong with it; with `strict` it is an error. An input of which no row can be read is an error.
    """
    firsts = {} if firsts is None else firsts
    first_error, usable = None, False
    for where, row in read_rows(path):
        found_in_row = Counter()
        try:
            found = labelled_steps(row, where, found_in_row)
        except BadInput as error:
            if strict:
                raise
            reason = f"dropped row: {reason_of(error)}"
            counts[reason] += 1
            firsts.setdefault(reason, str(error))
            first_error = first_error or error
            continue
        usable = True
        counts.update(found_in_row)
        yield name_of(row) or where.rpartition("/")[2].replace(": row ", ":"), found
    if first_error and not usable:
        raise first_error


def reason_of(error: BadInput) -> str:
    return error.reason if isinstance(error, Defect) else "of another shape"


class SolutionRows(Sequence):
    """The solutions of an input, read on demand: solutions[i] -> ("FILE:ROW", Solution). Raises BadInput.

    Where the rows are R-PRM's evaluation rows, those of one origin_id make a solution, wherever they stand.
    """

    def __init__(self, rows: Rows):
        self.rows = rows
        self.groups = None  # the numbers of each solution's rows
        if len(rows) and _is_evaluation_row(rows[0][1]):
            groups = {}
            for i, (where, row) in enumerate(rows):
                if not _is_evaluation_row(row):
                    raise BadInput(f"{where}: is no step with an origin_id, as the rows before it are; give it in a file of its own")
                groups.setdefault(_shown(row["origin_id"]), []).append(i)
            self.groups = list(groups.values())

    def __len__(self) -> int:
        return len(self.rows if self.groups is None else self.groups)

    def __getitem__(self, i: int) -> tuple[str, Solution]:
        if self.groups is None:
            where, row = self.rows[i]
            return where, read_solution(row, where)
        rows = [self.rows[number] for number in self.groups[i]]
        return rows[0][0], _joined(rows)


def read_solutions(path: str | Path) -> SolutionRows:
    """The solutions of a file, of a folder of files, or of standard input ("-")."""
    return SolutionRows(read_rows(path))


def read_solution(row: dict, where: str) -> Solution:
    """The solution of a row that holds a whole one. Raises BadInput for empty steps or a label out of range."""
    found = choose_reader(row, where)(row, where, Counter())
    if not isinstance(found, Solution):
        raise BadInput(f"{where}: is no whole solution, but single steps; take it to `data.py cases`")
    return found


def read_case(row: dict, where: str) -> Case:
    """A line of cases.jsonl, or the "case" of a line of samples.jsonl."""
    expect(row, dict, f"{where}: field 'case'")
    previous = get_field(row, "previous_steps", list, where)
    label = row.get("label")
    return Case(_text(row, "problem", where), tuple(expect(s, str, f"{where}: field 'previous_steps'") for s in previous),
                _text(row, "now_step", where), None if label is None else expect(label, bool, f"{where}: field 'label'"))


# ---------------------------------------------------------------------------------------------- formats told apart

def choose_reader(row: dict, where: str) -> Callable[[dict, str, Counter], Solution | Labelled]:
    """The reader for the format whose fields a row has. One that is null counts only where no others tell."""
    for names, reader in READERS:
        if all(row.get(name) is not None for name in names):
            return reader
    if isinstance(row.get("question"), dict) or isinstance(row.get("label"), dict):
        return prm800k
    for names, reader in READERS:
        if all(name in row for name in names):
            return reader
    fields = ", ".join(map(str, row))[:80]
    raise BadInput(f"{where}: fields {fields} are no known format (ProcessBench, PRMBench, TRL, OpenR, Math-Shepherd, "
                   f"PRM800K, R-PRM's seed and evaluation rows); convert the file")


def labelled_steps(row: dict, where: str, counts: Counter) -> Labelled:
    """The cases in a row, of whatever format."""
    found = choose_reader(row, where)(row, where, counts)
    return _until_first_error(found, where, counts) if isinstance(found, Solution) else found


def _until_first_error(solution: Solution, where: str, counts: Counter) -> Labelled:
    """A case per step up to the first wrong one: after it the previous steps are no longer to be trusted."""
    if solution.label is None:
        raise Defect("without a label", f"{where}: field 'label' is missing or says nothing of the steps that are there; "
                                        f"add it or remove the line")
    steps = solution.steps
    last = len(steps) - 1 if solution.label == -1 else solution.label
    counts["dropped: step after the first wrong one"] += len(steps) - 1 - last
    return [(str(i), Case(solution.problem, steps[:i], steps[i], i != solution.label)) for i in range(last + 1)]


def name_of(row: dict) -> str | None:
    """What a row calls its solution; None where it has no name."""
    if row.get("now_step") is not None and row.get("origin_id") is not None:
        return _shown(row["origin_id"])
    if row.get("idx") is not None and row.get("classification") is not None:  # PRMBench: idx is the same in every class
        return f"{_shown(row['classification'])}-{_shown(row['idx'])}"
    return None if row.get("id") is None else _shown(row["id"])


def _shown(value: Any) -> str:
    """A name as a text; what pandas made 3.0 was 3."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


# ---------------------------------------------------------------------------------------------- rows that are solutions

def processbench(row: dict, where: str, counts: Counter) -> Solution:
    """{problem, steps, label}: label = index of the first wrong step, -1 = none."""
    steps = get_field(row, "steps", list, where)
    label = None if row.get("label") is None else _whole_number(row, "label", where)
    return _solution(row, where, "problem", "steps", steps, label)


def prmbench(row: dict, where: str, counts: Counter) -> Solution:
    """{modified_question, modified_process: [step], error_steps: [number of a wrong step, from 1]}.

    Some rows name error steps beyond the last one. They are ignored; where there are no others, the label is unknown.
    """
    steps = get_field(row, "modified_process", list, where)
    if row.get("error_steps") is None:
        return _solution(row, where, "modified_question", "modified_process", steps, None)
    here = f"{where}: field 'error_steps'"
    wrong = [_whole(number, here) for number in get_field(row, "error_steps", list, where)]
    if any(number < 1 for number in wrong):
        raise Defect("label out of range", f"{here}: {min(wrong)} is no step's number (they begin with 1); correct it")
    present = [number for number in wrong if number <= len(steps)]
    counts["ignored: error step beyond the last step"] += len(wrong) - len(present)
    label = min(present) - 1 if present else None if wrong else -1
    return _solution(row, where, "modified_question", "modified_process", steps, label)


def stepwise(row: dict, where: str, counts: Counter) -> Solution:
    """TRL's {prompt, completions: [step], labels: [is the step correct?]}. The steps may bear their numbers."""
    here = f"{where}: field 'completions'"
    steps = [_without_number(expect(step, str, here), number, here)
             for number, step in enumerate(get_field(row, "completions", list, where), 1)]
    labels = get_field(row, "labels", list, where)
    correct = [_truth(label, f"{where}: field 'labels'") for label in labels]
    _check_count(len(correct), len(steps), f"{where}: field 'labels'")
    return _solution(row, where, "prompt", "completions", steps, _first_wrong(correct))


def openr(row: dict, where: str, counts: Counter) -> Solution:
    """OpenR's {question, process, label: [+ | -]}: process has a tag after each step, "ки" or five line ends."""
    process = get_field(row, "process", str, where)
    correct = [_sign(label, f"{where}: field 'label'") for label in get_field(row, "label", list, where)]
    pieces = process.split(SHEPHERD_TAG) if SHEPHERD_TAG in process else OPENR_TAG.split(process)
    if not pieces[-1].strip():
        pieces.pop()
    elif len(pieces) == len(correct) + 1:
        pieces.pop()
        counts["dropped: text after the last tag"] += 1
    _check_count(len(correct), len(pieces), f"{where}: field 'label'")
    steps = _tagged_steps(pieces, f"{where}: field 'process'")
    return _solution(row, where, "question", "process", steps, _first_wrong(correct))


def math_shepherd(row: dict, where: str, counts: Counter) -> Solution:
    """`input` has a tag at the end of each step; `label` is the same text with + or - in place of each tag."""
    here = f"{where}: field 'input'"
    *pieces, rest = get_field(row, "input", str, where).split(SHEPHERD_TAG)
    _check_number(pieces, here)
    correct = _shepherd_signs(pieces, get_field(row, "label", str, where), where)
    counts["dropped: text after Math-Shepherd's last tag"] += bool(rest.strip())
    needed = f"needs a problem, then 'Step 1: ... {SHEPHERD_TAG}' and so on, no step empty; correct it"
    if not pieces:
        raise Defect("without a tag", f"{here}: {needed}")
    problem, mark, first = pieces[0].partition("Step 1:")
    if not mark or not problem.strip():
        raise Defect(f"without {'a problem' if mark else 'Step 1:'}", f"{here}: {needed}")
    if "Step 1:" in first:
        raise Defect("two steps in one piece, or Step 1: in the problem", f"{here}: 'Step 1:' stands there twice; correct it")
    steps = _tagged_steps([first, *pieces[1:]], here)
    if not all(steps):
        raise Defect("with a blank step", f"{here}: {needed}")
    return Solution(name_of(row) or where, problem.strip(), tuple(steps), _first_wrong(correct))


def _shepherd_signs(pieces: list[str], label: str, where: str) -> list[bool]:
    """The sign in place of the tag after each piece: only these count, not the + and - of the text."""
    signs, at = [], 0
    for piece in pieces:
        end = at + len(piece)
        if label[at:end] != piece or label[end:end + 1] not in ("+", "-"):
            raise Defect("label that is not the input", f"{where}: field 'label' is not 'input' with + or - in place of "
                                                        f"each tag (from character {end}); correct it")
        signs.append(label[end] == "+")
        at = end + 1
    return signs


def _tagged_steps(pieces: list[str], here: str) -> list[str]:
    """The texts between the tags without their numbers. The next step's number in one of them shows that a tag is missing."""
    steps = []
    for number, piece in enumerate(pieces, 1):
        step = _without_number(piece, number, here)
        if f"Step {number + 1}:" in step:
            raise Defect("two steps in one piece (a tag is missing)",
                         f"{here}: no tag stands between step {number} and step {number + 1}; correct it")
        steps.append(step)
    return steps


def _solution(row: dict, where: str, problem: str, field: str, steps: list, label: int | None) -> Solution:
    """The solution with the steps that were found in `field`, if there are any, none is blank, and the label fits them."""
    here = f"{where}: field '{field}'"
    if not steps:
        raise Defect("without steps", f"{here}: needs at least one step and no empty ones; correct it")
    for step in steps:
        if not expect(step, str, here).strip():
            raise Defect("with a blank step", f"{here}: needs at least one step and no empty ones; correct it")
    _check_number(steps, here)
    if label is not None and not -1 <= label < len(steps):
        raise Defect("label out of range",
                     f"{where}: field 'label': {label} is out of range (-1 to {len(steps) - 1}); correct it")
    return Solution(name_of(row) or where, _text(row, problem, where), tuple(steps), label)


# ---------------------------------------------------------------------------------------------- rows that are steps

def evaluation_row(row: dict, where: str, counts: Counter) -> Labelled:
    """R-PRM's {origin_id, question, previous_steps, now_step, label}: label = index of the solution's first wrong step."""
    problem = _text(row, "question", where)
    previous, now = _previous_and_now(row, "previous_steps", "now_step", where)
    if row.get("label") is None:
        raise Defect("without a label", f"{where}: field 'label' is missing; add it or remove the line")
    label = _whole_number(row, "label", where)
    if label < -1:
        raise Defect("label out of range", f"{where}: field 'label': {label} is out of range (-1 = none); correct it")
    if label != -1 and len(previous) > label:
        counts["dropped: step after the first wrong one"] += 1
        return []
    return [(str(len(previous)), Case(problem, previous, now, len(previous) != label))]


def _is_evaluation_row(row: dict) -> bool:
    return all(row.get(name) is not None for name in ("origin_id", "question", "now_step"))


def _joined(rows: list[tuple[str, dict]]) -> Solution:
    """The solution whose steps are these evaluation rows, in any order. All must agree about it."""
    by_number = _by_number(rows)
    steps = []
    for number, (where, row) in enumerate(by_number, 1):
        first_where, first = by_number[0]
        for name in ("question", "label"):
            if row.get(name) != first.get(name):
                raise BadInput(f"{where}: field '{name}' is not that of {first_where}, another step of {name_of(row)!r}; "
                               f"correct it")
        previous = row.get("previous_steps")
        if steps and isinstance(previous, str) and _without_spaces(previous) != _without_spaces(_numbered(steps)):
            raise BadInput(f"{where}: field 'previous_steps' does not have the steps of the other rows of {name_of(row)!r}; "
                           f"correct it")
        steps.append(_without_number(row["now_step"], number, f"{where}: field 'now_step'"))
    label = None if first.get("label") is None else _whole_number(first, "label", first_where)
    return _solution(first, first_where, "question", "now_step", steps, label)


def _by_number(rows: list[tuple[str, dict]]) -> list[tuple[str, dict]]:
    """The rows in the order of their steps, which must be all from the first to the last."""
    found = {}
    for where, row in rows:
        mark = MARK.match(get_field(row, "now_step", str, where).lstrip())
        if mark:
            number = int(mark[1][:9])
        else:
            number = len(_previous_and_now(row, "previous_steps", "now_step", where)[0]) + 1
        if number in found:
            raise BadInput(f"{where}: field 'now_step': step {number} of {name_of(row)!r} stands in {found[number][0]} "
                           f"already; remove one")
        found[number] = where, row
    for number in range(1, len(found) + 1):
        if number not in found:
            where, row = rows[0]
            raise BadInput(f"{where}: field 'origin_id': step {number} of {name_of(row)!r} is missing; add its row")
    return [found[number] for number in sorted(found)]


def _numbered(steps: list[str]) -> str:
    return "\n".join(f"Step {number}: {step}" for number, step in enumerate(steps, 1))


def _without_spaces(text: str) -> str:
    return "".join(text.split())


def seed_row(row: dict, where: str, counts: Counter) -> Labelled:
    """The official R-PRM rows {id, query, previous-steps, now-step, expert-judge: Positive | Negative}."""
    judge = get_field(row, "expert-judge", str, where)
    if judge not in ("Positive", "Negative"):
        raise Defect("label out of range",
                     f"{where}: field 'expert-judge': {judge[:40]!r} is not Positive or Negative; correct it")
    previous, now = _previous_and_now(row, "previous-steps", "now-step", where)
    return [("0", Case(_text(row, "query", where), previous, now, judge == "Positive"))]


def _previous_and_now(row: dict, previous_name: str, now_name: str, where: str) -> tuple[tuple[str, ...], str]:
    """The previous steps, from one text or a list, and the step after them, whose number must be the next one."""
    previous = row.get(previous_name) or []
    here = f"{where}: field '{previous_name}'"
    if isinstance(previous, str):
        steps = _numbered_steps(previous, here)
    else:
        steps = [_without_number(expect(step, str, here), number, here)
                 for number, step in enumerate(expect(previous, list, here), 1)]
    if not all(steps):
        raise Defect("with a blank step", f"{here}: has an empty step; correct it")
    here = f"{where}: field '{now_name}'"
    now = _without_number(get_field(row, now_name, str, where), len(steps) + 1, here)
    if not now:
        raise Defect("with a blank step", f"{here} is empty; fill it in or remove the line")
    return tuple(steps), now


def _numbered_steps(text: str, here: str) -> list[str]:
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
        raise Defect("previous steps that do not begin with Step 1:", f"{here}: does not begin with 'Step 1:'; correct it")
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [text[mark.end():end].strip() for mark, end in zip(marks, ends)]


def _without_number(text: str, number: int, here: str) -> str:
    """A step's text without the "Step N:" that it may begin with; N must be the step's number."""
    mark = MARK.match(text.lstrip())
    if mark is None:
        return text.strip()
    if mark[1] != str(number):
        raise Defect("with step numbers that do not fit",
                     f"{here}: 'Step {mark[1][:20]}:' stands where step {number} is expected; correct it")
    return text.lstrip()[mark.end():].strip()


# ---------------------------------------------------------------------------------------------- PRM800K

def prm800k(row: dict, where: str, counts: Counter) -> Labelled:
    """Each rated completion is a case whose previous steps are the chosen ones before it. Rating 1, -1; 0 = neutral, dropped.

    The previous steps go on through what was chosen as long as that was not rated wrong and its labeler could tell.
    """
    for name, kind in (("is_quality_control_question", "quality control"), ("is_initial_screening_question", "screening")):
        if row.get(name) is not None and _truth(row[name], f"{where}: field '{name}'"):
            counts[f"dropped: {kind} row"] += 1
            return []
    problem = _text(get_field(row, "question", dict, where), "problem", f"{where}: field 'question'")
    label = get_field(row, "label", dict, where)
    steps = get_field(label, "steps", list, f"{where}: field 'label'")
    _check_number(steps, f"{where}: field 'label.steps'")
    if label.get("finish_reason") in ("bad_problem", "give_up"):
        counts[f"read as far as rated: finish_reason {label['finish_reason']}"] += 1
    found, previous, end = [], (), None
    for i, step in enumerate(steps):
        here = f"{where}: field 'label.steps'[{i}]"
        completions = _completions(expect(step, dict, here), here)
        if end:
            counts[f"dropped: step after {end}"] += len(completions)
            continue
        for j, completion in enumerate(completions):
            if completion.useless:
                counts[f"dropped: {completion.useless}"] += 1
            else:
                found.append((f"{i}-{j}", Case(problem, previous, completion.text, completion.rating == 1)))
        following, end = _chosen(step, completions, here)
        previous += (following,)
    return found


class Completion(NamedTuple):
    """One of the alternatives for a step."""
    text: str
    rating: int | None
    useless: str | None  # why it is no case


def _completions(step: dict, here: str) -> list[Completion]:
    found = []
    for j, completion in enumerate(expect(step.get("completions") or [], list, f"{here}.completions")):
        where = f"{here}.completions[{j}]"
        text = get_field(expect(completion, dict, where), "text", str, where)
        rating, flagged = completion.get("rating"), completion.get("flagged")
        if rating not in (1, 0, -1, None) or isinstance(rating, bool):
            raise Defect("label out of range", f"{where}: field 'rating': {rating!r} is not 1, 0 or -1; correct it")
        useless = None
        if not text.strip():
            useless = "blank step"
        elif flagged is not None and _truth(flagged, f"{where}: field 'flagged'"):
            useless = "step that its labeler could not rate (flagged)"
        elif rating is None:
            useless = "step without a rating"
        elif rating == 0:
            useless = NEUTRAL
        found.append(Completion(text, rating, useless))
    return found


def _chosen(step: dict, completions: list[Completion], here: str) -> tuple[str, str | None]:
    """(the step with which the solution goes on, None), or ("", after what the solution is no longer to be trusted)."""
    if step.get("chosen_completion") is not None:
        chosen = _whole_number(step, "chosen_completion", here)
        if not 0 <= chosen < len(completions):
            raise Defect("chosen_completion out of range", f"{here}: field 'chosen_completion': {chosen} is out of range "
                                                           f"(0 to {len(completions) - 1}); correct it")
        completion = completions[chosen]
        if completion.useless not in (None, NEUTRAL):
            return "", "one without a rating"
        return ("", "the first wrong one") if completion.rating == -1 else (completion.text, None)
    human = step.get("human_completion")
    if human is None:
        return "", "one with none chosen"
    text = human.get("text") if isinstance(human, dict) else human
    if not expect(text, str, f"{here}: field 'human_completion'").strip():
        return "", "one without a rating"
    return text, None


# ---------------------------------------------------------------------------------------------- values

def _text(row: dict, name: str, where: str) -> str:
    text = get_field(row, name, str, where)
    if not text.strip():
        raise Defect(f"with a blank {name}", f"{where}: field '{name}' is empty; fill it in or remove the line")
    return text


def _whole_number(row: dict, name: str, where: str) -> int:
    """row[name]; pandas writes 1 as 1.0 in a column that has gaps."""
    if name not in row:
        get_field(row, name, int, where)  # says that it is missing
    return _whole(row[name], f"{where}: field '{name}'")


def _whole(value: Any, here: str) -> int:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return expect(value, int, here)


def _truth(value: Any, here: str) -> bool:
    """true or false, or 1 or 0, as pandas may have it."""
    return bool(value) if not isinstance(value, bool) and value in (0, 1) else expect(value, bool, here)


def _sign(value: Any, here: str) -> bool:
    """OpenR's + or -, or 1 or 0."""
    if isinstance(value, str) and value.strip() in ("+", "-"):
        return value.strip() == "+"
    return _truth(value, here)


def _first_wrong(correct: list[bool]) -> int:
    return correct.index(False) if False in correct else -1


def _check_number(steps: list, here: str) -> None:
    if len(steps) > MAX_STEPS:
        raise Defect(f"of more than {MAX_STEPS} steps", f"{here}: {len(steps)} steps, more than {MAX_STEPS}; remove the line")


def _check_count(labels: int, steps: int, here: str) -> None:
    if labels != steps:
        raise Defect("with another number of labels than of steps", f"{here}: {labels} labels for {steps} steps; correct it")


READERS = (  # a format, by the fields that tell it; PRM800K's names are those of others
    (("modified_process",), prmbench),
    (("completions", "labels"), stepwise),
    (("process", "label"), openr),
    (("now-step",), seed_row),
    (("question", "now_step"), evaluation_row),
    (("input", "label"), math_shepherd),
    (("steps",), processbench),
)
