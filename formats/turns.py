"""Rows to train on, in the formats that people bring. Each is one turn: a user's message and an answer to it.

    SFT     {"prompt", "response"}                            ours
            {"instruction", "output"}                         R-PRM's official files
            {"instruction", "input", "output"}                Alpaca: instruction, newline, input
            {"messages": [{"role", "content"}, ...]}          chat messages
            {"prompt": [{"role", ...}], "completion": [...]}  chat messages, cut in two (TRL)
            {"conversations": [{"from", "value"}, ...]}       ShareGPT
            {"text"}                                          a plain text, which answers nothing
    pairs   {"prompt", "chosen", "rejected"}                  ours
            {"instruction", "chosen", "rejected"}             R-PRM's official files; Alpaca, with "input"
            {"chosen": [...], "rejected": [...]}              chat messages, each with the prompt in it

A message may stand for a text, and a list of messages for a message. A system message may stand before the
user's, or in the row's "system". What cannot be trained on as it is meant is a BadInput that names it: a
second turn, a tool, an image, a message with a weight of 0.
"""
import json
from dataclasses import dataclass
from typing import Any

from plumbing.errors import BadInput
from plumbing.files import expect, get_field

# the fields of a row; the last one, or the last two of a pair, hold what is learned from
SFT_FORMATS = (
    ("prompt", "response"),
    ("instruction", "output"),
    ("prompt", "completion"),
    ("messages",),
    ("conversations",),
    ("text",),
)
PAIR_FORMATS = (
    ("prompt", "chosen", "rejected"),
    ("instruction", "chosen", "rejected"),
    ("conversations", "chosen", "rejected"),
    ("chosen", "rejected"),
)
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}

# fields that have a meaning in one of these formats, and none here
UNUSED_IN_ROWS = ("history", "tools", "functions", "images", "videos", "audios", "chat_template_kwargs")
UNUSED_IN_MESSAGES = (
    "tool_calls", "function_call", "tool_call_id", "reasoning_content", "thinking", "weight", "train")
EMPTY = (None, "", [], {})
HARMLESS = (*EMPTY, "[]", True, 1)  # what an unused field may hold: all messages have a weight of 1


@dataclass(frozen=True)
class Turn:
    """What is asked, and the responses to learn from: one (SFT), or chosen and rejected (a pair)."""
    prompt: str | None  # None: a plain text, before which nothing stands
    responses: tuple[str, ...]
    system: str | None = None


@dataclass(frozen=True)
class Message:
    role: str  # "system", "user" or "assistant"
    text: str


def read_example(row: dict, where: str) -> Turn:
    """The turn of an SFT row. Raises BadInput with the field's name."""
    names = format_of(row, SFT_FORMATS, where)
    if names == ("text",):
        refuse_unused(row, UNUSED_IN_ROWS, where)
        return Turn(None, (get_field(row, "text", str, where),))
    if "completion" in names and isinstance(row["completion"], str):
        raise BadInput(f"{where}: field 'completion': a text there goes on with the prompt's, and no chat "
                       "template stands between them; name the field 'response' if it answers the prompt")
    return read_turn(row, names[:-1], names[-1:], where)


def read_pair(row: dict, where: str) -> Turn:
    """The turn of a row with a chosen and a rejected response. Raises BadInput with the field's name."""
    names = format_of(row, PAIR_FORMATS, where)
    return read_turn(row, names[:-2], names[-2:], where)


def format_of(row: dict, formats: tuple[tuple[str, ...], ...], where: str) -> tuple[str, ...]:
    """The first format of which the row has all fields; if there is none, BadInput names what is missing.

    In a table of several formats (parquet) a row has all fields, and those that are not its own are null.
    """
    for names in formats:
        if all(row.get(name) is not None for name in names):
            return names
    begun = next((names for names in formats if names[0] in row), formats[0])
    missing = [name for name in begun if row.get(name) is None]
    return get_field(row, missing[0], str, where)  # raises


def read_turn(row: dict, asked: tuple[str, ...], answers: tuple[str, ...], where: str) -> Turn:
    """The turn whose prompt is in the fields `asked` (one or none) and whose responses are in `answers`."""
    refuse_unused(row, UNUSED_IN_ROWS, where)
    if "instruction" not in asked:
        refuse_unused(row, ("input",), where)
    before = []
    if row.get("system") not in EMPTY:
        before.append(Message("system", get_field(row, "system", str, where)))
    for name in asked:
        before += read_messages(row, name, "user", where)
    questions = []
    responses = []
    for name in answers:
        after = read_messages(row, name, "assistant", where)
        *question, answer = one_turn(before, after, f"{where}: field '{name}'")
        questions.append(question)
        responses.append(answer.text)
    if questions[0] != questions[-1]:
        raise BadInput(f"{where}: fields '{answers[0]}' and '{answers[-1]}' answer different prompts; "
                       "pair the answers to one prompt")
    texts = {message.role: message.text for message in questions[0]}
    return Turn(texts["user"], tuple(responses), texts.get("system"))


def one_turn(before: list[Message], after: list[Message], where: str) -> list[Message]:
    """The messages of a prompt and its answer: perhaps a system message, the user's, the assistant's.

    In some files the answer's field holds the whole conversation, with what stands in the prompt's field.
    """
    whole = after if all(message in after for message in before) else before + after
    roles = [message.role for message in whole]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise BadInput(f"{where}: expected one turn, a user's message and an answer, perhaps after a system "
                       f"message; found {', '.join(roles) or 'nothing'}; "
                       "make a row of each turn, or leave this one out")
    return whole


def read_messages(row: dict, name: str, role: str, where: str) -> list[Message]:
    """The messages in a field: a list of them, one, or a text, which is a message of `role`."""
    value = row[name]
    where_field = f"{where}: field '{name}'"
    if isinstance(value, list):
        return [read_message(item, f"{where_field}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict):
        return [read_message(value, where_field)]
    text = expect(value, str, where_field)
    if name == "instruction" and row.get("input") not in EMPTY:
        details = get_field(row, "input", str, where)
        text = f"{text}\n{details}" if text else details
    return [Message(role, text)]


def read_message(value: Any, where: str) -> Message:
    """{"role", "content"}, or ShareGPT's {"from", "value"}."""
    expect(value, dict, where)
    refuse_unused(value, UNUSED_IN_MESSAGES, where)
    role_field, text_field = ("from", "value") if "from" in value else ("role", "content")
    role = get_field(value, role_field, str, where)
    if role not in ROLES:
        raise BadInput(f"{where}: the role {role[:40]!r} is not implemented (only {', '.join(ROLES)}); "
                       "leave the row out")
    return Message(ROLES[role], get_field(value, text_field, str, where))


def refuse_unused(row: dict, names: tuple[str, ...], where: str) -> None:
    """BadInput where a field says something that would not be heeded."""
    for name in names:
        if row.get(name) not in HARMLESS:
            raise BadInput(f"{where}: field '{name}' ({json.dumps(row[name])[:40]}) is not used here; "
                           "leave the row out, or the field if it does not matter")
