"""From labelled cases to training examples: samples, SFT examples and preference pairs; and their packing
into trees.

    python data.py cases  --input gsm8k.json --out cases.jsonl
    python data.py sample --model TEACHER --cases cases.jsonl --n 4 --out samples.jsonl
    python data.py sft    --samples samples.jsonl --out sft.jsonl
    python data.py sample --model R-PRM-SFT --cases cases.jsonl --n 8 --out samples2.jsonl
    python data.py pairs  --samples samples2.jsonl --out pairs.jsonl

Asking a model for analyses of cases is one operation (`sample`); seed data and preferences are filters over
its file. `cases` reads the public formats (formats/cases.py). Each command prints what it kept and what it
dropped, and why.
"""
import dataclasses
import math
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Annotated

import numpy as np
from tqdm import tqdm

import fast
from checkpoint.flags import ServedConfig
from checkpoint.prompt import own_prompt, write_prompt
from formats.cases import CasesConfig, cases
from formats.examples import Unit
from formats.readers import read_case
from formats.samples import (
    CaseFile,
    add_verdicts,
    count_analyses,
    line_of_case,
    print_too_long,
    read_analyses,
)
from formats.verdicts import VERIFICATION, has_one_verdict, normal_form, parse_verdict
from formats.write_split import Example, write_split
from model import Tree, common_prefix
from plumbing import ranks
from plumbing.cli import print_config, print_table, run
from plumbing.files import get_field, read_jsonl
from plumbing.journal import Journal
from plumbing.rounds import in_order, round_size, rounds
from rprm import Analysis, Case, Prompt, Sampler, fingerprint, load_local_sampler, load_prompt

# ---------------------------------------------------------------------------------------------- samples

def load_sampler(config: ServedConfig, k: int, force: bool, direct: bool = False) -> Sampler:
    """The sampler of a checkpoint folder, or with --server that of the model there."""
    if config.server is None:
        return load_local_sampler(config, k, force, direct, config.batch_size)
    from server import load_served  # here, as nothing else needs it
    return load_served(config, k, force, direct)


@dataclass(frozen=True, kw_only=True)
class SampleConfig(ServedConfig):
    cases: Annotated[str, "cases.jsonl"]
    out: Annotated[str, "samples.jsonl to write"]
    n: Annotated[int, "analyses per case", (1, None)] = 4
    complete: Annotated[
        bool,
        "write the verification line and the model's answer into analyses that lack it, "
        "for a teacher that forgets the form",
    ] = False
    limit: Annotated[int | None, "only the first so many cases", (1, None)] = None
    resume: Annotated[bool, "go on with a killed run"] = False
    overwrite: Annotated[bool, "replace an existing output"] = False


def sample(config: SampleConfig) -> None:
    """cases.jsonl -> samples.jsonl: n analyses per case, with verdicts and P(Yes)."""
    ranks.join(config.device, config.rank_timeout)
    print_config(config)
    if not config.plain:
        fast.keep_freed_memory()
    case_file = CaseFile(config.cases)
    own = ranks.share(range(min(len(case_file), config.limit or len(case_file))))  # this rank's cases
    size = round_size(config.batch_size, config.device, config.server is not None)
    counts = Counter()
    too_long = []  # the ids of the cases that have no analyses
    journal = Journal(config.out, config, size or 1)
    items = (line_of_case(*case_file[i]) for i in own)
    for where, line in journal.check(items):  # what a killed run left
        analyses = read_analyses(line, where)
        count_analyses(counts, line["case"]["label"], analyses)
        if not analyses:
            too_long.append(line["id"])

    sampler = load_sampler(config, config.n, force=False)
    if config.complete:
        sampler.revise = add_verdicts
    start = time.perf_counter()
    bar = tqdm(total=len(own), initial=journal.done, desc="sample", unit="case", disable=ranks.rank() > 0)
    with journal, bar:
        if ranks.rank() == 0:
            write_prompt(config.out, sampler.prompt.text)
        for numbers in rounds(own, journal.done, size):
            found = sampler.analyses(case_file[i][1] for i in numbers)
            for i, analyses in zip(numbers, in_order(found), strict=True):
                case_id, case = case_file[i]
                line = line_of_case(case_id, case) | {"analyses": [dataclasses.asdict(a) for a in analyses]}
                journal.write(line)
                count_analyses(counts, case.label, analyses)
                if not analyses:
                    too_long.append(case_id)
                speed = sampler.engine.new_tokens / (time.perf_counter() - start)
                right = counts["verdict equal to the label"] / max(1, counts["analyses"])
                bar.update()
                bar.set_postfix_str(f"{speed:.0f} tokens/s, right {right:.0%}")
    print_table("analyses", sum(ranks.gather(counts), Counter()))
    print_too_long([name for names in ranks.gather(too_long) for name in names])
    if config.server:
        print(sampler.engine.tally())


# ------------------------------------------------------------------------------------- samples to examples

@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """The flags of both filters, `sft` and `pairs`."""
    samples: Annotated[tuple[str, ...], "samples.jsonl (sft --direct: cases.jsonl will do)"]
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


def write(config: FilterConfig, prompt: Prompt, examples: Callable[[Counter], Iterator[Example]]) -> None:
    write_split(examples, config.samples, config.out, config.overwrite, prompt.text, config.validation,
                config.balance, config.seed)


def sft(config: SftConfig) -> None:
    """samples.jsonl -> sft.jsonl: the analyses with one verdict, at the end, equal to the label."""
    print_config(config)
    travelled = None if config.direct else own_prompt(config.samples[0])
    prompt = load_prompt(config.prompt_file, travelled, config.direct)

    def examples(counts: Counter) -> Iterator[Example]:
        for where, row in chain.from_iterable(map(read_jsonl, config.samples)):
            case = read_case(row.get("case", row), where)
            if case.label is None:
                n_analyses = 1 if config.direct else len(row.get("analyses", []))
                counts["dropped: analysis of a case without a label"] += n_analyses
                continue
            if config.direct:
                responses = [f"{VERIFICATION} {'Yes' if case.label else 'No'}"]
            else:
                usable = select(read_analyses(row, where), case, counts, {True: "kept"})
                responses = usable["kept"]
            counts["dropped: over --max-per-case"] += max(0, len(responses) - config.max_per_case)
            for response in responses[:config.max_per_case]:
                yield case, case.label, {"prompt": prompt.fill(case), "response": response}
    write(config, prompt, examples)


def select(
    analyses: list[Analysis], case: Case, counts: Counter, names: dict[bool, str]
) -> dict[str, list[str]]:
    """The texts of a case's usable analyses, in the normal form, by name. What is dropped is counted.

    names: what those whose verdict is the label are called (True), and the others (False): {True: "kept"} has
    no others, {True: "right", False: "wrong"} has both
    """
    found: dict[str, list[str]] = {name: [] for name in names.values()}
    texts = set()
    for a in analyses:
        is_right = parse_verdict(a.text) == case.label
        if not a.finished:
            counts["dropped: cut off at --max-new-tokens"] += 1
        elif not has_one_verdict(a.text):
            counts["dropped: no verdict at the end, or several"] += 1
        elif is_right not in names:
            counts["dropped: verdict not equal to the label"] += 1
        elif normal_form(a.text) in texts:
            counts["dropped: the same analysis again"] += 1
        else:
            text = normal_form(a.text)
            texts.add(text)
            counts["of these, verdict put into the normal form"] += text != a.text
            found[names[is_right]].append(text)
    return found


def pairs(config: FilterConfig) -> None:
    """samples.jsonl -> pairs.jsonl: right × wrong analyses of the same case."""
    print_config(config)
    prompt = load_prompt(config.prompt_file, own_prompt(config.samples[0]))

    def examples(counts: Counter) -> Iterator[Example]:
        for where, row in chain.from_iterable(map(read_jsonl, config.samples)):
            case = read_case(get_field(row, "case", dict, where), where)
            if case.label is None:
                counts["dropped: analysis of a case without a label"] += len(row.get("analyses", []))
                continue
            usable = select(read_analyses(row, where), case, counts, {True: "right", False: "wrong"})
            right = usable["right"]
            wrong = usable["wrong"]
            if not (right and wrong):
                all_are = "right" if right else "wrong" if wrong else "unusable"
                counts[f"cases without a pair: all {all_are}"] += 1
            chosen = even_pairs(len(right), len(wrong), config.max_per_case, fingerprint(config.seed, case))
            counts["not made: over --max-per-case"] += len(right) * len(wrong) - len(chosen)
            for i, j in chosen:
                yield (
                    case,
                    case.label,
                    {"prompt": prompt.fill(case), "chosen": right[i], "rejected": wrong[j]},
                )
    write(config, prompt, examples)


def even_pairs(right: int, wrong: int, most: int, seed: int) -> list[tuple[int, int]]:
    """Up to `most` different pairs (i < right, j < wrong), each response about equally often.

    Both lists are walked at once. Whenever the walk comes round, one list is shifted by one, so each pair is
    met once.
    """
    rng = np.random.default_rng(seed)
    rights = rng.permutation(right)
    wrongs = rng.permutation(wrong)
    lap = math.lcm(right, wrong) if right and wrong else 1
    found = []
    for t in range(min(most, right * wrong)):
        i = rights[t % right]
        j = wrongs[(t + t // lap) % wrong]
        found.append((int(i), int(j)))
    return found


# ------------------------------------------------------------------------------ training examples, in trees

@dataclass
class MicroBatch:
    """Examples in one tree, which pass the model together.

    An example of SFT is one sequence of the tree, prompt and response. A pair is two: the prompt with the
    chosen response, and with the rejected one.
    """
    tree: Tree
    starts: list[int]    # of each sequence: the position at which its response begins
    examples: list[int]  # the examples' numbers, in the order of their sequences
    lengths: list[int]   # of each sequence: the tokens of its response


def pack(units: dict[int, Unit], micro_tokens: int) -> list[MicroBatch]:
    """Examples (number -> prompt and responses) in as few trees of at most `micro_tokens` as can be.

    No example alone may be larger (formats/examples.py leaves out those that are).
    The examples are put in lexicographic order, since neighbours then share the longest prefixes. They fill
    one tree after the other. The largest tree decides on the memory, so the trees are filled to the lowest
    limit that needs no more of them. The largest comes first: in the memory that it leaves, the others fit.

    Sixteen examples with 50 tokens in common and 100 of their own, micro_tokens = 1000: nine fit into a tree
    (950), so two trees are needed. The lowest limit that needs no third is 850: each tree gets eight.
    """
    order = sorted(units, key=units.__getitem__)
    alone = {}  # an example's tokens in a tree by itself
    own = {}    # those of them that it does not share with the example before it
    before = np.zeros(0, dtype=np.int64)
    for i in order:
        prompt, responses = units[i]
        sequence = np.asarray(prompt + responses[0])
        alone[i] = len(prompt) + sum(map(len, responses))
        own[i] = alone[i] - common_prefix(before, sequence)
        before = sequence
    largest = max(alone.values(), default=0)
    assert largest <= micro_tokens, f"an example has {largest} tokens, more than a tree of {micro_tokens}"

    def fill(limit: int) -> list[list[int]]:
        """The examples of each tree, if an example that would bring a tree over the limit begins the next."""
        trees = []
        size = 0
        for i in order:
            if trees and size + own[i] <= limit:
                trees[-1].append(i)
                size += own[i]
            else:
                trees.append([i])
                size = alone[i]
        return trees

    # A higher limit never needs more trees, so the lowest that needs no more can be bisected.
    fewest = len(fill(micro_tokens))
    limits = range(largest, micro_tokens)
    lowest = limits.start + bisect_left(limits, True, key=lambda limit: len(fill(limit)) == fewest)
    batches = [make_micro_batch(units, numbers) for numbers in fill(lowest)]
    return sorted(batches, key=lambda batch: len(batch.tree), reverse=True)


def make_micro_batch(units: dict[int, Unit], numbers: list[int]) -> MicroBatch:
    sequences = []
    starts = []
    lengths = []
    for i in numbers:
        prompt, responses = units[i]
        for response in responses:
            sequences.append(prompt + response)
            starts.append(len(prompt))
            lengths.append(len(response))
    return MicroBatch(Tree(sequences), starts, numbers, lengths)


def deal(batches: list[MicroBatch]) -> list[MicroBatch]:
    """This rank's share of a step's trees. All ranks get as many, since they work through them side by side.

    `pack` sorts the trees by size, so the ranks have trees of like size at the same time. Where the trees do
    not come out even, trees of two sequences without a response fill up: their loss and gradient are 0.
    """
    if ranks.count() == 1:
        return batches
    missing = -len(batches) % ranks.count()
    empty = [MicroBatch(Tree([[0], [0]]), starts=[1, 1], examples=[], lengths=[]) for _ in range(missing)]
    return ranks.share(batches + empty)


if __name__ == "__main__":
    run((CasesConfig, cases), (SampleConfig, sample), (SftConfig, sft), (FilterConfig, pairs))
