"""Scores: predictions and accuracies against hand-worked ones, K, early stop, resuming, and single solutions.

Where a test needs certain rewards, a stand-in for the sampler gives certain P(Yes); the others use the tiny model.
"""
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import plumbing.rounds
import score
from checkpoint import load_model, load_tokenizer
from plumbing.cli import run
from conftest import ROOT, kill_and_resume
from formats.processbench import ProcessBench
from model import Tree, tree_attention
from formats.verdicts import VERIFICATION
from rprm import Analysis, Case, load_local_sampler, load_prompt, reward

SHORT = "Problem: {problem}\nBefore: {previous_steps}\nNow: {now_step}"


# ---------------------------------------------------------------------------------------------- helpers

def score_py(*argv) -> None:
    commands = [(score.JudgeConfig, score.judge), (score.ThresholdConfig, score.threshold), (score.BestConfig, score.best),
                (score.ReportConfig, score.report)]
    run(*commands, default="judge", argv=[str(a) for a in argv])


def refused(capsys, *argv) -> str:
    """The last line of an ending with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        score_py(*argv)
    assert error.value.code == 2
    return capsys.readouterr().err.strip().split("\n")[-1]


def row(name: str, label: int | None, n_steps: int = 3) -> dict:
    return {"id": name, "problem": f"Problem of {name}?", "steps": [f"{name} step {t}." for t in range(n_steps)], "label": label}


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def summary(out: Path) -> list[dict]:
    return json.loads(out.with_suffix(".summary.json").read_text())


def table_row(lines: list[dict], k: int) -> dict:
    """That of these lines of scores at this K."""
    table = ProcessBench((1, k))
    for line in lines:
        table.add(line | {"source": "s", "steps": ["a step"] * len(line["samples"])})
    return table.row("s", k)


def rewards_close(lines: list[dict]) -> list[dict]:
    """The lines with P(Yes) and rewards as approximate numbers: their last digit depends on the company."""
    def near(value):
        return None if value is None else pytest.approx(value, abs=1e-5)
    return [line | {"rewards": [near(r) for r in line["rewards"]],
                    "samples": [[a | {"p_yes": near(a["p_yes"])} for a in step] for step in line["samples"]]} for line in lines]


@pytest.fixture()
def stand_in(monkeypatch):
    """stand_in(rows, p_yes): from now on the K analyses of step t of row n have P(Yes) p_yes[n][t]. Returns the cases asked for."""
    def install(rows: list[dict], p_yes: list[list], verdicts=lambda p: None if p is None else p > 0.5) -> list[Case]:
        table = {(r["problem"], t): values if isinstance(values, list) else [values] for r, steps in zip(rows, p_yes)
                 for t, values in enumerate(steps)}
        asked = []

        def analyses_of(case: Case, k: int) -> list[Analysis]:
            values = table[case.problem, len(case.previous_steps)]
            assert case.now_step.endswith(f" {len(case.previous_steps)}.")  # the step after the previous ones
            return [Analysis(f"analysis {i}", verdicts(p), p, 10, True) for i, p in enumerate((values * k)[:k])]

        rng = random.Random(0)

        def load(config, k, force, direct=False) -> StandIn:
            return StandIn(lambda case: analyses_of(case, k), asked, rng)
        monkeypatch.setattr(score, "load_sampler", load)
        return asked
    return install


class StandIn:
    """A sampler that has up to four cases at a time and gives them in chance order, as the engine does."""

    def __init__(self, analyses_of: Callable[[Case], list[Analysis]], asked: list[Case], rng: random.Random):
        self.analyses_of, self.asked, self.rng, self.engine = analyses_of, asked, rng, SimpleNamespace(new_tokens=1)

    def restart(self):
        self.open_cases, self.next_id = [], 0

    def add(self, case: Case) -> int:
        self.asked.append(case)
        self.open_cases.append((self.next_id, case))
        self.next_id += 1
        return self.next_id - 1

    has_room = property(lambda self: len(self.open_cases) < 4)
    busy = property(lambda self: bool(self.open_cases))

    def step(self) -> list:
        request_id, case = self.open_cases.pop(self.rng.randrange(len(self.open_cases)))
        return [(request_id, self.analyses_of(case))]


@pytest.fixture()
def tiny(tiny_folder, tmp_path) -> list:
    """The flags for the tiny model."""
    (tmp_path / "short.txt").write_text(SHORT)
    return ["--model", tiny_folder, "--device", "cpu", "--prompt-file", tmp_path / "short.txt", "--max-new-tokens", 8, "--batch-size", 3]


# ---------------------------------------------------------------------------------------------- accuracies

HAND = [  # (row, P(Yes) of its steps, prediction at threshold 0.5)
    (row("a", -1), [0.9, 0.6, 0.5], -1),             # at the threshold is not below it
    (row("b", -1), [0.9, 0.4, 0.9], 1),
    (row("c", 1), [0.9, 0.49, 0.1], 1),
    (row("d", 2), [0.9, 0.1, 0.1], 1),               # the first one counts, not that the wrong step is found too
    (row("e", 0), [0.8, 0.8, 0.8], -1),
    (row("f", 2), [[0.9, 0.2], [0.4, 0.7], [0.6, 0.2]], 2),  # means 0.55, 0.55, 0.4: no vote
    (row("g", None), [0.1, 0.9, 0.9], 0),            # unlabelled: in no accuracy
]


def test_hand_worked_accuracies(tmp_path, stand_in, capsys):
    """2 of 4 errors found, 1 of 2 correct solutions left alone: F1 = 2 * 50 * 50 / 100."""
    rows = [r for r, _, _ in HAND]
    stand_in(rows, [p for _, p, _ in HAND])
    score_py("--input", write(tmp_path / "bench.json", rows), "--k", 2, 2, "--out", tmp_path / "s.jsonl")
    lines = read(tmp_path / "s.jsonl")
    assert [line["id"] for line in lines] == list("abcdefg")
    assert [line["prediction"] for line in lines] == [prediction for *_, prediction in HAND]
    assert lines[5]["rewards"] == pytest.approx([0.55, 0.55, 0.4])
    assert [len(line["rewards"]) for line in lines] == [3, 2, 2, 2, 3, 3, 1]  # judged no further than the first wrong one
    [total] = summary(tmp_path / "s.jsonl")
    assert (total["error_accuracy"], total["correct_accuracy"], total["f1"]) == (50, 50, 50)
    assert (total["source"], total["k"], total["solutions"], total["unlabelled"], total["tokens_per_step"]) == ("bench", 2, 7, 1, 20)
    out = capsys.readouterr().out
    interval = r" \[\d+\.\d, \d+\.\d\] +"
    assert re.search(rf"^bench +2 +7 +50\.0{interval}50\.0{interval}50\.0{interval[:-2]}$", out, re.M)
    assert re.search(r"^bench +2 +0\.0 +0\.0 +0 +0 +20$", out, re.M)
    assert "want the rewards of all labelled steps" in out  # not all were judged
    assert "1 solutions have no label" in out


@pytest.mark.parametrize("right_errors, errors, right_correct, correct, f1", [
    (1, 3, 1, 2, 40.0), (3, 4, 1, 4, 37.5), (0, 2, 2, 2, 0.0), (0, 1, 0, 1, 0.0), (2, 2, 3, 3, 100.0), (1, 2, 0, 0, None),
    (0, 0, 1, 1, None),
])
def test_f1_is_the_harmonic_mean(right_errors, errors, right_correct, correct, f1):
    """And nothing where there is nothing to take it over."""
    analysis = {"verdict": True, "p_yes": 0.9, "n_tokens": 1, "finished": True, "forced": False}
    lines = [{"label": 2, "predictions": {"4": 2 if i < right_errors else 1, "1": 0}} for i in range(errors)]
    lines += [{"label": -1, "predictions": {"4": -1 if i < right_correct else 0, "1": 0}} for i in range(correct)]
    lines += [{"label": None, "predictions": {"4": 2, "1": 0}}]
    found = table_row([{"samples": [[analysis] * 4]} | line for line in lines], 4)
    assert found["f1"] == (f1 if f1 is None else pytest.approx(f1))
    assert found["error_accuracy"] == (pytest.approx(100 * right_errors / errors) if errors else None)
    assert found["correct_accuracy"] == (pytest.approx(100 * right_correct / correct) if correct else None)


def test_a_row_per_file_and_the_average(tmp_path, stand_in):
    """The average is over the files' F1, not over all solutions in one; counts are summed."""
    one, two = [row("a", 0), row("b", -1)], [row("c", 0), row("d", 0), row("e", -1), row("f", -1)]
    stand_in(one + two, [[0.1] * 3, [0.9] * 3, [0.1] * 3, [0.9] * 3, [0.9] * 3, [0.1] * 3])
    files = [write(tmp_path / "one.json", one), write(tmp_path / "two.json", two)]
    score_py("--input", *files, "--k", 1, 2, "--out", tmp_path / "s.jsonl")
    rows = summary(tmp_path / "s.jsonl")
    assert [(r["source"], r["k"], r["f1"], r["solutions"]) for r in rows] == [
        (source, k, f1, n) for k in (1, 2) for source, f1, n in (("one", 100, 2), ("two", 50, 4), ("average", 75, 6))]
    score_py("--input", *files, "--k", 1, "--limit", 1, "--out", tmp_path / "t.jsonl")
    assert [line["id"] for line in read(tmp_path / "t.jsonl")] == ["a", "c"]  # of each file
    score_py("--input", files[0], files[0], "--k", 1, "--out", tmp_path / "u.jsonl")
    assert [(r["source"], r["solutions"]) for r in summary(tmp_path / "u.jsonl")] == [(str(files[0]), 4)]  # one source, counted once


def test_every_judged_step_is_a_sign_of_work(tmp_path, stand_in, monkeypatch):
    """A solution of many steps takes long, and its line, a sign itself, comes after the last: other ranks must not give up before."""
    rows, signs = [row("a", -1)], []
    stand_in(rows, [[0.9] * 3])
    monkeypatch.setattr(score.ranks, "sign_of_life", lambda: signs.append((tmp_path / "s.jsonl.part").read_text().count("\n")))
    score_py("--input", write(tmp_path / "b.json", rows), "--k", 1, "--out", tmp_path / "s.jsonl")
    assert signs == [0, 0, 0]


def test_the_threshold(tmp_path, stand_in):
    rows = [row("a", -1)]
    stand_in(rows, [[0.9, 0.3, 0.0]])
    write(tmp_path / "b.json", rows * 2)
    for threshold, prediction in ((0.0, -1), (0.3, 2), (0.31, 1), (0.9, 1), (0.91, 0), (1.0, 0)):
        score_py("--input", tmp_path / "b.json", "--k", 1, "--threshold", threshold, "--out", tmp_path / "s.jsonl", "--overwrite")
        assert [line["prediction"] for line in read(tmp_path / "s.jsonl")] == [prediction] * 2


def test_unparsed_truncated_forced_and_null(tmp_path, stand_in, monkeypatch):
    """The rates are over the analyses that the row's K takes."""
    def a(verdict, p, finished=True, forced=False, n=10):
        return {"text": "", "verdict": verdict, "p_yes": p, "n_tokens": n, "finished": finished, "forced": forced}
    lines = [{"label": -1, "predictions": {"2": -1, "1": -1},
              "samples": [[a(True, 0.9), a(None, 0.8, False, True, 30)], [a(None, None), a(None, None)]]},
             {"label": 0, "predictions": {"2": 0, "1": -1}, "samples": [[a(None, 0.1, forced=True), a(False, 0.2)]]}]
    two, one = table_row(lines, 2), table_row(lines, 1)
    assert (two["unparsed"], two["truncated"], two["forced"], two["null_rewards"]) == (pytest.approx(400 / 6), pytest.approx(100 / 6), 2, 1)
    assert (one["unparsed"], one["truncated"], one["forced"], one["null_rewards"]) == (pytest.approx(200 / 3), 0, 1, 1)
    assert (two["tokens_per_step"], one["tokens_per_step"]) == (pytest.approx(80 / 3), 10)
    assert (two["error_accuracy"], one["error_accuracy"]) == (100, 0)


def test_a_null_reward_predicts_nothing(tmp_path, stand_in, capsys):
    """A step without any P(Yes) is not wrong; the next ones are judged."""
    rows = [row("a", -1), row("b", 1)]
    stand_in(rows, [[None, 0.9, None], [[None, None], [None, 0.1], 0.9]])
    score_py("--input", write(tmp_path / "b.json", rows), "--k", 2, "--out", tmp_path / "s.jsonl", "--no-force")
    a, b = read(tmp_path / "s.jsonl")
    assert (a["rewards"], a["prediction"]) == ([None, 0.9, None], -1)
    assert (b["rewards"], b["prediction"]) == ([None, 0.1], 1)
    assert summary(tmp_path / "s.jsonl")[0]["null_rewards"] == 3
    write(tmp_path / "one.json", rows[:1])
    score_py("--input", tmp_path / "one.json", "--k", 1)
    assert re.search(r"^Step 1: reward null +right  verdicts 0 Yes, 0 No, 1 missing", capsys.readouterr().out, re.M)


# ---------------------------------------------------------------------------------------------- early stop, and several K

def random_bench(n: int, seed: int) -> tuple[list[dict], list[list[list]]]:
    rng = random.Random(seed)
    rows = [row(f"r{i}", rng.choice([-1, 0, 1, 2, None]), rng.randrange(3, 6)) for i in range(n)]
    return rows, [[[rng.choice([None, rng.random() ** 0.5]) for _ in range(4)] for _ in r["steps"]] for r in rows]


@pytest.mark.parametrize("ks", [[4], [1, 4], [1, 2, 3, 4], [4, 1]])
def test_stopping_at_the_first_wrong_step_predicts_the_same(tmp_path, stand_in, ks):
    """At every K of the run; and no step is judged that no K needs."""
    rows, p_yes = random_bench(60, seed=len(ks))
    write(tmp_path / "b.json", rows)
    asked = stand_in(rows, p_yes)
    score_py("--input", tmp_path / "b.json", "--k", *ks, "--out", tmp_path / "stop.jsonl")
    n_asked = len(asked)
    score_py("--input", tmp_path / "b.json", "--k", *ks, "--out", tmp_path / "all.jsonl", "--all-steps")
    stop, everything = read(tmp_path / "stop.jsonl"), read(tmp_path / "all.jsonl")
    assert [line["predictions"] for line in stop] == [line["predictions"] for line in everything]
    assert len(asked) - n_asked == sum(len(r["steps"]) for r in rows)
    needed = [max(len(r["steps"]) if p < 0 else p + 1 for p in line["predictions"].values()) for r, line in zip(rows, stop)]
    assert [len(line["samples"]) for line in stop] == needed and n_asked == sum(needed) < len(asked) - n_asked
    accuracy = [{k: v for k, v in r.items() if k in ("k", "f1", "error_accuracy", "correct_accuracy")}
                for r in summary(tmp_path / "stop.jsonl")]
    assert accuracy == [{k: r[k] for k in accuracy[0]} for r in summary(tmp_path / "all.jsonl")] and accuracy[0]["f1"]
    for r, line, values in zip(rows, everything, p_yes):  # and each prediction as its definition says
        for k in ks:
            means = [[p for p in step[:k] if p is not None] for step in values]
            wrong = [t for t, some in enumerate(means) if some and sum(some) / len(some) < 0.5]
            assert line["predictions"][str(k)] == (wrong[0] if wrong else -1)


@pytest.mark.slow
def test_several_k_in_one_run_equal_separate_runs(tmp_path, tiny):
    """K = 1 is the first sample of K = 4, with the same prediction and the same row in the table."""
    rows = [row(f"r{i}", [-1, 0, 1][i % 3]) for i in range(6)]
    write(tmp_path / "b.json", rows)
    tiny = [*tiny, "--threshold", 0.3]  # the tiny model's rewards lie on both sides of it
    score_py(*tiny, "--input", tmp_path / "b.json", "--k", 1, 2, 4, "--out", tmp_path / "together.jsonl", "--all-steps")
    together = read(tmp_path / "together.jsonl")
    assert len({r for line in together for r in line["rewards"]}) == 18
    assert len({p for line in together for p in line["predictions"].values()}) > 1
    for k in (1, 2, 4):
        score_py(*tiny, "--input", tmp_path / "b.json", "--k", k, "--out", tmp_path / "alone.jsonl", "--all-steps", "--overwrite")
        alone = read(tmp_path / "alone.jsonl")
        assert alone == rewards_close([line | {
            "rewards": [reward(Analysis(**a) for a in step[:k]) for step in line["samples"]], "prediction": line["predictions"][str(k)],
            "predictions": {str(k): line["predictions"][str(k)]}, "samples": [step[:k] for step in line["samples"]]} for line in together])
        [own], [same] = summary(tmp_path / "alone.jsonl"), [r for r in summary(tmp_path / "together.jsonl") if r["k"] == k]
        for name, value in same.items():  # batches of other sizes round P(Yes) otherwise
            assert own[name] == (pytest.approx(value, abs=1e-4) if isinstance(value, float) else value), name


@pytest.mark.slow
def test_a_step_is_judged_with_the_steps_before_it(tmp_path, tiny, tiny_folder):
    """What score.py writes down is what the method gives for each (problem, previous steps, now step)."""
    rows = [row("a", -1), row("b", 1)]
    score_py(*tiny, "--input", write(tmp_path / "b.json", rows), "--k", 2, "--out", tmp_path / "s.jsonl", "--all-steps")
    config = score.JudgeConfig(model=str(tiny_folder), device="cpu", prompt_file=str(tmp_path / "short.txt"), max_new_tokens=8)
    sampler = load_local_sampler(config, 2, force=True)
    for r, line in zip(rows, read(tmp_path / "s.jsonl")):
        for t, step in enumerate(line["samples"]):
            [(_, found)] = sampler.analyses([Case(r["problem"], tuple(r["steps"][:t]), r["steps"][t])])
            assert [a["text"] for a in step] == [a.text for a in found]
            assert [a["p_yes"] for a in step] == pytest.approx([a.p_yes for a in found], abs=1e-5)
            assert line["rewards"][t] == pytest.approx(sum(a.p_yes for a in found) / 2, abs=1e-5)


@pytest.mark.slow
def test_the_batch_size_changes_nothing(tmp_path, tiny):
    rows = [row(f"r{i}", [-1, 0, 1][i % 3], 2 + i % 3) for i in range(7)]
    write(tmp_path / "b.json", rows)
    score_py(*tiny, "--input", tmp_path / "b.json", "--k", 2, "--out", tmp_path / "a.jsonl")
    expected = rewards_close(read(tmp_path / "a.jsonl"))
    for size in (1, 16):
        score_py(*tiny, "--input", tmp_path / "b.json", "--k", 2, "--out", tmp_path / "b.jsonl", "--batch-size", size, "--overwrite")
        assert read(tmp_path / "b.jsonl") == expected


# ---------------------------------------------------------------------------------------------- resuming

@pytest.mark.parametrize("size", [1, 2])
def test_a_killed_run_resumes_to_the_same_file(tmp_path, stand_in, monkeypatch, size):
    """Torn in mid-line or between two; the table counts the lines of the killed run too. Whole rounds of `size` are kept."""
    monkeypatch.setattr(plumbing.rounds, "ROUND", 1)
    rows, p_yes = random_bench(9, seed=3)
    asked = stand_in(rows, p_yes)
    out = tmp_path / "s.jsonl"
    flags = ["--input", write(tmp_path / "b.json", rows), "--k", 1, 4, "--out", out, "--batch-size", size]
    score_py(*flags)
    whole, table, n_asked = out.read_bytes(), summary(out), len(asked)
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for torn in (0, 10, ends[0], ends[2] - 1, ends[5] + 33, len(whole)):
        out.rename(f"{out}.part")
        Path(f"{out}.part").write_bytes(whole[:torn])
        asked.clear()
        score_py(*flags, "--resume")
        assert out.read_bytes() == whole and summary(out) == table and not Path(f"{out}.part").exists()
        whole_lines = sum(end <= torn for end in ends)
        kept = whole_lines if whole_lines == 9 else whole_lines // size * size
        assert len(asked) == n_asked - sum(len(line["samples"]) for line in read(out)[:kept])


@pytest.mark.slow
@pytest.mark.parametrize("flags_too", [[], ["--all-steps"], ["--direct"]], ids=["plain", "all steps", "direct"])
def test_a_killed_run_of_a_model_resumes_to_the_same_bytes(tmp_path, tiny, monkeypatch, flags_too):
    """With the model itself, P(Yes) to its last digit: what is computed side by side is the same again."""
    monkeypatch.setattr(plumbing.rounds, "ROUND", 1)
    rows = [row(f"r{i}", [-1, 0, 1][i % 3]) for i in range(7)]
    out = tmp_path / "s.jsonl"
    k = 1 if flags_too == ["--direct"] else 2
    flags = [*tiny, "--input", write(tmp_path / "b.json", rows), "--k", k, "--out", out, *flags_too]
    score_py(*flags)
    whole = out.read_bytes()
    for part in (whole[:len(whole) // 2], whole[:-1]):
        out.rename(f"{out}.part")
        Path(f"{out}.part").write_bytes(part)
        score_py(*flags, "--resume")
        assert out.read_bytes() == whole


@pytest.mark.slow
def test_a_scoring_killed_by_the_system_resumes_to_the_same_files(tmp_path, tiny):
    """SIGKILL to the process at two random moments, rounds of 8 solutions; scores and table."""
    rows = [row(f"r{i}", [-1, 0, 1][i % 3]) for i in range(40)]
    flags = [*tiny, "--input", write(tmp_path / "b.json", rows), "--k", 1, 2, "--max-new-tokens", 24, "--batch-size", 1, "--out"]
    score_py(*flags, tmp_path / "whole.jsonl")
    kill_and_resume(["score.py", *flags, tmp_path / "killed.jsonl"], tmp_path / "killed.jsonl.part",
                    random.Random(6).sample(range(1, 27), 2))
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert summary(tmp_path / "killed.jsonl") == summary(tmp_path / "whole.jsonl")


@pytest.mark.parametrize("spoil", [lambda line: line.pop("predictions"), lambda line: line["predictions"].pop("2"),
                                   lambda line: line.update(samples=[]),
                                   lambda line: line["samples"][0][0].update(p_yes=2), lambda line: line.update(samples=3)])
def test_a_spoilt_line_of_a_killed_run_is_named(tmp_path, stand_in, capsys, monkeypatch, spoil):
    monkeypatch.setattr(plumbing.rounds, "ROUND", 1)
    rows, p_yes = random_bench(4, seed=3)
    stand_in(rows, p_yes)
    out = tmp_path / "s.jsonl"
    flags = ["--input", write(tmp_path / "b.json", rows), "--k", 2, "--out", out, "--batch-size", 1]
    score_py(*flags)
    lines = read(out)
    spoil(lines[1])
    out.unlink()
    Path(f"{out}.part").write_text("".join(json.dumps(line) + "\n" for line in lines[:3]))
    assert f"{out}.part:2: " in refused(capsys, *flags, "--resume")


def test_a_resumed_run_must_be_the_same_one(tmp_path, stand_in, capsys, monkeypatch):
    monkeypatch.setattr(plumbing.rounds, "ROUND", 1)
    rows, p_yes = random_bench(4, seed=3)
    stand_in(rows, p_yes)
    out = tmp_path / "s.jsonl"
    flags = ["--input", write(tmp_path / "b.json", rows), "--k", 2, "--out", out, "--batch-size", 1]
    score_py(*flags)
    assert "--overwrite" in refused(capsys, *flags)
    score_py(*flags, "--resume")
    assert "nothing to resume" in capsys.readouterr().out
    half = out.read_bytes()[:-30]
    out.unlink()
    Path(f"{out}.part").write_bytes(half)
    assert "--resume" in refused(capsys, *flags)
    assert "--threshold" in refused(capsys, *flags, "--resume", "--threshold", 0.6)
    write(tmp_path / "b.json", rows[1:])
    assert f"{out}.part:1: field 'id'" in refused(capsys, *flags, "--resume")
    assert Path(f"{out}.part").read_bytes() == half[:half.rfind(b"\n") + 1] and not out.exists()  # the whole lines stay


# ---------------------------------------------------------------------------------------------- direct

@pytest.mark.parametrize("wrong", [0, 2, 4])
def test_answers_to_all_steps_at_once_may_come_in_any_order(tmp_path, stand_in, wrong):
    """A direct PRM is asked for all steps at once: what comes after the first wrong step is left out, also if it came before it."""
    rows = [row(f"r{i}", wrong, 5) for i in range(8)]
    stand_in(rows, [[0.9] * wrong + [0.1] * (5 - wrong)] * 8)
    out = tmp_path / "s.jsonl"
    score_py("--input", write(tmp_path / "b.json", rows), "--out", out, "--direct", "--k", 1)
    assert [(line["id"], line["prediction"], len(line["samples"])) for line in read(out)] == [(r["id"], wrong, wrong + 1) for r in rows]


def test_direct_has_one_p_yes_a_step(tmp_path, tiny, stand_in, capsys):
    """The default K is that of analyses: a direct PRM's table says 1, and several are refused."""
    rows = [row("a", -1, 2)]
    stand_in(rows, [[0.9, 0.8]])
    bench = write(tmp_path / "b.json", rows)
    score_py("--input", bench, "--out", tmp_path / "s.jsonl", "--direct")
    assert read(tmp_path / "s.jsonl")[0]["predictions"] == {"1": -1}
    assert "leave --k out" in refused(capsys, *tiny, "--input", bench, "--direct", "--k", 4)


@pytest.mark.parametrize("batch_size", [1, 16])
def test_direct_equals_a_full_pass(tmp_path, tiny_folder, batch_size):
    """P(Yes) straight after the direct prompt and the verification line; no token is sampled; the first wrong step ends it."""
    rows = [row(f"r{i}", -1, 2 + i % 2) for i in range(5)]
    out = tmp_path / "s.jsonl"
    flags = ["--model", tiny_folder, "--device", "cpu", "--input", write(tmp_path / "b.json", rows), "--out", out, "--direct", "--k", 1,
             "--batch-size", batch_size]
    score_py(*flags, "--all-steps")
    model, tokenizer, prompt = load_model(tiny_folder), load_tokenizer(tiny_folder), load_prompt(None, None, direct=True)
    lowest = []
    for r, line in zip(rows, read(out)):
        values = []
        for t in range(len(r["steps"])):
            case = Case(r["problem"], tuple(r["steps"][:t]), r["steps"][t])
            tree = Tree([tokenizer.chat(prompt.fill(case)) + tokenizer.encode(VERIFICATION)])
            with torch.no_grad():
                logits = model.logits(model(tree.ids, tree.positions, tree_attention(tree.end)))[-1]
            values.append(logits[tokenizer.encode(" Yes") + tokenizer.encode(" No")].softmax(0)[0].item())
            assert line["rewards"][t] == pytest.approx(values[-1], abs=1e-5)
            assert [(a["text"], a["n_tokens"], a["forced"]) for a in line["samples"][t]] == [("", 0, True)]
        assert len(values) == len(line["rewards"])
        lowest.append(min(values))
    middle = sorted(lowest)[2] + 1e-6  # three solutions have a step below it, two have none
    everything = [next((t for t, value in enumerate(line["rewards"]) if value < middle), -1) for line in read(out)]
    score_py(*flags, "--threshold", middle, "--overwrite")
    assert [line["prediction"] for line in read(out)] == everything and everything.count(-1) == 2
    for r, line in zip(rows, read(out)):
        assert len(line["rewards"]) == (line["prediction"] + 1 or len(r["steps"]))


# ---------------------------------------------------------------------------------------------- one solution

@pytest.mark.slow
def test_a_single_solution_as_a_user_runs_it(tmp_path, tiny):
    """A line per step, the first one predicted wrong, and with --show the analyses."""
    done = subprocess.run([sys.executable, str(ROOT / "score.py"), *map(str, tiny), "--problem", "Tom has 3 apples and buys 4.",
                           "--step", "3 + 4 = 8.",
                           "--step", "So he has 8.", "That is all.", "--k", "2", "--all-steps", "--show"], capture_output=True, text=True,
                          encoding="utf-8", cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0, done.stderr
    steps = re.findall(r"^Step (\d): reward (\d\.\d{3})  (wrong|right)  verdicts \d Yes, \d No, \d missing  \| (.*)$", done.stdout, re.M)
    assert [(n, text) for n, _, _, text in steps] == [("1", "3 + 4 = 8."), ("2", "So he has 8."), ("3", "That is all.")]
    assert all((verdict == "wrong") == (float(value) < 0.5) for _, value, verdict, _ in steps)
    first = next((f"step {n}" for n, _, verdict, _ in steps if verdict == "wrong"), "none")
    assert f"first step predicted wrong: {first}\n" in done.stdout
    assert len(re.findall(r"^  --- analysis [12]: verdict ", done.stdout, re.M)) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["short.txt"]


@pytest.mark.parametrize("p_yes, said", [([0.9, 0.2, 0.9], "first step predicted wrong: step 2"),
                                         ([0.9, 0.9, 0.9], "first step predicted wrong: none")])
def test_a_file_of_one_object_is_a_single_solution(tmp_path, stand_in, capsys, p_yes, said):
    """With --out, its line is written too; steps after the first wrong one are named as not judged."""
    one = row("a", None)
    stand_in([one], [p_yes])
    (tmp_path / "one.json").write_text(json.dumps(one, indent=2))
    score_py("--input", tmp_path / "one.json", "--k", 3, "--out", tmp_path / "s.jsonl")
    out = capsys.readouterr().out
    assert said in out and ("(steps 3 to 3 not judged" in out) == (0.2 in p_yes) and "error acc." not in out
    assert [line["label"] for line in read(tmp_path / "s.jsonl")] == [None]


def test_unlabelled_solutions(tmp_path, stand_in, capsys):
    """Rewards and predictions without a label; the accuracies have nothing to say."""
    rows = [{k: v for k, v in row(name, None).items() if k != "label"} for name in "ab"]
    stand_in(rows, [[0.9, 0.1, 0.9], [0.9] * 3])
    score_py("--input", write(tmp_path / "b.json", rows), "--k", 1, "--out", tmp_path / "s.jsonl")
    assert [line["prediction"] for line in read(tmp_path / "s.jsonl")] == [1, -1]
    [total] = summary(tmp_path / "s.jsonl")
    assert total["unlabelled"] == 2 and total["f1"] is total["error_accuracy"] is total["correct_accuracy"] is None
    assert re.search(r"^b +1 +2 +- +- +-$", capsys.readouterr().out, re.M)


# ---------------------------------------------------------------------------------------------- PRMBench, candidates, raw text

def prm_row(name: str, classification: str, error_steps: list[int], n_steps: int = 3) -> dict:
    return {"idx": name, "modified_question": f"Problem of {name}?", "classification": classification, "error_steps": error_steps,
            "modified_process": [f"{name} step {t}." for t in range(n_steps)]}


def as_solution(prm: dict) -> dict:
    return {"problem": prm["modified_question"], "steps": prm["modified_process"]}


def test_prmbench_is_known_by_its_fields(tmp_path, stand_in, capsys):
    """All steps of its rows are judged, also beside ProcessBench's; each benchmark has its own table, over all of its files."""
    prm = [prm_row("a", "circular", [2, 3]), prm_row("b", "redundency", [1])]
    more = [prm_row("c", "circular", [])]
    rows = [row("d", 1), row("e", -1)]
    stand_in([*map(as_solution, [*prm, *more]), *rows],
             [[0.9, 0.1, 0.55], [0.1, 0.1, 0.9], [0.9, 0.9, 0.9], [0.9, 0.1, 0.9], [0.9] * 3])
    files = [write(tmp_path / name, own) for name, own in (("p.json", prm), ("more.json", more), ("bench.json", rows))]
    score_py("--input", *files, "--k", 1, 2, "--thresholds", 0.5, 0.6, "--out", tmp_path / "s.jsonl")
    lines = read(tmp_path / "s.jsonl")
    assert [len(line["rewards"]) for line in lines] == [3, 3, 3, 2, 3]
    assert (lines[0]["classification"], lines[0]["error_steps"], lines[0]["label"]) == ("circular", [2, 3], 1)
    assert lines[0]["prediction"] == 1 and "classification" not in lines[3]
    bench = summary(tmp_path / "s.jsonl")[0]
    assert (bench["source"], bench["f1"], bench["solutions"]) == ("bench", 100, 2)
    tables = [r for r in summary(tmp_path / "s.jsonl") if r["source"] == "PRMBench"]
    assert [(r["k"], r["threshold"]) for r in tables] == [(1, 0.5), (1, 0.6), (2, 0.5), (2, 0.6)]
    # at 0.5: right steps .9 | .1 .9 | .9 .9 .9, wrong ones .1 .55 | .1: TP 5, FN 1, TN 2, FP 1
    assert tables[0]["prm_score"] == pytest.approx(50 * (10 / 12 + 4 / 6))
    assert tables[1]["prm_score"] == pytest.approx(50 * (10 / 11 + 6 / 7))  # at 0.6: FP 0, TN 3
    assert (tables[0]["solutions"], tables[0]["classes"]["circular"]["solutions"]) == (3, 2)
    out = capsys.readouterr().out
    assert re.search(r"^PRMBench, K = 2 +solutions +steps +F1 at 0\.5 +F1- +PRMScore +F1 at 0\.6 ", out, re.M)
    assert re.search(r"^overall +3 +9 +83\.3 +66\.7 +75\.0 ", out, re.M) and re.search(r"^bench +2 +2 ", out, re.M)


def test_a_killed_run_of_prmbench_resumes_to_the_same_table(tmp_path, stand_in, monkeypatch):
    monkeypatch.setattr(plumbing.rounds, "ROUND", 1)
    prm = [prm_row(f"r{i}", "circular", [i % 3 + 1]) for i in range(5)]
    stand_in([as_solution(one) for one in prm], [[0.9, 0.1, 0.55]] * 5)
    out = tmp_path / "s.jsonl"
    flags = ["--input", write(tmp_path / "p.json", prm), "--k", 2, "--out", out, "--batch-size", 1]
    score_py(*flags)
    whole, table = out.read_bytes(), summary(out)
    out.rename(f"{out}.part")
    Path(f"{out}.part").write_bytes(whole[:len(whole) // 2])
    score_py(*flags, "--resume")
    assert out.read_bytes() == whole and summary(out) == table


def test_candidates_are_judged_to_their_last_step_and_the_best_is_chosen(tmp_path, stand_in, capsys):
    """From rows with several solutions in raw text to best.jsonl."""
    rows = [{"id": "q", "problem": "Sum?", "answer": "7", "solutions": ["x step 0.\n\nx step 1.", "y step 0.\n\ny step 1."]}]
    stand_in([{"problem": "Sum?"}], [[0.4, [0.2, 0.8]]])
    score_py("--input", write(tmp_path / "c.json", rows), "--k", 2, "--out", tmp_path / "s.jsonl")
    assert "c.json: row 1: raw text, split into 2 steps (--split blank):\n  Step 1: x step 0.\n  Step 2: x step 1.\n" in \
        capsys.readouterr().out
    lines = read(tmp_path / "s.jsonl")
    assert [(line["id"], line["candidate"], line["answer"], line["rewards"]) for line in lines] == [
        ("q", 0, "7", [0.4, 0.5]), ("q", 1, "7", [0.4, 0.5])]
    score_py("best", "--scores", tmp_path / "s.jsonl", "--out", tmp_path / "best.jsonl")
    [best] = read(tmp_path / "best.jsonl")
    assert best["picks"]["min"] == {"candidate": 0, "score": 0.4, "steps": ["x step 0.", "x step 1."], "answer": None,
                                    "correct": False}


def random_candidates(seed: int) -> tuple[list[dict], list[dict], list[list]]:
    """Rows with several solutions, the same as the stand-in wants them, and P(Yes), of which many are equal."""
    rng = random.Random(seed)
    rows, solutions, p_yes = [], [], []
    for problem in range(12):
        own = [[f"{problem} {c} step {t}." for t in range(rng.randrange(1, 5))] for c in range(rng.randrange(1, 6))]
        rows.append({"id": str(problem), "problem": f"Problem {problem}?", "solutions": own})
        for steps in own:
            solutions.append({"problem": f"Problem {problem}?", "steps": steps})
            p_yes.append([rng.choice([None, 0.25, 0.5, 0.75, 1.0]) for _ in steps])
    return rows, solutions, p_yes


@pytest.mark.parametrize("aggregate", ["min", "product"])
@pytest.mark.parametrize("seed", range(4))
def test_candidates_that_have_lost_are_left_and_the_picks_are_the_same(tmp_path, stand_in, capsys, monkeypatch, aggregate, seed):
    rows, solutions, p_yes = random_candidates(seed)
    by_step = {(r["problem"], step): p for r, own in zip(solutions, p_yes) for step, p in zip(r["steps"], own)}
    asked = stand_in([], [])

    def analyses_of(case: Case) -> list[Analysis]:
        p = by_step[case.problem, case.now_step]
        return [Analysis("", None if p is None else p > 0.5, p, 10, True)]
    monkeypatch.setattr(score, "load_sampler", lambda *_, **__: StandIn(analyses_of, asked, random.Random(0)))
    bench = write(tmp_path / "c.json", rows)
    found = []
    for name, flags in (("all", []), ("best", ["--best", "--aggregate", aggregate])):
        asked.clear()
        score_py("--input", bench, "--k", 1, "--out", tmp_path / f"{name}.jsonl", *flags)
        out = capsys.readouterr().out
        found.append(len(asked))
        score_py("best", "--scores", tmp_path / f"{name}.jsonl", "--aggregate", aggregate, "--out", tmp_path / f"{name}.best.jsonl")
    assert (tmp_path / "all.best.jsonl").read_bytes() == (tmp_path / "best.best.jsonl").read_bytes()
    lines = read(tmp_path / "best.jsonl")
    left = [line for line in lines if "left" in line]
    missing = sum(len(line["steps"]) - len(line["samples"]) for line in lines)
    assert left and all(line["left"] == aggregate and len(line["samples"]) < len(line["steps"]) for line in left)
    assert found[0] == sum(len(r["steps"]) for r in solutions) and found[0] - found[1] == missing > 0
    assert (f"{len(left)} candidates were left when they could no longer be the best: {missing} of {found[0]} steps were not "
            f"judged, about {10 * missing} tokens") in out


def test_best_will_not_do_with_labels_several_k_or_direct(tmp_path, tiny, capsys):
    bench = write(tmp_path / "b.json", [row("a", -1), row("b", 1)])
    assert "b a: has a label" in refused(capsys, *tiny, "--input", bench, "--best")
    assert "one --k" in refused(capsys, *tiny, "--input", bench, "--best", "--k", 1, 2)
    assert "one --k" in refused(capsys, *tiny, "--input", bench, "--best", "--direct")


def test_the_commands(tmp_path, stand_in, capsys):
    """Judging needs no name, but may have it; the others are filters over what it wrote."""
    rows = [row("a", -1), row("b", 1), row("c", 0)]
    stand_in(rows, [[0.9] * 3, [0.9, 0.1, 0.2], [0.7] * 3])
    bench = write(tmp_path / "b.json", rows)
    score_py("--input", bench, "--k", 1, "--all-steps", "--out", tmp_path / "s.jsonl")
    score_py("judge", "--input", bench, "--k", 1, "--all-steps", "--out", tmp_path / "again.jsonl")
    assert (tmp_path / "s.jsonl").read_bytes() == (tmp_path / "again.jsonl").read_bytes()
    capsys.readouterr()
    score_py("threshold", "--scores", tmp_path / "s.jsonl")
    assert "best threshold by F1: 0.71" in capsys.readouterr().out
    score_py("report", "--scores", tmp_path / "s.jsonl", "--out", tmp_path / "page.html")
    assert "3 solutions" in capsys.readouterr().out and (tmp_path / "page.html").read_text().startswith("<!")
    assert "exists already" in refused(capsys, "report", "--scores", tmp_path / "s.jsonl", "--out", tmp_path / "page.html")
    assert "invalid choice: 'jugde'" in refused(capsys, "jugde", "--input", bench)


# ---------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("changes, said", [
    ({"label": 3}, "row 2: field 'label': 3 is out of range (-1 to 2)"), ({"label": -2}, "row 2: field 'label': -2"),
    ({"label": "1"}, "row 2: field 'label'"),
    ({"steps": []}, "row 2: field 'steps'"), ({"steps": ["a", " "]}, "row 2: field 'steps'"),
    ({"problem": ""}, "row 2: field 'problem' is empty"),
])
def test_a_bad_solution_names_file_row_and_field(tmp_path, tiny, capsys, changes, said):
    write(tmp_path / "b.json", [row("a", 1), row("b", 1) | changes])
    error = refused(capsys, *tiny, "--input", tmp_path / "b.json", "--out", tmp_path / "s.jsonl")
    assert error.startswith(f"error: {tmp_path}/b.json: {said}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.json", "short.txt"]


GIVE_ONE = "give either --problem with its --step, or --input FILE"


@pytest.mark.parametrize("flags, said", [
    ([], GIVE_ONE), (["--problem", "P"], GIVE_ONE), (["--step", "s"], GIVE_ONE),
    (["--problem", "P", "--step", "s", "--input", "b.json"], GIVE_ONE),
    (["--problem", "P", "--input", "b.json"], GIVE_ONE), (["--problem", "P", "--step", "s", ""], "field 'steps'"),
    (["--problem", " ", "--step", "s"], "'problem'"),
    (["--input", "absent.json"], "absent.json: no such file"), (["--input", "empty.json"], "empty.json: has no solutions"),
    (["--input", "b.json", "--model", "absent/folder"], "absent/folder"),
    (["--input", "b.json", "--prompt-file", "absent.txt"], "absent.txt: no such prompt file"),
    (["--input", "b.json", "--k", "0"], "--k: 0 is out of range"), (["--input", "b.json", "--k", "1", "0"], "--k: 0 is out of range"),
    (["--input", "b.json", "--threshold", "1.5"], "--threshold"), (["--input", "b.json", "--threshold", "nan"], "--threshold"),
    (["--input", "b.json", "--limit", "0"], "--limit"),
])
def test_bad_flags_end_with_one_line_and_leave_nothing(tmp_path, tiny, capsys, monkeypatch, flags, said):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "b.json", [row("a", 1), row("b", 1)])
    (tmp_path / "empty.json").write_text("[]")
    assert said in refused(capsys, *tiny, *flags, "--out", "s.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.json", "empty.json", "short.txt"]


LONG = "So long. " * 3000  # longer than the tiny model's context


@pytest.mark.parametrize("flags", [[], ["--all-steps"], ["--direct"]], ids=["plain", "all steps", "direct"])
def test_a_step_longer_than_the_context_has_a_null_reward(tmp_path, tiny, capsys, monkeypatch, flags):
    """It is counted and named, the others are judged as without it, and a resumed run takes it as it is."""
    monkeypatch.setattr(plumbing.rounds, "ROUND", 1)
    others = [row(f"r{i}", -1) for i in range(5)]
    middle = row("middle", 0)
    middle["steps"][1] = LONG
    rows = [*others[:2], row("long", 1) | {"problem": LONG}, middle, *others[2:]]
    out = tmp_path / "s.jsonl"
    ks = [1] if "--direct" in flags else [1, 2]
    flags = [*tiny, "--k", *ks, "--threshold", 0.01, *flags]
    score_py(*flags, "--input", write(tmp_path / "b.json", rows), "--out", out)
    printed = capsys.readouterr().out
    lines = {line["id"]: line for line in read(out)}
    assert list(lines) == [r["id"] for r in rows]
    assert (lines["long"]["rewards"], lines["long"]["samples"]) == ([None] * 3, [[]] * 3)
    assert lines["long"]["predictions"] == {str(k): -1 for k in ks}
    assert [value is None for value in lines["middle"]["rewards"]] == [False, True, True]
    assert ("not judged, as the prompt is longer than the model's context: b long step 1, b long step 2, b long step 3, "
            "b middle step 2, b middle step 3\n") in printed
    assert [r["null_rewards"] for r in summary(out)] == [5] * len(ks)

    score_py(*flags, "--input", write(tmp_path / "others.json", others), "--out", tmp_path / "others.jsonl")
    assert rewards_close(read(tmp_path / "others.jsonl")) == [lines[r["id"]] | {"source": "others"} for r in others]

    whole, table = out.read_bytes(), summary(out)
    out.rename(f"{out}.part")
    Path(f"{out}.part").write_bytes(whole[:-30])
    score_py(*flags, "--input", tmp_path / "b.json", "--out", out, "--resume")
    assert out.read_bytes() == whole and summary(out) == table
    assert "b long step 1, b long step 2" in capsys.readouterr().out


def test_solutions_that_are_all_longer_than_the_context(tmp_path, tiny, capsys):
    """There is a table without figures; a single solution says so too."""
    rows = [row(f"r{i}", i) | {"problem": LONG} for i in (-1, 0)]
    score_py(*tiny, "--input", write(tmp_path / "b.json", rows), "--k", 1, "--out", tmp_path / "s.jsonl")
    [table] = summary(tmp_path / "s.jsonl")
    assert (table["unparsed"], table["truncated"], table["null_rewards"], table["tokens_per_step"]) == (None, None, 6, 0)
    assert (table["error_accuracy"], table["correct_accuracy"]) == (0, 100)
    assert ", b r0 step 3\n" in capsys.readouterr().out
    score_py(*tiny, "--problem", LONG, "--step", "One.", "--k", 1)
    out = capsys.readouterr().out
    assert "Step 1: reward null " in out and "context: command line 0 step 1\n" in out


@pytest.mark.slow
def test_an_error_is_one_line_without_a_traceback(tmp_path):
    """As a user meets it: exit code 2, one line on stderr."""
    write(tmp_path / "b.json", [row("a", 9)])
    done = subprocess.run([sys.executable, str(ROOT / "score.py"), "--input", "b.json", "--model", "absent"], capture_output=True,
                          text=True,
                          cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 2 and done.stderr == "error: b.json: row 1: field 'label': 9 is out of range (-1 to 2); correct it\n"
