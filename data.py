"""From labelled cases to training examples: samples, SFT examples and preference pairs; and their packing
into trees.

    python data.py cases  --input prm800k.jsonl --out cases.jsonl
    python data.py sample --model TEACHER --cases cases.jsonl --n 4 --out samples.jsonl
    python data.py sft    --samples samples.jsonl --out sft.jsonl
    python data.py sample --model R-PRM-SFT --cases cases.jsonl --n 8 --out samples2.jsonl
    python data.py pairs  --samples samples2.jsonl --out pairs.jsonl

Asking a model for analyses of cases is one operation (`sample`); seed data and preferences are filters over
its file. `cases` reads the public formats (formats/readers.py). Each command prints what it kept and what it
dropped, and why.
"""
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np

import fast
from checkpoint.flags import ServedConfig
from checkpoint.prompt import own_prompt, write_prompt
from formats import samples
from formats.cases import CasesConfig, cases
from formats.examples import Unit
from formats.verdicts import VERIFICATION, has_one_verdict, normal_form, parse_verdict
from formats.write_split import Example, FilterConfig, SftConfig, write_split
from model import Tree, common_prefix
from plumbing import ranks
from plumbing.cli import INPUT, print_config, run
from plumbing.files import fingerprint
from plumbing.journal import Journal
from plumbing.packing import fill_evenly
from plumbing.progress import Progress
from plumbing.rounds import in_order, round_size, rounds
from rprm import Analysis, Case, Sampler, load_local_sampler, load_prompt

# ---------------------------------------------------------------------------------------------- samples

def load_sampler(config: ServedConfig, k: int, force: bool, direct: bool = False) -> Sampler:
    """The sampler of a checkpoint folder, or with --server that of the model there."""
    if config.server is None:
        return load_local_sampler(config, k, force, direct, config.batch_size)
    from server import load_served  # here, as nothing else needs it
    return load_served(config, k, force, direct)


@dataclass(frozen=True, kw_only=True)
class SampleConfig(ServedConfig):
    cases: Annotated[str, "cases.jsonl", INPUT]
    out: Annotated[str, "samples.jsonl to write"]
    n: Annotated[int, "analyses per case", (1, None)] = 4
    complete: Annotated[bool, "write the verification line and the model's answer into analyses that lack "
                              "it, for a teacher that forgets the form"] = False
    limit: Annotated[int | None, "only the first so many cases", (1, None)] = None
    resume: Annotated[bool, "go on with a killed run"] = False
    overwrite: Annotated[bool, "replace an existing output"] = False


def sample(config: SampleConfig) -> None:
    """cases.jsonl -> samples.jsonl: n analyses per case, with verdicts and P(Yes)."""
    ranks.join(config.device, config.rank_timeout)
    print_config(config)
    if not config.plain:
        fast.keep_freed_memory()
    case_file = samples.CaseFile(config.cases)
    own = ranks.share(range(len(case_file))[:config.limit])  # this rank's cases
    size = round_size(config.batch_size, config.device, config.server is not None)
    journal = Journal(config.out, config, len(own), size or 1)
    tally = samples.SampleTally()
    for where, line in journal.check(samples.line_of_case(*case_file[i]) for i in own):  # of a killed run
        tally.add(line["id"], line["case"]["label"], samples.read_analyses(line, where))

    sampler = load_sampler(config, config.n, force=False)
    if config.complete:
        sampler.revise = samples.add_verdicts
    with journal, Progress("sample", "case", len(own), journal.done, sampler.engine) as progress:
        if ranks.rank() == 0:
            write_prompt(config.out, sampler.prompt.text)
        for numbers in rounds(own, journal.done, size):
            found = sampler.analyses(case_file[i][1] for i in numbers)
            for i, analyses in zip(numbers, in_order(found), strict=True):
                case_id, case = case_file[i]
                journal.write(samples.sample_line(case_id, case, analyses))
                tally.add(case_id, case.label, analyses)
                progress.step(tally.so_far())
    samples.SampleTally.sum(ranks.gather(tally)).print()
    if config.server:
        print(sampler.engine.tally())


# ------------------------------------------------------------------------------------- samples to examples

def sft(config: SftConfig) -> None:
    """samples.jsonl -> sft.jsonl: the analyses with one verdict, at the end, equal to the label."""
    print_config(config)
    travelled = None if config.direct else own_prompt(config.samples[0])
    prompt = load_prompt(config.prompt_file, travelled, config.direct)

    # write_split goes through the examples twice: to choose, and to write
    def examples(counts: Counter) -> Iterator[Example]:
        for where, row, case in samples.labelled_rows(config.samples, counts, config.direct):
            if config.direct:
                responses = [f"{VERIFICATION} {'Yes' if case.label else 'No'}"]
            else:
                responses, _ = select(samples.read_analyses(row, where), case, counts)
            counts["dropped: over --max-per-case"] += max(0, len(responses) - config.max_per_case)
            for response in responses[:config.max_per_case]:
                yield case, {"prompt": prompt.fill(case), "response": response}
    write_split(config, prompt.text, examples)


def pairs(config: FilterConfig) -> None:
    """samples.jsonl -> pairs.jsonl: right × wrong analyses of the same case."""
    print_config(config)
    prompt = load_prompt(config.prompt_file, own_prompt(config.samples[0]))

    def examples(counts: Counter) -> Iterator[Example]:
        for where, row, case in samples.labelled_rows(config.samples, counts):
            right, wrong = select(samples.read_analyses(row, where), case, counts, wrong_too=True)
            if not (right and wrong):
                all_are = "right" if right else "wrong" if wrong else "unusable"
                counts[f"cases without a pair: all {all_are}"] += 1
            chosen = even_pairs(len(right), len(wrong), config.max_per_case, fingerprint(config.seed, case))
            counts["not made: over --max-per-case"] += len(right) * len(wrong) - len(chosen)
            for i, j in chosen:
                yield case, {"prompt": prompt.fill(case), "chosen": right[i], "rejected": wrong[j]}
    write_split(config, prompt.text, examples)


def select(analyses: list[Analysis], case: Case, counts: Counter,
           wrong_too: bool = False) -> tuple[list[str], list[str]]:
    """The texts of a case's usable analyses, in the normal form -> (right ones, wrong ones).

    Right is a verdict that is the label. Wrong ones are kept for pairs alone (wrong_too). What is dropped is
    counted.
    """
    right = []
    wrong = []
    counts["cases without analyses"] += not analyses
    for a in analyses:
        is_right = parse_verdict(a.text) == case.label  # of the text, as that is what is trained on
        if not a.finished:
            counts["dropped: cut off (--max-new-tokens or context)"] += 1
        elif not has_one_verdict(a.text):
            counts["dropped: no verdict at the end, or several"] += 1
        elif not (is_right or wrong_too):
            counts["dropped: verdict not equal to the label"] += 1
        elif normal_form(a.text) in right + wrong:
            counts["dropped: the same analysis again"] += 1
        else:
            text = normal_form(a.text)
            counts["of these, verdict put into the normal form"] += text != a.text
            (right if is_right else wrong).append(text)
    return right, wrong


def even_pairs(right: int, wrong: int, most: int, seed: int) -> list[tuple[int, int]]:
    """Up to `most` different pairs (i < right, j < wrong), each response about equally often.

    Both lists are walked at once. Whenever the walk comes round, one list is shifted by one, so each pair is
    met once.
    """
    rng = np.random.default_rng(seed)
    rights = rng.permutation(right).tolist()
    wrongs = rng.permutation(wrong).tolist()
    lap = math.lcm(right, wrong)
    found = []
    for t in range(min(most, right * wrong)):
        found.append((rights[t % right], wrongs[(t + t // lap) % wrong]))
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
    """Examples (number -> prompt and responses) in few trees of at most `micro_tokens` tokens.

    The examples are put in lexicographic order, since neighbours then share the longest prefixes, and fill
    one tree after the other. The largest tree decides how much memory is needed, so the trees are made of
    like size (plumbing/packing.py). It comes first, and the others find room in the memory that it frees.
    """
    order = sorted(units, key=units.__getitem__)
    alone = []  # the tokens of each example if it begins a tree, its responses in full
    own = []    # those that it adds to a tree that has the example before it
    before = np.zeros(0, dtype=np.int64)
    for i in order:
        prompt, responses = units[i]
        sequence = np.asarray(prompt + responses[0])
        alone.append(len(prompt) + sum(map(len, responses)))
        own.append(alone[-1] - common_prefix(before, sequence))
        before = sequence
    groups = fill_evenly(alone, own, micro_tokens)
    batches = [make_micro_batch(units, [order[i] for i in group]) for group in groups]
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
    fillers = []
    for _ in range(-len(batches) % ranks.count()):
        # Two sequences, as a pair of DPO has; no example and no length, so what is computed of them is (0,)
        fillers.append(MicroBatch(Tree([[0], [0]]), starts=[1, 1], examples=[], lengths=[]))
    return ranks.share(batches + fillers)


if __name__ == "__main__":
    run((CasesConfig, cases), (SampleConfig, sample), (SftConfig, sft), (FilterConfig, pairs))
