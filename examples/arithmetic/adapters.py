"""R-PRM SFT with adapters against SFT of all weights in the small world, the learning rates of both tuned alike.

    python examples/arithmetic/adapters.py --out runs/adapters

Both train on the same examples for one epoch. Each learning rate is the best of as many by validation loss on the first
seed, half an order of magnitude apart. A killed run goes on where it was.
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

LEARNING_RATES = {"all weights": ("3e-5", "1e-4", "3e-4", "1e-3"), "adapters": ("3e-4", "1e-3", "3e-3", "1e-2")}
KS = (1, 8)


@dataclass(frozen=True)
class Config:
    out: Annotated[str, "folder for all runs; what is complete in it is not run again"]
    rank: Annotated[int, "of the adapters", (1, None)] = 8
    seeds: Annotated[tuple[int, ...], "data and runs of their own each"] = (0, 1, 2, 3, 4)
    jobs: Annotated[int, "runs side by side, one thread each", (1, None)] = 2
    train: Annotated[int, "solutions from which cases are made, per seed", (16, None)] = 400
    test: Annotated[int, "test solutions per seed", (10, None)] = 200
    difficulty: Annotated[float, "of the problems, see world.py", (0, 1)] = 0.5
    base: Annotated[str, "the model that both kinds start from"] = str(HERE / "base")


class Chain(claims.Chain):
    """The stages of one seed."""

    def fit(self, kind: str, lr: str) -> Path:
        """SFT of the base -> the run's folder, with the whole model in it."""
        folder = self.folder / f"{kind.replace(' ', '-')}.lr-{lr}"
        flags = ("--lora-rank", self.config.rank, "--merge") if kind == "adapters" else ()
        self.stage(folder.name, "train_sft.py", "--model", self.base, "--train", self.folder / "sft.1.jsonl",
                   "--validation", self.folder / "sft.1.validation.jsonl", "--out", folder, "--lr", lr, "--batch-size", 32,
                   "--eval-every", 10, "--seed", self.seed, "--resume", *flags)
        return folder

    def fit_and_score(self, chosen: dict[str, str]) -> dict[str, list[dict]]:
        """kind -> the scores of the test solutions."""
        self.prepare()
        found = {}
        for kind, lr in chosen.items():
            trained = self.fit(kind, lr)
            scores = self.score(trained.name, trained / "model", "--k", *KS, "--all-steps")
            found[kind] = [line for _, line in read_jsonl(scores)]
        return found


def main(config: Config) -> None:
    print_config(config)
    if len(config.seeds) not in claims.T_975:
        raise BadInput(f"--seeds: {len(config.seeds)} of them; an interval needs {min(claims.T_975)} to {max(claims.T_975)}")
    first = Chain(config, config.seeds[0])
    first.prepare()
    chosen = {}
    print("| trained | lr | validation loss |\n|---|---|---|")
    with ThreadPoolExecutor(config.jobs) as pool:
        for kind, rates in LEARNING_RATES.items():
            losses = dict(zip(rates, pool.map(claims.lowest_loss, pool.map(partial(first.fit, kind), rates))))
            chosen[kind] = min(rates, key=losses.get)
            for lr, loss in losses.items():
                mark = "**" if lr == chosen[kind] else ""
                print(f"| {kind} | {lr} | {mark}{loss:.4f}{mark} |")
        models = list(pool.map(lambda seed: Chain(config, seed).fit_and_score(chosen), config.seeds))
    print(f"\n| trained | lr | K | F1, mean of {len(models)} seeds [95%] | in each seed |\n|---|---|---|---|---|")
    for kind, lr in chosen.items():
        for k in KS:
            f1 = claims.interval([measure(kind, scores[kind], k)["f1"] for scores in models])
            print(f"| {kind} | {lr} | {k} | {claims.shown(f1)} | {', '.join(f'{value:.1f}' for value in f1['seeds'])} |")


if __name__ == "__main__":
    run((Config, main))
