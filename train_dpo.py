"""Direct preference optimisation on pairs of right and wrong analyses (second stage of R-PRM).

    python train_dpo.py --model runs/sft/model --train pairs.jsonl --validation pairs.validation.jsonl --out runs/dpo

The policy starts from the SFT model, and the frozen SFT model is the reference. Its log-probabilities never change, so
they are computed once, before the first step, by the policy itself, and cached beside the pairs under a hash of both.
Lines are {"prompt", "chosen", "rejected"} or the official files' {"instruction", "chosen", "rejected"}.
Left out of the paper's recipe: nothing; the defaults are its settings, with the usual beta 0.1, which it does not state.
"""
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from tqdm import tqdm

import fast
from plumbing import ranks
from checkpoint import TOKENIZER_FILES, load_model, load_tokenizer
from plumbing.cli import run
from plumbing.errors import BadInput
from plumbing.threads import choose_threads
from plumbing.files import naming
from data import PAIR_FIELDS, Examples, MicroBatch, deal, travelling_prompt, validation_examples
from model import Decoder
from rprm import dpo_loss, response_logprobs
from plumbing.run import Run, TrainConfig, check_out, epoch_batches, precision, print_budget

LEFT_OUT = np.inf  # in the cache: a pair too long for --micro-tokens; NaN: not computed yet


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    model: Annotated[str, "the SFT model, where the policy starts and which is the reference: a Hugging Face folder"]
    train: Annotated[str, "pairs.jsonl"]
    validation: Annotated[str | None, "pairs for the validation loss; the lowest decides which model is kept"] = None
    lr: Annotated[float, "peak learning rate", (0, None)] = 5e-7
    beta: Annotated[float, "strength of the pull towards the reference", (1e-6, None)] = 0.1
    label_smoothing: Annotated[float, "share of the pairs taken to be the wrong way round (conservative DPO)", (0, 0.5)] = 0.0
    ipo: Annotated[bool, "IPO's squared loss instead of the sigmoid"] = False
    nll: Annotated[float, "weight of an added NLL term on the chosen response, per token", (0, None)] = 0.0


def main(config: Config) -> None:
    ranks.join(config.device, config.rank_timeout)
    check_out(config)
    if not config.plain:
        fast.keep_freed_memory()
    tokenizer, model = load_tokenizer(config.model), load_model(config.model, torch.float32, config.device, sharded=True)
    choose_threads(sum(p.numel() for p in model.parameters()), config.device)
    if not config.plain:
        fast.speed_up(model)
    train = Examples(config.train, PAIR_FIELDS, tokenizer)
    validation = validation_examples(config.validation, PAIR_FIELDS, tokenizer)
    steps, numbers = epoch_batches(len(train), config)
    first, _ = train.pack(numbers(0), config.micro_tokens)
    print_budget(model, config, len(train), steps, sum(len(batch.tree) for batch in first))
    reference = reference_logprobs(config, model, train)
    validation_reference = reference_logprobs(config, model, validation) if validation else None
    run = Run(config, model, config.model, travelling_prompt(config.train, config.model), steps)

    for step in run.progress():
        batches, long = train.pack(numbers(step), config.micro_tokens)
        run.report_long(train.path, long, train.length)
        n_pairs = sum(len(batch.examples) for batch in batches)
        if not n_pairs:
            raise BadInput(f"{train.path}: step {step} has no pair within --micro-tokens {config.micro_tokens}; raise it")
        metrics = Means()
        for batch in deal(batches):
            losses = pair_losses(config, model, batch, reference, metrics)
            (losses.sum() / n_pairs).backward()
        result = metrics.result()
        run.log("train", result | {"left_out": len(long)} | run.update(result["loss"], numbers(step)), ("loss", "accuracy", "margin"))
        if validation and run.due():
            result = evaluate(run, model, validation, validation_reference)
            run.log("validation", result, ("loss", "accuracy", "margin", "chosen_logprob"))
            run.keep_if_best(result["loss"])
    run.finish(validated=validation is not None)


def pair_losses(config: Config, model: Decoder, batch: MicroBatch, reference: np.ndarray, metrics: "Means") -> torch.Tensor:
    """The loss of each pair in a tree, (pairs,), with the metrics taken down."""
    with precision(config):
        logprobs = response_logprobs(model, batch.tree.to(model.device), batch.starts).view(-1, 2)  # (pairs, chosen | rejected)
    frozen = torch.from_numpy(reference[np.array(batch.examples, dtype=int)]).to(model.device)      # (pairs, 2)
    lengths = torch.tensor(batch.lengths, device=model.device).view(-1, 2)
    losses, chosen_rewards, rejected_rewards = dpo_loss(logprobs[:, 0], logprobs[:, 1], frozen[:, 0], frozen[:, 1], lengths[:, 0],
                                                        config.beta, config.label_smoothing, config.ipo, config.nll)
    metrics.add(loss=losses, accuracy=(chosen_rewards > rejected_rewards).float(), margin=chosen_rewards - rejected_rewards,
                chosen_reward=chosen_rewards, rejected_reward=rejected_rewards,
                chosen_logprob=logprobs[:, 0], rejected_logprob=logprobs[:, 1],
                chosen_length=lengths[:, 0], rejected_length=lengths[:, 1])
    return losses


class Means:
    """Means over the pairs of all ranks."""

    def __init__(self):
        self.sums, self.count = {}, 0

    def add(self, **values: torch.Tensor) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().sum().item()
        self.count += len(value)

    def result(self) -> dict[str, float]:
        *sums, count = ranks.total(*self.sums.values(), self.count)
        return {name: total / max(1, count) for name, total in zip(self.sums, sums)} | {"pairs": int(count)}


@torch.no_grad()
def evaluate(run: Run, model: Decoder, examples: Examples, reference: np.ndarray) -> dict[str, float]:
    metrics, size = Means(), run.config.batch_size
    for start in range(0, len(examples), size):
        batches, long = examples.pack(range(start, min(start + size, len(examples))), run.config.micro_tokens)
        run.report_long(examples.path, long, examples.length)
        for batch in deal(batches):
            pair_losses(run.config, model, batch, reference, metrics)
    result = metrics.result()
    if not result["pairs"]:
        raise BadInput(f"{examples.path}: no pair is within --micro-tokens {run.config.micro_tokens}; raise it")
    return result


@torch.no_grad()
def reference_logprobs(config: Config, model: Decoder, examples: Examples) -> np.ndarray:
    """log π_ref of chosen and rejected for each pair, fp32 (pairs, 2), from the cache or computed into it.

    The cache is a .npy file beside the pairs, named by the content of the pairs, the model and --micro-tokens. It is
    written as the work goes on, so a killed run continues; what is missing in it is NaN. Rank 0 alone reads and writes it.
    """
    path = examples.path.with_name(f"{examples.path.stem}.reference-{content_hash(config, examples)}.npy") if ranks.rank() == 0 else None
    table = ranks.from_first(open_table(path, len(examples)) if path else np.empty((len(examples), 2), np.float32))
    for first in tqdm(range(0, len(examples), config.batch_size), desc="reference", unit="batch", disable=ranks.rank() > 0):
        last = min(first + config.batch_size, len(examples))
        if not np.isnan(table[first:last]).any():
            continue
        batches, long = examples.pack(range(first, last), config.micro_tokens)
        rows = np.zeros((last - first, 2), dtype=np.float32)
        for batch in deal(batches):
            with precision(config):
                logprobs = response_logprobs(model, batch.tree.to(model.device), batch.starts).view(-1, 2)
            rows[np.array(batch.examples, dtype=int) - first] = logprobs[:len(batch.examples)].cpu().numpy()
        rows[:] = np.reshape(ranks.total(*rows.ravel()), rows.shape)
        rows[np.array(long, dtype=int) - first] = LEFT_OUT
        table[first:last] = rows
    if path and not path.exists():  # else it was complete, or a run beside this one, which writes the same numbers, has renamed it
        table.flush()
        os.replace(path.with_suffix(".part"), path)
    return np.array(table)


def open_table(path: Path, n: int) -> np.ndarray:
    """The cached reference; else the table that a killed run left, or a new one of NaN, (n, 2): what is written into it is in the file."""
    if path.exists():
        print(f"reference: {path} (cached)")
        return np.load(path, allow_pickle=False)
    part = path.with_suffix(".part")
    if not part.exists():
        with naming(part), open(part.with_suffix(".tmp"), "wb") as file:  # written, not mapped: on a full disk that would be a SIGBUS
            np.save(file, np.full((n, 2), np.nan, dtype=np.float32))
        os.replace(part.with_suffix(".tmp"), part)
    return np.lib.format.open_memmap(part, "r+")


def content_hash(config: Config, examples: Examples) -> str:
    """Names the reference by what it depends on: the pairs, the model's and the tokenizer's files, and the size of the trees."""
    digest = hashlib.blake2b(f"{config.micro_tokens} {config.batch_size} {torch.device(config.device).type}".encode(), digest_size=8)
    model = Path(config.model)
    names = [name for name in ("config.json", *TOKENIZER_FILES) if (model / name).is_file()]  # the chat template counts too
    for path in (examples.path, *sorted(model.glob("*.safetensors")), *(model / name for name in names)):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


if __name__ == "__main__":
    run((Config, main))
