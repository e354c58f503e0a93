"""Thresholds: the sweep against its definition, the choice, what it gives elsewhere, and what a file must
have for it.
"""

import json
import random
from pathlib import Path

import numpy as np
import pytest

import score
from formats import threshold_study
from formats.prmbench import PRMBench
from formats.processbench import accuracies, first_below
from formats.scores import read_scores
from formats.threshold_sweep import (
    GRID,
    F1Sweep,
    PRMScoreSweep,
    at,
    best_thresholds,
    choose,
    difference,
    sweeps_of,
)
from plumbing.cli import run
from plumbing.errors import BadInput


def line(
    rewards: list[float | None], label: int | None, n_steps: int | None = None, source: str = "a", **extra
) -> dict:
    """A line of scores.jsonl with one analysis of each judged step."""
    samples = [
        [{"text": "", "verdict": None, "p_yes": p, "n_tokens": 1, "finished": True, "forced": False}]
        for p in rewards
    ]
    return {
        "source": source,
        "id": "x",
        "problem": "P",
        "steps": ["A step."] * (n_steps or len(rewards)),
        "label": label,
        **extra,
        "rewards": rewards,
        "prediction": -1,
        "predictions": {"1": -1},
        "samples": samples,
    }


def write(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    return path


def sweep_of(tmp_path: Path, lines: list[dict]):
    [sweep] = sweeps_of(read_scores([write(tmp_path / "scores.jsonl", lines)]))
    return sweep


def values(sweep, thresholds) -> dict[str, list[float]]:
    found = sweep.figures(np.asarray(thresholds, dtype=float), np.ones((1, len(sweep.scores))))
    return {name: array[0].tolist() for name, array in found.items()}


def threshold_py(*argv) -> None:
    run((score.ThresholdConfig, score.threshold), argv=[str(a) for a in argv])


def refused(capsys, *argv) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        threshold_py(*argv)
    assert error.value.code == 2
    return capsys.readouterr().err.strip()


def random_lines(seed: int, n: int = 60, sources: str = "ab") -> list[dict]:
    rng = random.Random(seed)
    lines = []
    for i in range(n):
        n_steps = rng.randrange(1, 6)
        rewards = [rng.choice([None, *(round(rng.random(), 2) for _ in range(6))]) for _ in range(n_steps)]
        label = rng.randrange(-1, n_steps) if i > 3 else [-1, 0, -1, 0][i]  # of both kinds in each source
        lines.append(line(rewards, label, source=sources[i // 2 % len(sources)]))
    return lines


# ---------------------------------------------------------------------------------------------- the sweep


@pytest.mark.parametrize("seed", range(5))
def test_the_sweep_is_that_of_its_definition(tmp_path, seed):
    """At each threshold, the mean over the sources of the accuracies of the first steps below it."""
    lines = random_lines(seed)
    found = values(sweep_of(tmp_path, lines), GRID)
    for column, threshold in enumerate(GRID):
        of_sources = []
        for source in "ab":
            own = [one for one in lines if one["source"] == source]
            wrong = [one for one in own if one["label"] >= 0]
            correct = [one for one in own if one["label"] == -1]
            hits = [
                [first_below(one["rewards"], threshold) == one["label"] for one in kind]
                for kind in (wrong, correct)
            ]
            of_sources.append(accuracies(sum(hits[0]), len(wrong), sum(hits[1]), len(correct)))
        for name in of_sources[0]:
            assert found[name][column] == pytest.approx(np.mean([one[name] for one in of_sources]))


@pytest.mark.parametrize("seed", range(3))
def test_weights_are_repeated_solutions(tmp_path, seed):
    lines = random_lines(seed, 12, "a")
    repeats = [random.Random(seed).choice([1, 2, 3]) for _ in lines]
    weighted = sweep_of(tmp_path, lines).figures(GRID, np.array([repeats], dtype=float))
    repeated = values(sweep_of(tmp_path, [one for one, n in zip(lines, repeats) for _ in range(n)]), GRID)
    for name, array in weighted.items():
        assert array[0].tolist() == pytest.approx(repeated[name])


@pytest.mark.parametrize("seed", range(3))
def test_prmbenchs_sweep_is_its_table(tmp_path, seed):
    """With weights, too: those of repeated rows."""
    rng = random.Random(seed)
    lines = []
    for _ in range(30):
        rewards = [
            rng.choice([None, *(round(rng.random(), 2) for _ in range(6))])
            for _ in range(rng.randrange(1, 6))
        ]
        error_steps = [number for number in range(1, len(rewards) + 1) if rng.random() < 0.4]
        lines.append(
            line(rewards, None, classification=rng.choice(["circular", "deception"]), error_steps=error_steps)
        )
    lines.append(line([0.1], -1, classification="correct", error_steps=[]))
    thresholds = (0.0, 0.3, 0.5, 0.61, 1.0)
    sweep = sweep_of(tmp_path, lines)
    assert isinstance(sweep, PRMScoreSweep)
    repeats = [rng.choice([1, 2]) for _ in sweep.scores]
    drawn = sweep.figures(np.array(thresholds), np.array([[1] * 30, repeats], dtype=float))
    for number, own in enumerate((lines, [one for one, n in zip(lines, repeats) for _ in range(n)])):
        table = PRMBench([1], thresholds)
        for one in own:
            table.add(one)
        for column, row in enumerate(table.rows()):
            for name, array in drawn.items():
                assert array[number, column] == pytest.approx(row[name])


def test_both_benchmarks_in_one_file(tmp_path):
    lines = [line([0.9], -1), line([0.1], 0), line([0.9, 0.1], 1, classification="circular", error_steps=[2])]
    found = sweeps_of(read_scores([write(tmp_path / "s.jsonl", lines)]))
    assert [type(sweep) for sweep in found] == [F1Sweep, PRMScoreSweep] and [
        len(sweep.scores) for sweep in found
    ] == [2, 1]


# ---------------------------------------------------------------------------------------------- the choice


def test_the_best_threshold_is_known(tmp_path):
    """Wrong steps have 0.35, right ones 0.45 or more: all thresholds above 0.35 and up to 0.45 are perfect,
    the nearest to 0.5 is taken.
    """
    lines = [line([0.45, 0.9], -1), line([0.9, 0.35], 1), line([0.6, 0.45], -1), line([0.35], 0)]
    sweep = sweep_of(tmp_path, lines)
    found = choose(sweep)
    assert found["threshold"] == 0.45
    assert 0 <= found["threshold_low"] <= 0.45 <= found["threshold_high"] <= 1
    perfect, usual = at(sweep, [0.45, 0.5])
    assert (perfect["f1"], perfect["f1_low"], perfect["f1_high"]) == (100, 100, 100)
    assert (usual["correct_accuracy"], usual["error_accuracy"], usual["f1"]) == (0, 100, 0)
    assert difference(sweep, 0.45) == {"difference": 100, "difference_low": 100, "difference_high": 100}


def test_of_equals_the_nearest_to_one_half():
    flat = np.zeros((1, 101))
    assert best_thresholds(flat).tolist() == [0.5]
    flat[0, [20, 70]] = 1
    assert best_thresholds(flat).tolist() == [0.7]
    assert best_thresholds(np.full((1, 101), np.nan)).tolist() == [0.5]


def test_the_difference_is_of_the_same_solutions(tmp_path):
    """Its interval is far narrower than that of two independent figures."""
    lines = [line([0.9 if i % 3 else 0.1], -1) for i in range(60)] + [
        line([0.1 if i % 3 else 0.9], 0) for i in range(60)
    ]
    lines += [line([0.55], 0)] * 2
    sweep = sweep_of(tmp_path, lines)
    found = difference(sweep, 0.6)
    low, high = (at(sweep, [0.6])[0][f"f1_{end}"] for end in ("low", "high"))
    assert 0 < found["difference"] and found["difference_high"] - found["difference_low"] < (high - low) / 3


# ---------------------------------------------------------------------------------------- what was not judged


def test_a_solution_that_was_left_early(tmp_path):
    """It was left at 0.3. At thresholds above that its prediction is known, below it is not."""
    lines = [line([0.9, 0.3], -1, n_steps=4), line([0.9], -1), line([0.2], 0)]
    sweep = sweep_of(tmp_path, lines)
    assert values(sweep, [0.31, 0.5])["correct_accuracy"] == [50, 50]
    with pytest.raises(
        BadInput, match=r"scores.jsonl:1: of 4 steps only the first 2 were judged.*--all-steps"
    ):
        values(sweep, [0.3, 0.5])


def test_steps_after_the_first_wrong_one_are_not_needed(tmp_path):
    assert values(sweep_of(tmp_path, [line([0.9, 0.3], 1, n_steps=4), line([0.9], -1)]), [0.0, 0.31])[
        "f1"
    ] == [0, 100]


# ---------------------------------------------------------------------------------------------- the command


@pytest.fixture()
def files(tmp_path) -> tuple[Path, Path]:
    return (
        write(tmp_path / "validation.jsonl", random_lines(1, 80)),
        write(tmp_path / "test.jsonl", random_lines(2, 80)),
    )


def test_the_command_prints_and_writes_what_it_finds(tmp_path, files, capsys):
    chosen_on, applied_to = files
    out = tmp_path / "threshold.json"
    threshold_py("--scores", chosen_on, "--apply", applied_to, "--calibrate", "--out", out, "--no-plots")
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    [choice] = found["choices"]
    best = choice["threshold"]["threshold"]
    assert f"best threshold by F1: {best:.2f} (95%: " in printed and "flatter" not in printed
    assert len(choice["sweep"]) == 101 and choice["main"] == "f1"
    own, other = choice["rows"]
    [sweep] = sweeps_of(read_scores([applied_to]))
    assert [other["chosen"], other["usual"]] == pytest.approx(values(sweep, [best, 0.5])["f1"])
    assert own["chosen"] == max(row["f1"] for row in choice["sweep"])
    before, after, *_ = found["calibration"]["rows"]
    assert found["calibration"]["temperature"] > 1  # random rewards say nothing
    assert after["log_loss"] < before["log_loss"] and after["auroc"] == pytest.approx(before["auroc"])
    assert [row["scores"] for row in found["calibration"]["rows"]] == [
        "--scores",
        "--scores",
        "--apply",
        "--apply",
    ]


def test_choosing_on_what_is_reported_is_said(files, capsys):
    chosen_on, applied_to = files
    for flags in ([], ["--apply", chosen_on], ["--apply", applied_to, chosen_on]):
        threshold_py("--scores", chosen_on, *flags)
        assert "chosen by the solutions for which it is reported" in capsys.readouterr().out


def test_k_takes_the_first_analyses(tmp_path, capsys):
    lines = [line([0.9], -1), line([0.1], 0)]
    for one, more in zip(lines, (0.1, 0.9)):
        one["samples"][0].append(one["samples"][0][0] | {"p_yes": more})
        one["rewards"] = [0.5]
    path = write(tmp_path / "s.jsonl", lines)
    for k, f1 in ((1, 100), (2, 0)):
        threshold_py("--scores", path, "--k", k, "--out", tmp_path / "t.json", "--no-plots", "--overwrite")
        assert json.loads((tmp_path / "t.json").read_text())["choices"][0]["rows"][0]["usual"] == f1
    assert "has 2 analyses of a step, fewer than --k 3" in refused(capsys, "--scores", path, "--k", 3)


@pytest.mark.slow
def test_the_plots_are_drawn(tmp_path, files):
    pytest.importorskip("matplotlib")
    threshold_py("--scores", files[0], "--out", tmp_path / "t.json")
    for name in ("t.ProcessBench.png", "t.reliability.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_one_line_says_so(tmp_path, files, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    said = refused(capsys, "--scores", files[0], "--out", tmp_path / "t.json")
    assert (
        said == "error: matplotlib is not installed: pip install matplotlib for the plots, or give --no-plots"
    )
    assert not (tmp_path / "t.json").exists()
    threshold_py("--scores", files[0], "--out", tmp_path / "t.json", "--no-plots")


@pytest.mark.parametrize(
    "lines, flags, said",
    [
        ([], [], "has no scores"),
        ([line([0.9], None)], [], "no threshold can be chosen"),
        ([line([0.9], -1)], [], "no solution of this source is with a wrong step"),
        ([line([0.9], 0)], [], "no solution of this source is without a wrong step"),
        (
            [line([0.9], -1), line([0.2], 0), line([0.2], -1, n_steps=2)],
            [],
            "s.jsonl:3: of 2 steps only the first 1 were judged",
        ),
        (
            [line([0.9], -1), line([0.9, 0.2], 1, n_steps=2, classification="circular", error_steps=[2])],
            ["--scores", "p.jsonl", "--apply", "s.jsonl"],
            "no labelled solution of ProcessBench",
        ),
        ([line([0.9], -1) | {"rewards": [0.8]}], [], "field 'rewards'"),
        (
            [line([0.9, 0.2], 1, n_steps=3, classification="circular", error_steps=[2])],
            [],
            "of 3 steps only the first 2",
        ),
    ],
)
def test_files_that_will_not_do(tmp_path, capsys, monkeypatch, lines, flags, said):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "s.jsonl", lines[-1:] if flags else lines)
    write(tmp_path / "p.jsonl", [line([0.9], -1), line([0.1], 0)])
    assert said in refused(capsys, *(flags or ["--scores", "s.jsonl"]))


def test_an_existing_output_is_kept(tmp_path, files, capsys):
    (tmp_path / "t.json").write_text("mine")
    assert "exists already" in refused(capsys, "--scores", files[0], "--out", tmp_path / "t.json")
    assert (tmp_path / "t.json").read_text() == "mine"


def test_calibration_without_all_steps_is_a_dash_or_an_error(tmp_path, capsys):
    """At thresholds above where a solution was left, its prediction is known; the calibration is not."""
    whole = write(tmp_path / "whole.jsonl", [line([0.9, 0.8], -1), line([0.55, 0.3], 1), line([0.7], -1)])
    cut = write(tmp_path / "cut.jsonl", [line([0.9, 0.2], -1, n_steps=4), line([0.3], 0), line([0.9], -1)])
    found = threshold_study.study(read_scores([whole]), read_scores([cut]), calibrate=False)
    assert [row["brier"] is None for row in found.calibration.rows] == [False, True]
    assert list(found.calibration.curves) == ["--scores"]
    assert "cut.jsonl:1: of 4 steps" in refused(capsys, "--scores", whole, "--apply", cut, "--calibrate")
