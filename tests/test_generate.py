"""Both engines, the plain one and the fast one, against a loop that makes a full pass for every token, and against Transformers."""
import copy
import dataclasses
import math
import random
from functools import partial
from typing import Callable

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

import fast
import fast.engine
import fast.graphs
import fast.nucleus
import generate
from checkpoint import load_model
from conftest import FAMILIES
from generate import Continuation, Request, uniform
from model import Tree, tree_attention
from plumbing.errors import BadInput
from plumbing.queues import answers_of

YES_NO = (41, 97)
EOS = [3, 50, 51, 120, 200, 301, 302, 303, 350, 399]  # so many that rows end at different lengths
MASK = 2 ** 64 - 1


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load_model(tiny_folder)


# ---------------------------------------------------------------------------------------------- the reference

def splitmix64(seed: int, t: int) -> int:
    """The t-th output of the published generator (t from 1), in Python's integers."""
    x = (seed + t * 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def nucleus(logits, temperature: float, top_p: float) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, probabilities) of the nucleus, most likely first, in fp64 and as its definition says."""
    x = np.asarray(logits, dtype=np.float64) / temperature
    p = np.exp(x - x.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    n, mass = 0, 0.0
    while n < len(p) and (mass < top_p or top_p == 1):
        mass += p[order[n]]
        n += 1
    return order[:n], p[order[:n]] / p[order[:n]].sum()


def draw(logits, u: float, temperature: float, top_p: float) -> int:
    if temperature == 0:
        return int(np.argmax(logits))
    tokens, p = nucleus(logits, temperature, top_p)
    return int(tokens[min(np.searchsorted(np.cumsum(p), u, side="right"), len(p) - 1)])


@torch.no_grad()
def full_pass(model, ids: list[int]) -> torch.Tensor:
    """The logits after a sequence (V,)."""
    tree = Tree([ids])
    return model.logits(model(tree.ids, tree.positions, tree_attention(tree.end)))[-1]


def yes_against_no(logits: torch.Tensor) -> float:
    return torch.stack([logits[YES_NO[0]], logits[YES_NO[1]]]).double().softmax(0)[0].item()


def naive(model, ids: list[int], seed: int, temperature: float, top_p: float, max_new_tokens: int) -> Continuation:
    """One continuation, token by token, each from a pass over everything before it."""
    new, p_yes = [], []
    while len(new) < max_new_tokens:
        logits = full_pass(model, ids + new)
        p_yes.append(yes_against_no(logits))
        token = draw(logits.numpy(), (splitmix64(seed, len(new)) >> 40) / 2 ** 24, temperature, top_p)
        if token in EOS:
            return Continuation(new, p_yes, token)
        new.append(token)
    return Continuation(new, p_yes, None)


# ---------------------------------------------------------------------------------------------- helpers

def random_ids(n: int, seed: int) -> list[int]:
    return random.Random(seed).choices([i for i in range(4, 400) if i not in EOS], k=n)


def shared_prompts(n: int, shared: int = 40) -> list[list[int]]:
    """Prompts that share their first tokens, as cases share the instructions."""
    return [random_ids(shared, 0) + [4 + i] + random_ids(3 + 5 * i % 17, 100 + i) for i in range(n)]


def requests_of(prompts: list[list[int]], k: int) -> list[Request]:
    """Seeds depend on the prompt alone, as those of a case do."""
    return [Request(ids, [random.Random(f"{ids} {i}").getrandbits(64) - 2 ** 63 for i in range(k)]) for ids in prompts]


ENGINES = {"plain": generate.Engine, "fast": fast.engine.Engine, "recorded": fast.graphs.RecordedEngine}


def make_engine(kind: str, model, max_rows: int = 160, temperature: float = 0.5, top_p: float = 0.95, max_new_tokens: int = 16,
                eos: list[int] = EOS) -> generate.Engine:
    """An engine of ENGINES; the fast ones on a copy of the model that has the fast kernels."""
    if kind != "plain":
        model = fast.speed_up(copy.deepcopy(model))
    return ENGINES[kind](model, eos, YES_NO, temperature, top_p, max_new_tokens, max_rows)


@pytest.fixture(params=["plain", "fast"])
def engine_of(request):
    """engine_of(model, ...) -> the plain engine or the fast one: a test that takes it holds for both."""
    return partial(make_engine, request.param)


def run(engine, requests, added: Callable[[list[int]], list[int]] = lambda ids: []) -> list[list[Continuation]]:
    """The continuations of every request, each given once, in the order of the requests."""
    engine.suffix_of = added
    found = list(answers_of(engine, requests))
    assert sorted(request_id for request_id, _ in found) == list(range(len(found)))
    return [continuations for _, continuations in sorted(found, key=lambda pair: pair[0])]


def assert_same(found: list[list[Continuation]], expected: list[list[Continuation]]) -> None:
    """The same tokens and ends; P(Yes) at every position within 1e-5."""
    assert [[c.ids for c in row] for row in found] == [[c.ids for c in row] for row in expected]
    assert [[c.finished for c in row] for row in found] == [[c.finished for c in row] for row in expected]
    for a, b in zip(sum(found, []), sum(expected, [])):
        assert a.p_yes == pytest.approx(b.p_yes, abs=1e-5) and len(a.p_yes) == len(b.p_yes)


def assert_as_naive(model, engine, requests: list[Request]) -> list[list[Continuation]]:
    expected = [[naive(model, r.ids, seed, engine.temperature, engine.top_p, engine.max_new_tokens) for seed in r.seeds]
                for r in requests]
    found = run(engine, requests)
    assert_same(found, expected)
    return found


# ---------------------------------------------------------------------------------------------- a stand-in for CUDA graphs

class FakeGraph(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph: what it holds on to are operations, with tensors by their address and numbers by their value.

    A replay does these and nothing else, so a number that has changed in Python since, or a tensor that has been made anew, is missed.
    """
    made: list["FakeGraph"] = []
    waits = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select", "aten::_unique2"}  # for the GPU

    def __init__(self):
        super().__init__()
        self.calls, self.replays = [], 0
        self.made.append(self)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation._schema.name not in self.waits
        out = operation(*args, **kwargs or {})
        self.calls.append((operation, args, kwargs or {}, out))
        return out

    def replay(self):
        self.replays += 1
        for operation, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(operation(*args, **kwargs))):
                if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():  # else a view, or changed in place
                    old.copy_(new)


@pytest.fixture
def recording(monkeypatch):
    """RecordedEngine records and replays its steps as on CUDA."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    monkeypatch.setattr(FakeGraph, "made", [])


# ---------------------------------------------------------------------------------------------- against the references

@pytest.mark.parametrize("temperature, top_p", [(0.95, 0.95), (0.4, 0.8), (1.0, 1.0), (0.0, 0.95)])
def test_samples_equal_a_full_pass_per_token(engine_of, model, temperature, top_p):
    """Tokens, ends and P(Yes) at every position. Odds that rounding alone moves a token on another machine: under 1%."""
    found = assert_as_naive(model, engine_of(model, temperature=temperature, top_p=top_p, max_new_tokens=12),
                            requests_of(shared_prompts(4), 3))
    p_yes = [p for row in found for c in row for p in c.p_yes]
    assert np.std(p_yes) > 0.05  # a constant would agree however wrong
    if temperature:
        assert len({tuple(c.ids) for row in found for c in row}) > 9  # seeds matter
        assert {c.finished for row in found for c in row} == {True, False}


def test_greedy_equals_transformers(engine_of, model, tiny_folder):
    reference = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    prompts = shared_prompts(6) + [random_ids(9, 5), random_ids(70, 6)]
    found = run(engine_of(model, temperature=0, max_new_tokens=30), requests_of(prompts, 1))
    ends = set()
    for ids, [c] in zip(prompts, found):
        expected = reference.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64), do_sample=False,
                                      max_new_tokens=30, eos_token_id=EOS, pad_token_id=0)[0, len(ids):].tolist()
        assert c.ids + expected[len(c.ids):] == expected and len(expected) - len(c.ids) == c.finished
        assert c.finished == (expected[-1] in EOS)
        ends.add(c.finished)
    assert len(ends) == 2  # both kinds of end were met


def test_transformers_probability_of_yes(engine_of, model, tiny_folder):
    """P(Yes) at a position is Transformers' softmax over the two logits there."""
    reference = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    [[c]] = run(engine_of(model), requests_of([random_ids(30, 1)], 1))
    with torch.no_grad():
        logits = reference(torch.tensor([random_ids(30, 1) + c.ids])).logits[0, 29:]
    expected = logits[:, list(YES_NO)].softmax(-1)[:, 0].tolist()
    assert c.p_yes == pytest.approx(expected[:len(c.p_yes)], abs=1e-5)


# ---------------------------------------------------------------------------------------------- company

@pytest.mark.slow
def test_tokens_do_not_depend_on_the_batch(engine_of, model):
    """Batch sizes 1, 3 and 16, other company and another order give a prompt the same tokens."""
    requests = requests_of(shared_prompts(16), 3)
    whole = run(engine_of(model, max_rows=48), requests)
    for batch_size in (1, 3):
        assert_same(run(engine_of(model, max_rows=3 * batch_size), requests), whole)
    alone = [run(engine_of(model), [request])[0] for request in requests]
    assert_same(alone, whole)
    assert_same(run(engine_of(model), requests[::-1])[::-1], whole)
    strangers = requests_of([random_ids(55, 900 + i) for i in range(5)], 4)  # no common prefix, so no root at all
    assert_same(run(engine_of(model), strangers + requests[:4])[5:], whole[:4])


def test_fewer_samples_are_the_first_of_more(engine_of, model):
    prompts = shared_prompts(3)
    one, ten = (run(engine_of(model), requests_of(prompts, k)) for k in (1, 10))
    assert_same(one, [row[:1] for row in ten])


@pytest.mark.slow
def test_rows_are_retired_and_refilled(engine_of, model):
    """Many prompts through few rows equal one big batch, also where one prompt's samples alone are more than max_rows."""
    requests = requests_of(shared_prompts(14), 3)
    whole = run(engine_of(model, max_rows=1000, max_new_tokens=30), requests)
    assert len({len(c.ids) for row in whole for c in row}) > 10
    for max_rows in (2, 7):
        engine = engine_of(model, max_rows=max_rows, max_new_tokens=30)
        assert_same(run(engine, requests), whole)
        assert engine.new_tokens == sum(len(c.p_yes) for row in whole for c in row)


def test_a_model_that_has_sampled_trains_as_one_that_has_not(engine_of, tiny_folder):
    """Engines run in inference mode: no tensor of it is left in the model, where a backward pass would meet it."""
    tree = Tree(shared_prompts(3))
    gradients = []
    for samples in (False, True):
        engine = engine_of(load_model(tiny_folder))
        if samples:
            run(engine, requests_of(shared_prompts(2), 2))
        own = engine.model
        hidden = own(tree.ids, tree.positions, own.tree_attention(tree.end))
        own.logits(hidden).logsumexp(-1).sum().backward()
        gradients.append([p.grad for p in own.parameters()])
    for without, after in zip(*gradients, strict=True):
        assert torch.equal(without, after)


@pytest.mark.parametrize("kind", ENGINES)
def test_with_no_new_tokens_continuations_are_empty(model, kind):
    """max_new_tokens = 0; P(Yes) after the engine's suffix is that of a full pass over prompt and suffix."""
    suffix = [7, 8, 9]
    prompts = shared_prompts(5)
    found = run(make_engine(kind, model, max_new_tokens=0, max_rows=3), requests_of(prompts, 1), lambda ids: suffix)
    for ids, [continuation] in zip(prompts, found, strict=True):
        assert (continuation.ids, continuation.p_yes, continuation.end) == ([], [], None)
        expected = yes_against_no(full_pass(model, ids + suffix))
        assert continuation.p_yes_after_suffix == pytest.approx(expected, abs=1e-6)


def test_an_engine_runs_again(engine_of, model):
    """A second run with other prompts owes nothing to the first one."""
    engine = engine_of(model)
    run(engine, requests_of(shared_prompts(3), 2))
    assert_as_naive(model, engine, requests_of([random_ids(20, 77), random_ids(5, 78)], 2))


# ---------------------------------------------------------------------------------------------- kinds of prompts

def branches() -> dict[str, list[list[int]]]:
    a = random_ids(50, 0)
    return {
        "alone": [a],
        "of one token": [[7]],
        "no common prefix": [random_ids(20, i) for i in range(1, 5)],
        "equal": [a, a, a],
        "one a prefix of another": [a, a[:30], a[:31], a + random_ids(5, 1)],
        "the prefix shrinks": [a, a[:40] + random_ids(20, 1), a[:12] + random_ids(40, 2), a + [9], a[:3] + random_ids(50, 4),
                             random_ids(52, 3), a],
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", branches())
def test_every_kind_of_batch_is_exact(engine_of, model, kind):
    requests = [Request(r.ids, [seed + i for seed in r.seeds]) for i, r in enumerate(requests_of(branches()[kind], 2))]
    assert_as_naive(model, engine_of(model, max_rows=6, max_new_tokens=10), requests)


def test_requests_that_wait_for_a_result(engine_of, model):
    """Each of the later prompts is added only when an earlier one is answered."""
    requests = requests_of(shared_prompts(6), 2)
    engine, results = engine_of(model), {}
    for request in requests[:3]:
        engine.add(request)
    coming = iter(requests[3:])
    while engine.busy:
        for request_id, continuations in engine.step():
            results[request_id] = continuations
            if (request := next(coming, None)) is not None:
                engine.add(request)
    assert_same([results[i] for i in range(6)], run(engine_of(model), requests))


# ---------------------------------------------------------------------------------------------- what is computed

def test_prompts_of_one_group_share_what_they_share(engine_of, model):
    """Below the prefix too: a problem that some of the prompts have in common is prefilled once."""
    a, problem = random_ids(60, 0), random_ids(30, 1)
    prompts = [a + [5] + problem + [6, 7, 8], a + [5] + problem + [9, 10], a + [11] + problem]
    engine = engine_of(model)
    run(engine, requests_of(prompts, 2))
    assert engine.prefill_tokens == len({tuple(p[:n]) for p in prompts for n in range(1, len(p) + 1)}) == 60 + 31 + 3 + 2 + 31


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("max_rows", [5, 160])
def test_p_yes_after_suffixes_equals_a_full_pass(model, recording, monkeypatch, max_rows, kind):
    """Rows that end by themselves and rows that are cut off, with suffixes of several lengths or none; the rest is as without."""
    monkeypatch.setattr(fast.engine, "WINDOW", 4)
    monkeypatch.setattr(fast.graphs, "WINDOW", 4)
    monkeypatch.setattr(fast.engine, "SUFFIX_ROWS", 2)
    suffixes = {0: [], 1: [7], 2: [9, EOS[0], 11], 3: random_ids(9, 1)}  # an end-of-text token among them ends nothing
    requests = requests_of(shared_prompts(7), 3)
    engine = make_engine(kind, model, max_rows, max_new_tokens=12)
    without = run(engine, requests)
    assert {c.finished for row in without for c in row} == {True, False}
    assert {sum(c.ids) % 4 for row in without for c in row} == set(suffixes)
    sampled = engine.new_tokens
    found = run(engine, requests, lambda ids: suffixes[sum(ids) % 4])
    assert_same(found, without)
    assert engine.new_tokens == 2 * sampled
    for request, row in zip(requests, found):
        for c in row:
            suffix = suffixes[sum(c.ids) % 4]
            assert c.p_yes_after_suffix == (pytest.approx(yes_against_no(full_pass(model, request.ids + c.ids + suffix)), abs=1e-5) if suffix else None)


# ---------------------------------------------------------------------------------------------- ends

@pytest.mark.slow
def test_any_end_of_text_id_ends_a_row(engine_of, model):
    """The sampled end is not among the tokens, but has a P(Yes); every id of the list is met as an end."""
    found = run(engine_of(model, temperature=1, max_new_tokens=80), requests_of(shared_prompts(17), 8))
    for c in sum(found, []):
        assert not set(c.ids) & set(EOS)
        assert len(c.p_yes) == len(c.ids) + c.finished
        assert c.finished or len(c.ids) == 80
    longer = engine_of(model, temperature=1, max_new_tokens=80, eos=EOS[:1])  # the same rows, where only the first id ends one
    ends = {b.ids[len(a.ids)] if len(b.ids) > len(a.ids) else EOS[0]
            for a, b in zip(sum(found, []), sum(run(longer, requests_of(shared_prompts(17), 8)), [])) if a.finished}
    assert ends == set(EOS)


@pytest.mark.parametrize("most", [1, 2, 9])
def test_max_new_tokens(engine_of, model, most):
    found = run(engine_of(model, max_new_tokens=most), requests_of(shared_prompts(5), 4))
    longer = run(engine_of(model, max_new_tokens=10), requests_of(shared_prompts(5), 4))
    for a, b in zip(sum(found, []), sum(longer, [])):
        assert a.ids == b.ids[:most] and a.finished == (b.finished and len(b.ids) < most)
    assert any(len(c.ids) == most for c in sum(found, []))


def test_the_context_ends_a_row(engine_of, tiny_folder):
    """No row grows beyond max_position_embeddings, whatever max_new_tokens says."""
    model = load_model(tiny_folder)
    model.config = dataclasses.replace(model.config, max_position_embeddings=48)
    prompts = [random_ids(n, n) for n in (20, 40, 47)]
    engine = engine_of(model, 16, 1.0, 0.5, 4096, eos=[415])
    for ids, row in zip(prompts, run(engine, requests_of(prompts, 3))):
        assert [(len(c.ids), c.finished) for c in row] == [(48 - len(ids), False)] * 3


# ---------------------------------------------------------------------------------------------- reading P(Yes)

@pytest.mark.parametrize("prefill_tokens", [30, 4096])
def test_read_p_yes_equals_a_full_pass(engine_of, model, monkeypatch, prefill_tokens):
    """Sequences that share a beginning, equal ones, and a stranger; before and after a run."""
    monkeypatch.setattr(fast.engine, "PREFILL_TOKENS", prefill_tokens)
    engine = engine_of(model)
    sequences = [*shared_prompts(5), shared_prompts(5)[2], shared_prompts(1)[0][:40], [9]]
    expected = pytest.approx([yes_against_no(full_pass(model, s)) for s in sequences], abs=1e-5)
    assert engine.read_p_yes(sequences) == expected
    run(engine, requests_of(shared_prompts(4), 2))
    assert engine.read_p_yes(sequences) == expected
    assert engine.read_p_yes([]) == []


# ---------------------------------------------------------------------------------------------- the fast engine is the plain one

@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_the_fast_engine_samples_what_the_plain_one_does(make_folder, seed):
    """Over random models, prompts and requests: the same tokens and ends, P(Yes) to 1e-6, and after suffixes.

    fp64, so that rounding moves no token.
    """
    rng = random.Random(seed)
    model = load_model(make_folder(rng.choice(list(FAMILIES)), rng.random() < 0.5), torch.float64)
    prompts = shared_prompts(rng.randrange(1, 12), shared=rng.choice([0, 1, 30, 200]))
    prompts += rng.choices(prompts, k=rng.randrange(3))
    requests = []
    for ids in prompts:
        requests.append(Request(ids, [rng.getrandbits(64) - 2 ** 63 for _ in range(rng.choice([1, 3, 10]))]))
    settings = {"temperature": rng.choice([0, 0.15, 0.95, 1]), "top_p": rng.choice([0.3, 0.95, 1.0]),
                "max_new_tokens": rng.randrange(1, 40), "max_rows": rng.choice([1, 10, 160])}

    def added(ids: list[int]) -> list[int]:
        return [[], [7], [9, 11]][sum(ids) % 3]
    plain = run(make_engine("plain", model, **settings), requests, added)
    found = run(make_engine("fast", model, **settings), requests, added)
    assert [[c.ids for c in row] for row in found] == [[c.ids for c in row] for row in plain]
    assert [[c.finished for c in row] for row in found] == [[c.finished for c in row] for row in plain]
    for row, expected_row in zip(found, plain, strict=True):
        for c, expected in zip(row, expected_row, strict=True):
            assert c.p_yes == pytest.approx(expected.p_yes, abs=1e-6)
            assert c.p_yes_after_suffix == pytest.approx(expected.p_yes_after_suffix, abs=1e-6)
            assert (c.p_yes_after_suffix is None) == (not added(c.ids))


# ---------------------------------------------------------------------------------------------- uniform

def test_uniform_is_splitmix64():
    """The published generator's top 24 bits; its first outputs for seed 1234567 stand in many implementations."""
    assert [splitmix64(1234567, t) for t in (1, 2, 3)] == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    rng = random.Random(0)
    cases = [(rng.getrandbits(64), rng.randrange(5000)) for _ in range(2000)] + [(0, 0), (MASK, 1), (2 ** 63, 4095), (1234567, 1)]
    seeds = torch.tensor([s - 2 ** 64 if s >= 2 ** 63 else s for s, _ in cases])
    found = uniform(seeds, torch.tensor([t for _, t in cases]))
    assert found.dtype == torch.float32
    assert found.tolist() == [(splitmix64(s, t) >> 40) / 2 ** 24 for s, t in cases]


def test_uniform_is_uniform():
    """On 300 neighbouring seeds × 300 positions: range, mean, variance, tenths; no correlation along either. 5 sigma each."""
    n = 300
    seeds = torch.arange(n).repeat_interleave(n) + 10 ** 12
    u = uniform(seeds, torch.arange(n).repeat(n)).view(n, n).double()
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 5 * math.sqrt(1 / 12) / n
    assert abs(u.var() - 1 / 12) < 5 * math.sqrt(1 / 180) / n
    counts = torch.histc(u, 10, 0, 1)
    assert (counts - n * n / 10).abs().max() < 5 * math.sqrt(n * n * 0.09)
    x = (u - 0.5) * math.sqrt(12)
    for lag in (1, 2, 7):
        for a, b in ((x[lag:], x[:-lag]), (x[:, lag:], x[:, :-lag]), (x[lag:, lag:], x[:-lag, :-lag])):
            assert abs((a * b).mean()) < 5 / math.sqrt(a.numel())
    assert x.mean(0).abs().max() < 5 / math.sqrt(n) and x.mean(1).abs().max() < 5 / math.sqrt(n)


# ---------------------------------------------------------------------------------------------- sample

@pytest.fixture(params=["plain", "fast"])
def sample(request):
    """sample(logits (R, V), row (S,), u (S,), temperature, top_p) -> tokens (S,), by a full sort or by as much of it as is needed."""
    if request.param == "fast":
        return fast.nucleus.sample
    return lambda logits, row, u, temperature, top_p: generate.sample(logits[row], u, temperature, top_p)


def counts_on_a_grid(sample, logits: torch.Tensor, n: int, temperature: float, top_p: float) -> np.ndarray:
    """How often each token is drawn at n evenly spaced values of u: (V,)."""
    u = (torch.arange(n) + 0.5) / n
    return np.bincount(sample(logits[None], torch.zeros(n, dtype=torch.int64), u, temperature, top_p).numpy(), minlength=len(logits))


@pytest.mark.parametrize("temperature, top_p", [(1.0, 0.9), (0.5, 0.95), (2.0, 0.3), (1.0, 1.0), (0.7, 0.01)])
def test_draws_have_the_probabilities_of_the_nucleus(sample, temperature, top_p):
    """On an even grid of u a token's count is its probability's share to within one: no chance is involved."""
    n, logits = 20000, 2 * torch.randn(50)
    tokens, p = nucleus(logits.numpy(), temperature, top_p)
    expected = np.zeros(50)
    expected[tokens] = n * p
    counts = counts_on_a_grid(sample, logits.clone(), n, temperature, top_p)
    assert np.abs(counts - expected).max() <= 1.2
    assert not counts[expected == 0].any()  # nothing from outside the nucleus
    assert (len(tokens) < 50) == (top_p < 1)


def test_the_nucleus_reaches_top_p_exactly_as_defined(sample):
    """Probabilities 1/2, 1/4, 1/8, ...: the smallest set that reaches 0.75 has two tokens, that of 0.76 three."""
    logits = -math.log(2) * torch.tensor([3.0, 0.0, 1.0, 2.0, 3.0]) + 0.25  # exact up to rounding: keep off the edges by 1e-3
    for top_p, tokens in ((0.3, {1}), (0.499, {1}), (0.501, {1, 2}), (0.749, {1, 2}), (0.751, {1, 2, 3}), (0.9, {1, 2, 3, 0, 4})):
        drawn = set(np.flatnonzero(counts_on_a_grid(sample, logits.clone(), 999, 1.0, top_p)))
        if top_p == 0.9:  # 0 and 4 are equally likely: either completes the nucleus
            assert drawn in ({1, 2, 3, 0}, {1, 2, 3, 4})
        else:
            assert drawn == tokens


def test_a_nucleus_wider_than_the_candidates(sample):
    """Rows whose nucleus lies within 64, within 1024, beyond both and in between, in one batch: each as its definition says."""
    widths, rows = [], []
    for scale in (0.3, 0.6, 2.0, 3.0, 4.0, 8.0):
        rows.append(scale * torch.randn(3000))
        widths.append(len(nucleus(rows[-1].numpy(), 1.0, 0.95)[0]))
    assert min(widths) < 64 and any(64 < w < 1024 for w in widths) and any(1024 < w < 2900 for w in widths) and max(widths) < 3000
    n = 400
    u = ((torch.arange(n) + 0.5) / n).repeat_interleave(len(rows))
    found = sample(torch.stack(rows), torch.arange(len(rows)).repeat(n), u, 1.0, 0.95).view(n, len(rows)).T
    for logits, tokens in zip(rows, found):
        order, p = nucleus(logits.numpy(), 1.0, 0.95)
        edges = np.cumsum(p)
        place = {token: i for i, token in enumerate(order)}
        for x, token in zip((np.arange(n) + 0.5) / n, tokens.tolist()):
            i = place[token]  # u lies in the token's interval, give or take rounding: 3000 sums, and neighbours that change places
            assert edges[i] - 2 * p[i] - 2e-5 <= x <= edges[i] + p[i] + 2e-5


def test_the_ends_of_the_range_of_u(sample):
    """u = 0 takes no token of probability 0 before the first possible one; the largest u takes none after the last."""
    logits = torch.tensor([[-1e4, 0.0, 1.0, -1e4]])
    for top_p, first, last in ((1.0, 2, 1), (0.95, 2, 1), (0.5, 2, 2)):  # the most likely token comes first
        found = [sample(logits.clone(), torch.tensor([0]), torch.tensor([u]), 1.0, top_p).item() for u in (0.0, 1 - 2.0 ** -24)]
        assert found == [first, last]


def test_temperature_0_takes_the_most_likely(sample):
    logits = torch.randn(20, 3000)
    row = torch.tensor([3, 3, 0, 19])
    assert sample(logits.clone(), row, torch.rand(4), 0, 0.95).tolist() == logits.argmax(-1)[row].tolist()


def test_first_tokens_have_the_models_probabilities(engine_of, model):
    """4000 samples of one prompt by hashed seeds: chi-square against the exact nucleus. Odds of a false alarm: below 1e-6."""
    ids = random_ids(30, 3)
    [row] = run(engine_of(model, max_rows=4000, temperature=0.3, top_p=0.9, max_new_tokens=1), requests_of([ids], 4000))
    ends = sum(c.finished for c in row)
    counts = np.bincount([c.ids[0] for c in row if c.ids], minlength=416).astype(float)
    tokens, p = nucleus(full_pass(model, ids).numpy(), 0.3, 0.9)
    expected = np.zeros(416)
    expected[tokens] = 4000 * p
    inside, outside = [t for t in tokens if t not in EOS and expected[t] >= 5], [t for t in range(416) if expected[t] == 0]
    assert len(inside) > 5 and not counts[outside].any()
    assert abs(ends - expected[EOS].sum()) <= 5.5 * math.sqrt(max(expected[EOS].sum(), 1))
    chi2, df = ((counts[inside] - expected[inside]) ** 2 / expected[inside]).sum(), len(inside)
    assert chi2 < df + 5 * math.sqrt(2 * df) + 17  # Laurent and Massart: P(chi2 > df + 2 sqrt(df x) + 2x) < e^-x, with x = 14 at these df


def test_broken_weights_are_named(engine_of, tiny_folder):
    """NaN once reached the sampling, which then looked for a token at index -1."""
    broken = load_model(tiny_folder)
    broken.norm.weight.data[3] = math.nan
    engine = engine_of(broken)
    with pytest.raises(BadInput, match="logits are not finite"):
        run(engine, [Request([5, 6, 7], [1])])
    with pytest.raises(BadInput, match="logits are not finite"):
        engine.read_p_yes([[5, 6, 7]])


def test_bf16_weights_sample_and_stay_near_fp32(engine_of, tiny_folder, model):
    narrow = load_model(tiny_folder, torch.bfloat16)
    prefix = list(range(60, 90))
    requests = [Request(prefix + [i + 100, i + 7, 2 * i + 150], [i]) for i in range(4)]
    wide, found = (run(engine_of(m, 4, 0.0, 1.0, 3, eos=[]), requests) for m in (model, narrow))
    for [expected], [c] in zip(wide, found):
        assert c.p_yes[0] == pytest.approx(expected.p_yes[0], abs=0.02)  # later ones may follow other tokens
        assert len(c.ids) == 3
