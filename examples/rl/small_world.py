"""GRPO in the small world: a policy learns to solve problems from the judge's rewards alone, by TRL's GRPOTrainer.

    pip install -r bench/requirements.txt
    python examples/rl/small_world.py --judge runs/demo/dpo/model --out runs/rl

The policy is the embedded base with noise on its weights, which solves less than half of the problems (as in uses.py of
examples/arithmetic; without the noise it solves 98%). The reward of a solution is the lowest reward of its steps. --complete multiplies it with whether the solution has as many
steps as the problem has exchanges: the judge does not miss what is not there. Writes OUT/curve.jsonl: on problems of
their own, the share of solved ones, the judge's reward, and the steps that are missing, as training goes on; and the plot
OUT/curve.png. Neither the answers nor labels are used in training.
"""
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(ROOT / "examples/arithmetic")]  # scripts, which are no packages
import world
from checkpoint import TOKENIZER_FILES
from formats.plots import import_pyplot
from guided_search import Policy, search
from plumbing.cli import print_config, run
from plumbing.errors import BadInput
from plumbing.files import json_line, read_jsonl
from score import Judge
from step_reward import StepReward  # beside this file
from uses import PROMPT, SEPARATOR, NoJudge, as_step, solved, write_policy

BASE = ROOT / "examples/arithmetic/base"


@dataclass(frozen=True)
class Config:
    judge: Annotated[str, "checkpoint folder of the judge"]
    out: Annotated[str, "folder to write"]
    complete: Annotated[bool, "reward whole solutions only"] = True
    noise: Annotated[float, "added to the policy's matrices at the start, in their standard deviations", (0, None)] = 0.25
    steps: Annotated[int, "optimizer steps", (1, None)] = 80
    problems: Annotated[int, "problems in a step", (1, None)] = 8
    generations: Annotated[int, "solutions of each", (2, None)] = 8
    lr: Annotated[float, "learning rate", (0, None)] = 1e-4
    k: Annotated[int, "analyses of a step", (1, None)] = 2
    eval_every: Annotated[int, "optimizer steps", (1, None)] = 20
    eval_problems: Annotated[int, "problems on which the curve is measured", (1, None)] = 100
    seed: Annotated[int, "of problems, sampling and training", (0, None)] = 0


def main(config: Config) -> None:
    try:
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        raise BadInput(f"this example needs TRL ({error}): pip install -r bench/requirements.txt") from None
    print_config(config)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    judge = Judge(config.judge, config.k, max_new_tokens=120, batch_size=64, seed=config.seed)
    rng = np.random.default_rng([5000, config.seed])
    held_out = [world.draw_problem(rng, 0.5) for _ in range(config.eval_problems)]
    drawn = [world.draw_problem(rng, 0.5) for _ in range(config.steps * config.problems)]
    n_exchanges = {problem.text: len(problem.exchanges) for problem in drawn}

    class Reward(StepReward):
        """The judge's reward, and with --complete none for a solution with steps too few or too many."""

        def __call__(self, completions, problem, **columns):
            found = super().__call__(completions, problem, **columns)
            if not config.complete:
                return found
            lengths = [len(completion.strip().split(SEPARATOR)) for completion in completions]
            return [reward * (length == n_exchanges[text])
                    for reward, length, text in zip(found, lengths, problem, strict=True)]

    class Curve(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **more):
            if state.global_step % config.eval_every == 0:
                measure(config, judge, held_out, model, tokenizer, state.global_step)

    tokenizer = PreTrainedTokenizerFast.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(write_policy(out / "start", config.noise, config.seed))
    rows = [{"prompt": chat(tokenizer, problem.text), "problem": problem.text} for problem in drawn]
    settings = GRPOConfig(
        output_dir=str(out / "trl"), max_steps=config.steps, learning_rate=config.lr, lr_scheduler_type="constant",
        per_device_train_batch_size=config.problems * config.generations, num_generations=config.generations,
        max_completion_length=120, temperature=0.95, beta=0.0, use_cpu=True, bf16=False, gradient_checkpointing=False,
        save_strategy="no", report_to="none", logging_steps=10, seed=config.seed)
    trainer = GRPOTrainer(model, reward_funcs=Reward(judge, "min", steps_of), args=settings,
                          train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Curve()])
    (out / "curve.jsonl").unlink(missing_ok=True)
    measure(config, judge, held_out, model, tokenizer, 0)
    trainer.train()
    draw(out)


def chat(tokenizer, problem: str) -> str:
    message = {"role": "user", "content": PROMPT.replace("{problem}", problem)}
    return tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)


def steps_of(problem: str, text: str) -> list[str]:
    """A completion's steps as the judge knows them."""
    steps: list[str] = []
    for line in text.strip().split(SEPARATOR):
        if line.strip():
            steps.append(as_step(problem, tuple(steps), line.strip()))
    return steps


# ---------------------------------------------------------------------------------------------- the curve

def measure(config: Config, judge: Judge, held_out: list, model, tokenizer, step: int) -> None:
    """A line of the curve: sampled solutions of the held-out problems."""
    folder = Path(config.out) / "model"
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (BASE / name).is_file():
            shutil.copyfile(BASE / name, folder / name)
    policy = Policy(str(folder), SEPARATOR, 0.95, 0.95, max_step_tokens=60)
    texts = [problem.text for problem in held_out]
    found = search(policy, NoJudge(), texts, PROMPT, n=1, max_steps=10, seed=config.seed, as_step=as_step)
    rewards = judge.rewards_of([(text, one.steps) for text, one in zip(texts, found)])
    answers = [problem.answer for problem in held_out]
    missing = [len(problem.exchanges) - len(one.steps) for problem, one in zip(held_out, found)]
    line = {
        "step": step,
        "solved": 100 * float(np.mean(solved(found, answers))),
        "reward": float(np.mean([min(own) if own and None not in own else 0.0 for own in rewards])),
        "missing_steps": float(np.mean(missing)),
    }
    with open(Path(config.out) / "curve.jsonl", "a", encoding="utf-8") as file:
        file.write(json_line(line))
    print("curve:", line, flush=True)


def draw(out: Path) -> None:
    plt = import_pyplot()
    lines = [line for _, line in read_jsonl(out / "curve.jsonl")]
    figure, axis = plt.subplots(figsize=(6, 4))
    steps = [line["step"] for line in lines]
    axis.plot(steps, [line["solved"] for line in lines], marker="o", markersize=3, label="solved")
    axis.plot(steps, [100 * line["reward"] for line in lines], marker="o", markersize=3, label="the judge's reward × 100")
    axis.set(xlabel="optimizer step", ylabel="held-out problems (%)", title="GRPO with the judge's rewards")
    axis.legend()
    figure.savefig(out / "curve.png", dpi=130, bbox_inches="tight")
    print("plot:", out / "curve.png")


if __name__ == "__main__":
    run((Config, main))
