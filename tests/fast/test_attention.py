"""The fast attention within a tree, in blocks and through flex_attention, against the plain one."""
import random
from functools import partial

import pytest
import torch
import torch.nn.attention.flex_attention as flex

import model as plain
from checkpoint import load_model
from fast import flex as flex_module
from fast.attention import TreeAttention
from fast.flex import FlexTreeAttention, MaskedTreeAttention, compiled_flex_attention, flex_mask
from model import Decoder, Tree
from test_model import family_tree, gradients, logits_of, random_ids


def blocked_logits(model: Decoder, tree: Tree, block: int) -> torch.Tensor:
    return model.logits(model(tree.ids, tree.positions, TreeAttention(tree.end, block=block)))


def long_tree(seed: int, most: int) -> Tree:
    """Up to ten branches, of up to `most` tokens each, off one another."""
    rng = random.Random(seed)
    sequences = [random_ids(rng.randrange(1, 2 * most), seed)]
    for i in range(rng.randrange(10)):
        parent = rng.choice(sequences)
        sequences.append(parent[:rng.randrange(len(parent) + 1)] + random_ids(rng.randrange(1, most), 100 * seed + i))
    return Tree(sequences)


@pytest.mark.parametrize("seed", range(12))
def test_the_fast_attention_is_the_plain_one(seed):
    """Outputs and gradients over random trees, in fp64, to 1e-9."""
    rng = random.Random(seed)
    tree = long_tree(seed, rng.choice([3, 40, 150]))
    KV = rng.choice([1, 2, 3])
    H = KV * rng.choice([1, 3])
    leaves = [torch.randn(len(tree), heads, 8, dtype=torch.float64, requires_grad=True) for heads in (H, KV, KV)]
    grad = torch.randn(len(tree), H, 8, dtype=torch.float64)
    found, expected = (attention(tree.end)(0, *leaves) for attention in (TreeAttention, plain.tree_attention))
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    for ours, theirs in zip(*(torch.autograd.grad(out, leaves, grad) for out in (found, expected))):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("block", [1, 7, 256])
def test_the_block_size_changes_nothing(tiny_folder, block):
    model = load_model(tiny_folder, torch.float64)
    tree = Tree(family_tree() + [random_ids(100, seed) for seed in (8, 9)])
    assert len(tree) > 256
    with torch.no_grad():
        torch.testing.assert_close(blocked_logits(model, tree, block), logits_of(model, tree), atol=1e-9, rtol=0)


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
    monkeypatch.setattr(flex_module, "compiled_flex_attention", lambda: flex.flex_attention)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_decoder_through_flex_attention(flex_on_cpu, tiny_folder):
    """With and without checkpointing: the gradients are those of the other path."""
    model, tree = load_model(tiny_folder, torch.float64), Tree(family_tree())
    expected = gradients(model, logits_of(model, tree).pow(2).sum())
    for model.checkpoint_activations in (False, True):
        found = gradients(model, model.logits(model(tree.ids, tree.positions, FlexTreeAttention(tree.end))).pow(2).sum())
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], atol=1e-9, rtol=1e-9, msg=name)


def test_what_runs_chooses_the_attention_on_a_gpu():
    """Prefill, in inference mode, takes the whole mask; training, and what must round as training does, takes flex_attention."""
    end = long_tree(0, 120).end
    with torch.inference_mode():
        assert type(flex_module.tree_attention(end, 3)) is MaskedTreeAttention
    with torch.no_grad():
        assert type(flex_module.tree_attention(end, 3)) is FlexTreeAttention


@pytest.mark.parametrize("seed, past", [(0, 0), (3, 1), (4, 129)])
def test_the_whole_mask_gives_what_blocks_give(seed, past):
    tree = long_tree(seed, 120)
    q, k, v = (torch.randn(len(tree), heads, 16, dtype=torch.float64) for heads in (4, 2, 2))
    before = tuple(torch.randn(2, past, 16, dtype=torch.float64) for _ in range(2)) if past else None
    found, expected = (kind(tree.end, past)(0, q, k, v, past=before) for kind in (MaskedTreeAttention, TreeAttention))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)


@pytest.mark.slow
def test_flex_attention_under_autocast(flex_on_cpu, tiny_folder):
    """bf16 products over fp32 weights, as training on CUDA has them."""
    model, tree = load_model(tiny_folder), Tree(family_tree())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = (model(tree.ids, tree.positions, attention(tree.end)) for attention in (FlexTreeAttention, TreeAttention))
    assert (found - expected).std() < 0.02 * expected.std()
