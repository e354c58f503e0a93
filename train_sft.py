"""Supervised fine-tuning on analyses whose verdict matches the label (first stage of R-PRM).

    python train_sft.py --model Qwen2.5-Math-7B-Instruct --train sft.jsonl --validation sft.validation.jsonl \
        --out runs/sft
    python train_sft.py ... --lora-rank 16 --lr 2e-4    # adapters (lora/), in runs/sft/adapter

Rows are {"prompt", "response"}, the official files' {"instruction", "output"}, {"text"}, which trains on
every token, or those of other public formats (formats/turns.py). With --from-scratch CONFIG.JSON (its folder
holds the tokenizer) the weights are random instead of loaded. The defaults are the paper's settings (1 epoch,
batch 128, lr 5e-6, warm-up 0.03).
"""
from dataclasses import dataclass
from typing import Annotated

import torch
from torch.nn.utils import clip_grad_norm_

from data import deal, pack
from formats.examples import Examples
from formats.training import begin, initial_model, plan, prepare
from formats.turns import read_example
from model import Decoder
from plumbing import cli, ranks
from plumbing.run import Run, learning_rate, make_optimizer, precision
from plumbing.settings import DATA, TrainConfig
from rprm import response_logprobs, sft_loss


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    model: Annotated[str | None, "checkpoint to start from: a Hugging Face folder", cli.INPUT] = None
    from_scratch: Annotated[str | None, "instead of --model: a config.json, beside its tokenizer; "
                                        "the weights are random", cli.INPUT] = None
    train: Annotated[str, "sft.jsonl, or a file or folder with rows of a public format", cli.INPUT, DATA]
    lr: Annotated[float, "peak learning rate", (0, None)] = 5e-6


def main(config: Config) -> None:
    settings = begin(config)
    model, folder = initial_model(config)
    train, validation, results = prepare(config, model, folder, read_example)
    steps, batch_of = plan(config, model, train, pack)

    optimizer = make_optimizer(model, config.lr, config.weight_decay, config.beta2, config.adamw_8bit)
    run = Run(config.out, settings, model, optimizer, steps, config.save_every, config.keep, config.resume,
              results, config.tensorboard)

    for step in run.progress():
        numbers = batch_of(step)
        batches = pack(train.units(numbers), config.micro_tokens)
        n_tokens = sum(sum(batch.lengths) for batch in batches)  # the loss is a mean over all ranks' trees
        loss = 0.0
        for batch in deal(batches):
            with precision(model.device):  # on a GPU the matrix products are in bf16
                logprobs = response_logprobs(model, batch.tree, batch.starts)  # (examples,)
            batch_loss = sft_loss(logprobs, n_tokens)
            batch_loss.backward()  # several ranks add up their gradients
            loss += batch_loss.item()
        [loss] = ranks.total(loss)
        norm = ranks.whole(clip_grad_norm_(model.parameters(), config.clip)).item()
        run.check_finite(loss, norm, numbers)
        lr = learning_rate(step, steps, config.lr, config.warmup, config.schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

        tree_tokens = sum(len(batch.tree) for batch in batches)
        run.log("train", {"loss": loss, "tokens": n_tokens, "tree_tokens": tree_tokens,
                          "left_out": train.n_left_out, "lr": lr, "grad_norm": norm}, shown=("loss", "lr"))
        if validation and run.is_due(config.eval_every):
            validation_loss = evaluate(model, validation, config.batch_size)
            run.log("validation", {"loss": validation_loss}, shown=("loss",))
            run.keep_if_best(validation_loss, validation.path)
    run.finish()


@torch.no_grad()
def evaluate(model: Decoder, examples: Examples, batch_size: int) -> float:
    """The mean loss per response token over a file."""
    total = 0.0
    n_tokens = 0
    for numbers in examples.in_file_order(batch_size):
        batches = pack(examples.units(numbers), examples.micro_tokens)
        n_tokens += sum(sum(batch.lengths) for batch in batches)
        for batch in deal(batches):
            with precision(model.device):
                logprobs = response_logprobs(model, batch.tree, batch.starts)
            total -= logprobs.sum().item()
    [total] = ranks.total(total)
    return total / n_tokens


if __name__ == "__main__":
    cli.run((Config, main))
