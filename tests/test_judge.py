"""A judge for other programs gives the rewards that score.py writes."""
import os
import subprocess
import sys

import pytest

from conftest import ROOT
from plumbing.errors import BadInput
from plumbing.rounds import in_order
from rprm import BUILT_IN, DEFAULT_MODEL, Case, reward
from score import Judge

SOLUTION = (BUILT_IN.problem, [*BUILT_IN.previous_steps, BUILT_IN.now_step])
OTHER = (BUILT_IN.problem, ["After Tom: 34+27=71.", "After Ann: 71-18=53."])


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(str(DEFAULT_MODEL), k=3, max_new_tokens=120, device="cpu")


@pytest.mark.slow
def test_a_reward_for_each_step_of_each_solution(judge):
    cases = []
    for problem, steps in (SOLUTION, OTHER):
        cases += [Case(problem, tuple(steps[:t]), steps[t]) for t in range(2)]
    expected = [reward(analyses) for analyses in in_order(judge.sampler.analyses(cases))]
    found = judge.rewards_of([SOLUTION, (BUILT_IN.problem, []), OTHER])
    assert [len(own) for own in found] == [2, 0, 2]
    assert [*found[0], *found[2]] == pytest.approx(expected, abs=1e-5)
    assert judge.rewards(*SOLUTION) == pytest.approx(expected[:2], abs=1e-5)
    assert len(set(expected)) == 4


@pytest.mark.slow
def test_the_same_case_is_judged_once(judge):
    [alone] = judge.judge([BUILT_IN])
    before = judge.sampler.engine.new_tokens
    judge.judge([BUILT_IN])
    once = judge.sampler.engine.new_tokens - before
    assert judge.judge([BUILT_IN] * 3) == pytest.approx([alone] * 3, abs=1e-5)
    assert judge.sampler.engine.new_tokens - before == 2 * once


def test_a_prompt_longer_than_the_context_has_no_reward(judge):
    found = judge.rewards(BUILT_IN.problem, ["1+1=2. " * 300, BUILT_IN.now_step])
    assert found == [None, None]
    assert judge.judge([Case("x" * 5000, (), "1"), BUILT_IN])[1] is not None


def test_bad_flags_are_refused():
    with pytest.raises(TypeError, match="no_such_flag"):
        Judge(str(DEFAULT_MODEL), no_such_flag=1)
    with pytest.raises(BadInput, match="--server needs --tokenizer"):
        Judge("http://localhost:1", name="judge")
    with pytest.raises(BadInput, match="nowhere"):
        Judge("nowhere")


@pytest.mark.slow
def test_it_is_imported_from_any_folder(tmp_path, judge):
    code = ("from score import Judge\n"
            f"judge = Judge({str(DEFAULT_MODEL)!r}, k=3, max_new_tokens=120, device='cpu')\n"
            f"print(judge.rewards(*{SOLUTION!r}))")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert eval(done.stdout.splitlines()[-1]) == pytest.approx(judge.rewards(*SOLUTION), abs=1e-5)
    assert list(tmp_path.iterdir()) == []
