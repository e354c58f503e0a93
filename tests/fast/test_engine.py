"""What the fast engine does beneath the surface: prefixes, branching rows, retirement, recorded steps. (What it samples: test_generate.py.)"""
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoint import load_model
from fast import engine as engine_module
from fast import graphs
from generate import Request
from plumbing.queues import answers_of
from test_generate import (EOS, FakeGraph, assert_as_naive, assert_same, branches, make_engine, random_ids, recording,  # noqa: F401
                           requests_of, run, shared_prompts)

fast_engine = partial(make_engine, "fast")


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load_model(tiny_folder)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [0, 10, 255, 256, 257])
@pytest.mark.parametrize("own", [1, 255, 256, 257])
def test_a_prompt_may_end_at_the_edge_of_a_block(tiny_folder, model, shared, own):
    """TreeAttention goes by 256 queries: shared beginning and prompts end one before, at, and one after. Logits as of each prompt alone."""
    prompts = [random_ids(shared, 1) + [4 + i] + random_ids(own - 1, 2 + i) for i in range(3)]
    engine = fast_engine(model)
    for request in requests_of(prompts, 1):
        engine.add(request)
    engine.prefill_waiting()
    assert len(engine.prefix_ids) == shared
    reference = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    with torch.no_grad():
        expected = [reference(torch.tensor([ids])).logits[0, -1] for ids in prompts]
    for prompt, logits in zip(engine.ready, expected, strict=True):
        torch.testing.assert_close(prompt.logits, logits, atol=1e-4, rtol=0)


def test_no_more_rows_than_max_rows(model, monkeypatch):
    engine, seen = fast_engine(model, max_rows=7), []
    step = engine.decode_step
    monkeypatch.setattr(engine, "decode_step", lambda: (seen.append(len(engine.draws)), step()))
    run(engine, requests_of(shared_prompts(12), 3))
    assert max(seen) in (6, 7)  # two prompts of three rows, and perhaps the last row of one before them


@pytest.mark.slow
@pytest.mark.parametrize("temperature, max_rows", [(0, 160), (0.15, 160), (0.15, 20), (0.5, 160)])
def test_continuations_that_agree_are_computed_once(model, monkeypatch, temperature, max_rows):
    """As many rows pass the model as there are different beginnings to go on from: the continuations of a prompt are a tree."""
    requests, passed = requests_of(shared_prompts(3), 8), []
    engine = fast_engine(model, max_rows, temperature, max_new_tokens=24)
    step = engine.decode_step
    monkeypatch.setattr(engine, "decode_step", lambda: (passed.append(len(engine.rows)), step()))
    found = run(engine, requests)
    alone = [Request(request.ids, [seed]) for request in requests for seed in request.seeds]
    assert_same([[c] for row in found for c in row], run(fast_engine(model, 1, temperature, max_new_tokens=24), alone))
    drawn = [(i, c.ids + [EOS[0]] * c.finished) for i, row in enumerate(found) for c in row]
    assert sum(passed) == len({(i, tuple(ids[:n])) for i, ids in drawn for n in range(1, len(ids))})
    assert engine.new_tokens == sum(len(ids) for _, ids in drawn)
    if temperature == 0:
        assert max(passed) <= 3
    else:
        assert 3 < max(passed) and sum(passed) < sum(len(ids) - 1 for _, ids in drawn)


def test_short_rows_are_given_before_long_ones(model):
    """A result comes as soon as its own rows end, not when the batch does."""
    prompts = shared_prompts(12)
    order = [index for index, _ in answers_of(fast_engine(model, max_new_tokens=60), requests_of(prompts, 1))]
    lengths = [len(row[0].p_yes) for row in run(fast_engine(model, max_new_tokens=60), requests_of(prompts, 1))]
    assert [lengths[i] for i in order] == sorted(lengths) and order != sorted(order)


@pytest.mark.parametrize("prefill_tokens", [1, 100, 4096])
def test_shared_tokens_are_prefilled_once(model, monkeypatch, prefill_tokens):
    """The instructions once for all prompts and a prompt once for its K samples, however the prompts are grouped."""
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", prefill_tokens)
    prompts = shared_prompts(12, shared=200)
    for k in (1, 5):
        engine = fast_engine(model, max_rows=20, max_new_tokens=3)
        run(engine, requests_of(prompts, k))
        assert engine.prompt_tokens == sum(map(len, prompts))
        assert engine.prefill_tokens == 200 + sum(len(ids) - 200 for ids in prompts)


def test_the_steps_of_a_long_solution_are_one_group(model, monkeypatch):
    """Each prompt goes on from the one before: 40 tokens, then 3 more each. A group is as large as its tree."""
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", 100)
    text = list(range(100))
    prompts = [text[:40 + 3 * i] for i in range(20)]
    engine = fast_engine(model, max_rows=40, max_new_tokens=3)
    run(engine, requests_of(prompts, 2))
    assert engine.prefill_tokens < 40 + 3 * 20 + len(prompts)  # each keeps a token of its own behind the prefix


@pytest.mark.slow
@pytest.mark.parametrize("kind", branches())
def test_a_later_prompt_cuts_the_prefix_while_earlier_ones_are_decoded(model, monkeypatch, kind):
    """Prompts are prefilled one at a time."""
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", 1)
    engine, lengths = fast_engine(model, max_rows=6, max_new_tokens=10), []
    fit = engine.fit_prefix
    monkeypatch.setattr(engine, "fit_prefix", lambda prompts: (fit(prompts), lengths.append((len(engine.prefix_ids), len(engine.rows)))))
    requests = [Request(r.ids, [seed + i for seed in r.seeds]) for i, r in enumerate(requests_of(branches()[kind], 2))]
    assert_as_naive(model, engine, requests)
    if kind == "the prefix shrinks":
        assert [length for length, _ in lengths] == [49, 40, 12, 12, 3, 0, 0]
        assert all(rows for _, rows in lengths[1:])  # with rows in flight


# ---------------------------------------------------------------------------------------------- recorded steps, as on a GPU

@pytest.mark.slow
@pytest.mark.parametrize("window", [4, 64])
@pytest.mark.parametrize("k, max_rows, temperature, top_p", [(1, 5, 0.5, 0.95), (3, 7, 1, 1), (3, 30, 0.95, 0.95), (8, 1000, 0, 0.95)])
def test_recorded_steps_sample_what_plain_ones_do(model, recording, monkeypatch, window, k, max_rows, temperature, top_p):
    """With natural ends, waiting prompts, windows that are outgrown, and rows that have ended among the others."""
    monkeypatch.setattr(graphs, "WINDOW", window)
    monkeypatch.setattr(engine_module, "WINDOW", window)
    requests = requests_of(shared_prompts(14), k)
    plain, recorded = (make_engine(kind, model, max_rows, temperature, top_p, 40) for kind in ("fast", "recorded"))
    assert_same(run(recorded, requests), run(plain, requests))
    assert recorded.new_tokens == plain.new_tokens
    assert recorded.cache.rows.shape[4] <= 40 * 1.25  # room for no more tokens than a row may have, as it grows
    assert sum(graph.replays for graph in FakeGraph.made) > 2 * len(FakeGraph.made) > 0


def test_recorded_steps_go_on_when_the_prefix_shrinks(model, recording, monkeypatch):
    """A prompt that shares less moves keys and values of the rows that are being decoded."""
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", 1)
    requests = requests_of(branches()["the prefix shrinks"], 2)
    plain, recorded = (make_engine(kind, model, 6, max_new_tokens=24) for kind in ("fast", "recorded"))
    assert_same(run(recorded, requests), run(plain, requests))
    assert len(FakeGraph.made) > 2


@pytest.mark.slow
def test_few_recordings_are_made(model, recording, monkeypatch):
    """Rows that end one by one do not each cost a recording: they wait until a quarter of the rows have."""
    requests, taken = requests_of(shared_prompts(40), 4), []
    recorded = make_engine("recorded", model, 160, 0.9, 0.95, 150, EOS[:2])
    drop = recorded.drop_done_rows
    monkeypatch.setattr(recorded, "drop_done_rows", lambda: (taken.append((int(recorded.rows.done.sum()), len(recorded.rows))), drop()))
    run(recorded, requests)
    assert all(rows // 4 <= n for n, rows in taken) and any(n <= rows // 2 for n, rows in taken)
    assert len(FakeGraph.made) <= len(taken) + 3 < 160 / 8
