"""The formats in the wild, on small rows made by hand, and ProcessBench itself where it is at hand."""
import json
from collections import Counter

import pytest

from formats import readers
from plumbing.errors import BadInput
from formats.readers import Solution, read_case, read_labelled_steps, read_rows, read_solution
from rprm import Case


def write(path, *rows, indent=None):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r, ensure_ascii=False, indent=indent) for r in rows),
                    encoding="utf-8")
    return path


def labelled(path) -> tuple[list, Counter]:
    counts = Counter()
    return list(read_labelled_steps(path, counts)), +counts


def read_one(tmp_path, row) -> tuple[list, Counter]:
    """The labelled steps of a file of one row."""
    [(_, found)], counts = labelled(write(tmp_path / "rows.jsonl", row))
    return found, counts


def refused(path) -> str:
    with pytest.raises(BadInput) as error:
        labelled(path)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------- files

A, B = {"id": "a", "x": 1}, {"id": "b", "x": [2, {"y": "ü\u2028"}]}


@pytest.mark.parametrize("text, places", [
    (json.dumps([A, B]), ["row 1", "row 2"]), (json.dumps([A, B], indent=2), ["row 1", "row 2"]),
    ("\n\n  [\n" + json.dumps(A) + ",\n" + json.dumps(B) + "]\n", ["row 1", "row 2"]),
    (json.dumps(A) + "\n" + json.dumps(B, ensure_ascii=False) + "\n", ["1", "2"]),
    (f"\n{json.dumps(A)}\r\n\n \n{json.dumps(B)}", ["2", "5"]),
    (json.dumps(B), ["1"]), (json.dumps(B, indent=2), ["row 1"]), ("[]", []), ("", []), ("\n\n", []),
])
def test_an_array_lines_or_a_single_object(tmp_path, text, places):
    """The same rows, each with the place that an error will name."""
    path = tmp_path / "rows.json"
    path.write_bytes(text.encode())
    rows = list(read_rows(path))
    assert [row for _, row in rows] == ([A, B] if len(places) == 2 else [B] * len(places))
    assert [where for where, _ in rows] == [f"{path}: {place}" if "row" in place else f"{path}:{place}" for place in places]


@pytest.mark.parametrize("text, said", [
    ("[{}, 7]", "row 2: expected an object, found 7"), ("[{}\n", ": not valid JSON"), ('{"a": 1}\n{"a": \n', ":2: not valid JSON"),
    ('{"a": 1}\n[1]', ":2: expected an object"), ("7", ":1: expected an object"), ('{\n"a": 1', ": not valid JSON"),
    ("hello", ":1: not valid JSON"),
])
def test_a_file_that_is_no_rows_names_the_place(tmp_path, text, said):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(BadInput) as error:
        list(read_rows(path))
    assert str(error.value).startswith(str(path)) and said in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BadInput, match="absent.json: no such file"):
        list(read_rows(tmp_path / "absent.json"))


# ---------------------------------------------------------------------------------------------- ProcessBench

def bench(label=-1, steps=("one", "two", "three"), **changes) -> dict:
    return {"id": "gsm8k-7", "generator": "m", "problem": "P", "steps": list(steps), "final_answer_correct": True, "label": label} | changes


def test_processbench_steps_up_to_the_first_wrong_one(tmp_path):
    cases = [Case("P", (), "one", True), Case("P", ("one",), "two", True), Case("P", ("one", "two"), "three", True)]
    assert read_one(tmp_path, bench(-1)) == ([("0", cases[0]), ("1", cases[1]), ("2", cases[2])], Counter())
    wrong = Case("P", ("one",), "two", False)
    assert read_one(tmp_path, bench(1)) == ([("0", cases[0]), ("1", wrong)], Counter({"dropped: step after the first wrong one": 1}))
    assert read_one(tmp_path, bench(0)) == ([("0", Case("P", (), "one", False))], Counter({"dropped: step after the first wrong one": 2}))
    assert read_one(tmp_path, bench(2)) == ([("0", cases[0]), ("1", cases[1]), ("2", Case("P", ("one", "two"), "three", False))], Counter())


def test_names_of_rows(tmp_path):
    """The row's id, else its file and place."""
    no_id = {k: v for k, v in bench().items() if k != "id"}
    assert [name for name, _ in labelled(write(tmp_path / "x.jsonl", bench(), no_id, bench(id=5)))[0]] == ["gsm8k-7", "x.jsonl:2", "5"]
    assert [name for name, _ in labelled(write(tmp_path / "y.json", [bench(), no_id]))[0]] == ["gsm8k-7", "y.json:2"]


def test_a_solution_to_score_needs_no_label():
    row = bench()
    del row["label"]
    expected = Solution("gsm8k-7", "P", ("one", "two", "three"), None)
    assert read_solution(row, "f:1") == read_solution(row | {"label": None}, "f:1") == expected
    assert read_solution(bench(2), "f:1").label == 2


BAD_SOLUTIONS = {
    "no steps": (bench(steps=()), "'steps'"), "an empty step": (bench(steps=("one", " \n")), "'steps'"),
    "a step that is no text": (bench() | {"steps": ["one", 2]}, "'steps'"), "steps in one text": (bench() | {"steps": "one"}, "'steps'"),
    "label too high": (bench(3), "'label': 3 is out of range (-1 to 2)"), "label too low": (bench(-2), "'label': -2 is out of range"),
    "label a text": (bench("1"), "'label'"), "label true": (bench(True), "'label'"), "label a fraction": (bench(0.5), "'label'"),
    "empty problem": (bench(problem=" "), "'problem' is empty"), "problem no text": (bench(problem=None), "'problem'"),
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
    return {"question": {"problem": "P", "ground_truth_answer": "7"}, "label": {"steps": list(steps), "finish_reason": "solution"},
            "is_quality_control_question": False, "is_initial_screening_question": False} | changes


def step(*completions, chosen=None, human=None) -> dict:
    return {"completions": list(completions), "chosen_completion": chosen, "human_completion": human}


def test_prm800k_every_rated_completion_is_a_case(tmp_path):
    """Phase 2: several completions a step; the previous steps are the chosen ones, a neutral one among them."""
    found, counts = read_one(tmp_path, prm(
        step(completion("a0", -1), completion("a1", 1), completion("a2", 0), chosen=1),
        step(completion("b0", 0), completion("b1", -1), chosen=0),
        step(completion("c0", 1), chosen=0)))
    assert found == [("0-0", Case("P", (), "a0", False)), ("0-1", Case("P", (), "a1", True)), ("1-1", Case("P", ("a1",), "b1", False)),
                     ("2-0", Case("P", ("a1", "b0"), "c0", True))]
    assert counts == {"dropped: neutral step": 2}


def test_prm800k_a_human_completion_continues_the_solution(tmp_path):
    """Phase 1: a step that a person wrote, as a text or as an object, is a previous step and no case."""
    for human in ("by hand", {"text": "by hand", "rating": None}):
        found, counts = read_one(tmp_path, prm(step(completion("a", -1), human=human), step(completion("b", 1), chosen=0),
                                               step(human=human), step(completion("c", -1))))
        assert found == [("0-0", Case("P", (), "a", False)), ("1-0", Case("P", ("by hand",), "b", True)),
                         ("3-0", Case("P", ("by hand", "b", "by hand"), "c", False))] and not counts


def test_prm800k_ratings_that_are_null_or_missing(tmp_path):
    found, counts = read_one(tmp_path, prm(step(completion("a", None), {"text": "b"}, completion(" ", 1), completion("c", 1), chosen=0)))
    assert found == [("0-3", Case("P", (), "c", True))]
    assert counts == {"dropped: step without a rating": 3}


def test_prm800k_ends_where_nothing_is_chosen(tmp_path):
    """What comes after a step without a chosen completion has no known previous steps; null completions are none."""
    found, _ = read_one(tmp_path, prm(step(completion("a", 1)), step(completion("b", 1), chosen=0)))
    assert found == [("0-0", Case("P", (), "a", True))]
    assert read_one(tmp_path, prm({"completions": None, "chosen_completion": None, "human_completion": None}))[0] == []


@pytest.mark.parametrize("name, reason", [("is_quality_control_question", "quality control"),
                                          ("is_initial_screening_question", "screening")])
def test_prm800k_rows_that_are_dropped(tmp_path, name, reason):
    assert read_one(tmp_path, prm(step(completion("a", 1), chosen=0), **{name: True})) == ([], Counter({f"dropped: {reason} row": 1}))


BAD_PRM = {
    "rating 2": (prm(step(completion("a", 2))), "field 'label.steps'[0].completions[0]: field 'rating': 2"),
    "rating a text": (prm(step(completion("a", "1"))), "'rating': '1'"),
    "rating true": (prm(step(completion("a", True))), "'rating': True"),
    "chosen too high": (prm(step(completion("a", 1), chosen=1)), "[0]: field 'chosen_completion': 1 is out of range (0 to 0)"),
    "chosen negative": (prm(step(completion("a", 1), chosen=-1)), "'chosen_completion': -1"),
    "chosen a text": (prm(step(completion("a", 1), chosen="0")), "'chosen_completion': '0'"),
    "chosen of nothing": (prm(step(chosen=0)), "'chosen_completion'"),
    "no text": (prm(step(completion("a", 1), {"rating": 1}, chosen=0)), "completions[1]: field 'text' is missing"),
    "text null": (prm(step(completion(None, 1))), "field 'text'"), "human a number": (prm(step(human=7)), "[0]: field 'human_completion'"),
    "human without text": (prm(step(human={"rating": 1})), "'human_completion'"), "a step a text": (prm("a"), "field 'label.steps'[0]"),
    "completions an object": (prm({"completions": {"text": "a"}}), "completions"),
    "no steps": (prm() | {"label": {}}, "field 'steps' is missing"),
    "label a number": (prm() | {"label": 1}, "'label'"), "empty problem": (prm() | {"question": {"problem": ""}}, "'problem' is empty"),
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
    assert read_one(tmp_path, shepherd("+--")) == (right[:1] + [("1", Case(problem, steps[:1], steps[1], False))],
                                                   Counter({"dropped: step after the first wrong one": 1}))


def test_math_shepherd_signs_of_arithmetic_are_no_labels(tmp_path):
    """Only the character in a tag's place counts: + and - in the text do not."""
    text = "Is 3 - 4 + 5 = 4? Step 1: 3 - 4 = -1 ки\nStep 2: -1 + 5 = 4 ки"
    found, _ = read_one(tmp_path, shepherd("-+", text))
    assert found == [("0", Case("Is 3 - 4 + 5 = 4?", (), "3 - 4 = -1", False))]


BAD_SHEPHERD = {
    "no tags": (shepherd("", "P Step 1: a") , "'input'"), "no first step": (shepherd("+", "P a ки"), "'input'"),
    "no problem": (shepherd("+", "Step 1: a ки"), "'input'"), "an empty step": (shepherd("++", "P Step 1: a ки\nStep 2: ки"), "'input'"),
    "another sign": (shepherd("+x+"), "'label'"), "a tag left": (shepherd("+"), "'label'"),
    "another text": (shepherd("+++") | {"label": "Q + - +"}, "'label'"),
    "a letter changed": (shepherd("+++") | {"label": shepherd("+++")["label"].replace("buys", "pays")}, "'label'"),
    "label too short": (shepherd("+++") | {"label": shepherd("+++")["label"][:-1]}, "'label'"),
    "label a list": (shepherd("+++") | {"label": [1, 1, 0]}, "'label'"), "input null": (shepherd("+++") | {"input": None}, "'input'"),
}


@pytest.mark.parametrize("kind", BAD_SHEPHERD)
def test_a_bad_math_shepherd_row_names_file_line_and_field(tmp_path, kind):
    row, said = BAD_SHEPHERD[kind]
    path = write(tmp_path / "shepherd.jsonl", shepherd("++-"), row)
    message = refused(path)
    assert message.startswith(f"{path}:2: field ") and said in message


# ---------------------------------------------------------------------------------------------- the official seed rows

def seed(**changes) -> dict:
    row = {"id": 3, "query": "P", "previous-steps": "Step 1: a\nStep 2: b\nstill b", "now-step": "Step 3: c", "expert-judge": "Positive"}
    return row | {name.replace("_", "-"): value for name, value in changes.items()}


def test_seed_rows(tmp_path):
    assert read_one(tmp_path, seed()) == ([("0", Case("P", ("a", "b\nstill b"), "c", True))], Counter())
    assert read_one(tmp_path, seed(expert_judge="Negative", now_step="c"))[0] == [("0", Case("P", ("a", "b\nstill b"), "c", False))]
    for nothing in ("", None, []):
        assert read_one(tmp_path, seed(previous_steps=nothing))[0] == [("0", Case("P", (), "c", True))]
    assert read_one(tmp_path, seed(previous_steps=["a", "b"]))[0] == [("0", Case("P", ("a", "b"), "c", True))]


@pytest.mark.parametrize("changes, said", [
    ({"expert_judge": "positive"}, "'expert-judge': 'positive'"), ({"expert_judge": True}, "'expert-judge'"),
    ({"query": ""}, "'query' is empty"),
    ({"now_step": " "}, "'now-step' is empty"), ({"now_step": 3}, "'now-step'"), ({"previous_steps": [1]}, "'previous-steps'"),
    ({"previous_steps": {"a": 1}}, "'previous-steps'"), ({"now_step": "Step 3: "}, "'now-step'"),
])
def test_a_bad_seed_row_names_file_line_and_field(tmp_path, changes, said):
    path = write(tmp_path / "seed.jsonl", seed(), seed(**changes))
    message = refused(path)
    assert message.startswith(f"{path}:2: field ") and said in message


def test_a_seed_row_without_its_judge(tmp_path):
    row = seed()
    del row["expert-judge"]
    assert "seed.jsonl:1: field 'expert-judge' is missing" in refused(write(tmp_path / "seed.jsonl", row))


# ---------------------------------------------------------------------------------------------- formats told apart, and our own

@pytest.mark.parametrize("row, reader", [(bench(), readers.processbench), (prm(), readers.prm800k),
                                         (shepherd("+++"), readers.math_shepherd),
                                         (seed(), readers.seed_row)])
def test_formats_are_told_apart_by_their_fields(row, reader):
    assert readers.choose_reader(row, "f:1") is reader


def test_an_unknown_format_and_a_changed_one(tmp_path):
    path = write(tmp_path / "x.jsonl", {"prompt": "a", "completion": "b"})
    assert "x.jsonl:1: fields prompt, completion are no known format" in refused(path)
    assert "x.jsonl:2: field 'steps' is missing" in refused(write(tmp_path / "x.jsonl", bench(), seed()))


def test_read_case():
    row = {"id": "x", "problem": "P", "previous_steps": ["a"], "now_step": "b", "label": False}
    assert read_case(row, "f:1") == Case("P", ("a",), "b", False)
    assert read_case(row | {"label": None}, "f:1").label is None
    for changes, said in (({"label": 0}, "'label'"), ({"label": "true"}, "'label'"), ({"previous_steps": "a"}, "'previous_steps'"),
                          ({"previous_steps": [None]}, "'previous_steps'"), ({"problem": ""}, "'problem' is empty"),
                          ({"now_step": " "}, "'now_step' is empty")):
        with pytest.raises(BadInput, match=f"^f:1: field {said}"):
            read_case(row | changes, "f:1")
    for name in ("problem", "previous_steps", "now_step"):
        with pytest.raises(BadInput, match=f"^f:1: field '{name}' is missing"):
            read_case({k: v for k, v in row.items() if k != name}, "f:1")


# ---------------------------------------------------------------------------------------------- hostile rows

@pytest.mark.parametrize("hostile", [
    {"problem": "p", "steps": ["s"] * 1001, "label": -1},
    {"question": {"problem": "p"}, "label": {"steps": [{"completions": [{"text": "s", "rating": 1}], "chosen_completion": 0}] * 1001}},
    {"input": "p Step 1:" + " s ки" * 1001, "label": "p Step 1:" + " s +" * 1001}])
def test_a_solution_of_a_thousand_steps_and_no_more(tmp_path, hostile):
    """n steps make n cases that hold n²/2 steps: a line of a megabyte would fill the memory and then the disk."""
    assert "rows.jsonl:1: " in (message := refused(write(tmp_path / "rows.jsonl", hostile))) and "1001 steps, more than 1000" in message


def test_blank_lines_in_seed_rows_take_no_longer(tmp_path):
    """White space before "Step 2:" was looked for from each of its newlines anew: 200,000 would have taken an hour."""
    row = {"id": "a", "query": "q", "previous-steps": "Step 1: a\n \n" + "\n" * 200_000 + "  Step 2: b", "now-step": "c",
           "expert-judge": "Positive"}
    [(_, case)], _ = read_one(tmp_path, row)
    assert case.previous_steps == ("a", "b")
