"""Best-of-N: scores, picks and the table, by hand, in closed form, and against going through all choices."""

import json
import math
import random
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

import score
from formats import best_of_n
from formats.answers import answer_classes
from formats.best_of_n import (
    AGGREGATES,
    Problem,
    Race,
    accuracies,
    accuracy_of_best,
    accuracy_of_oracle,
    accuracy_of_vote,
    aggregate,
    choices,
    group,
    picks,
    sizes,
    table,
    weight,
)
from formats.rows import Solution
from formats.scores import read_scores
from plumbing.cli import run
from rprm import Analysis

NAN = float("nan")


def line(rewards: list[float | None], problem: str = "P", n_steps: int | None = None, **fields) -> dict:
    """A line of scores.jsonl with one analysis of each judged step."""
    samples = [
        [{"text": "", "verdict": None, "p_yes": p, "n_tokens": 1, "finished": True, "forced": False}]
        for p in rewards
    ]
    steps = [f"Step {i}." for i in range(n_steps or len(rewards))]
    if "text" in fields:
        steps[-1] = fields.pop("text")
    return (
        {"source": "s", "id": problem, "problem": problem, "steps": steps, "label": None}
        | fields
        | {"rewards": rewards, "prediction": -1, "predictions": {"1": -1}, "samples": samples}
    )


def write(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    return path


def problems_of(tmp_path: Path, lines: list[dict], by: str = "problem") -> list[Problem]:
    return group(read_scores([write(tmp_path / "scores.jsonl", lines)]), by)


def best_py(*argv) -> None:
    run((score.BestConfig, score.best), argv=[str(a) for a in argv])


def refused(capsys, *argv) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        best_py(*argv)
    assert error.value.code == 2
    return capsys.readouterr().err.strip()


# --------------------------------------------------------------------------------------- scores of candidates


@pytest.mark.parametrize(
    "rewards, expected",
    [
        ([0.5, 0.8, 0.9], {"min": 0.5, "mean": 2.2 / 3, "last": 0.9, "product": 0.36}),
        ([0.5, NAN, 0.9], {"min": 0.5, "mean": 0.7, "last": 0.9, "product": 0.45}),
        ([0.5, 0.9, NAN], {"min": 0.5, "mean": 0.7, "last": -math.inf, "product": 0.45}),
        ([NAN, NAN], {how: -math.inf for how in AGGREGATES}),
    ],
)
def test_the_aggregates_by_hand(rewards, expected):
    for how, value in expected.items():
        found = aggregate(np.array(rewards), how)
        assert weight(found, how) == pytest.approx(max(0, value))
        assert found == pytest.approx(math.log(value) if how == "product" and value > 0 else value)


def test_a_product_of_many_small_rewards_keeps_its_order():
    """As a product, both would be 0."""
    low, high = np.full(1000, 0.01), np.full(1000, 0.02)
    assert np.prod(low) == np.prod(high) == 0
    assert aggregate(low, "product") < aggregate(high, "product")
    assert aggregate(np.array([0.0, 0.9]), "product") < aggregate(
        np.full(50, 0.01), "product"
    )  # one certain error is the worst


# -------------------------------------------------------------------------------------------- accuracy over N


def pick(scores: list[float], chosen: tuple[int, ...]) -> int:
    """The highest score, of equals the first."""
    return max(chosen, key=lambda i: (scores[i], -i))


def voted(classes: list, weights: list[float], chosen: tuple[int, ...]) -> int | None:
    """The first candidate with the answer of most weight; of equals the one that comes first."""
    votes: dict[int, float] = {}
    for i in chosen:
        if classes[i] is not None:
            votes[classes[i]] = votes.get(classes[i], 0) + weights[i]
    if not votes:
        return None
    best = max(votes.values())
    return next(i for i in chosen if classes[i] is not None and votes[classes[i]] == best)


@pytest.mark.parametrize("seed", range(12))
def test_accuracies_are_those_of_all_choices(seed):
    """With equal scores, missing answers, and every N."""
    rng = random.Random(seed)
    M = rng.randrange(1, 8)
    scores = [rng.choice([-math.inf, 0.25, 0.5, 0.75]) for _ in range(M)]
    classes = answer_classes([rng.choice([None, "a", "b", "c"]) for _ in range(M)])
    weights = [rng.choice([0.0, 0.25, 0.5]) for _ in range(M)]
    right = {None: 0.0} | {name: float(rng.random() < 0.5) for name in range(3)}
    correct = [right[name] for name in classes]
    for n in range(1, M + 1):
        chosen = list(combinations(range(M), n))
        order = np.argsort(-np.array(scores), kind="stable")
        assert accuracy_of_best(order, np.array(correct), n) == pytest.approx(
            np.mean([correct[pick(scores, one)] for one in chosen])
        )
        assert accuracy_of_oracle(np.array(correct), n) == pytest.approx(
            np.mean([max(correct[i] for i in one) for one in chosen])
        )
        for own in ([1.0] * M, weights):
            winners = [voted(classes, own, one) for one in chosen]
            expected = np.mean([0.0 if i is None else correct[i] for i in winners])
            assert accuracy_of_vote(
                classes, np.array(own), np.array(correct), np.array(chosen)
            ) == pytest.approx(expected)


def test_closed_forms():
    """10 candidates of which 4 are right, and a judge that gives these the highest scores, or the lowest."""
    correct = np.array([1.0] * 4 + [0.0] * 6)
    up, down = np.arange(10), np.arange(10)[::-1]
    for n in range(1, 11):
        oracle = 1 - math.comb(6, n) / math.comb(10, n)
        assert accuracy_of_oracle(correct, n) == pytest.approx(oracle)
        assert accuracy_of_best(up, correct, n) == pytest.approx(
            oracle
        )  # it finds a right one whenever there is one
        assert accuracy_of_best(down, correct, n) == pytest.approx(
            math.comb(4, n) / math.comb(10, n)
        )  # only if all are right
    assert accuracy_of_best(up, correct, 1) == accuracy_of_best(down, correct, 1) == pytest.approx(0.4)


def test_a_vote_of_three_in_closed_form():
    """Of 40 candidates 24 have the right answer and 16 one wrong one: two or three of three must be right."""
    correct = np.array([1.0] * 24 + [0.0] * 16)
    classes = [0] * 24 + [1] * 16
    expected = (math.comb(24, 3) + math.comb(24, 2) * 16) / math.comb(40, 3)
    chosen = choices(40, 3, np.random.default_rng(0))
    assert chosen.shape == (best_of_n.SUBSETS, 3)  # there are 9880: so many are drawn
    assert accuracy_of_vote(classes, np.ones(40), correct, chosen) == pytest.approx(expected, abs=0.04)
    everything = np.array(list(combinations(range(40), 3)))
    assert accuracy_of_vote(classes, np.ones(40), correct, everything) == pytest.approx(expected)


def test_drawn_choices_are_sorted_different_and_even():
    chosen = choices(30, 4, np.random.default_rng(0))
    assert (np.diff(chosen, axis=1) > 0).all()
    assert np.bincount(chosen.ravel(), minlength=30) / len(chosen) == pytest.approx(
        np.full(30, 4 / 30), abs=0.05
    )
    assert choices(4, 2, np.random.default_rng(0)).tolist() == [
        [0, 1],
        [0, 2],
        [0, 3],
        [1, 2],
        [1, 3],
        [2, 3],
    ]


def test_n_is_one_two_four_and_all(tmp_path):
    for n, expected in ((1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])):
        assert sizes(problems_of(tmp_path, [line([0.5])] * n)) == expected


# ---------------------------------------------------------------------------------------------- problems


def test_candidates_share_a_problem_or_an_id(tmp_path):
    lines = [line([0.1], "P", id="1"), line([0.2], "Q", id="1"), line([0.3], " P ", id="2")]
    assert [[one.rewards[0] for one in found.candidates] for found in problems_of(tmp_path, lines)] == [
        [0.1, 0.3],
        [0.2],
    ]
    assert [[one.rewards[0] for one in found.candidates] for found in problems_of(tmp_path, lines, "id")] == [
        [0.1, 0.2],
        [0.3],
    ]


def test_what_is_right(tmp_path):
    """As given; else by the true answer, which one row is enough to tell; else by the label."""
    lines = [
        line([0.5], "a", text=r"\boxed{3}", answer="3.0"),
        line([0.5], "a", text="#### 4"),
        line([0.5], "a", text="Hm."),
        line([0.5], "a", text=r"\boxed{4}", final_answer="3"),
        line([0.5], "a", text=r"\boxed{4}", correct=True),
        line([0.5], "b", label=-1),
        line([0.5], "b", label=0),
        line([0.5], "b"),
    ]
    a, b = problems_of(tmp_path, lines)
    assert a.answers == ["3", "4", None, "3", "4"]
    assert a.correct == [True, False, False, True, True]
    assert b.correct == [True, False, None]


def test_a_table_of_known_numbers(tmp_path):
    """Two problems of four candidates. In one the right candidate has the best reward, in the other the
    worst; there is no vote.
    """
    up = [line([reward], "up", correct=reward == 0.9) for reward in (0.1, 0.9, 0.5, 0.3)]
    down = [line([reward], "down", correct=reward == 0.1) for reward in (0.1, 0.9, 0.5, 0.3)]
    unknown = [line([0.5], "unknown")] * 4
    rows = table(problems_of(tmp_path, [*up, *down, *unknown]), ("min",))
    found = {(row["by"], row["n"]): row["accuracy"] for row in rows}
    assert found == pytest.approx(
        {
            ("pass@1", 1): 25,
            ("pass@1", 2): 25,
            ("pass@1", 4): 25,
            ("min", 1): 25,
            ("min", 2): (50 + 0) / 2,
            ("min", 4): (100 + 0) / 2,
            ("oracle", 1): 25,
            ("oracle", 2): 50,
            ("oracle", 4): 100,
        }
    )
    assert all(row["problems"] == 2 for row in rows)
    [at_four] = [row for row in rows if (row["by"], row["n"]) == ("min", 4)]
    assert (at_four["accuracy_low"], at_four["accuracy_high"]) == pytest.approx((0, 100))


def test_a_vote_needs_answers(tmp_path):
    """Two wrong candidates agree, and the right one has a reward that outweighs both."""
    lines = [
        line([0.2], text=r"\boxed{4}", answer="3"),
        line([0.9], text=r"\boxed{3}"),
        line([0.3], text="#### 4.0"),
    ]
    rows = table(problems_of(tmp_path, lines), ("min",))
    found = {(row["by"], row["n"]): row["accuracy"] for row in rows}
    assert (found["vote", 3], found["vote by min", 3], found["min", 3], found["oracle", 3]) == pytest.approx(
        (0, 100, 100, 100)
    )
    # of two: {4, 3} the first, {4, 4}, {3, 4} the first
    assert found["vote", 2] == pytest.approx(100 / 3)


def test_scores_that_differ_by_rounding_are_equal(tmp_path):
    """The same steps, judged twice: the first candidate is picked, by every aggregate, in the table too."""
    lines = [line([0.5, 0.9], correct=True), line([0.5 + 1e-8, 0.9 + 1e-8], correct=False)]
    [problem] = problems_of(tmp_path, lines)
    assert {own["candidate"] for own in picks(problem, AGGREGATES)["picks"].values()} == {0}
    found = accuracies(problem, AGGREGATES, 2, np.random.default_rng(0))
    assert [found[how] for how in AGGREGATES] == [1] * len(AGGREGATES)


def test_a_problem_with_fewer_candidates_gives_all(tmp_path):
    problems = problems_of(tmp_path, [line([0.5], "a", correct=True), *[line([0.5], "b", correct=False)] * 4])
    rng = np.random.default_rng(0)
    assert accuracies(problems[0], ("min",), 4, rng)["min"] == 1
    found = {(row["by"], row["n"]): row["accuracy"] for row in table(problems, ("min",))}
    assert found["min", 4] == 50


# ---------------------------------------------------------------------------------------------- the command


def test_the_picks_are_written(tmp_path, capsys):
    """The first of equals; a candidate without rewards only where there is no other."""
    lines = [
        line([0.5, 0.9], "a", answer="3", text="#### 2"),
        line([0.9, 0.5], "a", text="#### 3"),
        line([0.8, 0.5], "a"),
        line([None], "b"),
        line([None], "b"),
        line([None, 0.0], "c"),
        line([None], "c"),
    ]
    best_py("--scores", write(tmp_path / "s.jsonl", lines), "--out", tmp_path / "best.jsonl")
    a, b, c = [json.loads(text) for text in (tmp_path / "best.jsonl").read_text().splitlines()]
    assert {how: own["candidate"] for how, own in a["picks"].items()} == {
        "min": 0,
        "mean": 0,
        "last": 0,
        "product": 0,
    }
    assert a["picks"]["min"] == {
        "candidate": 0,
        "score": 0.5,
        "steps": ["Step 0.", "#### 2"],
        "answer": "2",
        "correct": False,
    }
    assert a["picks"]["product"]["score"] == pytest.approx(0.45)
    assert (a["candidates"], a["problem"], a["source"], a["id"]) == (3, "a", "s", "a")
    assert (b["picks"]["mean"]["candidate"], b["picks"]["mean"]["score"]) == (0, None)
    assert (c["picks"]["min"]["candidate"], c["picks"]["min"]["score"]) == (0, 0)
    out = capsys.readouterr().out
    assert "3 problems with 2 to 3 candidates" in out and "2 problems are left out" in out
    best_py(
        "--scores",
        tmp_path / "s.jsonl",
        "--out",
        tmp_path / "two.jsonl",
        "--aggregate",
        "last",
        "min",
        "last",
    )
    assert list(json.loads((tmp_path / "two.jsonl").read_text().splitlines()[0])["picks"]) == ["last", "min"]


def test_the_table_is_printed(tmp_path, capsys):
    lines = [line([0.9], name, text=r"\boxed{1}", answer="1") for name in "ab"] + [
        line([0.1], name, text=r"\boxed{2}") for name in "ab"
    ]
    best_py("--scores", write(tmp_path / "s.jsonl", lines), "--out", tmp_path / "best.jsonl")
    out = capsys.readouterr().out
    assert "2 problems with 2 candidates\nchosen by " in out
    by = {words[0]: words for words in map(str.split, out.splitlines()) if words}
    assert (
        by["pass@1"][1::3] == ["50.0", "50.0"] and by["min"][1::3] == ["50.0", "100.0"] == by["oracle"][1::3]
    )


@pytest.mark.parametrize(
    "lines, said",
    [
        ([], "has no scores"),
        ([line([0.9], n_steps=2)], "s.jsonl:1: of 2 steps only the first 1 were judged"),
        (
            [line([0.9], answer="3"), line([0.9], answer="4")],
            "s.jsonl:2: field 'answer': '4' is not that of s.jsonl:1",
        ),
        ([line([0.9], correct="yes")], "s.jsonl:1: field 'correct'"),
    ],
)
def test_scores_that_will_not_do(tmp_path, capsys, monkeypatch, lines, said):
    monkeypatch.chdir(tmp_path)
    write(Path("s.jsonl"), lines)
    assert said in refused(capsys, "--scores", "s.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.jsonl"]


def test_an_existing_output_is_kept(tmp_path, capsys):
    (tmp_path / "best.jsonl").write_text("mine")
    write(tmp_path / "s.jsonl", [line([0.9])])
    assert "exists already" in refused(
        capsys, "--scores", tmp_path / "s.jsonl", "--out", tmp_path / "best.jsonl"
    )
    assert "invalid choice: 'median'" in refused(
        capsys, "--scores", tmp_path / "s.jsonl", "--aggregate", "median"
    )
    assert (tmp_path / "best.jsonl").read_text() == "mine"


# ---------------------------------------------------------------------------------------------- no more than the choice needs

def analyses(p: float | None) -> list[Analysis]:
    return [Analysis("", None, p, 10, True)]


def test_a_candidate_has_lost_when_it_can_no_longer_win():
    """Against 0.5 of the candidate 1: a lower score loses, and an equal one of a later candidate."""
    solution, other = Solution("i", "P", ("a", "b"), None), Solution("i", "Q", ("a", "b"), None)
    race = Race("min")
    assert not race.is_lost(0, solution, [analyses(0.1)])  # none is complete
    race.finish(1, solution, [analyses(0.5), analyses(0.9)])
    race.finish(3, solution, [analyses(0.4), analyses(0.9)])  # it does not take the first one's place
    for number, p, lost in ((0, 0.5, False), (2, 0.5, True), (0, 0.49, True), (2, 0.51, False), (2, None, False)):
        assert race.is_lost(number, solution, [analyses(p)]) is lost
    # what differs by rounding is equal: a later candidate has lost, an earlier one has not
    assert race.is_lost(2, solution, [analyses(0.5 + 1e-8)]) and not race.is_lost(0, solution, [analyses(0.5 - 1e-8)])
    assert not race.is_lost(0, other, [analyses(0.1)])
    assert not Race(None).is_lost(0, solution, [analyses(0.1)])
    product = Race("product")
    product.finish(0, solution, [analyses(0.5), analyses(0.5)])
    assert product.is_lost(1, solution, [analyses(0.5), analyses(0.5), analyses(None)])
    assert not product.is_lost(1, solution, [analyses(0.3)])


def test_candidates_that_were_left(tmp_path, capsys):
    """They can be chosen from by that aggregate alone; the table has no column for fewer candidates, and no vote by score."""
    lines = [line([0.9, 0.8], text="#### 3", answer="3"), line([0.7], n_steps=2, left="min"), line([0.95, 0.1], text="#### 4")]
    path = write(tmp_path / "s.jsonl", lines)
    best_py("--scores", path, "--out", tmp_path / "best.jsonl", "--aggregate", "min")
    [picked] = [json.loads(text) for text in (tmp_path / "best.jsonl").read_text().splitlines()]
    assert picked["picks"]["min"]["candidate"] == 0 and picked["candidates"] == 3
    rows = table(problems_of(tmp_path, lines), ("min",))
    assert [(row["by"], row["n"]) for row in rows] == [("pass@1", 3), ("min", 3), ("vote", 3), ("oracle", 3)]
    for flags in ([], ["--aggregate", "product"], ["--aggregate", "min", "--by", "id"], ["--aggregate", "min", "--k", "1"]):
        said = refused(capsys, "--scores", path, "--out", tmp_path / "b.jsonl", *flags)
        assert f"{path}:2: was left, as it could no longer be the best of its problem by min; give --aggregate min alone" in said
