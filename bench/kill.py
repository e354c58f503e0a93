"""Is anything lost by a kill? Each stage is killed at random moments, resumed, and compared with a run that was not.

    python bench/kill.py                            # 20 kills of each stage, a quarter of an hour
    python bench/kill.py --only sample --kills 3

Small runs of the embedded model (examples/arithmetic/base), one process each, on the CPU: `data.py sample`, train_sft.py,
train_dpo.py (its reference pass included) and score.py. A kill is SIGKILL at a moment drawn over the whole of the run, start-up
included; every second run is killed again while it goes on. Then the same command with --resume must end with the same
files, byte for byte (weights, metrics, samples, scores, tables; of a checkpoint's headers, whose order DCP leaves open, the
content). A file that differs is named, and the exit code is 2.
"""
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's modules; this folder is `bench`
from bench.common import ROOT
from plumbing.cli import print_config, run
from plumbing.errors import BadInput

BASE = ROOT / "examples/arithmetic/base"
STAGES = ("sample", "train_sft", "train_dpo", "score")


@dataclass(frozen=True)
class Config:
    kills: Annotated[int, "killed runs of each stage", (1, None)] = 20
    only: Annotated[tuple[str, ...], "some of the stages", STAGES] = STAGES
    threads: Annotated[int, "threads of each run", (1, None)] = 1
    seed: Annotated[int, "draws the moments"] = 0


def main(config: Config) -> None:
    print_config(config)
    rng, differing = random.Random(config.seed), []
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder)
        make_world(world, config)
        print(f"{'stage':<10}{'whole run':>11}{'runs':>6}{'kills':>7}{'differing':>11}")
        for stage in config.only:
            line = command(stage, world)
            seconds = finish(line, config)
            expected, kills, lost = results(world), 0, []
            for i in range(config.kills):
                clear(world)
                while not kill_after(rng.uniform(0, seconds), line, config):
                    clear(world)  # it was done before that moment
                again = bool(i % 2) and kill_after(rng.uniform(0, seconds), [*line, "--resume"], config)
                kills += 1 + again
                if again or i % 2 == 0:
                    finish([*line, "--resume"], config)
                found = results(world)
                names = sorted(expected.keys() | found.keys())
                lost += [f"{stage}, run {i + 1}: {name}" for name in names if expected.get(name) != found.get(name)]
            clear(world)
            print(f"{stage:<10}{seconds:>9.1f} s{config.kills:>6}{kills:>7}{len(lost):>11}", flush=True)
            differing += lost
    if differing:
        raise BadInput(f"files that differ after a kill: {'; '.join(differing[:20])}")
    print("nothing differed")


def results(world: Path) -> dict[str, Any]:
    """What a stage has written, by name: its folder, and DPO's reference beside the pairs."""
    paths = [*(world / "out").rglob("*"), *world.glob("*.reference-*")]
    found = {str(path.relative_to(world)): content(path) for path in paths if path.is_file()}
    if "out/config.json" in found:  # says whether the run was first given --resume
        found["out/config.json"] = found["out/config.json"].replace(b'"resume": true', b'"resume": false')
    return found


def content(path: Path) -> Any:
    """A file's bytes. DCP's safetensors files have several metadata in the header, whose order differs from process to process."""
    raw = path.read_bytes()
    if not path.name.startswith("shard-"):
        return raw
    size = int.from_bytes(raw[:8], "little")  # safetensors: the header's length, the header, the tensors
    return json.loads(raw[8:8 + size]), raw[8 + size:]


def clear(world: Path) -> None:
    shutil.rmtree(world / "out", ignore_errors=True)
    for path in world.glob("*.reference-*"):
        path.unlink()


# ---------------------------------------------------------------------------------------------- the stages

def make_world(world: Path, config: Config) -> None:
    """Solutions, cases, SFT examples and pairs for the four stages."""
    finish(["examples/arithmetic/world.py", "--out", str(world / "world"), "--train", "150", "--validation", "0", "--test", "60",
            "--pretrain", "0"], config)
    finish(["data.py", "cases", "--input", str(world / "world/train.jsonl"), "--out", str(world / "cases.jsonl")], config)
    finish(["data.py", "sample", "--model", str(BASE), "--cases", str(world / "cases.jsonl"), "--n", "4", "--max-new-tokens", "120",
            "--batch-size", "64", "--out", str(world / "samples.jsonl")], config)
    for kind in ("sft", "pairs"):
        finish(["data.py", kind, "--samples", str(world / "samples.jsonl"), "--out", str(world / f"{kind}.jsonl"),
                "--validation", "0.2"], config)


def command(stage: str, world: Path) -> list[str]:
    """A stage's command line; its output goes into the folder `out`."""
    out = world / "out"
    sampling = ["--model", str(BASE), "--device", "cpu", "--max-new-tokens", "120", "--batch-size", "4"]
    training = ["--model", str(BASE), "--device", "cpu", "--micro-tokens", "2048", "--batch-size", "16", "--save-every", "3",
                "--eval-every", "4", "--out", str(out)]
    return {
        "sample": ["data.py", "sample", *sampling, "--cases", str(world / "cases.jsonl"), "--n", "2", "--limit", "80",
                   "--out", str(out / "samples.jsonl")],
        "score": ["score.py", *sampling, "--input", str(world / "world/test.jsonl"), "--k", "1", "2", "--limit", "40",
                  "--out", str(out / "scores.jsonl")],
        "train_sft": ["train_sft.py", *training, "--lr", "3e-4", "--max-steps", "12",
                      "--train", str(world / "sft.jsonl"), "--validation", str(world / "sft.validation.jsonl")],
        "train_dpo": ["train_dpo.py", *training, "--lr", "2e-5", "--max-steps", "10",
                      "--train", str(world / "pairs.jsonl"), "--validation", str(world / "pairs.validation.jsonl")],
    }[stage]


def start(line: list[str], config: Config) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": str(config.threads), "MKL_NUM_THREADS": str(config.threads)}
    return subprocess.Popen([sys.executable, *line], cwd=ROOT, env=environment, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(line: list[str], config: Config) -> float:
    """Run to the end -> seconds."""
    begin, process = time.perf_counter(), start(line, config)
    _, errors = process.communicate()
    if process.returncode:
        raise BadInput(f"{' '.join(line)}: ended with code {process.returncode}: {errors.strip()[-1000:]}")
    return time.perf_counter() - begin


def kill_after(seconds: float, line: list[str], config: Config) -> bool:
    """Start, kill after so many seconds -> whether it was still running."""
    process = start(line, config)
    try:
        process.communicate(timeout=seconds)
        return False
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return True


if __name__ == "__main__":
    run((Config, main))
