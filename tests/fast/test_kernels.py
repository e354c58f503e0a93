"""The fast kernels against PyTorch's own operations, one by one and in a whole model."""
import copy
import random
from types import MethodType

import pytest
import torch
import torch.nn.functional as F

import fast
from checkpoint import load_model
from conftest import FAMILIES
from fast import kernels
from model import MLP, RMSNorm, Tree
from rprm import response_logprobs
from test_model import gradients, random_ids


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_the_fast_model_is_the_plain_one(make_folder, seed, checkpointed):
    """Log-probabilities and gradients of all weights over random models and trees, in fp64, to 1e-9."""
    rng = random.Random(seed)
    plain = load_model(make_folder(rng.choice(list(FAMILIES)), rng.random() < 0.5), torch.float64)
    fast_model = fast.speed_up(copy.deepcopy(plain))
    plain.checkpoint_activations = fast_model.checkpoint_activations = checkpointed
    prompts = [random_ids(rng.randrange(1, 90), rng.randrange(3)) for _ in range(4)]
    sequences = [prompt + random_ids(rng.randrange(1, 60), 10 + i // 2) for i, prompt in enumerate(prompts * 2)]
    starts = [len(prompt) for prompt in prompts * 2]
    weights = torch.rand(len(starts), dtype=torch.float64)
    found = []
    for model in (plain, fast_model):
        logprobs = response_logprobs(model, Tree(sequences), starts)
        found.append({"logprobs": logprobs.detach()} | gradients(model, (logprobs * weights).sum()))
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], atol=1e-9, rtol=1e-9, msg=name)


def test_fp32_products_of_the_fast_model_go_through_onednn(tiny_folder, monkeypatch):
    """In fp32 too, with norms and activations made again in the backward pass: near the plain model's
    gradients, and in less memory.
    """
    monkeypatch.setattr(kernels, "ONEDNN_SIZE", 0)
    plain = load_model(tiny_folder)
    fast_model = fast.speed_up(copy.deepcopy(plain))
    sequences = [random_ids(60, 0) + random_ids(40, seed) for seed in range(4)]
    found = []
    kept = []
    for model in (plain, fast_model):
        tree = Tree(sequences)
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = model(tree.ids, tree.positions, model.tree_attention(tree.end))
        kept.append(sum(sizes.values()))
        found.append(gradients(model, hidden.square().sum()))
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], atol=2e-3, rtol=2e-3, msg=name)
    assert kept[1] < 0.8 * kept[0]


def test_gradients_written_by_hand_are_those_of_autograd():
    """On CPU, RMSNorm and the activation (300 rows: more than it takes at a time) have backward passes of
    their own.
    """
    torch.manual_seed(0)
    x, scale = torch.randn(300, 16, dtype=torch.float64, requires_grad=True), torch.rand(16, dtype=torch.float64)
    norm = RMSNorm(16, 1e-2).double()
    norm.forward = MethodType(kernels.rms_norm_forward, norm)
    with torch.no_grad():
        norm.weight.copy_(scale)
    weight = norm.weight
    grad = torch.randn(300, 16, dtype=torch.float64)
    ours, plain = norm(x), F.rms_norm(x, (16,), weight, 1e-2)
    torch.testing.assert_close(ours, plain)
    for found, expected in zip(*(torch.autograd.grad(y, (x, weight), grad) for y in (ours, plain))):
        torch.testing.assert_close(found, expected)
    ours, plain = kernels.Remade.apply(MLP.activate, x), F.silu(x[:, :8]) * x[:, 8:]
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, grad[:, :8])[0] for y in (ours, plain)))


def test_the_linear_layers_on_either_library_are_the_same(monkeypatch):
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((37, 48), (64, 48), (64,)))
    found = []
    for size, name in ((0, "OneDNNLinearBackward"), (2 ** 60, "AddmmBackward0")):
        monkeypatch.setattr(kernels, "ONEDNN_SIZE", size)
        out = kernels.linear(x, weight, bias)
        assert type(out.grad_fn).__name__ == name
        out.square().sum().backward()
        found.append([out.detach(), x.grad, weight.grad, bias.grad])
        x.grad = weight.grad = bias.grad = None
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_the_fast_model_takes_another_activation(tiny_folder, monkeypatch):
    """GELU in place of SiLU, as in Gemma, is changed in model.py alone."""
    def geglu(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh") * up
    before = load_model(tiny_folder, torch.float64)
    monkeypatch.setattr(MLP, "activate", staticmethod(geglu))
    plain = load_model(tiny_folder, torch.float64)
    fast_model = fast.speed_up(copy.deepcopy(plain))
    tree = Tree([random_ids(30)])
    found = []
    for model in (plain, fast_model):
        hidden = model(tree.ids, tree.positions, model.tree_attention(tree.end))
        found.append(gradients(model, hidden.square().sum()) | {"hidden": hidden.detach()})
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], atol=1e-9, rtol=1e-9, msg=name)
    monkeypatch.undo()
    other = before(tree.ids, tree.positions, before.tree_attention(tree.end))
    assert (other - found[0]["hidden"]).abs().max() > 0.01


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 1e-1)])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_weights_give_the_same_logits(make_folder, monkeypatch, family, dtype, atol):
    """Every product of a layer, with and without bias, on few rows and on many; bf16 stays as it is on processors without it."""
    monkeypatch.setattr(kernels, "PACKED_SIZE", 0)
    model = fast.speed_up(load_model(make_folder(family, True), dtype))
    trees = [Tree([random_ids(3, 0)]), Tree([random_ids(90, i) for i in range(4)])]
    found = []
    for _ in range(2):
        with torch.inference_mode():
            found.append([model.logits(model(t.ids, t.positions, model.tree_attention(t.end))) for t in trees])
        fast.pack_weights(model)
    supported = dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert all(module.weight.is_mkldnn == supported for module in model.modules() if isinstance(module, torch.nn.Linear))
    for before, packed in zip(*found, strict=True):
        torch.testing.assert_close(packed, before, atol=atol, rtol=0)
