"""All benchmarks, one table: `make bench`. The short form takes 14 minutes on 2 cores, --full about two hours.

    python bench/run.py --model models/smollm2 --data models/gsm8k.json
    python bench/run.py --full --small SMALL-FOLDER --small-data test.jsonl

Run it on a quiet machine: another process on the same cores makes every small product wait. The raw figures go to
--out; a benchmark that fails is named, and the others go on.
"""
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Callable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's modules; this folder is `bench`
from bench import growth, prefill, reward, sampling, training
from bench.common import BenchConfig, Row, print_rows, surroundings
from plumbing.cli import print_config, resolved, run
from plumbing.errors import BadInput
from plumbing.files import write_json


@dataclass(frozen=True, kw_only=True)
class Config(BenchConfig):
    small: Annotated[str | None, "the small model of examples/arithmetic, for natural ends and growth"] = None
    small_data: Annotated[str | None, "solutions for it"] = None
    only: Annotated[tuple[str, ...], "some of the benchmarks", ("sampling", "natural", "prefill", "sft", "dpo", "reward", "growth")] = ()
    full: Annotated[bool, "the peer does all of the work, natural ends too"] = False
    out: Annotated[str, "file for the raw figures"] = "bench/results.json"


def main(config: Config) -> None:
    print_config(config)
    about, start, rows, failed = surroundings(config.threads), time.perf_counter(), [], {}
    print(f"commit {about['commit']}, {about['machine']}, {about['threads']} threads, torch {about['torch']}, "
          f"load {about['load_before']:.2f}")
    for name, measure in benchmarks(config).items():
        if config.only and name not in config.only:
            continue
        print(f"{name}:", flush=True)
        try:
            rows += measure()
        except BadInput as error:
            failed[name] = str(error)
            print(f"  failed: {error}", file=sys.stderr)
        write_json(config.out, about | {"config": resolved(config), "rows": [asdict(row) for row in rows], "failed": failed})
    print_rows(rows)
    print(f"\ncommit {about['commit']}, {about['machine']}, {about['threads']} threads, torch {about['torch']}, {about['date']}, "
          f"{(time.perf_counter() - start) / 60:.1f} minutes; raw figures in {config.out}")
    if failed:
        raise BadInput(f"{config.out}: these benchmarks failed: {', '.join(failed)}; their errors stand above and in the file")


def benchmarks(config: Config) -> dict[str, Callable[[], list[Row]]]:
    """name -> the benchmark with its settings."""
    common = dict(model=config.model, data=config.data, threads=config.threads, repeats=config.repeats, seed=config.seed)
    small = common | dict(model=config.small, data=config.small_data)
    full = dict(full=config.full)
    found = {
        "sampling": lambda: sampling.measure(sampling.Config(**common, **full)),
        "natural": lambda: sampling.measure(sampling.Config(**small, natural_ends=True, prompts=200, new_tokens=200, rows=2000,
                                                            peer_prompts=200 if config.full else 16, peer_batches=(1, 4, 16))),
        "prefill": lambda: prefill.measure(prefill.Config(**common)),
        "sft": lambda: training.measure(training.Config(**common, **full, what="sft", lr=5e-6)),
        "dpo": lambda: training.measure(training.Config(**common, **full, what="dpo", lr=5e-7)),
        "reward": lambda: reward.measure(reward.Config(**common, **full, dtypes=("float32", "bfloat16") if config.full else ("bfloat16",))),
        "growth": lambda: growth.measure(growth.Config(**small)),
    }
    if not config.small:
        found.pop("natural")
    return found


if __name__ == "__main__":
    run((Config, main))
