"""SFT and DPO against TRL's trainers: one epoch, one optimizer step over all examples.

    python bench/training.py --what sft --model FOLDER --data gsm8k.json            # the peer trains on four of them
    python bench/training.py --what dpo --model FOLDER --data gsm8k.json --full     # on all

Prompts are real cases drawn at random, responses of 60 to 200 tokens are cut from real solutions. Ours is train_sft.py
or train_dpo.py itself, TRL does micro-batches of four and accumulates; both in fp32, at the same learning rate, without
saving. DPO's time has the reference pass in it on both sides. Figures are examples per second, so the peer may train
on fewer; the loss at the initial weights is compared on the examples that both have seen.
"""
import json
import os
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's modules; this folder is `bench`
import numpy as np
import torch

import fast
import train_dpo
import train_sft
from bench.common import (BenchConfig, Clock, Row, all_cases, in_turn, load_words, matmul_flops, median_run, peak_mb,
                          run_side_or_all, scattered_cases)
from checkpoint import load_config, load_model, load_tokenizer
from plumbing.cli import LOWER_IF_MEMORY_RUNS_OUT, run
from plumbing.errors import BadInput
from plumbing.files import json_line
from data import pack
from formats.examples import Examples
from formats.turns import read_example, read_pair
from model import Decoder
from formats.verdicts import VERIFICATION
from rprm import response_logprobs
from plumbing.run import Run

SCRIPTS = {"sft": train_sft, "dpo": train_dpo}
READERS = {"sft": read_example, "dpo": read_pair}
MICRO_BATCH = 4  # the peer's examples (or pairs) per forward pass


@dataclass(frozen=True, kw_only=True)
class Config(BenchConfig):
    what: Annotated[str, "which training", ("sft", "dpo")] = "sft"
    examples: Annotated[int, "examples (or pairs)", (1, None)] = 16
    shortest: Annotated[int, "tokens of the shortest response", (20, None)] = 60
    longest: Annotated[int, "and of the longest", (20, None)] = 200
    lr: Annotated[float, "learning rate", (0, None)] = 5e-6
    micro_tokens: Annotated[int, "ours: tokens per forward pass", (16, None), LOWER_IF_MEMORY_RUNS_OUT] = 8192
    lora_rank: Annotated[int | None, "ours: train adapters of this rank instead of all weights", (1, None)] = None
    peer_examples: Annotated[int, "how many of the examples the peer trains on", (1, None)] = 4
    peer_checkpointing: Annotated[bool, "the peer recomputes activations (TRL's default): less memory, more time"] = False
    full: Annotated[bool, "the peer trains on all examples, with and without recomputing; the faster counts"] = False


def main(config: Config) -> None:
    run_side_or_all(config, {"ours": ours, "plain": plain, "loss": initial_loss, "peer": peer}, measure)


def measure(config: Config) -> list[Row]:
    n = config.examples if config.full else min(config.peer_examples, config.examples)
    if n > MICRO_BATCH and n % MICRO_BATCH:
        raise BadInput(f"--peer-examples {n} is no multiple of the peer's micro-batch, {MICRO_BATCH}; change it (or --examples)")
    config = replace(config, peer_examples=n)
    sides = {name: replace(config, side=name) for name in ("ours", "plain", "peer")}
    if config.full:
        sides["peer, recomputing activations"] = replace(config, side="peer", peer_checkpointing=True)
    found = in_turn(__file__, sides, config.repeats)
    if n == config.examples:
        here = found["ours"][0]
    else:
        found |= in_turn(__file__, {"loss": replace(config, side="loss")}, 1)
        here = found["loss"][0]
    our, plainly, *peers = (median_run(found[side], "examples_per_second") for side in sides)
    other = max(peers, key=lambda run: run["examples_per_second"])
    ratio, wanted = our["examples_per_second"] / other["examples_per_second"], {"sft": 4, "dpo": 6}[config.what]
    gap = abs(here["loss"] - other["loss"])
    if config.what == "dpo":  # whose loss is log 2 whatever the model says, so the log-probabilities are compared too
        gap = max(gap, *(abs(here[name] / other[name] - 1) for name in ("chosen", "rejected")))
    note = (f"loss at the initial weights on the peer's {n}: ours {here['loss']:.5f}, peer {other['loss']:.5f}"
            + (f"; mean log-probability of chosen {here['chosen']:.3f} / {other['chosen']:.3f}, "
               f"rejected {here['rejected']:.3f} / {other['rejected']:.3f}" if config.what == "dpo" else "")
            + f"; gap {gap:.1e}; response tokens {here['response_tokens']} / {other['response_tokens']}; ours {config.examples} in "
            f"{our['seconds']:.1f} s, {our['tree_tokens']} tokens in trees for {our['sequence_tokens']} in sequences; "
            f"peer {n} in {other['seconds']:.1f} s; "
            f"utilisation of {our['matmul_flops'] / 1e9:.0f} GFLOP/s, attention and recomputation not counted as work; "
            "the peer's settings: " + ", ".join(f"{'' if p['checkpointing'] else 'not '}recomputing {p['examples_per_second']:.3f}/s "
                                                f"and {p['peak_mb']:.0f} MB" for p in peers))
    return [Row(f"{config.what.upper()}, {config.examples} {'examples' if config.what == 'sft' else 'pairs'}, one epoch",
                f"{'examples' if config.what == 'sft' else 'pairs'}/s", our["examples_per_second"],
                f"≥ {wanted}×, same loss to 1e-3, no more memory",
                ratio >= wanted and gap <= 1e-3 and our["peak_mb"] <= other["peak_mb"],
                plainly["examples_per_second"], other["examples_per_second"], ratio,
                our["utilisation"], our["peak_mb"], other["peak_mb"], note, found)]


# ---------------------------------------------------------------------------------------------- the texts

def make_lines(config: Config) -> list[dict]:
    """The examples or pairs; the same on every side."""
    tokenizer, prompt = load_words(config)
    rng = np.random.default_rng(config.seed)
    texts = [" ".join((*case.previous_steps, case.now_step)) for case in all_cases(config.data)]

    def response(verdict: str) -> str:
        line = f"\n{VERIFICATION} {verdict}"
        room = int(rng.integers(config.shortest, config.longest + 1)) - len(tokenizer.response(line))
        ids: list[int] = []
        while len(ids) < room:
            ids += tokenizer.encode(texts[rng.integers(len(texts))].strip() + "\n")
        return tokenizer.decode(ids[:room]).replace("\ufffd", "").strip() + line
    names = ("response",) if config.what == "sft" else ("chosen", "rejected")
    return [{"prompt": prompt.fill(case)} | {name: response(verdict) for name, verdict in zip(names, ("Yes", "No"))}
            for case in scattered_cases(config.data, config.examples, config.seed)]


def write_lines(config: Config, folder: str) -> Path:
    path = Path(folder) / "lines.jsonl"
    path.write_text("".join(map(json_line, make_lines(config))), encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------------------- ours

def ours(config: Config) -> dict:
    return timed(config, is_plain=False)


def plain(config: Config) -> dict:
    return timed(config, is_plain=True)


def timed(config: Config, is_plain: bool) -> dict:
    """The training script itself, with a clock around its reference pass and its loop, and nothing saved."""
    script, clock = SCRIPTS[config.what], Clock()

    class TimedRun(Run):
        def progress(self):
            with clock:
                yield from super().progress()

        def save(self):
            pass

        def save_result(self):
            pass
    script.Run = TimedRun
    if config.what == "dpo":
        script.reference_logprobs = clock.around(script.reference_logprobs)
    with tempfile.TemporaryDirectory() as folder:
        path, out = write_lines(config, folder), Path(folder) / "run"
        script.main(script.Config(model=config.model, train=str(path), out=str(out), batch_size=config.examples, lr=config.lr, warmup=0.0,
                                  schedule="constant", micro_tokens=config.micro_tokens, device="cpu", seed=config.seed, plain=is_plain,
                                  lora_rank=config.lora_rank))
        peak = peak_mb()
        first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
        result = {"seconds": clock.seconds, "examples_per_second": config.examples / clock.seconds, "loss": first["loss"], "peak_mb": peak}
        if config.what == "dpo":
            result |= {"chosen": first["chosen_logprob"], "rejected": first["rejected_logprob"]}
        return result | work(config, read_examples(config, path), clock.seconds)


def read_examples(config: Config, path: Path) -> Examples:
    context = load_config(config.model).max_position_embeddings
    return Examples(str(path), READERS[config.what], load_tokenizer(config.model), config.micro_tokens, context)


def work(config: Config, examples: Examples, seconds: float) -> dict:
    """What there was to compute, and the share of the machine's FLOP/s that it makes."""
    batches = pack(examples.units(examples.kept.tolist()), examples.micro_tokens)
    tree = sum(len(batch.tree) for batch in batches)
    responses = sum(sum(batch.lengths) for batch in batches)
    c = load_config(Path(config.model))
    with torch.device("meta"):
        layers = Decoder(c).layers
    body = sum(p.numel() for p in layers.parameters() if p.dim() == 2)
    passes = {"sft": 3, "dpo": 4}[config.what]  # forward, two in backward, and the reference's forward
    if config.lora_rank:
        passes -= 1  # frozen weights have no gradient
    flops = 2 * passes * (body * tree + c.vocab_size * c.hidden_size * responses)
    peak = matmul_flops()
    return {"tree_tokens": tree, "sequence_tokens": sum(len(path) for batch in batches for path in batch.tree.paths),
            "response_tokens": responses, "flops": flops, "matmul_flops": peak, "utilisation": flops / (peak * seconds)}


@torch.no_grad()
def initial_loss(config: Config) -> dict:
    """The loss of the peer's examples at the initial weights."""
    with tempfile.TemporaryDirectory() as folder, Clock() as clock:
        examples = read_examples(config, write_lines(config, folder))
        model, logprobs, lengths = fast.speed_up(load_model(config.model)), [], []
        for i in range(config.peer_examples):
            [batch] = pack(examples.units([i]), examples.micro_tokens)
            logprobs.append(response_logprobs(model, batch.tree, batch.starts).tolist())
            lengths.append(batch.lengths)
    logprobs, tokens = np.array(logprobs), int(np.sum(lengths))
    result = {"seconds": clock.seconds, "response_tokens": tokens}
    if config.what == "sft":
        return result | {"loss": -logprobs.sum() / tokens}
    return result | {"loss": float(np.log(2)), "chosen": logprobs[:, 0].mean(), "rejected": logprobs[:, 1].mean()}


# ---------------------------------------------------------------------------------------------- the peer

def peer(config: Config) -> dict:
    """TRL's trainer on the same texts, rendered with the chat template; the prompt is masked."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = folder  # TRL caches the reference's log-probabilities: not from one run to the next
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
        tokenizer = AutoTokenizer.from_pretrained(config.model)
        lines = [rendered(line, tokenizer) for line in make_lines(config)[:config.peer_examples]]
        model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32, attn_implementation="sdpa")
        micro = min(MICRO_BATCH, len(lines))
        settings = dict(output_dir=folder, per_device_train_batch_size=micro, gradient_accumulation_steps=len(lines) // micro,
                        num_train_epochs=1, learning_rate=config.lr, lr_scheduler_type="constant", max_grad_norm=1.0, bf16=False,
                        use_cpu=True, max_length=None, gradient_checkpointing=config.peer_checkpointing, save_strategy="no",
                        report_to="none", logging_steps=1, disable_tqdm=True, seed=config.seed)
        reference = Clock()
        if config.what == "sft":
            trainer = SFTTrainer(model, SFTConfig(**settings, completion_only_loss=True), train_dataset=Dataset.from_list(lines),
                                 processing_class=tokenizer)
        else:
            DPOTrainer._precompute_ref_logps = reference.around(DPOTrainer._precompute_ref_logps)
            own = DPOConfig(**settings, beta=0.1, precompute_ref_log_probs=True)  # as fast, and no second model in memory
            trainer = DPOTrainer(model, args=own, train_dataset=Dataset.from_list(lines), processing_class=tokenizer)
        seconds = trainer.train().metrics["train_runtime"] + reference.seconds
        return result_of(config, trainer, seconds, reference.seconds, len(lines))


def rendered(line: dict, tokenizer) -> dict:
    """The texts as our side sees them: the template around the prompt, the end of the turn after each response."""
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": line["prompt"]}], add_generation_prompt=True, tokenize=False)
    texts = {"completion" if name == "response" else name: text + tokenizer.eos_token for name, text in line.items() if name != "prompt"}
    return {"prompt": prompt} | texts


def result_of(config: Config, trainer, seconds: float, reference_seconds: float, n: int) -> dict:
    first, rows = trainer.state.log_history[0], trainer.train_dataset
    result = {"seconds": seconds, "reference_seconds": reference_seconds, "examples_per_second": n / seconds, "loss": first["loss"],
              "checkpointing": config.peer_checkpointing}
    if config.what == "sft":
        return result | {"response_tokens": sum(label != -100 for row in rows for label in row["labels"])}
    return result | {"chosen": first["logps/chosen"], "rejected": first["logps/rejected"],
                     "response_tokens": sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)}


if __name__ == "__main__":
    run((Config, main))
