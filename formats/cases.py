"""Solutions in the public formats -> cases.jsonl: the command `data.py cases`."""
import dataclasses
from collections import Counter
from dataclasses import dataclass
from itertools import chain, islice
from typing import Annotated

from tqdm import tqdm

from formats.readers import read_labelled_steps
from plumbing.cli import INPUT, print_config, print_table
from plumbing.errors import BadInput
from plumbing.files import fingerprint, json_line, refuse_existing, writing


@dataclass(frozen=True)
class CasesConfig:
    input: Annotated[
        tuple[str, ...],
        "files, folders of shards, or - (standard input) with rows of public formats, "
        "which their fields tell apart: ProcessBench, PRMBench, PRM800K, Math-Shepherd, "
        "OpenR, TRL's stepwise rows, R-PRM's seed and evaluation rows",
        INPUT,
    ]
    out: Annotated[str, "cases.jsonl to write"]
    limit: Annotated[int | None, "stop after so many solutions", (1, None)] = None
    strict: Annotated[bool, "end at the first row with a defect, instead of dropping and counting it"] = False
    overwrite: Annotated[bool, "replace an existing output"] = False


def cases(config: CasesConfig) -> None:
    """solutions -> cases.jsonl: one line per labelled step."""
    print_config(config)
    refuse_existing(config.out, config.overwrite)
    counts = Counter()
    firsts: dict[str, str] = {}  # reason for which rows are dropped -> the first of them
    seen = set()                 # fingerprints of the cases so far
    n_solutions = 0
    rows = chain.from_iterable(
        read_labelled_steps(path, counts, config.strict, firsts) for path in config.input
    )
    with writing(config.out) as file:
        for row_id, steps in tqdm(islice(rows, config.limit), desc="cases", unit=" solutions"):
            n_solutions += 1
            for step, case in steps:
                key = fingerprint(0, dataclasses.astuple(case))
                if key in seen:
                    counts["dropped: the same case again"] += 1
                    continue
                seen.add(key)
                otherwise = dataclasses.replace(case, label=not case.label)
                if fingerprint(0, dataclasses.astuple(otherwise)) in seen:
                    counts["of these, also labelled the other way"] += 1
                counts["kept: correct step" if case.label else "kept: incorrect step"] += 1
                file.write(json_line({"id": f"{row_id}-{step}"} | dataclasses.asdict(case)))
        if not n_solutions:
            raise BadInput(f"{' '.join(config.input)}: has no solutions; check the file")
    print_table(f"cases from {n_solutions} solutions", counts)
    for reason, first in sorted(firsts.items()):
        line = f"  the first {reason}: {first}"
        print("".join(c if c.isprintable() else " " for c in line))
