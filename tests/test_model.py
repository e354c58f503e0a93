"""The decoder against Transformers, and trees of tokens against their sequences one by one."""
import json
import random
import shutil

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import fast
from checkpoint import load_model, load_tokenizer
from checkpoint.scratch import init_weights
from conftest import FAMILIES, LLAMA3_ROPE, make_config
from model import Decoder, RMSNorm, Tree, common_prefix, tree_attention

EVERY_MODEL = [(family, tied) for family in FAMILIES for tied in (True, False)]


# ---------------------------------------------------------------------------------------------- helpers

def logits_of(model: Decoder, tree: Tree) -> torch.Tensor:
    """Logits at every token of a tree: (T, V)."""
    return model.logits(model(tree.ids, tree.positions, model.tree_attention(tree.end)))


def reference_model(folder) -> torch.nn.Module:
    """The folder as Transformers reads it, in fp32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def random_ids(n: int, seed: int = 0, vocab: int = 400) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(vocab) for _ in range(n)]


def family_tree() -> list[list[int]]:
    """Sequences with shared prefixes of several depths, a prefix of another, two equal ones and one alone."""
    a = random_ids(90)
    return [a[:60] + random_ids(9, 1), a[:60] + random_ids(30, 2), a, a[:75], random_ids(40, 3), a[:20] + random_ids(25, 4), a[:75]]


def random_sequences(seed: int) -> list[list[int]]:
    """Sequences over two tokens, so that prefixes of every kind are met."""
    rng = random.Random(seed)
    return [[rng.randrange(2) for _ in range(rng.randrange(1, 9))] for _ in range(rng.randrange(1, 12))]


def prefixes(sequences: list[list[int]]) -> set[tuple[int, ...]]:
    """The nodes of the sequences' trie, counted in the plainest way."""
    return {tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)}


# ---------------------------------------------------------------------------------------------- against Transformers

@pytest.mark.parametrize("prepare", [nn.Module.eval, fast.speed_up], ids=["plain", "fast"])
@pytest.mark.parametrize("dialect", ["rope_theta", "rope_parameters"])
@pytest.mark.parametrize("family, tied", EVERY_MODEL)
def test_logits_equal_transformers(make_folder, tmp_path, family, tied, dialect, prepare):
    """Every family, head and dialect of config.json; a sequence alone, and many packed in one tree."""
    folder = make_folder(family, tied)
    if dialect == "rope_parameters":  # as Transformers 5 itself writes it
        folder = shutil.copytree(folder, tmp_path / "checkpoint")
        AutoConfig.from_pretrained(folder).save_pretrained(folder)
        raw = json.loads((folder / "config.json").read_text())
        assert "rope_theta" not in raw and raw["rope_parameters"]["rope_theta"] == FAMILIES[family]["rope_theta"]
    model, reference = prepare(load_model(folder)), reference_model(folder)
    sequences = family_tree()
    tree = Tree(sequences)
    with torch.no_grad():
        packed = logits_of(model, tree)
        for ids, path in zip(sequences, tree.paths):
            expected = reference(torch.tensor([ids])).logits[0]
            assert expected.std() > 0.5  # logits near 0 would agree however wrong
            torch.testing.assert_close(packed[path], expected, atol=1e-4, rtol=0)
            torch.testing.assert_close(logits_of(model, Tree([ids])), expected, atol=1e-4, rtol=0)


def test_logits_equal_transformers_on_a_padded_batch(tiny_folder):
    """Our side has no padding; the reference's batch is padded on the right, with the mask that says so."""
    model, reference = load_model(tiny_folder), reference_model(tiny_folder)
    sequences = family_tree()
    tree, longest = Tree(sequences), max(map(len, sequences))
    ids = torch.tensor([s + [2] * (longest - len(s)) for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences])
    with torch.no_grad():
        packed, expected = logits_of(model, tree), reference(ids, attention_mask=mask).logits
    for path, row in zip(tree.paths, expected):
        torch.testing.assert_close(packed[path], row[:len(path)], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "llama3_rope"])
def test_far_positions_equal_transformers(make_folder, family):
    """Position 3001 has no place in bf16, and its angle is a thousand turns: a table that is a little off shows here."""
    model, reference = load_model(make_folder(family)), reference_model(make_folder(family))
    ids, positions = torch.tensor(random_ids(60)), torch.arange(60) * 51 + 1
    with torch.no_grad():
        ours = model.logits(model(ids, positions, tree_attention(Tree([ids.tolist()]).end)))
        expected = reference(ids[None], position_ids=positions[None]).logits[0]
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_the_families_differ_where_they_should():
    """The tests' own models: the rope scaling, the biases and the head size are really in play."""
    assert make_config("qwen3", True)["head_dim"] != 64 // 4
    turns = [LLAMA3_ROPE["original_max_position_embeddings"] * 500.0 ** (-i / 8) / 6.2832 for i in range(8)]
    assert max(turns) > LLAMA3_ROPE["high_freq_factor"] and min(turns) < LLAMA3_ROPE["low_freq_factor"]
    assert any(LLAMA3_ROPE["low_freq_factor"] < t < LLAMA3_ROPE["high_freq_factor"] for t in turns)


@pytest.mark.parametrize("dtype, atol, n", [(torch.float64, 5e-5, 8), (torch.float32, 2e-4, 20)], ids=["fp64", "fp32"])
def test_smollm2_logits_equal_transformers_on_real_prompts(smollm2, processbench, dtype, atol, n):
    """20 ProcessBench problems with their first step, in the model's own chat format: one tree against 20 single runs (fp64: 8).

    In fp64 what is left is RoPE's tables, fp32 on both sides. In fp32 both have noise: Transformers is up to 9.5e-5 from itself in fp64,
    and ours 1.5e-4.
    """
    tokenizer, model, reference = load_tokenizer(smollm2), load_model(smollm2, dtype), reference_model(smollm2).to(dtype)
    rows = sorted(processbench, key=lambda row: len(row["problem"] + row["steps"][0]))[:n]
    prompts = [tokenizer.chat(f"Problem: {row['problem']}\nStep: {row['steps'][0]}\nIs the step correct?") for row in rows]
    assert len(set(map(tuple, prompts))) == n
    tree = Tree(prompts)
    assert len(tree) < sum(map(len, prompts))  # they share the system message
    with torch.no_grad():
        hidden = model(tree.ids, tree.positions, tree_attention(tree.end))
        for ids, path in zip(prompts, tree.paths):
            expected = reference(torch.tensor([ids])).logits[0]
            torch.testing.assert_close(model.logits(hidden[path]), expected, atol=atol, rtol=0)


# ---------------------------------------------------------------------------------------------- trees

@pytest.mark.parametrize("seed", range(30))
def test_a_tree_is_the_trie_of_its_sequences(seed):
    sequences = random_sequences(seed)
    tree = Tree(sequences)
    assert len(tree) == len(tree.ids) == len(tree.positions) == len(tree.end) == len(prefixes(sequences))
    for sequence, path in zip(sequences, tree.paths, strict=True):
        assert tree.ids[path].tolist() == sequence
        assert tree.positions[path].tolist() == list(range(len(sequence)))


@pytest.mark.parametrize("seed", range(30))
def test_a_token_sees_its_own_prefix_and_nothing_else(seed):
    sequences = random_sequences(seed)
    tree = Tree(sequences)
    prefix_at = {index: tuple(s[:n + 1]) for s, path in zip(sequences, tree.paths) for n, index in enumerate(path.tolist())}
    for q in range(len(tree)):
        for j in range(len(tree)):
            sees = prefix_at[q][:len(prefix_at[j])] == prefix_at[j]
            assert (j <= q < int(tree.end[j])) == sees


def test_a_tree_of_one_sequence_is_causal():
    tree = Tree([[5, 5, 7]])
    assert (tree.ids.tolist(), tree.positions.tolist(), tree.end.tolist()) == ([5, 5, 7], [0, 1, 2], [3, 3, 3])


def test_equal_sequences_stand_once():
    tree = Tree([[1, 2, 3], [1, 2], [1, 2, 3]])
    assert len(tree) == 3
    assert [path.tolist() for path in tree.paths] == [[0, 1, 2], [0, 1], [0, 1, 2]]


def test_common_prefix():
    for a, b, n in (([], [1], 0), ([1, 2], [1, 2], 2), ([1, 2], [1, 2, 3], 2), ([1, 9, 3], [1, 2, 3], 1), ([4], [5], 0)):
        assert common_prefix(torch.tensor(a).numpy(), torch.tensor(b).numpy()) == n


# ---------------------------------------------------------------------------------------------- attention over trees

def weighted_loss(logits: torch.Tensor, ids: list[int], weights: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of a sequence's tokens, weighted so that no two of them can be exchanged."""
    logprobs = logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids)[1:, None])[:, 0]
    return (logprobs * weights[:len(logprobs)]).sum()


def gradients(model: Decoder, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, parameters)))


@pytest.mark.parametrize("prepare", [nn.Module.eval, fast.speed_up], ids=["plain", "fast"])
@pytest.mark.parametrize("family, tied", [("qwen2", True), ("qwen3", False)])
def test_packed_gradients_equal_separate_ones(make_folder, family, tied, prepare):
    """In fp64, loss and gradients of a tree are those of its sequences one by one."""
    model = prepare(load_model(make_folder(family, tied), torch.float64))
    sequences = family_tree()
    weights = torch.rand(len(sequences), 100, dtype=torch.float64)
    tree = Tree(sequences)
    packed = logits_of(model, tree)
    loss = sum(weighted_loss(packed[path], s, w) for s, path, w in zip(sequences, tree.paths, weights))
    separate = sum(weighted_loss(logits_of(model, Tree([s])), s, w) for s, w in zip(sequences, weights))
    torch.testing.assert_close(loss, separate, atol=1e-9, rtol=1e-12)
    expected = gradients(model, separate)
    for name, gradient in gradients(model, loss).items():
        assert expected[name].abs().max() > 1e-3, name
        torch.testing.assert_close(gradient, expected[name], atol=1e-9, rtol=1e-9, msg=name)


# ---------------------------------------------------------------------------------------------- the rest of the decoder

def test_activation_checkpointing_changes_no_gradient(tiny_folder):
    model, tree, calls = load_model(tiny_folder, torch.float64), Tree(family_tree()), []
    attention = tree_attention(tree.end)

    def counting(layer, q, k, v):
        calls.append(layer)
        return attention(layer, q, k, v)

    def backward(on: bool) -> tuple[list[int], dict]:
        calls.clear()
        model.checkpoint_activations = on
        hidden = model(tree.ids, tree.positions, counting)
        found = gradients(model, model.logits(hidden).pow(2).sum())
        return list(calls), found

    plain_calls, plain = backward(False)
    calls_again, checkpointed = backward(True)
    assert plain_calls == [0, 1] and calls_again == [0, 1, 1, 0]  # each layer is computed once more, last to first
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], atol=1e-9, rtol=1e-9, msg=name)


def test_norms_are_taken_in_fp32():
    """In a bf16 model the result is the exact one, rounded once."""
    norm = RMSNorm(512, 1e-6).to(torch.bfloat16)
    x = (torch.randn(64, 512) * 30).to(torch.bfloat16)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        expected = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
        assert norm(x).dtype == torch.bfloat16
        assert torch.equal(norm(x), expected.to(torch.bfloat16))


def test_bf16_stays_near_fp32(tiny_folder):
    """At position 4000 too: angles taken in bf16 would be off by whole turns."""
    narrow, wide = load_model(tiny_folder, torch.bfloat16), load_model(tiny_folder)
    tree = Tree(family_tree())
    with torch.no_grad():
        far = [m.logits(m(tree.ids, tree.positions + 4000, tree_attention(tree.end))).float() for m in (narrow, wide)]
    assert (far[0] - far[1]).std() < 0.1 * far[1].std()


def test_initial_weights_depend_on_the_generator_alone(tiny_folder):
    models = []
    for seed in (0, 0, 1):
        models.append(load_model(tiny_folder))
        init_weights(models[-1], torch.Generator().manual_seed(seed))
    first, again, other = (dict(m.named_parameters()) for m in models)
    for name, p in first.items():
        assert torch.equal(p, again[name])
        if name.endswith("norm.weight"):
            assert (p == 1).all()
        elif name.endswith("bias"):
            assert (p == 0).all()
        else:
            std = 0.02 / 2 if name.endswith(("attention.out.weight", "mlp.down.weight")) else 0.02  # 1 / sqrt(2 * 2 layers)
            assert not torch.equal(p, other[name]) and abs(p.std() / std - 1) < 0.1
