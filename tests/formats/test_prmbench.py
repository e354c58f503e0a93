"""PRMBench's protocol: its figures by hand, the traps in its data, and real rows where they are at hand."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from conftest import ROOT
from formats.prmbench import CLASSES, GROUPS, PRMBench, f1_score, kinds_of, prm_scores
from formats.readers import read_solutions

DATA = ROOT.parent / "shared/data/prmbench"


def row(classification: str | None, n_steps: int, error_steps: list[int], idx: str = "prm_test_p1_0") -> dict:
    """A row as PRMBench has it."""
    found = {
        "modified_question": "How many?",
        "modified_process": [f"{number}. A step." for number in range(1, n_steps + 1)],
        "error_steps": error_steps,
        "idx": idx,
    }
    return found if classification is None else found | {"classification": classification}


def read(path: Path, rows: list[dict]) -> list:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return [solution for _, solution in read_solutions(path)]


def line(classification: str, error_steps: list[int], p_yes: list[float | None]) -> dict:
    """A line of scores.jsonl at K = 1."""
    analysis = {"text": "", "verdict": True, "n_tokens": 5, "finished": True, "forced": False}
    label = min(error_steps) - 1 if error_steps else -1
    return {
        "source": "file",
        "steps": ["A step."] * len(p_yes),
        "label": label,
        "classification": classification,
        "error_steps": error_steps,
        "predictions": {"1": -1},
        "samples": [[analysis | {"p_yes": p}] for p in p_yes],
    }


def rows_of(lines: list[dict], thresholds: tuple[float, ...] = (0.5,)) -> list[dict]:
    table = PRMBench([1], thresholds)
    for one in lines:
        table.add(one)
    return table.rows()


# ---------------------------------------------------------------------------------------------- figures


def test_figures_by_hand():
    """6 right steps of which 4 are predicted so, 4 wrong ones of which 3 are.

    Right: precision 4/5, recall 4/6, F1 8/11. Wrong: precision 3/5, recall 3/4, F1 6/9.
    """
    found = prm_scores(tp=4, fp=1, tn=3, fn=2)
    assert found["f1"] == pytest.approx(100 * 8 / 11)
    assert found["negative_f1"] == pytest.approx(100 * 6 / 9)
    assert found["prm_score"] == pytest.approx(50 * (8 / 11 + 6 / 9))
    assert prm_scores(4, 1, 3, 2, "multi_solutions")["prm_score"] == pytest.approx(100 * 8 / 11)


@pytest.mark.parametrize(
    "hits, false_alarms, misses, f1",
    [
        (0, 0, 0, -100),  # precision and recall are undefined
        (0, 1, 1, -100),  # both are 0, so F1 is undefined
        (0, 2, 0, 0),  # recall is undefined, which counts as -1: 2 * 0 * -1 / -1
        (0, 0, 2, 0),  # precision is
        (2, 0, 0, 100),
    ],
)
def test_an_undefined_f1_is_minus_1(hits, false_alarms, misses, f1):
    assert str(float(f1_score(hits, false_alarms, misses))) == f"{f1}.0"  # and never -0.0


def test_a_step_is_predicted_right_at_the_threshold():
    rewards = [0.5, 0.49, None, 0.5, 0.2, None]
    right = [True, True, True, False, False, False]
    assert kinds_of(rewards, right, 0.5) == {"TP": 1, "FN": 1, "FP": 1, "TN": 1}


# ---------------------------------------------------------------------------------------------- the table


def test_classes_groups_and_overall_by_hand():
    """The overall figures are of the pooled steps, and not the mean of the classes; groups are means."""
    lines = [
        line("redundency", [2], [0.9, 0.1, 0.9, 0.9]),  # all as it should be: not inverted
        line("circular", [1, 2], [0.9, 0.9]),  # both wrong steps predicted right
        line("circular", [], [0.1]),  # and a right one wrong
        line("multi_solutions", [], [0.9, 0.1]),
    ]
    [found] = rows_of(lines)
    classes = found["classes"]
    assert classes["redundency"]["prm_score"] == 100
    # circular: TP 0, FP 2, TN 0, FN 1: precision and recall of both kinds are 0
    assert (
        classes["circular"]["f1"]
        == classes["circular"]["negative_f1"]
        == classes["circular"]["prm_score"]
        == -100
    )
    # multi_solutions: TP 1, FN 1: F1 2/3; TN 0, FN 1, FP 0: negative precision 0, recall undefined, negative F1 0
    assert classes["multi_solutions"]["prm_score"] == pytest.approx(200 / 3)
    assert classes["multi_solutions"]["negative_f1"] == 0
    assert found["groups"] == {"simplicity": 0, "soundness": None, "sensitivity": None}
    # pooled: TP 3 + 0 + 1, FP 0 + 2 + 0, TN 1 + 0 + 0, FN 0 + 1 + 1
    assert {name: found[name] for name in ("f1", "negative_f1", "prm_score")} == pytest.approx(
        {name: float(value) for name, value in prm_scores(4, 2, 1, 2).items()}
    )
    assert (found["solutions"], found["steps"]) == (4, 9)


def test_each_threshold_has_a_row():
    lines = [line(name, [2], [0.7, 0.55]) for name in CLASSES]
    at_half, at_61 = rows_of(lines, (0.61, 0.5))
    assert (at_half["threshold"], at_61["threshold"]) == (0.5, 0.61)
    assert at_half["prm_score"] == pytest.approx((100 * 2 / 3 + 0) / 2)  # all are predicted right
    assert at_61["prm_score"] == 100
    assert at_61["groups"] == {group: 100 for group in GROUPS}


def test_the_originals_are_not_in_the_overall_figures():
    lines = [line("circular", [2], [0.9, 0.1]), line("correct", [], [0.1, 0.1])]
    [found] = rows_of(lines)
    assert found["prm_score"] == 100 and found["solutions"] == 1 and found["steps"] == 2
    assert list(found["classes"]) == ["circular", "correct"] and found["classes"]["correct"]["solutions"] == 1
    assert found["brier"] == pytest.approx(0.01)


def test_a_null_reward_is_neither_right_nor_wrong():
    with_null = rows_of([line("circular", [2, 3], [0.9, 0.1, None])])[0]
    without = rows_of([line("circular", [2], [0.9, 0.1])])[0]
    assert with_null["prm_score"] == without["prm_score"] == 100
    assert (with_null["null_rewards"], with_null["steps"]) == (1, 3)


def test_tallies_of_ranks_are_added():
    rng = random.Random(0)
    lines = [line(rng.choice(CLASSES), [2], [rng.random() for _ in range(4)]) for _ in range(60)]
    one, two, whole = (PRMBench([1], (0.5, 0.61)) for _ in range(3))
    for i, own in enumerate(lines):
        (one if i % 2 else two).add(own)
        whole.add(own)
    one.update(two)
    for a, b in zip(one.rows(), whole.rows(), strict=True):
        for name in ("classes", "groups"):
            assert a.pop(name) == b.pop(name)
        assert a == pytest.approx(b)


def test_no_rows_no_table():
    assert PRMBench([1], (0.5,)).rows() == []


# ---------------------------------------------------------------------------------------------- the data


def test_a_row_says_which_steps_are_wrong(tmp_path):
    [found] = read(tmp_path / "a.jsonl", [row("circular", 4, [2, 4])])
    assert found.extra == {"classification": "circular", "error_steps": [2, 4]}
    assert found.label == 1 and found.id == "circular-prm_test_p1_0" and found.needs_all_steps


def test_error_steps_beyond_the_last_step_are_ignored(tmp_path):
    some, none = read(tmp_path / "a.jsonl", [row("confidence", 2, [2, 3]), row("confidence", 2, [3, 4])])
    assert some.extra["error_steps"] == [2] and none.extra["error_steps"] == []
    [found] = rows_of([line("confidence", none.extra["error_steps"], [0.9, 0.9])])
    assert found["f1"] == 100  # the official script counts its steps as right


def test_two_rows_of_one_idx_with_different_solutions_are_two(tmp_path):
    rows = [row("multi_solutions", n, [], "prm_test_p2_7") for n in (3, 5)]
    found = read(tmp_path / "a.jsonl", rows)
    assert [len(solution.steps) for solution in found] == [3, 5]
    table = rows_of([line("multi_solutions", [], [0.9] * len(solution.steps)) for solution in found])
    assert table[0]["classes"]["multi_solutions"]["solutions"] == 2 and table[0]["steps"] == 8


def test_a_row_without_a_class_is_an_ordinary_solution(tmp_path):
    [found] = read(tmp_path / "a.jsonl", [row(None, 4, [2, 4])])
    assert found.extra == {} and found.label == 1 and not found.needs_all_steps


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data/prmbench")
def test_real_rows():
    """Three classes of 90 rows each; nine of them name steps beyond the last one. A judge that says Yes to
    everything.
    """
    lines = []
    beyond = 0
    for path in sorted(DATA.glob("*.jsonl")):
        given = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
        for raw, (_, solution) in zip(given, read_solutions(path), strict=True):
            beyond += len(raw["error_steps"]) > len(solution.extra["error_steps"])
            lines.append(
                line(
                    solution.extra["classification"],
                    solution.extra["error_steps"],
                    [1.0] * len(solution.steps),
                )
            )
    assert Counter(one["classification"] for one in lines) == {
        "circular": 90,
        "confidence": 90,
        "step_contradiction": 90,
    }
    assert beyond == 9
    [found] = rows_of(lines)
    wrong = sum(len(one["error_steps"]) for one in lines)
    right = found["steps"] - wrong
    assert found["f1"] == pytest.approx(100 * 2 * right / (2 * right + wrong))
    assert found["negative_f1"] == 0  # TN 0, FN 0: precision is undefined, recall 0
