"""The paper's claims in the small world, each with a confidence interval over seeds.

    python examples/arithmetic/claims.py --out runs/claims

runs the whole chain of demo.sh once per seed, each stage a command line of its own, and writes OUT/claims.json, the plot
OUT/claims.png and the tables between the markers of examples/arithmetic/README.md. A killed run goes on where it was.

The direct PRM and R-PRM start from the same base and see the same cases; learning rate and epochs of each come from the
same grid, by validation loss on the first seed. DPO's settings come from validation F1 there: its loss goes on falling where the
model already says No to nearly everything. A seed has problems of its own, for training as for the test.
"""
import itertools
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))  # the project's scripts, which are no package
from plumbing.cli import print_config, run
from plumbing.errors import BadInput
from plumbing.files import read_json, read_jsonl, write_json, writing
from checkpoint.prompt import own_prompt
from report import f1_of, import_pyplot, measure, predictions, step_rewards  # beside this file

LEARNING_RATES, EPOCHS = ("1e-4", "3e-4", "1e-3"), ("1", "3")  # the grid, the same for the direct PRM and for R-PRM SFT
DPO_SETTINGS = tuple(itertools.product(("3e-5", "1e-4", "3e-4"), ("0", "5")))  # learning rate, weight of the NLL term
SIZES = (8, 4, 2, 1)  # the data-size curve: the first 1/8, 1/4, 1/2 of the cases, and all
KS = tuple(range(1, 9))
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # Student's t by number of seeds
BOOTSTRAPS = 2000
SAMPLING = ("--max-new-tokens", "120", "--batch-size", "64")


@dataclass(frozen=True)
class Config:
    out: Annotated[str, "folder for all runs, claims.json and the plot; what is complete in it is not run again"]
    seeds: Annotated[tuple[int, ...], "a whole chain each"] = (0, 1, 2, 3, 4)
    jobs: Annotated[int, "chains side by side, one thread each", (1, None)] = 2
    train: Annotated[int, "solutions from which cases are made, per seed", (16, None)] = 400
    test: Annotated[int, "test solutions per seed", (10, None)] = 200
    difficulty: Annotated[float, "of the problems, see world.py", (0, 1)] = 0.5
    dpo_epochs: Annotated[int, "passes over the pairs", (1, None)] = 2
    beta: Annotated[float, "DPO's beta", (1e-6, None)] = 0.1
    base: Annotated[str, "the model that both kinds start from, and from which seed data is collected"] = str(HERE / "base")
    readme: Annotated[bool, "write the tables into examples/arithmetic/README.md"] = True


# ---------------------------------------------------------------------------------------------- the chain of a seed

class Chain:
    """The stages of one seed, in its own folder. A stage is done when its log bears its final name."""

    def __init__(self, config: Config, seed: int):
        self.config, self.seed, self.base = config, seed, Path(config.base).resolve()
        self.folder = Path(config.out).resolve() / f"seed-{seed}"
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)

    def stage(self, name: str, *command) -> None:
        log = self.folder / "logs" / f"{name}.log"
        if log.exists():
            return
        print(f"seed {self.seed}: {name}", flush=True)
        part = log.with_suffix(".part")
        with open(part, "w", encoding="utf-8") as file:
            code = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                                  env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
        if code:
            last = part.read_text(encoding="utf-8").strip()[-300:]
            raise BadInput(f"{part}: the stage failed with exit code {code}; its last line: {last}")
        os.replace(part, log)

    def prepare(self) -> None:
        """Cases, and the base's own analyses of them."""
        c, f = self.config, self.folder
        self.stage("world", HERE / "world.py", "--out", f / "world", "--seed", 1000 + self.seed, "--difficulty", c.difficulty,
                   "--train", c.train, "--validation", 0, "--test", c.test, "--pretrain", 0)
        self.stage("cases", "data.py", "cases", "--input", f / "world/train.jsonl", "--out", f / "cases.jsonl", "--overwrite")
        self.stage("seed", "data.py", "sample", "--model", self.base, "--cases", f / "cases.jsonl", "--n", 4,
                   "--seed", self.seed, *SAMPLING, "--out", f / "seed.jsonl", "--resume")
        for size in SIZES:
            first_share(f / "cases.jsonl", f / f"cases.{size}.jsonl", size)
            first_share(f / "seed.jsonl", f / f"seed.{size}.jsonl", size)
            self.stage(f"direct.{size}.data", "data.py", "sft", "--direct", "--samples", f / f"cases.{size}.jsonl", "--validation", 0.1,
                       "--prompt-file", HERE / "direct_prompt.txt", "--seed", self.seed, "--out", f / f"direct.{size}.jsonl", "--overwrite")
            self.stage(f"sft.{size}.data", "data.py", "sft", "--samples", f / f"seed.{size}.jsonl", "--validation", 0.1,
                       "--prompt-file", HERE / "prompt.txt", "--seed", self.seed, "--out", f / f"sft.{size}.jsonl", "--overwrite")

    def train(self, kind: str, size: int, lr: str, epochs: str) -> Path:
        """SFT of the base on 1/size of the cases, as a direct PRM or to reason -> the run's folder."""
        f = self.folder
        name = f"{kind}.{size}.lr-{lr}.epochs-{epochs}"
        self.stage(name, "train_sft.py", "--model", self.base, "--train", f / f"{kind}.{size}.jsonl",
                   "--validation", f / f"{kind}.{size}.validation.jsonl", "--out", f / name, "--lr", lr, "--epochs", epochs,
                   "--batch-size", 32, "--eval-every", 10, "--seed", self.seed, "--resume")
        return f / name

    def prefer(self, sft: Path) -> None:
        """Pairs from the SFT model itself."""
        f = self.folder
        self.stage("preferences", "data.py", "sample", "--model", sft / "model", "--cases", f / "cases.jsonl", "--n", 8,
                   "--seed", 100 + self.seed, *SAMPLING, "--out", f / "preferences.jsonl", "--resume")
        self.stage("pairs", "data.py", "pairs", "--samples", f / "preferences.jsonl", "--validation", 0.1, "--seed", self.seed,
                   "--out", f / "pairs.jsonl", "--overwrite")

    @staticmethod
    def dpo_name(lr: str, nll: str) -> str:
        return f"dpo.lr-{lr}.nll-{nll}"

    def train_dpo(self, sft: Path, lr: str, nll: str) -> Path:
        c, f, name = self.config, self.folder, self.dpo_name(lr, nll)
        self.stage(name, "train_dpo.py", "--model", sft / "model", "--train", f / "pairs.jsonl",
                   "--validation", f / "pairs.validation.jsonl", "--out", f / name, "--lr", lr, "--epochs", c.dpo_epochs,
                   "--nll", nll, "--beta", c.beta, "--batch-size", 32, "--eval-every", 5, "--seed", self.seed, "--resume")
        return f / name

    def score(self, name: str, model: Path, *flags, data: str = "world/test.jsonl") -> Path:
        out = self.folder / f"scores.{name}.jsonl"
        self.stage(f"scores.{name}", "score.py", "--model", model, "--input", self.folder / data, *SAMPLING, "--seed", self.seed,
                   "--out", out, "--resume", *flags)
        return out

    def validation_solutions(self) -> None:
        self.stage("validation", HERE / "world.py", "--out", self.folder / "validation", "--seed", 2000 + self.seed, "--difficulty",
                   self.config.difficulty, "--train", 0, "--validation", 150, "--test", 0, "--pretrain", 0)

    def validation_f1(self, run: Path) -> float:
        """F1 at K = 7 on the validation solutions."""
        scores = self.score(f"validation.{run.name}", run / "model", "--k", 7, data="validation/validation.jsonl")
        return read_json(scores.with_suffix(".summary.json"))[0]["f1"]

    def run(self, chosen: dict[str, tuple[str, ...]]) -> None:
        """Everything but DPO."""
        self.prepare()
        runs = {(kind, size): self.train(kind, size, *chosen[kind]) for kind, size in itertools.product(("direct", "sft"), SIZES)}
        self.prefer(runs["sft", 1])
        for size in SIZES:
            self.score(f"direct.{size}", runs["direct", size] / "model", "--direct", "--k", 1, "--all-steps")
            self.score(f"sft.{size}", runs["sft", size] / "model", "--k", *KS, *(["--all-steps"] if size == 1 else []))
        self.score("base", self.base, "--k", *KS, "--all-steps")

    def run_dpo(self, chosen: dict[str, tuple[str, ...]]) -> None:
        dpo = self.train_dpo(self.train("sft", 1, *chosen["sft"]), *chosen["dpo"])
        self.score(dpo.name, dpo / "model", "--k", *KS, "--all-steps")


def lowest_loss(run: Path) -> float:
    """The validation loss of the model that a run has kept."""
    return min(line["loss"] for _, line in read_jsonl(run / "metrics.jsonl") if line["split"] == "validation")


def first_share(source: Path, target: Path, size: int) -> None:
    """The first 1/size of a file's lines."""
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    with writing(target) as file:
        file.writelines(lines[:len(lines) // size])
    if own_prompt(source).exists():
        shutil.copy(own_prompt(source), own_prompt(target))


def search(config: Config, grid: list[dict], kind: str, settings, judge, measure: str, best_of=min) -> tuple[str, ...]:
    """The setting with the lowest (or highest) judge(setting); all of them go into `grid`, with what was measured under its name."""
    with ThreadPoolExecutor(config.jobs) as pool:
        values = list(pool.map(judge, settings))
    best = settings[values.index(best_of(values))]
    grid.extend({"kind": kind, "setting": setting, "measure": measure, "value": value, "chosen": setting == best}
                for setting, value in zip(settings, values))
    return best


def main(config: Config) -> None:
    print_config(config)
    if len(config.seeds) not in T_975:
        raise BadInput(f"--seeds: {len(config.seeds)} of them; an interval over seeds needs {min(T_975)} to {max(T_975)}")
    first, grid, chosen, settings = Chain(config, config.seeds[0]), [], {}, list(itertools.product(LEARNING_RATES, EPOCHS))
    first.prepare()
    for kind in ("direct", "sft"):
        chosen[kind] = search(config, grid, kind, settings, lambda setting: lowest_loss(first.train(kind, 1, *setting)), "validation loss")
    every_seed(config, lambda chain: chain.run(chosen))
    sft = first.train("sft", 1, *chosen["sft"])
    first.validation_solutions()
    chosen["dpo"] = search(config, grid, "dpo", DPO_SETTINGS, lambda setting: first.validation_f1(first.train_dpo(sft, *setting)),
                           "validation F1", max)
    print_grid(grid)
    every_seed(config, lambda chain: chain.run_dpo(chosen))
    scores = {seed: read_scores(Path(config.out) / f"seed-{seed}", chosen) for seed in config.seeds}
    result = {"chosen": chosen, "grid": grid, "claims": [claim(scores, *c) for c in CLAIMS], "models": model_rows(scores),
              "sizes": size_rows(config, scores), "k": k_rows(scores)}
    write_json(Path(config.out) / "claims.json", result)
    text = tables(config, result)
    print(text)
    draw(config, result)
    if config.readme:
        write_between("<!-- claims -->", "<!-- end of claims -->", text)


def every_seed(config: Config, work) -> None:
    with ThreadPoolExecutor(config.jobs) as pool:
        list(pool.map(lambda seed: work(Chain(config, seed)), config.seeds))


# ---------------------------------------------------------------------------------------------- numbers

NAMES = {"base": "base", "direct.1": "direct PRM", "sft.1": "R-PRM SFT", "dpo": "R-PRM DPO"}
# title, (model, K), minus (model, K), wanted difference in F1 (the paper's); each model is read at the K named
CLAIMS = (
    ("reasoning before the verdict: R-PRM SFT - direct PRM", ("sft.1", 8), ("direct.1", 1), 8.7),
    ("the same without averaging, K=1", ("sft.1", 1), ("direct.1", 1), None),
    ("preference optimisation: R-PRM DPO - R-PRM SFT", ("dpo", 8), ("sft.1", 8), 5.2),
    ("the same, K=1", ("dpo", 1), ("sft.1", 1), None),
    ("averaging: R-PRM DPO, K=8 - K=1", ("dpo", 8), ("dpo", 1), 8.4),
    ("averaging: R-PRM SFT, K=8 - K=1", ("sft.1", 8), ("sft.1", 1), 8.4),
    ("R-PRM SFT - base", ("sft.1", 8), ("base", 8), None))


def read_scores(folder: Path, chosen: dict) -> dict[str, list[dict]]:
    files = {name: name for name in ("base", *(f"{kind}.{size}" for kind in ("direct", "sft") for size in SIZES))}
    files["dpo"] = Chain.dpo_name(*chosen["dpo"])
    return {name: [line for _, line in read_jsonl(folder / f"scores.{file}.jsonl")] for name, file in files.items()}


def interval(values) -> dict:
    """Mean over seeds and its 95% interval (Student's t)."""
    values = np.array(values, dtype=float)
    half = T_975[len(values)] * values.std(ddof=1) / np.sqrt(len(values))
    return {"mean": float(values.mean()), "low": float(values.mean() - half), "high": float(values.mean() + half), "seeds": values.tolist()}


def claim(scores: dict[int, dict], title: str, better: tuple[str, int], worse: tuple[str, int], wanted: float | None) -> dict:
    """The difference in F1 over seeds, and for each seed the 95% interval of a bootstrap over its solutions, paired."""
    differences, bootstraps = [], []
    for seed, models in scores.items():
        labels = np.array([line["label"] for line in models["base"]])
        first, second = (predictions(step_rewards(models[name], k)) for name, k in (better, worse))
        rng = np.random.default_rng(seed)
        draws = [rng.integers(len(labels), size=len(labels)) for _ in range(BOOTSTRAPS)]
        drawn = [f1_of(first[d], labels[d]) - f1_of(second[d], labels[d]) for d in draws]
        differences.append(f1_of(first, labels) - f1_of(second, labels))
        bootstraps.append(np.percentile(drawn, [2.5, 97.5]).tolist())
    return {"claim": title, "wanted": wanted} | interval(differences) | {"bootstrap_per_seed": bootstraps}


def over_seeds(scores: dict[int, dict], name: str, k: int, measures: tuple[str, ...]) -> dict:
    rows = [measure(name, models[name], k) for models in scores.values()]
    return {"model": name, "k": k} | {m: interval([row[m] for row in rows]) for m in measures}


MEASURES = ("error_accuracy", "correct_accuracy", "f1", "auroc", "brier", "unparsed", "tokens_per_step")


def model_rows(scores: dict[int, dict]) -> list[dict]:
    """The models of the table, trained on all cases."""
    return [over_seeds(scores, name, k, MEASURES) for name in NAMES for k in ((1,) if name == "direct.1" else (1, 3, 7, 8))]


def k_rows(scores: dict[int, dict]) -> list[dict]:
    return [over_seeds(scores, name, k, ("f1", "tokens_per_step")) for name in ("base", "sft.1", "dpo") for k in KS]


def size_rows(config: Config, scores: dict[int, dict]) -> list[dict]:
    """F1 of both kinds against the number of cases they were trained on (their mean over seeds)."""
    counts = [sum(1 for _ in read_jsonl(Path(config.out) / f"seed-{seed}" / "cases.jsonl")) for seed in scores]
    return [over_seeds(scores, f"{kind}.{size}", k, ("f1",)) | {"cases": round(np.mean(counts) / size)}
            for kind, k in (("direct", 1), ("sft", 8)) for size in SIZES]


# ---------------------------------------------------------------------------------------------- tables and the plot

def shown(value: dict, digits: int = 1) -> str:
    return f"{value['mean']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def print_grid(grid: list[dict]) -> None:
    for row in grid:
        print(f"grid: {row['kind']:<7} {setting_words(row):<22} {row['measure']} {row['value']:.4f}" + "  <- chosen" * row["chosen"])


def setting_words(row: dict) -> str:
    return "lr {}, {} {}".format(row["setting"][0], "NLL weight" if row["kind"] == "dpo" else "epochs", row["setting"][1])


def tables(config: Config, result: dict) -> str:
    """What goes into the README, in Markdown."""
    lines = [f"{len(config.seeds)} seeds, {config.test} test solutions each; differences in F1, mean and 95% interval over the seeds.", "",
             "| claim | wanted | found | in each seed |", "|---|---|---|---|"]
    for c in result["claims"]:
        wanted = "" if c["wanted"] is None else f"+{c['wanted']}"
        lines.append(f"| {c['claim']} | {wanted} | {shown(c)} | {', '.join(f'{d:+.1f}' for d in c['seeds'])} |")
    lines += ["", "| model | K | error accuracy | correct accuracy | F1 | AUROC | Brier | unparsed % | tokens per step |", "|---" * 9 + "|"]
    for r in result["models"]:
        cells = [NAMES[r["model"]], r["k"], *(shown(r[name]) for name in ("error_accuracy", "correct_accuracy", "f1")),
                 shown(r["auroc"], 3), shown(r["brier"], 3), f"{r['unparsed']['mean']:.1f}", f"{r['tokens_per_step']['mean']:.0f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    sizes = {(r["model"].split(".")[0], r["cases"]): r for r in result["sizes"]}
    counts = sorted({cases for _, cases in sizes})
    lines += ["", "| F1 by number of cases | " + " | ".join(map(str, counts)) + " |", "|---" * (len(counts) + 1) + "|"]
    for kind, title in (("direct", "direct PRM"), ("sft", "R-PRM SFT, K=8")):
        lines.append(f"| {title} | " + " | ".join(shown(sizes[kind, n]["f1"]) for n in counts) + " |")
    lines += ["", "The grid, on the first seed (losses of different kinds are of different text and not comparable):", "",
              "| kind | setting | measure | value |", "|---|---|---|---|"]
    for row in result["grid"]:
        mark = "**" if row["chosen"] else ""
        value = f"{row['value']:.1f}" if row["measure"].endswith("F1") else f"{row['value']:.4f}"
        name = NAMES[row["kind"] if row["kind"] == "dpo" else f"{row['kind']}.1"]
        lines.append(f"| {name} | {setting_words(row)} | {row['measure']} | {mark}{value}{mark} |")
    return "\n".join(lines)


def draw(config: Config, result: dict) -> None:
    """F1 against the generated tokens at odd K (an even K can tie, just below 0.5), and against the number of training cases."""
    plt = import_pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True)

    def curve(axis, x, rows, label):
        f1 = [row["f1"] for row in rows]
        spread = [[f["mean"] - f["low"] for f in f1], [f["high"] - f["mean"] for f in f1]]
        axis.errorbar(x, [f["mean"] for f in f1], spread, marker="o", markersize=3, capsize=2, label=label)
    for name in ("base", "sft.1", "dpo"):
        rows = [row for row in result["k"] if row["model"] == name and row["k"] % 2]
        ks = ", ".join(str(row["k"]) for row in rows)
        curve(left, [row["tokens_per_step"]["mean"] for row in rows], rows, f"{NAMES[name]}, K = {ks}")
    direct = next(row for row in result["models"] if row["model"] == "direct.1")
    left.axhline(direct["f1"]["mean"], color="grey", linestyle="--", label="direct PRM (no tokens)")
    left.axhspan(direct["f1"]["low"], direct["f1"]["high"], color="grey", alpha=0.15)
    for kind, label in (("direct", "direct PRM"), ("sft", "R-PRM SFT, K = 8")):
        rows = [row for row in result["sizes"] if row["model"].startswith(kind)]
        curve(right, [row["cases"] for row in rows], rows, label)
    left.set(xlabel="generated tokens per step", ylabel="F1 (%)", title="What reasoning costs")
    right.set(xlabel="labelled cases (log scale)", xscale="log", title="What data brings")
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    figure.suptitle(f"Mean over {len(config.seeds)} seeds, bars: 95% interval")
    figure.tight_layout()
    figure.savefig(Path(config.out) / "claims.png", dpi=130)
    print("plot:", Path(config.out) / "claims.png")


def write_between(begin: str, end: str, text: str) -> None:
    """Put the tables between two markers of README.md beside this file."""
    page = (HERE / "README.md").read_text(encoding="utf-8")
    if begin not in page or end not in page:
        raise BadInput(f"{HERE / 'README.md'}: has no markers {begin} and {end}; give --no-readme or put them back")
    with writing(HERE / "README.md") as file:
        file.write(f"{page.split(begin)[0]}{begin}\n{text}\n{end}{page.split(end)[1]}")


if __name__ == "__main__":
    run((Config, main))
