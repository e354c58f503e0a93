"""The formats in the wild -> cases to learn from, and solutions to judge.

A row says by the fields that it has of which format it is, so that one file may hold several.

    format                    fields                                                   a row is
    ProcessBench              {problem, steps, label}                                  a solution (whole.py)
    PRMBench                  {modified_question, modified_process, error_steps}       a solution
    raw text (candidates.py)  {problem, solution}                                      a solution
    candidates                {problem, solutions: [text or [step]]}                   several solutions
    TRL's stepwise rows       {prompt, completions, labels: [true | false]}            a solution
    OpenR, Math-APS           {question, process, label: [+ | -]}                      a solution
    Math-Shepherd             {input, label}                                           a solution
    R-PRM's evaluation rows   {origin_id, question, previous_steps, now_step, label}   a step (steps.py)
    R-PRM's seed rows         {query, previous-steps, now-step, expert-judge}          a step
    PRM800K                   {question: {problem}, label: {steps}}                    steps (prm800k.py)

A reader takes one row and gives its Solution, or the labelled steps in it. It counts what it leaves out. A
row that does not say clearly what it means raises Defect: no row is read as something that it does not say.
"""
from collections import Counter
from pathlib import Path
from typing import Callable, Iterator, Sequence

from formats.candidates import CandidateRows, holds_candidates, is_text, read_text
from formats.containers import Rows, read_rows
from formats.prm800k import prm800k
from formats.rows import AFTER_FIRST_WRONG, Defect, Labelled, Solution, name_of, shown, text_of
from formats.steps import evaluation_row, is_evaluation_row, join_steps, seed_row
from formats.whole import math_shepherd, openr, prmbench, processbench, stepwise
from plumbing.errors import BadInput
from plumbing.files import expect, get_field
from rprm import Case

Reader = Callable[[dict, str, Counter], Solution | Labelled]
READERS = (  # (the fields that tell a format, its reader); PRM800K is told by what its fields hold
    (("modified_process",), prmbench),
    (("completions", "labels"), stepwise),
    (("process", "label"), openr),
    (("now-step",), seed_row),
    (("question", "now_step"), evaluation_row),
    (("input", "label"), math_shepherd),
    (("steps",), processbench),
)


def choose_reader(row: dict, where: str) -> Reader:
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
    raise BadInput(f"{where}: fields {fields} are no known format (ProcessBench, PRMBench, TRL, OpenR, "
                   "Math-Shepherd, PRM800K, R-PRM's seed and evaluation rows); convert the file")


# ---------------------------------------------------------------------------------------------- cases

def read_labelled_steps(path: str | Path, counts: Counter, strict: bool = False,
                        firsts: dict[str, str] | None = None) -> Iterator[tuple[str, Labelled]]:
    """(id, [(step's name, case)]) for each row of an input.

    A row with a defect is dropped and counted by reason, and firsts[reason] says where the first one stands
    and what is wrong with it; with `strict` it is an error. An input of which no row can be read is an
    error.
    """
    firsts = {} if firsts is None else firsts
    first_error = None
    usable = False
    for where, row in read_rows(path):
        counts_of_row = Counter()
        try:
            found = labelled_steps(row, where, counts_of_row)
        except BadInput as error:
            if strict:
                raise
            reason = f"dropped row: {error.reason if isinstance(error, Defect) else 'of another shape'}"
            counts[reason] += 1
            firsts.setdefault(reason, str(error))
            first_error = first_error or error
            continue
        usable = True
        counts.update(counts_of_row)
        yield name_of(row) or where.rpartition("/")[2].replace(": row ", ":"), found
    if first_error and not usable:
        raise first_error


def labelled_steps(row: dict, where: str, counts: Counter) -> Labelled:
    """The cases in a row, of whatever format."""
    found = choose_reader(row, where)(row, where, counts)
    return until_first_error(found, where, counts) if isinstance(found, Solution) else found


def until_first_error(solution: Solution, where: str, counts: Counter) -> Labelled:
    """A case per step up to the first wrong one: after it the previous steps are no longer to be trusted."""
    if solution.label is None:
        raise Defect("without a label",
                     f"{where}: field 'label' is missing, or says nothing of the steps that are there; "
                     "add it or remove the line")
    steps = solution.steps
    last = len(steps) - 1 if solution.label == -1 else solution.label
    counts[AFTER_FIRST_WRONG] += len(steps) - 1 - last
    found = []
    for i in range(last + 1):
        found.append((str(i), Case(solution.problem, steps[:i], steps[i], i != solution.label)))
    return found


def read_case(row: dict, where: str) -> Case:
    """A line of cases.jsonl, or the "case" of a line of samples.jsonl."""
    expect(row, dict, f"{where}: field 'case'")
    problem = text_of(row, "problem", where)
    here = f"{where}: field 'previous_steps'"
    previous = tuple(expect(step, str, here) for step in get_field(row, "previous_steps", list, where))
    now = text_of(row, "now_step", where)
    label = row.get("label")
    if label is not None:
        expect(label, bool, f"{where}: field 'label'")
    return Case(problem, previous, now, label)


# ---------------------------------------------------------------------------------------------- solutions

class SolutionRows(Sequence):
    """The solutions of an input, read on demand: solutions[i] -> ("FILE:ROW", Solution). Raises BadInput.

    Where the rows are R-PRM's evaluation rows, those of one origin_id make a solution, wherever they stand.
    split: how raw text is split into steps.
    """

    def __init__(self, rows: Rows, split: str):
        self.rows = rows
        self.split = split
        self.groups = None  # the numbers of each solution's rows, where a row is but a step
        if len(rows) and is_evaluation_row(rows[0][1]):
            self.groups = group_steps(rows)

    def __len__(self) -> int:
        return len(self.rows if self.groups is None else self.groups)

    def __getitem__(self, i: int) -> tuple[str, Solution]:
        if self.groups is None:
            where, row = self.rows[i]
            return where, read_solution(row, where, self.split)
        rows = [self.rows[number] for number in self.groups[i]]
        return rows[0][0], join_steps(rows)


def group_steps(rows: Rows) -> list[list[int]]:
    """The numbers of the evaluation rows of each origin_id, in the order in which the first of each comes."""
    groups: dict[str, list[int]] = {}
    for i, (where, row) in enumerate(rows):
        if not is_evaluation_row(row):
            raise BadInput(f"{where}: is no step with an origin_id, as the rows before it are; "
                           "give it in a file of its own")
        groups.setdefault(shown(row["origin_id"]), []).append(i)
    return list(groups.values())


def read_solutions(path: str | Path, split: str = "blank") -> SolutionRows | CandidateRows:
    """The solutions of a file, of a folder of files, or of standard input ("-")."""
    rows = read_rows(path)
    if len(rows) and holds_candidates(rows[0][1]):
        return CandidateRows(rows, split)
    return SolutionRows(rows, split)


def read_solution(row: dict, where: str, split: str = "blank") -> Solution:
    """The solution of a row that holds a whole one. Raises BadInput, for a blank step, say."""
    if holds_candidates(row):
        raise BadInput(
            f"{where}: has several solutions, as the rows before it have not; give it in a file of its own"
        )
    if is_text(row):
        return read_text(row, where, split)
    found = choose_reader(row, where)(row, where, Counter())
    if not isinstance(found, Solution):
        raise BadInput(f"{where}: is no whole solution, but single steps; take it to `data.py cases`")
    return found
