"""Training examples, written to two files: one to train on, and one for validation, of other problems."""
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from tqdm import tqdm

from checkpoint.prompt import write_prompt
from plumbing.cli import INPUT, print_table, refuse_input
from plumbing.errors import BadInput
from plumbing.files import fingerprint, json_line, refuse_existing, writing
from rprm import Case

Example = tuple[Case, dict]  # a case, and the line that is written


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """The flags of both filters, `sft` and `pairs`."""
    samples: Annotated[tuple[str, ...], "samples.jsonl (sft --direct: cases.jsonl will do)", INPUT]
    out: Annotated[str, "file of examples to write; those for validation go beside it, as "
                        "NAME.validation.jsonl"]
    max_per_case: Annotated[int, "examples of one case at most", (1, None)] = 4
    validation: Annotated[float, "share of the problems that go to validation", (0, 0.9)] = 0.05
    balance: Annotated[bool, "as many examples whose right verdict is Yes as No, by leaving some out at "
                             "random"] = True
    prompt_file: Annotated[str | None, "the words around the case (default: those of the samples; "
                                       "sft --direct: prompts/direct.txt)"] = None
    seed: Annotated[int, "seed of the split, the balance and the pairing"] = 0
    overwrite: Annotated[bool, "replace an existing output"] = False


@dataclass(frozen=True, kw_only=True)
class SftConfig(FilterConfig):
    direct: Annotated[bool, "no analysis: the verdict line alone, for a direct PRM"] = False


def write_split(config: FilterConfig, prompt: str, examples: Callable[[Counter], Iterator[Example]]) -> None:
    """Split by problem, balance each side by verdict, write both files and the prompt, print the counts.

    examples: examples(counts) yields the same examples at each call, and counts what it drops. Two passes
              over them hold a few bytes per example
    """
    out = config.out
    balance = config.balance
    train_path = Path(out)
    validation_path = train_path.with_name(f"{train_path.stem}.validation{train_path.suffix}")
    refuse_input(validation_path, config)  # --out itself is looked at before a command begins
    for path in (train_path, validation_path):
        refuse_existing(path, config.overwrite)
    counts = Counter()
    verdicts = []
    held_out = []  # does the example go to validation?
    for case, _ in tqdm(examples(counts), desc="choosing", unit=" examples"):
        verdicts.append(case.label)
        held_out.append(fingerprint(config.seed, case.problem) / 2 ** 64 < config.validation)
    if not verdicts:
        if counts:
            print_table("nothing kept", counts)
        why = "the table says why" if counts else "there are none"
        raise BadInput(
            f"{' '.join(config.samples)}: no example can be made from these samples ({why}); "
            f"sample more, or leave out a filter"
        )
    if balance and len(set(verdicts)) == 1:
        balance = False
        held_out = [False] * len(verdicts)
        print(f"{out}: not balanced, as the verdict of all {len(verdicts)} examples is "
              f"{'Yes' if verdicts[0] else 'No'}; sample more cases before you trust a model of them")
    keep, held_out = choose(np.array(verdicts), np.array(held_out), balance, config.seed)
    counts["dropped: to balance Yes and No"] += int((~keep).sum())
    with writing(train_path) as train_file, writing(validation_path) as validation_file:
        for n, (case, line) in enumerate(examples(Counter())):
            if keep[n]:
                file = validation_file if held_out[n] else train_file
                file.write(json_line(line | {"problem": case.problem}))
                side = "validation" if held_out[n] else "train"
                counts[f"kept: {side}, {'Yes' if case.label else 'No'}"] += 1
    write_prompt(out, prompt)
    print_table(f"{train_path} and {validation_path}", counts)
    if config.validation and not held_out.any():
        print(f"{validation_path}: is empty, as there are so few problems; training goes on without, "
              "or give a larger --validation")


def choose(
    verdicts: np.ndarray, held_out: np.ndarray, balance: bool, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which examples to keep, and which of them are held out. All arrays (examples,) bool.

    Of few problems, one side may have none, or only those of one verdict: then nothing is held out.
    """
    keep = balanced(verdicts, held_out, seed) if balance else np.ones_like(held_out)
    if not ((keep & held_out).any() and (keep & ~held_out).any()):
        held_out = np.zeros_like(held_out)
        keep = balanced(verdicts, held_out, seed) if balance else np.ones_like(held_out)
    return keep, held_out


def balanced(verdicts: np.ndarray, held_out: np.ndarray, seed: int) -> np.ndarray:
    """Which examples to keep, for each side to have as many Yes as No. All arrays (examples,) bool."""
    keep = np.ones(len(verdicts), dtype=bool)
    rng = np.random.default_rng(seed)
    for side in (False, True):
        yes = np.flatnonzero(verdicts & (held_out == side))
        no = np.flatnonzero(~verdicts & (held_out == side))
        more = max(yes, no, key=len)
        fewer = min(len(yes), len(no))
        keep[rng.permutation(more)[fewer:]] = False
    return keep
