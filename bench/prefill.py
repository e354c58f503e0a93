"""How much of the prompts is computed: 100 consecutive cases of ProcessBench share instructions and problems.

    python bench/prefill.py --model FOLDER --data gsm8k.json
"""
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's modules; this folder is `bench`
from bench.common import BenchConfig, Row, consecutive_cases, in_turn, median_run, prompt_ids, run_side_or_all
from checkpoint import load_model
from plumbing.cli import run
from plumbing.queues import answers_of
import fast
from generate import Request
from rprm import yes_no_ids


@dataclass(frozen=True, kw_only=True)
class Config(BenchConfig):
    prompts: Annotated[int, "consecutive cases", (1, None)] = 100


def main(config: Config) -> None:
    run_side_or_all(config, {"ours": ours}, measure)


def measure(config: Config) -> list[Row]:
    runs = in_turn(__file__, {"ours": replace(config, side="ours")}, config.repeats)["ours"]
    our = median_run(runs, "seconds")
    share = our["prefill_tokens"] / our["prompt_tokens"]
    note = f"{our['prefill_tokens']} of {our['prompt_tokens']} tokens computed, in {our['seconds']:.1f} s"
    return [Row(f"prefill of {config.prompts} consecutive cases", "tokens computed / sum", share, "≤ 0.40", share <= 0.4,
                memory=our["peak_mb"], note=note, raw={"ours": runs})]


def ours(config: Config) -> dict:
    tokenizer, prompts = prompt_ids(config, consecutive_cases(config.data, config.prompts))
    model = fast.speed_up(load_model(config.model))
    engine = fast.engine_for(model)(model, tokenizer.eos_ids, yes_no_ids(tokenizer), max_new_tokens=1)
    start = time.perf_counter()
    for _ in answers_of(engine, (Request(ids, [n]) for n, ids in enumerate(prompts))):
        pass
    return {"seconds": time.perf_counter() - start, "prompt_tokens": engine.prompt_tokens, "prefill_tokens": engine.prefill_tokens}


if __name__ == "__main__":
    run((Config, main))
