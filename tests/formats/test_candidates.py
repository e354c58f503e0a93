"""Raw text and its steps; several candidates for a problem; what goes on into scores.jsonl."""

import json
from pathlib import Path

import pytest

from formats.inputs import Inputs
from formats.readers import read_solutions
from formats.split import SPLITS, split_steps
from plumbing.errors import BadInput


def read(path: Path, rows: list[dict], split: str = "blank") -> list:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [solution for _, solution in read_solutions(path, split)]


# ---------------------------------------------------------------------------------------------- raw text


@pytest.mark.parametrize(
    "how, text, steps",
    [
        ("blank", "Tom has 3.\n\nHe buys 4.\n  \n\n So 7.\n", ["Tom has 3.", "He buys 4.", "So 7."]),
        ("blank", "One\nstep.", ["One\nstep."]),
        ("blank", "a\r\n\r\nb", ["a", "b"]),
        ("lines", "a\n\n b \nc", ["a", "b", "c"]),
        ("numbered", "1. a\n2. b\nmore of b\n3) c", ["a", "b\nmore of b", "c"]),
        ("numbered", "Step 1: a\nStep 2: b", ["a", "b"]),
        ("numbered", "### Step 1\na\n**Step 2:** b\n**3.** c", ["a", "b", "c"]),
        ("numbered", "Let us see.\n1. a\n2. b", ["Let us see.\na", "b"]),
        (
            "numbered",
            "1. a list:\n1. x\n2. y\n2. b",
            ["a list:\n1. x", "y\n2. b"],
        ),  # it cannot be told which 2 is meant
        ("numbered", "1. a\n1.5 kg is\n3. not the next\n2. b", ["a\n1.5 kg is\n3. not the next", "b"]),
        ("numbered", "No numbers.", ["No numbers."]),
        (
            "sentences",
            'Tom has 3.5 kg. He buys 4! Why? "So." (7 of them.) $x$ is 7.',
            ["Tom has 3.5 kg.", "He buys 4!", "Why?", '"So."', "(7 of them.)", "$x$ is 7."],
        ),
        (
            "sentences",
            "We use e.g. Euclid's lemma. Let $f. G$ be. so on",
            ["We use e.g. Euclid's lemma.", "Let $f. G$ be. so on"],
        ),
    ],
)
def test_a_text_is_split_into_steps(how, text, steps):
    assert split_steps(text, how) == steps


@pytest.mark.parametrize("how", SPLITS)
def test_no_step_is_blank_and_no_word_is_lost(how):
    text = "First. 1. Two things:\n\n2. More.\n\n\n  \nStep 3: End. Really!"
    steps = split_steps(text, how)
    assert all(step == step.strip() != "" for step in steps)
    for word in ("First", "Two things", "More", "End", "Really"):
        assert sum(word in step for step in steps) == 1
    assert split_steps(" \n\n ", how) == []


def test_a_row_of_raw_text(tmp_path):
    row = {"id": 7, "problem": "1 + 1 + 1?", "solution": "1 + 1 = 2.\n\n2 + 1 = 3.", "answer": "3"}
    [found] = read(tmp_path / "a.jsonl", [row])
    assert (found.id, found.problem, found.steps, found.label) == (
        "7",
        "1 + 1 + 1?",
        ("1 + 1 = 2.", "2 + 1 = 3."),
        None,
    )
    assert found.extra == {"answer": "3"} and not found.needs_all_steps
    [found] = read(tmp_path / "a.jsonl", [row], "sentences")
    assert len(found.steps) == 2


# ---------------------------------------------------------------------------------------------- candidates


def test_rows_with_several_solutions(tmp_path):
    """As texts, and as lists of steps; the next row goes on where the one before ends."""
    rows = [
        {
            "id": "a",
            "problem": "P",
            "solutions": ["1.\n\n2.", ["x", "y", "z"]],
            "answer": 3,
            "final_answers": [4, None],
            "correct": [False, True],
        },
        {"id": "b", "question": "Q", "steps": [["u"], ["v", "w"], ["t"]], "labels": [1, 0, None]},
    ]
    found = read(tmp_path / "a.jsonl", rows)
    assert [(one.id, one.problem, one.steps) for one in found] == [
        ("a", "P", ("1.", "2.")),
        ("a", "P", ("x", "y", "z")),
        ("b", "Q", ("u",)),
        ("b", "Q", ("v", "w")),
        ("b", "Q", ("t",)),
    ]
    assert [one.extra for one in found] == [
        {"candidate": 0, "answer": "3", "final_answer": "4", "correct": False},
        {"candidate": 1, "answer": "3", "correct": True},
        {"candidate": 0, "correct": True},
        {"candidate": 1, "correct": False},
        {"candidate": 2},
    ]
    assert all(one.needs_all_steps for one in found)


def test_rows_that_are_candidates_by_what_they_share(tmp_path):
    """A solution in each row; what is known of its answer goes on."""
    rows = [
        {"problem": "P", "steps": ["a"], "correct": True},
        {"problem": "P", "solution": "b", "final_answer": "5"},
    ]
    assert [one.extra for one in read(tmp_path / "a.jsonl", rows)] == [
        {"correct": True},
        {"final_answer": "5"},
    ]


def test_a_row_of_processbench_has_no_more_than_before(tmp_path):
    row = {
        "id": "gsm8k-0",
        "generator": "x",
        "problem": "P",
        "steps": ["a"],
        "final_answer_correct": False,
        "label": 0,
    }
    assert read(tmp_path / "a.jsonl", [row])[0].extra == {}


GOOD = {"problem": "P", "solutions": ["a"]}


@pytest.mark.parametrize(
    "row, said",
    [
        ({"problem": "P", "solutions": []}, "field 'solutions' is empty"),
        ({"problem": "P", "solutions": ["a", " "]}, r"field 'solutions\[1\]': needs at least one step"),
        ({"problem": "P", "solutions": ["a", 3]}, r"field 'solutions\[1\]': expected a list"),
        ({"problem": "P", "solutions": ["a", ["b", ""]]}, r"field 'solutions\[1\]': needs at least one step"),
        ({"solutions": ["a"]}, "field 'question' is missing"),
        (
            {"problem": "P", "solutions": ["a"], "correct": [True, False]},
            "field 'correct': 2 values for 1 solutions",
        ),
        ({"problem": "P", "steps": [["a"]], "labels": [3]}, "expected true or false"),
        ({"problem": "P", "steps": [["a"]], "labels": [-1]}, "expected true or false"),
        ({"problem": "P", "solution": "a"}, "has no list of solutions, as the rows before it have"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, said):
    with pytest.raises(BadInput, match=rf"a.jsonl:2: .*{said}"):
        read(tmp_path / "a.jsonl", [GOOD, row])


@pytest.mark.parametrize(
    "row, said",
    [
        ({"problem": "P", "solution": " \n "}, "field 'solution': needs at least one step"),
        (
            {"problem": "P", "solution": "a\n\nb", "label": 1},
            "field 'label' numbers steps, and 'solution' is one text",
        ),
        (GOOD, "has several solutions, as the rows before it have not"),
    ],
)
def test_a_bad_row_of_text_is_named(tmp_path, row, said):
    with pytest.raises(BadInput, match=rf"a.jsonl:2: .*{said}"):
        read(tmp_path / "a.jsonl", [{"problem": "P", "solution": "a"}, row])


# ---------------------------------------------------------------------------------------------- several files


def test_inputs_are_one_sequence(tmp_path, capsys):
    (tmp_path / "b").mkdir()
    read(tmp_path / "a.jsonl", [{"problem": "P", "solutions": ["x\n\ny", "z"]}] * 2)
    read(tmp_path / "b/a.jsonl", [{"problem": "Q", "steps": ["s"]}])
    read(tmp_path / "c.jsonl", [{"problem": "R", "solution": "t\nu"}])
    paths = [str(tmp_path / name) for name in ("a.jsonl", "b/a.jsonl", "c.jsonl")]
    inputs = Inputs(paths, 3, "lines")
    found = list(inputs)
    assert [source for source, _ in found] == [paths[0]] * 3 + [paths[1], "c"]
    assert [solution.steps for _, solution in found] == [("x", "y"), ("z",), ("x", "y"), ("s",), ("t", "u")]
    inputs.print_split()
    assert capsys.readouterr().out == (
        f"{paths[0]}:1: raw text, split into 2 steps (--split lines):\n  Step 1: x\n  Step 2: y\n"
        f"{paths[2]}:1: raw text, split into 2 steps (--split lines):\n  Step 1: t\n  Step 2: u\n"
    )
