"""Guided search on a hand-made tree of steps; its policy's steps are those of the model's own answer."""
import json
import sys

import pytest

from conftest import ROOT
from generate import Continuation, Request
from plumbing.errors import BadInput
from plumbing.queues import answers_of
from plumbing.queues import answers_of
from rprm import DEFAULT_MODEL, Case

sys.path.insert(0, str(ROOT / "examples"))
import guided_search
import server
from guided_search import Config, Policy, ServedPolicy, Step, search

PROMPT = "Solve the problem.\n\nProblem: {problem}"
PROBLEM = "Mia has 37 apples. Then Tom sells 15 to Mia. Mia lends to Ann 21. How many apples does Mia have now?"


class ScriptedPolicy:
    """Proposes what the tree has behind the steps so far; a step that ends with "." is the last one."""

    def __init__(self, tree: dict[str, str]):
        self.tree = tree
        self.tokenizer = self
        self.asked = []

    def chat(self, text: str) -> list[int]:
        return []

    def has_room(self, ids: list[int]) -> bool:
        return len(ids) < 9

    def propose(self, prefixes, seeds):
        found = []
        for ids, own in zip(prefixes, seeds, strict=True):
            path = "".join(map(chr, ids))
            self.asked.append(path)
            steps = self.tree[path].split()
            assert len(set(own)) == len(own)
            found.append([Step([ord(step[0])], step[0].strip("_"), step.endswith(".")) for step in steps[:len(own)]])
        return found


class ScriptedJudge:
    def __init__(self, rewards: dict[str, float | None]):
        self.rewards = rewards
        self.asked = []

    def judge(self, cases: list[Case]) -> list[float | None]:
        paths = ["".join((*case.previous_steps, case.now_step)) for case in cases]
        self.asked += paths
        return [self.rewards[path] for path in paths]


TREE = {"": "a b a", "a": "c. d", "b": "e f.", "be": "g.", "ad": "h."}
REWARDS = {"a": 0.6, "b": 0.7, "ac": 0.9, "ad": 0.95, "be": 0.3, "bf": 0.3, "beg": 0.2, "adh": 0.99}


@pytest.mark.parametrize("beams, n, path, rewards, finished", [
    (1, 3, "beg", [0.7, 0.3, 0.2], True),  # e before f, its equal
    (1, 1, "ac", [0.6, 0.9], True),        # the first candidate alone
    (2, 3, "adh", [0.6, 0.95, 0.99], True),
])
def test_the_highest_reward_goes_on(beams, n, path, rewards, finished):
    policy, judge = ScriptedPolicy(TREE), ScriptedJudge(REWARDS)
    [one] = search(policy, judge, ["?"], "{problem}", n, beams)
    assert ("".join(one.steps), list(one.rewards), one.is_complete) == (path, rewards, finished)
    assert len(judge.asked) == len(set(judge.asked))  # the second "a" is not judged again


def test_a_complete_solution_stays_in_the_beam():
    """Of two beams one is complete; it wins when the other falls below it."""
    policy = ScriptedPolicy({"": "a. b", "b": "c."})
    [one] = search(policy, ScriptedJudge({"a": 0.5, "b": 0.9, "bc": 0.4}), ["?"], "{problem}", 2, beams=2)
    assert one.steps == ("a",) and one.is_complete


def test_null_rewards_come_last_and_limits_end_the_search():
    judge = ScriptedJudge({"a": None, "b": 0.0, "be": None, "bf": None, "beg": 0.1})
    [one] = search(ScriptedPolicy(TREE), judge, ["?"], "{problem}", 2, max_steps=2)
    assert one.steps == ("b", "e") and one.rewards == (0.0, None) and not one.is_complete
    loop = ScriptedPolicy({"a" * n: "a" for n in range(20)})
    [one] = search(loop, ScriptedJudge({"a" * n: 0.5 for n in range(20)}), ["?"], "{problem}", 1)
    assert len(one.steps) == 9 and not one.is_complete  # the context is full


def test_an_empty_step_ends_the_answer_or_is_left_out():
    policy = ScriptedPolicy({"": "_ a", "a": "_.", "_": ""})
    [one] = search(policy, ScriptedJudge({"a": 0.5}), ["?"], "{problem}", 2)
    assert one.steps == ("a",) and one.rewards == (0.5,) and one.is_complete


def test_problems_are_searched_side_by_side():
    policy, judge = ScriptedPolicy(TREE), ScriptedJudge(REWARDS)
    found = search(policy, judge, ["?", "!"], "{problem}", 3, as_step=lambda problem, steps, text: text)
    assert [one.steps for one in found] == [("b", "e", "g")] * 2
    assert policy.asked == ["", "", "b", "b", "be", "be"]


# ---------------------------------------------------------------------------------------------- the policy

@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy(str(DEFAULT_MODEL), "\n", temperature=0, top_p=1.0, max_step_tokens=60)


class NoJudge:
    def judge(self, cases):
        return [1.0] * len(cases)


def test_greedy_steps_make_the_greedy_answer(policy):
    """Stopping at each step and going on changes no token."""
    prompt = policy.tokenizer.chat(PROMPT.replace("{problem}", PROBLEM))
    whole = type(policy.engine)(policy.engine.model, policy.tokenizer.eos_ids, (0, 1), 0, 1.0, 300, 4)
    [(_, [answer])] = answers_of(whole, [Request(prompt, [0])])
    [one] = search(policy, NoJudge(), [PROBLEM], PROMPT, n=1)
    assert answer.finished and one.is_complete
    assert one.ids == prompt + answer.ids
    assert "\n".join(one.steps) == policy.tokenizer.decode(answer.ids).strip() and len(one.steps) == 2


def test_a_separator_of_two_tokens_is_found_in_the_text(policy):
    tokenizer = policy.tokenizer
    ids = tokenizer.encode("Tom +1") + tokenizer.encode("5: 5") + tokenizer.encode(".")
    policy = Policy.__new__(Policy)
    policy.tokenizer, policy.separator = tokenizer, "5:"
    step = policy.step_of(Continuation(ids, [], end=None))
    assert step.text == "Tom +1" and not step.is_last
    assert tokenizer.decode(step.ids).startswith("Tom +15:") and len(step.ids) < len(ids)


class ScriptedServer:
    """Answers completions by their seed; `stop_reason` is the name of the field that tells what ended a text."""

    url = "http://there"
    concurrency = 2

    def __init__(self, *choices: dict):
        self.choices = choices
        self.bodies = []

    def ask(self, path, body, read):
        self.bodies.append(body)
        return read({"choices": [self.choices[body["seed"]]], "usage": {"completion_tokens": 5}})


@pytest.mark.parametrize("field", ["stop_reason", "matched_stop"])
def test_a_served_policy_tells_steps_from_the_end_of_the_answer(field, monkeypatch):
    monkeypatch.setattr(server, "takes_seeds", lambda server: True)
    served = ServedPolicy("http://there", "judge", str(DEFAULT_MODEL), "\n\n", 0.95, 0.9, 60)
    served.server = ScriptedServer(
        {"text": " One.", "finish_reason": "stop", field: "\n\n"},
        {"text": " Two.", "finish_reason": "stop", field: None},
        {"text": " Thr", "finish_reason": "length"},
    )
    [[one, two, three]] = served.propose([[1, 2]], [[0, 1, 2]])
    encode = served.tokenizer.encode
    assert one == Step(encode(" One.\n\n"), "One.", False)
    assert two == Step(encode(" Two."), "Two.", True)
    assert (three.text, three.is_last) == ("Thr", False)
    assert served.new_tokens == 15
    assert all(body["stop"] == ["\n\n"] and body["prompt"] == [1, 2] and body["max_tokens"] == 60 for body in served.server.bodies)


def test_a_server_that_does_not_tell_is_refused(monkeypatch):
    monkeypatch.setattr(server, "takes_seeds", lambda server: True)
    served = ServedPolicy("http://there", "judge", str(DEFAULT_MODEL), "\n\n", 0.95, 0.9, 60)
    served.server = ScriptedServer({"text": " One.", "finish_reason": "stop"})
    with pytest.raises(BadInput, match="there: does not tell whether a step or the answer has ended"):
        served.propose([[1]], [[0]])


# ---------------------------------------------------------------------------------------------- the script

@pytest.mark.slow
def test_the_script_writes_solutions(tmp_path, capsys):
    problems, out = tmp_path / "problems.jsonl", tmp_path / "solutions.jsonl"
    rows = [{"id": "a", "problem": PROBLEM, "answer": 31}, {"problem": PROBLEM}]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = tmp_path / "words.txt"
    words.write_text(PROMPT, encoding="utf-8")
    config = Config(policy=str(DEFAULT_MODEL), judge=str(DEFAULT_MODEL), problems=str(problems), out=str(out), n=2, k=2,
                    max_new_tokens=100, max_step_tokens=60, max_steps=4, separator="\\n", policy_prompt=str(words))
    guided_search.main(config)
    first, second = map(json.loads, out.read_text(encoding="utf-8").splitlines())
    assert first["id"] == "a" and first["answer"] == "31" and first["correct"] is False  # it writes no \boxed{}
    assert first["steps"] == second["steps"] and len(first["steps"]) == len(first["rewards"]) and first["finished"]
    assert "correct" not in second and "solved: 0 of 1" in capsys.readouterr().out
    with pytest.raises(BadInput, match="exists"):
        guided_search.main(config)


def test_bad_input_is_named(tmp_path):
    problems = tmp_path / "problems.jsonl"
    problems.write_text("", encoding="utf-8")
    settings = dict(policy="p", judge="j", problems=str(problems), out=str(tmp_path / "out.jsonl"))
    with pytest.raises(BadInput, match="has no problems"):
        guided_search.main(Config(**settings))
    problems.write_text('{"question": "?"}\n', encoding="utf-8")
    with pytest.raises(BadInput, match="jsonl:1: field 'problem' is missing"):
        guided_search.main(Config(**settings))
    problems.write_text('{"problem": "?"}\n', encoding="utf-8")
    with pytest.raises(BadInput, match="has no {problem}"):
        guided_search.main(Config(**settings, policy_prompt=str(problems)))
