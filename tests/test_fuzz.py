"""Mutated input: a thousand spoilt versions of everything the project reads. Each is used, or ends in a BadInput.

A mutation works on the bytes (cut, flip, repeat, insert), on the JSON value (drop, double, change, replace by a hostile value),
or on the text of a template. The seeds are fixed; a failing test prints the input.
"""
import copy
import gzip
import itertools
import json
import random
import shutil
import tempfile
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoint import load_config, load_model, load_tokenizer
from plumbing.errors import BadInput
from plumbing.files import read_jsonl
from conftest import CHATML, make_config, random_tensors
from data import pack
from formats.examples import Examples
from formats.samples import read_analyses
from formats.turns import read_example, read_pair
from formats.containers import read_rows
from formats.readers import read_case, read_labelled_steps, read_solutions
from formats.verdicts import VERIFICATION
from rprm import Case, Sampler, Sampling, load_prompt, yes_no_ids

pytestmark = pytest.mark.slow
N = 500
SECONDS = 120  # of this process alone: none may hang, a family of a thousand takes a few

PROCESSBENCH = {"id": "gsm8k-0", "problem": "Tom has 3 apples.", "steps": ["He has 3.", "He buys 4: 3 + 4 = 8."], "label": 1}
PRM800K = {"question": {"problem": "1 + 1?"}, "is_quality_control_question": False, "label": {"finish_reason": "solution", "steps": [
    {"completions": [{"text": "It is 2.", "rating": 1}, {"text": "It is 3.", "rating": -1}], "human_completion": None,
     "chosen_completion": 0},
    {"completions": [{"text": "Done.", "rating": 0}], "human_completion": {"text": "Ah."}, "chosen_completion": None}]}}
SHEPHERD = {"input": "Tom has 3. Step 1: 3 + 4 = 7 ки\nStep 2: 7 + 1 = 9 ки",
            "label": "Tom has 3. Step 1: 3 + 4 = 7 +\nStep 2: 7 + 1 = 9 -", "task": "GSM8K"}
SEED_ROW = {"id": "a", "query": "Tom has 3.", "previous-steps": "Step 1: 3 + 4 = 7\nStep 2: so 7", "now-step": "Step 3: 8",
            "expert-judge": "Negative"}
EVALUATION = {
    "id": 7,
    "origin_id": "gsm8k-0",
    "question": "Tom has 3.",
    "previous_steps": "Step 1: 3 + 4 = 7",
    "now_step": "Step 2: So 8.",
    "label": 1,
}
STEPWISE = {
    "prompt": "Tom has 3.",
    "completions": ["Step 1: 3 + 4 = 7", "Step 2: so 8"],
    "labels": [True, False],
}
OPENR = {
    "question": "Tom has 3.",
    "process": "Step 1: 3 + 4 = 7\n\n\n\n\nStep 2: so 8\n\n\n\n\n",
    "label": ["+", "-"],
}
PRMBENCH = {
    "modified_question": "Tom has 3.",
    "modified_process": ["3 + 4 = 7", "so 8"],
    "error_steps": [2],
    "classification": "circular",
    "idx": "p1_0",
}
FORMATS = {
    "processbench": PROCESSBENCH,
    "prm800k": PRM800K,
    "shepherd": SHEPHERD,
    "seed_row": SEED_ROW,
    "evaluation": EVALUATION,
    "stepwise": STEPWISE,
    "openr": OPENR,
    "prmbench": PRMBENCH,
}
CASE = {"id": "c-0", "problem": "Tom has 3.", "previous_steps": ["He buys 4."], "now_step": "So 8.", "label": False}
SAMPLES = {"id": "c-0", "case": CASE, "analyses": [
    {"text": f"Hm.\n{VERIFICATION} No", "verdict": False, "p_yes": 0.25, "n_tokens": 12, "finished": True, "forced": False},
    {"text": "Hm.", "verdict": None, "p_yes": None, "n_tokens": 3, "finished": False}]}
SFT = {"prompt": "Is it right?", "response": f"Hm.\n{VERIFICATION} No", "problem": "p"}
PAIR = {"prompt": "Is it right?", "chosen": f"{VERIFICATION} No", "rejected": f"{VERIFICATION} Yes", "problem": "p"}

HOSTILE = [None, True, False, 0, -1, 1, 2, 10 ** 6, 10 ** 30, -10 ** 30, 0.5, 1e300, float("inf"), float("nan"), "", " ", "x", "\n",
           "\x00", "\x1b[2J", "𝔘",
           "ки", "Step 1:", "<|im_end|>", "{{ x }}", "{problem}", "a" * 5000, "\n" * 5000, "Step 1: ки" * 300, [], {}, [[]], [None],
           ["x"] * 300, {"text": "x"},
           {"": None}, [["x"]], list(range(50))]



@pytest.fixture()
def tmp_path(tmp_path):
    """A folder in memory where there is one: on a disk, opening the thousand files is most of the time."""
    memory = Path("/dev/shm")
    if not memory.is_dir():
        yield tmp_path
    else:
        with tempfile.TemporaryDirectory(dir=memory) as folder:
            yield Path(folder)


# ---------------------------------------------------------------------------------------------- mutations

def places(value, path=()):
    """The paths of all values within a JSON value."""
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def mutate_value(rng: random.Random, value):
    """A JSON value with one to three of its parts dropped, doubled, changed, or replaced by hostile ones."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(list(places(value))[1:] or [()])
        if not path:
            return rng.choice(HOSTILE)
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        kind = rng.randrange(6)
        if kind == 0:
            del parent[path[-1]]
        elif kind == 1 and isinstance(parent, list):
            parent.insert(path[-1], copy.deepcopy(parent[path[-1]]))
        elif kind == 2 and isinstance(parent[path[-1]], str):
            parent[path[-1]] = mutate_bytes(rng, parent[path[-1]].encode()).decode("utf-8", "replace")
        elif kind == 3 and isinstance(parent[path[-1]], (int, float)):
            parent[path[-1]] = parent[path[-1]] * rng.choice((-1, 2, 10 ** 9, 0.5)) + rng.choice((-1, 0, 1))
        else:
            parent[path[-1]] = copy.deepcopy(rng.choice(HOSTILE))
    return value


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
    """Bytes with one to four places cut out, flipped, repeated or filled."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        a = rng.randrange(len(content) + 1)
        b = min(len(content), a + rng.choice((1, 1, 2, 5, 20)))
        kind = rng.randrange(5)
        if kind == 0:
            del content[a:b]
        elif kind == 1 and a < len(content):
            content[a] ^= 1 << rng.randrange(8)
        elif kind == 2:
            content[a:a] = content[a:b] * rng.choice((1, 3, 50))
        elif kind == 3:
            content[a:a] = rng.choice((b"\x00", b"\xff\xfe", b'"', b"{", b"}", b"[" * 2000, b"\n", b",", b"9" * 5000, b"\\ud800", b"NaN",
                                       b"\xf0\x9f", b"\\"))
        else:
            del content[a:]
    return bytes(content)


def mutated_lines(seed_name: str, rows: list[dict], n: int = N):
    """n files of JSON lines: half of them spoilt as values, half as bytes."""
    rng = random.Random(seed_name)
    for i in range(n):
        if i % 2:
            lines = [json.dumps(mutate_value(rng, row), ensure_ascii=bool(i % 4 == 1)) + "\n" for row in rows]
            yield "".join(lines).encode("utf-8", "surrogatepass")
        else:
            yield mutate_bytes(rng, "".join(json.dumps(row) + "\n" for row in rows).encode())


def fuzz(inputs, use, n: int = N) -> None:
    """use(input) for each of n inputs must succeed or end in a BadInput; each happens, and all else fails the test.

    None may hang, or need more memory than twice its size and 2 MB (tracemalloc sees Python's and numpy's, and is slow: every
    tenth input is watched).
    """
    counts = Counter()
    for i, content in enumerate(inputs):
        start = time.process_time()
        if i % 10 == 0:
            tracemalloc.start()
        try:
            use(content)
            counts["used"] += 1
        except BadInput as error:
            counts["refused"] += 1
            assert str(error).strip()
        except BaseException as error:
            pytest.fail(f"{type(error).__name__}: {str(error)[:200]} for {content!r:.3000}")
        if tracemalloc.is_tracing():
            assert tracemalloc.get_traced_memory()[1] < 2 * len(content) + 2_000_000, content[:3000]
            tracemalloc.stop()
        assert time.process_time() - start < SECONDS, content[:3000]
    assert i + 1 == n and counts["used"] and counts["refused"] > n // 10, counts


# ---------------------------------------------------------------------------------------------- rows

@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_solutions(tmp_path, name, strict):
    """As JSON lines, and every third file as an array.

    With `strict`, each row is read or refused; else dropped rows are counted.
    """
    path, turn = tmp_path / "rows.json", itertools.count()

    def use(content: bytes):
        path.write_bytes(content if next(turn) % 3 else b"[" + content.strip().replace(b"\n", b",") + b"]")
        counts, firsts = Counter(), {}
        for row_id, found in read_labelled_steps(path, counts, strict, firsts):
            for step, case in found:
                assert isinstance(row_id, str) and isinstance(step, str)
                assert isinstance(case.label, bool) and case.now_step.strip() and case.problem.strip()
                assert all(isinstance(step, str) and step.strip() for step in case.previous_steps)
                json.dumps(case.__dict__, ensure_ascii=False).encode()  # can be written
        assert set(firsts) == {reason for reason in counts if reason.startswith("dropped row")} and not (
            strict and firsts
        )

    fuzz(mutated_lines("solutions", [FORMATS[name]] * 2), use)


@pytest.mark.parametrize("name", ["processbench", "evaluation"])
def test_solutions_to_score(tmp_path, name):
    path = tmp_path / "rows.json"

    def use(content: bytes):
        path.write_bytes(content)
        for where, solution in read_solutions(path):
            assert isinstance(where, str) and isinstance(solution.id, str) and solution.problem.strip()
            assert solution.steps and (solution.label is None or -1 <= solution.label < len(solution.steps))

    first = EVALUATION | {"previous_steps": "", "now_step": "Step 1: 3 + 4 = 7"}
    fuzz(mutated_lines("score", [PROCESSBENCH] if name == "processbench" else [EVALUATION, first]), use)


def test_packed_rows(tmp_path):
    path, rng = tmp_path / "rows", random.Random("packed")
    whole = gzip.compress((json.dumps(PROCESSBENCH) + "\n").encode() * 20)

    def use(content: bytes):
        path.write_bytes(content)
        for where, row in read_rows(path):
            assert isinstance(where, str) and isinstance(row, dict)

    fuzz((mutate_bytes(rng, whole) if rng.random() < 0.7 else whole for _ in range(N)), use)


def test_cases(tmp_path):
    path = tmp_path / "cases.jsonl"

    def use(content: bytes):
        path.write_bytes(content)
        for where, row in read_jsonl(path):
            assert read_case(row, where).label in (True, False, None)
    fuzz(mutated_lines("cases", [CASE, CASE]), use)


def test_samples(tmp_path):
    path = tmp_path / "samples.jsonl"

    def use(content: bytes):
        path.write_bytes(content)
        for where, row in read_jsonl(path):
            read_case(row.get("case", row), where)
            for a in read_analyses(row, where):
                assert a.verdict in (True, False, None) and (a.p_yes is None or 0 <= a.p_yes <= 1) and a.n_tokens >= 0
    fuzz(mutated_lines("samples", [SAMPLES]), use)


CHAT = {"messages": [{"role": "user", "content": "Is it right?"}, {"role": "assistant", "content": "No"}], "tools": None}
CHAT_PAIR = {"prompt": CHAT["messages"][:1], "chosen": CHAT["messages"][1:], "rejected": {"from": "gpt", "value": "Yes"}}


@pytest.mark.parametrize("row, read", [
    (SFT, read_example), ({"text": "Tom<|im_end|>"}, read_example), ({"instruction": "I", "input": "i", "output": "o"}, read_example),
    (CHAT, read_example), (PAIR, read_pair), (CHAT_PAIR, read_pair),
], ids=["sft", "text", "alpaca", "chat", "pairs", "chat pairs"])
def test_training_examples(tmp_path, tiny_folder, row, read):
    tokenizer, path = load_tokenizer(tiny_folder), tmp_path / "train.jsonl"

    def use(content: bytes):
        path.write_bytes(content)
        examples = Examples(str(path), read, tokenizer, micro_tokens=500, context=500)
        batches = pack(examples.units(examples.kept.tolist()), examples.micro_tokens)
        assert sum(len(batch.examples) for batch in batches) + examples.n_left_out == len(examples.rows)
        assert all(start >= 1 for batch in batches for start in batch.starts)
    fuzz(mutated_lines("train", [row, row]), use)


# ---------------------------------------------------------------------------------------------- checkpoints

@pytest.fixture()
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "checkpoint")


def test_config(tmp_path):
    rng, good = random.Random("config"), [make_config(family, True) for family in ("qwen2", "llama3_rope")]

    def spoilt(i: int) -> bytes:
        return json.dumps(mutate_value(rng, good[i % 2])).encode() if i % 5 else mutate_bytes(rng, json.dumps(good[i % 2]).encode())

    def use(content: bytes):
        (tmp_path / "config.json").write_bytes(content)
        config = load_config(tmp_path)
        assert config.head_dim % 2 == 0 and config.num_attention_heads % config.num_key_value_heads == 0
    fuzz(map(spoilt, range(N)), use)


def test_a_model_with_a_spoilt_config(folder):
    """What the reader lets pass, the weights must fit.

    Then the model computes something finite, or says that it cannot.
    """
    rng, good = random.Random("model"), json.loads((folder / "config.json").read_text())
    torch.set_grad_enabled(False)
    try:
        def use(content: bytes):
            (folder / "config.json").write_bytes(content)
            sampler = Sampler(load_model(folder), load_tokenizer(folder), load_prompt(None, None), Sampling(k=1, max_new_tokens=2))
            [(_, [analysis])] = sampler.analyses([Case("p", (), "s")])
            assert 0 <= analysis.p_yes <= 1
        fuzz((json.dumps(mutate_value(rng, good)).encode() for _ in range(200)), use, 200)
    finally:
        torch.set_grad_enabled(True)


def test_safetensors_header(folder):
    """The header is eight bytes of length and a JSON object; the data follow."""
    config = make_config("qwen2", True, hidden_size=16, intermediate_size=16, vocab_size=416, num_hidden_layers=1)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(random_tensors(config), folder / "model.safetensors", metadata={"format": "pt"})
    whole = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header, data, rng = json.loads(whole[8:8 + size]), whole[8 + size:], random.Random("safetensors")
    load_model(folder)

    def spoilt(i: int) -> bytes:
        if i % 3 == 0:
            return mutate_bytes(rng, whole[:8 + size]) + data
        text = json.dumps(mutate_value(rng, header)).encode()
        if i % 3 == 1:
            length = rng.choice((len(text), len(text) + 1, 0, 2 ** 63, 2 ** 40, rng.randrange(5000)))
            return length.to_bytes(8, "little") + text + data
        return len(text).to_bytes(8, "little") + text + data[:rng.choice((len(data), len(data) // 2, 0))]

    def use(content: bytes):
        (folder / "model.safetensors").write_bytes(content)
        assert all(p.shape for p in load_model(folder).parameters())
    fuzz(map(spoilt, range(N)), use)


@pytest.mark.parametrize("name, n", [("tokenizer.json", N), ("tokenizer_config.json", 200), ("generation_config.json", 200)])
def test_tokenizer_files(folder, name, n):
    whole, rng = (folder / name).read_bytes(), random.Random(name)
    value = json.loads(whole)
    texts = ["Tom has 12 apples. Yes", f"<|im_end|>{VERIFICATION} No", "", "ки\x00𝔘 \n\n"]

    def use(content: bytes):
        (folder / name).write_bytes(content)
        tokenizer = load_tokenizer(folder)
        yes_no_ids(tokenizer)
        for text in texts:
            tokenizer.decode(tokenizer.response(text))
            assert max(tokenizer.chat(text), default=0) < tokenizer.vocab_size
    fuzz((json.dumps(mutate_value(rng, value)).encode() if i % 2 else mutate_bytes(rng, whole) for i in range(n)), use, n)


# --------------------------------------------------------------------------------- chat templates and prompts

LLAMA = ("{{- bos_token }}{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content']|trim %}"
         "{%- set messages = messages[1:] %}"
         "{%- else %}{%- set system = '' %}{%- endif %}{{- '<|start|>system\n' ~ system ~ '<|end|>' }}"
         "{%- macro show(m) %}{{ '<|start|>' + m.role + '\n' + m['content'] | trim + '<|end|>' }}{% endmacro %}"
         "{%- for m in messages %}{{- show(m) }}{%- if not loop.last %}{{ 'x' * 3 }}{% endif %}{%- endfor %}"
         "{%- for i in range(3) %}{{ i }}{% endfor %}"
         "{%- if add_generation_prompt %}{{- '<|start|>assistant\n' }}{%- endif %}")
PIECES = ["{% for a in range(10 ** 9) %}", "{% for a in range(99999) %}", "{% endfor %}", "{{ 'a' * 10 ** 10 }}",
          "{% set x = (x or 'a') + (x or 'a') %}", "* 10 ** 9",
          "| center(10 ** 9)", "| replace('', 'a' * 999)", "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "** 99999999",
          "~ messages", "{{ messages }}",
          "{{ self }}", ".__class__", "{% include 'x' %}", "{{ '%999999999d' % 1 }}", "{% raw %}", "{{", "}}", "{%", "%}", "{#", "[0]",
          "[:]", "(", ")", "|tojson", "|list",
          "{% if true %}", "{% endif %}", "{% break %}", "|map('upper')", "{{ messages[0].content }}", "{% set ns = namespace(x='a') %}",
          "{% set ns.x = ns.x ~ ns.x %}"]


def test_chat_templates(folder):
    rng = random.Random("template")

    def spoilt() -> bytes:
        text = rng.choice((CHATML, LLAMA))
        for _ in range(rng.randint(1, 3)):
            a = rng.randrange(len(text) + 1)
            text = text[:a] + rng.choice(PIECES) + text[a + rng.choice((0, 0, 0, 3, 20)):]
        return text.encode() if rng.randrange(4) else mutate_bytes(rng, text.encode())

    def use(content: bytes):
        (folder / "chat_template.jinja").write_bytes(content)
        tokenizer = load_tokenizer(folder)
        assert "Tom" in tokenizer.decode(tokenizer.chat("Tom"))
    fuzz((spoilt() for _ in range(150)), use, 150)  # each is rendered in a process of its own


def test_prompt_files(tmp_path):
    whole, rng, path = b"Problem: {problem}\nBefore: {previous_steps}\nNow: {now_step}\n", random.Random("prompt"), tmp_path / "prompt.txt"

    def use(content: bytes):
        path.write_bytes(content)
        text = load_prompt(str(path), None).fill(Case("PROBLEM {now_step}", ("A",), "NOW {problem}"))
        assert text.count("PROBLEM {now_step}") == 1 and text.count("NOW {problem}") == 1
    fuzz((mutate_bytes(rng, whole) for _ in range(N)), use)
