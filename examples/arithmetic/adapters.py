"""Less memory in the small world: R-PRM SFT and DPO with adapters, and with moments of 8 bits, against plain training.

    python examples/arithmetic/adapters.py --out runs/adapters

All three start from the same base and the same examples, and collect their pairs with their own SFT model. Learning rates
are chosen on the first seed from as many each, half an order of magnitude apart: SFT's by validation loss, DPO's by
validation F1. Moments of 8 bits take those of all weights. A killed run goes on where it was.
"""
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))  # the project's scripts, which are no package
import claims  # beside this file
from plumbing.cli import print_config, run
from plumbing.errors import BadInput
from plumbing.files import read_jsonl
from report import measure

ALL, ADAPTERS, EIGHT_BITS = "all weights", "adapters", "all weights, moments of 8 bits"
RATES = {
    "sft": {ALL: ("3e-5", "1e-4", "3e-4"), ADAPTERS: ("3e-4", "1e-3", "3e-3")},
    "dpo": {ALL: ("3e-5", "1e-4", "3e-4"), ADAPTERS: ("3e-4", "1e-3", "3e-3")},
}
KS = (1, 8)
NLL = 5  # weight of DPO's NLL term, what claims.py's grid chooses


@dataclass(frozen=True)
class Config:
    out: Annotated[str, "folder for all runs; what is complete in it is not run again"]
    rank: Annotated[int, "of the adapters", (1, None)] = 8
    seeds: Annotated[tuple[int, ...], "data and runs of their own each"] = (0, 1, 2, 3, 4)
    jobs: Annotated[int, "runs side by side, one thread each", (1, None)] = 2
    train: Annotated[int, "solutions from which cases are made, per seed", (16, None)] = 400
    test: Annotated[int, "test solutions per seed", (10, None)] = 200
    difficulty: Annotated[float, "of the problems, see world.py", (0, 1)] = 0.5
    base: Annotated[str, "the model that all start from"] = str(HERE / "base")


class Chain(claims.Chain):
    """The stages of one seed."""

    def sft(self, kind: str, lr: str) -> Path:
        """SFT of the base -> the run's folder, with the whole model in it."""
        flags = {
            ALL: (),
            ADAPTERS: ("--lora-rank", self.config.rank, "--merge"),
            EIGHT_BITS: ("--adamw-8bit",),
        }
        data = self.folder / "sft.1.jsonl"
        return self.train_by("train_sft.py", f"sft.{short(kind)}.lr-{lr}", data, lr, 10, "--model", self.base, *flags[kind])

    def pairs(self, kind: str, sft: Path) -> Path:
        """Pairs from a kind's own SFT model."""
        preferences = self.folder / f"preferences.{short(kind)}.jsonl"
        pairs = self.folder / f"pairs.{short(kind)}.jsonl"
        self.stage(preferences.stem, "data.py", "sample", "--model", sft / "model", "--cases", self.folder / "cases.jsonl", "--n", 8,
                   "--seed", 100 + self.seed, *claims.SAMPLING, "--out", preferences, "--resume")
        self.stage(pairs.stem, "data.py", "pairs", "--samples", preferences, "--validation", 0.1, "--seed", self.seed,
                   "--out", pairs, "--overwrite")
        return pairs

    def dpo(self, kind: str, sft: Path, lr: str) -> Path:
        flags = {
            ALL: ("--model", sft / "model"),
            ADAPTERS: ("--model", self.base, "--adapter", sft / "adapter", "--merge"),
            EIGHT_BITS: ("--model", sft / "model", "--adamw-8bit"),
        }
        name = f"dpo.{short(kind)}.lr-{lr}"
        return self.train_by("train_dpo.py", name, self.pairs(kind, sft), lr, 5, "--epochs", 2, "--nll", NLL, *flags[kind])

    def train_by(self, script: str, name: str, data: Path, lr: str, eval_every: int, *flags) -> Path:
        out = self.folder / name
        self.stage(name, script, "--train", data, "--validation", data.with_suffix(".validation.jsonl"), "--out", out, "--lr", lr,
                   "--batch-size", 32, "--eval-every", eval_every, "--seed", self.seed, "--resume", *flags)
        return out

    def scores(self, chosen: dict[tuple[str, str], str]) -> dict[tuple[str, str], list[dict]]:
        """(stage, kind) -> the scores of the test solutions."""
        self.prepare()
        found = {}
        for kind in (ALL, ADAPTERS, EIGHT_BITS):
            sft = self.sft(kind, chosen["sft", kind])
            dpo = self.dpo(kind, sft, chosen["dpo", kind])
            for stage, trained in (("sft", sft), ("dpo", dpo)):
                file = self.score(trained.name, trained / "model", "--k", *KS, "--all-steps")
                found[stage, kind] = [line for _, line in read_jsonl(file)]
        return found


def short(kind: str) -> str:
    return kind.replace(",", "").replace(" ", "-")


def choose(config: Config) -> dict[tuple[str, str], str]:
    """(stage, kind) -> the learning rate, chosen on the first seed; prints what was measured."""
    first = Chain(config, config.seeds[0])
    first.prepare()
    chosen = {}
    print("| stage | trained | lr | measured on the first seed |\n|---|---|---|---|")
    with ThreadPoolExecutor(config.jobs) as pool:
        for kind, rates in RATES["sft"].items():
            losses = list(pool.map(claims.lowest_loss, pool.map(partial(first.sft, kind), rates)))
            chosen["sft", kind] = rates[losses.index(min(losses))]
            for lr, loss in zip(rates, losses, strict=True):
                print(f"| SFT | {kind} | {lr} | validation loss {loss:.4f} |")
        for kind, rates in RATES["dpo"].items():
            sft = first.sft(kind, chosen["sft", kind])
            first.pairs(kind, sft)  # before several runs want them at once
            first.validation_solutions()
            scores = list(pool.map(first.validation_f1, pool.map(partial(first.dpo, kind, sft), rates)))
            chosen["dpo", kind] = rates[scores.index(max(scores))]
            for lr, f1 in zip(rates, scores, strict=True):
                print(f"| DPO | {kind} | {lr} | validation F1 {f1:.1f} |")
    for stage in ("sft", "dpo"):
        chosen[stage, EIGHT_BITS] = chosen[stage, ALL]
    return chosen


def main(config: Config) -> None:
    print_config(config)
    if len(config.seeds) not in claims.T_975:
        raise BadInput(f"--seeds: {len(config.seeds)} of them; an interval needs {min(claims.T_975)} to {max(claims.T_975)}")
    chosen = choose(config)
    with ThreadPoolExecutor(config.jobs) as pool:
        of_seeds = list(pool.map(lambda seed: Chain(config, seed).scores(chosen), config.seeds))
    print("\n| stage | trained | lr | K | F1 [95%] | minus all weights | in each seed |\n|---|---|---|---|---|---|---|")
    for (stage, kind), lr in chosen.items():
        for k in KS:
            f1 = [measure(kind, scores[stage, kind], k)["f1"] for scores in of_seeds]
            plain = [measure(ALL, scores[stage, ALL], k)["f1"] for scores in of_seeds]
            differences = [a - b for a, b in zip(f1, plain, strict=True)]
            less = "" if kind == ALL else claims.shown(claims.interval(differences))
            each = ", ".join(f"{value:.1f}" for value in f1)
            print(f"| {stage.upper()} | {kind} | {lr} | {k} | {claims.shown(claims.interval(f1))} | {less} | {each} |")


if __name__ == "__main__":
    run((Config, main))
