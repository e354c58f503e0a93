"""Rows to train on: each public format is read as what it says, and what cannot be heeded is refused by name."""
import pytest

from formats.turns import Turn, read_example, read_pair
from plumbing.errors import BadInput

USER = {"role": "user", "content": "P"}
ANSWER = {"role": "assistant", "content": "R"}
OTHER = {"role": "assistant", "content": "W"}
SYSTEM = {"role": "system", "content": "S"}
PAIR = {"chosen": [ANSWER], "rejected": [OTHER]}


@pytest.mark.parametrize("row", [
    {"prompt": "P", "response": "R", "problem": "p"},
    {"instruction": "P", "output": "R"},
    {"instruction": "P", "input": "", "output": "R", "history": [], "system": ""},
    {"instruction": "P", "input": None, "output": "R", "text": "Below is an instruction. P R"},
    {"instruction": "", "input": "P", "output": "R"},
    {"messages": [USER, ANSWER]},
    {"prompt": "P", "prompt_id": "0a", "messages": [USER, ANSWER]},
    {"messages": [USER, ANSWER | {"weight": 1}], "tools": "[]", "images": []},
    {"messages": [USER | {"tool_calls": None}, ANSWER | {"reasoning_content": ""}]},
    {"prompt": [USER], "completion": [ANSWER]},
    {"prompt": [USER], "completion": ANSWER},
    {"prompt": [USER], "response": "R"},
    {"conversations": [{"from": "human", "value": "P"}, {"from": "gpt", "value": "R"}]},
    {"conversations": [{"from": "user", "value": "P", "weight": None}, {"from": "assistant", "value": "R"}], "system": ""},
])
def test_one_turn_in_every_format(row):
    assert read_example(row, "f:1") == Turn("P", ("R",))


@pytest.mark.parametrize("row", [
    {"messages": [SYSTEM, USER, ANSWER]},
    {"prompt": [SYSTEM, USER], "completion": [ANSWER]},
    {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "P"}, {"from": "gpt", "value": "R"}]},
    {"conversations": [{"from": "human", "value": "P"}, {"from": "gpt", "value": "R"}], "system": "S"},
    {"instruction": "P", "output": "R", "system": "S"},
    {"prompt": "P", "response": "R", "system": "S"},
])
def test_a_system_message_before_the_turn_or_in_the_row(row):
    assert read_example(row, "f:1") == Turn("P", ("R",), "S")


def test_an_alpaca_prompt_is_the_instruction_a_newline_and_the_input():
    row = {"instruction": "Judge the step.", "input": "Problem: 1 + 1?\nStep: 2", "output": "It is right."}
    assert read_example(row, "f:1") == Turn("Judge the step.\nProblem: 1 + 1?\nStep: 2", ("It is right.",))
    row = {"instruction": "Judge.", "input": "Step: 2", "chosen": "It is right.", "rejected": "It is wrong."}
    assert read_pair(row, "f:1") == Turn("Judge.\nStep: 2", ("It is right.", "It is wrong."))


def test_a_plain_text_answers_nothing():
    assert read_example({"text": "P R"}, "f:1") == Turn(None, ("P R",))


@pytest.mark.parametrize("row", [
    {"prompt": "P", "chosen": "R", "rejected": "W"},
    {"instruction": "P", "chosen": "R", "rejected": "W"},
    {"prompt": [USER]} | PAIR,
    {"prompt": "P"} | PAIR,
    {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
    {"prompt": "P", "chosen": [USER, ANSWER], "rejected": [USER, OTHER], "messages": [USER, ANSWER], "score_chosen": 8.0},
    {"prompt": [USER], "chosen": ANSWER, "rejected": OTHER},
    {"conversations": [{"from": "human", "value": "P"}], "chosen": {"from": "gpt", "value": "R"},
     "rejected": {"from": "gpt", "value": "W"}},
])
def test_one_pair_in_every_format(row):
    assert read_pair(row, "f:1") == Turn("P", ("R", "W"))


@pytest.mark.parametrize("row", [
    {"prompt": [SYSTEM, USER]} | PAIR,
    {"prompt": [USER], "system": "S"} | PAIR,
    {"chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, OTHER]},
])
def test_a_pair_after_a_system_message(row):
    assert read_pair(row, "f:1") == Turn("P", ("R", "W"), "S")


@pytest.mark.parametrize("read, row, said", [
    (read_example, {"messages": [USER, ANSWER, USER, ANSWER]}, "field 'messages': expected one turn, .*found user, assistant, user, assistant"),
    (read_example, {"messages": [USER]}, "field 'messages': expected one turn"),
    (read_example, {"messages": []}, "found nothing"),
    (read_example, {"messages": [ANSWER, USER]}, "found assistant, user"),
    (read_example, {"messages": [SYSTEM, USER, ANSWER], "system": "T"}, "found system, system, user, assistant"),
    (read_example, {"instruction": "P", "output": "R", "history": [["a", "b"]]}, "field 'history'"),
    (read_example, {"messages": [USER, ANSWER], "tools": [{"name": "f"}]}, "field 'tools'"),
    (read_example, {"messages": [USER, ANSWER], "images": ["a.png"]}, "field 'images'"),
    (read_example, {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [1]}]}, r"'messages'\[1\]: field 'tool_calls'"),
    (read_example, {"messages": [USER, ANSWER | {"weight": 0}]}, r"'messages'\[1\]: field 'weight'"),
    (read_example, {"messages": [USER, ANSWER | {"reasoning_content": "hm"}]}, r"field 'reasoning_content'"),
    (read_example, {"messages": [USER, {"role": "tool", "content": "4"}]}, r"'messages'\[1\]: the role 'tool'"),
    (read_example, {"messages": [USER, {"role": "assistant"}]}, r"'messages'\[1\]: field 'content' is missing"),
    (read_example, {"messages": [USER, {"role": "assistant", "content": [{"type": "text"}]}]}, r"'messages'\[1\]: field 'content': expected a text"),
    (read_example, {"messages": ["P", "R"]}, r"field 'messages'\[0\]: expected an object"),
    (read_example, {"prompt": "P", "completion": " R"}, "field 'completion': .*'response'"),
    (read_example, {"prompt": "P", "response": "R", "input": "more"}, "field 'input'"),
    (read_example, {"instruction": "P", "input": 7, "output": "R"}, "field 'input': expected a text"),
    (read_example, {"instruction": "P", "output": "R", "system": True}, "field 'system': expected a text"),
    (read_example, {"text": "t", "images": ["a.png"]}, "field 'images'"),
    (read_example, {"instruction": "P"}, "field 'output' is missing"),
    (read_example, {"problem": "P"}, "field 'prompt' is missing"),
    (read_pair, {"prompt": "P", "chosen": [USER, ANSWER, USER, ANSWER], "rejected": [OTHER]}, "field 'chosen': expected one turn"),
    (read_pair, {"prompt": "Q", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, "found user, user, assistant"),
    (read_pair, {"chosen": [USER, ANSWER], "rejected": [USER | {"content": "Q"}, OTHER]}, "'chosen' and 'rejected' answer different prompts"),
    (read_pair, {"chosen": "R", "rejected": "W"}, "field 'chosen': expected one turn"),
    (read_pair, {"prompt": [USER], "chosen": [ANSWER]}, "field 'rejected' is missing"),
])
def test_what_cannot_be_heeded_is_refused_by_name(read, row, said):
    with pytest.raises(BadInput, match=f"^f:1: .*{said}"):
        read(row, "f:1")
