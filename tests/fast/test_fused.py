"""What runs on a GPU alone, on the CPU as far as it goes: compiled functions, and the most likely tokens by blocks."""
import copy
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from checkpoint import load_model
from conftest import FAMILIES
from fast.fused import fuse, fused
from fast.nucleus import most_likely_by_blocks
from model import Tree, tree_attention
from plumbing import ranks
from rprm import response_logprobs
from test_generate import random_ids


@pytest.fixture
def compiled(monkeypatch):
    """torch.compile traces functions and their backward passes, and runs them without a compiler. -> what was traced"""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    fused.cache_clear()
    yield graphs
    fused.cache_clear()
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_model_computes_what_a_plain_one_does(make_folder, compiled, family):
    """Log-probabilities and gradients in fp64, for trees of three sizes, with and without checkpointing: each function is compiled once."""
    plain = load_model(make_folder(family, False), torch.float64)
    other = copy.deepcopy(plain)
    fuse(other)
    other.tree_attention = tree_attention
    for other.checkpoint_activations in (False, True):
        for size in (5, 20, 33):
            found = []
            for model in (plain, other):
                model.zero_grad()
                logprobs = response_logprobs(model, tree_of(size), [size] * 3)
                logprobs.sum().backward()
                found.append([logprobs, *(p.grad for p in model.parameters())])
            for expected, ours in zip(*found, strict=True):
                torch.testing.assert_close(ours, expected, atol=1e-10, rtol=1e-9)
    assert len(compiled) == 4  # a norm, the heads, the activation, the log-probabilities


def gradients_of_a_rank(rank: int, folder: Path, out: Path) -> None:
    """One of two ranks, whose decoder is cut over both and fused: what it computes of two trees goes into a file."""
    dist.init_process_group("gloo", init_method=f"file://{out / 'store'}", rank=rank, world_size=2)
    model = load_model(folder, torch.float64)
    ranks.shard(model, "cpu")
    torch.compile = partial(torch.compile, backend="aot_eager")
    fuse(model)
    model.tree_attention = tree_attention
    for size in (20, 33):
        logprobs = response_logprobs(model, tree_of(size), [size] * 3)
        logprobs.sum().backward()
    found = {name: p.grad.full_tensor() for name, p in ranks.parameters(model).items()}
    if rank == 0:
        save_file(found | {"logprobs": logprobs.detach()}, out / "found.safetensors")
    ranks.leave()  # without Python's clearing up, in which gloo aborts now and then


def tree_of(size: int) -> Tree:
    return Tree([random_ids(size, 0) + random_ids(7, i) for i in range(3)])


@pytest.mark.slow
def test_two_ranks_train_a_fused_model(make_folder, tmp_path):
    """Each has the same trees here, so the gradients, which are summed, are twice those of one plain model."""
    folder = make_folder("qwen3", False)
    torch.multiprocessing.spawn(gradients_of_a_rank, (folder, tmp_path), nprocs=2)
    found = load_file(tmp_path / "found.safetensors")
    plain = load_model(folder, torch.float64)
    for size in (20, 33):
        logprobs = response_logprobs(plain, tree_of(size), [size] * 3)
        logprobs.sum().backward()
    torch.testing.assert_close(found.pop("logprobs"), logprobs.detach(), atol=1e-10, rtol=1e-9)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(found[name], 2 * p.grad, atol=1e-10, rtol=1e-9, msg=name)


@pytest.mark.parametrize("n", [1, 7, 64])
def test_the_most_likely_lie_in_the_blocks_with_the_largest_maxima(n):
    p = torch.randn(9, 128 * 100, dtype=torch.float64).softmax(-1)
    p[3, :80] += 1  # all of them in one block
    p[4, ::128] += 1  # one in each
    values, ids = most_likely_by_blocks(p, n)
    expected, places = p.topk(n)
    assert torch.equal(values, expected) and torch.equal(ids, places)
