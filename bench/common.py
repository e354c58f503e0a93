"""What the benchmarks share: both sides in turn in processes of their own, the cases, the rooflines, the table.

A script started with --side NAME does that side's work in its own process and prints what it measured as one line of
JSON, the last of its output. Started without, it runs its sides one after the other, --repeats times round, and
prints the medians.
"""
import dataclasses
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Annotated, Callable

import numpy as np
import torch
from torch import nn

from checkpoint import PROMPT_FILE, ChatTokenizer, load_tokenizer
from plumbing.cli import print_config
from plumbing.errors import BadInput
from fast.kernels import linear
from model import Decoder
from formats.readers import read_labelled_steps
from rprm import Case, load_prompt

ROOT = Path(__file__).resolve().parent.parent
MET = {True: "yes", False: "NO", None: "–"}  # what the table says of a goal


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """The flags of every benchmark."""
    model: Annotated[str, "checkpoint: a Hugging Face folder"] = "models/smollm2"
    data: Annotated[str, "solutions in ProcessBench's format"] = "models/gsm8k.json"
    threads: Annotated[int, "threads of each side; 0 = all cores", (0, None)] = 0
    repeats: Annotated[int, "rounds; medians are quoted", (1, None)] = 1
    seed: Annotated[int, "chooses cases, texts and draws"] = 0
    side: Annotated[str | None, "do this side's work alone and print it as JSON"] = None


@dataclass(frozen=True, kw_only=True)
class PeersConfig(BenchConfig):
    """The flags of a benchmark that knows further peers."""
    peer_dtypes: Annotated[tuple[str, ...], "dtypes that the peers try", ("float32", "bfloat16")] = ("float32", "bfloat16")
    peers: Annotated[tuple[str, ...], "peers besides Transformers, where they are installed", ("vllm", "llama.cpp")] = ()
    vllm: Annotated[str, "the Python of an environment with vLLM"] = ".venv-vllm/bin/python"
    vllm_compiled: Annotated[bool, "vLLM with torch.compile"] = False
    slots: Annotated[int, "sequences that llama.cpp takes side by side", (1, 256)] = 40
    slot_context: Annotated[int, "tokens of each of them", (1, None)] = 1280


@dataclass
class Row:
    """A line of the table."""
    work: str
    unit: str
    ours: float
    wanted: str
    met: bool | None                      # None: nothing was wanted
    plain: float | None = None            # ours with --plain, the code as it reads
    peer: float | None = None
    ratio: float | None = None
    roofline: float | None = None         # share of what the hardware could do, measured in the same run
    memory: float | None = None           # peak, MB
    peer_memory: float | None = None
    note: str = ""
    raw: dict = field(default_factory=dict)  # every run of every side


# ---------------------------------------------------------------------------------------------- sides

def in_turn(script: str, sides: dict[str, BenchConfig], repeats: int) -> dict[str, list[dict]]:
    """Each side in a process of its own, one after the other, `repeats` times round -> what each reported."""
    found = {name: [] for name in sides}
    for _ in range(repeats):
        for name, config in sides.items():
            start = time.perf_counter()
            found[name].append(run_side(script, config))
            print(f"  {name}: {found[name][-1]['seconds']:.1f} s of work, {time.perf_counter() - start:.0f} s in all", flush=True)
    return found


def run_side(script: str, config: BenchConfig) -> dict:
    for path in (config.model, config.data):
        if path and not Path(path).exists():
            raise BadInput(f"{path}: not found; give --model FOLDER and --data FILE (bench/README.md)")
    threads = str(config.threads or len(os.sched_getaffinity(0)))
    env = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false",
                        "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    python = config.vllm if config.side == "vllm" else sys.executable
    done = subprocess.run([python, script, *command_line(config)], env=env, capture_output=True, text=True)
    if done.returncode:
        raise BadInput(f"side '{config.side}' ended with code {done.returncode}: {(done.stderr or done.stdout).strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def command_line(config: BenchConfig) -> list[str]:
    """The flags that make this config again."""
    line = []
    for name, value in dataclasses.asdict(config).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            line.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, (tuple, list)):
            if value:  # a flag without a value is refused; without the flag it is the default, ()
                line += [f"--{flag}", *map(str, value)]
        elif value is not None:
            line += [f"--{flag}", str(value)]
    return line


def report(result: dict) -> None:
    """A side's last word. A "peak_mb" that it has taken itself stands (the roofline's tensors come after it)."""
    print(json.dumps({"peak_mb": peak_mb()} | result))


def further_peers(config: PeersConfig) -> dict[str, PeersConfig]:
    """The sides of --peers that are installed: vLLM eager and compiled in each dtype, llama.cpp in fp32."""
    sides = {}
    if "vllm" in config.peers and not Path(config.vllm).exists():
        print(f"  vLLM is left out: no {config.vllm}; `make vllm` installs it")
    elif "vllm" in config.peers:
        for dtype in config.peer_dtypes:
            eager = dataclasses.replace(config, side="vllm", peer_dtypes=(dtype,))
            sides[f"vLLM, {dtype}, eager"] = eager
            sides[f"vLLM, {dtype}, compiled"] = dataclasses.replace(eager, vllm_compiled=True)
    if "llama.cpp" in config.peers and not (find_spec("xllamacpp") and find_spec("gguf")):
        print("  llama.cpp is left out: pip install xllamacpp gguf")
    elif "llama.cpp" in config.peers:
        sides["llama.cpp, float32"] = dataclasses.replace(config, side="llama")
    return sides


def rows_of_further_peers(row: Row, medians: dict[str, dict], rate: str) -> list[Row]:
    """The row with the better of vLLM's runs as its peer, and one with llama.cpp's, where there are such runs."""
    rows = []
    for peer in ("vLLM", "llama.cpp"):
        own = {name: median for name, median in medians.items() if name.startswith(peer)}
        if own:
            best = max(own, key=lambda name: own[name][rate])
            rows.append(dataclasses.replace(row, work=f"the same, the peer {best}", wanted="–", met=None, peer=own[best][rate],
                                            ratio=row.ours / own[best][rate], peer_memory=own[best]["peak_mb"], note="", raw={}))
    return rows


def peak_mb() -> float:
    """The most memory this process has held so far. Not ru_maxrss where it can be helped: a child inherits that."""
    if Path("/proc/self/status").exists():
        return peak_mb_of("self")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == "darwin" else 10)


def peak_mb_of(process: int | str) -> float:
    """The most memory that a process has held so far, on Linux."""
    status = Path(f"/proc/{process}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def median_run(runs: list[dict], key: str) -> dict:
    """The run in the middle by `key`."""
    return sorted(runs, key=lambda run: run[key])[len(runs) // 2]


class Clock:
    """with clock: ... adds up the time spent inside."""

    def __init__(self):
        self.seconds = 0.0

    def __enter__(self):
        self.start = time.perf_counter()
        return self

    def __exit__(self, *error):
        self.seconds += time.perf_counter() - self.start

    def around(self, function: Callable) -> Callable:
        def timed(*args, **kwargs):
            with self:
                return function(*args, **kwargs)
        return timed


# ---------------------------------------------------------------------------------------------- cases

def all_cases(path: str) -> list[Case]:
    """The labelled steps of a file, those of one solution side by side."""
    return [case for _, case in chain.from_iterable(found for _, found in read_labelled_steps(path, Counter()))]


def consecutive_cases(path: str, n: int) -> list[Case]:
    """The first n cases, as scoring meets them: the steps of a solution share its problem."""
    return list(islice(cycle(all_cases(path)), n))


def scattered_cases(path: str, n: int, seed: int) -> list[Case]:
    """n cases drawn at random, as a shuffled training set has them: little but the instructions is shared."""
    cases = all_cases(path)
    if len(cases) < n:
        raise BadInput(f"{path}: has {len(cases)} cases, fewer than the {n} wanted; ask for fewer or give another --data")
    return [cases[i] for i in np.random.default_rng(seed).permutation(len(cases))[:n]]


def load_words(config: BenchConfig):
    """(tokenizer, prompt) of the checkpoint; the prompt is the one that travels with it, else the project's own."""
    return load_tokenizer(config.model), load_prompt(None, Path(config.model) / PROMPT_FILE)


def prompt_ids(config: BenchConfig, cases: list[Case]) -> tuple[ChatTokenizer, list[list[int]]]:
    """The tokenizer, and the prompts as token ids. Both sides get these same ids."""
    tokenizer, prompt = load_words(config)
    return tokenizer, [tokenizer.chat(prompt.fill(case)) for case in cases]


# ---------------------------------------------------------------------------------------------- rooflines

def seconds_of(work: Callable, repeats: int = 5) -> float:
    """The median time of `work`, after one run to warm up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.no_grad()
def linear_rate(model: Decoder, rows: int) -> float:
    """Rows per second through the model's linear layers alone, LM head included: the tokens per second that decoding
    would reach if all else were free."""
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    weights += [model.embed.weight] if model.head is None else []
    inputs = {w.shape[1]: torch.randn(rows, w.shape[1], dtype=w.dtype) for w in weights}

    def step():
        for w in weights:
            linear(inputs[w.shape[1]], w)
    return rows / seconds_of(step)


def matmul_flops(size: int = 2048) -> float:
    """FLOP/s of one big fp32 matrix product."""
    a, b, out = (torch.randn(size, size) for _ in range(3))
    return 2 * size ** 3 / seconds_of(lambda: torch.mm(a, b, out=out))


# ---------------------------------------------------------------------------------------------- the table

def run_side_or_all(config: BenchConfig, sides: dict[str, Callable], measure: Callable) -> None:
    """The main of each benchmark: in a process of one side, do its work and report it; else measure all and print the table."""
    if config.side:
        return report(sides[config.side](config))
    print_config(config)
    print_rows(measure(config))


def print_rows(rows: list[Row]) -> None:
    """As Markdown, for bench/README.md."""
    def shown(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)
    print("\n| work | unit | ours | plain | peer | ratio | wanted | met | roofline | peak MB ours / peer |\n|---|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        print(f"| {r.work} | {r.unit} | {r.ours:.3g} | {shown(r.plain, '.3g')} | {shown(r.peer, '.3g')} | {shown(r.ratio, '.1f')} | {r.wanted} | "
              f"{MET[r.met]} | {shown(r.roofline, '.0%')} | {shown(r.memory, '.0f')} / {shown(r.peer_memory, '.0f')} |")
    for r in rows:
        if r.note:
            print(f"\n{r.work}: {r.note}")


def surroundings(threads: int) -> dict:
    """What a figure is worth nothing without."""
    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
        return done.stdout.strip()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    changes = " + changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return {"commit": (git("rev-parse", "--short", "HEAD") or "unknown") + changes,
            "machine": f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, "
                       f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2 ** 30:.0f} GB",
            "threads": threads or len(os.sched_getaffinity(0)), "load_before": os.getloadavg()[0],
            "torch": torch.__version__, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d %H:%M")}
