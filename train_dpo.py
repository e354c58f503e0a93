"""Direct preference optimisation on pairs of right and wrong analyses (second stage of R-PRM).

    python train_dpo.py --model runs/sft/model --train pairs.jsonl --validation pairs.validation.jsonl \
        --out runs/dpo
    python train_dpo.py --model Qwen2.5-Math-7B-Instruct --adapter runs/sft/adapter ...    # LoRA all the way

The policy starts from the SFT model, and the frozen SFT model is the reference. Its log-probabilities never
change, so the policy itself computes them, once, before the first step; a file beside the pairs keeps them.
With adapters (lora/) there is no second model either. New adapters start at B = 0 and change nothing, so the
reference is the model itself; with --adapter it is the model with those adapters.
Rows are {"prompt", "chosen", "rejected"}, the official files' {"instruction", "chosen", "rejected"}, or those
of other public formats (formats/turns.py).
The defaults are the paper's settings, with the usual beta 0.1, which it does not state.
"""
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from checkpoint import load_for_training
from data import MicroBatch, deal, pack
from formats.examples import Examples
from formats.training import begin, plan, prepare, table_of
from formats.turns import read_pair
from model import Decoder
from plumbing import cli, ranks
from plumbing.run import Run, learning_rate, make_optimizer, precision
from plumbing.settings import DATA, TrainConfig, lora_settings
from rprm import dpo_loss, response_logprobs


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    model: Annotated[str, "the SFT model, where the policy starts and which is the reference: "
                          "a Hugging Face folder", cli.INPUT]
    train: Annotated[str, "pairs.jsonl, or a file or folder with rows of a public format", cli.INPUT, DATA]
    lr: Annotated[float, "peak learning rate", (0, None)] = 5e-7
    beta: Annotated[float, "strength of the pull towards the reference", (1e-6, None)] = 0.1
    label_smoothing: Annotated[float, "share of the pairs taken to be the wrong way round (conservative DPO)",
                               (0, 0.5)] = 0.0
    ipo: Annotated[bool, "IPO's squared loss instead of the sigmoid"] = False
    nll: Annotated[float, "weight of an added NLL term on the chosen response, per token", (0, None)] = 0.0


def main(config: Config) -> None:
    settings = begin(config)
    model = load_for_training(config.model, config.device, config.context, lora_settings(config),
                              config.adapter, config.seed)
    train, validation, results = prepare(config, model, config.model, read_pair)
    steps, batch_of = plan(config, model, train, pack)

    reference = reference_logprobs(config, model, train)
    validation_reference = reference_logprobs(config, model, validation) if validation else None

    optimizer = make_optimizer(model, config.lr, config.weight_decay, config.beta2, config.adamw_8bit)
    run = Run(config.out, settings, model, optimizer, steps, config.save_every, config.keep, config.resume,
              results, config.tensorboard)

    for step in run.progress():
        numbers = batch_of(step)
        means = ranks.Means()
        for batch in deal(pack(train.units(numbers), config.micro_tokens)):
            losses = pair_losses(config, model, batch, reference, means)  # (pairs,)
            (losses.sum() / len(numbers)).backward()  # several ranks add up their gradients
        metrics = means.result()
        norm = ranks.whole(clip_grad_norm_(model.parameters(), config.clip)).item()
        run.check_finite(metrics["loss"], norm, numbers)
        lr = learning_rate(step, steps, config.lr, config.warmup, config.schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

        run.log("train", metrics | {"left_out": train.n_left_out, "lr": lr, "grad_norm": norm},
                shown=("loss", "accuracy", "margin"))
        if validation and run.is_due(config.eval_every):
            metrics = evaluate(config, model, validation, validation_reference)
            run.log("validation", metrics, shown=("loss", "accuracy", "margin", "chosen_logprob"))
            run.keep_if_best(metrics["loss"], validation.path)
    run.finish()


def pair_losses(config: Config, model: Decoder, batch: MicroBatch, reference: np.ndarray,
                means: ranks.Means) -> Tensor:
    """The loss of each pair in a tree, (pairs,). Whatever is logged of the pairs goes into `means`."""
    with precision(model.device):  # on a GPU the matrix products are in bf16
        logprobs = response_logprobs(model, batch.tree, batch.starts)  # (2 * pairs,)
    # (pairs,) each; (1,) of a tree that fills up (data.deal), which broadcasts with `frozen` to a loss (0,)
    chosen, rejected = logprobs.view(-1, 2).unbind(dim=1)
    frozen = torch.from_numpy(reference[np.array(batch.examples, dtype=int)]).to(model.device)  # (pairs, 2)
    lengths = torch.tensor(batch.lengths, device=model.device).view(-1, 2)
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        chosen, rejected, frozen[:, 0], frozen[:, 1], lengths[:, 0],
        config.beta, config.label_smoothing, config.ipo, config.nll)
    means.add(
        len(batch.examples),
        loss=losses,
        accuracy=(chosen_rewards > rejected_rewards).float(),
        margin=chosen_rewards - rejected_rewards,
        chosen_reward=chosen_rewards,
        rejected_reward=rejected_rewards,
        chosen_logprob=chosen,
        rejected_logprob=rejected,
        chosen_length=lengths[:, 0],
        rejected_length=lengths[:, 1],
    )
    return losses


@torch.no_grad()
def evaluate(config: Config, model: Decoder, pairs: Examples, reference: np.ndarray) -> dict[str, float]:
    """The means over a file."""
    means = ranks.Means()
    for numbers in pairs.in_file_order(config.batch_size):
        for batch in deal(pack(pairs.units(numbers), pairs.micro_tokens)):
            pair_losses(config, model, batch, reference, means)
    return means.result()


@torch.no_grad()
def reference_logprobs(config: Config, model: Decoder, pairs: Examples) -> np.ndarray:
    """log π_ref of chosen and rejected for each pair of a file, fp32 (pairs, 2).

    model: the policy before its first update, which is the reference. New adapters change nothing (B = 0)
    """
    table = table_of(config, model, pairs)  # a file beside the pairs: a sweep over beta computes it once
    for numbers in table.missing(list(pairs.in_file_order(config.batch_size))):
        found = {}  # this rank's pairs: number -> (chosen, rejected)
        for batch in deal(pack(pairs.units(numbers), pairs.micro_tokens)):
            with precision(model.device):
                logprobs = response_logprobs(model, batch.tree, batch.starts)  # (2 * pairs,)
            found.update(zip(batch.examples, logprobs.view(-1, 2).tolist()))
        table.fill(numbers, found)
    return table.finish()


if __name__ == "__main__":
    cli.run((Config, main))
