"""The two training scripts as a user runs them: data, schedule, overfitting, DPO, checkpoints, kills, refusals."""
import contextlib
import dataclasses
import errno
import gzip
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from tokenizers import normalizers

from checkpoint import load_for_training, weights
from plumbing import ranks
import data
import rprm
import train_dpo
import train_sft
import plumbing.run as training
from bench.kill import content
from checkpoint import load_model, load_tokenizer
from plumbing.cli import run
from plumbing.errors import BadInput, Stopped
from conftest import HANG, ROOT, kill_and_resume, make_config, start, wait_for_lines, write_checkpoint
from formats.examples import Examples
from formats.turns import read_example, read_pair
from formats.verdicts import VERIFICATION
from plumbing.files import json_line
from plumbing.run import epoch_batches, learning_rate

WORDS = "apples pens boxes sum right mistake calculation problem step half answer".split()


def text(rng, n):
    return " ".join(rng.choice(WORDS) for _ in range(n))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def sft_rows(n, seed=0):
    rng = random.Random(seed)
    return [{"prompt": "Is it right? " + text(rng, 4), "response": text(rng, 5), "problem": "p"} for _ in range(n)]


def pair_rows(n, seed=0):
    """Chosen responses say Yes, rejected ones No: a preference that can be learned."""
    rng = random.Random(seed)
    return [{"prompt": "Is it right? " + text(rng, 3), "chosen": text(rng, 2) + " Yes", "rejected": text(rng, 2) + " No"} for _ in range(n)]


def run_script(script, *arguments, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, arguments)], capture_output=True, text=True, env=environment,
                          **options)


def run_here(script, *arguments):
    """A script's command line within this process -> its exit code. Any exception but the exit is a traceback."""
    with pytest.raises(SystemExit) as exit:
        run((script.Config, script.main), argv=[str(a) for a in arguments])
    return exit.value.code


@pytest.fixture(autouse=True)
def own_signals():
    """A run takes over SIGINT and SIGTERM; pytest gets them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def metrics(out, split="train"):
    return [row for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if row["split"] == split]


def files_of(folder):
    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*")) if path.is_file()}


# ---------------------------------------------------------------------------------------------- order and schedule

def rate(step, steps, warmup=0.2, schedule="cosine"):
    return learning_rate(step, steps, 1.0, warmup, schedule)


def batches(n, batch_size, epochs=2, max_steps=None, seed=0):
    return epoch_batches(range(n), batch_size, epochs, max_steps, seed)


def test_learning_rate_by_hand():
    """10 steps, 2 of warm-up: 0.5, 1.0, then a cosine over 8 steps from 1."""
    rates = [rate(step, 10) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.5)
    assert rates[9] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert rate(9, 10, schedule="constant") == 1.0
    assert rate(0, 1, warmup=0.0) == 1.0


def test_an_epoch_meets_every_example_once_in_an_order_of_its_own():
    steps, numbers = batches(10, 4)
    assert steps == 6
    epochs = [[i for step in steps for i in numbers(step)] for steps in (range(3), range(3, 6))]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1]
    again = batches(10, 4)[1]
    assert [again(step) for step in range(6)] == [numbers(step) for step in range(6)]
    assert batches(10, 4, seed=1)[1](0) != numbers(0)


def test_the_order_does_not_depend_on_batch_size_or_what_was_run_before():
    orders = []
    for batch_size in (4, 5, 10):
        torch.rand(7), np.random.rand(7), random.random()
        steps, numbers = batches(10, batch_size)
        orders.append([i for step in reversed(range(steps)) for i in reversed(numbers(step))][::-1])  # asked for in any order
    assert orders[0] == orders[1] == orders[2]


def test_max_steps_cuts_the_run_and_its_schedule():
    """10 examples by 4 are 3 steps an epoch; 5 steps of 6 are done, and the cosine ends with them."""
    assert [batches(10, 4, max_steps=most)[0] for most in (None, 5, 100)] == [6, 5, 6]
    assert rate(4, 5) == pytest.approx(0.5 * (1 + math.cos(math.pi * 3 / 4)))


# ---------------------------------------------------------------------------------------------- examples

def read(path, read_row, tokenizer, micro_tokens=600, context=4096):
    return Examples(path, read_row, tokenizer, micro_tokens, context)


def reference_of(model, folder, pairs, batch_size):
    """The reference's log-probabilities, through the table beside the pairs."""
    config = train_dpo.Config(model=str(folder), train=pairs.path, out="", batch_size=batch_size, device="cpu")
    return train_dpo.reference_logprobs(config, model, pairs)


def test_official_field_names_and_texts_train_as_they_are(tmp_path, tiny_folder):
    tokenizer = load_tokenizer(tiny_folder)
    ours = read(write(tmp_path / "a", [{"prompt": "P <|im_end|>", "response": "R <|im_end|>"}]), read_example, tokenizer)[0]
    official = read(write(tmp_path / "b", [{"instruction": "P <|im_end|>", "output": "R <|im_end|>"}]), read_example, tokenizer)[0]
    assert ours == official == (tokenizer.chat("P <|im_end|>"), [tokenizer.response("R <|im_end|>")])
    assert ours[1][0].count(tokenizer.eos_ids[0]) == 1  # what is spelled out is text; the one real end is ours
    both = [read(write(tmp_path / name, [{field: "P", "chosen": "C", "rejected": "R"}]), read_pair, tokenizer)[0]
            for name, field in (("c", "prompt"), ("d", "instruction"))]
    assert both[0] == both[1] == (tokenizer.chat("P"), [tokenizer.response("C"), tokenizer.response("R")])


@pytest.mark.parametrize("end", ["", "<|im_end|>"])
def test_a_text_trains_every_token_but_the_first_and_means_its_special_tokens(tmp_path, tiny_folder, end):
    tokenizer = load_tokenizer(tiny_folder)
    first, [rest] = read(write(tmp_path / "a", [{"text": "<|im_start|>Yes it is" + end}]), read_example, tokenizer)[0]
    assert tokenizer.decode(first) == "<|im_start|>"
    assert tokenizer.decode(rest) == "Yes it is<|im_end|>"


@pytest.mark.parametrize("script, line, said", [
    (train_sft, '{"prompt": "a"}', "field 'response' is missing"), (train_sft, '{"prompt": 3, "response": "b"}', "field 'prompt'"),
    (train_sft, '{"instruction": "a", "output": null}', "field 'output'"), (train_sft, '{"text": ["a"]}', "field 'text'"),
    (train_sft, "[1]", "expected an object"), (train_sft, '{"prompt": "a"', "not valid JSON"),
    (train_sft, '{"text": "\\ud800"}', "not valid JSON"),
    (train_dpo, '{"prompt": "a", "chosen": "b"}', "field 'rejected' is missing"),
    (train_dpo, '{"instruction": "a", "chosen": "b", "rejected": 0}', "field 'rejected'"), (train_dpo, '{"text": "a"}', "is missing"),
])
def test_a_bad_line_is_named_before_training(tmp_path, tiny_folder, capsys, script, line, said):
    """Exit code 2 and one line with file, line and field; nothing is written."""
    good = {train_sft: '{"prompt": "a", "response": "b"}', train_dpo: '{"prompt": "a", "chosen": "b", "rejected": "c"}'}[script]
    (tmp_path / "train.jsonl").write_text(f"{good}\n\n{line}\n{good}\n")
    assert run_here(script, "--model", tiny_folder, "--train", tmp_path / "train.jsonl", "--out", tmp_path / "out") == 2
    [error] = capsys.readouterr().err.strip().splitlines()
    assert error.startswith(f"error: {tmp_path / 'train.jsonl'}:3: ") and said in error
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_sft.py", "train_dpo.py"])
def test_a_missing_file_is_named(tmp_path, tiny_folder, script):
    """As a process, as the user sees it."""
    path = tmp_path / "absent.jsonl"
    done = run_script(script, "--model", tiny_folder, "--train", path, "--out", tmp_path / "out")
    assert done.returncode == 2 and done.stderr == f"error: {path}: no such file; check the path\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", [train_sft, train_dpo])
def test_an_empty_file_is_named(tmp_path, tiny_folder, script, capsys):
    (tmp_path / "empty.jsonl").touch()
    assert run_here(script, "--model", tiny_folder, "--train", tmp_path / "empty.jsonl", "--out", tmp_path / "out") == 2
    assert f"{tmp_path}/empty.jsonl: has no examples" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("script, line, said", [
    (train_sft, {"messages": [{"role": "user", "content": "a"}] * 2}, "field 'messages': expected one turn"),
    (train_sft, {"instruction": "a", "output": "b", "history": [["c", "d"]]}, "field 'history'"),
    (train_dpo, {"chosen": [{"role": "assistant", "content": "b"}], "rejected": "c"}, "field 'chosen': expected one turn"),
])
def test_rows_of_public_formats_that_cannot_be_trained_on_are_named(tmp_path, tiny_folder, capsys, script, line, said):
    train = write(tmp_path / "train.jsonl", [*(sft_rows(1) if script is train_sft else pair_rows(1)), line])
    assert run_here(script, "--model", tiny_folder, "--train", train, "--out", tmp_path / "out") == 2
    [error] = capsys.readouterr().err.strip().splitlines()
    assert error.startswith(f"error: {train}:2: {said}") and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_public_formats_train_as_our_own(tmp_path, tiny_folder):
    """The same texts as our rows, as chat messages, as ShareGPT's and as Alpaca's: the same weights."""
    rows = sft_rows(6)
    user = [{"role": "user", "content": row["prompt"]} for row in rows]
    answer = [{"role": "assistant", "content": row["response"]} for row in rows]
    formats = {
        "ours": rows,
        "messages": [{"messages": [u, a]} for u, a in zip(user, answer)],
        "sharegpt": [{"conversations": [{"from": "human", "value": row["prompt"]}, {"from": "gpt", "value": row["response"]}]} for row in rows],
        "alpaca": [dict(zip(("instruction", "input"), row["prompt"].split("? ")), output=row["response"]) for row in rows],
    }
    formats["ours again"] = [row | {"prompt": row["prompt"].replace("? ", "\n", 1)} for row in rows]  # as Alpaca joins them
    weights = {}
    for name, lines in formats.items():
        train_sft.main(sft_config(tmp_path, tiny_folder, lines))
        weights[name] = (tmp_path / "out/model/model.safetensors").read_bytes()
    assert weights["ours"] == weights["messages"] == weights["sharegpt"] != weights["alpaca"] == weights["ours again"]


@pytest.mark.parametrize("system", [None, "You judge steps.", ""])
def test_chat_messages_are_the_ids_that_transformers_gives(tmp_path, tiny_folder, capsys, system):
    """With a system message and without; of the prompt, and of the whole turn with its end."""
    from transformers import AutoTokenizer
    messages = [{"role": "user", "content": "Is it right?"}, {"role": "assistant", "content": "Yes"}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    examples = read(write(tmp_path / "a.jsonl", [{"messages": messages}]), read_example, load_tokenizer(tiny_folder))
    theirs = AutoTokenizer.from_pretrained(tiny_folder)
    ids = lambda messages, **more: theirs(theirs.apply_chat_template(messages, tokenize=False, **more), add_special_tokens=False).input_ids
    prompt, [response] = examples[0]
    assert prompt == ids(messages[:-1], add_generation_prompt=True)
    assert prompt + response == ids(messages)[:len(prompt + response)]
    assert ("1 examples have a system message" in capsys.readouterr().out) == (system is not None)


@pytest.mark.slow
@pytest.mark.parametrize("script", [train_sft, train_dpo])
def test_rows_train_the_same_whatever_they_are_kept_in(tmp_path, tiny_folder, script):
    """JSON lines, packed, an array, parquet (where pyarrow is there), a folder of shards: the same weights and metrics."""
    make, rows = (sft_config, sft_rows(6)) if script is train_sft else (dpo_config, pair_rows(6))
    plain = Path(write(tmp_path / "a.jsonl", rows))
    files = {"packed": tmp_path / "b.jsonl.gz", "array": tmp_path / "c.json", "folder": tmp_path / "shards"}
    files["packed"].write_bytes(gzip.compress(plain.read_bytes()))
    files["array"].write_text(json.dumps(rows, indent=1))
    files["folder"].mkdir()
    write(files["folder"] / "0.jsonl", rows[:4])
    write(files["folder"] / "1.jsonl", rows[4:])
    with contextlib.suppress(ImportError):
        import pyarrow.parquet
        files["parquet"] = tmp_path / "d.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), files["parquet"])
    runs = {name: tmp_path / name for name in ("plain", *files)}
    for name, path in {"plain": plain, **files}.items():
        script.main(make(tmp_path, tiny_folder, rows, train=str(path), out=str(runs[name])))
        settings = json.loads((runs[name] / "config.json").read_text())
        assert len(settings["content of --train"]) == 16
    for name in files:
        assert same_run(runs["plain"], runs[name]) == [], name


@pytest.mark.slow
def test_other_shards_in_a_folder_are_not_resumed(tmp_path, tiny_folder):
    (tmp_path / "shards").mkdir()
    write(tmp_path / "shards/0.jsonl", sft_rows(4))
    first = sft_config(tmp_path, tiny_folder, sft_rows(1), train=str(tmp_path / "shards"))
    train_sft.main(first)
    write(tmp_path / "shards/1.jsonl", sft_rows(4, seed=1))
    with pytest.raises(BadInput, match="the content of --train is not what the run was begun with"):
        train_sft.main(dataclasses.replace(first, resume=True, overwrite=False))


def test_standard_input_is_not_trained_on(tmp_path, tiny_folder, capsys):
    assert run_here(train_sft, "--model", tiny_folder, "--train", "-", "--out", tmp_path / "out") == 2
    assert "error: -: training reads its examples more than once" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- examples that are left out

def test_no_tokenizer_makes_more_tokens_than_the_bound(tmp_path, tiny_folder, tiny_tokenizer):
    """Of ASCII, of characters that Unicode's normal forms make longest, and of any; under the strongest form, too."""
    rng = random.Random(0)
    anything = lambda: "".join(chr(rng.choice((rng.randrange(32, 127), rng.randrange(0xd800), rng.randrange(0xe000, 0x110000)))) for _ in range(40))
    texts = ["\ufdfa" * 30, "\U0001d160" * 30, "\u0958\u0344" * 20, "a" * 50, "<|im_end|>" * 9, "\x00\x7f" * 9, "", *(anything() for _ in range(40))]
    path = write(tmp_path / "a.jsonl", [{"prompt": text, "response": text} for text in texts])
    for normalizer in (None, normalizers.NFC(), normalizers.NFKD()):
        tokenizer = load_tokenizer(tiny_folder)
        if normalizer:
            tokenizer.backend.normalizer = normalizer
        examples = read(path, read_example, tokenizer, micro_tokens=10 ** 6, context=10 ** 6)
        for i in range(len(texts)):
            prompt, [response] = examples[i]
            assert len(prompt) + len(response) <= examples.most_tokens(examples.turn(i))


@pytest.mark.slow
@pytest.mark.parametrize("script", [train_sft, train_dpo])
def test_a_run_with_examples_left_out_is_a_run_without_them(tmp_path, tiny_folder, script):
    """Of ten examples six are over-long: steps of two are dealt out of the other four, and all is as if there were no others."""
    make, rows, name = (sft_config, sft_rows(4), "response") if script is train_sft else (dpo_config, pair_rows(4), "rejected")
    long = [rows[0] | {name: f"{i} " + "apples " * 300} for i in range(6)]
    mixed = [long[0], rows[0], *long[1:4], rows[1], rows[2], long[4], long[5], rows[3]]
    found = {}
    for out, lines in (("few", rows), ("mixed", mixed)):
        script.main(make(tmp_path, tiny_folder, lines, batch_size=2, micro_tokens=250, epochs=2, out=str(tmp_path / out)))
        found[out] = metrics(tmp_path / out)
    assert len(found["few"]) == 4 and {row["left_out"] for row in found["mixed"]} == {6}
    assert found["few"] == [row | {"left_out": 0} for row in found["mixed"]]
    assert files_of(tmp_path / "few/model") == files_of(tmp_path / "mixed/model")


@pytest.mark.parametrize("script", [train_sft, train_dpo])
@pytest.mark.parametrize("which", ["train", "validation"])
def test_a_file_of_over_long_examples_alone_is_refused_before_training(tmp_path, tiny_folder, capsys, script, which):
    rows = sft_rows(3) if script is train_sft else pair_rows(3)
    files = {name: write(tmp_path / f"{name}.jsonl", rows) for name in ("train", "validation")}
    name = "response" if script is train_sft else "chosen"
    write(tmp_path / f"{which}.jsonl", [row | {name: "apples " * 300} for row in rows])
    flags = ["--train", files["train"], "--validation", files["validation"], "--micro-tokens", 200, "--out", tmp_path / "out"]
    assert run_here(script, "--model", tiny_folder, *flags) == 2
    [error] = capsys.readouterr().err.strip().splitlines()
    assert re.match(f"error: {files[which]}: no example can be trained on .*as over-long: 3.*raise --micro-tokens", error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", [train_sft, train_dpo])
def test_examples_beyond_the_models_context_are_left_out_and_named(tmp_path, tiny_folder, capsys, script):
    """A sequence may have 60 tokens; a pair's two together more. Raising --micro-tokens would not help, and is not said."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 60}))
    tokenizer = load_tokenizer(folder)
    n = 60 - len(tokenizer.chat("P")) - 1
    assert len(tokenizer.encode(" Yes" * n)) == n
    fits, too_long = " Yes" * n, " Yes" * (n + 1)
    make, rows = ((sft_config, [{"prompt": "P", "response": text} for text in (fits, too_long, "R")]) if script is train_sft else
                  (dpo_config, [{"prompt": "P", "chosen": text, "rejected": " No" * n} for text in (fits, too_long, "R")]))
    script.main(make(tmp_path, folder, rows, batch_size=3, micro_tokens=1000))
    [row] = metrics(tmp_path / ("out" if script is train_sft else "dpo"))
    assert row["left_out"] == 1
    printed = capsys.readouterr().out
    assert re.search("left out: .* example 2 has 61 tokens in a sequence, more than the model's context of 60", printed)
    assert "left out as over-long: 1" in printed and "more than --micro-tokens" not in printed


def test_a_pair_of_equal_responses_is_left_out_and_counted(tmp_path, tiny_folder, capsys):
    """It would be trained on in vain, with a loss of log 2 at every step. In training and in validation."""
    rows = pair_rows(5)
    rows[3]["rejected"] = rows[3]["chosen"]
    held_out = write(tmp_path / "held_out.jsonl", rows)
    train_dpo.main(dpo_config(tmp_path, tiny_folder, rows, validation=held_out, batch_size=5))
    [row], [validation] = metrics(tmp_path / "dpo"), metrics(tmp_path / "dpo", "validation")
    assert (row["pairs"], row["left_out"], validation["pairs"]) == (4, 1, 4)
    printed = capsys.readouterr().out
    assert printed.count("example 4 has the same text as chosen and rejected") == 2
    assert printed.count("4 examples; left out as over-long: 0, as pairs of equal responses: 1") == 2
    [cache] = caches(tmp_path)
    assert np.isinf(np.load(cache)).tolist() == [[i == 3] * 2 for i in range(5)]


def test_a_text_of_one_token_is_left_out_and_counted(tmp_path, tiny_folder, capsys):
    """Nothing of it can be predicted. A file of such texts alone is refused, for validation too."""
    nothing, some = [{"text": ""}], [{"text": ""}, {"text": "a b c"}]
    settings = dict(model=str(tiny_folder), lr=1e-4, batch_size=1, micro_tokens=600, device="cpu", overwrite=True, out=str(tmp_path / "sft"))
    train_sft.main(train_sft.Config(train=write(tmp_path / "a.jsonl", some), validation=write(tmp_path / "b.jsonl", some), **settings))
    [row], [validation] = metrics(tmp_path / "sft"), metrics(tmp_path / "sft", "validation")
    assert row["left_out"] == 1 and math.isfinite(row["loss"]) and math.isfinite(validation["loss"])
    assert capsys.readouterr().out.count("1 examples; left out as over-long: 0, as texts of one token: 1") == 2
    for train, held_out in ((nothing, some), (some, nothing)):
        with pytest.raises(BadInput, match="no example can be trained on"):
            train_sft.main(train_sft.Config(train=write(tmp_path / "a.jsonl", train), validation=write(tmp_path / "b.jsonl", held_out), **settings))


def test_an_empty_validation_file_is_said_and_the_last_model_kept(tmp_path, tiny_folder, capsys):
    (tmp_path / "v.jsonl").touch()
    train_sft.main(sft_config(tmp_path, tiny_folder, sft_rows(4), validation=str(tmp_path / "v.jsonl")))
    assert "v.jsonl: is empty; training goes on without validation" in capsys.readouterr().out
    assert metrics(tmp_path / "out", "validation") == [] and (tmp_path / "out/model/config.json").exists()


# ---------------------------------------------------------------------------------------------- the words that go with the model

WORDS_OF_A_CASE = "Judge: {problem} {previous_steps} {now_step}\n"


@pytest.mark.slow
@pytest.mark.parametrize("script", [train_sft, train_dpo])
def test_the_words_of_prompt_file_go_with_the_model(tmp_path, tiny_folder, script, capsys):
    """Before those beside the data, and those before the model's own; what went is said, and that nothing did."""
    make, rows = (sft_config, sft_rows(4)) if script is train_sft else (dpo_config, pair_rows(4))
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    out = tmp_path / ("out" if script is train_sft else "dpo")
    words = {"model": model / "verification_prompt.txt", "data": tmp_path / ("train" if script is train_sft else "pairs"), "flag": tmp_path / "w.txt"}
    words["data"] = words["data"].with_suffix(".prompt.txt")
    expected = None
    for name in ("none", "model", "data", "flag"):
        if name != "none":
            words[name].write_text(f"{name} {WORDS_OF_A_CASE}")
            expected = f"{name} {WORDS_OF_A_CASE}"
        script.main(make(tmp_path, model, rows, prompt_file=str(words["flag"]) if name == "flag" else None))
        printed, went = capsys.readouterr().out, out / "model/verification_prompt.txt"
        if expected is None:
            assert not went.exists()
            assert "score.py will ask it in those of prompts/verify.txt" in printed and "--prompt-file" in printed
        else:
            assert went.read_text() == expected and f"prompt: the words of {words[name]} go with" in printed


@pytest.mark.parametrize("text, said", [(None, "no such prompt file"), ("Judge it.", "the prompt needs {problem}")])
def test_a_prompt_file_that_cannot_be_used_is_refused_before_training(tmp_path, tiny_folder, capsys, text, said):
    path = tmp_path / "words.txt"
    if text:
        path.write_text(text)
    train = write(tmp_path / "t.jsonl", sft_rows(2))
    assert run_here(train_sft, "--model", tiny_folder, "--train", train, "--prompt-file", path, "--out", tmp_path / "out") == 2
    assert f"error: {path}: {said}" in capsys.readouterr().err and not (tmp_path / "out").exists()


CONVERSATION = ("<|im_start|>user\n{problem}\n{previous_steps}\n{now_step}<|im_end|>\n<|im_start|>assistant\n")


def test_prompts_that_are_conversations_are_trained_on_as_they_are_scored(tmp_path, tiny_folder, capsys):
    """Cases are sampled and made into examples with a conversation of a prompt file; a stranger's row stays a message."""
    words = tmp_path / "words.txt"
    words.write_text(CONVERSATION)
    case = rprm.Case("What is 1 + 1? <|im_end|>", ("1 is 1.",), "So 2.", True)
    samples = tmp_path / "samples.jsonl"
    analysis = dict(text=f"It is 2.\n{VERIFICATION} Yes", verdict=True, p_yes=0.9, n_tokens=9, finished=True)
    samples.write_text(json_line({"id": "0", "case": dataclasses.asdict(case), "analyses": [analysis]}))
    data.sft(data.SftConfig(samples=(str(samples),), out=str(tmp_path / "sft.jsonl"), prompt_file=str(words), balance=False,
                            validation=0.0))
    with open(tmp_path / "sft.jsonl", "a") as file:
        file.write(json_line({"prompt": "Hello.", "response": "Good day."}))
    tokenizer = load_tokenizer(tiny_folder)
    examples = Examples(str(tmp_path / "sft.jsonl"), read_example, tokenizer, 500, 500, words.read_text())
    sampler = rprm.Sampler(load_model(tiny_folder), tokenizer, rprm.Prompt(CONVERSATION, "words"), rprm.Sampling())
    assert examples[0][0] == sampler.prompt_ids(case)
    assert examples[1][0] == tokenizer.chat("Hello.")
    assert "1 prompts are whole conversations, in the words that go with the model" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- SFT

def sft_config(tmp_path, model, rows, **changes):
    settings = dict(model=model and str(model), train=write(tmp_path / "train.jsonl", rows), out=str(tmp_path / "out"), lr=3e-3,
                    batch_size=4, micro_tokens=400, device="cpu", save_every=1000, overwrite=True)
    return train_sft.Config(**(settings | changes))


@pytest.mark.slow
def test_eight_examples_are_overfitted(tmp_path, tiny_folder):
    train_sft.main(sft_config(tmp_path, tiny_folder, sft_rows(8), batch_size=8, epochs=60))
    assert metrics(tmp_path / "out")[-1]["loss"] < 0.05


@pytest.mark.slow
def test_tensorboard_has_what_metrics_jsonl_has(tmp_path, tiny_folder):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="pip install tensorboard")
    train_sft.main(sft_config(tmp_path, tiny_folder, sft_rows(8), tensorboard=True))
    board = reader.EventAccumulator(str(tmp_path / "out/tensorboard")).Reload()
    for name in ("loss", "lr", "tree_tokens"):
        expected = [(line["step"], pytest.approx(line[name])) for line in metrics(tmp_path / "out")]
        assert [(event.step, event.value) for event in board.Scalars(f"train/{name}")] == expected


def test_tensorboard_that_is_missing_is_said_before_training(tmp_path, tiny_folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    train = write(tmp_path / "t.jsonl", sft_rows(2))
    assert run_here(train_sft, "--model", tiny_folder, "--train", train, "--out", tmp_path / "out", "--tensorboard") == 2
    assert "error: --tensorboard needs the package tensorboard: pip install tensorboard" in capsys.readouterr().err


@pytest.mark.slow
def test_the_result_opens_in_transformers_with_the_same_logits(tmp_path, tiny_folder):
    from transformers import AutoModelForCausalLM
    from model import Tree, tree_attention
    train_sft.main(sft_config(tmp_path, tiny_folder, sft_rows(8)))
    model, tree = load_model(tmp_path / "out/model"), Tree([list(range(5, 40))])
    ours = model.logits(model(tree.ids, tree.positions, tree_attention(tree.end)))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")(tree.ids[None]).logits[0]
    assert (ours - theirs).abs().max() < 1e-4
    before = load_model(tiny_folder)
    assert not torch.equal(before.embed.weight, model.embed.weight)


def transformers_sums(folder, rows, fields):
    """[(log π of the response under Transformers and its own chat template, its tokens)] for each field of each row."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    found = []
    for row in rows:
        before = tokenizer.apply_chat_template([{"role": "user", "content": row["prompt"]}], tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(before, add_special_tokens=False).input_ids
        for field in fields:
            response = tokenizer(row[field], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
            ids = torch.tensor([prompt + response])
            with torch.no_grad():
                logprobs = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
            found.append((logprobs[len(prompt) - 1:].sum().item(), len(response)))
    return found


@pytest.mark.slow
def test_the_first_losses_equal_transformers_on_the_same_texts(tmp_path, tiny_folder):
    """From the file's line to the logged number: template, prompt mask, end of turn, mean over tokens or pairs."""
    rows = [row | {"response": row["response"] + " apples" * n} for n, row in enumerate(sft_rows(6))]
    train_sft.main(sft_config(tmp_path, tiny_folder, rows, batch_size=6))
    sums = transformers_sums(tiny_folder, rows, ["response"])
    [row] = metrics(tmp_path / "out")
    assert row["tokens"] == sum(n for _, n in sums)
    assert row["loss"] == pytest.approx(-sum(s for s, _ in sums) / row["tokens"], abs=1e-5)

    rows = [row | {"chosen": row["chosen"] + " apples" * n} for n, row in enumerate(pair_rows(6))]
    train_dpo.main(dpo_config(tmp_path, tiny_folder, rows, batch_size=6, nll=0.5))
    sums = transformers_sums(tiny_folder, rows, ["chosen", "rejected"])
    [row] = metrics(tmp_path / "dpo")
    for place, name in enumerate(("chosen", "rejected")):
        assert row[f"{name}_logprob"] == pytest.approx(sum(s for s, _ in sums[place::2]) / 6, abs=1e-4)
        assert row[f"{name}_length"] == pytest.approx(sum(n for _, n in sums[place::2]) / 6)
    assert row["loss"] == pytest.approx(math.log(2) - 0.5 * sum(s / n for s, n in sums[::2]) / 6, abs=1e-4)


def test_the_first_update_by_hand(tmp_path, tiny_folder, monkeypatch):
    """AdamW's first step from its formula, with the gradient clipped to norm 0.1 and decay of matrices alone."""
    before, seen, clip, log = {}, {}, train_sft.clip_grad_norm_, training.Run.log

    def look_before(parameters, most):
        parameters = list(parameters)
        before.update({p: (p.detach().clone(), p.grad.clone()) for p in parameters})
        return clip(parameters, most)

    def look_after(run, *given, **named):
        seen.update({name: (*before[p], p.detach().clone()) for name, p in run.model.named_parameters()})
        return log(run, *given, **named)
    monkeypatch.setattr(train_sft, "clip_grad_norm_", look_before)
    monkeypatch.setattr(training.Run, "log", look_after)
    train_sft.main(sft_config(tmp_path, tiny_folder, sft_rows(8), batch_size=8, weight_decay=0.1, clip=0.1, lr=1e-2, warmup=0.0))
    norm = math.sqrt(sum(float((g ** 2).sum()) for _, g, _ in seen.values()))
    assert norm > 0.1 and metrics(tmp_path / "out")[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)
    for name, (p, gradient, after) in seen.items():
        g = gradient * (0.1 / norm)
        expected = p * (1 - 1e-2 * 0.1 * (p.dim() >= 2)) - 1e-2 * g / (g.abs() + 1e-8)  # m / (1 - β1) = g, √(v / (1 - β2)) = |g|
        assert torch.allclose(after, expected, atol=2e-5), name


def test_checkpointed_activations_give_the_same_run(tmp_path, tiny_folder):
    found = []
    for flag in (False, True):
        train_sft.main(sft_config(tmp_path, tiny_folder, sft_rows(8), checkpoint_activations=flag))
        found.append([(row["loss"], row["grad_norm"]) for row in metrics(tmp_path / "out")])
    assert np.allclose(found[0], found[1], rtol=1e-6)


def test_a_step_does_not_depend_on_the_size_of_its_trees(tmp_path, tiny_folder):
    """One optimizer step in one tree or in many: the same loss and gradient norm."""
    found = []
    for micro_tokens in (60, 10000):
        train_sft.main(sft_config(tmp_path, tiny_folder, sft_rows(12), batch_size=12, micro_tokens=micro_tokens))
        found.append(metrics(tmp_path / "out")[0])
    assert found[0]["tree_tokens"] > found[1]["tree_tokens"]
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5)
    assert found[0]["grad_norm"] == pytest.approx(found[1]["grad_norm"], rel=1e-4)


def test_over_long_examples_are_counted_and_named(tmp_path, tiny_folder, capsys):
    rows = sft_rows(5)
    rows[2]["response"] = "apples " * 300
    train_sft.main(sft_config(tmp_path, tiny_folder, rows, batch_size=5, micro_tokens=200, epochs=2))
    assert [row["left_out"] for row in metrics(tmp_path / "out")] == [1, 1]
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("example 3 has") == 1
    assert "left out as over-long: 1" in printed.out


@pytest.mark.slow
def test_the_best_checkpoint_by_validation_is_kept(tmp_path, tiny_folder):
    """Validation texts are unlike the training texts: overfitting makes them worse, so the best is not the last."""
    rng = random.Random(5)
    held_out = write(tmp_path / "validation.jsonl", [{"prompt": "?", "response": text(rng, 6)} for _ in range(4)])
    train_sft.main(sft_config(tmp_path, tiny_folder, sft_rows(4), validation=held_out, epochs=30, eval_every=1, lr=1e-2))
    losses = [row["loss"] for row in metrics(tmp_path / "out", "validation")]
    assert min(losses) < losses[-1] - 0.01
    model, examples = load_model(tmp_path / "out/model"), read(held_out, read_example, load_tokenizer(tiny_folder))
    assert train_sft.evaluate(model, examples, batch_size=4) == pytest.approx(min(losses), rel=1e-5)


@pytest.mark.slow
def test_from_scratch_trains_texts(tmp_path, tiny_folder):
    folder = tmp_path / "new"
    shutil.copytree(tiny_folder, folder)
    (folder / "model.safetensors").unlink()
    rows = [{"text": "<|im_start|>half of 36 is 18"}] * 4
    train_sft.main(sft_config(tmp_path, None, rows, from_scratch=str(folder / "config.json"), epochs=80, lr=1e-2))
    losses = [row["loss"] for row in metrics(tmp_path / "out")]
    assert losses[0] == pytest.approx(math.log(416), abs=0.5)  # a uniform guess over the vocabulary
    assert losses[-1] < 0.1


def test_a_non_finite_loss_stops_before_the_update(tmp_path, tiny_folder, monkeypatch):
    """The third step's loss is NaN: two steps are logged, the checkpoint after them is whole, no model is written over."""
    calls, loss = [], train_sft.sft_loss

    def broken(logprobs, n_tokens):
        calls.append(1)
        return loss(logprobs, n_tokens) * (math.nan if len(calls) == 3 else 1)
    monkeypatch.setattr(train_sft, "sft_loss", broken)
    with pytest.raises(BadInput, match="step 2: loss nan"):
        train_sft.main(sft_config(tmp_path, tiny_folder, sft_rows(16), save_every=1, micro_tokens=10000))
    assert len(metrics(tmp_path / "out")) == 2
    [kept] = (tmp_path / "out/checkpoints").iterdir()
    assert kept.name == "step-00000002" and all(torch.isfinite(t).all() for t in load_state(kept).values())


def load_state(folder):
    from safetensors.torch import load_file
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


# ---------------------------------------------------------------------------------------------- DPO

def dpo_config(tmp_path, model, rows, **changes):
    settings = dict(model=str(model), train=write(tmp_path / "pairs.jsonl", rows), out=str(tmp_path / "dpo"), lr=3e-4, batch_size=8,
                    micro_tokens=600, device="cpu", save_every=1000, overwrite=True)
    return train_dpo.Config(**(settings | changes))


def test_dpo_starts_at_log_2_and_learns_the_preference(tmp_path, tiny_folder):
    held_in = write(tmp_path / "held_in.jsonl", pair_rows(24))
    train_dpo.main(dpo_config(tmp_path, tiny_folder, pair_rows(24), validation=held_in, epochs=8, eval_every=24))
    first = metrics(tmp_path / "dpo")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4) and abs(first["margin"]) < 1e-4
    assert metrics(tmp_path / "dpo", "validation")[-1]["accuracy"] > 0.9


def test_dpo_learns_what_the_reference_does_not_know(tmp_path, tiny_folder):
    """Yes is right after "pens" and wrong after "boxes": under the reference about half of the pairs are in order, at the end over 0.9."""
    rows = [{"prompt": f"{noun} {n}", "chosen": right, "rejected": wrong} for n in range(10)
            for noun, right, wrong in (("pens", " Yes", " No"), ("boxes", " No", " Yes"))]
    settings = dpo_config(tmp_path, tiny_folder, rows, epochs=10, lr=1e-3, batch_size=10)
    train_dpo.main(settings)
    [cache] = caches(tmp_path)
    reference = np.load(cache)
    assert 0.3 <= (reference[:, 0] > reference[:, 1]).mean() <= 0.7
    pairs = read(settings.train, read_pair, load_tokenizer(tiny_folder))
    after = reference_of(load_model(tmp_path / "dpo/model"), tmp_path / "dpo/model", pairs, settings.batch_size)
    assert (after[:, 0] > after[:, 1]).mean() > 0.9
    margins = (after - reference)[:, 0] - (after - reference)[:, 1]
    assert (margins > 0).mean() > 0.9


@pytest.mark.parametrize("changes, check", [
    (dict(label_smoothing=0.2), lambda loss: loss == pytest.approx(math.log(2), abs=1e-4)),  # 0.8 log 2 + 0.2 log 2
    (dict(ipo=True, beta=0.25), lambda loss: loss == pytest.approx(4.0, abs=1e-3)),          # (0 - 1 / (2 · 0.25))²
])
def test_the_variants_of_the_loss_reach_training(tmp_path, tiny_folder, changes, check):
    train_dpo.main(dpo_config(tmp_path, tiny_folder, pair_rows(8), **changes))
    [row] = metrics(tmp_path / "dpo")
    assert check(row["loss"])


def test_the_reference_is_computed_anew_for_another_model(tmp_path, tiny_folder, tiny_tokenizer):
    other = write_checkpoint(tmp_path / "other", make_config("qwen2", True), tiny_tokenizer, seed=77)
    for model in (tiny_folder, other, tiny_folder):
        train_dpo.main(dpo_config(tmp_path, model, pair_rows(8)))
        assert metrics(tmp_path / "dpo")[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)  # a stale reference would show
    assert len(caches(tmp_path)) == 2


def test_the_reference_is_computed_anew_for_the_plain_path(tmp_path, tiny_folder):
    """On a GPU the two paths round bf16 differently, and the reference must round as the policy does."""
    for plain in (False, True, False):
        train_dpo.main(dpo_config(tmp_path, tiny_folder, pair_rows(8), plain=plain))
    assert len(caches(tmp_path)) == 2


def test_the_reference_is_computed_anew_for_another_chat_template(tmp_path, tiny_folder):
    """The template's tokens stand before every response, so they are part of what the reference depends on."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    for template in (None, "{{ messages[0]['content'] }}<|im_start|>Verification: "):
        if template:
            (folder / "chat_template.jinja").write_text(template)
        train_dpo.main(dpo_config(tmp_path, folder, pair_rows(8)))
        assert metrics(tmp_path / "dpo")[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert len(caches(tmp_path)) == 2


def test_the_reference_is_computed_anew_for_another_system_message_and_a_longer_context(tmp_path, tiny_folder):
    """A pair beyond a context of 60 has no log-probabilities in its table; beyond one of 100 it is trained on."""
    rows = pair_rows(8)
    rows[2]["chosen"] = " Yes" * 60
    for changes, pairs in ((dict(context=60), 7), (dict(context=100), 8), (dict(context=100, system="Judge."), 8), ({}, 8)):
        train_dpo.main(dpo_config(tmp_path, tiny_folder, rows, **changes))
        [row] = metrics(tmp_path / "dpo")
        assert row["pairs"] == pairs and row["loss"] == pytest.approx(math.log(2), abs=1e-4)  # a stale reference would show
    assert len(caches(tmp_path)) == 4


def test_a_sweep_in_two_processes_shares_the_reference(tmp_path, tiny_folder, monkeypatch):
    """Another run that began with this one completes the cache first: this one goes on with the same numbers."""
    pairs = read(write(tmp_path / "pairs.jsonl", pair_rows(8)), read_pair, load_tokenizer(tiny_folder))

    def faster_rival(batches, **_):
        yield from batches
        [part] = tmp_path.glob("*.part")
        os.rename(part, part.with_suffix(".npy"))
    monkeypatch.setattr("plumbing.table.tqdm", faster_rival)
    found = reference_of(load_model(tiny_folder), tiny_folder, pairs, 8)
    [cache] = caches(tmp_path)
    assert np.isfinite(found).all() and np.array_equal(found, np.load(cache))


def test_a_non_finite_loss_stops_dpo_before_the_update(tmp_path, tiny_folder, monkeypatch):
    loss, calls = train_dpo.dpo_loss, []

    def broken(*given, **named):
        calls.append(1)
        losses, *rest = loss(*given, **named)
        return losses * (math.inf if len(calls) == 2 else 1), *rest
    monkeypatch.setattr(train_dpo, "dpo_loss", broken)
    with pytest.raises(BadInput, match="step 1: loss inf"):
        train_dpo.main(dpo_config(tmp_path, tiny_folder, pair_rows(16), save_every=1, micro_tokens=10000))
    assert len(metrics(tmp_path / "dpo")) == 1
    [kept] = (tmp_path / "dpo/checkpoints").iterdir()
    assert kept.name == "step-00000001" and all(torch.isfinite(t).all() for t in load_state(kept).values())


def test_a_non_finite_gradient_stops_before_the_update(tmp_path, tiny_folder, monkeypatch):
    """The loss is a number, one of its gradients is not: the weights stay as they were loaded."""
    models, loss = [], train_sft.sft_loss

    def broken(logprobs, n_tokens):
        found = loss(logprobs, n_tokens)
        found.register_hook(lambda gradient: gradient * math.nan)
        return found
    load = load_for_training
    monkeypatch.setattr(train_sft, "sft_loss", broken)
    monkeypatch.setattr("formats.training.load_for_training", lambda *given, **named: models.append(load(*given, **named)) or models[0])
    with pytest.raises(BadInput, match="gradient norm nan"):
        train_sft.main(sft_config(tmp_path, tiny_folder, sft_rows(4)))
    for ours, loaded in zip(models[0].parameters(), load_model(tiny_folder).parameters()):
        assert torch.equal(ours, loaded)


def caches(tmp_path):
    return sorted(tmp_path.glob("pairs.reference-*.npy"))


@pytest.mark.slow
def test_the_reference_is_computed_once_for_a_sweep_and_anew_for_other_pairs(tmp_path, tiny_folder, monkeypatch):
    calls, compute = [], train_dpo.response_logprobs
    monkeypatch.setattr(train_dpo, "response_logprobs", lambda model, *rest: calls.append(torch.is_grad_enabled()) or compute(model, *rest))
    train_dpo.main(dpo_config(tmp_path, tiny_folder, pair_rows(8), beta=0.1))
    assert calls.count(False) > 0  # the reference pass has no gradient
    [cache] = caches(tmp_path)
    before = cache.read_bytes()
    calls.clear()
    train_dpo.main(dpo_config(tmp_path, tiny_folder, pair_rows(8), beta=0.5))
    assert calls.count(False) == 0 and caches(tmp_path) == [cache] and cache.read_bytes() == before
    train_dpo.main(dpo_config(tmp_path, tiny_folder, pair_rows(8, seed=1)))
    assert len(caches(tmp_path)) == 2


def test_a_killed_reference_pass_goes_on(tmp_path, tiny_folder):
    """What the .part file already holds is kept; NaN rows are computed."""
    tokenizer, model = load_tokenizer(tiny_folder), load_model(tiny_folder)
    pairs = read(write(tmp_path / "pairs.jsonl", pair_rows(20)), read_pair, tokenizer)
    whole = reference_of(model, tiny_folder, pairs, 8)
    [cache] = caches(tmp_path)
    part = cache.with_suffix(".part")
    torn = whole.copy()
    torn[8:] = np.nan
    torn[0] = 7.0  # a mark: it must not be computed again
    np.save(part.with_suffix(".npy"), torn)
    os.rename(cache, part)
    again = reference_of(model, tiny_folder, pairs, 8)
    assert (again[0] == 7.0).all() and np.array_equal(again[1:], whole[1:])
    assert not part.exists()


# ---------------------------------------------------------------------------------------------- killed and resumed

def arguments(script, tmp_path, model):
    rng = random.Random(9)
    if script == "train_sft.py":
        files = (write(tmp_path / "t.jsonl", sft_rows(120)), write(tmp_path / "v.jsonl", sft_rows(6, seed=1)))
    else:
        files = (write(tmp_path / "t.jsonl", pair_rows(120)), write(tmp_path / "v.jsonl", pair_rows(6, seed=1)))
    return ["--model", model, "--train", files[0], "--validation", files[1], "--lr", 1e-3, "--batch-size", 4, "--micro-tokens", 400,
            "--eval-every", 7, "--save-every", 3, "--device", "cpu"]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_sft.py", "train_dpo.py"])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, tiny_folder, script):
    """SIGKILL at two random moments, then --resume: metrics, last checkpoint and best model are the same files."""
    given = arguments(script, tmp_path, tiny_folder)
    module = {"train_sft.py": train_sft, "train_dpo.py": train_dpo}[script]
    run((module.Config, module.main), argv=[str(a) for a in [*given, "--out", tmp_path / "whole"]])
    moments = random.Random(script).sample(range(3, 20), 2)
    assert "resumed from" in kill_and_resume([script, *given, "--out", tmp_path / "killed"], tmp_path / "killed/metrics.jsonl", moments)
    whole, killed = files_of(tmp_path / "whole"), files_of(tmp_path / "killed")
    for files in (whole, killed):
        files.pop("config.json")  # says --out and --resume
    assert whole.keys() == killed.keys()
    assert [name for name in whole if whole[name] != killed[name]] == []


def small_run(script, tmp_path, model, out, **changes):
    """Four steps with a validation and a checkpoint after every second one, as a config; the same files at each call."""
    make, rows = (sft_config, sft_rows) if script is train_sft else (dpo_config, pair_rows)
    held_out = write(tmp_path / "held_out.jsonl", rows(3, seed=4))
    settings = dict(out=str(tmp_path / out), validation=held_out, batch_size=4, save_every=2, eval_every=2, lr=1e-3, overwrite=False)
    return make(tmp_path, model, rows(16), **(settings | changes))


def same_run(one, other):
    one, other = files_of(one), files_of(other)
    assert one.keys() == other.keys()
    return [name for name in one if one[name] != other[name] and name != "config.json"]  # that one says --out


@pytest.mark.slow
@pytest.mark.parametrize("script", [train_sft, train_dpo])
@pytest.mark.parametrize("validated", [True, False])
def test_a_run_stopped_by_sigterm_after_each_step_ends_the_same(tmp_path, tiny_folder, script, validated, monkeypatch):
    changes = {} if validated else {"validation": None}
    train, check = small_run(script, tmp_path, tiny_folder, "whole", **changes), training.Run.check_finite
    script.main(train)

    def stop_soon(run, *given):
        os.kill(os.getpid(), signal.SIGTERM)
        return check(run, *given)
    monkeypatch.setattr(training.Run, "check_finite", stop_soon)
    for step in (1, 2, 3):
        with pytest.raises(Stopped, match=f"stopped by SIGTERM after step {step}, .* --resume"):
            script.main(small_run(script, tmp_path, tiny_folder, "stopped", resume=True, save_every=100, **changes))
    script.main(small_run(script, tmp_path, tiny_folder, "stopped", resume=True, save_every=100, **changes))  # its last step
    assert same_run(tmp_path / "whole", tmp_path / "stopped") == []


@pytest.mark.parametrize("script, losses, kept", [(train_sft, [math.nan], False), (train_sft, [1.0, math.inf], True),
                                                  (train_dpo, [math.nan], False)])
def test_a_validation_that_is_not_finite_stops_and_says_so(tmp_path, tiny_folder, script, losses, kept, monkeypatch):
    """Else the run would end without a model, or with that of an early step, and say nothing."""
    given = iter(losses)
    monkeypatch.setattr(script, "evaluate", lambda *_: next(given) if script is train_sft else dict.fromkeys(
        ("loss", "accuracy", "margin", "chosen_logprob"), next(given)))
    with pytest.raises(BadInput, match=f"the validation loss is {losses[-1]}, .*lower --lr or look at --validation .*held_out"):
        script.main(small_run(script, tmp_path, tiny_folder, "out"))
    assert (tmp_path / "out/model").exists() == kept


@pytest.mark.slow
def test_the_best_model_before_a_stop_stays_the_best_after_it(tmp_path, tiny_folder, monkeypatch):
    """Validation losses 3, 1, 2, 1.5 by step: the second step's model is kept, whether the run is stopped after it or not."""
    losses = iter([3.0, 1.0, 2.0, 1.5] * 2)  # of the whole run's four steps, then of the stopped and resumed run's
    monkeypatch.setattr(train_sft, "evaluate", lambda *_: next(losses))
    train_sft.main(small_run(train_sft, tmp_path, tiny_folder, "whole", eval_every=1))
    check = training.Run.check_finite

    def stop_after_two(run, *given):
        if run.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return check(run, *given)
    monkeypatch.setattr(training.Run, "check_finite", stop_after_two)
    with pytest.raises(Stopped):
        train_sft.main(small_run(train_sft, tmp_path, tiny_folder, "stopped", eval_every=1))
    best = files_of(tmp_path / "stopped/model")
    train_sft.main(small_run(train_sft, tmp_path, tiny_folder, "stopped", eval_every=1, resume=True))
    assert files_of(tmp_path / "stopped/model") == best
    assert same_run(tmp_path / "whole", tmp_path / "stopped") == []


def in_a_child(work, die_at=None):
    """Run work() in a forked process that dies at its die_at-th file operation, as by SIGKILL: no handler runs. -> exit code

    A torn operation is the worst case: half of the bytes, one file of the folder.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count = 0

    def deadly(operation, torn=lambda *given, **named: None):
        def call(*given, **named):
            nonlocal count
            count += 1
            if count == die_at:
                torn(*given, **named)
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*given, **named)
        return call

    def remove_one(folder, **_):
        for path in [path for path in Path(folder).rglob("*") if path.is_file()][:1]:
            path.unlink()
    try:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        write_bytes = Path.write_bytes
        Path.write_bytes = deadly(write_bytes, lambda path, content: write_bytes(path, content[:len(content) // 2]))
        shutil.rmtree = deadly(shutil.rmtree, remove_one)
        for name in ("replace", "rename", "unlink"):
            setattr(os, name, deadly(getattr(os, name)))
        os.fsync = deadly(lambda file: None)  # a moment to die at; what a process has written outlives it without
        weights.save_file = deadly(weights.save_file, lambda tensors, path, **_: write_bytes(Path(path), b"torn"))
        shard = "shard-00001-model-00001-of-00001.safetensors"
        ranks.save_tensors = deadly(ranks.save_tensors, lambda folder, _: write_bytes(folder / shard, b"torn"))
        work()
        os._exit(0)
    except BaseException:
        os._exit(1)


@pytest.mark.slow
@pytest.mark.parametrize("script, stride", [(train_sft, 3), (train_dpo, 5)])
def test_a_run_killed_at_any_file_operation_ends_the_same(tmp_path, tiny_folder, script, stride):
    """Kill before the first renames, removals, syncs and saves of a run, and then before every third (of DPO, which
    saves with the same code, every fifth); then again soon after its resumption, and finish it.
    """
    short = dict(max_steps=2, save_every=1, eval_every=1)
    script.main(small_run(script, tmp_path, tiny_folder, "whole", **short))
    resume = lambda: script.main(small_run(script, tmp_path, tiny_folder, out, resume=True, **short))
    for die_at in (*range(1, 10), *range(10, 1000, stride)):
        out = f"killed{die_at}"
        first = in_a_child(resume, die_at)
        if first == 0:
            break  # the run has fewer operations than that
        assert first == -signal.SIGKILL
        assert in_a_child(resume, die_at % 3 + 1) in (0, -signal.SIGKILL)
        assert in_a_child(resume) == 0, f"cannot be resumed after a kill at operation {die_at}"
        assert same_run(tmp_path / "whole", tmp_path / out) == [], f"killed at operation {die_at}"
        shutil.rmtree(tmp_path / out)
    assert die_at > 20  # the kills did happen


@pytest.mark.slow
@pytest.mark.parametrize("script", [train_sft, train_dpo])
@pytest.mark.parametrize("save", ["step-00000004", "model"])  # the second checkpoint, and the model
def test_a_full_disk_leaves_the_last_checkpoint_whole_and_says_so(tmp_path, tiny_folder, script, save, monkeypatch, capsys):
    script.main(small_run(script, tmp_path, tiny_folder, "whole"))
    def full(tensors, path, metadata=None):
        Path(path).write_bytes(b"torn")
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def full_in_dcp(tensors, metadata=None):  # the bytes that DCP then writes; the first checkpoint's do fit
        if (tmp_path / "full/checkpoints/step-00000002").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return as_bytes(tensors, metadata)
    as_bytes = safetensors.torch.save
    monkeypatch.setattr(*((safetensors.torch, "save_file", full) if save == "model" else (safetensors.torch, "save", full_in_dcp)))
    with pytest.raises(SystemExit) as stop:
        run((script.Config, lambda _: script.main(small_run(script, tmp_path, tiny_folder, "full"))),
            argv=["--model", "m", "--train", "t", "--out", "o"])
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert stop.value.code == 2 and re.match(f"error: {tmp_path}/full/[^:]*{save}[^:]*: No space left on device; make room.", error)
    assert "--resume" in error
    monkeypatch.undo()
    script.main(small_run(script, tmp_path, tiny_folder, "full", resume=True))  # now there is room
    assert same_run(tmp_path / "whole", tmp_path / "full") == []


@pytest.mark.slow
@pytest.mark.parametrize("script, rows", [("train_sft.py", sft_rows(8)), ("train_dpo.py", pair_rows(8))])
def test_a_file_that_cannot_grow_ends_in_one_line(tmp_path, tiny_folder, script, rows):
    """The system's own refusal, met by the process as a user runs it: no file may have more than 100 kB."""
    flags = ["--model", tiny_folder, "--train", write(tmp_path / "t.jsonl", rows), "--out", tmp_path / "out", "--device", "cpu"]
    done = run_script(script, *flags, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    assert done.returncode == 2 and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert "/step-00000001: File too large; make room" in done.stderr.strip().split("\n")[-1]


@pytest.mark.slow
def test_sigterm_saves_and_says_how_to_go_on(tmp_path, tiny_folder):
    flags = [*arguments("train_sft.py", tmp_path, tiny_folder), "--save-every", 1000, "--epochs", 50, "--out", tmp_path / "out"]
    process = start(["train_sft.py", *flags])
    wait_for_lines(tmp_path / "out/metrics.jsonl", 1, process)
    process.terminate()
    _, errors = process.communicate(timeout=HANG)
    assert process.returncode == 128 + signal.SIGTERM and "--resume" in errors.splitlines()[-1]
    [kept] = (tmp_path / "out/checkpoints").iterdir()
    assert int(kept.name.removeprefix("step-")) == len(metrics(tmp_path / "out"))


def test_only_the_last_checkpoints_are_kept(tmp_path, tiny_folder):
    train_sft.main(sft_config(tmp_path, tiny_folder, sft_rows(24), save_every=1, keep=2))
    assert sorted(p.name for p in (tmp_path / "out/checkpoints").iterdir()) == ["step-00000005", "step-00000006"]


# ---------------------------------------------------------------------------------------------- refusals

@pytest.mark.slow
@pytest.mark.parametrize("script", [train_sft, train_dpo])
@pytest.mark.parametrize("name", ["train", "validation", "prompt_file"])
def test_other_data_behind_the_same_path_are_not_resumed(tmp_path, tiny_folder, script, name):
    (tmp_path / "words.txt").write_text(f"Is it right? {WORDS_OF_A_CASE}")
    first = small_run(script, tmp_path, tiny_folder, "out", prompt_file=str(tmp_path / "words.txt"))
    script.main(first)
    before = files_of(tmp_path / "out")
    path = Path(getattr(first, name))
    path.write_text(path.read_text().replace("right", "wrong", 1))
    with pytest.raises(BadInput, match=f"the content of --{name.replace('_', '-')} is not what the run was begun with"):
        script.main(dataclasses.replace(first, resume=True))
    assert files_of(tmp_path / "out") == before


@pytest.mark.slow
def test_a_kill_while_a_run_is_replaced_leaves_no_half_of_it(tmp_path, tiny_folder):
    """--overwrite with another --lr, killed at each of its first file operations: --resume begins anew or refuses, but never
    goes on from the old run's checkpoints."""
    script, began_anew = train_sft, 0
    script.main(small_run(script, tmp_path, tiny_folder, "whole", lr=1e-4))
    for die_at in range(1, 8):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        script.main(small_run(script, tmp_path, tiny_folder, "out"))
        replacing = lambda: script.main(small_run(script, tmp_path, tiny_folder, "out", lr=1e-4, overwrite=True))
        assert in_a_child(replacing, die_at) == -signal.SIGKILL
        if in_a_child(lambda: script.main(small_run(script, tmp_path, tiny_folder, "out", lr=1e-4, resume=True))) == 0:
            assert same_run(tmp_path / "whole", tmp_path / "out") == []
            began_anew += 1
        else:
            script.main(small_run(script, tmp_path, tiny_folder, "out", resume=True))  # the old run, still whole
    assert began_anew > 3


def test_other_settings_existing_output_and_foreign_folders_are_refused(tmp_path, tiny_folder):
    first = sft_config(tmp_path, tiny_folder, sft_rows(8))
    train_sft.main(first)
    with pytest.raises(BadInput, match="another --lr"):
        train_sft.main(dataclasses.replace(first, resume=True, overwrite=False, lr=1e-5))
    with pytest.raises(BadInput, match="exists already"):
        train_sft.main(dataclasses.replace(first, overwrite=False))
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(BadInput, match="not the folder of a training run"):
        train_sft.main(dataclasses.replace(first, out=str(precious)))
    assert (precious / "thesis.txt").read_text() == "years of work"


def test_resuming_a_finished_run_changes_nothing_and_may_save_otherwise(tmp_path, tiny_folder):
    """--keep and --save-every say how to save, not what to compute."""
    train_sft.main(small_run(train_sft, tmp_path, tiny_folder, "out"))
    before = files_of(tmp_path / "out")
    train_sft.main(small_run(train_sft, tmp_path, tiny_folder, "out", resume=True, keep=3, save_every=7))
    assert files_of(tmp_path / "out") == before


@pytest.mark.slow
@pytest.mark.parametrize("name, value", [("seed", 1), ("batch_size", 3), ("max_steps", 2), ("epochs", 2), ("micro_tokens", 500),
                                         ("schedule", "constant"),
                                         ("validation", None)])
def test_resuming_with_another_setting_is_refused_by_its_name(tmp_path, tiny_folder, name, value):
    train_sft.main(small_run(train_sft, tmp_path, tiny_folder, "out"))
    before = files_of(tmp_path / "out")
    with pytest.raises(BadInput, match=f"another --{name.replace('_', '-')} "):
        train_sft.main(small_run(train_sft, tmp_path, tiny_folder, "out", resume=True, **{name: value}))
    assert files_of(tmp_path / "out") == before


def test_overwrite_leaves_a_folder_with_checkpoints_of_others_alone(tmp_path, tiny_folder):
    (tmp_path / "project/checkpoints").mkdir(parents=True)
    (tmp_path / "project/checkpoints/mine.bin").write_text("years of work")
    with pytest.raises(BadInput, match="not the folder of a training run"):
        train_sft.main(sft_config(tmp_path, tiny_folder, sft_rows(4), out=str(tmp_path / "project")))
    assert (tmp_path / "project/checkpoints/mine.bin").exists()


def test_overwrite_does_not_remove_what_the_run_needs(tmp_path, tiny_folder):
    """--model or --train within --out: --overwrite would delete them before the first step."""
    train_sft.main(sft_config(tmp_path, tiny_folder, sft_rows(4)))
    before = files_of(tmp_path / "out")
    with pytest.raises(BadInput, match="--model"):
        train_dpo.main(dpo_config(tmp_path, tmp_path / "out/model", pair_rows(4), out=str(tmp_path / "out")))
    assert files_of(tmp_path / "out") == before


@pytest.mark.parametrize("script", [train_sft, train_dpo])
@pytest.mark.parametrize("flags, said", [(["--unknown", "1"], "unrecognized"), (["--batch", "4"], "unrecognized"),
                                         (["--lr", "-1"], "out of range"),
                                         (["--lr", "nan"], "out of range"), (["--batch-size", "0"], "out of range"),
                                         (["--epochs", "1.5"], "is not int")])
def test_bad_flags_fail(tmp_path, tiny_folder, capsys, script, flags, said):
    rows = write(tmp_path / "t", sft_rows(1))
    assert run_here(script, "--model", tiny_folder, "--train", rows, "--out", tmp_path / "out", *flags) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_one_of_model_and_from_scratch_is_needed(tmp_path, tiny_folder):
    with pytest.raises(BadInput, match="give one of --model"):
        train_sft.main(sft_config(tmp_path, None, sft_rows(1)))


@pytest.mark.parametrize("given", ["", "small.json", "gone/config.json"])
def test_from_scratch_takes_a_config_json_alone(tmp_path, tiny_folder, given):
    """A folder, and a file of another name, are not taken for the config.json that lies there."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    shutil.copy(folder / "config.json", folder / "small.json")
    with pytest.raises(BadInput, match="is no file named config"):
        train_sft.main(sft_config(tmp_path, None, sft_rows(1), from_scratch=str(folder / given)))


@pytest.mark.slow
def test_weights_from_scratch_depend_on_the_seed_alone(tmp_path, tiny_tokenizer):
    """The same seed gives the same weights from scratch, another seed others."""
    folder = write_checkpoint(tmp_path / "model", make_config("qwen2", True), tiny_tokenizer)
    found = []
    for seed in (0, 0, 1):
        model, _ = train_sft.initial_model(sft_config(tmp_path, None, sft_rows(1), from_scratch=str(folder / "config.json"), seed=seed))
        found.append(model.embed.weight)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
