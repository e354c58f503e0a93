"""The judge as a reward for reinforcement learning: a reward function of TRL's GRPOTrainer, and one of verl.

TRL (the dataset has the columns "prompt" and "problem"; PYTHONPATH names the project's folder and this one):

    from score import Judge
    from step_reward import StepReward
    reward = StepReward(Judge("runs/dpo/model", k=4), how="min")
    GRPOTrainer("Qwen/Qwen2.5-1.5B-Instruct", reward_funcs=reward, train_dataset=dataset).train()

verl (its rows have the problem as extra_info["problem"]):

    custom_reward_function.path=examples/rl/step_reward.py custom_reward_function.name=verl_scores
    reward_model.reward_manager=batch +custom_reward_function.reward_kwargs.model=runs/dpo/model

A completion is split into steps, each step is judged, and an aggregate of their rewards is the completion's reward. It
says whether what is written is right, and not whether anything is missing: a completion that stops early is rewarded for
the steps that it has. So give it together with a reward for the answer or for the end, as README.md beside this file shows.
"""
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's scripts, which are no package
from formats.best_of_n import aggregate, weight
from formats.split import split_steps
from score import Judge

Completion = str | list[dict[str, str]]  # a text, or the messages of a conversation


class StepReward:
    """Completions -> their rewards, in [0, 1].

    how: the aggregate of the steps' rewards: min, mean, last or product
    split: (problem, text) -> the steps of a completion; by default its paragraphs
    """

    __name__ = "step_reward"  # under which TRL logs it

    def __init__(self, judge: Judge, how: str = "min",
                 split: Callable[[str, str], list[str]] = lambda problem, text: split_steps(text, "blank")):
        self.judge = judge
        self.how = how
        self.split = split

    def __call__(self, completions: list[Completion], problem: list[str], **columns: Any) -> list[float | None]:
        """One reward for each completion; 0 for an empty one, None where no step could be judged."""
        solutions = [(text, self.split(text, text_of(completion)))
                     for text, completion in zip(problem, completions, strict=True)]
        return [self.of_solution(rewards) for rewards in self.judge.rewards_of(solutions)]

    def of_solution(self, rewards: list[float | None]) -> float | None:
        if not rewards:
            return 0.0
        score = aggregate(np.array(rewards, dtype=float), self.how)  # a null reward is nan
        return None if score == -np.inf else weight(score, self.how)


def text_of(completion: Completion) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def verl_scores(data_sources: list[str], solution_strs: list[str], ground_truths: list[Any], extra_infos: list[dict],
                model: str, k: int = 4, how: str = "min", **flags: Any) -> list[float]:
    """verl's form, for its batch reward manager; a solution that could not be judged has 0."""
    reward = StepReward(judge_of(model, k, tuple(sorted(flags.items()))), how)
    found = reward(solution_strs, [info["problem"] for info in extra_infos])
    return [0.0 if value is None else value for value in found]


@cache
def judge_of(model: str, k: int, flags: tuple[tuple[str, Any], ...]) -> Judge:
    """One judge for all calls of a process."""
    return Judge(model, k, **dict(flags))
