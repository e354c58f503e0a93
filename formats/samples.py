"""Cases and their analyses as they stand in cases.jsonl, samples.jsonl and scores.jsonl."""
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import chain

import numpy as np

from formats.readers import read_case
from formats.verdicts import VERIFICATION
from plumbing.cli import print_table
from plumbing.errors import BadInput
from plumbing.files import Lines, expect, get_field, read_jsonl
from rprm import Analysis, Case


def read_analyses(row: dict, where: str) -> list[Analysis]:
    """The analyses of a line of samples.jsonl."""
    found = []
    for i, a in enumerate(get_field(row, "analyses", list, where)):
        here = f"{where}: field 'analyses'[{i}]"
        text = get_field(expect(a, dict, here), "text", str, here)
        verdict = a.get("verdict")
        if verdict is not None:
            expect(verdict, bool, f"{here}.verdict")
        p_yes = a.get("p_yes")
        if p_yes is not None and not 0 <= expect(p_yes, float, f"{here}.p_yes") <= 1:
            raise BadInput(f"{here}.p_yes: {str(p_yes)[:40]} is no probability (0 to 1); correct it")
        n_tokens = get_field(a, "n_tokens", int, here)
        if not 0 <= n_tokens < 2 ** 31:
            raise BadInput(f"{here}.n_tokens: {str(n_tokens)[:40]} is out of range; correct it")
        finished = get_field(a, "finished", bool, here)
        forced = bool(a.get("forced", False))
        found.append(
            Analysis(text, verdict, None if p_yes is None else float(p_yes), n_tokens, finished, forced)
        )
    return found


class SampleTally:
    """The table of a sampling: counts over the analyses, and the cases that have none."""

    def __init__(self):
        self.counts = Counter()
        self.n_labelled = 0  # analyses of cases with a label
        self.too_long: list[str] = []  # ids

    def add(self, case_id: str, label: bool | None, analyses: list[Analysis]) -> None:
        if not analyses:
            self.counts["cases longer than the context: no analyses"] += 1
            self.too_long.append(case_id)
        names = {True: "verdict Yes", False: "verdict No", None: "verdict missing"}
        if label is not None:
            self.n_labelled += len(analyses)
        for a in analyses:
            self.counts["analyses"] += 1
            self.counts[names[a.verdict]] += 1
            self.counts["cut off (--max-new-tokens or the context)"] += not a.finished
            self.counts["verification line added (--complete)"] += a.forced
            self.counts["verdict equal to the label"] += a.verdict is not None and a.verdict == label

    def so_far(self) -> str:
        return f"right {self.counts['verdict equal to the label'] / max(1, self.n_labelled):.0%}"

    @classmethod
    def sum(cls, tallies: Iterable["SampleTally"]) -> "SampleTally":
        """The tally of all ranks."""
        total = cls()
        for tally in tallies:
            total.counts += tally.counts
            total.n_labelled += tally.n_labelled
            total.too_long += tally.too_long
        return total

    def print(self) -> None:
        print_table("analyses", self.counts)
        print_too_long(self.too_long)


def print_too_long(names: list[str]) -> None:
    """Name what was not judged, as its prompt is longer than the context: the first ten of them."""
    if names:
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        shown = ", ".join(names[:10])
        print(f"not judged, as the prompt is longer than the model's context: {shown}{more}")


class CaseFile:
    """A file of cases, read on demand: file[i] -> (id, Case)."""

    def __init__(self, path: str):
        self.lines = Lines(path)
        if not len(self.lines):
            raise BadInput(f"{path}: has no cases; check the file")

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, i: int) -> tuple[str, Case]:
        where, row = self.lines[i]
        return get_field(row, "id", str, where), read_case(row, where)


def labelled_rows(
    paths: Sequence[str], counts: Counter, direct: bool = False
) -> Iterator[tuple[str, dict, Case]]:
    """("FILE:LINE", row, case) of the rows whose case has a label. The analyses of the others are counted.

    direct: a row may be a bare case, as in cases.jsonl, and counts as one analysis
    """
    for where, row in chain.from_iterable(map(read_jsonl, paths)):
        raw = row.get("case", row) if direct else get_field(row, "case", dict, where)
        case = read_case(raw, where)
        if case.label is None:
            n_analyses = 1 if direct else len(get_field(row, "analyses", list, where))
            counts["dropped: analysis of a case without a label"] += n_analyses
            counts["cases without a label and without analyses"] += n_analyses == 0
        else:
            yield where, row, case


def line_of_case(case_id: str, case: Case) -> dict:
    """What a line of samples.jsonl says of its case, before it is sampled."""
    return {"id": case_id, "case": asdict(case) | {"previous_steps": list(case.previous_steps)}}


def sample_line(case_id: str, case: Case, analyses: list[Analysis]) -> dict:
    """A line of samples.jsonl."""
    return line_of_case(case_id, case) | {"analyses": [asdict(a) for a in analyses]}


# ---------------------------------------------------------------------------- a teacher that forgets the form

def add_verdicts(
    analyses: list[Analysis], seeds: list[int], read_p_yes: Callable[[list[str]], list[float | None]]
) -> list[Analysis]:
    """Give analyses without a verdict the verification line, and an answer drawn from P(Yes).

    Those that were cut off are cut back to their last whole sentence first.

    seeds:      a 64-bit number for each analysis, which decides its draw
    read_p_yes: P(Yes) after each text and the verification line behind it; None: it is not known, and the
                analysis stays as it is
    """
    texts = {}  # index of the analysis -> what is left of it
    for i, a in enumerate(analyses):
        if a.verdict is None and a.finished:
            texts[i] = a.text.rstrip()
        elif a.verdict is None:
            texts[i] = up_to_last_sentence(a.text)
    found = list(analyses)
    for i, p_yes in zip(texts, read_p_yes(list(texts.values())), strict=True):
        if p_yes is None:
            continue
        draw = np.random.default_rng(seeds[i] % 2 ** 63).random()
        verdict = bool(draw < p_yes)
        line = f"{VERIFICATION} {'Yes' if verdict else 'No'}"
        text = f"{texts[i]}\n{line}" if texts[i] else line
        found[i] = replace(
            analyses[i], text=text, verdict=verdict, p_yes=p_yes, finished=True, forced=True
        )
    return found


def up_to_last_sentence(text: str) -> str:
    """A text without the sentence in which it was cut off: "It is 3.5. So" -> "It is 3.5."."""
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$)", text)]
    return text[:ends[-1]] if ends else ""
