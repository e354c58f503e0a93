"""What rewards are for, in the small world: the threshold, calibration, the best of eight, guided search.

    python examples/arithmetic/uses.py --out runs/claims

Each seed has the R-PRM DPO model of claims.py, with the settings that claims.json says were chosen, as its judge; what
claims.py has left in --out is not run again. Writes OUT/uses.json, the plot OUT/uses.png and the tables between the
markers of examples/arithmetic/README.md.

The policy is the embedded base, which has read worked solutions. It solves 98% of the problems, which leaves nothing to
choose; so its weights get noise, a quarter of their standard deviation, and it solves less than half.

All ways of solving a problem are compared by the tokens that they take, those of the judge among them:

    greedy          the policy's most likely solution, token by token
    one sample      at temperature 0.95; the mean of eight
    majority of 8   the most frequent answer of eight samples
    best of 8       the sample whose rewards have the highest aggregate (min, mean, last or product)
    guided, N       N candidates for each next step; the one with the highest reward goes on (guided_search.py)
"""
import re
import shutil
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]  # the project's scripts, which are no package
import world  # beside this file
from claims import Chain, interval, shown, write_between
from claims import Config as ChainConfig
from formats.best_of_n import AGGREGATES, aggregate
from formats.plots import import_pyplot
from guided_search import Partial, Policy, search
from plumbing.cli import print_config, run
from plumbing.files import read_json, write_json
from rprm import Case
from score import Judge

PROMPT = "Solve the problem.\n\nProblem: {problem}"  # what the base has read worked solutions after
SEPARATOR = "\n"
CANDIDATES = 8
LINE = re.compile(r"(\w+) ([+-])(\d+): .*, (\d+)\.")  # of a worked solution: "Tom +15: 7+5=12, 3+1+1=5, 52."
RESULT = re.compile(r"(\d+)\.$")


@dataclass(frozen=True)
class Config:
    out: Annotated[str, "folder of claims.py's runs; what is complete in it is not run again"]
    seeds: Annotated[tuple[int, ...], "a judge and problems each"] = (0, 1, 2, 3, 4)
    jobs: Annotated[int, "seeds side by side, one thread each", (1, None)] = 2
    problems: Annotated[int, "problems to solve per seed", (2, None)] = 100
    solutions: Annotated[int, "solutions per seed by which the threshold is chosen, and as many others for which "
                              "it is reported", (10, None)] = 200
    k: Annotated[int, "analyses of a step", (1, None)] = 10
    noise: Annotated[float, "added to the policy's matrices, in their standard deviations", (0, None)] = 0.25
    guided: Annotated[tuple[int, ...], "guided search with so many candidates for a step", (1, None)] = (2, 4, 8)
    readme: Annotated[bool, "write the tables into examples/arithmetic/README.md"] = True


def main(config: Config) -> None:
    print_config(config)
    chosen = read_json(HERE / "claims.json")["chosen"]

    def of_seed(seed: int) -> dict:
        chain = Chain(ChainConfig(out=config.out), seed)
        judge = train_judge(chain, chosen)
        return {"threshold": threshold(config, chain, judge), "solving": solving(config, chain, judge)}
    with ThreadPoolExecutor(config.jobs) as pool:
        found = list(pool.map(of_seed, config.seeds))
    result = {"problems": config.problems, "solutions": config.solutions, "k": config.k, "seeds": list(config.seeds),
              "noise": config.noise, "threshold": over_seeds([one["threshold"] for one in found]),
              "solving": {way: over_seeds([one["solving"][way] for one in found]) for way in found[0]["solving"]}}
    write_json(Path(config.out) / "uses.json", result)
    text = tables(result)
    print(text)
    draw(result, Path(config.out) / "uses.png")
    if config.readme:
        write_between("<!-- uses -->", "<!-- end of uses -->", text)


def over_seeds(rows: list[dict[str, float]]) -> dict[str, dict]:
    """The mean of each figure over the seeds, with its interval."""
    return {name: interval([row[name] for row in rows]) for name in rows[0]}


def train_judge(chain: Chain, chosen: dict[str, list[str]]) -> Path:
    """The folder of the seed's R-PRM DPO model."""
    chain.prepare()
    sft = chain.train("sft", 1, *chosen["sft"])
    chain.prefer(sft)
    return chain.train_dpo(sft, *chosen["dpo"]) / "model"


# ---------------------------------------------------------------------------------------------- the threshold

def threshold(config: Config, chain: Chain, judge: Path) -> dict[str, float]:
    """The threshold chosen on some solutions, and what it and a temperature give on others."""
    folder = chain.folder / "uses"
    chain.stage("uses.world", HERE / "world.py", "--out", folder, "--seed", 3000 + chain.seed, "--train", 0,
                "--validation", config.solutions, "--test", config.solutions, "--pretrain", 0)
    scores = [chain.score(f"uses.{name}", judge, "--k", config.k, "--all-steps", data=f"uses/{name}.jsonl")
              for name in ("validation", "test")]
    out = folder / "threshold.json"
    chain.stage("uses.threshold", "score.py", "threshold", "--scores", scores[0], "--apply", scores[1], "--calibrate",
                "--no-plots", "--out", out, "--overwrite")
    found = read_json(out)
    own, other = found["choices"][0]["rows"]
    before, after = [row for row in found["calibration"]["rows"] if row["scores"] == "--apply"]
    return {
        "threshold": found["choices"][0]["threshold"]["threshold"],
        "f1_chosen_own": own["chosen"],
        "f1_usual": other["usual"],
        "f1_chosen": other["chosen"],
        "temperature": found["calibration"]["temperature"],
        "ece_before": before["ece"],
        "ece_after": after["ece"],
        "brier_before": before["brier"],
        "brier_after": after["brier"],
        "auroc": before["auroc"],
    }


# ---------------------------------------------------------------------------------------------- solving problems

class NoJudge:
    """All steps are as good: the first candidate goes on."""

    def judge(self, cases: list[Case]) -> list[float]:
        return [1.0] * len(cases)


def solving(config: Config, chain: Chain, judge_folder: Path) -> dict[str, dict[str, float]]:
    """way of solving -> the share of solved problems, in percent, and the tokens that a problem takes."""
    path = chain.folder / "uses" / "solving.json"
    if path.exists():
        return read_json(path)
    rng = np.random.default_rng([4000 + chain.seed])
    problems = [world.draw_problem(rng, 0.5) for _ in range(config.problems)]
    texts = [problem.text for problem in problems]
    answers = [problem.answer for problem in problems]
    judge = Judge(str(judge_folder), config.k, max_new_tokens=120, batch_size=64, seed=chain.seed)
    folder = write_policy(chain.folder / "uses" / "policy", config.noise, chain.seed)
    policy = Policy(str(folder), SEPARATOR, 0.95, 0.95, max_step_tokens=60)
    greedy = Policy(str(folder), SEPARATOR, 0, 0.95, max_step_tokens=60)
    ways = {}

    def add(way: str, right: list[float], tokens: int) -> None:
        ways[way] = {"solved": 100 * float(np.mean(right)), "tokens": tokens / len(problems)}

    found = search(greedy, NoJudge(), texts, PROMPT, n=1, as_step=as_step)
    add("greedy", solved(found, answers), greedy.new_tokens)

    candidates = [search(policy, NoJudge(), texts, PROMPT, n=1, seed=1000 * chain.seed + i, as_step=as_step)
                  for i in range(CANDIDATES)]
    sampled = policy.new_tokens
    right = np.array([solved(some, answers) for some in candidates])  # (candidates, problems)
    add("one sample", right.mean(axis=0), sampled / CANDIDATES)
    add(f"majority of {CANDIDATES}", majority(candidates, answers), sampled)
    flat = [(text, one.steps) for some in candidates for text, one in zip(texts, some)]
    rewards = judge.rewards_of(flat)
    judged = judge.sampler.engine.new_tokens
    for how in AGGREGATES:
        scores = np.array([aggregate(np.array(own, dtype=float), how) for own in rewards]).reshape(right.shape)
        pick = scores.argmax(axis=0)  # of equals the first
        add(f"best of {CANDIDATES}, {how}", right[pick, np.arange(len(texts))], sampled + judged)
    add(f"oracle of {CANDIDATES}", right.max(axis=0), sampled)

    for n in config.guided:
        before = policy.new_tokens + judge.sampler.engine.new_tokens
        found = search(policy, judge, texts, PROMPT, n, seed=chain.seed, as_step=as_step)
        add(f"guided, N = {n}", solved(found, answers), policy.new_tokens + judge.sampler.engine.new_tokens - before)
    write_json(path, ways)
    print(f"seed {chain.seed}: {ways}", flush=True)
    return ways


def write_policy(folder: Path, noise: float, seed: int) -> Path:
    """The base with noise on its matrices."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(HERE / "base", folder)
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if weight.dim() == 2:
            weights[name] = weight + noise * weight.std() * torch.randn(weight.shape, generator=generator)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def as_step(problem: str, previous_steps: tuple[str, ...], text: str) -> str:
    """A line of a worked solution as the judge knows steps: "Tom +15: 7+5=12, 3+1+1=5, 52." -> "After Tom: 37+15=52."."""
    line = LINE.fullmatch(text)
    if line is None:
        return text
    other, sign, amount, result = line.groups()
    last = RESULT.search(previous_steps[-1]) if previous_steps else re.search(r"has (\d+)", problem)
    return f"After {other}: {last[1] if last else '?'}{sign}{amount}={result}."


def answer_of(one: Partial) -> int | None:
    """The number with which a solution ends."""
    found = RESULT.search(one.steps[-1]) if one.is_complete and one.steps else None
    return int(found[1]) if found else None


def solved(found: list[Partial], answers: list[int]) -> list[bool]:
    return [answer_of(one) == answer for one, answer in zip(found, answers, strict=True)]


def majority(candidates: list[list[Partial]], answers: list[int]) -> list[bool]:
    """Is the most frequent answer right, of equals the first?"""
    right = []
    for some, answer in zip(zip(*candidates, strict=True), answers, strict=True):
        votes = Counter(found for one in some if (found := answer_of(one)) is not None)
        right.append(bool(votes) and votes.most_common(1)[0][0] == answer)
    return right


# ---------------------------------------------------------------------------------------------- tables and the plot

def tables(result: dict) -> str:
    """What goes into the README, in Markdown."""
    t = result["threshold"]
    lines = [
        f"{len(result['seeds'])} seeds, each with its own R-PRM DPO model; mean and 95% interval over the seeds; K = {result['k']}.",
        "",
        f"| {result['solutions']} solutions choose, {result['solutions']} others are reported | |",
        "|---|---|",
        f"| chosen threshold | {shown(t['threshold'], 2)} |",
        f"| F1 at 0.5 | {shown(t['f1_usual'])} |",
        f"| F1 at the chosen threshold | {shown(t['f1_chosen'])} (where it was chosen: {shown(t['f1_chosen_own'])}) |",
        f"| temperature | {shown(t['temperature'], 2)} |",
        f"| ECE before, after | {shown(t['ece_before'], 3)}, {shown(t['ece_after'], 3)} |",
        f"| Brier before, after | {shown(t['brier_before'], 3)}, {shown(t['brier_after'], 3)} |",
        f"| AUROC | {shown(t['auroc'], 3)} |",
        "",
        f"| {result['problems']} problems a seed, solved by the base with noise | solved, % | tokens a problem |",
        "|---|---|---|",
    ]
    lines += [f"| {way} | {shown(row['solved'])} | {row['tokens']['mean']:,.0f} |" for way, row in result["solving"].items()]
    lines += ["", "| differences, on the same problems | solved, % |", "|---|---|"]
    lines += [f"| {title} | {shown(difference)} |" for title, difference in differences(result["solving"]).items()]
    return "\n".join(lines)


def differences(solving: dict[str, dict]) -> dict[str, dict]:
    """The ways beside each other, seed by seed, as the seeds' policies differ."""
    most = [way for way in solving if way.startswith("guided")][-1]
    pairs = [(most, "greedy"), (most, f"best of {CANDIDATES}, min"), (f"best of {CANDIDATES}, min", f"majority of {CANDIDATES}"),
             (f"best of {CANDIDATES}, min", f"best of {CANDIDATES}, last")]
    found = {}
    for better, worse in pairs:
        values = np.array(solving[better]["solved"]["seeds"]) - np.array(solving[worse]["solved"]["seeds"])
        found[f"{better} - {worse}"] = interval(values)
    return found


def draw(result: dict, path: Path) -> None:
    """The share of solved problems against tokens."""
    plt = import_pyplot()
    figure, axis = plt.subplots(figsize=(7, 4))
    for way, row in result["solving"].items():
        mean = row["solved"]["mean"]
        spread = [[mean - row["solved"]["low"]], [row["solved"]["high"] - mean]]
        axis.errorbar(row["tokens"]["mean"], mean, spread, marker="o", markersize=4, capsize=2, label=way)
    axis.set(xscale="log", xlabel="tokens a problem, the judge's among them (log scale)", ylabel="solved (%)",
             title=f"Solving with a judge, mean over {len(result['seeds'])} seeds, bars: 95% interval")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.savefig(path, dpi=130, bbox_inches="tight")
    print("plot:", path)


if __name__ == "__main__":
    run((Config, main))
