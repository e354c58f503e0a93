"""The judge as a reward: by hand, in verl's form, and in two steps of TRL's GRPOTrainer."""
import sys

import pytest

from conftest import ROOT
from formats.split import split_steps
from rprm import BUILT_IN, DEFAULT_MODEL
from score import Judge

sys.path.insert(0, str(ROOT / "examples/rl"))
import step_reward
from step_reward import StepReward, verl_scores

RIGHT = "After Tom: 34+27=61.\n\nAfter Ann: 61-18=43."
WRONG = "After Tom: 34+27=71.\n\nAfter Ann: 71-18=53."


class ScriptedJudge:
    """Rewards by the step's text; a question mark could not be judged."""

    def rewards_of(self, solutions):
        return [[None if step == "?" else float(step) for step in steps] for _, steps in solutions]


@pytest.mark.parametrize("how, expected", [("min", 0.2), ("mean", 0.5), ("last", 0.8), ("product", 0.08)])
def test_a_reward_is_the_aggregate_of_the_steps(how, expected):
    reward = StepReward(ScriptedJudge(), how)
    completions = ["0.2\n\n0.5\n\n0.8", [{"role": "assistant", "content": "0.2\n\n0.5\n\n0.8"}], "", "?"]
    found = reward(completions=completions, problem=["p"] * 4, prompts=[], completion_ids=[], trainer_state=None)
    assert found == [pytest.approx(expected), pytest.approx(expected), 0.0, None]


def test_a_last_step_without_a_reward_gives_none_as_in_best_of_n():
    reward = StepReward(judge=None, how="last")
    assert reward.of_solution([0.9, None]) is None
    assert reward.of_solution([None, 0.9]) == 0.9
    assert StepReward(judge=None, how="product").of_solution([0.5, None, 0.5]) == pytest.approx(0.25)
    assert StepReward(judge=None, how="min").of_solution([None]) is None


def test_steps_are_split_as_asked():
    reward = StepReward(ScriptedJudge(), "min", lambda problem, text: [*text.split(), problem])
    assert reward(completions=["0.9 0.7"], problem=["0.8"]) == [0.7]


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(str(DEFAULT_MODEL), k=2, max_new_tokens=110, device="cpu")


@pytest.mark.slow
def test_verl_gets_the_same_rewards_from_one_judge(judge):
    expected = StepReward(judge, "mean")(completions=[RIGHT, WRONG], problem=[BUILT_IN.problem] * 2)
    infos = [{"problem": BUILT_IN.problem}] * 2
    step_reward.judge_of.cache_clear()
    for _ in range(2):
        found = verl_scores(["gsm8k"] * 2, [RIGHT, WRONG], [None] * 2, infos, model=str(DEFAULT_MODEL), k=2, how="mean",
                            max_new_tokens=110, device="cpu")
        assert found == pytest.approx(expected, abs=1e-5)
    assert step_reward.judge_of.cache_info().misses == 1


@pytest.mark.slow
def test_two_steps_of_trl(judge, tmp_path):
    """GRPOTrainer trains on our rewards: those that it logs are those that we gave."""
    trl = pytest.importorskip("trl", reason="pip install -r requirements-dev.txt")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    given = []

    class Reward(StepReward):
        def __call__(self, **columns):
            given.append(super().__call__(**columns))
            return given[-1]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(DEFAULT_MODEL)
    prompt = [{"role": "user", "content": f"Solve the problem.\n\nProblem: {BUILT_IN.problem}"}]
    dataset = Dataset.from_list([{"prompt": prompt, "problem": BUILT_IN.problem}] * 4)
    settings = trl.GRPOConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, num_generations=4, max_completion_length=60,
        temperature=2.0, learning_rate=1e-3,
        use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no", logging_steps=1, seed=0)
    model = AutoModelForCausalLM.from_pretrained(DEFAULT_MODEL)
    before = model.model.embed_tokens.weight.detach().clone()
    trainer = trl.GRPOTrainer(model, reward_funcs=Reward(judge, "mean", lambda problem, text: split_steps(text, "lines")), args=settings, train_dataset=dataset,
                              processing_class=tokenizer)
    trainer.train()
    logged = [line["rewards/step_reward/mean"] for line in trainer.state.log_history if "rewards/step_reward/mean" in line]
    assert [len(own) for own in given] == [4, 4]
    assert logged == pytest.approx([sum(own) / len(own) for own in given], abs=1e-4)
    assert any(len(set(own)) > 1 for own in given)  # else there is nothing to learn
    assert not model.model.embed_tokens.weight.equal(before)
