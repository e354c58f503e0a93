"""ProcessBench's figures by hand, their intervals against a plain bootstrap, and the rows of its table."""

import numpy as np
import pytest

from formats.bootstrap import interval, resamples, weights_of
from formats.processbench import ProcessBench, accuracies, accuracy_draws, first_below, with_intervals


def analysis(p_yes: float | None, verdict: bool | None = True, n_tokens: int = 10) -> dict:
    return {
        "text": "",
        "verdict": verdict,
        "p_yes": p_yes,
        "n_tokens": n_tokens,
        "finished": True,
        "forced": False,
    }


def line(source: str, label: int | None, p_yes: list[float | None], n_steps: int | None = None) -> dict:
    """A line of scores.jsonl at K = 1 and the threshold 0.5."""
    return {
        "source": source,
        "steps": ["A step."] * (n_steps or len(p_yes)),
        "label": label,
        "predictions": {"1": first_below(p_yes, 0.5)},
        "samples": [[analysis(p)] for p in p_yes],
    }


def table_of(lines: list[dict], sources: list[str]) -> list[dict]:
    table = ProcessBench([1])
    for one in lines:
        table.add(one)
    return table.rows(sources)


# ---------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize(
    "rewards, threshold, prediction",
    [
        ([0.9, 0.4, 0.1], 0.5, 1),
        ([0.9, 0.5], 0.5, -1),
        ([0.9, 0.5], 0.51, 1),
        ([], 0.5, -1),
        ([0.0], 0.0, -1),
        ([None, 0.4], 0.5, 1),
        ([None, None], 1.0, -1),
        ([float("nan"), 0.4], 0.5, 1),
    ],
)
def test_the_prediction_is_the_first_step_below_the_threshold(rewards, threshold, prediction):
    assert first_below(rewards, threshold) == prediction


@pytest.mark.parametrize(
    "found, wrong, kept, correct, error, right, f1",
    [
        (1, 3, 1, 2, 100 / 3, 50, 40),
        (3, 4, 1, 4, 75, 25, 37.5),
        (0, 2, 2, 2, 0, 100, 0),
        (0, 1, 0, 1, 0, 0, 0),
        (1, 2, 0, 0, 50, np.nan, np.nan),
        (0, 0, 1, 1, np.nan, 100, np.nan),
        (0, 0, 0, 0, np.nan, np.nan, np.nan),
    ],
)
def test_accuracies_by_hand(found, wrong, kept, correct, error, right, f1):
    """Of numbers, and of arrays of them."""
    expected = {"error_accuracy": error, "correct_accuracy": right, "f1": f1}
    assert accuracies(found, wrong, kept, correct) == pytest.approx(expected, nan_ok=True)
    of_arrays = accuracies(*(np.array([n, n]) for n in (found, wrong, kept, correct)))
    for name, values in of_arrays.items():
        assert values.tolist() == pytest.approx([expected[name]] * 2, nan_ok=True)


# ---------------------------------------------------------------------------------------------- intervals


def test_a_resample_has_as_many_solutions_as_there_are():
    drawn = np.stack(list(resamples(7, 2000)))
    assert drawn.shape == (2000, 7) and (drawn.sum(axis=1) == 7).all()
    assert drawn.mean(axis=0) == pytest.approx(np.ones(7), abs=0.1)  # each is drawn once on average
    assert drawn.var(axis=0) == pytest.approx(np.full(7, 6 / 7), abs=0.15)  # a binomial of 7 and 1/7
    assert np.array_equal(drawn, np.stack(list(resamples(7, 2000))))


def test_files_are_drawn_apart():
    """Neither the number of a file's solutions varies, nor do two files of one size draw alike."""
    groups = [
        np.array([True, True, True, False, False, False]),
        np.array([False, False, False, True, True, True]),
    ]
    weights = weights_of(groups)
    assert (weights[:, :3].sum(axis=1) == 3).all() and (weights[:, 3:].sum(axis=1) == 3).all()
    assert abs(np.corrcoef(weights[:, 0], weights[:, 3])[0, 1]) < 0.15


def test_the_middle_95_percent():
    assert interval(np.arange(1001)) == (25, 975)
    assert interval([np.nan, 3.0, np.nan]) == (3, 3)
    assert np.isnan(interval([np.nan])).all()


def test_intervals_are_those_of_resampled_solutions():
    """The multinomial gives what drawing solutions one by one gives."""
    found, wrong, kept, correct = 60, 90, 30, 70
    is_wrong = np.arange(160) < wrong
    is_hit = np.concatenate([np.arange(wrong) < found, np.arange(correct) < kept])
    drawn = []
    for weights in resamples(160, 4000):
        numbers = [
            (weights * which).sum() for which in (is_hit & is_wrong, is_wrong, is_hit & ~is_wrong, ~is_wrong)
        ]
        drawn.append(accuracies(*numbers))
    for name, values in accuracy_draws(found, wrong, kept, correct).items():
        plain = np.array([draw[name] for draw in drawn])
        assert values.mean() == pytest.approx(plain.mean(), abs=0.6)
        assert interval(values) == pytest.approx(interval(plain), abs=1.5)


def test_an_undefined_figure_has_no_interval():
    found = with_intervals(accuracies(1, 2, 0, 0), accuracy_draws(1, 2, 0, 0))
    assert (
        found["error_accuracy"] == 50
        and found["error_accuracy_low"] == 0
        and found["error_accuracy_high"] == 100
    )
    assert [found[f"f1{end}"] for end in ("", "_low", "_high")] == [None] * 3
    assert with_intervals(accuracies(0, 0, 0, 0), accuracy_draws(0, 0, 0, 0))["f1"] is None


# ---------------------------------------------------------------------------------------------- the table


def test_a_table_by_hand():
    """Rewards of the steps up to the first wrong one: right 0.9 0.8 0.6 0.4, wrong 0.2 0.7."""
    lines = [
        line("a", -1, [0.9, 0.8]),
        line("a", 0, [0.2, 0.9]),
        line("b", 1, [0.6, 0.7]),
        line("b", -1, [0.4]),
    ]
    a, b, average = table_of(lines, ["a", "b"])
    assert (a["error_accuracy"], a["correct_accuracy"], a["f1"]) == (100, 100, 100)
    assert (b["error_accuracy"], b["correct_accuracy"], b["f1"]) == (0, 0, 0)
    assert (average["source"], average["f1"], average["solutions"]) == ("average", 50, 4)
    assert a["auroc"] == 1 and b["auroc"] == 0
    assert a["brier"] == pytest.approx((0.1**2 + 0.2**2 + 0.2**2) / 3)
    assert b["ece"] == pytest.approx((0.4 + 0.7 + 0.6) / 3)
    assert average["brier"] == pytest.approx((a["brier"] + b["brier"]) / 2)


def test_the_averages_interval_is_narrower_than_a_files():
    """It is over two files that are drawn apart: with one seed for both, it would be as wide."""
    lines = [
        line(source, label, [0.9 if i % 2 else 0.1])
        for source in "ab"
        for label in (-1, 0)
        for i in range(40)
    ]
    a, b, average = table_of(lines, ["a", "b"])
    width = a["f1_high"] - a["f1_low"]
    assert width == pytest.approx(b["f1_high"] - b["f1_low"], rel=0.2)
    assert average["f1_high"] - average["f1_low"] == pytest.approx(width / 2**0.5, rel=0.15)


def test_calibration_needs_all_labelled_steps():
    """One that was left at its first step predicted wrong has judged steps of a certain kind only."""
    whole = [
        line("a", -1, [0.9, 0.8]),
        line("a", 0, [0.2], n_steps=3),
    ]  # what follows the wrong step has no label
    assert table_of(whole, ["a"])[0]["brier"] is not None
    for cut in (line("a", -1, [0.2], n_steps=2), line("a", 2, [0.2], n_steps=3)):
        [row] = table_of([*whole, cut], ["a"])
        assert row["ece"] is row["brier"] is row["auroc"] is None and row["f1"] is not None
    assert table_of([*whole, line("a", None, [0.2], n_steps=2)], ["a"])[0]["brier"] is not None


def test_tallies_of_ranks_are_added():
    lines = [line("a", label, [0.9, p]) for label in (-1, 0, 1, None) for p in (0.3, 0.7, None)]
    one, two, whole = ProcessBench([1]), ProcessBench([1]), ProcessBench([1])
    for i, own in enumerate(lines):
        (one if i % 2 else two).add(own)
        whole.add(own)
    one.update(two)
    assert one.rows(["a"])[0] == pytest.approx(whole.rows(["a"])[0])
