"""Supervised fine-tuning on analyses whose verdict matches the label (first stage of R-PRM).

    python train_sft.py --model Qwen2.5-Math-7B-Instruct --train sft.jsonl --validation sft.validation.jsonl --out runs/sft

Lines are {"prompt", "response"}, the official files' {"instruction", "output"}, or {"text"}, which trains on every
token. With --from-scratch CONFIG.JSON (its folder holds the tokenizer) the weights are random instead of loaded.
Left out of the paper's recipe: nothing; the defaults are its settings (1 epoch, batch 128, lr 5e-6, warm-up 0.03).
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

import fast
from plumbing import ranks
from checkpoint import load_config, load_model, load_tokenizer
from plumbing.cli import run
from plumbing.errors import BadInput
from plumbing.threads import choose_threads
from data import SFT_FIELDS, Examples, deal, travelling_prompt, validation_examples
from model import Decoder
from rprm import response_logprobs, sft_loss
from plumbing.run import Run, TrainConfig, check_out, epoch_batches, precision, print_budget


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    model: Annotated[str | None, "checkpoint to start from: a Hugging Face folder"] = None
    from_scratch: Annotated[str | None, "instead of --model: a config.json, beside its tokenizer; the weights are random"] = None
    train: Annotated[str, "sft.jsonl"]
    validation: Annotated[str | None, "examples for the validation loss; the lowest decides which model is kept"] = None
    lr: Annotated[float, "peak learning rate", (0, None)] = 5e-6


def main(config: Config) -> None:
    ranks.join(config.device, config.rank_timeout)
    check_out(config)
    if not config.plain:
        fast.keep_freed_memory()
    model, folder = initial_model(config)
    choose_threads(sum(p.numel() for p in model.parameters()), config.device)
    if not config.plain:
        fast.speed_up(model)
    tokenizer = load_tokenizer(folder)
    train = Examples(config.train, SFT_FIELDS, tokenizer)
    validation = validation_examples(config.validation, SFT_FIELDS, tokenizer)
    steps, numbers = epoch_batches(len(train), config)
    first, _ = train.pack(numbers(0), config.micro_tokens)
    print_budget(model, config, len(train), steps, sum(len(batch.tree) for batch in first))
    run = Run(config, model, folder, travelling_prompt(config.train, folder), steps)

    for step in run.progress():
        batches, long = train.pack(numbers(step), config.micro_tokens)
        run.report_long(train.path, long, train.length)
        n_tokens = sum(sum(batch.lengths) for batch in batches)  # normalise over the whole step, however it is cut
        if not n_tokens:
            raise BadInput(f"{train.path}: step {step} has no example within --micro-tokens {config.micro_tokens}; raise it")
        total = 0.0
        for batch in deal(batches):
            with precision(config):
                logprobs = response_logprobs(model, batch.tree.to(model.device), batch.starts)  # (examples,)
            loss = sft_loss(logprobs, n_tokens)
            loss.backward()
            total += loss.item()
        [total] = ranks.total(total)
        metrics = run.update(total, numbers(step))
        tree_tokens = sum(len(batch.tree) for batch in batches)
        run.log("train", {"loss": total, "tokens": n_tokens, "tree_tokens": tree_tokens, "left_out": len(long)} | metrics, ("loss", "lr"))
        if validation and run.due():
            loss = evaluate(run, model, validation)
            run.log("validation", {"loss": loss}, ("loss",))
            run.keep_if_best(loss)
    run.finish(validated=validation is not None)


@torch.no_grad()
def evaluate(run: Run, model: Decoder, examples: Examples) -> float:
    """The mean loss per response token over a file."""
    total, n_tokens, size = 0.0, 0, run.config.batch_size
    for start in range(0, len(examples), size):
        batches, long = examples.pack(range(start, min(start + size, len(examples))), run.config.micro_tokens)
        run.report_long(examples.path, long, examples.length)
        n_tokens += sum(sum(batch.lengths) for batch in batches)
        for batch in deal(batches):
            with precision(run.config):
                total -= response_logprobs(model, batch.tree.to(model.device), batch.starts).sum().item()
    [total] = ranks.total(total)
    if not n_tokens:
        raise BadInput(f"{examples.path}: no example is within --micro-tokens {run.config.micro_tokens}; raise it")
    return total / n_tokens


def initial_model(config: Config) -> tuple[Decoder, Path]:
    """The model to train (fp32) and the folder that its tokenizer comes from."""
    if (config.model is None) == (config.from_scratch is None):
        raise BadInput("give one of --model (a checkpoint) and --from-scratch (a config.json)")
    if config.model:
        return load_model(config.model, torch.float32, config.device, sharded=True), Path(config.model)
    folder = Path(config.from_scratch).parent
    model = Decoder(load_config(folder))
    model.init_weights(torch.Generator().manual_seed(config.seed))
    ranks.shard(model, config.device)
    return model.to(config.device), folder


if __name__ == "__main__":
    run((Config, main))
