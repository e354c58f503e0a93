"""Log-probabilities and losses: the same packed or apart, against hand-worked numbers and against Transformers."""
import math

import pytest
import torch
import torch.nn.functional as F

from checkpoint import load_model
from data import pack
from model import Tree
from rprm import dpo_loss, response_logprobs, sft_loss

INSTRUCTIONS = [5, 9, 14, 22, 31, 8, 12]
UNITS = {  # prompts that share instructions; responses that share a beginning, or of which one is the other's beginning
    0: (INSTRUCTIONS + [40, 41, 42], [[60, 61, 62, 1], [60, 61, 70, 71, 1]]),
    1: (INSTRUCTIONS + [40, 41, 50], [[60, 61], [60, 61, 62, 63]]),
    2: ([7, 7, 7, 7], [[80, 81, 82, 83, 1], [90, 1]]),
    3: (INSTRUCTIONS + [40, 41, 42], [[61, 1], [60, 61, 62, 1, 99]]),
}


@pytest.fixture
def model(tiny_folder):
    return load_model(tiny_folder, torch.float64)


def separate(model, units):
    """log π of each response from its own sequence, with full logits and no tree but a chain."""
    found = []
    for prompt, responses in units.values():
        for response in responses:
            tree = Tree([prompt + response])
            keys = torch.arange(len(tree))

            def causal(layer, q, k, v):
                q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
            logits = model.logits(model(tree.ids, keys, causal))
            logprobs = F.log_softmax(logits, -1)[keys[:-1], tree.ids[1:]]
            found.append(logprobs[len(prompt) - 1:].sum())
    return torch.stack(found)


def packed(model, units, micro_tokens):
    """The same through trees of at most micro_tokens, in the order of `units`."""
    found = {}
    batches = pack(units, micro_tokens)
    for batch in batches:
        logprobs = iter(response_logprobs(model, batch.tree, batch.starts))
        found |= {i: [next(logprobs) for _ in units[i][1]] for i in batch.examples}
    return torch.stack([value for i in units for value in found[i]])


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


WEIGHTS = torch.tensor([1.0, -0.5, 2.0, 0.3, 1.5, -1.0, 0.7, 1.1], dtype=torch.float64)  # so that no two responses are alike


@pytest.mark.parametrize("micro_tokens", [20, 33, 1000])
@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_packed_equals_separate_with_gradients(model, micro_tokens, chunk, monkeypatch):
    """Whatever the trees and chunks: log-probabilities and every gradient to 1e-9 in fp64 (so k micro-batches = one)."""
    expected = separate(model, UNITS)
    monkeypatch.setattr("rprm.head_chunk", lambda *_: chunk)
    found = packed(model, UNITS, micro_tokens)
    assert (found - expected).abs().max() < 1e-9
    ours, theirs = gradients(model, (found * WEIGHTS).sum()), gradients(model, (expected * WEIGHTS).sum())
    assert max((ours[name] - theirs[name]).abs().max() for name in ours) < 1e-9


def test_checkpointed_activations_change_nothing(model):
    plain = gradients(model, packed(model, UNITS, 1000).sum())
    model.checkpoint_activations = True
    recomputed = gradients(model, packed(model, UNITS, 1000).sum())
    assert max((plain[name] - recomputed[name]).abs().max() for name in plain) < 1e-12


def test_a_tree_computes_shared_tokens_once():
    [batch] = pack(UNITS, 1000)
    # by hand: instructions 7; 40 41 2; 42 1; 50 1; under 42: 60 61 62 1 (4), 70 71 1 (3), 61 1 (2), 99 (1);
    # under 50: 60 61 62 63 (4); unit 2: 4 + 5 + 2
    assert len(batch.tree) == 7 + 2 + 1 + 1 + 4 + 3 + 2 + 1 + 4 + 11


@pytest.mark.parametrize("micro_tokens", [14, 17, 25, 40])
def test_pack_keeps_every_example_that_fits_once(micro_tokens):
    fitting = {i: (prompt, responses) for i, (prompt, responses) in UNITS.items() if len(prompt) + sum(map(len, responses)) <= micro_tokens}
    batches = pack(fitting, micro_tokens)
    assert sorted([i for batch in batches for i in batch.examples]) == sorted(fitting)
    assert all(len(batch.tree) <= micro_tokens for batch in batches)


def test_losses_equal_transformers_and_plain_pytorch(tiny_folder):
    """SFT and DPO on the same texts, from Transformers' full logits, fp32."""
    from transformers import AutoModelForCausalLM
    theirs, ours = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32), load_model(tiny_folder)
    sums, lengths = [], []
    for prompt, responses in UNITS.values():
        for response in responses:
            ids = torch.tensor([prompt + response])
            logprobs = F.log_softmax(theirs(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
            sums.append(logprobs[len(prompt) - 1:].sum())
            lengths.append(len(response))
    sums = torch.stack(sums).view(-1, 2)
    found = packed(ours, UNITS, 1000).view(-1, 2)
    assert sft_loss(found, sum(lengths)).item() == pytest.approx(-sums.sum().item() / sum(lengths), abs=1e-5)
    reference = sums.detach() + torch.tensor([[0.3, -0.2], [0.1, 0.4], [-0.5, 0.0], [0.2, 0.6]])
    losses, *_ = dpo_loss(found[:, 0], found[:, 1], reference[:, 0], reference[:, 1], torch.tensor(lengths).view(-1, 2)[:, 0], beta=0.5)
    margin = (sums - reference)[:, 0] - (sums - reference)[:, 1]
    assert torch.allclose(losses, -torch.log(1 / (1 + torch.exp(-0.5 * margin))), atol=1e-5)


def pair(chosen, rejected, ref_chosen, ref_rejected, length=4, **options):
    values = (torch.tensor([float(x)]) for x in (chosen, rejected, ref_chosen, ref_rejected))
    return [x.item() for x in dpo_loss(*values, torch.tensor([length]), **options)]


def test_sft_loss_by_hand():
    assert sft_loss(torch.tensor([-3.0, -5.0]), 4).item() == 2.0


def test_dpo_loss_by_hand():
    """β 0.5; log-ratios +2 and -2: margin 4, σ(2) = 0.880797; implicit rewards ±1."""
    loss, chosen, rejected = pair(-10, -14, -12, -12, beta=0.5)
    assert loss == pytest.approx(0.126928, abs=1e-6)
    assert (chosen, rejected) == (1.0, -1.0)
    assert pair(-10, -14, -10, -14, beta=0.1)[0] == pytest.approx(math.log(2))  # nothing learned yet


def test_dpo_label_smoothing_by_hand():
    """0.9 · -log σ(2) + 0.1 · -log σ(-2) = 0.9 · 0.126928 + 0.1 · 2.126928."""
    assert pair(-10, -14, -12, -12, beta=0.5, label_smoothing=0.1)[0] == pytest.approx(0.326928, abs=1e-6)


def test_ipo_by_hand():
    """(4 - 1 / (2 · 0.5))² = 9."""
    assert pair(-10, -14, -12, -12, beta=0.5, ipo=True)[0] == pytest.approx(9.0)


def test_ipo_label_smoothing_by_hand():
    """0.9 · (4 - 1)² + 0.1 · (-4 - 1)² = 8.1 + 2.5."""
    assert pair(-10, -14, -12, -12, beta=0.5, ipo=True, label_smoothing=0.1)[0] == pytest.approx(10.6)


def test_nll_term_by_hand():
    """... + 0.2 · 10 / 4."""
    assert pair(-10, -14, -12, -12, beta=0.5, nll=0.2)[0] == pytest.approx(0.126928 + 0.5, abs=1e-6)


def test_the_reference_gets_no_gradient():
    chosen, rejected = torch.tensor([-10.0], requires_grad=True), torch.tensor([-14.0], requires_grad=True)
    losses, chosen_rewards, _ = dpo_loss(chosen, rejected, torch.tensor([-12.0]), torch.tensor([-12.0]), torch.tensor([4]), beta=0.5)
    losses.sum().backward()
    assert chosen.grad.item() == pytest.approx(-0.5 * (1 - 0.880797), abs=1e-6)  # -β σ(-margin)
    assert rejected.grad.item() == pytest.approx(0.5 * (1 - 0.880797), abs=1e-6)
    assert not chosen_rewards.requires_grad
