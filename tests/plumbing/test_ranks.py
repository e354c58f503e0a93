"""Two ranks on the CPU against one: training curves, resuming, merged samples and scores, lost ranks.

Starting ranks is slow, so one torchrun (`ran`) does most of the jobs, each script's main in turn. This file
is its program, too.
"""
import dataclasses
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from test_training import files_of, metrics, own_signals, pair_rows, sft_rows, write  # noqa: F401, a fixture

import data
import fast
import plumbing.rounds
import plumbing.run as training
import score
import train_dpo
import train_sft
from checkpoint import load_config, load_model, load_tokenizer
from conftest import HANG, start, wait_for_lines
from data import MicroBatch, deal, pack
from formats.examples import Examples
from formats.turns import read_example, read_pair
from model import Tree
from plumbing import ranks
from plumbing.cli import run
from plumbing.errors import BadInput, Stopped
from plumbing.journal import Journal
from plumbing.memory import memory
from rprm import response_logprobs

JOBS = {"sft": (train_sft.Config, train_sft.main), "dpo": (train_dpo.Config, train_dpo.main),
        "lora": (train_sft.Config, train_sft.main),
        "sample": (data.SampleConfig, data.sample), "score": (score.JudgeConfig, score.judge)}
MANY = 10 ** 6  # items, more than any test writes lines
STOP = 4  # a run that is stopped has done so many of its 9 steps
# without the last --, torchrun takes --n for a flag of its own
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--")


# ------------------------------------------------------------------------------------------ what the ranks do

def do(name: str, settings: dict, stop_rank: int | None = None) -> None:
    """A script's main. With stop_rank that rank, and no other, gets SIGTERM in its step STOP."""
    config, main = JOBS[name]
    check = training.Run.check_finite

    def stop_soon(run, *given):
        if run.step == STOP - 1 and ranks.rank() == stop_rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return check(run, *given)
    training.Run.check_finite = stop_soon
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    try:
        main(config(**settings))
    except Stopped as stopped:
        assert stop_rank is not None and f"SIGTERM after step {STOP}" in str(stopped)
    finally:
        training.Run.check_finite = check


def measure(path: Path, settings: dict) -> None:
    """Bytes of weights, gradients and moments on this rank after a run of one step, into path.RANK."""
    held, check, log = {}, training.Run.check_finite, training.Run.log

    def before_the_update(run, *given):
        held["gradients"] = [ranks.own_rows(p.grad)[0].nbytes for p in run.model.parameters()]
        check(run, *given)

    def after_the_update(run, split, *given, **named):
        if split == "train":  # a validation, which has no backward pass, leaves the embedding whole
            held["weights"] = [ranks.own_rows(p)[0].nbytes for p in run.model.parameters()]
            held["moments"] = [ranks.own_rows(state[key])[0].nbytes for state in run.optimizer.state.values()
                               for key in ("exp_avg", "exp_avg_sq")]
        log(run, split, *given, **named)
    training.Run.check_finite, training.Run.log = before_the_update, after_the_update
    do("sft", settings | {"max_steps": 1})
    training.Run.check_finite, training.Run.log = check, log
    Path(f"{path}.{ranks.rank()}").write_text(json.dumps({name: sum(sizes) for name, sizes in held.items()}))


# ---------------------------------------------------------------------------------------------- the runs

def settings(folder: Path, make_folder) -> dict[str, dict]:
    """The jobs' settings, over files in `folder`.

    SFT has an untied Llama, with checkpointed activations, and DPO a tied Qwen2. LoRA is SFT of it with
    adapters, whose stacked A have an odd number of rows.
    """
    rng = random.Random(3)

    def words(n: int) -> str:
        return " ".join(rng.choice(["apples", "pens", "boxes", "half", "sum"]) for _ in range(n))

    shared = dict(lr=3e-3, batch_size=8, micro_tokens=100, eval_every=3, save_every=2, epochs=3, device="cpu")
    (folder / "prompt.txt").write_text("{problem}\n{previous_steps}\n{now_step}")
    sampler = dict(model=str(make_folder("qwen2", True)), prompt_file=str(folder / "prompt.txt"),
                   max_new_tokens=12, batch_size=2, device="cpu")
    cases = [{"id": str(i), "problem": words(4), "previous_steps": [], "now_step": words(3),
              "label": bool(i % 2)} for i in range(7)]
    solutions = [{"id": str(i), "problem": words(4), "steps": [words(2), words(3)],
                  "label": i % 3 - 1} for i in range(7)]
    return {
        "sft": shared | dict(model=str(make_folder("llama", False)), micro_tokens=80,
                             checkpoint_activations=True,
                             train=write(folder / "sft.jsonl", sft_rows(22)),
                             validation=write(folder / "sft_held_out.jsonl", sft_rows(5, seed=1))),
        "dpo": shared | dict(model=str(make_folder("qwen2", True)), nll=0.1,
                             train=write(folder / "pairs.jsonl", pair_rows(22)),
                             validation=write(folder / "held_out.jsonl", pair_rows(5, seed=1))),
        "lora": shared | dict(model=str(make_folder("qwen2", True)), micro_tokens=80, lr=2e-2, lora_rank=3,
                              merge=True,
                              train=write(folder / "lora.jsonl", sft_rows(22)),
                              validation=write(folder / "lora_held_out.jsonl", sft_rows(5, seed=1))),
        "sample": sampler | dict(cases=write(folder / "cases.jsonl", cases), n=2),
        "score": sampler | dict(input=[write(folder / "solutions.jsonl", solutions)], k=[1, 3]),
    }


def part_done(whole: Path, out: Path, job: dict, lines: list[int]) -> None:
    """Leave what ranks that were killed after so many lines each leave, the last line torn."""
    every = whole.read_text().splitlines(keepends=True)
    for rank, n in enumerate(lines):
        own = every[rank::len(lines)]
        Path(f"{out}.{rank + 1}-of-{len(lines)}.part").write_text("".join(own[:n]) + own[n][:9])
    config = Path(f"{whole}.config.json").read_text()
    Path(f"{out}.config.json").write_text(config.replace(str(whole), str(out)))


@pytest.fixture(scope="module")
def ran(tmp_path_factory, make_folder):
    """A folder with one/NAME and two/NAME, the outputs of one rank and of two, and with more:

    one_to_two, two_to_one: of runs that went on with the other number of ranks, one_to_two_8bit with moments
    of 8 bits. held.RANK: see `measure`.
    """
    folder = tmp_path_factory.mktemp("ranks")
    for name in ("one", "two"):
        (folder / name).mkdir()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    jobs = {}
    for name in JOBS:
        jobs[name] = []
        for number in ("one", "two"):
            job = settings(folder / number, make_folder)[name]
            jobs[name].append(job | {"out": str(folder / number / f"{name}.out")})
    for name, (one, _) in jobs.items():
        do(name, one)

    def sft_to(name: str) -> dict:
        return jobs["sft"][1] | {"out": str(folder / name), "adamw_8bit": name.endswith("8bit")}
    do("sft", sft_to("one_8bit"))
    for name in ("one_to_two", "one_to_two_8bit"):
        do("sft", sft_to(name), stop_rank=0)
    plan = [(name, two) for name, (_, two) in jobs.items()]
    plan += [("sft", sft_to(name) | {"resume": True}) for name in ("one_to_two", "one_to_two_8bit")]
    plan.append(("sft", sft_to("two_to_one"), 1))
    for name in ("sample", "score"):
        out = folder / f"two/{name}.resumed.out"
        part_done(folder / f"one/{name}.out", out, jobs[name][1], [1, 2])
        config = Path(f"{out}.config.json")
        config.write_text(config.read_text().replace(str(folder / "one"), str(folder / "two")))
        plan.append((name, jobs[name][1] | {"out": str(out), "resume": True}))
    to_measure = [str(folder / "held"), sft_to("measured")]
    (folder / "plan.json").write_text(json.dumps({"plan": plan, "measure": to_measure}))
    process = start((*TORCHRUN, __file__, folder / "plan.json"))
    _, errors = process.communicate(timeout=HANG)
    assert process.returncode == 0, errors
    do("sft", sft_to("two_to_one") | {"resume": True})
    for number, handler in before.items():
        signal.signal(number, handler)
    return folder, jobs


def near(one: dict, two: dict) -> bool:
    def is_near(a, b) -> bool:
        return a == b or b == pytest.approx(a, rel=1e-5, abs=1e-5)
    return one.keys() == two.keys() and all(is_near(one[key], two[key]) for key in one)


def test_moments_of_8_bits_go_on_with_another_number_of_ranks(ran):
    """A code may fall on its neighbour where the ranks' sums differ in their last digits; no more differs."""
    folder, _ = ran
    whole, resumed = log(folder / "one_8bit"), log(folder / "one_to_two_8bit")
    assert [row["loss"] for row in resumed] == pytest.approx([row["loss"] for row in whole], abs=1e-3)
    assert log(folder / "one/sft.out") != whole
    [kept] = (folder / "one_to_two_8bit/checkpoints").iterdir()
    tensors = {}
    for file in kept.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    assert tensors["layers.0.mlp.down.weight.exp_avg.codes"] == "U8"
    assert tensors["layers.0.mlp.down.weight.exp_avg.scale"] == "F32"


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------- training

@pytest.mark.parametrize("name, read", [("sft", read_example), ("dpo", read_pair), ("lora", read_example)])
def test_two_ranks_give_the_curve_of_one(ran, name, read):
    """Every logged number, validations too. Some steps have an odd number of trees."""
    folder, jobs = ran
    one, two = log(folder / f"one/{name}.out"), log(folder / f"two/{name}.out")
    assert len(one) == len(two) == 12 and [row["split"] for row in two].count("validation") == 3
    assert [rows for rows in zip(one, two, strict=True) if not near(*rows)] == []
    assert one[0]["loss"] - one[-1]["loss"] > 0.1
    job = jobs[name][1]
    examples = Examples(job["train"], read, load_tokenizer(job["model"]), job["micro_tokens"], context=4096)
    steps, numbers = training.epoch_batches(examples.kept, job["batch_size"], job["epochs"], max_steps=None,
                                            seed=0)
    trees = [len(pack(examples.units(numbers(step)), job["micro_tokens"])) for step in range(steps)]
    assert {n % 2 for n in trees} == {0, 1} and max(trees) > 2
    files = (folder / f"two/{name}.out/checkpoints").rglob("*.safetensors")
    assert {path.name[:11] for path in files} == {"shard-00001", "shard-00002"}


@pytest.mark.parametrize("name", ["sft", "dpo", "lora"])
def test_the_model_of_two_ranks_is_that_of_one_and_opens_in_transformers(ran, name):
    from transformers import AutoModelForCausalLM
    folder, _ = ran
    models = [folder / number / f"{name}.out/model" for number in ("one", "two")]
    one, two = (AutoModelForCausalLM.from_pretrained(model).state_dict() for model in models)
    assert one.keys() == two.keys() and all(torch.allclose(one[key], two[key], atol=1e-4) for key in one)
    one, two = map(files_of, models)
    assert one.keys() == two.keys() and {key for key in one if one[key] != two[key]} <= {"model.safetensors"}


def test_the_adapter_of_two_ranks_is_that_of_one(ran):
    folder, _ = ran
    one, two = (load_file(folder / number / "lora.out/adapter/adapter_model.safetensors") for number in ("one", "two"))
    assert one.keys() == two.keys() and len(one) == 28
    assert all(tensor.any() for tensor in one.values())
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)


@pytest.mark.parametrize("name", ["one_to_two", "two_to_one"])
def test_a_run_goes_on_with_another_number_of_ranks(ran, name):
    """Stopped by SIGTERM in step 4 (of two ranks the second alone was asked), resumed by the other number."""
    folder, _ = ran
    whole, resumed = log(folder / "one/sft.out"), log(folder / name)
    assert len(whole) == len(resumed) and all(near(*rows) for rows in zip(whole, resumed, strict=True))
    [kept] = (folder / name / "checkpoints").iterdir()
    assert kept.name == "step-00000009"
    assert len(list(kept.glob("shard-*"))) == (2 if name == "one_to_two" else 1)


def test_the_reference_of_two_ranks_is_that_of_one(ran):
    folder, _ = ran
    [one], [two] = (list((folder / number).glob("pairs.reference-*.npy")) for number in ("one", "two"))
    assert one.name == two.name
    assert np.allclose(np.load(one), np.load(two), atol=1e-4) and np.isfinite(np.load(two)).all()


def test_the_memory_table_counts_what_a_rank_holds(ran, make_folder):
    """Weights, gradients and moments to the byte on the rank with the most rows; no rank holds more."""
    folder, jobs = ran
    table = memory(load_config(jobs["sft"][1]["model"]), 8192, False, "cpu", n_ranks=2)
    held = [json.loads(Path(f"{folder / 'held'}.{rank}").read_text()) for rank in range(2)]
    for name, row in (("weights", "weights, fp32"), ("gradients", "gradients, fp32"),
                      ("moments", "both moments, fp32")):
        assert held[0][name] == table[row] and held[1][name] <= table[row]
    alone = memory(load_config(jobs["sft"][1]["model"]), 8192, False, "cpu", n_ranks=1)
    assert sum(one["weights"] for one in held) == alone["weights, fp32"]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_memory_table_estimates_the_activations(make_folder, monkeypatch, checkpointed):
    """Against the storages that autograd holds after a forward pass.

    Activations checkpointed, these are the inputs of the layers and of the last norm.
    """
    monkeypatch.setattr("fast.kernels.ONEDNN_SIZE", 0)  # as for a large model, which memory is a question for
    model = fast.speed_up(load_model(make_folder("qwen2", False)))
    seen = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage  # held, so that no address comes twice
        return tensor
    model.checkpoint_activations = checkpointed
    tree = Tree([list(range(2, 203)), list(range(1, 200))])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tree.ids, tree.positions, model.tree_attention(tree.end)).sum()
    held = sum(storage.nbytes() for address, storage in seen.items() if address not in parameters)
    estimates = [memory(model.config, 400, flag, "cpu", n_ranks=1) for flag in (False, True)]
    if checkpointed:
        inputs = estimates[1]["activations, checkpointed"]
        assert inputs < held < 2.5 * inputs
    else:
        assert estimates[0]["activations"] == pytest.approx(held, rel=0.2)


@pytest.mark.parametrize("count, trees", [(2, 5), (3, 4), (4, 1), (2, 0)])
def test_trees_are_dealt_evenly_and_each_once(monkeypatch, count, trees):
    batches = [MicroBatch(Tree([list(range(i + 2))]), [1], [i], [i + 1]) for i in range(trees)]
    monkeypatch.setattr(ranks, "count", lambda: count)
    shares = []
    for rank in range(count):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        shares.append(deal(batches))
    assert {len(own) for own in shares} == {math.ceil(trees / count)}
    assert sorted(i for own in shares for batch in own for i in batch.examples) == list(range(trees))


def test_a_tree_that_fills_up_has_no_loss_and_no_gradient(monkeypatch, tiny_folder):
    monkeypatch.setattr(ranks, "count", lambda: 2)
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    [fill], model = deal([MicroBatch(Tree([[1, 2]]), [1], [0], [1])]), load_model(tiny_folder)
    logprobs = response_logprobs(model, fill.tree, fill.starts)
    logprobs.sum().backward()
    assert not logprobs.any() and all(not p.grad.any() for p in model.parameters())  # and none is None


# --------------------------------------------------------------------------------------- sampling and scoring

def rounded(value):
    if isinstance(value, float):
        return pytest.approx(value, abs=1e-5)
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", ["sample", "score"])
@pytest.mark.parametrize("out", ["out", "resumed.out"])
def test_the_merged_file_is_that_of_one_rank(ran, name, out):
    """Seven items on two ranks. "resumed" goes on from parts of 1 and 2 lines with torn ends, in rounds of 2.

    No part is left. P(Yes) alone may differ in its last bits, by what was sampled side by side.
    """
    folder, _ = ran
    one, two = ([json.loads(line) for line in path.read_text().splitlines()]
                for path in (folder / f"one/{name}.out", folder / f"two/{name}.{out}"))
    assert len(one) == 7 and two == rounded(one)
    assert not list((folder / "two").glob("*.part"))


def test_the_table_of_two_ranks_is_over_all_solutions(ran):
    """Also where it is made of the parts that killed ranks left."""
    folder, _ = ran
    resumed = (folder / "two/score.resumed.summary.json").read_text()
    assert (folder / "two/score.summary.json").read_text() == resumed
    one, two = (json.loads((folder / number / "score.summary.json").read_text()) for number in ("one", "two"))
    assert one == two and one[0]["solutions"] == 7


@dataclasses.dataclass(frozen=True)
class Job:
    resume: bool = False
    overwrite: bool = False
    seed: int = 0


class Killed(Exception):
    pass


def journals(monkeypatch, out: Path, config, die_at_wait: int = 99) -> list[Journal]:
    """Those of two ranks in this process. One dies when it is to wait for the other the so many-th time."""
    waits = []

    def wait():
        waits.append(0)
        if len(waits) == die_at_wait:
            raise Killed
    monkeypatch.setattr(ranks, "count", lambda: 2)
    monkeypatch.setattr(ranks, "wait", wait)
    monkeypatch.setattr(ranks, "meet", wait)
    found = []
    for rank in range(2):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        found.append(Journal(out, config, MANY))
    monkeypatch.setattr(ranks, "rank", lambda: 0)
    return found


def leave_parts(out: Path, seed: int) -> None:
    """A run of two ranks that was killed after three items."""
    Path(f"{out}.1-of-2.part").write_text('{"n": 0}\n{"n": 2}\n')
    Path(f"{out}.2-of-2.part").write_text('{"n": 1}\n')
    Path(f"{out}.config.json").write_text(json.dumps({"seed": seed}))


def test_the_output_is_the_parts_in_turn_once_all_are_whole(monkeypatch, tmp_path):
    """Nobody merges before the ranks have met."""
    out = tmp_path / "out"
    leave_parts(out, seed=0)
    first, second = journals(monkeypatch, out, Job(resume=True))
    assert (first.done, second.done) == (2, 1)
    with pytest.raises(Killed), journals(monkeypatch, out, Job(resume=True), die_at_wait=3)[0]:
        pass
    assert not out.exists() and len(list(tmp_path.glob("*.part"))) == 2
    with journals(monkeypatch, out, Job(resume=True))[0]:
        pass
    assert (tmp_path / "out").read_text() == '{"n": 0}\n{"n": 1}\n{"n": 2}\n'
    assert not list(tmp_path.glob("*.part"))


def test_a_killed_overwriting_by_many_ranks_mixes_no_runs(monkeypatch, tmp_path):
    """The old run's settings stay beside its lines until every rank has emptied its part."""
    out = tmp_path / "out"
    leave_parts(out, seed=0)
    with pytest.raises(Killed), journals(monkeypatch, out, Job(overwrite=True, seed=5), die_at_wait=2)[0]:
        pass
    assert not Path(f"{out}.1-of-2.part").read_text() and Path(f"{out}.2-of-2.part").read_text()
    with pytest.raises(BadInput, match="another --seed"):
        journals(monkeypatch, out, Job(resume=True, seed=5))


def test_an_overwriting_that_one_rank_had_begun_goes_on(monkeypatch, tmp_path):
    (tmp_path / "out").write_text('{"old": 1}\n')
    with pytest.raises(BadInput, match="exists already"):
        journals(monkeypatch, tmp_path / "out", Job(resume=True))
    Path(tmp_path / "out.1-of-2.part").touch()
    assert [journal.done for journal in journals(monkeypatch, tmp_path / "out", Job(resume=True))] == [0, 0]


def test_parts_of_another_number_of_ranks_are_not_lost_unasked(tmp_path):
    left = tmp_path / "a.jsonl.2-of-3.part"
    left.write_text('{"id": "0"}\n')
    for resume in (True, False):
        with pytest.raises(BadInput, match="another number of ranks"):
            Journal(tmp_path / "a.jsonl", Job(resume=resume), MANY)
    with Journal(tmp_path / "a.jsonl", Job(resume=False, overwrite=True), MANY) as journal:
        journal.write({"id": "1"})
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.jsonl", "a.jsonl.config.json"]


# --------------------------------------------------------------------------------------------- a rank is lost

def command(job: dict, out: Path) -> list:
    flags = job | {"out": out, "epochs": 200}
    del flags["checkpoint_activations"]
    return ["train_sft.py", *flags_of(flags)]


def flags_of(job: dict) -> list:
    return [text for key, value in job.items() for text in ("--" + key.replace("_", "-"), value)]


def pair_of_ranks(command: list) -> list[subprocess.Popen]:
    """Two processes of a script that find each other by the environment, without torchrun."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    return [start(command, **where, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]


def ranks_of(launcher: int) -> list[int]:
    """The processes that torchrun started, in the order of their ranks."""
    found = {}
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        for setting in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if setting.startswith(b"RANK="):
                found[int(setting[5:])] = int(pid)
    return [found[rank] for rank in sorted(found)]


@pytest.mark.usefixtures("own_signals")
def test_under_torchrun_a_killed_rank_ends_the_run_which_goes_on(ran, tmp_path):
    """SIGKILL to the second rank: torchrun ends with an error; --resume goes on from the last checkpoint."""
    _, jobs = ran
    process = start((*TORCHRUN, *command(jobs["sft"][1], tmp_path / "out")))
    wait_for_lines(tmp_path / "out/metrics.jsonl", 5, process)
    os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
    process.communicate(timeout=HANG)
    assert process.returncode not in (0, None)
    done = len(metrics(tmp_path / "out"))
    job = jobs["sft"][1] | {"out": str(tmp_path / "out"), "epochs": 200, "checkpoint_activations": False,
                            "resume": True}

    class Enough(Exception):
        pass
    check = training.Run.check_finite

    def stop_soon(run, *given):
        if run.step == done + 2:
            raise Enough
        return check(run, *given)
    training.Run.check_finite = stop_soon
    try:
        with pytest.raises(Enough):
            do("sft", job)
    finally:
        training.Run.check_finite = check
    assert [row["step"] for row in metrics(tmp_path / "out")] == list(range(done + 2))


def training_or_sampling(script: str, jobs: dict, folder: Path) -> tuple[list, Path]:
    """A command that takes long, and the file that grows while the second of two ranks is at work."""
    if script == "train":
        return command(jobs["sft"][1], folder / "out"), folder / "out/metrics.jsonl"
    given = Path(jobs["sample"][1]["cases"]).read_text().splitlines()
    cases = [json.loads(text) | {"problem": f"{i}"} for i, text in enumerate(given * 20)]
    job = jobs["sample"][1] | {"cases": write(folder / "cases.jsonl", cases), "out": folder / "out.jsonl"}
    return ["data.py", "sample", *flags_of(job)], folder / "out.jsonl.2-of-2.part"


def assert_lost(process: subprocess.Popen, errors: str) -> None:
    """The process ended because another rank is gone, with one line."""
    assert process.returncode == 3, errors
    assert re.search(r"^error: rank 0 has lost another rank \(.*--resume to go on$", errors, re.M)
    assert "Traceback" not in errors


@pytest.mark.parametrize("script", ["train", "sample"])
def test_without_torchrun_a_killed_rank_is_noticed_by_the_other(ran, tmp_path, script):
    """Two processes that find each other by the environment. After SIGKILL to one the other ends with a line.

    It does so as soon as the connection breaks, and not after --rank-timeout, which is half an hour here.
    """
    _, jobs = ran
    line, log = training_or_sampling(script, jobs, tmp_path)
    pair = pair_of_ranks(line)
    wait_for_lines(log, 3, pair[1])
    pair[1].kill()
    _, errors = pair[0].communicate(timeout=HANG)
    pair[1].communicate()
    assert_lost(pair[0], errors)
    assert "no sign of work" not in errors


@pytest.mark.parametrize("script", ["train", "sample"])
def test_a_rank_that_hangs_is_given_up(ran, tmp_path, script):
    """SIGSTOP to the second of two ranks: the first ends after --rank-timeout, with one line.

    Training waits in the next collective. Of a sampling the first rank does all of its share, and then waits.
    """
    _, jobs = ran
    line, log = training_or_sampling(script, jobs, tmp_path)
    pair = pair_of_ranks([*line, "--rank-timeout", 10])
    wait_for_lines(log, 2, pair[1])
    os.kill(pair[1].pid, signal.SIGSTOP)
    _, errors = pair[0].communicate(timeout=HANG)
    pair[1].kill()
    pair[1].communicate()
    assert_lost(pair[0], errors)
    if script == "sample":
        assert "rank 1 has shown no sign of work for 10 seconds" in errors
        assert (tmp_path / "out.jsonl.1-of-2.part").read_bytes().count(b"\n") == 70


@pytest.mark.parametrize("name", ["sft", "score"])
def test_a_rank_timeout_beyond_the_clocks_is_refused(capsys, name):
    """timedelta holds neither inf nor 1e20 seconds, nor do gloo's milliseconds."""
    for text in ("inf", "1e20"):
        with pytest.raises(SystemExit) as stop:
            run(JOBS[name], argv=["--rank-timeout", text])
        assert stop.value.code == 2
        assert f"--rank-timeout: {text} is out of range" in capsys.readouterr().err


class Barrier:
    """What `dist.barrier` gives while the other rank is at work: complete from `moment` on, by the clock."""

    def __init__(self, clock: "Clock", moment: float):
        self.clock = clock
        self.moment = moment

    def is_completed(self) -> bool:
        return self.clock.now >= self.moment

    def wait(self) -> None:
        assert self.is_completed()


class Clock:
    """Time goes on when rank 0 sleeps. Rank 1 writes to its file at the moments `signs`, and then `comes`."""

    def __init__(self, files: list[Path]):
        self.files = files
        self.now = 0.0
        self.signs: list[float] = []
        self.comes = math.inf
        self.waits: list[float] = []  # when rank 0 came to `wait`

    def wait(self) -> None:
        self.waits.append(self.now)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        while self.signs and self.signs[0] <= self.now:
            moment = self.signs.pop(0)
            os.utime(self.files[1], (moment, moment))  # on that machine's clock, which is not this one's

    def barrier(self, group, async_op: bool) -> Barrier:
        assert async_op
        return Barrier(self, self.comes)


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """This process is rank 0 of two, which gives up after 10 seconds, by the clock."""
    files = [tmp_path / "1-of-2.part", tmp_path / "2-of-2.part"]
    for file in files:
        file.touch()
    clock = Clock(files)
    monkeypatch.setattr(ranks, "time", clock)
    monkeypatch.setattr(dist, "barrier", clock.barrier)
    monkeypatch.setattr(ranks, "wait", clock.wait)
    monkeypatch.setattr(ranks, "count", lambda: 2)
    monkeypatch.setattr(ranks, "rank", lambda: 0)
    monkeypatch.setattr(ranks, "patience", 10)
    monkeypatch.setattr(ranks, "files_at_work", files)
    return clock


def test_a_rank_at_work_is_waited_for_however_long(clock):
    clock.signs = list(range(8, 80, 8))
    clock.comes = 80
    ranks.meet()
    assert not clock.signs and 80 <= clock.now < 81  # not before it came
    assert clock.waits == [clock.now]  # nor goes on, to remove its file, while the other may look at it
    clock.comes = 99
    with pytest.raises(dist.DistError, match="rank 1 has shown no sign of work for 10 seconds"):
        ranks.meet()  # the second meeting: that it came to the first does not count
    assert 90 < clock.now < 92


def test_a_rank_that_waits_shows_that_it_is_there(clock):
    """Or ranks that wait would give each other up. Outside of `meet`, `sign_of_life` touches the file."""
    def touched() -> bool:
        latest = clock.files[0].stat().st_mtime
        os.utime(clock.files[0], (1, 1))
        return latest != 1
    touched()
    clock.comes = 1
    ranks.meet()
    assert touched()
    ranks.sign_of_life()
    assert touched() and not touched()


def test_a_line_is_a_sign_of_life(clock):
    """A journal has its parts watched while it is open, and no longer."""
    clock.comes = 0
    with Journal(clock.files[0].parent / "out", Job(), MANY) as journal:
        assert ranks.files_at_work == journal.parts
        os.utime(journal.part, (1, 1))
        journal.write({"n": 0})
        assert journal.part.stat().st_mtime != 1
        journal.parts[1].touch()
    assert ranks.files_at_work == []
    ranks.sign_of_life()  # no file: nothing to do


if __name__ == "__main__":
    plumbing.rounds.ROUND = 1
    given = json.loads(Path(sys.argv[1]).read_text())
    for job in given["plan"]:
        do(*job)
    measure(*given["measure"])
    ranks.leave()
