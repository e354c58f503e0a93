"""The decoder against Transformers, and trees of tokens against their sequences one by one."""
import json
import random
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.attention.flex_attention as flex
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

import model as model_module

from checkpoint import load_model, load_tokenizer
from conftest import FAMILIES, LLAMA3_ROPE, make_config
from model import (Decoder, FlexTreeAttention, RMSNorm, SwiGLU, Tree, TreeAttention, common_prefix, compiled_flex_attention, flex_mask,
                   tree_attention)

EVERY_MODEL = [(family, tied) for family in FAMILIES for tied in (True, False)]


# ---------------------------------------------------------------------------------------------- helpers

def logits_of(model: Decoder, tree: Tree, **options) -> torch.Tensor:
    """Logits at every token of a tree: (T, V)."""
    return model.logits(model(tree.ids, tree.positions, TreeAttention(tree.end, **options)))


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

@pytest.mark.parametrize("dialect", ["rope_theta", "rope_parameters"])
@pytest.mark.parametrize("family, tied", EVERY_MODEL)
def test_logits_equal_transformers(make_folder, tmp_path, family, tied, dialect):
    """Every family, head and dialect of config.json; a sequence alone, and many packed in one tree."""
    folder = make_folder(family, tied)
    if dialect == "rope_parameters":  # as Transformers 5 itself writes it
        folder = shutil.copytree(folder, tmp_path / "checkpoint")
        AutoConfig.from_pretrained(folder).save_pretrained(folder)
        raw = json.loads((folder / "config.json").read_text())
        assert "rope_theta" not in raw and raw["rope_parameters"]["rope_theta"] == FAMILIES[family]["rope_theta"]
    model, reference = load_model(folder), reference_model(folder)
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
        ours = model.logits(model(ids, positions, TreeAttention(Tree([ids.tolist()]).end)))
        expected = reference(ids[None], position_ids=positions[None]).logits[0]
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_the_families_differ_where_they_should():
    """The tests' own models: the rope scaling, the biases and the head size are really in play."""
    assert make_config("qwen3", True)["head_dim"] != 64 // 4
    turns = [LLAMA3_ROPE["original_max_position_embeddings"] * 500.0 ** (-i / 8) / 6.2832 for i in range(8)]
    assert max(turns) > LLAMA3_ROPE["high_freq_factor"] and min(turns) < LLAMA3_ROPE["low_freq_factor"]
    assert any(LLAMA3_ROPE["low_freq_factor"] < t < LLAMA3_ROPE["high_freq_factor"] for t in turns)


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 5e-5), (torch.float32, 2e-4)], ids=["fp64", "fp32"])
def test_smollm2_logits_equal_transformers_on_real_prompts(smollm2, processbench, dtype, atol):
    """20 ProcessBench problems with their first step, in the model's own chat format: one tree against 20 single runs.

    In fp64 what is left is RoPE's tables, fp32 on both sides. In fp32 both have noise: Transformers is up to 9.5e-5 from itself in fp64,
    and ours 1.5e-4.
    """
    tokenizer, model, reference = load_tokenizer(smollm2), load_model(smollm2, dtype), reference_model(smollm2).to(dtype)
    rows = sorted(processbench, key=lambda row: len(row["problem"] + row["steps"][0]))[:20]
    prompts = [tokenizer.chat(f"Problem: {row['problem']}\nStep: {row['steps'][0]}\nIs the step correct?") for row in rows]
    assert len(set(map(tuple, prompts))) == 20
    tree = Tree(prompts)
    assert len(tree) < sum(map(len, prompts))  # they share the system message
    with torch.no_grad():
        hidden = model(tree.ids, tree.positions, TreeAttention(tree.end))
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
    prefix_at = {place: tuple(s[:n + 1]) for s, path in zip(sequences, tree.paths) for n, place in enumerate(path.tolist())}
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


@pytest.mark.parametrize("family, tied", [("qwen2", True), ("qwen3", False)])
def test_packed_gradients_equal_separate_ones(make_folder, family, tied):
    """In fp64, loss and gradients of a tree are those of its sequences one by one."""
    model = load_model(make_folder(family, tied), torch.float64)
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


@pytest.mark.parametrize("block", [1, 7, 256])
def test_the_block_size_changes_nothing(tiny_folder, block):
    model = load_model(tiny_folder, torch.float64)
    tree = Tree(family_tree() + [random_ids(100, seed) for seed in (8, 9)])
    assert len(tree) > 256
    with torch.no_grad():
        torch.testing.assert_close(logits_of(model, tree, block=block), logits_of(model, tree, block=len(tree)), atol=1e-9, rtol=0)


def test_a_block_meets_only_keys_that_it_can_see(monkeypatch):
    """What makes a tree cheap: the keys of branches that are over are not even read, and those that all see not by each block."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    attention = TreeAttention(Tree([[0] * 4 + [branch] * 4 for branch in range(1, 6)]).end, block=4)
    assert (attention.shared, attention.first, attention.splits, len(attention.blocks)) == (4, 4, 5, 6)
    for start, stop, seen, mask in attention.blocks:
        assert seen.tolist() == list(range(start, stop))
        assert (mask == 0).any(-2).all() and (mask == 0).any(-1).all()


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("seed, past", [(0, 0), (1, 0), (2, 3), (3, 70), (6, 0)])
def test_tree_attention_is_one_softmax_over_what_a_token_sees(monkeypatch, threads, seed, past):
    """In fp64, with its gradients, against all scores written down and masked by the tree's rule; shared keys met in 1 to 7 splits."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    end = long_tree(seed, 150).end if seed else Tree([random_ids(40)]).end
    T, generator = len(end), torch.Generator().manual_seed(seed)
    attention = TreeAttention(end, past, block=32)
    assert (attention.shared > 0) == (attention.first < T) == (seed > 0)  # the others share something
    q, k, v, before_k, before_v, grad = (torch.randn(n, heads, 8, dtype=torch.float64, generator=generator, requires_grad=True)
                                         for n, heads in ((T, 6), (T, 2), (T, 2), (past, 2), (past, 2), (T, 6)))
    found = attention(0, q, k, v, past=(before_k.transpose(0, 1), before_v.transpose(0, 1)))
    ends, places = torch.cat((end.new_full((past,), T), end)) + past, torch.arange(past + T)
    seen = (places <= places[past:, None]) & (places[past:, None] < ends)  # (T, past + T)
    all_k, all_v = (torch.cat(pair).repeat_interleave(3, dim=1) for pair in ((before_k, k), (before_v, v)))
    scores = torch.einsum("qhd,khd->hqk", q, all_k) / 8 ** 0.5
    expected = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), all_v)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    inputs = (q, k, v, before_k, before_v)
    for ours, theirs in zip(torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad)):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("block", [7, 256])
def test_a_past_gives_what_the_whole_tree_gives(tiny_folder, block):
    """Keys and values of a shared beginning, computed once, stand in for its tokens."""
    model = load_model(tiny_folder, torch.float64)
    beginning, rests = random_ids(33), [s + [399] for s in family_tree()]
    whole, rest, kept = Tree([beginning + s for s in rests]), Tree(rests), []
    alone = TreeAttention(Tree([beginning]).end)

    def keeping(layer, q, k, v):
        kept.append((k.transpose(0, 1), v.transpose(0, 1)))  # (KV, T, D)
        return alone(layer, q, k, v)

    with torch.no_grad():
        model(torch.tensor(beginning), torch.arange(33), keeping)
        attention = TreeAttention(rest.end, past=33, block=block)
        continued = model(rest.ids, rest.positions + 33, lambda layer, q, k, v: attention(layer, q, k, v, past=kept[layer]))
        expected = model(whole.ids, whole.positions, TreeAttention(whole.end))
    assert len(rest) == len(whole) - 33
    for path, path_in_whole in zip(rest.paths, whole.paths):
        torch.testing.assert_close(continued[path], expected[path_in_whole[33:]], atol=1e-9, rtol=0)


# ---------------------------------------------------------------------------------------------- flex_attention, as on a GPU

@pytest.fixture
def flex_on_cpu(monkeypatch):
    """flex_attention without the compiler, and with the backward pass that PyTorch refuses to start on a CPU."""
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(model_module, "compiled_flex_attention", lambda: flex.flex_attention)


def long_tree(seed: int, most: int) -> Tree:
    """Up to ten branches, of up to `most` tokens each, off one another."""
    rng = random.Random(seed)
    sequences = [random_ids(rng.randrange(1, 2 * most), seed)]
    for i in range(rng.randrange(10)):
        parent = rng.choice(sequences)
        sequences.append(parent[:rng.randrange(len(parent) + 1)] + random_ids(rng.randrange(1, most), 100 * seed + i))
    return Tree(sequences)


@pytest.mark.parametrize("seed, past", [(0, 0), (1, 0), (2, 0), (3, 1), (4, 129), (5, 300)])
def test_flex_attention_gives_what_blocks_give(flex_on_cpu, seed, past):
    """Outputs and gradients, of the past too, in fp64; 4 heads share 2 of keys and values."""
    tree, found = long_tree(seed, 120), []
    shapes = [(len(tree), 4, 16), (len(tree), 2, 16), (len(tree), 2, 16)] + [(2, past, 16)] * (2 if past else 0)
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    weights = torch.randn(len(tree), 4, 16, dtype=torch.float64)
    for attention in (TreeAttention, FlexTreeAttention):
        q, k, v, *before = leaves = [x.clone().requires_grad_() for x in inputs]
        out = attention(tree.end, past)(0, q, k, v, past=before or None)
        found.append([out, *torch.autograd.grad((out * weights).sum(), leaves)])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-9)


EDGES = [[[1] * 255, [1] * 127 + [2] * 40], [[1] * 256, [1] * 128 + [2] * 40], [[1] * 257, [1] * 129 + [2] * 40], [[1] * 128], [[1]]]


@pytest.mark.parametrize("past", [0, 1, 128, 500])
@pytest.mark.parametrize("tree", [long_tree(seed, 300) for seed in range(4)] + [Tree(sequences) for sequences in EDGES])
def test_the_block_mask_lists_what_is_seen(tree, past):
    """Token by token: a block that is not listed is seen by nobody, one listed as full by everybody. The kernels trust the lists."""
    T, mask = len(tree), flex_mask(tree.end, past)
    queries, keys = mask.shape[-2:]
    assert T <= queries < max(129, 2 * T) and past + T <= keys < max(129, 2 * (past + T))
    q, j = torch.arange(queries)[:, None], torch.arange(keys)
    end = torch.cat((torch.full((past,), T), tree.end, torch.zeros(keys - past - T, dtype=torch.int64)))
    seen = ((j < past) | (j - past <= q)) & (q < end)
    assert torch.equal(mask.mask_mod(0, 0, q, j), seen)
    blocks = seen.view(queries // 128, 128, keys // 128, 128).permute(0, 2, 1, 3).flatten(2)
    full, partial = listed(mask.full_kv_num_blocks, mask.full_kv_indices), listed(mask.kv_num_blocks, mask.kv_indices)
    assert torch.equal(full, blocks.all(-1)) and not (full & partial).any()
    assert not (blocks.any(-1) & ~full & ~partial).any()
    assert (partial & ~blocks.any(-1)).sum() <= len(partial)  # at most one for each block of queries is looked at in vain
    assert torch.equal(listed(mask.q_num_blocks, mask.q_indices), partial.T)
    assert torch.equal(listed(mask.full_q_num_blocks, mask.full_q_indices), full.T)


def listed(numbers: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """A block mask's list as a table: (rows of blocks, columns) bool."""
    table = torch.zeros(indices.shape[-2:], dtype=torch.bool)
    for row, (n, columns) in enumerate(zip(numbers[0, 0].tolist(), indices[0, 0].tolist())):
        table[row, columns[:n]] = True
    return table


def test_a_block_mask_leaves_out_the_branches_that_are_over():
    """Ten responses below one prompt: a response does not look at its siblings."""
    tree = Tree([[0] * 128 + [1 + i] * 128 for i in range(10)])
    mask = flex_mask(tree.end, 0)
    assert mask.shape[-2:] == (2048, 2048)
    assert mask.kv_num_blocks.sum() == 11 and mask.full_kv_num_blocks.sum() == 10  # the diagonal, and the prompt under each response


def test_trees_of_like_lengths_share_what_is_compiled(monkeypatch):
    """A new tree, and another past, are other tensors and no other program."""
    compiled = []
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=lambda graph, inputs: compiled.append(graph) or graph.forward))
    compiled_flex_attention.cache_clear()
    for seed, past in ((0, 0), (1, 0), (1, 20), (2, 35)):
        end = Tree([random_ids(140, seed), random_ids(70 + seed, seed)[:60] + [400 + seed]]).end
        q, k, v, *before = torch.randn(len(end), 4, 16), *torch.randn(2, len(end), 2, 16), *torch.randn(2, 2, past, 16)
        torch.testing.assert_close(FlexTreeAttention(end, past)(0, q, k, v, past=before), TreeAttention(end, past)(0, q, k, v, past=before))
    compiled_flex_attention.cache_clear()
    assert len(compiled) == 1


def test_the_device_chooses_the_attention(flex_on_cpu, tiny_folder, monkeypatch):
    """The whole decoder through flex_attention, with and without checkpointing: the gradients are those of the other path."""
    model, tree, kinds = load_model(tiny_folder, torch.float64), Tree(family_tree()), []
    cuda_end = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(model_module, "flex_mask", lambda end, past: kinds.append((end, past)))
    assert type(tree_attention(tree.end)) is TreeAttention and type(tree_attention(cuda_end, 3)) is FlexTreeAttention
    assert kinds == [(cuda_end, 3)]
    monkeypatch.setattr(model_module, "flex_mask", flex_mask)
    expected = gradients(model, logits_of(model, tree).pow(2).sum())
    for model.checkpoint_activations in (False, True):
        found = gradients(model, model.logits(model(tree.ids, tree.positions, FlexTreeAttention(tree.end))).pow(2).sum())
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], atol=1e-9, rtol=1e-9, msg=name)


def test_flex_attention_under_autocast(flex_on_cpu, tiny_folder):
    """bf16 products over fp32 weights, as training on CUDA has them."""
    model, tree = load_model(tiny_folder), Tree(family_tree())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = (model(tree.ids, tree.positions, attention(tree.end)) for attention in (FlexTreeAttention, TreeAttention))
    assert (found - expected).std() < 0.02 * expected.std()


# ---------------------------------------------------------------------------------------------- the rest of the decoder

def test_activation_checkpointing_changes_no_gradient(tiny_folder):
    model, tree, calls = load_model(tiny_folder, torch.float64), Tree(family_tree()), []
    attention = TreeAttention(tree.end)

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


@pytest.mark.parametrize("checkpointed", [False, True])
def test_wanted_tokens_are_computed_as_among_all(tiny_folder, checkpointed):
    """Their hidden states, in the order asked for, and the gradients of all weights."""
    model, tree = load_model(tiny_folder, torch.float64), Tree(family_tree())
    model.checkpoint_activations = checkpointed
    wanted, found = torch.tensor([len(tree) - 1, 3, 3, 0]), []
    attention, rows = TreeAttention(tree.end), []
    model.layers[-1].mlp.register_forward_hook(lambda mlp, given, out: rows.append(len(out)))
    for hidden in (model(tree.ids, tree.positions, attention, wanted), model(tree.ids, tree.positions, attention)[wanted]):
        found.append({"hidden": hidden.detach()} | gradients(model, model.logits(hidden).pow(2).sum()))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], atol=1e-9, rtol=1e-9, msg=name)
    assert rows[:2] == [4, len(tree)]


def test_norms_are_taken_in_fp32():
    """In a bf16 model the result is the exact one, rounded once."""
    norm = RMSNorm(512, 1e-6).to(torch.bfloat16)
    x = (torch.randn(64, 512) * 30).to(torch.bfloat16)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        expected = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
        assert norm(x).dtype == torch.bfloat16
        assert torch.equal(norm(x), expected.to(torch.bfloat16))


def test_gradients_written_by_hand_are_those_of_autograd():
    """On CPU, RMSNorm and SwiGLU (300 rows: more than it takes at a time) have backward passes of their own."""
    torch.manual_seed(0)
    x, scale = torch.randn(300, 16, dtype=torch.float64, requires_grad=True), torch.rand(16, dtype=torch.float64)
    norm = RMSNorm(16, 1e-2).double()
    with torch.no_grad():
        norm.weight.copy_(scale)
    weight = norm.weight
    grad = torch.randn(300, 16, dtype=torch.float64)
    ours, plain = norm(x), F.rms_norm(x, (16,), weight, 1e-2)
    torch.testing.assert_close(ours, plain)
    for found, expected in zip(*(torch.autograd.grad(y, (x, weight), grad) for y in (ours, plain))):
        torch.testing.assert_close(found, expected)
    ours, plain = SwiGLU.apply(x), F.silu(x[:, :8]) * x[:, 8:]
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, grad[:, :8])[0] for y in (ours, plain)))


def test_bf16_stays_near_fp32(tiny_folder):
    """At position 4000 too: angles taken in bf16 would be off by whole turns."""
    narrow, wide = load_model(tiny_folder, torch.bfloat16), load_model(tiny_folder)
    tree = Tree(family_tree())
    with torch.no_grad():
        far = [m.logits(m(tree.ids, tree.positions + 4000, TreeAttention(tree.end))).float() for m in (narrow, wide)]
    assert (far[0] - far[1]).std() < 0.1 * far[1].std()


def test_initial_weights_depend_on_the_generator_alone(tiny_folder):
    models = []
    for seed in (0, 0, 1):
        models.append(load_model(tiny_folder))
        models[-1].init_weights(torch.Generator().manual_seed(seed))
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
