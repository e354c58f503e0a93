"""Packing examples into trees: nothing lost, nothing too large, and the same numbers as one sequence at a time."""
import os.path
import random

import pytest
import torch
import torch.nn.functional as F

import train_dpo
import train_sft
from checkpoint import load_model
from data import make_micro_batch, pack
from rprm import response_logprobs
from test_training import dpo_config, metrics, pair_rows, sft_config, sft_rows, write
from plumbing.run import Run


def random_units(seed, n=24, longest=40):
    """Prompts that share instructions, problems and steps, as R-PRM's do; one or two responses that share beginnings."""
    rng = random.Random(seed)
    words = lambda most: [rng.randrange(3, 8) for _ in range(rng.randint(1, most))]  # few different tokens: prefixes meet by chance too
    instructions, problems = words(longest), [words(longest // 2) for _ in range(4)]
    units = {}
    for i in rng.sample(range(100), n):
        prompt = instructions + rng.choice(problems) + words(4)
        first = words(longest // 2)
        second = first[:rng.randint(0, len(first))] + words(5)
        units[i] = (prompt, [first, second] if seed % 2 else [first])
    return units


# ---------------------------------------------------------------------------------------------- what is packed

@pytest.mark.parametrize("seed", range(12))
def test_every_example_is_in_one_tree_no_tree_is_too_large_and_the_largest_comes_first(seed):
    units = random_units(seed)
    for micro_tokens in (16, 40, 70, 200, 10_000):
        sizes = {i: len(prompt) + sum(map(len, responses)) for i, (prompt, responses) in units.items()}
        fitting = {i: units[i] for i, size in sizes.items() if size <= micro_tokens}
        if len(fitting) < len(units):
            with pytest.raises(AssertionError, match=f"has {max(sizes.values())} tokens"):
                pack(units, micro_tokens)
        batches = pack(fitting, micro_tokens)
        assert sorted([i for batch in batches for i in batch.examples]) == sorted(fitting)
        trees = [len(batch.tree) for batch in batches]
        assert all(0 < size <= micro_tokens for size in trees) and trees == sorted(trees, reverse=True)
        kept = [units[i] for batch in batches for i in batch.examples]
        assert sum(len(batch.tree) for batch in batches) <= sum(len(prompt) + sum(map(len, responses)) for prompt, responses in kept)


@pytest.mark.parametrize("seed", range(6))
def test_the_sequences_of_a_tree_are_the_examples_uncut(seed):
    """Along each path stand the prompt and the response, with the response's position and length as noted."""
    units = random_units(seed)
    for batch in pack(units, 200):
        expected = [(prompt, response) for i in batch.examples for prompt, responses in [units[i]] for response in responses]
        assert len(expected) == len(batch.tree.paths) == len(batch.starts) == len(batch.lengths)
        for (prompt, response), path, start, length in zip(expected, batch.tree.paths, batch.starts, batch.lengths):
            ids = batch.tree.ids[path].tolist()
            assert (ids[:start], ids[start:], length) == (prompt, response, len(response))
            assert batch.tree.positions[path].tolist() == list(range(len(path)))


@pytest.mark.parametrize("seed", range(6))
def test_a_token_sees_its_own_sequence_and_nothing_else(seed):
    """From the rule j <= q < end[j]: each token sees exactly the tokens before it on its path."""
    [batch] = pack(random_units(seed), 10_000)
    place = torch.arange(len(batch.tree))
    for path in batch.tree.paths:
        for n, q in enumerate(path):
            seen = place[(place <= q) & (q < batch.tree.end)]
            assert seen.tolist() == path[:n + 1].tolist()


def test_the_order_in_which_examples_come_changes_no_tree():
    units = random_units(1)
    found = []
    for order in (list(units), sorted(units), sorted(units, reverse=True)):
        found.append([(batch.examples, batch.starts, batch.tree.ids.tolist()) for batch in pack({i: units[i] for i in order}, 100)])
    assert found[0] == found[1] == found[2]


def test_shared_prompts_are_computed_once():
    """Ten cases under the same 50 tokens of instructions: 50 + 10 · (5 + 6), against 10 · 61 apart."""
    units = {i: ([3] * 50 + [10 + i] * 5, [[4] * 6]) for i in range(10)}
    [batch] = pack(units, 1000)
    assert len(batch.tree) == 160
    trees = pack(units, 61)  # room for one case at a time
    assert [len(b.tree) for b in trees] == [61] * 10
    assert [len(b.tree) for b in pack(units, 72)] == [72] * 5


def fill_by_search(units, micro_tokens):
    """The examples of each tree, by trying every limit from the lowest on. Sizes are sums over plain lists."""
    order = sorted(units, key=lambda i: units[i])

    def size(numbers):
        sequences = [units[i][0] + units[i][1][0] for i in numbers]
        shared = sum(len(os.path.commonprefix([a, b])) for a, b in zip(sequences, sequences[1:]))
        return sum(len(units[i][0]) + sum(map(len, units[i][1])) for i in numbers) - shared

    def fill(limit):
        trees = [[]]
        for i in order:
            if size(trees[-1] + [i]) > limit:
                trees.append([])
            trees[-1].append(i)
        return trees
    largest = max(size([i]) for i in order)
    return next(trees for trees in map(fill, range(largest, micro_tokens + 1)) if len(trees) == len(fill(micro_tokens)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_trees_are_filled_to_the_lowest_limit_that_needs_no_more_of_them(seed):
    """The same trees in the same order as a search that tries every limit: the largest first, equal ones as they come."""
    units = random_units(seed)
    for micro_tokens in (70, 100, 150, 300):
        fitting = {i: unit for i, unit in units.items() if len(unit[0]) + sum(map(len, unit[1])) <= micro_tokens}
        expected = [(len(make_micro_batch(fitting, numbers).tree), numbers) for numbers in fill_by_search(fitting, micro_tokens)]
        expected.sort(key=lambda tree: -tree[0])
        found = [(len(batch.tree), batch.examples) for batch in pack(fitting, micro_tokens)]
        assert found == expected and len(found) > 1


# ---------------------------------------------------------------------------------------------- the same numbers

def separate(model, units):
    """log π of each response, one sequence at a time, from full logits under a plain causal mask."""
    found = []
    for prompt, responses in units.values():
        for response in responses:
            ids = torch.tensor(prompt + response)

            def causal(layer, q, k, v):
                q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
            logits = model.logits(model(ids, torch.arange(len(ids)), causal))
            found.append(F.log_softmax(logits, -1)[:-1].gather(1, ids[1:, None])[len(prompt) - 1:].sum())
    return torch.stack(found)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


EDGE_CASES = {
    "chosen is the beginning of rejected": {0: ([5, 6, 7], [[20, 21, 22], [20, 21, 22, 23, 24]])},
    "rejected is the beginning of chosen": {0: ([5, 6, 7], [[20, 21, 22, 23, 24], [20, 21, 22]])},
    "chosen equals rejected": {0: ([5, 6, 7], [[20, 21], [20, 21]])},
    "responses share a beginning": {0: ([5, 6, 7], [[20, 21, 22, 1], [20, 21, 30, 1]])},
    "one example twice": {0: ([5, 6], [[20, 21]]), 1: ([5, 6], [[20, 21]])},
    "a prompt continues as another's response": {0: ([5, 6], [[7, 8, 9]]), 1: ([5, 6, 7], [[8, 9, 10]])},
    "a prompt of one token": {0: ([5], [[6], [7]]), 1: ([6], [[5], [6, 6]])},
}


@pytest.mark.parametrize("name", EDGE_CASES)
def test_packed_equals_separate_where_sequences_meet(tiny_folder, name):
    units, model = EDGE_CASES[name], load_model(tiny_folder, torch.float64)
    [batch] = pack(units, 1000)
    expected = separate(model, {i: units[i] for i in batch.examples})
    weights = torch.linspace(-1, 2, len(batch.starts), dtype=torch.float64)
    found = response_logprobs(model, batch.tree, batch.starts)
    assert (found - expected).abs().max() < 1e-9
    assert (gradients(model, (found * weights).sum()) - gradients(model, (expected * weights).sum())).abs().max() < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
def test_packed_equals_separate_in_trees_of_several_attention_blocks(tiny_folder, checkpointed, monkeypatch):
    """About 900 tokens: a tree goes through attention 256 queries at a time, and this one needs four rounds."""
    rng = random.Random(0)
    words = lambda n: [rng.randrange(3, 400) for _ in range(n)]
    instructions = words(150)
    units = {i: (instructions + words(60), [words(40), words(30)]) for i in range(6)}
    model = load_model(tiny_folder, torch.float64)
    [batch] = pack(units, 1000)
    assert len(batch.tree) > 3 * 256
    expected = separate(model, {i: units[i] for i in batch.examples})
    weights = torch.linspace(-1, 2, 12, dtype=torch.float64)
    theirs = gradients(model, (expected * weights).sum())
    model.checkpoint_activations = checkpointed
    monkeypatch.setattr("rprm.head_chunk", lambda *_: 100)
    found = response_logprobs(model, batch.tree, batch.starts)
    assert (found - expected).abs().max() < 1e-9
    assert (gradients(model, (found * weights).sum()) - theirs).abs().max() < 1e-9


@pytest.mark.parametrize("length", [254, 255, 256, 257, 258])
def test_packed_equals_separate_where_a_response_ends_at_a_block_of_attention(tiny_folder, length):
    """The first response's last token is the last of a block of 256 queries, the first of the next, or beside them."""
    rng = random.Random(0)
    prompt, model = [rng.randrange(3, 400) for _ in range(200)], load_model(tiny_folder, torch.float64)
    units = {0: (prompt, [[5] + [rng.randrange(3, 400) for _ in range(length - 201)], [6] + [rng.randrange(3, 400) for _ in range(80)]])}
    [batch] = pack(units, 1000)
    assert batch.tree.end[length - 1] == length  # the first response stands first
    assert (response_logprobs(model, batch.tree, batch.starts) - separate(model, units)).abs().max() < 1e-9


# ---------------------------------------------------------------------------------------------- one step, however it is cut

class Caught(Exception):
    pass


def step_of(script, config, model, monkeypatch):
    """(loss, gradient) of the first optimizer step of a script's main, in fp64."""
    gradient = []

    def before_clipping(parameters, most):
        gradient.append(torch.cat([p.grad.flatten() for p in parameters]))
        return torch.tensor(0.0)

    def catch(run, loss, norm, examples):
        raise Caught(loss, gradient[0])
    monkeypatch.setattr(script, "clip_grad_norm_", before_clipping)
    monkeypatch.setattr(Run, "check_finite", catch)
    if script is train_sft:
        monkeypatch.setattr(train_sft, "initial_model", lambda config: (load_model(model, torch.float64), model))
    else:
        monkeypatch.setattr(train_dpo, "load_for_training", lambda folder, *_, **__: load_model(folder, torch.float64))
        reference = torch.linspace(-40, -20, 24, dtype=torch.float64).view(12, 2).numpy()
        monkeypatch.setattr(train_dpo, "reference_logprobs", lambda *_: reference)
    with pytest.raises(Caught) as caught:
        script.main(config)
    return caught.value.args


@pytest.mark.slow
@pytest.mark.parametrize("script", [train_sft, train_dpo])
def test_accumulation_over_many_trees_equals_one_tree(tmp_path, tiny_folder, script, monkeypatch):
    """1 × k = k × 1: --micro-tokens changes neither the loss nor the gradient of an optimizer step (fp64, 1e-9).

    The responses' lengths differ, so that a mean of the trees' means would show.
    """
    rng = random.Random(2)
    longer = lambda: " apples" * rng.randrange(12)
    if script is train_sft:
        make, rows = sft_config, [row | {"response": row["response"] + longer()} for row in sft_rows(12)]
    else:
        make, rows = dpo_config, [row | {"chosen": longer() + row["chosen"], "rejected": longer() + row["rejected"]}
                                  for row in pair_rows(12)]
    found = [step_of(script, make(tmp_path, tiny_folder, rows, batch_size=12, micro_tokens=micro_tokens), tiny_folder, monkeypatch)
             for micro_tokens in (10_000, 300, 150)]
    for loss, gradient in found[1:]:
        assert abs(loss - found[0][0]) < 1e-9
        assert (gradient - found[0][1]).abs().max() < 1e-9


# ---------------------------------------------------------------------------------------------- over-long examples

def test_over_long_pairs_are_left_out_named_and_counted(tmp_path, tiny_folder, capsys):
    """In training, in the reference (infinite there: nothing was computed) and in the count at the end."""
    rows = pair_rows(9)
    rows[4]["rejected"] = "apples " * 300
    train_dpo.main(dpo_config(tmp_path, tiny_folder, rows, batch_size=9, micro_tokens=200, epochs=2))
    assert [(row["left_out"], row["pairs"]) for row in metrics(tmp_path / "dpo")] == [(1, 8), (1, 8)]
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("pairs.jsonl example 5 has") == 1
    assert "left out as over-long: 1" in printed.out


@pytest.mark.parametrize("script", [train_sft, train_dpo])
def test_over_long_validation_examples_are_named_and_counted(tmp_path, tiny_folder, capsys, script):
    make, rows = (sft_config, sft_rows) if script is train_sft else (dpo_config, pair_rows)
    held_out = rows(4, seed=1)
    held_out[1]["response" if script is train_sft else "chosen"] = "apples " * 300
    path = write(tmp_path / "held_out.jsonl", held_out)
    script.main(make(tmp_path, tiny_folder, rows(4), validation=path, micro_tokens=300))
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("held_out.jsonl example 2 has") == 1
    assert "left out as over-long: 1" in printed.out


def test_trees_are_few_and_of_like_size():
    """Sixteen examples of 100 tokens of their own behind 50 that all share: nine fit in a tree of 1,000, and eight and eight are smaller."""
    units = {i: (list(range(50)), [[1000 + i] * 100]) for i in range(16)}
    batches = pack(units, 1000)
    assert [len(batch.tree) for batch in batches] == [850, 850]
    assert sorted(i for batch in batches for i in batch.examples) == list(range(16))
    assert [len(batch.tree) for batch in pack(units, 850)] == [850, 850]
    assert len(pack(units, 849)) == 3
