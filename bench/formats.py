"""Do the readers of public formats find what a file says? Generated files, with defects of every kind.

    python bench/formats.py                                     # 10,000 rows of each format
    python bench/formats.py --rows 100000 --formats prm800k     # the full size, of one format

2% of the rows have each of the defects that are known of a format. `data.py cases` reads each file in a
process of its own: as JSON lines (with a byte-order mark and CRLF), packed by gzip, and as parquet where
pyarrow is installed. Wanted: the counts of its table are those that the file was made with, to the last one.
And of all rows together, memory holds no more than the place of each line (16 bytes) and what tells a case
from the others (some 90 bytes in Python's set).
"""

import gzip
import importlib.util
import io
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Callable, Iterator

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # the project's modules; this folder is `bench`
import data
from bench.common import peak_mb, report
from plumbing.cli import print_config, run
from plumbing.errors import BadInput

SHARE = 0.02  # of the rows have a certain defect
WORDS = "the sum of apples and pens in each box is half of what Tom had before he gave 12 to Mia so".split()
FIRST_STEP = "Since the Now Step is the first step, there are no Previous Steps."


# ---------------------------------------------------------------------------------------------- solutions


@dataclass
class Solution:
    """What a row is made of: `label` is the index of the first wrong step, -1 = none."""

    number: int
    problem: str
    steps: list[str]
    label: int

    @property
    def correct(self) -> list[bool]:
        return [self.label == -1 or i < self.label for i in range(len(self.steps))]


def draw(rng: random.Random, number: int) -> Solution:
    steps = [" ".join(rng.choices(WORDS, k=12)) for _ in range(rng.randint(3, 6))]
    label = rng.randrange(-1, len(steps))
    return Solution(number, f"Problem {number}: {' '.join(rng.choices(WORDS, k=30))}?", steps, label)


def counts_of(solution: Solution) -> Counter:
    """What the table is to say of a solution that is read up to its first wrong step."""
    if solution.label == -1:
        return Counter({"kept: correct step": len(solution.steps)})
    return Counter(
        {
            "kept: correct step": solution.label,
            "kept: incorrect step": 1,
            "dropped: step after the first wrong one": len(solution.steps) - 1 - solution.label,
        }
    )


def dropped_row(reason: str) -> Counter:
    return Counter({f"dropped row: {reason}": 1})


def numbered(steps: list[str]) -> str:
    return "\n".join(f"Step {number}: {step}" for number, step in enumerate(steps, 1))


# ---------------------------------------------------------------------------------------- rows of each format


def processbench(solution: Solution) -> tuple[dict, Counter]:
    return {
        "id": f"p-{solution.number}",
        "problem": solution.problem,
        "steps": solution.steps,
        "label": solution.label,
    }, counts_of(solution)


def prmbench(solution: Solution) -> tuple[dict, Counter]:
    wrong = [i + 1 for i, correct in enumerate(solution.correct) if not correct]
    return {
        "modified_question": solution.problem,
        "modified_process": solution.steps,
        "error_steps": wrong,
        "classification": "circular",
        "idx": f"p1_{solution.number}",
        "question": "another",
    }, counts_of(solution)


def stepwise(solution: Solution) -> tuple[dict, Counter]:
    return {
        "prompt": solution.problem,
        "completions": [f"Step {n}: {step}" for n, step in enumerate(solution.steps, 1)],
        "labels": solution.correct,
    }, counts_of(solution)


def openr(solution: Solution) -> tuple[dict, Counter]:
    process = "".join(f"Step {n}: {step}\n\n\n\n\n" for n, step in enumerate(solution.steps, 1))
    return {
        "question": solution.problem,
        "process": process,
        "label": ["+" if correct else "-" for correct in solution.correct],
    }, counts_of(solution)


def math_shepherd(solution: Solution) -> tuple[dict, Counter]:
    texts = [f"Step {n}: {step}" for n, step in enumerate(solution.steps, 1)]
    signs = ["+" if correct else "-" for correct in solution.correct]
    return {
        "input": f"{solution.problem} " + "\n".join(f"{text} ки" for text in texts),
        "task": "GSM8K",
        "label": f"{solution.problem} " + "\n".join(f"{text} {sign}" for text, sign in zip(texts, signs)),
    }, counts_of(solution)


def evaluation(solution: Solution) -> tuple[dict, Counter]:
    """One of the solution's steps."""
    i = solution.number % len(solution.steps)
    row = {
        "id": solution.number,
        "origin_id": f"o-{solution.number}",
        "question": solution.problem,
        "label": solution.label,
        "previous_steps": numbered(solution.steps[:i]) or FIRST_STEP,
        "now_step": f"Step {i + 1}: {solution.steps[i]}",
    }
    if solution.label != -1 and i > solution.label:
        return row, Counter({"dropped: step after the first wrong one": 1})
    return row, Counter({"kept: incorrect step" if i == solution.label else "kept: correct step": 1})


def seed(solution: Solution) -> tuple[dict, Counter]:
    """One of the solution's steps, by itself."""
    i = solution.number % len(solution.steps)
    judge = "Positive" if solution.correct[i] else "Negative"
    row = {
        "id": solution.number,
        "query": solution.problem,
        "previous-steps": numbered(solution.steps[:i]) or FIRST_STEP,
        "now-step": f"Step {i + 1}: {solution.steps[i]}",
        "expert-judge": judge,
    }
    return row, Counter({"kept: correct step" if solution.correct[i] else "kept: incorrect step": 1})


def prm800k(solution: Solution) -> tuple[dict, Counter]:
    """Each step alone and chosen; the labeler stopped at the first wrong one."""
    last = len(solution.steps) - 1 if solution.label == -1 else solution.label
    steps = [
        {
            "completions": [
                {"text": solution.steps[i], "rating": 1 if solution.correct[i] else -1, "flagged": None}
            ],
            "human_completion": None,
            "chosen_completion": 0,
        }
        for i in range(last + 1)
    ]
    reason = "solution" if solution.label == -1 else "found_error"
    counts = Counter(
        {"kept: correct step": sum(solution.correct), "kept: incorrect step": int(solution.label != -1)}
    )
    return {
        "question": {"problem": solution.problem},
        "label": {"steps": steps, "finish_reason": reason},
        "is_quality_control_question": False,
        "is_initial_screening_question": False,
    }, +counts


# ---------------------------------------------------------------------------------------------- defects

Defect = Callable[
    [dict, Solution, Counter], tuple[dict, Counter]
]  # row, what it is made of, its counts -> the same of the spoilt row


def spoilt(reason: str, **changes) -> Defect:
    """The row with other fields, which is dropped. A change may be a function of the row."""

    def spoil(row: dict, solution: Solution, counts: Counter) -> tuple[dict, Counter]:
        new = {
            name.replace("__", "-"): value(row) if callable(value) else value
            for name, value in changes.items()
        }
        return row | new, dropped_row(reason)

    return spoil


def read_all_the_same(**changes) -> Defect:
    """The row with a field written otherwise, with the same meaning."""

    def change(row: dict, solution: Solution, counts: Counter) -> tuple[dict, Counter]:
        return row | {name.replace("__", "-"): value(row) for name, value in changes.items()}, counts

    return change


def without(name: str, reason: str = "of another shape") -> Defect:
    def remove(row: dict, solution: Solution, counts: Counter) -> tuple[dict, Counter]:
        return {key: value for key, value in row.items() if key != name}, dropped_row(reason)

    return remove


def another_shape(row: dict, solution: Solution, counts: Counter) -> tuple[dict, Counter]:
    return {"instruction": solution.problem, "output": "Yes"}, dropped_row("of another shape")


def no_tag_after_the_first_step(row: dict, solution: Solution, counts: Counter) -> tuple[dict, Counter]:
    first = len(f"{solution.problem} Step 1: {solution.steps[0]}")
    return row | {
        name: row[name][:first] + row[name][first + cut :] for name, cut in (("input", 3), ("label", 2))
    }, dropped_row("two steps in one piece (a tag is missing)")


def text_after_the_last_tag(row: dict, solution: Solution, counts: Counter) -> tuple[dict, Counter]:
    more = Counter({"dropped: text after Math-Shepherd's last tag": 1})
    return row | {name: row[name] + " Done." for name in ("input", "label")}, counts + more


def lines_like_steps(row: dict, solution: Solution, counts: Counter) -> tuple[dict, Counter]:
    """A second step with lines of its own that look like steps; the number of steps tells which are."""
    steps = [solution.steps[0], "Plan:\nStep 1: add\nStep 2: multiply"]
    return row | {"previous-steps": numbered(steps), "now-step": "Step 3: So it is."}, counts


def beyond_the_last_step(row: dict, solution: Solution, counts: Counter) -> tuple[dict, Counter]:
    beyond = len(solution.steps) + 3
    if not row["error_steps"]:
        return row | {"error_steps": [beyond]}, dropped_row("without a label")
    more = Counter({"ignored: error step beyond the last step": 1})
    return row | {"error_steps": [*row["error_steps"], beyond]}, counts + more


def with_label(**changes) -> Defect:
    """PRM800K's row with another label.finish_reason."""

    def change(row: dict, solution: Solution, counts: Counter) -> tuple[dict, Counter]:
        return row | {"label": row["label"] | changes}, counts + Counter(
            {f"read as far as rated: finish_reason {changes['finish_reason']}": 1}
        )

    return change


def first_step(reason: str, more: Callable[[dict], dict], after: str) -> Defect:
    """PRM800K's row whose first step is no case, and after which the others are not trusted."""

    def change(row: dict, solution: Solution, counts: Counter) -> tuple[dict, Counter]:
        steps = row["label"]["steps"]
        [completion] = steps[0]["completions"]
        first = steps[0] | {"completions": [completion | more(completion)]}
        new = Counter({reason: 1, f"dropped: step after {after}": len(steps) - 1})
        return row | {"label": row["label"] | {"steps": [first, *steps[1:]]}}, +new

    return change


def wrong_step_chosen(row: dict, solution: Solution, counts: Counter) -> tuple[dict, Counter]:
    return first_step("kept: incorrect step", lambda _: {"rating": -1}, "the first wrong one")(
        row, solution, counts
    )


def alternatives(row: dict, solution: Solution, counts: Counter) -> tuple[dict, Counter]:
    """More completions of the first step, none of them chosen."""
    steps = row["label"]["steps"]
    others = [
        {"text": "a neutral one", "rating": 0},
        {"text": "a wrong one", "rating": -1.0},
        {"text": "nobody rated it", "rating": None},
        {"text": " ", "rating": 1},
        {"text": "nobody could", "rating": 1, "flagged": True},
    ]
    first = steps[0] | {"completions": steps[0]["completions"] + others}
    more = Counter(
        {
            "kept: incorrect step": 1,
            "dropped: neutral step": 1,
            "dropped: step without a rating": 1,
            "dropped: blank step": 1,
            "dropped: step that its labeler could not rate (flagged)": 1,
        }
    )
    return row | {"label": row["label"] | {"steps": [first, *steps[1:]]}}, counts + more


def quality_control(row: dict, solution: Solution, counts: Counter) -> tuple[dict, Counter]:
    return row | {"is_quality_control_question": 1.0}, Counter({"dropped: quality control row": 1})


def blank(name: str) -> Callable[[dict], list[str]]:
    """The list in a field, its last one blank."""
    return lambda row: [*row[name][:-1], " \n"]


OUT_OF_RANGE, BLANK, NO_LABEL = "label out of range", "with a blank step", "without a label"
NUMBERS, COUNT = "with step numbers that do not fit", "with another number of labels than of steps"
FORMATS: dict[str, tuple[Callable, list[Defect]]] = {
    "processbench": (
        processbench,
        [
            spoilt(OUT_OF_RANGE, label=99),
            spoilt("of another shape", label="-1"),
            spoilt(NO_LABEL, label=None),
            without("problem"),
            spoilt(BLANK, steps=blank("steps")),
            spoilt("without steps", steps=[]),
            another_shape,
            read_all_the_same(label=lambda row: float(row["label"])),
            read_all_the_same(id=lambda row: float("nan")),
        ],
    ),
    "prmbench": (
        prmbench,
        [
            beyond_the_last_step,
            spoilt(OUT_OF_RANGE, error_steps=[0]),
            spoilt(BLANK, modified_process=blank("modified_process")),
            spoilt("with a blank modified_question", modified_question=""),
            another_shape,
            read_all_the_same(error_steps=lambda row: [float(n) for n in row["error_steps"]]),
        ],
    ),
    "stepwise": (
        stepwise,
        [
            spoilt(COUNT, labels=lambda row: row["labels"][1:]),
            spoilt("of another shape", labels=lambda row: [None, *row["labels"][1:]]),
            spoilt(NUMBERS, completions=lambda row: row["completions"][::-1]),
            spoilt(BLANK, completions=blank("completions")),
            another_shape,
            read_all_the_same(labels=lambda row: [float(label) for label in row["labels"]]),
        ],
    ),
    "openr": (
        openr,
        [
            spoilt(COUNT, label=lambda row: row["label"][1:]),
            spoilt("of another shape", label=lambda row: ["?", *row["label"][1:]]),
            another_shape,
            spoilt(
                "two steps in one piece (a tag is missing)",
                process=lambda row: row["process"].replace("\n\n\n\n\n", "\n", 1),
                label=lambda row: row["label"][1:],
            ),
            read_all_the_same(process=lambda row: row["process"].replace("\n\n\n\n\n", " ки\n")),
        ],
    ),
    "math_shepherd": (
        math_shepherd,
        [
            no_tag_after_the_first_step,
            text_after_the_last_tag,
            another_shape,
            without("label"),
            spoilt(
                "without Step 1:",
                **{
                    name: lambda row, name=name: row[name].replace("Step 1:", "")
                    for name in ("input", "label")
                },
            ),
            spoilt("label that is not the input", label="Q?"),
            spoilt(BLANK, input=lambda row: row["input"] + "\n ки", label=lambda row: row["label"] + "\n +"),
        ],
    ),
    "evaluation": (
        evaluation,
        [
            spoilt(NUMBERS, now_step="Step 77: x"),
            spoilt(NO_LABEL, label=None),
            spoilt(OUT_OF_RANGE, label=-2),
            another_shape,
            spoilt("previous steps that do not begin with Step 1:", previous_steps="He adds."),
            spoilt("with a blank question", question=" "),
            read_all_the_same(label=lambda row: float(row["label"])),
        ],
    ),
    "seed": (
        seed,
        [
            lines_like_steps,
            spoilt(NUMBERS, now__step="Step 77: x"),
            spoilt(OUT_OF_RANGE, expert__judge="Neutral"),
            another_shape,
            spoilt("previous steps that do not begin with Step 1:", previous__steps="Step 2: He adds."),
            spoilt(BLANK, previous__steps="Step 1: ", now__step="Step 2: x"),
        ],
    ),
    "prm800k": (
        prm800k,
        [
            wrong_step_chosen,
            alternatives,
            quality_control,
            with_label(finish_reason="give_up"),
            with_label(finish_reason="bad_problem"),
            first_step("dropped: step without a rating", lambda _: {"rating": None}, "one without a rating"),
            first_step(
                "dropped: step that its labeler could not rate (flagged)",
                lambda _: {"flagged": True},
                "one without a rating",
            ),
            spoilt("of another shape", label={"steps": "none"}),
            another_shape,
            spoilt(
                OUT_OF_RANGE, label=lambda row: {"steps": [{"completions": [{"text": "x", "rating": 7}]}]}
            ),
            spoilt(
                "chosen_completion out of range",
                label={"steps": [{"completions": [], "chosen_completion": 3}]},
            ),
        ],
    ),
}


def rows_of(
    name: str, n: int, fits: Callable[[dict], bool] = lambda row: True
) -> Iterator[tuple[dict, Counter]]:
    """n rows of a format, each with its counts.

    Each defect has SHARE of them, and as many are a row that was there before. A spoilt row that does not fit
    into a file is left as it was.
    """
    make, defects = FORMATS[name]
    rng = random.Random(name)
    before = None
    for number in range(n):
        solution = draw(rng, number)
        row, counts = make(solution)
        kind = int(rng.random() / SHARE)
        if kind < len(defects):
            new, new_counts = defects[kind](row, solution, counts)
            if fits(new):
                row, counts = new, new_counts
        elif kind == len(defects) and before:
            row, counts = before[0], counts_again(before[1])
        else:
            before = row, counts
        yield row, counts


def counts_again(counts: Counter) -> Counter:
    """What the table is to say of a row that was there before."""
    kept = sum(n for name, n in counts.items() if name.startswith("kept"))
    rest = Counter({name: n for name, n in counts.items() if not name.startswith("kept")})
    return +(rest + Counter({"dropped: the same case again": kept}))


# ---------------------------------------------------------------------------------------------- files


def write_lines(path: Path, name: str, n: int, packed: bool = False) -> tuple[Counter, int]:
    """JSON lines as Windows has them. Returns the counts, and how many rows are read."""
    counts, read = Counter(), 0
    with (gzip.open if packed else open)(path, "wb") as file:
        file.write(b"\xef\xbb\xbf")
        for row, own in rows_of(name, n):
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\r\n")
            counts.update(own)
            read += not any(reason.startswith("dropped row") for reason in own)
    return counts, read


def write_packed(path: Path, name: str, n: int) -> tuple[Counter, int]:
    return write_lines(path, name, n, packed=True)


def write_parquet(path: Path, name: str, n: int) -> tuple[Counter, int]:
    """With the columns of a row without defects; so no defect puts another type into them."""
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.Table.from_pylist([row for row, _ in rows_of(name, 50, fits=lambda row: False)]).schema

    def fits(row: dict) -> bool:
        try:
            pyarrow.Table.from_pylist([row], schema=schema)
            return True
        except (pyarrow.ArrowException, TypeError):
            return False

    counts, read, rows = Counter(), 0, []
    with parquet.ParquetWriter(path, schema) as writer:
        for number, (row, own) in enumerate(rows_of(name, n, fits), 1):
            rows.append(row)
            counts.update(own)
            read += not any(reason.startswith("dropped row") for reason in own)
            if number % 1000 == 0 or number == n:
                writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
                rows.clear()
    return counts, read


CONTAINERS = {"lines": write_lines, "gzip": write_packed, "parquet": write_parquet}


# ---------------------------------------------------------------------------------------------- reading them


@dataclass(frozen=True)
class Config:
    rows: Annotated[int, "rows of each file", (100, None)] = 10000
    formats: Annotated[tuple[str, ...], "formats", tuple(FORMATS)] = tuple(FORMATS)
    containers: Annotated[tuple[str, ...], "what the rows are kept in", tuple(CONTAINERS)] = tuple(CONTAINERS)
    side: Annotated[str | None, "read this file alone and print what was found as JSON"] = None


def main(config: Config) -> None:
    if config.side:
        return report(read_file(Path(config.side)))
    print_config(config)
    print(f"\n{config.rows:,} rows of each format; in brackets, the peak of a tenth of them")
    print("\n| format | container | cases | dropped rows | seconds | peak MB | counts as made |")
    print("|---|---|---|---|---|---|---|")
    all_met = True
    for name in config.formats:
        for container in config.containers:
            if container == "parquet" and importlib.util.find_spec("pyarrow") is None:
                print(f"| {name} | parquet | pyarrow is not installed | | | | |")
                continue
            small, _ = measure(name, container, config.rows // 10)
            found, met = measure(name, container, config.rows)
            kept = sum(n for reason, n in found["counts"].items() if reason.startswith("kept"))
            dropped = sum(n for reason, n in found["counts"].items() if reason.startswith("dropped row"))
            peaks = f"{found['peak_mb']:.0f} ({small['peak_mb']:.0f})"
            seconds = f"{found['seconds']:.1f}"
            cells = (name, container, f"{kept:,}", f"{dropped:,}", seconds, peaks, "yes" if met else "NO")
            print(f"| {' | '.join(cells)} |", flush=True)
            all_met = all_met and met
    if not all_met:
        raise BadInput("some counts are not those that the files were made with")


def measure(name: str, container: str, n: int) -> tuple[dict, bool]:
    """What a process of its own found in a file of n rows, and whether it is what the file was made with."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows"
        counts, read = CONTAINERS[container](path, name, n)
        done = subprocess.run([sys.executable, __file__, "--side", str(path)], capture_output=True, text=True)
        if done.returncode:
            raise BadInput(
                f"{name}, {container}: ended with code {done.returncode}: {done.stderr.strip()[-2000:]}"
            )
    found = json.loads(done.stdout.splitlines()[-1])
    return found, (found["counts"], found["read"]) == (counts, read)


def read_file(path: Path) -> dict:
    """`data.py cases` on a file: the counts of its table, the solutions read, seconds and peak memory."""
    printed = io.StringIO()
    start = time.perf_counter()
    with redirect_stdout(printed):
        data.cases(data.CasesConfig(input=(str(path),), out=str(path.with_suffix(".cases.jsonl"))))
    table = re.findall(r"^  (\S.*?) +([\d,]+)$", printed.getvalue(), re.MULTILINE)
    [read] = re.findall(r"^cases from (\d+) solutions$", printed.getvalue(), re.MULTILINE)
    return {
        "counts": {name: int(n.replace(",", "")) for name, n in table},
        "read": int(read),
        "seconds": time.perf_counter() - start,
        "peak_mb": peak_mb(),
    }


if __name__ == "__main__":
    run((Config, main))
