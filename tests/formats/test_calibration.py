"""Brier, AUROC, ECE and temperature: by hand, against brute force, and against scikit-learn where it is
installed.
"""

import numpy as np
import pytest

from formats.bootstrap import resamples
from formats.calibration import (
    FIGURES,
    LabelledRewards,
    auroc,
    brier,
    ece,
    fit_temperature,
    log_loss,
    reliability,
    scaled,
)

REWARDS = np.array([0.95, 0.92, 0.55, 0.25, 0.21])
RIGHT = np.array([True, False, True, False, True])


def drawn(seed: int, n: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """Rewards, some of them equal, and labels that go with them."""
    rng = np.random.default_rng(seed)
    rewards = np.round(rng.random(n), 2)
    return rewards, rng.random(n) < rewards**2


def test_figures_by_hand():
    """The bins are [0.2, 0.3) with 0.25 and 0.21, [0.5, 0.6) with 0.55, and [0.9, 1] with 0.95 and 0.92."""
    assert brier(REWARDS, RIGHT) == pytest.approx((0.05**2 + 0.92**2 + 0.45**2 + 0.25**2 + 0.79**2) / 5)
    assert ece(REWARDS, RIGHT) == pytest.approx(
        2 / 5 * abs(0.23 - 0.5) + 1 / 5 * abs(0.55 - 1) + 2 / 5 * abs(0.935 - 0.5)
    )
    assert auroc(REWARDS, RIGHT) == pytest.approx(3 / 6)  # of six pairs: .95 > both, .55 > .25
    assert log_loss(np.array([0.5, 0.25]), np.array([True, False])) == pytest.approx(
        -(np.log(0.5) + np.log(0.75)) / 2
    )
    rows = reliability(REWARDS, RIGHT)
    assert [(row["low"], row["high"], row["steps"], row["right"]) for row in rows] == [
        (0.2, 0.3, 2, 0.5),
        (0.5, 0.6, 1, 1.0),
        (0.9, 1.0, 2, 0.5),
    ]
    assert [row["reward"] for row in rows] == pytest.approx([0.23, 0.55, 0.935])


def test_a_bin_has_its_lower_end_and_the_last_one_both():
    rows = reliability(np.array([0.0, 0.1, 0.5, 1.0]), np.ones(4, dtype=bool))
    assert [row["low"] for row in rows] == [0.0, 0.1, 0.5, 0.9]


def test_auroc_counts_pairs():
    """Each pair of a right and a wrong step: 1 if the right one has more, half if they are equal."""
    rewards, right = drawn(0, 80)
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in rewards[right] for b in rewards[~right]]
    assert auroc(rewards, right) == pytest.approx(np.mean(pairs))
    assert np.isnan(auroc(rewards, np.ones(80, dtype=bool)))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.slow
def test_figures_are_those_of_scikit_learn(seed):
    metrics = pytest.importorskip("sklearn.metrics")
    calibration = pytest.importorskip("sklearn.calibration")
    rewards, right = drawn(seed)
    assert auroc(rewards, right) == pytest.approx(metrics.roc_auc_score(right, rewards))
    assert brier(rewards, right) == pytest.approx(metrics.brier_score_loss(right, rewards))
    inside = np.clip(rewards, 0.01, 0.99)
    assert log_loss(inside, right) == pytest.approx(metrics.log_loss(right, inside))
    between = rewards + 1e-4  # theirs has the ends of the bins on the other side
    share, mean = calibration.calibration_curve(right, np.minimum(between, 1), n_bins=10)
    rows = reliability(np.minimum(between, 1), right)
    assert [row["right"] for row in rows] == pytest.approx(share.tolist())
    assert [row["reward"] for row in rows] == pytest.approx(mean.tolist())


# ---------------------------------------------------------------------------------------------- temperature


def test_scaling_keeps_the_order_and_one_half():
    rewards = np.array([0.0, 0.2, 0.5, 0.8, 1.0])
    for temperature in (0.3, 1.0, 4.0):
        after = scaled(rewards, temperature)
        assert (np.diff(after) > 0).all() and after[2] == pytest.approx(0.5)
        assert ((after >= 0) & (after <= 1)).all()
    assert scaled(rewards[1:4], 1.0) == pytest.approx(rewards[1:4])
    assert scaled(np.array([0.8]), 2.0) == pytest.approx([2 / 3])  # logit log 4, half of it log 2


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_of_generated_rewards_is_found(temperature):
    """Steps that are right as often as the scaled rewards say: the fit gives the temperature back, and the
    ECE falls.
    """
    rng = np.random.default_rng(0)
    rewards = rng.beta(0.7, 0.7, 100_000)
    right = rng.random(len(rewards)) < scaled(rewards, temperature)
    found = fit_temperature(rewards, right)
    assert found == pytest.approx(temperature, rel=0.03)
    assert ece(scaled(rewards, found), right) < 0.01
    if temperature != 1:
        assert ece(rewards, right) > 0.05


def test_the_temperature_has_the_least_log_loss():
    rewards, right = drawn(1)
    found = fit_temperature(rewards, right)
    best = log_loss(scaled(rewards, found), right)
    for temperature in np.geomspace(0.05, 20, 200):
        assert log_loss(scaled(rewards, temperature), right) >= best - 1e-9
    assert fit_temperature(np.array([0.9, 0.8]), np.array([True, True])) == pytest.approx(
        0.01, rel=1e-3
    )  # as sure as may be


# ---------------------------------------------------------------------------------------------- collecting


def test_labelled_rewards_are_collected():
    collected = LabelledRewards()
    collected.add([0.9, None, 0.2, 0.7], [True, True, False])  # what follows the wrong step has no label
    collected.add([0.4], [])
    rewards, right = collected.arrays()
    assert rewards.tolist() == [0.9, 0.2] and right.tolist() == [True, False]
    found = collected.figures()
    assert (found["ece"], found["brier"], found["auroc"]) == (pytest.approx(0.15), pytest.approx(0.025), 1.0)
    assert found["brier_low"] == pytest.approx(0.025)  # whichever solutions are drawn, the first is all they have
    assert collected.sizes.tolist() == [2, 0]
    other = LabelledRewards()
    other.add([0.1], [True, True])
    assert other.unjudged == 1 and other.figures()["brier"] is None
    collected.update(other)
    assert collected.unjudged == 1 and len(collected.rewards) == 3
    assert set(LabelledRewards().figures().values()) == {None}


def some_solutions(seed: int, n: int = 40) -> list[tuple[list[float], list[bool]]]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        n_steps = int(rng.integers(0, 6))
        right = rng.random(n_steps) < 0.7
        rewards = np.round(np.clip(rng.normal(0.4 + 0.3 * right, 0.2), 0, 1), 2)
        found.append((rewards.tolist(), right.tolist()))
    return found


def collect(solutions: list[tuple[list[float], list[bool]]]) -> LabelledRewards:
    collected = LabelledRewards()
    for rewards, right in solutions:
        collected.add(rewards, right)
    return collected


def test_a_draw_has_the_figures_of_the_solutions_that_it_repeats():
    """Solutions of distinct sizes, so that the order in which they are drawn is known."""
    solutions = [([0.9, 0.2], [True, False]), ([0.7], [True]), ([0.3, 0.6, 0.1], [True, True, False])]
    found = collect(solutions).draws()
    by_size = sorted(solutions, key=lambda solution: len(solution[0]))
    for number, drawn_times in zip(range(50), resamples(3), strict=False):
        drawn_ones = [one for one, times in zip(by_size, drawn_times, strict=True) for _ in range(times)]
        rewards, right = collect(drawn_ones).arrays()
        assert found["ece"][number] == pytest.approx(ece(rewards, right))
        assert found["brier"][number] == pytest.approx(brier(rewards, right))
        assert found["auroc"][number] == pytest.approx(auroc(rewards, right), nan_ok=True)


def test_intervals_hold_the_figures_and_narrow_with_more_solutions():
    few, many = (collect(some_solutions(0, n)).figures() for n in (40, 4000))
    for name in FIGURES:
        assert few[f"{name}_low"] < few[name] + 0.02 and few[name] - 0.02 < few[f"{name}_high"]
        assert many[f"{name}_high"] - many[f"{name}_low"] < 0.3 * (few[f"{name}_high"] - few[f"{name}_low"])


def test_intervals_do_not_depend_on_which_rank_had_which_solution():
    solutions = some_solutions(1)
    others = collect(solutions[1::2])
    split = collect(solutions[::2])
    split.update(others)
    whole = collect(solutions).figures()
    assert split.figures() == {name: pytest.approx(value) for name, value in whole.items()}
