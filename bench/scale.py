"""Does the data side stream? Seconds and peak memory of each stage on generated files, up to the official size.

    python bench/scale.py                              # 3,000 and 30,000 examples of 1,500 tokens
    python bench/scale.py --sizes 3000 30000 300000    # the official size: some 12 GB of files, half an hour

`data.py cases`, score.py and `data.py sample` (all but the model: a stand-in answers at once), `sample` resumed where nothing but
the end is left to do, `sft` and `pairs`, each as it is, then what train_sft.py and train_dpo.py do with their files: the start
(every line is checked), and the packing of 5 steps of 128. Each stage has a process of its own. Wanted: under 2 GB at every
size, and no start longer than a minute.
"""
import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Iterable, Iterator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's modules; this folder is `bench`
import numpy as np

import data
from formats.examples import Examples
import score
from bench.common import ROOT, peak_mb, report, run_side
from checkpoint import load_tokenizer
from formats.turns import read_example, read_pair
from plumbing.cli import print_config, run
from plumbing.files import json_line, writing
from formats.verdicts import VERIFICATION
from rprm import Analysis, Case, load_prompt

STAGES = ("cases", "score", "sample", "resume", "sft", "pairs", "train_sft", "train_dpo")
WORDS = "the sum of apples and pens in each box is half what Tom had before he gave 12 to Mia so we get 34 + 7 = 41".split()


@dataclass(frozen=True)
class Config:
    sizes: Annotated[tuple[int, ...], "numbers of cases", (100, None)] = (3000, 30000)
    model: Annotated[str, "checkpoint: its tokenizer and chat template are used"] = str(ROOT / "examples/arithmetic/base")
    data: Annotated[str, "folder for the files, which are removed afterwards (default: a temporary one)"] = ""
    threads: Annotated[int, "threads", (1, None)] = 1
    side: Annotated[str | None, "do this stage's work alone and print it as JSON", STAGES] = None


def main(config: Config) -> None:
    if config.side:
        return report(stage(config))
    print_config(config)
    print("\n| examples | stage | file read | start | seconds | peak MB |\n|---|---|---|---|---|---|")
    for n in config.sizes:
        with tempfile.TemporaryDirectory(dir=config.data or None) as folder:
            write_solutions(Path(folder) / "solutions.jsonl", n)
            for side in STAGES:
                found = run_side(__file__, replace(config, sizes=(n,), data=folder, side=side))
                print(f"| {n:,} | {side} | {found['read_mb']:,.0f} MB | {found['start']:.1f} s | {found['seconds']:.1f} | "
                      f"{found['peak_mb']:,.0f} |", flush=True)


def write_solutions(path: Path, n: int) -> None:
    """n solutions of one step each: about 700 tokens of problem and step, which the analyses double."""
    rng = np.random.default_rng(0)
    with writing(path) as file:
        for i in range(n):
            words = rng.choice(WORDS, 500)
            file.write(json_line({"id": str(i), "problem": " ".join(words[:300]), "steps": [" ".join(words[300:])],
                                  "label": int(rng.integers(-1, 1))}))


READS = {"cases": "solutions", "sample": "cases", "resume": "cases", "score": "solutions", "sft": "samples", "pairs": "samples",
         "train_sft": "sft", "train_dpo": "pairs"}


def stage(config: Config) -> dict:
    """One stage in the folder `config.data` -> what it took. `start`: until the first output, or the first step."""
    folder, begin, started = Path(config.data), time.perf_counter(), []
    source, out = folder / f"{READS[config.side]}.jsonl", str(folder / f"{config.side}.jsonl")

    def stand_in(sampler_config, k, *_, **__):
        started.append(time.perf_counter() - begin)
        return SimpleNamespace(engine=SimpleNamespace(new_tokens=0), prompt=load_prompt(None, None),
                               analyses=lambda cases: answers(cases, k))
    data.load_sampler = score.load_sampler = stand_in
    if config.side == "cases":
        data.cases(data.CasesConfig(input=(str(source),), out=out))
    elif config.side in ("sample", "resume"):
        settings = data.SampleConfig(model=config.model, cases=str(source), out=str(folder / "samples.jsonl"), n=4, device="cpu")
        if config.side == "resume":
            os.rename(settings.out, f"{settings.out}.part")
        data.sample(replace(settings, resume=config.side == "resume"))
    elif config.side == "score":
        score.judge(score.JudgeConfig(model=config.model, input=(str(source),), out=out, k=(1, 4), device="cpu"))
    elif config.side in ("sft", "pairs"):
        command, kind = {"sft": (data.sft, data.SftConfig), "pairs": (data.pairs, data.FilterConfig)}[config.side]
        command(kind(samples=(str(source),), out=out, max_per_case=1, validation=0.01))
    else:
        read = read_example if config.side == "train_sft" else read_pair
        examples = Examples(str(source), read, load_tokenizer(config.model), micro_tokens=8192, context=8192)
        started.append(time.perf_counter() - begin)
        for step in range(5):
            order = np.random.default_rng(step).permutation(len(examples))
            data.pack(examples.units(order[:128].tolist()), 8192)
    seconds = time.perf_counter() - begin
    found = {"seconds": seconds, "start": sum(started), "read_mb": source.stat().st_size / 1e6, "peak_mb": peak_mb()}
    for name in {"score": ["score", "solutions"], "train_sft": ["sft"], "pairs": ["samples"]}.get(config.side, ()):
        (folder / f"{name}.jsonl").unlink()  # room for the next ones
    return found


def answers(cases: Iterable[Case], k: int) -> Iterator[tuple[int, list[Analysis]]]:
    """Analyses of about 500 tokens that say Yes and No in turn."""
    text = " ".join(WORDS * 16)
    for i, _ in enumerate(cases):
        yield i, [Analysis(f"{j} {text}\n{VERIFICATION} {'Yes' if j % 2 else 'No'}", bool(j % 2), 0.5, 500, True) for j in range(k)]


if __name__ == "__main__":
    run((Config, main))
