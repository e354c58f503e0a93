"""One HTML page to look at scores with: every solution, step and analysis, and the figures made of them.

    scores = [Path("scores.sft.jsonl"), Path("scores.dpo.jsonl")]
    write_page(scores, Path("report.html"), runs=[Path("runs/sft"), Path("runs/dpo")])

The page is one file that asks no network for anything. A Content-Security-Policy with the hash of its script
holds the browser to that. It is made of page.html, its styles and scripts (STYLES, SCRIPTS), and data blocks:

    <script type="text/plain" id="NAME">base64 of a zlib stream</script>

    page            JSON: the judges, the threshold, the curves of training runs
    solutions       JSON: source, id, problem, steps and label of each solution, and PRMBench's wrong steps
    judge-J-NAME    numbers of the judge J, as flat arrays (`Judge`)
    texts-J-I       JSON: for each step of solution I that judge J has judged, the texts of its analyses

Texts are unpacked when a step is opened. No text of a file stands in the page's markup: base64 has no letter
that HTML gives a meaning to, and the scripts put texts in as text.
"""
import base64
import hashlib
import heapq
import json
import zlib
from array import array
from collections import Counter
from pathlib import Path
from typing import Any, Container, Iterable, Iterator

import numpy as np

from formats.curves import read_curves
from formats.markup import template
from formats.rows import Solution
from formats.score_lines import ScoreLine, read_score_lines
from plumbing.errors import BadInput
from plumbing.files import writing
from rprm import reward

STYLES = ("look.css", "page.css")
SCRIPTS = ("page_numbers.js", "page_charts.js", "page_figures.js", "page_list.js", "page.js")
TEXT_BYTES = 2_000_000  # of packed analyses in a page
YES, NO, CUT_OFF, FORCED = 1, 2, 4, 8  # the bits of a flag


def write_page(
    scores: list[Path],
    out: Path,
    runs: Iterable[Path] = (),
    threshold: float = 0.5,
    text_bytes: int = TEXT_BYTES,
) -> str:
    """Write the page of files of scores, and of the curves of training runs. -> a line on what it holds.

    The numbers of all analyses are in the page. So are their texts, up to `text_bytes` when packed. What
    does not fit is left out, the least interesting first (`interest`); the page and the line say how many.
    """
    solutions = Solutions()
    texts = Texts(text_bytes)
    judges = []
    for number, (name, path) in enumerate(zip(judge_names(scores), scores, strict=True)):
        judge = Judge(name)
        for _, line in read_score_lines(path):
            solution = solutions.add(line, judge.lines)
            judge.add(line, solution)
            texts.add(f"texts-{number}-{solution}", line, threshold)
        if not judge.lines:
            raise BadInput(f"{path}: has no scores; check the file")
        judges.append(judge)
    page = {
        "threshold": threshold,
        "judges": [judge.header() for judge in judges],
        "curves": [read_curves(run) for run in runs],
        "texts": texts.total,
        "texts_left_out": texts.left_out,
    }
    head, tail = template("page.html", STYLES, SCRIPTS).split("<!-- data -->")
    with writing(out) as file:
        file.write(head)
        file.write(block("page", pack_json(page)))
        file.write(block("solutions", pack_json(solutions.rows)))
        for number, judge in enumerate(judges):
            for name, values in judge.arrays():
                file.write(block(f"judge-{number}-{name}", pack(values.tobytes())))
        for name, packed in texts.kept():
            file.write(block(name, packed))
        file.write(tail)
    return describe(out, len(solutions.rows), judges, texts)


def describe(out: Path, n_solutions: int, judges: list["Judge"], texts: "Texts") -> str:
    """The line for the user."""
    line = f"page: {out} ({out.stat().st_size / 1e6:.1f} MB; {n_solutions} solutions, {len(judges)} judges"
    if texts.left_out:
        line += (
            f"; the analyses' texts of {texts.left_out} of {texts.total} judged solutions do not fit into "
            f"{texts.limit / 1e6:.1f} MB and are left out"
        )
    return line + ")"


def judge_names(paths: list[Path]) -> list[str]:
    """What the page calls the judges: scores.dpo.jsonl and runs/dpo/scores.jsonl are dpo, base.jsonl is base.

    Where two would be called the same, all are called by their paths.
    """
    names = []
    for path in paths:
        stem = Path(path).name.removesuffix(".jsonl").removeprefix("scores.")
        names.append(Path(path).absolute().parent.name if stem == "scores" else stem)
    if len(set(names)) < len(names):
        return [str(path) for path in paths]
    return names


# ---------------------------------------------------------------------------------------- what is collected


class Solutions:
    """The solutions of all judges, in the order in which they are first met.

    Judges are compared on those that are the same in everything: source, id, problem, steps and label.
    """

    def __init__(self):
        self.rows: list[dict] = []
        self.numbers: dict[bytes, int] = {}  # hash of a solution -> where in `rows` it is

    def add(self, line: ScoreLine, taken: Container[int]) -> int:
        """-> the number of the line's solution.

        A solution that a judge has twice is two: `taken` are the numbers that this judge had before.
        """
        solution = line.solution
        row = {
            "source": line.source,
            "id": solution.id,
            "problem": solution.problem,
            "steps": solution.steps,
            "label": solution.label,
            "wrong": wrong_steps(solution),
        }
        key = json.dumps(row).encode()
        while True:
            key = hashlib.blake2b(key, digest_size=16).digest()
            number = self.numbers.setdefault(key, len(self.rows))
            if number == len(self.rows):
                self.rows.append(row)
            if number not in taken:
                return number


def wrong_steps(solution: Solution) -> list[int] | None:
    """All wrong steps, from 0, as PRMBench's rows name them; None for others, which name the first one."""
    if "classification" not in solution.extra:
        return None
    numbers = solution.extra.get("error_steps", [])
    return [number - 1 for number in numbers if 1 <= number <= len(solution.steps)]


class Judge:
    """What a judge said, as flat arrays, so that a million analyses take some megabytes.

    order    int32, a number for each line: its solution
    judged   int32, a number for each line: its judged steps
    samples  int32, a number for each judged step: its analyses
    p_yes    float32 or float64, a number for each analysis; nan = unknown
    rewards  float64, a number for each analysis: its step's reward over those up to it; nan = null
    tokens   int32, a number for each analysis
    flags    uint8, a number for each analysis: YES or NO, CUT_OFF, FORCED
    """

    def __init__(self, name: str):
        self.name = name
        self.lines: dict[int, int] = {}  # solution -> judged steps
        self.samples = array("i")
        self.p_yes = array("d")
        self.rewards = array("d")
        self.tokens = array("i")
        self.flags = array("B")

    def add(self, line: ScoreLine, solution: int) -> None:
        self.lines[solution] = len(line.analyses)
        for step in line.analyses:
            self.samples.append(len(step))
            for k, analysis in enumerate(step, 1):
                self.p_yes.append(number_or_nan(analysis.p_yes))
                self.rewards.append(number_or_nan(reward(step[:k])))
                self.tokens.append(analysis.n_tokens)
                self.flags.append(flags_of(analysis))

    def header(self) -> dict:
        return {
            "name": self.name,
            "k": max(1, *self.samples),
            "float": "float32" if self.fits_float32() else "float64",
        }

    def fits_float32(self) -> bool:
        """Is no digit of P(Yes) lost in fp32, as is so for those that were computed here?"""
        p_yes = np.asarray(self.p_yes)
        return bool(np.array_equal(p_yes.astype(np.float32).astype(np.float64), p_yes, equal_nan=True))

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """The arrays, little-endian."""
        yield "order", np.fromiter(self.lines.keys(), dtype="<i4")
        yield "judged", np.fromiter(self.lines.values(), dtype="<i4")
        yield "samples", np.asarray(self.samples).astype("<i4")
        yield "p_yes", np.asarray(self.p_yes).astype("<f4" if self.fits_float32() else "<f8")
        yield "rewards", np.asarray(self.rewards).astype("<f8")
        yield "tokens", np.asarray(self.tokens).astype("<i4")
        yield "flags", np.asarray(self.flags)


def number_or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def flags_of(analysis: Any) -> int:
    flags = {True: YES, False: NO, None: 0}[analysis.verdict]
    if not analysis.finished:
        flags |= CUT_OFF
    if analysis.forced:
        flags |= FORCED
    return flags


class Texts:
    """Packed texts of the analyses, a block for each judged solution: the most interesting `limit` bytes."""

    def __init__(self, limit: int):
        self.limit = limit
        self.size = 0
        self.total = 0
        self.left_out = 0
        self.blocks: list[
            tuple[int, int, str, str]
        ] = []  # a heap of (interest, -order, name, packed): the first is the first to go

    def add(self, name: str, line: ScoreLine, threshold: float) -> None:
        packed = pack_json([[analysis.text for analysis in step] for step in line.analyses])
        heapq.heappush(self.blocks, (interest(line, threshold), -self.total, name, packed))
        self.total += 1
        self.size += len(packed)
        while self.size > self.limit:
            *_, packed = heapq.heappop(self.blocks)
            self.size -= len(packed)
            self.left_out += 1

    def kept(self) -> Iterator[tuple[str, str]]:
        """(name, packed) in the order in which they came."""
        for _, _, name, packed in sorted(self.blocks, key=lambda block: -block[1]):
            yield name, packed


def interest(line: ScoreLine, threshold: float) -> int:
    """2: the prediction is not the label; 1: it is, but samples of a step disagree; 0: all else."""
    below = [value is not None and value < threshold for value in line.rewards]
    prediction = below.index(True) if True in below else -1
    if line.solution.label is not None and prediction != line.solution.label:
        return 2
    for step in line.analyses:
        sides = Counter(analysis.p_yes < threshold for analysis in step if analysis.p_yes is not None)
        if len(sides) == 2:
            return 1
    return 0


# ---------------------------------------------------------------------------------------------- the file


def pack(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 9)).decode()


def pack_json(value: Any) -> str:
    return pack(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())


def block(name: str, packed: str) -> str:
    """A data block. The name is never taken from a file."""
    return f'<script type="text/plain" id="{name}">{packed}</script>\n'
