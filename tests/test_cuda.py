"""On a GPU: both engines, both kinds of attention, training, adapters and scores, against those of the CPU.

Skipped where PyTorch finds no GPU. fp32 is fp32 there (no TF32), so tokens and gradients are compared.
"""
import contextlib
import copy
import io
import os
import re
import signal

import pytest
import torch
from test_generate import EOS, YES_NO, assert_same, random_ids, requests_of, run, shared_prompts
from test_training import metrics, own_signals, pair_rows, sft_rows, write  # noqa: F401, its fixture

import fast
import fast.graphs
import generate
import score
import train_dpo
import train_sft
from checkpoint import load_model
from fast.flex import FlexTreeAttention, MaskedTreeAttention
from model import Tree
from plumbing import cli
from plumbing.run import Run, precision
from rprm import response_logprobs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU here")


@pytest.fixture(scope="module")
def on_cpu(make_folder):
    return load_model(make_folder("qwen3", False))


@pytest.fixture(scope="module")
def on_gpu(on_cpu):
    return copy.deepcopy(on_cpu).to("cuda")


@pytest.fixture(scope="module")
def fast_on_gpu(on_gpu):
    return fast.speed_up(copy.deepcopy(on_gpu))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b|"""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm())


def random_tree(seed: int, n: int = 40) -> tuple[Tree, list[int]]:
    """Prompts below the same tokens, two responses each; and where the responses begin."""
    prompts = shared_prompts(n)
    sequences = []
    for i, ids in enumerate(prompts):
        sequences += [ids + random_ids(5 + (seed + i + j) % 40, 1000 * seed + 2 * i + j) for j in (0, 1)]
    return Tree(sequences), [len(ids) for ids in prompts for _ in (0, 1)]


# ---------------------------------------------------------------------------------------------- the model

@pytest.mark.parametrize("seed", range(3))
def test_log_probabilities_and_gradients_are_those_of_the_cpu(on_cpu, on_gpu, fast_on_gpu, seed):
    found = []
    for model in (on_cpu, on_gpu, fast_on_gpu):
        tree, starts = random_tree(seed)
        model.zero_grad()
        logprobs = response_logprobs(model, tree.to(model.device), starts)
        logprobs.sum().backward()
        found.append((logprobs, [p.grad for p in model.parameters()]))
    expected, gradients = found[0]
    for logprobs, others in found[1:]:
        assert distance(logprobs, expected) < 1e-5
        for mine, theirs in zip(others, gradients, strict=True):
            assert distance(mine, theirs) < 1e-4


def test_bf16_products_are_close(on_cpu, fast_on_gpu):
    tree, starts = random_tree(0)
    with torch.no_grad():
        expected = response_logprobs(on_cpu, tree, starts)
        with precision("cuda"):
            found = response_logprobs(fast_on_gpu, tree.to("cuda"), starts)
    assert found.dtype == torch.float32
    assert 1e-6 < distance(found, expected) < 0.02  # and not fp32


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("past", [0, 100])
@pytest.mark.parametrize("kind", [MaskedTreeAttention, FlexTreeAttention])
def test_attention_within_a_tree(kind, past, dtype, close):
    """Against SDPA with the whole mask in fp64, with gradients."""
    tree, _ = random_tree(1)
    T, end = len(tree), tree.end.to("cuda")
    sizes = [(T, 4), (past + T, 2), (past + T, 2)]  # of q, k and v
    inputs = [torch.randn(*size, 32, device="cuda", dtype=dtype, requires_grad=True) for size in sizes]
    grad = torch.randn(T, 4, 32, device="cuda", dtype=dtype)
    q, k, v = inputs
    before = (k[:past].transpose(0, 1), v[:past].transpose(0, 1)) if past else None
    out = kind(end, past)(0, q, k[past:], v[past:], past=before)
    out.backward(grad)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    q, k, v = exact
    index = torch.arange(T, device="cuda")
    mask = (index <= index[:, None]) & (index[:, None] < end)
    mask = torch.cat((torch.ones(T, past, dtype=torch.bool, device="cuda"), mask), dim=1)
    scores = torch.einsum("qkgd,skd->kgqs", q.view(T, 2, 2, 32), k) * 32 ** -0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    expected = torch.einsum("kgqs,skd->qkgd", weights, v).reshape(T, 4, 32)
    expected.backward(grad.double())
    assert distance(out, expected) < close
    for mine, theirs in zip(inputs, exact, strict=True):
        assert distance(mine.grad, theirs.grad) < close


# ---------------------------------------------------------------------------------------------- sampling

@pytest.mark.parametrize("temperature, top_p", [(0.5, 0.95), (0.95, 0.95), (0.0, 0.95), (1.0, 1.0)])
def test_both_engines_sample_what_the_cpu_does(
    on_cpu, on_gpu, fast_on_gpu, temperature, top_p, monkeypatch
):
    """Many prompts through few rows, with ends, for longer than a recording of the decoding step is wide."""
    monkeypatch.setattr(fast.graphs, "WINDOW", 32)
    requests = requests_of(shared_prompts(12), 3) + requests_of([random_ids(300, 5), random_ids(4, 6)], 3)

    def engine(kind, model):
        return kind(model, EOS[:3], YES_NO, temperature, top_p, 80, 24)
    expected = run(engine(generate.Engine, on_cpu), requests)
    for kind, model in ((generate.Engine, on_gpu), (fast.engine_for(fast_on_gpu), fast_on_gpu)):
        found = run(engine(kind, model), requests)
        pairs = [pair for rows in zip(found, expected, strict=True) for pair in zip(*rows, strict=True)]
        equal = [pair for pair in pairs if pair[0].ids == pair[1].ids]
        assert len(equal) >= 40  # of 42: rounding alone moves one token in some thousands
        assert_same(*([[c] for c in side] for side in zip(*equal, strict=True)))
    assert max(len(c.ids) for row in expected for c in row) > 70


def test_suffixes_are_read_behind_their_rows(on_cpu, fast_on_gpu):
    requests, suffix = requests_of(shared_prompts(8), 3), [7, 8, 9, 10]
    engine = fast.engine_for(fast_on_gpu)(fast_on_gpu, EOS, YES_NO, 0.5, 0.95, 16, 12, 8)
    found = run(engine, requests, lambda ids: suffix)
    reference = generate.Engine(on_cpu, EOS, YES_NO)
    for request, continuations in zip(requests, found, strict=True):
        for c in continuations:
            [expected] = reference.read_p_yes([request.ids + c.ids + suffix])
            assert c.p_yes_after_suffix == pytest.approx(expected, abs=1e-5)


# ---------------------------------------------------------------------------------------------- the scripts

SFT = (train_sft.Config, train_sft.main)
DPO = (train_dpo.Config, train_dpo.main)


def call(command: tuple, *arguments) -> None:
    """A script's command, (Config, function), with its command line, within this process."""
    cli.run(command, argv=[str(a) for a in arguments])


@pytest.mark.parametrize("flags", [[], ["--plain"], ["--checkpoint-activations"], ["--lora-rank", "4"]])
def test_training_is_that_of_the_cpu_in_bf16(tmp_path, tiny_folder, flags):
    """Twelve steps of SFT, then of DPO from where they led: the loss of each step is that of the CPU."""
    sft = write(tmp_path / "sft.jsonl", sft_rows(24))
    pairs = write(tmp_path / "pairs.jsonl", pair_rows(24))
    losses = []
    for i, device in enumerate(("cpu", "cuda")):
        lr = "1e-2" if "--lora-rank" in flags else "1e-3"
        common = ["--device", device, "--batch-size", "8", "--epochs", "4", "--lr", lr, *flags]
        first, second = tmp_path / f"sft-{i}", tmp_path / f"dpo-{i}"
        merge = ["--merge"] if "--lora-rank" in flags else []
        call(SFT, "--model", tiny_folder, "--train", sft, "--out", first, *common, *merge)
        call(DPO, "--model", first / "model", "--train", pairs, "--out", second, *common)
        losses.append([[row["loss"] for row in metrics(out)] for out in (first, second)])
    for cpu, cuda in zip(*losses, strict=True):
        assert len(cpu) == 12 and min(cpu) < 0.95 * cpu[0]
        assert cuda == pytest.approx(cpu, rel=0.05, abs=0.03)


def test_a_stopped_run_goes_on(tmp_path, tiny_folder, monkeypatch):
    """Stopped by a signal in its seventh of twelve steps and resumed: the losses are those of a whole run."""
    sft = write(tmp_path / "sft.jsonl", sft_rows(24))
    common = ["--model", tiny_folder, "--train", sft, "--device", "cuda", "--batch-size", "8",
              "--epochs", "4", "--lr", "1e-3"]
    call(SFT, *common, "--out", tmp_path / "whole")

    def stop(self, *_):
        if self.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "check_finite", stop)
        with pytest.raises(SystemExit):
            call(SFT, *common, "--out", tmp_path / "parts")
    assert len(metrics(tmp_path / "parts")) == 7
    call(SFT, *common, "--out", tmp_path / "parts", "--resume")
    whole, parts = ([row["loss"] for row in metrics(tmp_path / name)] for name in ("whole", "parts"))
    assert parts == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("flags", [[], ["--plain"], ["--dtype", "bfloat16"]])
def test_rewards_are_those_of_the_cpu(flags):
    """The model that comes with the project judges a solution of two steps, one right, one wrong."""
    problem = "At first Mia has 34 shells. Then Tom gives 27 to Mia. How many shells does Mia have now?"
    line = ["--problem", problem, "--step", "After Tom: 34+27=61.", "After Tom: 34+27=62.", "--all-steps",
            "--k", "8", "--max-new-tokens", "200"]
    rewards = {}
    for device in ("cpu", "cuda"):
        own_flags = flags if device == "cuda" else []
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            call((score.JudgeConfig, score.judge), *line, "--device", device, *own_flags)
        rewards[device] = [float(number) for number in re.findall(r"reward (\S+)", printed.getvalue())]
    assert len(rewards["cpu"]) >= 2
    assert rewards["cuda"] == pytest.approx(rewards["cpu"], abs=0.1 if "bfloat16" in flags else 1e-3)
