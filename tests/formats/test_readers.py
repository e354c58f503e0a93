"""The formats in the wild, on small rows made by hand, and ProcessBench itself where it is at hand."""

import json
from collections import Counter

import pytest

from formats import readers
from formats.readers import Solution, read_case, read_labelled_steps, read_rows, read_solution, read_solutions
from plumbing.errors import BadInput
from rprm import Case, Prompt


def write(path, *rows, indent=None):
    path.write_text(
        "\n".join(
            r if isinstance(r, str) else json.dumps(r, ensure_ascii=False, indent=indent) for r in rows
        ),
        encoding="utf-8",
    )
    return path


def labelled(path) -> tuple[list, Counter]:
    counts = Counter()
    return list(read_labelled_steps(path, counts)), +counts


def read_one(tmp_path, row) -> tuple[list, Counter]:
    """The labelled steps of a file of one row."""
    [(_, found)], counts = labelled(write(tmp_path / "rows.jsonl", row))
    return found, counts


def refused(path) -> str:
    """What --strict says of the first row with a defect."""
    with pytest.raises(BadInput) as error:
        list(read_labelled_steps(path, Counter(), strict=True))
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------- files

A, B = {"id": "a", "x": 1}, {"id": "b", "x": [2, {"y": "ü\u2028"}]}


@pytest.mark.parametrize(
    "text, places",
    [
        (json.dumps([A, B]), ["row 1", "row 2"]),
        (json.dumps([A, B], indent=2), ["row 1", "row 2"]),
        ("\n\n  [\n" + json.dumps(A) + ",\n" + json.dumps(B) + "]\n", ["row 1", "row 2"]),
        (json.dumps(A) + "\n" + json.dumps(B, ensure_ascii=False) + "\n", ["1", "2"]),
        (f"\n{json.dumps(A)}\r\n\n \n{json.dumps(B)}", ["2", "5"]),
        (json.dumps(B), ["1"]),
        (json.dumps(B, indent=2), ["row 1"]),
        ("[]", []),
        ("", []),
        ("\n\n", []),
    ],
)
def test_an_array_lines_or_a_single_object(tmp_path, text, places):
    """The same rows, each with the place that an error will name."""
    path = tmp_path / "rows.json"
    path.write_bytes(text.encode())
    rows = list(read_rows(path))
    assert [row for _, row in rows] == ([A, B] if len(places) == 2 else [B] * len(places))
    assert [where for where, _ in rows] == [
        f"{path}: {place}" if "row" in place else f"{path}:{place}" for place in places
    ]


@pytest.mark.parametrize(
    "text, said",
    [
        ("[{}, 7]", "row 2: expected an object, found 7"),
        ("[{}\n", ": not valid JSON"),
        ('{"a": 1}\n{"a": \n', ":2: not valid JSON"),
        ('{"a": 1}\n[1]', ":2: expected an object"),
        ("7", ":1: expected an object"),
        ('{\n"a": 1', ": not valid JSON"),
        ("hello", ":1: not valid JSON"),
    ],
)
def test_a_file_that_is_no_rows_names_the_place(tmp_path, text, said):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(BadInput) as error:
        list(read_rows(path))
    assert str(error.value).startswith(str(path)) and said in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"absent\.json: no such file"):
        list(read_rows(tmp_path / "absent.json"))


# ---------------------------------------------------------------------------------------------- ProcessBench


def bench(label=-1, steps=("one", "two", "three"), **changes) -> dict:
    return {
        "id": "gsm8k-7",
        "generator": "m",
        "problem": "P",
        "steps": list(steps),
        "final_answer_correct": True,
        "label": label,
    } | changes


def test_processbench_steps_up_to_the_first_wrong_one(tmp_path):
    cases = [
        Case("P", (), "one", True),
        Case("P", ("one",), "two", True),
        Case("P", ("one", "two"), "three", True),
    ]
    assert read_one(tmp_path, bench(-1)) == ([("0", cases[0]), ("1", cases[1]), ("2", cases[2])], Counter())
    wrong = Case("P", ("one",), "two", False)
    assert read_one(tmp_path, bench(1)) == (
        [("0", cases[0]), ("1", wrong)],
        Counter({"dropped: step after the first wrong one": 1}),
    )
    assert read_one(tmp_path, bench(0)) == (
        [("0", Case("P", (), "one", False))],
        Counter({"dropped: step after the first wrong one": 2}),
    )
    assert read_one(tmp_path, bench(2)) == (
        [("0", cases[0]), ("1", cases[1]), ("2", Case("P", ("one", "two"), "three", False))],
        Counter(),
    )


def test_names_of_rows(tmp_path):
    """The row's id, else its file and place."""
    no_id = {k: v for k, v in bench().items() if k != "id"}
    assert [name for name, _ in labelled(write(tmp_path / "x.jsonl", bench(), no_id, bench(id=5)))[0]] == [
        "gsm8k-7",
        "x.jsonl:2",
        "5",
    ]
    assert [name for name, _ in labelled(write(tmp_path / "y.json", [bench(), no_id]))[0]] == [
        "gsm8k-7",
        "y.json:2",
    ]


def test_a_solution_to_score_needs_no_label():
    row = bench()
    del row["label"]
    expected = Solution("gsm8k-7", "P", ("one", "two", "three"), None)
    assert read_solution(row, "f:1") == read_solution(row | {"label": None}, "f:1") == expected
    assert read_solution(bench(2), "f:1").label == 2


BAD_SOLUTIONS = {
    "no steps": (bench(steps=()), "'steps'"),
    "an empty step": (bench(steps=("one", " \n")), "'steps'"),
    "a step that is no text": (bench() | {"steps": ["one", 2]}, "'steps'"),
    "steps in one text": (bench() | {"steps": "one"}, "'steps'"),
    "label too high": (bench(3), "'label': 3 is out of range (-1 to 2)"),
    "label too low": (bench(-2), "'label': -2 is out of range"),
    "label a text": (bench("1"), "'label'"),
    "label true": (bench(True), "'label'"),
    "label a fraction": (bench(0.5), "'label'"),
    "empty problem": (bench(problem=" "), "'problem' is empty"),
    "problem no text": (bench(problem=None), "'problem'"),
    "no problem": ({k: v for k, v in bench().items() if k != "problem"}, "'problem' is missing"),
}


@pytest.mark.parametrize("kind", BAD_SOLUTIONS)
def test_a_bad_solution_names_file_row_and_field(tmp_path, kind):
    row, said = BAD_SOLUTIONS[kind]
    path = write(tmp_path / "bench.json", [bench(), row])
    message = refused(path)
    assert message.startswith(f"{path}: row 2: field ") and said in message
    with pytest.raises(BadInput, match=r"^f:2: field "):
        read_solution(row, "f:2")


def test_a_training_row_needs_its_label(tmp_path):
    assert "x.jsonl:2: field 'label'" in refused(write(tmp_path / "x.jsonl", bench(), bench(None)))


def test_the_real_processbench(processbench, tmp_path):
    """The GSM8K split: 400 solutions, 1361 correct and 207 incorrect steps, 514 after a first error."""
    found, counts = labelled(write(tmp_path / "gsm8k.json", processbench))
    assert len(found) == 400
    assert Counter(case.label for _, steps in found for _, case in steps) == {True: 1361, False: 207}
    assert counts == {"dropped: step after the first wrong one": 514}
    assert sum(len(row["steps"]) for row in processbench) == 1361 + 207 + 514


# ---------------------------------------------------------------------------------------------- PRM800K


def completion(text, rating, **more) -> dict:
    return {"text": text, "rating": rating, "flagged": False} | more


def prm(*steps, **changes) -> dict:
    return {
        "question": {"problem": "P", "ground_truth_answer": "7"},
        "label": {"steps": list(steps), "finish_reason": "solution"},
        "is_quality_control_question": False,
        "is_initial_screening_question": False,
    } | changes


def step(*completions, chosen=None, human=None) -> dict:
    return {"completions": list(completions), "chosen_completion": chosen, "human_completion": human}


def test_prm800k_every_rated_completion_is_a_case(tmp_path):
    """Phase 2.

    Several completions a step; the previous steps are the chosen ones, a neutral one among them.
    """
    found, counts = read_one(
        tmp_path,
        prm(
            step(completion("a0", -1), completion("a1", 1), completion("a2", 0), chosen=1),
            step(completion("b0", 0), completion("b1", -1), chosen=0),
            step(completion("c0", 1), chosen=0),
        ),
    )
    assert found == [
        ("0-0", Case("P", (), "a0", False)),
        ("0-1", Case("P", (), "a1", True)),
        ("1-1", Case("P", ("a1",), "b1", False)),
        ("2-0", Case("P", ("a1", "b0"), "c0", True)),
    ]
    assert counts == {"dropped: neutral step": 2}


def test_prm800k_a_human_completion_continues_the_solution(tmp_path):
    """Phase 1: a step that a person wrote, as a text or as an object, is a previous step and no case."""
    for human in ("by hand", {"text": "by hand", "rating": None}):
        found, counts = read_one(
            tmp_path,
            prm(
                step(completion("a", -1), human=human),
                step(completion("b", 1), chosen=0),
                step(human=human),
                step(completion("c", -1)),
            ),
        )
        assert (
            found
            == [
                ("0-0", Case("P", (), "a", False)),
                ("1-0", Case("P", ("by hand",), "b", True)),
                ("3-0", Case("P", ("by hand", "b", "by hand"), "c", False)),
            ]
            and not counts
        )


def test_prm800k_ratings_that_are_null_or_missing(tmp_path):
    found, counts = read_one(
        tmp_path,
        prm(step(completion("a", None), {"text": "b"}, completion(" ", 1), completion("c", 1), chosen=0)),
    )
    assert found == [("0-3", Case("P", (), "c", True))]
    assert counts == {"dropped: step without a rating": 2, "dropped: blank step": 1}


def test_prm800k_ends_where_nothing_is_chosen(tmp_path):
    """What comes after a step without a chosen completion has no known previous steps.

    Null completions are none.
    """
    found, _ = read_one(tmp_path, prm(step(completion("a", 1)), step(completion("b", 1), chosen=0)))
    assert found == [("0-0", Case("P", (), "a", True))]
    assert (
        read_one(tmp_path, prm({"completions": None, "chosen_completion": None, "human_completion": None}))[0]
        == []
    )


def test_prm800k_stops_after_the_first_wrong_chosen_step(tmp_path):
    """A step rated 1 that stands on a wrong one is no correct case.

    The alternatives to the wrong one are cases still.
    """
    found, counts = read_one(
        tmp_path,
        prm(
            step(completion("a0", -1), completion("a1", 1), chosen=0),
            step(completion("b0", 1), completion("b1", 0), chosen=0),
            step(completion("c0", 1), chosen=0),
        ),
    )
    assert found == [("0-0", Case("P", (), "a0", False)), ("0-1", Case("P", (), "a1", True))]
    assert counts == {"dropped: step after the first wrong one": 3}


@pytest.mark.parametrize(
    "chosen, dropped",
    [
        (completion("a", None), "step without a rating"),
        (completion(" ", 1), "blank step"),
        (completion("a", 1, flagged=True), "step that its labeler could not rate (flagged)"),
    ],
)
def test_prm800k_stops_after_a_step_that_nobody_could_rate(tmp_path, chosen, dropped):
    found, counts = read_one(
        tmp_path,
        prm(step(completion("z", 1), chosen=0), step(chosen, chosen=0), step(completion("b", 1), chosen=0)),
    )
    assert found == [("0-0", Case("P", (), "z", True))]
    assert counts == {f"dropped: {dropped}": 1, "dropped: step after one without a rating": 1}


@pytest.mark.parametrize("reason", ["bad_problem", "give_up"])
def test_prm800k_a_solution_given_up_is_read_as_far_as_it_goes(tmp_path, reason):
    row = prm(step(completion("a", 1), chosen=0), step(completion("b", None)), step(completion("c", 1)))
    row["label"]["finish_reason"] = reason
    found, counts = read_one(tmp_path, row)
    assert found == [("0-0", Case("P", (), "a", True))]
    assert counts == {
        f"read as far as rated: finish_reason {reason}": 1,
        "dropped: step without a rating": 1,
        "dropped: step after one with none chosen": 1,
    }


def test_prm800k_as_pandas_writes_it(tmp_path):
    """Whole numbers as floats, and flags of 1.0 and 0.0."""
    row = prm(
        step(completion("a", 1.0, flagged=0.0), chosen=0.0),
        step(completion("b", -1.0), chosen=0.0),
        is_quality_control_question=0.0,
    )
    assert [case.label for _, case in read_one(tmp_path, row)[0]] == [True, False]
    assert read_one(tmp_path, row | {"is_quality_control_question": 1.0}) == (
        [],
        Counter({"dropped: quality control row": 1}),
    )
    assert "'is_quality_control_question': expected true or false" in refused(
        write(tmp_path / "x.jsonl", row | {"is_quality_control_question": "False"})
    )


@pytest.mark.parametrize(
    "name, reason",
    [("is_quality_control_question", "quality control"), ("is_initial_screening_question", "screening")],
)
def test_prm800k_rows_that_are_dropped(tmp_path, name, reason):
    assert read_one(tmp_path, prm(step(completion("a", 1), chosen=0), **{name: True})) == (
        [],
        Counter({f"dropped: {reason} row": 1}),
    )


BAD_PRM = {
    "rating 2": (prm(step(completion("a", 2))), "field 'label.steps'[0].completions[0]: field 'rating': 2"),
    "rating a text": (prm(step(completion("a", "1"))), "'rating': '1'"),
    "rating true": (prm(step(completion("a", True))), "'rating': True"),
    "chosen too high": (
        prm(step(completion("a", 1), chosen=1)),
        "[0]: field 'chosen_completion': 1 is out of range (0 to 0)",
    ),
    "chosen negative": (prm(step(completion("a", 1), chosen=-1)), "'chosen_completion': -1"),
    "chosen a text": (
        prm(step(completion("a", 1), chosen="0")),
        "'chosen_completion': expected a whole number",
    ),
    "chosen of nothing": (prm(step(chosen=0)), "'chosen_completion'"),
    "no text": (
        prm(step(completion("a", 1), {"rating": 1}, chosen=0)),
        "completions[1]: field 'text' is missing",
    ),
    "text null": (prm(step(completion(None, 1))), "field 'text'"),
    "human a number": (prm(step(human=7)), "[0]: field 'human_completion'"),
    "human without text": (prm(step(human={"rating": 1})), "'human_completion'"),
    "a step a text": (prm("a"), "field 'label.steps'[0]"),
    "completions an object": (prm({"completions": {"text": "a"}}), "completions"),
    "no steps": (prm() | {"label": {}}, "field 'steps' is missing"),
    "label a number": (prm() | {"label": 1}, "'label'"),
    "empty problem": (prm() | {"question": {"problem": ""}}, "'problem' is empty"),
    "no problem": (prm() | {"question": {}}, "field 'question': field 'problem' is missing"),
    "question a text": (prm() | {"question": "P"}, "'question'"),
}


@pytest.mark.parametrize("kind", BAD_PRM)
def test_a_bad_prm800k_row_names_file_line_and_field(tmp_path, kind):
    row, said = BAD_PRM[kind]
    path = write(tmp_path / "phase2.jsonl", prm(step(completion("a", 1), chosen=0)), row)
    message = refused(path)
    assert message.startswith(f"{path}:2: field ") and said in message


# ---------------------------------------------------------------------------------------------- Math-Shepherd

SHEPHERD = "Tom has 3 pens. Step 1: he buys 4. ки\nStep 2: 3 + 4 = 8. ки\nStep 3: The answer is: 8 ки"


def shepherd(signs: str, text: str = SHEPHERD) -> dict:
    label = text
    for sign in signs:
        label = label.replace("ки", sign, 1)
    return {"input": text, "label": label, "task": "GSM8K"}


def test_math_shepherd(tmp_path):
    problem, steps = "Tom has 3 pens.", ("he buys 4.", "3 + 4 = 8.", "The answer is: 8")
    right = [(str(i), Case(problem, steps[:i], steps[i], True)) for i in range(3)]
    assert read_one(tmp_path, shepherd("+++")) == (right, Counter())
    assert read_one(tmp_path, shepherd("+--")) == (
        right[:1] + [("1", Case(problem, steps[:1], steps[1], False))],
        Counter({"dropped: step after the first wrong one": 1}),
    )


def test_math_shepherd_signs_of_arithmetic_are_no_labels(tmp_path):
    """Only the character in a tag's place counts: + and - in the text do not."""
    text = "Is 3 - 4 + 5 = 4? Step 1: 3 - 4 = -1 ки\nStep 2: -1 + 5 = 4 ки"
    found, _ = read_one(tmp_path, shepherd("-+", text))
    assert found == [("0", Case("Is 3 - 4 + 5 = 4?", (), "3 - 4 = -1", False))]


TAG_MISSING = "Q? Step 1: a=1. ки\nStep 2: b=2.\nStep 3: c=3. ки"


@pytest.mark.parametrize(
    "row, reason",
    [
        (shepherd("+-", TAG_MISSING), "two steps in one piece (a tag is missing)"),
        (
            shepherd("++", "Q? Step 1: a=1. Step 2: b=2. ки\nStep 3: c=3. ки"),
            "two steps in one piece (a tag is missing)",
        ),
        (shepherd("++", "Q? Step 1: a=1. ки\nStep 3: c=3. ки"), "with step numbers that do not fit"),
        (
            shepherd("+", "Q? Step 1: Plan: Step 1: a=1. ки"),
            "two steps in one piece, or Step 1: in the problem",
        ),
        (shepherd("+", "Q? First: a=1. ки"), "without Step 1:"),
        (shepherd("", "Q? Step 1: a=1."), "without a tag"),
        (shepherd("++", "Q? Step 1: a=1. ки\nStep 2: ки"), "with a blank step"),
        (shepherd("+", " Step 1: a=1. ки"), "without a problem"),
        (shepherd("+") | {"label": "Q?"}, "label that is not the input"),
    ],
)
def test_math_shepherd_rows_that_can_be_read_in_two_ways_are_dropped(tmp_path, row, reason):
    """Above all steps that would become one, with the label of the last."""
    path = write(tmp_path / "rows.jsonl", shepherd("+++"), row, row)
    found, counts = labelled(path)
    assert len(found) == 1 and counts == {f"dropped row: {reason}": 2}


BAD_SHEPHERD = {
    "no tags": (shepherd("", "P Step 1: a"), "'input'"),
    "no first step": (shepherd("+", "P a ки"), "'input'"),
    "no problem": (shepherd("+", "Step 1: a ки"), "'input'"),
    "an empty step": (shepherd("++", "P Step 1: a ки\nStep 2: ки"), "'input'"),
    "another sign": (shepherd("+x+"), "'label'"),
    "a tag left": (shepherd("+"), "'label'"),
    "another text": (shepherd("+++") | {"label": "Q + - +"}, "'label'"),
    "a letter changed": (
        shepherd("+++") | {"label": shepherd("+++")["label"].replace("buys", "pays")},
        "'label'",
    ),
    "label too short": (shepherd("+++") | {"label": shepherd("+++")["label"][:-1]}, "'label'"),
    "label a list": (shepherd("+++") | {"label": [1, 1, 0]}, "'label'"),
    "input null": (shepherd("+++") | {"input": None}, "'input'"),
}


@pytest.mark.parametrize("kind", BAD_SHEPHERD)
def test_a_bad_math_shepherd_row_names_file_line_and_field(tmp_path, kind):
    row, said = BAD_SHEPHERD[kind]
    path = write(tmp_path / "shepherd.jsonl", shepherd("++-"), row)
    message = refused(path)
    assert message.startswith(f"{path}:2: field ") and said in message


# ------------------------------------------------------------------------------------- the official seed rows


def seed(**changes) -> dict:
    row = {
        "id": 3,
        "query": "P",
        "previous-steps": "Step 1: a\nStep 2: b\nstill b",
        "now-step": "Step 3: c",
        "expert-judge": "Positive",
    }
    return row | {name.replace("_", "-"): value for name, value in changes.items()}


def test_seed_rows(tmp_path):
    assert read_one(tmp_path, seed()) == ([("0", Case("P", ("a", "b\nstill b"), "c", True))], Counter())
    assert read_one(tmp_path, seed(expert_judge="Negative", now_step="c"))[0] == [
        ("0", Case("P", ("a", "b\nstill b"), "c", False))
    ]
    for nothing in (
        "",
        None,
        [],
        "Since the Now Step is the first step, there are no Previous Steps.",
        "There are no previous steps.",
    ):
        assert read_one(tmp_path, seed(previous_steps=nothing, now_step="Step 1: c"))[0] == [
            ("0", Case("P", (), "c", True))
        ]
    assert read_one(tmp_path, seed(previous_steps=["a", "b"]))[0] == [("0", Case("P", ("a", "b"), "c", True))]


@pytest.mark.parametrize(
    "previous, now, steps",
    [
        (
            "Step 1: Plan:\nStep 1: add\nStep 2: multiply\nStep 2: So 5.",
            "Step 3: So 2.",
            ("Plan:\nStep 1: add", "multiply\nStep 2: So 5."),
        ),
        ("Step 1: a\nStep 2: b\nStep 2: c\nStep 1: d", "Step 3: e", ("a", "b\nStep 2: c\nStep 1: d")),
        ("Step 1: a\nStep 9: b\n Step 2: c", "Step 3: e", ("a\nStep 9: b", "c")),
        ("Step 1: as Step 2: says", "Step 2: e", ("as Step 2: says",)),
        (["Step 1: a\nStep 2: b", "Step 2: c"], "Step 3: e", ("a\nStep 2: b", "c")),
        (
            "Step 1: " + "\nStep 2: ".join("ab") + "".join(f"\nStep {n}: x" for n in range(3, 12)),
            "Step 12: e",
            ("a", "b", *"x" * 9),
        ),
    ],
)
def test_a_step_begins_where_the_next_expected_number_does(tmp_path, previous, now, steps):
    """The prompt made of them is the official one, to the letter."""
    [(_, case)], counts = read_one(tmp_path, seed(previous_steps=previous, now_step=now))
    assert case.previous_steps == steps and not counts
    if isinstance(previous, str):
        filled = Prompt("{problem}|{previous_steps}|{now_step}", "test").fill(case)
        assert filled == f"P|{previous.replace(chr(10) + ' ', chr(10))}|{now}"


@pytest.mark.parametrize(
    "previous, now, reason",
    [
        ("Step 1: a\nStep 2: b", "Step 5: c", "with step numbers that do not fit"),
        ("Step 1: a\nStep 2: b", "Step 2: c", "with step numbers that do not fit"),
        ("", "Step 3: c", "with step numbers that do not fit"),
        (["a", "Step 3: b"], "c", "with step numbers that do not fit"),
        (
            "Since the Now Step is the first step, there are no Previous Steps.",
            "Step 2: c",
            "with step numbers that do not fit",
        ),
        ("He adds.", "Step 2: c", "previous steps that do not begin with Step 1:"),
        ("Step 2: a", "Step 2: c", "previous steps that do not begin with Step 1:"),
        ("So far: x\nStep 1: a", "Step 2: c", "previous steps that do not begin with Step 1:"),
        ("Step 1: \nStep 2: b", "Step 3: c", "with a blank step"),
        (["a", " "], "Step 3: c", "with a blank step"),
        ("Step 1: a", "Step 2: \n", "with a blank step"),
    ],
)
def test_seed_rows_whose_steps_are_unclear_are_dropped(tmp_path, previous, now, reason):
    found, counts = labelled(
        write(tmp_path / "seed.jsonl", seed(), seed(previous_steps=previous, now_step=now))
    )
    assert len(found) == 1 and counts == {f"dropped row: {reason}": 1}


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"expert_judge": "positive"}, "'expert-judge': 'positive'"),
        ({"expert_judge": True}, "'expert-judge'"),
        ({"query": ""}, "'query' is empty"),
        ({"now_step": " "}, "'now-step' is empty"),
        ({"now_step": 3}, "'now-step'"),
        ({"previous_steps": [1]}, "'previous-steps'"),
        ({"previous_steps": {"a": 1}}, "'previous-steps'"),
        ({"now_step": "Step 3: "}, "'now-step'"),
    ],
)
def test_a_bad_seed_row_names_file_line_and_field(tmp_path, changes, said):
    path = write(tmp_path / "seed.jsonl", seed(), seed(**changes))
    message = refused(path)
    assert message.startswith(f"{path}:2: field ") and said in message


def test_a_seed_row_without_its_judge(tmp_path):
    row = seed()
    del row["expert-judge"]
    assert "seed.jsonl:1: field 'expert-judge' is missing" in refused(write(tmp_path / "seed.jsonl", row))


# ------------------------------------------------------------------------------------ R-PRM's evaluation rows

FIRST = "Since the Now Step is the first step, there are no Previous Steps."


def evaluation(previous=FIRST, now="Step 1: It is 2.", label=-1, **changes) -> dict:
    return {
        "id": 7,
        "origin_id": "gsm8k-0",
        "question": "1+1?",
        "previous_steps": previous,
        "now_step": now,
        "label": label,
    } | changes


def test_evaluation_rows(tmp_path):
    """The label is the solution's first wrong step.

    This step is wrong if it is that one, and right before it.
    """
    second = evaluation("Step 1: It is 2.", "Step 2: So 2.")
    assert read_one(tmp_path, second) == ([("1", Case("1+1?", ("It is 2.",), "So 2.", True))], Counter())
    assert read_one(tmp_path, second | {"label": 1})[0] == [
        ("1", Case("1+1?", ("It is 2.",), "So 2.", False))
    ]
    assert read_one(tmp_path, second | {"label": 2.0})[0] == [
        ("1", Case("1+1?", ("It is 2.",), "So 2.", True))
    ]
    assert read_one(tmp_path, second | {"label": 0}) == (
        [],
        Counter({"dropped: step after the first wrong one": 1}),
    )
    assert read_one(tmp_path, evaluation(label=0))[0] == [("0", Case("1+1?", (), "It is 2.", False))]
    path = write(tmp_path / "x.json", [evaluation(), second])
    assert [f"{name}-{step}" for name, found in labelled(path)[0] for step, _ in found] == [
        "gsm8k-0-0",
        "gsm8k-0-1",
    ]


@pytest.mark.parametrize(
    "row, said",
    [
        (evaluation(label=-2), "'label': -2 is out of range"),
        (evaluation(label=None), "'label' is missing"),
        (evaluation(label="1"), "'label'"),
        (evaluation(now="Step 2: So 2."), "'now_step': 'Step 2:' stands where step 1 is expected"),
        (evaluation(question=" "), "'question' is empty"),
        (evaluation(question=5), "'question'"),
        (evaluation("It is 2.", "Step 2: So"), "'previous_steps': does not begin with 'Step 1:'"),
    ],
)
def test_a_bad_evaluation_row_names_file_line_and_field(tmp_path, row, said):
    path = write(tmp_path / "x.jsonl", evaluation(), row)
    assert (message := refused(path)).startswith(f"{path}:2: field ") and said in message


def test_evaluation_rows_of_one_origin_are_a_solution(tmp_path):
    """In any order and among others.

    Each step's text is its own row's, with lines of its own that look like steps.
    """
    steps = ["Plan:\nStep 1: add\nStep 2: multiply", "So 5.", "Done."]
    texts = [f"Step {n}: {step}" for n, step in enumerate(steps, 1)]
    rows = [evaluation("\n".join(texts[:i]) or FIRST, texts[i], 1.0) for i in range(3)]
    other = evaluation(FIRST, "Step 1: x", -1, origin_id="b", question="Q")
    solutions = read_solutions(write(tmp_path / "x.json", [rows[1], other, rows[0], rows[2]]))
    assert len(solutions) == 2
    assert list(solutions) == [
        (f"{tmp_path}/x.json: row 1", Solution("gsm8k-0", "1+1?", tuple(steps), 1)),
        (f"{tmp_path}/x.json: row 2", Solution("b", "Q", ("x",), -1)),
    ]
    for row in rows:
        row["label"] = None
    assert read_solutions(write(tmp_path / "y.json", rows))[0][1].label is None


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda rows: rows.pop(1), "y.jsonl:1: field 'origin_id': step 2 of 'gsm8k-0' is missing"),
        (lambda rows: rows.append(rows[1]), "y.jsonl:4: field 'now_step': step 2 of 'gsm8k-0' stands in"),
        (lambda rows: rows[2].update(label=0), "y.jsonl:3: field 'label' is not that of"),
        (lambda rows: rows[2].update(question="2+2?"), "y.jsonl:3: field 'question' is not that of"),
        (
            lambda rows: rows[2].update(previous_steps="Step 1: a\nStep 2: another"),
            "y.jsonl:3: field 'previous_steps' does not have the steps",
        ),
        (lambda rows: [row.update(label=3) for row in rows], "field 'label': 3 is out of range (-1 to 2)"),
        (lambda rows: rows[2].update(now_step="Step 3: "), "field 'now_step': needs at least one step"),
        (lambda rows: rows.append(bench()), "y.jsonl:4: is no step with an origin_id"),
    ],
)
def test_steps_that_make_no_solution(tmp_path, change, said):
    texts = ["Step 1: a", "Step 2: b", "Step 3: c"]
    rows = [evaluation("\n".join(texts[:i]) or FIRST, texts[i], 1) for i in range(3)]
    assert read_solutions(write(tmp_path / "x.jsonl", *rows))[0][1].steps == ("a", "b", "c")
    change(rows)
    with pytest.raises(BadInput) as error:
        list(read_solutions(write(tmp_path / "y.jsonl", *rows)))
    assert said in str(error.value)


@pytest.mark.parametrize("rows", [[bench(2), bench()], []])
def test_solutions_of_other_formats(tmp_path, rows):
    solutions = read_solutions(write(tmp_path / "x.jsonl", *rows))
    assert len(solutions) == len(rows) and list(solutions) == [
        (where, read_solution(row, where)) for where, row in solutions.rows
    ]


# --------------------------------------------------------------------------------------- TRL, OpenR, PRMBench


def trl(labels=(True, True, False, True), steps=("a", "b", "c", "d"), **changes) -> dict:
    return {"prompt": "P", "completions": list(steps), "labels": list(labels)} | changes


def aps(labels="++-", process="Step 1: a\n\n\n\n\nStep 2: b\n\n\n\n\nStep 3: c\n\n\n\n\n", **changes) -> dict:
    return {"question": "P", "process": process, "label": list(labels)} | changes


def prmbench(wrong=(3, 4), steps=("a", "b", "c", "d"), **changes) -> dict:
    return {
        "original_question": "O",
        "modified_question": "P",
        "original_process": ["o"],
        "modified_process": list(steps),
        "modified_steps": [3],
        "error_steps": list(wrong),
        "reason": "r",
        "idx": "p1_0",
        "question": "O",
        "classification": "circular",
    } | changes


UNTIL_C = [
    ("0", Case("P", (), "a", True)),
    ("1", Case("P", ("a",), "b", True)),
    ("2", Case("P", ("a", "b"), "c", False)),
]


@pytest.mark.parametrize(
    "row, after",
    [
        (trl(), 1),
        (trl((1, 1, 0, 1)), 1),
        (trl((1.0, 1.0, 0.0, 1.0)), 1),
        (trl(steps=["Step 1: a", "Step 2: b\n", " Step 3: c", "Step 4: d"]), 1),
        (trl((True, True, False), "abc"), 0),
        (aps(), 0),
        (aps("++-+", "a ки\nb ки\nc ки\nd ки"), 1),
        (aps("++-+", "a\n\n\n\n\nb\n\n\n\n\nc\n\n\n\n\nd"), 1),
        (aps([1, 1, 0]), 0),
        (aps(["+", " + ", "-"]), 0),
        (aps(process="Step 1: a ки\nStep 2: b ки\nStep 3: c ки"), 0),
        (prmbench(), 1),
        (prmbench([4.0, 3.0]), 1),
        (prmbench([3], "abc"), 0),
    ],
)
def test_solutions_with_a_wrong_step(tmp_path, row, after):
    found, counts = read_one(tmp_path, row)
    assert found == UNTIL_C and counts == (
        {"dropped: step after the first wrong one": after} if after else {}
    )
    solution = read_solution(row, "f:1")
    assert (solution.problem, solution.steps[:3], solution.label) == ("P", ("a", "b", "c"), 2) and len(
        solution.steps
    ) == 3 + after


@pytest.mark.parametrize("row", [trl([True] * 4), aps("++++", "a ки b ки c ки d ки"), prmbench([])])
def test_solutions_without_a_wrong_step(tmp_path, row):
    found, counts = read_one(tmp_path, row)
    assert (
        [case.label for _, case in found] == [True] * 4
        and not counts
        and read_solution(row, "f:1").label == -1
    )


def test_a_steps_own_numbered_lines_are_no_steps(tmp_path):
    found, _ = read_one(
        tmp_path, trl([True, True], ["Step 1: Plan:\nStep 1: add\nStep 2: multiply", "Step 2: so"])
    )
    assert found[1][1].previous_steps == ("Plan:\nStep 1: add\nStep 2: multiply",)


def test_text_after_openrs_last_tag(tmp_path):
    found, counts = read_one(tmp_path, aps(process=aps()["process"] + "The answer is 7."))
    assert found == UNTIL_C and counts == {"dropped: text after the last tag": 1}


def test_prmbench_error_steps_beyond_the_last_step(tmp_path):
    """Ignored and counted; where no other is named, nothing is known of the steps that are there."""
    assert read_one(tmp_path, prmbench([3, 5, 9], "abc")) == (
        UNTIL_C,
        Counter({"ignored: error step beyond the last step": 2}),
    )
    assert read_solution(prmbench([5], "abc"), "f:1").label is None
    found, counts = labelled(write(tmp_path / "x.jsonl", prmbench(), prmbench([5], "abc")))
    assert len(found) == 1 and counts["dropped row: without a label"] == 1
    assert read_solution(prmbench() | {"error_steps": None}, "f:1").label is None


def test_prmbench_names(tmp_path):
    """idx is the same in every class."""
    path = write(tmp_path / "x.jsonl", prmbench(), prmbench(classification="deception"))
    assert [name for name, _ in labelled(path)[0]] == ["circular-p1_0", "deception-p1_0"]


@pytest.mark.parametrize(
    "row, reason",
    [
        (trl([True]), "with another number of labels than of steps"),
        (trl(labels=[]), "with another number of labels than of steps"),
        (trl([True, None], "ab"), "of another shape"),
        (trl([True, "no"], "ab"), "of another shape"),
        (trl([True, 2], "ab"), "of another shape"),
        (trl([], []), "without steps"),
        (trl([True, True], ["a", " "]), "with a blank step"),
        (trl([True], [7]), "of another shape"),
        (trl([True, True], ["Step 1: a", "Step 3: b"]), "with step numbers that do not fit"),
        (trl(prompt=" "), "with a blank prompt"),
        (trl(prompt=[{"role": "user", "content": "P"}]), "of another shape"),
        (aps("++"), "with another number of labels than of steps"),
        (aps("++x"), "of another shape"),
        (aps("++", "Step 1: a ки\nStep 2: b\nStep 3: c ки"), "two steps in one piece (a tag is missing)"),
        (aps("+++", "a ки ки c ки"), "with a blank step"),
        (aps(question=""), "with a blank question"),
        (aps(process=None), "of another shape"),
        (prmbench([0]), "label out of range"),
        (prmbench(["3"]), "of another shape"),
        (prmbench([1.5]), "of another shape"),
        (prmbench([], []), "without steps"),
        (prmbench(modified_question=" "), "with a blank modified_question"),
        (prmbench([1], ["a", ""]), "with a blank step"),
    ],
)
def test_rows_with_a_defect_are_dropped(tmp_path, row, reason):
    found, counts = labelled(write(tmp_path / "x.jsonl", bench(steps=["a"]), row))
    assert len(found) == 1 and counts == {f"dropped row: {reason}": 1}
    with pytest.raises(BadInput, match=r"^f:1: field "):
        read_solution(row, "f:1")


def test_single_steps_are_no_solutions():
    for row in (seed(), evaluation(), prm(step(completion("a", 1)))):
        with pytest.raises(BadInput, match=r"^f:1: is no whole solution"):
            read_solution(row, "f:1")


# ---------------------------------------------------------------------------- formats told apart, and our own

ONE_OF_EACH = [
    (bench(), readers.processbench),
    (prm(step(completion("a", 1))), readers.prm800k),
    (shepherd("+++"), readers.math_shepherd),
    (seed(), readers.seed_row),
    (evaluation(), readers.evaluation_row),
    (trl(), readers.stepwise),
    (aps(), readers.openr),
    (prmbench(), readers.prmbench),
]


@pytest.mark.parametrize("row, reader", ONE_OF_EACH)
def test_formats_are_told_apart_by_their_fields(row, reader):
    """Also where all columns of all formats stand in each row, and most are null."""
    assert readers.choose_reader(row, "f:1") is reader
    columns = dict.fromkeys(name for other, _ in ONE_OF_EACH for name in other)
    assert readers.choose_reader(columns | row, "f:1") is reader


def test_rows_of_several_formats_in_one_file(tmp_path):
    found, counts = labelled(write(tmp_path / "x.jsonl", *(row for row, _ in ONE_OF_EACH)))
    assert [len(steps) for _, steps in found] == [3, 1, 3, 1, 1, 3, 3, 3]
    assert counts == {"dropped: step after the first wrong one": 2}


@pytest.mark.parametrize(
    "name, shown", [("a", "a"), (3, "3"), (3.0, "3"), (0, "0"), (None, "x.jsonl:1"), (1.5, "1.5")]
)
def test_the_names_of_rows(tmp_path, name, shown):
    assert labelled(write(tmp_path / "x.jsonl", bench(id=name)))[0][0][0] == shown


@pytest.mark.parametrize("label", [1, 1.0])
def test_a_whole_number_may_be_a_float(tmp_path, label):
    assert read_solution(bench(label), "f:1").label == 1 and len(read_one(tmp_path, bench(label))[0]) == 2


def test_an_unknown_format_and_a_changed_one(tmp_path):
    path = write(tmp_path / "x.jsonl", {"prompt": "a", "completion": "b"})
    assert "x.jsonl:1: fields prompt, completion are no known format" in refused(path)
    assert "x.jsonl:2: fields prompt, completion are no known format" in refused(
        write(tmp_path / "x.jsonl", bench(), {"prompt": "a", "completion": "b"})
    )


def test_read_case():
    row = {"id": "x", "problem": "P", "previous_steps": ["a"], "now_step": "b", "label": False}
    assert read_case(row, "f:1") == Case("P", ("a",), "b", False)
    assert read_case(row | {"label": None}, "f:1").label is None
    for changes, said in (
        ({"label": 0}, "'label'"),
        ({"label": "true"}, "'label'"),
        ({"previous_steps": "a"}, "'previous_steps'"),
        ({"previous_steps": [None]}, "'previous_steps'"),
        ({"problem": ""}, "'problem' is empty"),
        ({"now_step": " "}, "'now_step' is empty"),
    ):
        with pytest.raises(BadInput, match=f"^f:1: field {said}"):
            read_case(row | changes, "f:1")
    for name in ("problem", "previous_steps", "now_step"):
        with pytest.raises(BadInput, match=f"^f:1: field '{name}' is missing"):
            read_case({k: v for k, v in row.items() if k != name}, "f:1")


# ---------------------------------------------------------------------------------------------- hostile rows


@pytest.mark.parametrize(
    "hostile",
    [
        {"problem": "p", "steps": ["s"] * 1001, "label": -1},
        {
            "question": {"problem": "p"},
            "label": {
                "steps": [{"completions": [{"text": "s", "rating": 1}], "chosen_completion": 0}] * 1001
            },
        },
        {"input": "p Step 1:" + " s ки" * 1001, "label": "p Step 1:" + " s +" * 1001},
    ],
)
def test_a_solution_of_a_thousand_steps_and_no_more(tmp_path, hostile):
    """n steps make n cases that hold n²/2 steps.

    A line of a megabyte would fill the memory and then the disk.
    """
    assert (
        "rows.jsonl:1: " in (message := refused(write(tmp_path / "rows.jsonl", hostile)))
        and "1001 steps, more than 1000" in message
    )


def test_blank_lines_in_seed_rows_take_no_longer(tmp_path):
    """White space before "Step 2:" was looked for from each of its newlines anew.

    200,000 would have taken an hour.
    """
    row = {
        "id": "a",
        "query": "q",
        "previous-steps": "Step 1: a\n \n" + "\n" * 200_000 + "  Step 2: b",
        "now-step": "c",
        "expert-judge": "Positive",
    }
    [(_, case)], _ = read_one(tmp_path, row)
    assert case.previous_steps == ("a", "b")
