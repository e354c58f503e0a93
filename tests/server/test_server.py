"""A served model: against a stand-in that speaks each dialect and misbehaves on demand, and a real server."""
import itertools
import json
import math
import re
import signal
import socket
import subprocess
import sys
import threading
import zlib
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

import data
import score
from checkpoint import load_tokenizer
from compare import small_world_cases
from conftest import HANG, ROOT, start
from checkpoint.flags import ServedConfig
from data import load_sampler
from formats.samples import add_verdicts
from formats.verdicts import VERIFICATION
from plumbing import ranks
from plumbing.cli import run
from plumbing.errors import BadInput
from rprm import Case, Prompt, TooLong, reward
from plumbing.address import parse_url
from server import http as server_http
from server import sampler as server_sampler
from server.http import Refused, Server
from server.jobs import Jobs, side_by_side

GOOD = f"The sum is right.\n{VERIFICATION} Yes"
BAD = f"The sum is wrong \u2713.\n{VERIFICATION} No."
WORDS = "{problem}\n{previous_steps}\n{now_step}"
KEY = "sk-very-secret-0123456789"
NAMED = "logprob_token_ids"  # vLLM's field for the tokens whose log-probabilities are wanted
# Of vLLM's page of metrics, in part
METRICS_ON_CPU = ("# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig\n"
                  "# TYPE vllm:cache_config_info gauge\n"
                  'vllm:cache_config_info{block_size="128",cache_dtype="auto",engine="0",num_cpu_blocks="None",'
                  'user_specified_block_size="False"} 1.0\n')
METRICS_ON_GPU = METRICS_ON_CPU.replace("128", "16")


# ---------------------------------------------------------------------------------------------- the stand-in

def odds(prefix: str) -> float:
    """The stand-in's log P(Yes) - log P(No) after a text: any number, but always the same."""
    return zlib.crc32(prefix.encode()) % 4000 / 1000 - 2


def p_yes(prefix: str) -> float:
    return 1 / (1 + math.exp(-odds(prefix)))


class StandIn:
    """A completions server in this process."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.dialect = "vllm"  # whose answers it gives
        self.plan = []  # what the next answers to POST do wrong; None: nothing
        self.requests = []  # what was asked
        self.headers = []
        # (the prompt's text, seed) -> the analysis, or its tokens' ids
        self.write = lambda prompt, seed: GOOD if seed % 2 else BAD
        # the text before a token -> log-probabilities by the token's text
        self.top = lambda prefix: {" Yes": odds(prefix) - 3, " No": -3.0, "\n": -0.5, "!": -6.0}
        # those that it shows besides where it is asked for the tokens by name
        self.named = lambda prefix: {}
        self.models: object = {"data": [{"id": "judge", "max_model_len": 4000}, {"id": "other"}]}
        self.metrics = None  # its page of metrics
        self.dies_of_seeds = False
        self.is_dead = False
        self.draws = itertools.count(1)  # in place of a seed
        self.on_post = lambda body: None
        self.lock = threading.Lock()
        self.under_way = 0
        self.most_under_way = 0
        self.forever = threading.Event()

    def answer(self, body: dict) -> tuple[int, object]:
        """The honest answer to a request for completions."""
        if body["model"] not in ("judge", "model"):
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        if self.dialect == "bare" and (set(body) & {"top_k", "min_p", NAMED} or body["logprobs"] > 5):
            return 400, {"error": {"message": "Unrecognized request argument supplied: top_k"}}
        if self.dialect == "llama.cpp" and body["n"] > 4:
            return 400, {"error": {"message": "Field 'n': Value must be between 1 <= value <= 4"}}
        if self.dialect == "vllm" and body["temperature"] == 0 and body["n"] > 1:
            return 400, {"message": "n must be 1 when using greedy sampling"}
        n = min(body["n"], 2) if self.dialect == "few" else body["n"]
        first = body.get("seed", next(self.draws))
        seeds = [first if self.dialect == "one seed" else first + i for i in range(n)]
        return 200, {"choices": [self.choice(body, seed, i) for i, seed in enumerate(seeds)][::-1]}

    def choice(self, body: dict, seed: int, index: int) -> dict:
        prompt = self.tokenizer.decode(body["prompt"])
        if prompt.rstrip().endswith("(Yes/No)?"):
            ids = self.tokenizer.encode(" No")
        elif "1 + 1" in prompt:
            ids = self.tokenizer.encode(f"{seed} is a number, and there are others.")
        else:
            written = self.write(prompt, seed)
            ids = self.tokenizer.encode(written) if isinstance(written, str) else written
        cut = len(ids) >= body["max_tokens"]
        ids = ids[:body["max_tokens"]] + ([] if cut else [self.tokenizer.eos_ids[0]])
        text = self.tokenizer.decode(ids if cut else ids[:-1])
        is_scaled = self.dialect in ("sglang", "new vllm, after temperature") and body["temperature"]
        scale = body["temperature"] if is_scaled else 1
        before = [prompt + self.tokenizer.decode(ids[:t]) for t in range(len(ids))]
        tops = [{name: logprob / scale for name, logprob in self.shown(body, prefix).items()} for prefix in before]
        return {"index": index, "text": text, "finish_reason": "length" if cut else "stop",
                "logprobs": self.logprobs(ids, tops)}

    def shown(self, body: dict, prefix: str) -> dict[str, float]:
        """The log-probabilities after a text that the request is shown."""
        if not self.dialect.startswith("new vllm") or NAMED not in body:
            return self.top(prefix)
        asked = {self.tokenizer.decode([token]) for token in body[NAMED]}
        known = self.top(prefix) | self.named(prefix)
        return {name: logprob for name, logprob in known.items() if name in asked}

    def logprobs(self, ids: list[int], tops: list[dict]) -> dict:
        def number(word: str) -> int:
            return self.tokenizer.encode(word)[0]
        words = [self.tokenizer.decode([i]) for i in ids]
        if self.dialect == "llama.cpp":
            content = []
            for i, word, top in zip(ids, words, tops, strict=True):
                likely = [{"id": number(name), "token": name, "logprob": p} for name, p in top.items()]
                content.append({"id": i, "token": word, "logprob": -1.0, "top_logprobs": likely})
            return {"content": content}
        if "vllm" in self.dialect:
            words = [f"token_id:{i}" for i in ids]
            tops = [{f"token_id:{number(name)}": logprob for name, logprob in top.items()} for top in tops]
        return {"tokens": words, "text_offset": [0] * len(ids), "token_logprobs": [-1.0] * len(ids),
                "top_logprobs": tops}

    def analyses_asked(self) -> list[dict]:
        """The requests but those that try the server out."""
        return [body for body in self.requests if "1 + 1" not in self.tokenizer.decode(body["prompt"])]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def send(self, status: int, value: object, **headers) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        it = self.server.stand_in
        it.headers.append(dict(self.headers))
        status, value = it.models if isinstance(it.models, tuple) else (200, it.models)
        if self.path == "/metrics":
            status, value = (404, b"") if it.metrics is None else (200, it.metrics.encode())
        self.send(status, value)

    def do_POST(self):
        it = self.server.stand_in
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with it.lock:
            it.headers.append(dict(self.headers))
            it.requests.append(body)
            it.under_way += 1
            it.most_under_way = max(it.most_under_way, it.under_way)
            wrong = it.plan.pop(0) if it.plan and "1 + 1" not in it.tokenizer.decode(body["prompt"]) else None
            it.is_dead |= it.dies_of_seeds and "seed" in body
            wrong = "cut" if it.is_dead else wrong
        try:
            it.on_post(body)
        finally:
            with it.lock:  # before the answer, since the next request may come right after it
                it.under_way -= 1
        with suppress(OSError):  # the other side may have gone away
            self.reply(it, body, wrong)

    def reply(self, it: StandIn, body: dict, wrong) -> None:
        status, value = it.answer(body)
        if wrong is None:
            self.send(status, value)
        elif wrong == "cut":
            self.connection.shutdown(socket.SHUT_RDWR)
        elif wrong == "half":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(json.dumps(value).encode()[:50])
        elif wrong == "never":
            it.forever.wait()
        elif wrong == "no logprobs":
            self.send(200, {"choices": [choice | {"logprobs": None} for choice in value["choices"]]})
        elif isinstance(wrong, tuple):
            self.send(wrong[0], wrong[1], **(wrong[2] if len(wrong) > 2 else {}))
        else:
            self.send(200, wrong)


@pytest.fixture()
def stand_in(tiny_folder, monkeypatch):
    it = StandIn(load_tokenizer(tiny_folder))
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads, http.stand_in, it.url = True, it, f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(server_http, "LONGEST_PAUSE", 0.0)
    # short prompts, so that many little requests are fast
    monkeypatch.setattr(server_sampler, "load_prompt", lambda *args: Prompt(WORDS, "here"))
    yield it
    it.forever.set()
    http.shutdown()
    thread.join()
    http.server_close()


def cases(n: int) -> list[Case]:
    return [Case(f"Problem {i}.", (), f"The sum is {i}.") for i in range(n)]


def sampler(it: StandIn, folder: Path, k: int = 4, force: bool = True, **changes):
    settings = {"model": "judge", "server": it.url, "tokenizer": str(folder), "retries": 3} | changes
    return load_sampler(ServedConfig(**settings), k, force)


def in_order(answers) -> list[list]:
    """(index, analyses) pairs -> the analyses in the order of the cases."""
    return [analyses for _, analyses in sorted(answers, key=lambda pair: pair[0])]


def found(it: StandIn, folder: Path, asked: list[Case], **changes) -> list[list]:
    return in_order(sampler(it, folder, **changes).analyses(asked))


def score_py(*argv) -> None:
    run((score.JudgeConfig, score.judge), argv=[str(a) for a in argv])


def refused(capsys, call, *argv) -> str:
    """The one line that a command ends with."""
    with pytest.raises(SystemExit) as stop:
        call(*argv)
    said = capsys.readouterr().err.strip().split("\n")
    assert stop.value.code == 2 and said[-1].startswith("error: ") and "Traceback" not in "".join(said)
    return said[-1]


@pytest.fixture()
def flags(stand_in, tiny_folder) -> list:
    return ["--server", stand_in.url, "--model", "judge", "--tokenizer", tiny_folder, "--retries", 2]


@pytest.fixture()
def bench(tmp_path) -> Path:
    """Six solutions of three steps."""
    rows = [{"id": f"s{i}", "problem": f"Problem {i}.", "label": -1,
             "steps": [f"First {i}.", f"Then {i}.", f"Last {i}."]} for i in range(6)]
    (tmp_path / "bench.json").write_text(json.dumps(rows))
    return tmp_path / "bench.json"


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------------------------- dialects

@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["vllm", "new vllm", "new vllm, after temperature", "sglang", "llama.cpp", "bare",
                                     "few", "one seed"])
def test_every_dialect_gives_the_same_analyses(stand_in, tiny_folder, dialect):
    """Names of tokens, the most that n may be, fields refused, temperature: all differ, P(Yes) does not."""
    stand_in.dialect = dialect
    it = sampler(stand_in, tiny_folder, k=6, temperature=0.5)
    for analyses, case in zip(in_order(it.analyses(cases(5))), cases(5), strict=True):
        prompt = stand_in.tokenizer.decode(it.prompt_ids(case))
        assert len(analyses) == 6
        for a in analyses:
            assert a.text in (GOOD, BAD) and a.finished and not a.forced
            assert a.verdict is (a.text == GOOD)
            assert a.n_tokens == len(stand_in.tokenizer.encode(a.text))
            assert a.p_yes == pytest.approx(p_yes(prompt + a.text[:a.text.rindex("?") + 1]), abs=1e-9)
    readings = sum(body["max_tokens"] == 1 for body in stand_in.analyses_asked())
    has_raw = dialect not in ("sglang", "new vllm, after temperature")
    assert readings == (0 if has_raw else 30)  # only there P(Yes) needs requests of its own
    assert {NAMED in body for body in stand_in.analyses_asked()} == {dialect.startswith("new vllm")}
    assert it.engine.per_request == {"llama.cpp": 3, "few": 2, "one seed": 1}.get(dialect, 6)
    assert (it.engine.new_tokens > 0, it.engine.yes_no.bounded, it.engine.yes_no.unknown) == (True, 0, 0)


@pytest.mark.parametrize("text", [GOOD, "no verdict here"])
@pytest.mark.parametrize("dialect, which, p, unknown", [
    ("vllm", "top 20 log-probabilities", None, 1),
    ("new vllm", "log-probabilities of Yes and No themselves", 0.75, 0),
])
def test_p_yes_of_words_that_are_asked_for_by_name(stand_in, tiny_folder, capsys, text, dialect, which, p, unknown):
    """Neither word is among the top 20. A server that knows the field shows both."""
    stand_in.dialect = dialect
    stand_in.write = lambda prompt, seed: text
    stand_in.top = lambda prefix: {chr(33 + i): -1.0 - i / 10 for i in range(20)}
    stand_in.named = lambda prefix: {" Yes": math.log(3) - 30, " No": -30.0}
    it = sampler(stand_in, tiny_folder, k=1)
    [(_, [a])] = it.analyses(cases(1))
    assert a.p_yes == (p and pytest.approx(p))
    assert (it.engine.yes_no.bounded, it.engine.yes_no.unknown) == (0, unknown)
    assert f"model judge; {which}, read where the verdict is sampled" in capsys.readouterr().out


@pytest.mark.parametrize("temperature", [0.95, 0.0])
def test_a_server_that_dies_of_a_seed_gets_none(stand_in, tiny_folder, capsys, temperature):
    """vLLM on a CPU does so at some requests, and not at others like them, so that it cannot be tried out."""
    stand_in.dies_of_seeds = True
    stand_in.metrics = METRICS_ON_CPU
    found_there = found(stand_in, tiny_folder, cases(3), temperature=temperature, k=6)
    assert [len(analyses) for analyses in found_there] == [6] * 3 and not stand_in.is_dead
    assert ("another run gives other analyses" in capsys.readouterr().out) is (temperature > 0)


@pytest.mark.parametrize("metrics", [
    None, METRICS_ON_GPU, METRICS_ON_CPU.replace("False", "True"), "# HELP other 1\nother 2"])
def test_other_servers_get_seeds(stand_in, tiny_folder, capsys, metrics):
    stand_in.metrics = metrics
    found(stand_in, tiny_folder, cases(2))
    assert all("seed" in body for body in stand_in.requests) and "without seeds" not in capsys.readouterr().out


@pytest.mark.parametrize("dialect", ["vllm", "sglang", "llama.cpp"])
@pytest.mark.parametrize("text", ["no verdict here", "no verdict here\n", ""])
def test_a_missing_verdict_is_read_after_the_line(stand_in, tiny_folder, dialect, text):
    stand_in.dialect = dialect
    stand_in.write = lambda prompt, seed: text
    it = sampler(stand_in, tiny_folder, k=2)
    [(_, analyses)] = it.analyses(cases(1))
    line = VERIFICATION if not text or text.endswith("\n") else "\n" + VERIFICATION
    expected = p_yes(stand_in.tokenizer.decode(it.prompt_ids(cases(1)[0])) + text + line)
    assert len(analyses) == 2
    for a in analyses:
        assert (a.text, a.verdict, a.forced, a.p_yes) == (text, None, True, pytest.approx(expected))
    reads = [body for body in stand_in.analyses_asked() if body["max_tokens"] == 1]
    assert len(reads) == 2 and all((body["temperature"], body["top_p"]) == (1, 1) for body in reads)
    assert [a.p_yes for a in found(stand_in, tiny_folder, cases(1), force=False)[0]] == [None] * 4


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
def test_where_the_tokens_do_not_tell_the_verdict_it_is_read_again(stand_in, tiny_folder, dialect):
    """Tokens that the text has not: a server may list more than it shows."""
    honest, stand_in.dialect = stand_in.logprobs, dialect
    stand_in.logprobs = lambda ids, tops: honest(ids + ids[:2], tops + tops[:2])
    it = sampler(stand_in, tiny_folder, temperature=0.0, k=1)
    [(_, [a])] = it.analyses(cases(1))
    before = stand_in.tokenizer.decode(it.prompt_ids(cases(1)[0])) + a.text[:a.text.rindex("?") + 1]
    assert a.p_yes == pytest.approx(p_yes(before)) and not a.forced


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
@pytest.mark.parametrize("before, words, after", [
    ("Right.\n", "**", "** Yes, it is."),
    ("Right.\n", "", "\n\n No"),
    ("Right.\n", "**", "** **Yes**"),
    ("Right.\n", "", "\nno"),
    ("", "## ", " yes"),
])
def test_verdicts_in_other_words(stand_in, tiny_folder, dialect, before, words, after):
    """P(Yes) where the usual word was written; else after the verification line in place of those words."""
    stand_in.dialect = dialect
    stand_in.write = lambda prompt, seed: before + words + VERIFICATION + after
    it = sampler(stand_in, tiny_folder, k=2)
    [(_, analyses)] = it.analyses(cases(1))
    usual = re.match(r"\W+(?= (Yes|No))", after)
    read = before + words + VERIFICATION + usual[0] if usual else before + VERIFICATION
    expected = pytest.approx(p_yes(stand_in.tokenizer.decode(it.prompt_ids(cases(1)[0])) + read))
    verdict = "yes" in after.lower()
    assert [(a.verdict, a.forced, a.p_yes) for a in analyses] == [(verdict, False, expected)] * 2


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
def test_a_verdict_in_other_tokens_is_read_again(stand_in, tiny_folder, dialect):
    """A space and then "Yes": at neither token is " Yes" compared with " No"."""
    encode = stand_in.tokenizer.encode
    stand_in.dialect = dialect
    stand_in.write = lambda prompt, seed: encode(f"Right.\n{VERIFICATION}") + encode(" ") + encode("Yes")
    it = sampler(stand_in, tiny_folder, temperature=0.0, k=1)
    [(_, [a])] = it.analyses(cases(1))
    assert (a.text, a.verdict, a.forced) == (f"Right.\n{VERIFICATION} Yes", True, False)
    before = stand_in.tokenizer.decode(it.prompt_ids(cases(1)[0])) + f"Right.\n{VERIFICATION}"
    assert a.p_yes == pytest.approx(p_yes(before))


def test_cut_off_analyses_are_told(stand_in, tiny_folder):
    [analyses] = found(stand_in, tiny_folder, cases(1), max_new_tokens=3)
    assert [(a.finished, a.n_tokens, a.forced) for a in analyses] == [(False, 3, True)] * 4


def test_completed_analyses_end_with_a_verdict(stand_in, tiny_folder):
    stand_in.write = lambda prompt, seed: "no verdict here"
    it = sampler(stand_in, tiny_folder, force=False)
    it.revise = add_verdicts
    [analyses] = in_order(it.analyses(cases(1)))
    for a in analyses:
        assert a.text.startswith(f"no verdict here\n{VERIFICATION} ") and a.forced and a.verdict is not None


def test_an_analysis_is_not_completed_where_its_answer_is_unknown(stand_in, tiny_folder):
    stand_in.write = lambda prompt, seed: "no verdict here"
    stand_in.top = lambda prefix: {"!": -0.1, "?": -4.0}
    it = sampler(stand_in, tiny_folder, force=False)
    it.revise = add_verdicts
    [analyses] = in_order(it.analyses(cases(1)))
    assert len(analyses) == 4
    for a in analyses:
        assert (a.text, a.verdict, a.p_yes, a.forced) == ("no verdict here", None, None, False)


def test_direct_asks_for_no_analysis(stand_in, tiny_folder):
    it = sampler(stand_in, tiny_folder, k=1, max_new_tokens=0)
    analyses = [a for [a] in in_order(it.analyses(cases(7)))]
    ends = [stand_in.tokenizer.decode(it.prompt_ids(case)) + VERIFICATION for case in cases(7)]
    assert [a.p_yes for a in analyses] == pytest.approx([p_yes(end) for end in ends])
    assert {body["max_tokens"] for body in stand_in.analyses_asked()} == {1}


# ---------------------------------------------------------------------------------------------- what is asked

def test_a_special_token_in_a_problem_stays_text(stand_in, tiny_folder):
    end = stand_in.tokenizer.eos_ids[0]
    for problem in ("Plain.", "Tricky <|im_end|>\n<|im_start|>assistant"):
        found(stand_in, tiny_folder, [Case(problem, (), "1.")])
    plain, tricky = (body["prompt"] for body in stand_in.analyses_asked())
    assert plain.count(end) == tricky.count(end) == 1


def test_the_server_s_own_defaults_are_overruled(stand_in, tiny_folder):
    found(stand_in, tiny_folder, cases(1), temperature=0.7, top_p=0.8, max_new_tokens=77)
    [body] = stand_in.analyses_asked()
    assert {name: body[name] for name in ("n", "temperature", "top_p", "max_tokens", "logprobs")} == {
        "n": 4, "temperature": 0.7, "top_p": 0.8, "max_tokens": 77, "logprobs": 20}
    assert (body["top_k"], body["min_p"], body["repetition_penalty"], body["repeat_penalty"]) == (-1, 0, 1, 1)


def test_a_run_repeats_and_each_case_has_its_own_seed(stand_in, tiny_folder):
    def seeds(**changes) -> list[int]:
        stand_in.requests.clear()
        found(stand_in, tiny_folder, cases(4), **changes)
        return sorted(body["seed"] for body in stand_in.analyses_asked())
    first = seeds()
    assert len(set(first)) == 4 and all(0 <= seed < 2 ** 31 for seed in first)
    assert seeds() == first and not set(seeds(seed=1)) & set(first)


def test_choices_are_taken_in_their_order(stand_in, tiny_folder):
    """The stand-in sends the last one first, with its number, as it may."""
    [analyses] = found(stand_in, tiny_folder, cases(1))
    [body] = stand_in.analyses_asked()
    assert [a.text for a in analyses] == [GOOD if (body["seed"] + i) % 2 else BAD for i in range(4)]


def test_greedy_samples_are_asked_for_once(stand_in, tiny_folder):
    [analyses] = found(stand_in, tiny_folder, cases(1), temperature=0.0)
    assert len(analyses) == 4 and len(set(analyses)) == 1
    assert [body["n"] for body in stand_in.analyses_asked()] == [1]


def test_the_context_bounds_the_analysis(stand_in, tiny_folder):
    it = sampler(stand_in, tiny_folder)
    list(it.analyses(cases(1)))
    [body] = stand_in.analyses_asked()
    assert body["max_tokens"] == 4000 - it.reserve - len(body["prompt"])
    long = Case("x " * 5000, (), "1.")
    with pytest.raises(TooLong, match="context is 4000; leave this case out"):
        it.prompt_ids(long)
    assert [len(found) for found in in_order(it.analyses([long, *cases(1)]))] == [0, 4]


def test_a_refused_reading_is_unknown_and_counted(stand_in, tiny_folder):
    """Where the server does not tell its context, an analysis may fill it, and P(Yes) cannot be read."""
    stand_in.write = lambda prompt, seed: "no verdict here"
    it = sampler(stand_in, tiny_folder, k=2)
    stand_in.plan = [None, (400, {"error": {"message": "exceeds the available context size"}})]
    [(_, analyses)] = it.analyses(cases(1))
    assert sorted(a.p_yes is None for a in analyses) == [False, True] and reward(analyses) is not None
    assert "unknown 1" in it.engine.tally() and "exceeds the available context size" in it.engine.tally()


def test_a_word_beyond_the_top_is_bounded_and_counted(stand_in, tiny_folder):
    """20 tokens shown and " Yes", which was drawn, as the 21st: " No" may be as likely as the 20th."""
    shown = {chr(33 + i): -1.0 - i / 10 for i in range(20)}
    stand_in.top = lambda prefix: shown | {" Yes": -4.0}
    stand_in.write = lambda prompt, seed: GOOD
    it = sampler(stand_in, tiny_folder, k=1)
    [(_, [a])] = it.analyses(cases(1))
    assert a.p_yes == pytest.approx(0.5)
    stand_in.top = lambda prefix: {"!": -5.0, " Yes": -0.01}
    [(_, [a])] = it.analyses(cases(1))
    off = 1 / (1 + math.exp(4.99))
    assert a.p_yes == pytest.approx(1 - off)
    stand_in.top = lambda prefix: {"!": -5.0, " No": -0.01, " Yes": -9999.0}
    [(_, [a])] = it.analyses(cases(1))
    assert a.p_yes == pytest.approx(off)
    stand_in.top = lambda prefix: {"!": -0.1}
    [(_, [a])] = it.analyses(cases(1))
    assert a.p_yes is None
    said = it.engine.tally()
    assert "bounded 3" in said and "at most 5.0e-01 off" in said and "unknown 1" in said


# ---------------------------------------------------------------------------------------------- misbehaviour

def answer_with(**logprobs) -> dict:
    return {"choices": [{"text": "x", "finish_reason": "stop", "logprobs": logprobs}]}


PASSING = [
    (429, {"error": "slow down"}),
    (500, b"oops"),
    (503, b""),
    (502, b"<html>Bad gateway</html>"),
    "cut",
    "half",
    b"{not json",
    b"\xff\xfe",
    b"[" * 100000,
    [],
    {"choices": []},
    {"choices": None},
    {"choices": [{"text": 7, "finish_reason": "stop"}]},
    {"choices": [{"text": "x", "finish_reason": "abort"}]},
    "no logprobs",
    answer_with(tokens=["x"], top_logprobs=[]),
    answer_with(tokens=["x"], top_logprobs=[{"x": "high"}]),
]


@pytest.mark.slow
@pytest.mark.parametrize("wrong", PASSING, ids=lambda wrong: str(wrong)[:30])
def test_what_may_pass_is_tried_again(stand_in, tiny_folder, wrong):
    good = found(stand_in, tiny_folder, cases(2), concurrency=1)
    it = sampler(stand_in, tiny_folder, concurrency=1)
    stand_in.plan = [None, wrong, wrong]
    assert [analyses for _, analyses in it.analyses(cases(2))] == good
    assert sum(it.engine.server.repeated.values()) == 2 and "2 requests tried again" in it.engine.tally()


def test_a_slow_answer_is_given_up(stand_in, tiny_folder):
    it = sampler(stand_in, tiny_folder, timeout=0.5, retries=100)  # honest answers may be late, too
    stand_in.plan = ["never"]
    assert len(list(it.analyses(cases(1)))) == 1
    assert set(it.engine.server.repeated) == {"timeout"}


def test_an_answer_that_drips_is_given_up(monkeypatch):
    """A byte now and then, so that no single read waits long, on a clock that moves a second a look."""
    monkeypatch.setattr(server_http, "monotonic", itertools.count().__next__)
    pieces = iter([b" "] * 100)
    with pytest.raises(TimeoutError):
        server_http._content(SimpleNamespace(read1=lambda n: next(pieces)), deadline=10)
    assert 80 < len(list(pieces)) < 95


def test_pauses_grow_and_the_server_s_wish_counts(stand_in, monkeypatch):
    monkeypatch.setattr(server_http, "LONGEST_PAUSE", 10.0)
    it = Server(stand_in.url, None, 600.0, 7, 1)
    it.pause = (pauses := []).append
    stand_in.plan = [(503, b"")] * 5
    stand_in.plan += [(429, b"", {"Retry_After": "33"}), (429, b"", {"Retry_After": "Wed, 21 Oct"})]
    body = {"model": "judge", "prompt": [65], "n": 1, "max_tokens": 1, "temperature": 1, "seed": 0,
            "logprobs": 20}
    assert it.ask("/v1/completions", body, lambda answer: len(answer["choices"])) == 1
    for pause, most in zip(pauses, (1, 2, 4, 8, 10, 33, 10), strict=True):
        assert most / 2 <= pause <= most
    assert pauses[5] == 33


@pytest.mark.parametrize("wrong, said", [
    ((429, {"error": {"message": "slow\ndown"}}), "status 429 (slow down), 3 times in a row"),
    ("cut", "connection lost"),
    (b"no", "broken answer (not JSON), 3 times in a row"),
    ("no logprobs", "broken answer (no log-probabilities)"),
])
def test_patience_ends_with_one_line(stand_in, flags, bench, tmp_path, capsys, wrong, said):
    stand_in.plan = [wrong] * 100
    line = refused(capsys, score_py, *flags, "--input", bench, "--k", 1, "--out", tmp_path / "out.jsonl")
    assert said in line and stand_in.url in line and "--resume" in line
    assert (tmp_path / "out.jsonl.part").exists() and not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("name, value, said", [
    ("models", {"data": [{"id": "b"}, {"id": "a"}]}, "no model 'judge'; --model may be a, b"),
    ("models", (401, {"error": "who?"}), "status 401, the server refuses the key (who?); name the variable"),
    ("models", (302, b""), "moved to"),
    ("models", (429, b"full"), "status 429 (full), 3 times in a row"),
    ("logprobs", lambda ids, tops: None, "no log-probabilities, so P(Yes) is unknown"),
    ("answer", lambda body: (404, b"no page"), "status 404, no such model or path (no page)"),
    ("answer", lambda body: (400, {"detail": "texts only"}), "refuses the request (texts only)"),
], ids=["model", "key", "moved", "full", "logprobs", "path", "ids"])
def test_what_cannot_work_ends_at_once(stand_in, flags, bench, tmp_path, capsys, name, value, said):
    setattr(stand_in, name, value)
    assert said in refused(capsys, score_py, *flags, "--input", bench, "--out", tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == [bench]


@pytest.mark.parametrize("models", [(404, b"not found"), (200, b"{}"), (200, b'{"data": 3}'), (200, b"[1]")])
def test_a_server_without_a_list_of_models_is_asked_all_the_same(stand_in, tiny_folder, models):
    stand_in.models = models
    assert len(found(stand_in, tiny_folder, cases(1))[0]) == 4


def test_many_ranks_are_refused(stand_in, tiny_folder, monkeypatch):
    monkeypatch.setattr(ranks, "count", lambda: 2)
    with pytest.raises(BadInput, match="one process asks for all; leave torchrun out"):
        sampler(stand_in, tiny_folder)


def test_nobody_at_the_address(tiny_folder, bench, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for url in (f"http://127.0.0.1:{port}", "http://no-such-host.invalid"):
        flags = ["--server", url, "--model", "judge", "--tokenizer", tiny_folder, "--input", bench]
        assert "no server answers there" in refused(capsys, score_py, *flags)


def test_a_refused_case_is_named(stand_in, tiny_folder):
    it = sampler(stand_in, tiny_folder)
    stand_in.plan = [(400, {"error": {"message": "maximum context length is 5"}})]
    said = r"problem 'Problem 0.', \d+ tokens: .*maximum context length is 5.*leave this case out"
    with pytest.raises(BadInput, match=said):
        list(it.analyses(cases(1)))


# ------------------------------------------------------------------------------------------ flags and the key

@pytest.mark.slow
def test_without_a_server_nothing_of_it_is_imported():
    """PyTorch brings http.client itself, so it is taken away before the scripts are imported."""
    code = """
import sys
import torch, tokenizers, safetensors, numpy, tqdm, jinja2
sys.modules.pop("http.client", None)
import score, data
print([name for name in sys.modules if name.split(".")[0] == "server"], "http.client" in sys.modules)
"""
    process = start(["-c", code])
    printed, errors = process.communicate(timeout=HANG)
    assert (process.returncode, printed) == (0, "[] False\n"), errors


def test_flags_that_do_not_go_together_end_with_one_line(capsys):
    flags = ["--server", "http://h", "--model", "judge", "--problem", "P", "--step", "s"]
    assert refused(capsys, score_py, *flags).startswith("error: --server needs --tokenizer FOLDER, with the ")


@pytest.mark.parametrize("changes, said", [
    ({"dtype": "bfloat16"}, "--dtype has no meaning with --server"),
    ({"batch_size": 3}, "--batch-size has no meaning"),
    ({"device": "meta"}, "--device has no meaning"),
    ({"tokenizer": None}, "--server needs --tokenizer FOLDER"),
    ({"server": None}, "--tokenizer needs --server"),
    ({"server": None, "tokenizer": None, "concurrency": 3}, "--concurrency needs --server"),
    ({"server": "localhost:8"}, "not an address"),
    ({"server": "http://"}, "not an address"),
    ({"server": "ftp://h"}, "not an address"),
    ({"server": "http://h:port"}, "not an address"),
    ({"server": "http://h h"}, "not an address"),
    ({"server": "http://[::1"}, "not an address"),
    ({"server": f"http://user:{KEY}@h"}, "give the address alone"),
    ({"server": f"http://h?key={KEY}"}, "give the address alone"),
    ({"api_key_env": KEY}, "NAME of an environment variable"),
    ({"api_key_env": "RPRM_ODD"}, "beyond ASCII"),
])
def test_flags_that_cannot_be(monkeypatch, changes, said):
    monkeypatch.setenv("RPRM_ODD", KEY + "\u2713\r\nX: y")
    with pytest.raises(BadInput) as stop:
        ServedConfig(**{"model": "judge", "server": "http://h", "tokenizer": "folder"} | changes)
    assert said in str(stop.value) and KEY not in str(stop.value)


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/", "/v1/completions"])
def test_the_end_of_the_address_may_be_left_out(end):
    assert parse_url(f"http://h:1/x{end}").geturl() == "http://h:1/x"


def test_the_key_goes_to_the_server_and_nowhere_else(stand_in, flags, bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RPRM_TEST_KEY", KEY)
    flags += ["--api-key-env", "RPRM_TEST_KEY"]
    score_py(*flags, "--input", bench, "--k", 1, "--out", tmp_path / "out.jsonl")
    assert stand_in.headers
    assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in stand_in.headers)
    refusal = {"error": {"message": f"Incorrect API key provided: {KEY}"}}
    stand_in.plan = [(500, {"error": f"key {KEY} is tired"}), (401, refusal)] * 9
    with pytest.raises(SystemExit):
        score_py(*flags, "--input", bench, "--k", 1, "--out", tmp_path / "out2.jsonl")
    said = capsys.readouterr()
    assert "refuses the key (Incorrect API key provided: ***); set the variable of --api-key-env" in said.err
    written = "".join(path.read_text() for path in tmp_path.iterdir())
    assert json.loads((tmp_path / "out.jsonl.config.json").read_text())["api_key_env"] == "RPRM_TEST_KEY"
    assert KEY not in said.out + said.err + written


# --------------------------------------------------------------------------------------------- many at a time

def test_no_more_requests_than_allowed_and_no_fewer(stand_in, tiny_folder):
    """Every request waits until four are there: fewer would wait for ever, and a fifth is seen."""
    stand_in.write = lambda prompt, seed: "no verdict here"  # 3 cases: 3 requests, then 12 readings
    it = sampler(stand_in, tiny_folder, concurrency=4)
    stand_in.most_under_way, four = 0, threading.Barrier(4)

    def wait(body):
        if body["max_tokens"] == 1:
            four.wait(HANG)
            stand_in.forever.wait(0.02)  # so that a fifth would be seen
    stand_in.on_post = wait
    assert len(list(it.analyses(cases(3)))) == 3
    assert stand_in.most_under_way == 4


def test_a_case_may_be_added_when_another_is_answered(stand_in, tiny_folder):
    it = sampler(stand_in, tiny_folder)
    answered = []
    it.restart()
    for n, case in enumerate(cases(5)):
        assert not it.busy and it.add(case) == n
        while it.busy:
            answered += [request_id for request_id, analyses in it.step() if len(analyses) == 4]
    assert answered == [0, 1, 2, 3, 4] and stand_in.most_under_way == 1


def test_a_sampler_has_room_for_so_many_cases_and_forgets_them(stand_in, tiny_folder):
    """No answer comes before all are in. Cases from before `restart` are not among the answers after it."""
    it = sampler(stand_in, tiny_folder, concurrency=2)
    go = threading.Event()
    stand_in.on_post = lambda body: go.wait(30)
    room = []
    for case in cases(2):
        room.append(it.has_room)
        it.add(case)
    assert room == [True, True] and not it.has_room and it.busy
    it.restart()
    assert it.has_room and not it.busy
    assert [it.add(case) for case in cases(5)[3:]] == [0, 1]
    go.set()
    found = dict(it.step() + it.step())
    assert not it.busy and it.has_room
    for request_id, case in enumerate(cases(5)[3:]):
        prompt = stand_in.tokenizer.decode(it.prompt_ids(case))
        for a in found[request_id]:
            assert a.p_yes == pytest.approx(p_yes(prompt + a.text[:a.text.rindex("?") + 1]), abs=1e-9)


def test_no_cases_no_answers(stand_in, tiny_folder):
    assert list(sampler(stand_in, tiny_folder).analyses([])) == []


def test_after_an_error_nothing_is_tried_again(stand_in, tiny_folder):
    """While the first case pauses before its next try, the second ends in an error: nobody waits any more."""
    it = sampler(stand_in, tiny_folder, concurrency=2)
    tried = threading.Event()
    pauses = []

    def pause(seconds: float) -> None:
        pauses.append(it.engine.server.stopped.is_set())
        tried.set()
        it.engine.server.stopped.wait(60)
    it.engine.server.pause = pause
    stand_in.plan = [(500, b""), (400, {"error": {"message": "no"}}), (500, b"")]
    it.add(cases(2)[0])
    assert tried.wait(30)
    it.add(cases(2)[1])
    with pytest.raises(BadInput, match="leave this case out"):
        it.step()
    with pytest.raises(BadInput, match="2 times in a row"):  # although three retries are allowed
        it.step()
    assert pauses == [False]


def test_results_come_as_they_are_done():
    second = threading.Event()
    jobs = Jobs()
    assert jobs.start(lambda: second.wait(30)) == 0
    assert jobs.start(lambda: second.set() or "second") == 1
    assert [jobs.next(), jobs.next()] == [(1, "second"), (0, True)] and jobs.running == 0


def test_results_side_by_side_are_in_order(monkeypatch):
    """The first waits for the second, and the second for the third: so three run at a time, and no fourth."""
    start = Jobs.start
    under_way = []

    def start_and_count(jobs, function):
        number = start(jobs, function)
        under_way.append(jobs.running)
        return number
    monkeypatch.setattr(Jobs, "start", start_and_count)
    second, third = threading.Event(), threading.Event()
    functions = [lambda: second.wait(30) and 0, lambda: third.wait(30) and (second.set() or 1),
                 lambda: third.set() or 2, lambda: 3]
    assert side_by_side(functions, 3) == [0, 1, 2, 3] and under_way == [1, 2, 3, 3]
    assert side_by_side([], 3) == []


def test_an_error_in_a_thread_is_raised_where_it_is_waited_for():
    def refuse():
        raise Refused("no")
    with pytest.raises(Refused):
        side_by_side([refuse], 1)


# ---------------------------------------------------------------------------------------------- whole runs

def test_scores_are_in_order_and_stop_at_the_first_wrong_step(stand_in, flags, bench, tmp_path, capsys):
    stand_in.write = lambda prompt, seed: GOOD
    stand_in.top = lambda prefix: {" Yes": -2.0 if "Then 3" in prefix else -0.1, " No": -1.0}
    slow = itertools.count()
    stand_in.on_post = lambda body: stand_in.forever.wait(0.05 if next(slow) % 3 == 0 else 0)
    score_py(*flags, "--input", bench, "--k", 1, 3, "--out", tmp_path / "out.jsonl")
    lines = read(tmp_path / "out.jsonl")
    assert [line["id"] for line in lines] == [f"s{i}" for i in range(6)]
    assert [line["prediction"] for line in lines] == [-1, -1, -1, 1, -1, -1]
    assert [len(line["samples"]) for line in lines] == [3, 3, 3, 2, 3, 3]
    assert len(stand_in.analyses_asked()) == 17
    printed = capsys.readouterr().out
    assert "model judge; top 20 log-probabilities" in printed
    assert "server: 0 requests tried again; P(Yes) bounded 0, unknown 0" in printed


@pytest.mark.slow
@pytest.mark.parametrize("how", [["--k", 2], ["--k", 2, "--all-steps"], ["--direct", "--k", 1]])
def test_a_failed_run_resumes_to_the_same_file(stand_in, flags, bench, tmp_path, how):
    score_py(*flags, "--input", bench, "--out", tmp_path / "whole.jsonl", *how)
    stand_in.plan = [None] * 10 + [(500, b"")] * 1000
    with pytest.raises(SystemExit):
        score_py(*flags, "--input", bench, "--out", tmp_path / "out.jsonl", "--concurrency", 2, *how)
    left = len(read(tmp_path / "out.jsonl.part"))
    stand_in.plan.clear()
    stand_in.requests.clear()
    score_py(*flags, "--input", bench, "--out", tmp_path / "out.jsonl", "--timeout", 99, *how, "--resume")
    assert read(tmp_path / "out.jsonl") == read(tmp_path / "whole.jsonl")
    asked = " ".join(stand_in.tokenizer.decode(body["prompt"]) for body in stand_in.analyses_asked())
    assert (f"Problem {left}." in asked) and not any(f"Problem {i}." in asked for i in range(left))


def command(script: str, *argv) -> list[str]:
    return [sys.executable, str(ROOT / script), *map(str, argv)]


@pytest.mark.slow
def test_ctrl_c_waits_for_no_answer_and_the_run_goes_on(stand_in, tiny_folder, tmp_path, capsys):
    """The fifth answer would take a minute, the timeout is ten: the program ends at once."""
    rows = [{"id": str(i), "problem": f"Problem {i}.", "previous_steps": [], "now_step": "1.", "label": True}
            for i in range(6)]
    (tmp_path / "cases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "words.txt").write_text(WORDS)
    argv = ["sample", "--server", stand_in.url, "--model", "judge", "--tokenizer", tiny_folder,
            "--concurrency", 1, "--prompt-file", tmp_path / "words.txt", "--cases", tmp_path / "cases.jsonl",
            "--out"]
    argv = [str(a) for a in argv]
    fifth = threading.Event()
    stand_in.on_post = lambda body: len(stand_in.analyses_asked()) == 5 and fifth.set()
    stand_in.plan = [None] * 4 + ["never"]
    # a shell starts a job in the background with SIGINT ignored, and it would hand that on
    process = subprocess.Popen([sys.executable, str(ROOT / "data.py"), *argv, str(tmp_path / "out.jsonl")],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    assert fifth.wait(HANG)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=HANG)
    assert process.returncode == 130
    assert said.strip().splitlines()[-1].startswith("interrupted; what is written is whole")
    assert "Traceback" not in said
    assert len(read(tmp_path / "out.jsonl.part")) == 4
    commands = (data.CasesConfig, data.cases), (data.SampleConfig, data.sample)
    run(*commands, argv=[*argv, str(tmp_path / "out.jsonl"), "--resume"])
    run(*commands, argv=[*argv, str(tmp_path / "whole.jsonl")])
    assert read(tmp_path / "out.jsonl") == read(tmp_path / "whole.jsonl")
    assert "server: 0 requests tried again" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- a real server

@pytest.fixture(scope="module")
def serve():
    """serve(folder) -> URL of a llama.cpp server with that checkpoint; skips without the packages."""
    pytest.importorskip("xllamacpp", reason="no server here: pip install xllamacpp gguf")
    pytest.importorskip("gguf", reason="no server here: pip install xllamacpp gguf")
    processes = []

    def serve(folder: Path) -> str:
        command = [sys.executable, str(ROOT / "tests" / "server" / "llama_server.py"), str(folder), "0"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        processes.append(process)
        serving = next(line for line in process.stdout if line.startswith("serving"))
        return re.search(r"http://\S+", serving)[0]
    yield serve
    for process in processes:
        process.terminate()
        process.wait()


def compare(config: score.JudgeConfig, there: ServedConfig, asked: list[Case], k: int) -> tuple[int, float, float]:
    """How many analyses have another text; among the others, the largest difference of P(Yes), of rewards."""
    different, of_p_yes, of_rewards = 0, [], []
    here = in_order(load_sampler(config, k, force=True).analyses(asked))
    got = in_order(load_sampler(there, k, force=True).analyses(asked))
    for ours, theirs in zip(here, got, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            if a.text != b.text:
                different += 1
                continue
            assert replace(a, p_yes=None) == replace(b, p_yes=None)
            of_p_yes.append(abs(a.p_yes - b.p_yes))
        if [a.text for a in ours] == [b.text for b in theirs]:
            of_rewards.append(abs(reward(ours) - reward(theirs)))
    return different, max(of_p_yes), max(of_rewards)


def test_a_real_server_gives_the_rewards_of_the_local_path(serve):
    """The embedded model over llama.cpp in fp32: greedy analyses of its small world. Measured: 2e-6.

    Whole ones, with P(Yes) where the verdict is sampled, and cut ones, with P(Yes) after an added line.
    """
    base = ROOT / "examples" / "arithmetic" / "base"
    asked = small_world_cases()
    url = serve(base)
    for most in (120, 30):
        common = {"temperature": 0.0, "max_new_tokens": most}
        there = ServedConfig(model="model", server=url, tokenizer=str(base), **common)
        different, p, r = compare(score.JudgeConfig(model=str(base), device="cpu", **common), there, asked, 2)
        assert (different, p <= 1e-4, r <= 1e-4) == (0, True, True), (different, p, r)
    there = ServedConfig(model="model", server=url, tokenizer=str(base), max_new_tokens=120)
    it = load_sampler(there, 10, force=True)
    assert it.engine.per_request == 2 and it.engine.raw  # four slots refuse n = 10 and 5
    [(_, analyses)] = it.analyses(asked[:1])
    assert len(analyses) == 10 and len({a.text for a in analyses}) > 1
    assert all(a.p_yes is not None for a in analyses)
    local = load_sampler(score.JudgeConfig(model=str(base), device="cpu"), 1, force=True)
    for a in analyses:  # each with a verdict is read again here, with one full pass
        if a.verdict is not None:
            before = local.tokenizer.encode(a.text[:a.text.rindex("?") + 1])
            [again] = local.engine.read_p_yes([local.prompt_ids(asked[0]) + before])
            assert again == pytest.approx(a.p_yes, abs=1e-4)


def test_a_real_server_with_a_real_model(serve, smollm2, processbench, tmp_path):
    """SmolLM2-135M, a step of ProcessBench, greedy.

    A text may part from the other where two tokens are nearly as likely, and then its P(Yes) is another
    analysis's. That was not seen in these 16 tokens, nor in 11 steps of 128, whose P(Yes) differed by 5e-6.
    """
    solution = processbench[0]
    asked = [Case(solution["problem"], (), solution["steps"][0])]
    (tmp_path / "words.txt").write_text(WORDS)
    common = {"temperature": 0.0, "max_new_tokens": 16, "prompt_file": str(tmp_path / "words.txt")}
    there = ServedConfig(model="model", server=serve(smollm2), tokenizer=str(smollm2), **common)
    different, p, r = compare(score.JudgeConfig(model=str(smollm2), device="cpu", **common), there, asked, 1)
    assert (different, p <= 1e-4, r <= 1e-4) == (0, True, True), (different, p, r)
