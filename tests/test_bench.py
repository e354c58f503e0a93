"""The GPU benchmark in miniature on the CPU: every line of it runs, its FLOPs are those that PyTorch counts, and 7B fits its card."""
import json
import math
import os
import subprocess
import sys
import weakref
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

import fast
import fast.kernels
import rprm
import train_dpo
import train_sft
from bench import common, gpu, growth, prefill, reward, sampling, slopes, training
from fast.attention import TreeAttention
from lora import LoRA, add_adapters
from model import Decoder, Tree, head_chunk
from plumbing import adamw_8bit
from plumbing.cli import _parse
from plumbing.memory import memory
from plumbing.run import make_optimizer, precision

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_gpu_benchmark_runs_in_miniature(tmp_path):
    small = "--scale 0.05 --micro-tokens 256 --trees 2 --steps 1 --prompts 3 --k 2 --solutions 2 --repeats 1".split()
    line = [sys.executable, ROOT / "bench/gpu.py", "--shape", "tiny", "--device", "cpu", *small, "--out", tmp_path / "gpu.json"]
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1"}  # flex_attention uncompiled
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [row["work"] for row in rows] == list(gpu.WORK)
    shares = [row[name] for row in rows for name in row if "utilisation" in name or "share" in name]
    assert len(shares) == 7  # of which size is a matter of the machine: beside other work they may exceed 1
    assert all(share > 0 and math.isfinite(share) for share in shares)


SIDES = [
    *((sampling, side, dict(dtypes=("float32",), prompts=3, k=2, new_tokens=4)) for side in ("ours", "plain")),
    *((reward, side, dict(dtypes=("float32",), solutions=2, k=2, max_new_tokens=4)) for side in ("ours", "plain")),
    *((training, side, dict(what=what, examples=2, peer_examples=2, shortest=20, longest=30))
      for what in ("sft", "dpo") for side in ("ours", "plain", "initial_loss")),
    (prefill, "ours", dict(prompts=3)),
    (growth, "ours", dict(sizes=(3,), k=2, new_tokens=2)),
    *((slopes, "ours", dict(what=(what,), sizes=(1, 2), new_tokens=2)) for what in slopes.SIZES),
]


def solutions_file(folder: Path) -> Path:
    row = {"id": "0", "problem": "1 + 1 + 1 + 1?", "steps": ["1 + 1 = 2.", "2 + 1 = 3.", "So 4."], "label": 2}
    path = folder / "solutions.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("script, side, sizes", SIDES)
@pytest.mark.slow
def test_our_sides_of_the_benchmarks_run_in_miniature(script, side, sizes, tmp_path, monkeypatch):
    data = solutions_file(tmp_path)
    for module, name in ((train_sft, "Run"), (train_dpo, "Run"), (train_dpo, "reference_logprobs")):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back what a side has replaced
    monkeypatch.setattr(fast, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(training, "matmul_flops", lambda: 1e11)
    result = getattr(script, side)(script.Config(model=str(ROOT / "examples/arithmetic/base"), data=str(data), **sizes))
    assert result["seconds"] > 0


VLLM = ROOT / ".venv-vllm/bin/python"


@pytest.mark.slow
@pytest.mark.parametrize("side", ["llama", "vllm"])
@pytest.mark.parametrize("script, sizes", [("sampling", "--prompts 3 --k 2 --new-tokens 4"),
                                           ("reward", "--solutions 2 --k 2 --max-new-tokens 4")])
def test_the_sides_of_other_engines_run_in_miniature(script, sizes, side, tmp_path):
    if side == "llama":
        pytest.importorskip("xllamacpp", reason="no llama.cpp here: pip install xllamacpp gguf")
    if side == "vllm" and not VLLM.exists():
        pytest.skip("no vLLM here: make vllm")
    python = VLLM if side == "vllm" else sys.executable
    line = [python, ROOT / "bench" / f"{script}.py", "--side", side, "--model", ROOT / "examples/arithmetic/base",
            "--data", solutions_file(tmp_path), *sizes.split(), *"--peer-dtypes float32 --slots 4 --slot-context 512".split()]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["seconds"] > 0


@pytest.mark.parametrize("script", [sampling, prefill, training, reward, growth, slopes])
def test_a_sides_command_line_makes_its_config_again(script):
    """No --peers is how `make bench` runs, and a flag without its values ended each side with a usage message."""
    kinds = {bool: True, int: 77, float: 0.5, str: "x"}
    changed = {field.name: kinds[type(field.default)] for field in fields(script.Config)
               if type(field.default) in kinds and field.name not in ("what", "dtype")}
    for config in (script.Config(), script.Config(**changed)):
        _, _, given = _parse([(script.Config, script.main)], common.command_line(config))
        assert script.Config(**given) == config


def test_exponents_by_hand():
    """Twice as much in four times the time is an exponent of 2."""
    points = [{"size": 1, "seconds": 3.0}, {"size": 2, "seconds": 12.0}, {"size": 8, "seconds": 12.0}]
    slopes.with_exponents(points)
    assert [point["each"] for point in points] == [3.0, 6.0, 1.5]
    assert [point.get("exponent") for point in points] == [None, pytest.approx(2), 0]


def test_peers_that_are_not_installed_are_left_out_with_a_line(monkeypatch, capsys):
    monkeypatch.setattr(common, "find_spec", lambda name: "found")
    config = sampling.Config(peers=("vllm", "llama.cpp"), vllm=sys.executable)
    assert list(common.further_peers(replace(config, peer_dtypes=("float32",)))) == [
        "vLLM, float32, eager", "vLLM, float32, compiled", "llama.cpp, float32"]
    assert common.further_peers(replace(config, peers=())) == {} and capsys.readouterr().out == ""
    monkeypatch.setattr(common, "find_spec", lambda name: None)
    assert common.further_peers(replace(config, vllm="nowhere/python")) == {}
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "`make vllm` installs it" in said[0] and "pip install xllamacpp gguf" in said[1]


def test_each_further_peer_has_a_row_with_the_best_of_its_runs():
    rates = {"ours, float32": 120.0, "vLLM, float32, eager": 40.0, "vLLM, float32, compiled": 60.0}
    medians = {name: {"rate": rate, "peak_mb": 2 * rate} for name, rate in rates.items()}
    row = common.Row("sampling", "tokens/s", 120.0, "≥ 8×", True, peer=10.0, ratio=12.0)
    [found] = common.rows_of_further_peers(row, medians, "rate")
    assert found.work == "the same, the peer vLLM, float32, compiled"
    assert (found.ours, found.peer, found.ratio, found.peer_memory, found.met) == (120.0, 60.0, 2.0, 120.0, None)


def test_its_flops_are_those_that_pytorch_counts():
    config = gpu.Config(shape="tiny", device="cpu", checkpoint_activations=False)
    model = gpu.random_model(config, torch.float32)
    tree = Tree([[1, 2, 3, 4, 5], [1, 2, 3, 9, 8, 7]])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(model(tree.ids, tree.positions, TreeAttention(tree.end))[:4])
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm"))
    attention = 4 * float((tree.positions + 1).sum()) * 64 * 2
    assert gpu.flops_of_forward(model.config, tree, 4) == products + attention


def test_the_roofline_of_decoding_by_hand():
    """3 prompts × 2: 599 steps that read 1,100 shared keys and 6 t sampled ones, of 256 bytes with their values, and 1,000 weights."""
    config = gpu.Config(shape="tiny", device="cpu", prompts=3, k=2)
    read = 599 * (2 * 1000 + 256 * 1100) + 256 * 6 * 599 * 600 / 2
    assert gpu.roofline(config, 1000, {"bandwidth": 10.0, "flops": 1e30}) == pytest.approx(read / 10)
    assert gpu.roofline(config, 1000, {"bandwidth": 1e30, "flops": 10.0}) == pytest.approx(599 * 2 * 1000 * 6 / 10)


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive: now, and at most."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, WeakIdKeyDictionary()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **kwargs or {})
        for storage in (t.untyped_storage() for t in tree_leaves(out) if torch.is_tensor(t)):
            if storage not in self.seen:
                self.seen[storage] = True
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.gone, storage.nbytes())
        return out

    def gone(self, size: int) -> None:
        self.now -= size


def count_bytes(monkeypatch, model, sequences: list[list[int]], starts: list[int], adamw_8bit: bool = False) -> int:
    """The bytes alive at the peak of a second step as on a GPU: bf16 products of fake tensors, which have sizes and no content."""
    monkeypatch.setattr(fast.kernels, "ONEDNN_SIZE", 2 ** 60)  # as F.linear, on which autocast acts
    monkeypatch.setattr(rprm, "head_chunk", lambda device, n_tokens: head_chunk("cuda", n_tokens))

    def attend(layer, q, k, v):  # flash attention: what it keeps is what flex_attention keeps
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
    tree = Tree(sequences)
    with FakeTensorMode(allow_non_fake_inputs=True), Alive() as alive:
        model = fast.speed_up(model())
        model.tree_attention = lambda end: attend
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = make_optimizer(model, 1e-5, weight_decay=0.0, beta2=0.999, adamw_8bit=adamw_8bit)
        for p in trained:
            p.grad = torch.zeros_like(p)  # gradients stay from tree to tree of a step, moments from step to step
        optimizer.step()
        alive.peak = 0
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=precision("cuda")._cache_enabled):
            logprobs = rprm.response_logprobs(model, tree, starts)
        logprobs.sum().backward()
        optimizer.step()
    return alive.peak


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_memory_table_at_7b(monkeypatch, checkpointed):
    """A step of SFT in the shape of Qwen2.5-7B, 8,192 tokens.

    With checkpointing that fits a card of 141 GB (149e9 bytes, of which CUDA itself wants one); autocast's cache would add 8e9.
    """
    shape = gpu.SHAPES["7b"]

    def model():
        decoder = Decoder(shape)
        decoder.checkpoint_activations = checkpointed
        return decoder
    sequences = [[0] * 500 + [i] * (771 if i == 1 else 769) for i in range(1, 11)]
    assert len(Tree(sequences)) == 8192
    peak = count_bytes(monkeypatch, model, sequences, [600] * 10)
    estimate = sum(memory(shape, 8192, checkpointed, "cuda", n_ranks=1).values())
    assert estimate == pytest.approx(peak, rel=0.03 if checkpointed else 0.1)
    assert not checkpointed or peak < 140e9


@pytest.mark.slow
def test_the_memory_table_of_moments_of_8_bits_at_7b(monkeypatch):
    """All weights, checkpointing and 4,096 tokens, on a card of 80 GB (85.5e9 bytes, of which CUDA itself wants one).

    What counts also keeps autograd from adding up the gradients of the head in place, as it does otherwise.
    """
    monkeypatch.setattr(adamw_8bit, "NUMBERS_AT_ONCE", 2 ** 26)  # the moments' fp32, when all activations are gone
    for signed in (True, False):
        adamw_8bit.fractions(signed)  # made now, as they are kept, and a fake tensor must not be
    shape = gpu.SHAPES["7b"]

    def model():
        decoder = Decoder(shape)
        decoder.checkpoint_activations = True
        return decoder
    sequences = [[0] * 500 + [i] * (724 if i == 1 else 718) for i in range(1, 6)]
    assert len(Tree(sequences)) == 4096
    peak = count_bytes(monkeypatch, model, sequences, [600] * 5, adamw_8bit=True)
    peak -= 4 * shape.vocab_size * shape.hidden_size
    estimate = sum(memory(shape, 4096, True, "cuda", n_ranks=1, adamw_8bit=True).values())
    assert estimate == pytest.approx(peak, rel=0.03)
    assert max(peak, estimate) < 84e9


@pytest.mark.slow
def test_the_memory_table_of_lora_at_7b(monkeypatch):
    """The same with adapters of rank 16, checkpointing and 4,096 tokens, on a card of 24 GB (25.8e9 bytes)."""
    shape = gpu.SHAPES["7b"]
    adapters = LoRA(rank=16, alpha=32)

    def model():
        torch.set_default_dtype(torch.bfloat16)  # fake parameters cannot be cast
        decoder = Decoder(shape)
        torch.set_default_dtype(torch.float32)
        add_adapters(decoder, adapters)
        decoder.checkpoint_activations = True
        return decoder
    sequences = [[0] * 500 + [i] * (724 if i == 1 else 718) for i in range(1, 6)]
    assert len(Tree(sequences)) == 4096
    peak = count_bytes(monkeypatch, model, sequences, [600] * 5)
    estimate = sum(memory(shape, 4096, True, "cuda", n_ranks=1, lora=adapters).values())
    assert estimate == pytest.approx(peak, rel=0.03)
    assert max(peak, estimate) < 22e9
