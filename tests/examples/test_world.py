"""The small world: its problems, errors and analyses; and the numbers that its tables are made of."""
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

WORLD = Path(__file__).parents[2] / "examples" / "arithmetic"
sys.path.insert(0, str(WORLD))
import claims
import report
import world
from formats.verdicts import parse_verdict
from checkpoint.flags import ServedConfig
from data import load_sampler
from rprm import Case


def drawn(count, correct, kinds=world.KINDS_OF_ERROR, seed=0):
    rng = np.random.default_rng(seed)
    return [world.draw(rng, 0.5, correct, kinds) for _ in range(count)]


def total_by_hand(problem):
    """The final total, read off the text alone, sentence by sentence."""
    total = None
    for sentence in re.split(r"(?<=[.?]) ", problem.text):
        numbers = re.findall(r"\d+", sentence)
        if not numbers:
            continue
        words = sentence.rstrip(".").split()
        verb = next((w for w in words if w in world.OUTWARD + world.INWARD), None)
        if verb is None:
            total = int(numbers[0])
            continue
        subject_is_hero = words[words.index(verb) - 1] == problem.hero
        total += int(numbers[0]) * (1 if (verb in world.INWARD) == subject_is_hero else -1)
    return total


def test_right_solutions_reach_the_answer_that_the_text_gives():
    for problem, steps, label in drawn(300, correct=True):
        assert label == -1 and steps[-1].result == total_by_hand(problem)


@pytest.mark.parametrize("kind", world.KINDS_OF_ERROR)
def test_an_error_is_of_its_kind_and_the_steps_after_it_follow(kind):
    for problem, steps, label in drawn(100, correct=False, kinds=(kind,)):
        total = problem.start
        for i, (step, exchange) in enumerate(zip(steps, problem.exchanges)):
            wrong = {"contradiction": step.left != total, "data source": step.right != exchange.amount,
                     "operation": step.sign != exchange.sign, "calculation": world.apply(step.left, step.sign, step.right) != step.result}
            assert [name for name, found in wrong.items() if found] == ([kind] if i == label else []), (problem.text, steps, i)
            total = step.result


def test_a_careful_analyst_is_always_right_and_a_sloppy_one_often():
    rng, right = np.random.default_rng(1), []
    for i in range(600):
        problem, steps, label = world.draw(rng, 0.5, i % 2 == 0)
        index = label if label >= 0 else int(rng.integers(len(steps)))
        text, verdict = world.analyse(rng, problem, steps, index, world.CAREFUL)
        assert verdict == (label < 0) == parse_verdict(text)
        right.append(world.analyse(rng, problem, steps, index, world.Sloppiness())[1] == (label < 0))
    assert 0.6 < np.mean(right) < 0.85


def test_columns_with_and_without_the_carry():
    assert world.columns(world.Step(37, "+", 15, 0), carry=True) == ("7+5=12, 3+1+1=5", 52)
    assert world.columns(world.Step(37, "+", 15, 0), carry=False) == ("7+5=12, 3+1=4", 42)
    assert world.columns(world.Step(52, "-", 27, 0), carry=True) == ("12-7=5, 5-2-1=2", 25)
    assert world.columns(world.Step(52, "-", 27, 0), carry=False) == ("12-7=5, 5-2=3", 35)
    for left, right in np.random.default_rng(0).integers(10, 60, (200, 2)):
        assert world.columns(world.Step(int(left), "+", int(right), 0), carry=True)[1] == left + right or left + right > 99


def test_difficulty_sets_the_traps():
    rng = np.random.default_rng(0)
    for difficulty in (0.0, 1.0):
        for _ in range(50):
            problem = world.draw_problem(rng, difficulty)
            assert problem.question_first == bool(difficulty) and all(e.told_by_other == bool(difficulty) for e in problem.exchanges)


@pytest.mark.slow
def test_files_are_disjoint_balanced_and_repeatable(tmp_path):
    world.main(world.Config(out=str(tmp_path / "a"), train=60, validation=20, test=20, pretrain=4))
    world.main(world.Config(out=str(tmp_path / "b"), train=60, validation=20, test=20, pretrain=4))
    problems = []
    for split in ("train", "validation", "test"):
        lines = [json.loads(line) for line in (tmp_path / "a" / f"{split}.jsonl").read_text().splitlines()]
        assert (tmp_path / "a" / f"{split}.jsonl").read_text() == (tmp_path / "b" / f"{split}.jsonl").read_text()
        assert sum(line["label"] == -1 for line in lines) == len(lines) / 2
        assert all(line["final_answer_correct"] for line in lines if line["label"] == -1)
        problems += [line["problem"] for line in lines]
    assert len(set(problems)) == 100


@pytest.mark.slow
def test_the_embedded_base_knows_the_form_and_judges_poorly():
    tokenizer = Tokenizer.from_file(str(WORLD / "base" / "tokenizer.json"))
    assert all(tokenizer.token_to_id(str(n)) is not None for n in range(10, 100))
    size = sum(path.stat().st_size for path in (WORLD / "base").iterdir())
    assert size <= 8e6
    rng, cases = np.random.default_rng(3), []
    for i in range(60):
        problem, steps, label = world.draw(rng, 0.5, i % 2 == 0)
        index = label if label >= 0 else int(rng.integers(len(steps)))
        cases.append(Case(problem.text, tuple(step.text for step in steps[:index]), steps[index].text, label < 0))
    sampler = load_sampler(ServedConfig(model=str(WORLD / "base"), max_new_tokens=120, batch_size=60), 4, force=False)
    verdicts = [(a.verdict, cases[i].label) for i, analyses in sampler.analyses(cases) for a in analyses]
    assert np.mean([verdict is not None for verdict, _ in verdicts]) >= 0.95
    assert 0.52 < np.mean([verdict == label for verdict, label in verdicts]) < 0.88  # 60 to 80% over many cases; 60 stray


# ---------------------------------------------------------------------------------------------- the tables' numbers

def score(label, *steps):
    """A line of scores.jsonl: per step a list of P(Yes)."""
    analysis = {"verdict": True, "forced": False, "n_tokens": 5}
    return {"label": label, "samples": [[analysis | {"p_yes": p} for p in step] for step in steps]}


def test_measures_of_a_table_worked_by_hand():
    lines = [score(-1, [0.9, 0.9], [0.8, 0.2]), score(0, [0.1, 0.3], [0.9, 0.9]), score(1, [0.9, 0.7], [0.6, 0.2]),
             score(-1, [0.9, 0.0], [1.0, 1.0])]
    first = report.measure("x", lines, 1)  # rewards .9 .8 | .1 | .9 .6 | .9 1.0 -> predictions -1, 0, -1, -1
    assert (first["error_accuracy"], first["correct_accuracy"]) == (50.0, 100.0) and first["f1"] == pytest.approx(200 / 3)
    assert first["tokens_per_step"] == 5
    both = report.measure("x", lines, 2)  # rewards .9 .5 | .2 .9 | .8 .4 | .45 1.0 -> predictions -1, 0, 1, 0
    assert (both["error_accuracy"], both["correct_accuracy"]) == (100.0, 50.0) and both["f1"] == pytest.approx(200 / 3)
    # steps up to the first wrong one: right .9 .5 .8 .45 1.0, wrong .2 .4 -> every right step is above every wrong one
    assert both["auroc"] == 1.0
    assert both["brier"] == pytest.approx((0.1**2 + 0.5**2 + 0.2**2 + 0.2**2 + 0.4**2 + 0.55**2 + 0) / 7)
    assert report.auroc(np.array([0.5, 0.5, 0.9, 0.1]), np.array([True, False, True, False])) == pytest.approx((0.5 + 1 + 1 + 1) / 4)


def test_intervals_and_claims_worked_by_hand():
    found = claims.interval([1.0, 2.0, 3.0])  # sd 1, t 4.303, half 4.303 / sqrt(3)
    assert found["mean"] == 2.0 and found["high"] - 2.0 == pytest.approx(2.4844, abs=1e-3) == 2.0 - found["low"]
    good = [score(-1, [0.9]), score(0, [0.1])] * 20
    bad = [score(-1, [0.9]), score(0, [0.9]), score(-1, [0.9]), score(0, [0.1])] * 10  # half of the errors missed: F1 200/3
    scores = {seed: {"base": good, "dpo": good, "sft.1": bad} for seed in (0, 1)}
    found = claims.claim(scores, "dpo - sft", ("dpo", 1), ("sft.1", 1), 5.2)
    assert found["seeds"] == pytest.approx([100 / 3, 100 / 3]) and found["low"] == pytest.approx(found["high"])
    assert all(15 < low < 100 / 3 < high < 60 for low, high in found["bootstrap_per_seed"])


def test_the_claims_page_keeps_what_is_around_the_tables(tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- claims -->\nold\n<!-- end of claims -->\nafter\n")
    monkeypatch.setattr(claims, "HERE", tmp_path)
    claims.write_between("<!-- claims -->", "<!-- end of claims -->", "| new |")
    assert page.read_text() == "before\n<!-- claims -->\n| new |\n<!-- end of claims -->\nafter\n"
