"""What the two training loops share: the settings, the optimizer, the schedule, checkpoints and resume, the metrics log.

A run's folder:

    config.json             the resolved settings
    metrics.jsonl           one line per optimizer step, and one per evaluation
    checkpoints/step-N/     all that a killed run needs to go on (the last --keep of them)
    model/                  the result, a Hugging Face folder: the best by validation loss, or the last without validation
"""
import hashlib
import json
import math
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Iterator

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from plumbing import ranks
from checkpoint import DTYPES, save_checkpoint
from plumbing.cli import GIVE_IF_MEMORY_RUNS_OUT, LOWER_IF_MEMORY_RUNS_OUT, MAY_CHANGE, marked, print_config, resolved
from plumbing.errors import BadInput, Stopped
from plumbing.files import expect, json_line, naming, read_json, refuse_existing, write_json, writing
from model import Decoder, ModelConfig, head_chunk


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The settings that SFT and DPO share; the scripts add their own and set the paper's learning rates."""
    out: Annotated[str, "folder of the run to write"]
    lr: Annotated[float, "peak learning rate", (0, None)]
    batch_size: Annotated[int, "examples (or pairs) per optimizer step, over all ranks", (1, None)] = 128
    micro_tokens: Annotated[int, "tokens per forward pass of a rank: lower it if memory runs out; a longer example is left out",
                            (16, None), LOWER_IF_MEMORY_RUNS_OUT] = 8192
    epochs: Annotated[int, "passes over the training data", (1, None)] = 1
    max_steps: Annotated[int | None, "stop after so many optimizer steps", (1, None)] = None
    warmup: Annotated[float, "share of the steps in which the learning rate rises from 0", (0, 1)] = 0.03
    schedule: Annotated[str, "of the learning rate after the warm-up", ("cosine", "constant")] = "cosine"
    weight_decay: Annotated[float, "of matrices, decoupled (AdamW)", (0, None)] = 0.0
    beta2: Annotated[float, "AdamW's second decay rate", (0, 1)] = 0.999
    clip: Annotated[float, "largest norm of the gradient", (1e-9, None)] = 1.0
    eval_every: Annotated[int, "optimizer steps between validations (and after the last step)", (1, None)] = 100
    save_every: Annotated[int, "optimizer steps between checkpoints", (1, None), MAY_CHANGE] = 100
    keep: Annotated[int, "checkpoints kept", (1, None), MAY_CHANGE] = 1
    checkpoint_activations: Annotated[bool, "recompute each layer in the backward pass: less memory, a third more time",
                                      MAY_CHANGE, GIVE_IF_MEMORY_RUNS_OUT] = False
    save_dtype: Annotated[str, "of the resulting model's file", ("float32", "bfloat16")] = "float32"
    seed: Annotated[int, "seed of the order of the data (and of the weights from scratch)"] = 0
    device: Annotated[str, "where to train; matrix products are bf16 on cuda", MAY_CHANGE] = "cuda" if torch.cuda.is_available() else "cpu"
    rank_timeout: Annotated[float, "seconds after which the other ranks give up one that does not answer",
                            (1, 10 ** 9), MAY_CHANGE] = 1800.0
    plain: Annotated[bool, "compute with model.py as it reads, without fast/: the same numbers, later"] = False
    resume: Annotated[bool, "go on from the last checkpoint in --out", MAY_CHANGE] = False
    overwrite: Annotated[bool, "replace an existing --out", MAY_CHANGE] = False


def epoch_batches(n: int, config: TrainConfig) -> tuple[int, callable]:
    """(number of optimizer steps, step -> the numbers of its examples). The order depends on seed and epoch alone,
    so a resumed run needs no more than the number of its step."""
    per_epoch = math.ceil(n / config.batch_size)
    steps = min(per_epoch * config.epochs, config.max_steps or math.inf)

    def numbers(step: int) -> list[int]:
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng((config.seed, epoch)).permutation(n)
        return order[place * config.batch_size:(place + 1) * config.batch_size].tolist()
    return steps, numbers


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """Linear warm-up from lr / warm-up steps, then constant or a cosine to 0 that ends after the last step."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def precision(config: TrainConfig) -> torch.autocast:
    """fp32 master weights; on CUDA the matrix products alone run in bf16.

    No cache: each weight is used once a pass, and a cache would hold all of them in bf16 until its end.
    """
    device = torch.device(config.device).type
    return torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda", cache_enabled=False)


class Run:
    """One training run: its folder, its optimizer, where it stands. The loop itself stands in the scripts."""

    def __init__(self, config: TrainConfig, model: Decoder, tokenizer_from: str | Path, prompt: str | None, steps: int):
        self.config, self.model, self.tokenizer_from, self.prompt, self.steps = config, model, tokenizer_from, prompt, steps
        self.out = Path(config.out)
        model.checkpoint_activations = config.checkpoint_activations
        parameters = ranks.parameters(model).values()
        matrices = [p for p in parameters if p.dim() >= 2]
        others = [p for p in parameters if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=True)
        self.step, self.best, self.left_out, self.stop_signal = 0, math.inf, set(), None
        checkpoints = self._checkpoints() if config.resume else []
        if checkpoints:
            self._restore(checkpoints[-1])
        if ranks.rank() == 0:
            self._open_folder()
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, lambda number, frame: setattr(self, "stop_signal", signal.Signals(number)))

    # ------------------------------------------------------------------------------------------ the loop's parts

    def progress(self) -> Iterator[int]:
        """The steps still to do, under a bar; a checkpoint every --save-every steps and when a signal asks to stop."""
        with tqdm(total=self.steps, initial=self.step, desc="train", unit="step", disable=ranks.rank() > 0) as self.bar:
            while self.step < self.steps:
                yield self.step
                self.step += 1
                self.bar.update()
                stop = int(ranks.highest(self.stop_signal or 0))  # whichever rank was asked, all stop after the same step
                if stop or self.step % self.config.save_every == 0 or self.step == self.steps:
                    self.save()
                if stop and self.step < self.steps:
                    break
        if self.step < self.steps:
            raise Stopped(f"stopped by {signal.Signals(stop).name} after step {self.step}, which is saved; "
                          f"give the same command with --resume to go on", stop)

    def update(self, loss: float, examples: list[int]) -> dict[str, float]:
        """One optimizer step on the gradients that lie in the parameters. -> learning rate and gradient norm, for the log.

        `loss` is the step's, summed over the ranks. Raises BadInput before anything is changed where loss or gradient is
        not finite.
        """
        norm = float(ranks.whole(clip_grad_norm_(self.model.parameters(), self.config.clip)))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise BadInput(f"step {self.step}: loss {loss}, gradient norm {norm} (examples {examples[:8]}...): nothing was updated, and "
                           f"the last checkpoint is whole; lower --lr or look at these examples")
        rate = learning_rate(self.step, self.steps, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"lr": rate, "grad_norm": norm}

    def log(self, split: str, metrics: dict, shown: tuple[str, ...]) -> None:
        """Append a line to metrics.jsonl and show some of it in the bar (rank 0)."""
        if ranks.rank():
            return
        with naming(self.out / "metrics.jsonl"):
            self.log_file.write(json_line({"step": self.step, "split": split} | metrics))
            self.log_file.flush()
        line = ", ".join(f"{name} {metrics[name]:.4g}" for name in shown)
        if split == "train":
            self.bar.set_postfix_str(line)
        else:
            self.bar.write(f"step {self.step + 1}: {split} {line}")

    def report_long(self, path: Path, long: list[int], length) -> None:
        """Name each over-long example once, when it is first met."""
        for i in long:
            if (str(path), i) not in self.left_out:
                self.left_out.add((str(path), i))
                self.bar.write(f"left out: {path} example {i + 1} has {length(i)} tokens, "
                               f"more than --micro-tokens {self.config.micro_tokens}")

    def due(self) -> bool:
        """Is it time to validate, after this step?"""
        return (self.step + 1) % self.config.eval_every == 0 or self.step + 1 == self.steps

    def keep_if_best(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise BadInput(f"step {self.step + 1}: the validation loss is {loss}, and no model can be chosen by it; the last checkpoint is "
                           f"whole; lower --lr or look at --validation {getattr(self.config, 'validation', '')}")
        if loss < self.best:
            self.best = loss
            self.save_model()

    def finish(self, validated: bool) -> None:
        """After the last step: without validations the last model is the result."""
        if not validated:
            self.save_model()
        print(f"model: {self.out / 'model'}" + (f" (validation loss {self.best:.4f})" if validated else "")
              + f"; left out as over-long: {len(self.left_out)}")

    def save_model(self) -> None:
        save_checkpoint(self.out / "model", self.model, self.tokenizer_from, self.prompt, DTYPES[self.config.save_dtype])

    # ------------------------------------------------------------------------------------------ checkpoints

    def _checkpoints(self) -> list[Path]:
        return sorted((self.out / "checkpoints").glob("step-*[0-9]"))

    def _open_folder(self) -> None:
        """Make the run's folder, or clear away what a killed run left in it (rank 0)."""
        replaced = self.out.with_name(self.out.name + ".replaced")
        if self.out.exists() and not self.config.resume:
            shutil.rmtree(replaced, ignore_errors=True)
            self.out.rename(replaced)  # first: a kill while its files go must leave no half of a run for --resume to find
        shutil.rmtree(replaced, ignore_errors=True)  # also what such a kill has left
        (self.out / "checkpoints").mkdir(parents=True, exist_ok=True)
        self._remove_old()
        if not (self.out / "config.json").exists():
            write_json(self.out / "config.json", resolved(self.config) | contents(self.config))
        self._trim_log()
        self.log_file = open(self.out / "metrics.jsonl", "a", encoding="utf-8")

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Weights and both moments by name, this rank's rows of them: what a checkpoint holds."""
        parameters = ranks.parameters(self.model)
        return {name: p.detach() for name, p in parameters.items()} | {
            f"{name}.{key}": self.optimizer.state[p][key] for name, p in parameters.items() for key in ("exp_avg", "exp_avg_sq")}

    def save(self) -> None:
        """Weights, both moments, step and best so far; written aside and renamed, then older ones go.

        Every rank writes its own rows; any number of ranks can go on from them.
        """
        folder = self.out / "checkpoints" / f"step-{self.step:08d}"
        aside = folder.with_suffix(".tmp")
        if ranks.rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
        ranks.wait()
        with naming(folder):
            ranks.save_tensors(aside, self._tensors())
        ranks.wait()
        if ranks.rank() == 0:
            write_json(aside / "state.json", {"step": self.step, "best": None if self.best == math.inf else self.best,
                                              "left_out": sorted(self.left_out)})
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(aside, folder)
            self._remove_old()
        ranks.wait()  # a rank that then stops would have torchrun end rank 0 too

    def _remove_old(self) -> None:
        """All but the last --keep checkpoints, and what a killed run left half-written."""
        for old in [*self._checkpoints()[:-self.config.keep], *(self.out / "checkpoints").glob("*.tmp")]:
            shutil.rmtree(old)

    def _restore(self, folder: Path) -> None:
        state = read_json(folder / "state.json")
        self.step, self.best = state["step"], math.inf if state["best"] is None else state["best"]
        self.left_out = {tuple(pair) for pair in state["left_out"]}
        for p in ranks.parameters(self.model).values():  # AdamW counts its steps per parameter; here they are the run's
            self.optimizer.state[p] = {"step": torch.tensor(float(self.step), device=self.model.device),
                                       "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        ranks.load_tensors(folder, self._tensors())
        print(f"resumed from {folder}")

    def _trim_log(self) -> None:
        """Forget what was logged after the checkpoint that the run goes on from."""
        path = self.out / "metrics.jsonl"
        if path.exists():
            lines = [line for line in path.read_text(encoding="utf-8").split("\n")[:-1] if json.loads(line)["step"] < self.step]
            with writing(path) as file:
                file.writelines(line + "\n" for line in lines)


def contents(config: TrainConfig) -> dict[str, str]:
    """A hash of each data file: a resumed run must not meet other data behind the same path."""
    found = {}
    for name in ("train", "validation"):
        path = getattr(config, name, None)
        if path and Path(path).is_file():  # else `Examples` will say so
            with open(path, "rb") as file:
                found[f"content of --{name}"] = hashlib.file_digest(file, "blake2b").hexdigest()[:16]
    return found


def check_out(config: TrainConfig) -> None:
    """Before any work: refuse an existing folder, or one that was made with other settings. Prints the config."""
    print_config(config)
    out = Path(config.out)
    if out.exists() and not (config.resume or config.overwrite):
        raise BadInput(f"{out}: exists already; give --resume to go on, --overwrite to replace it, or another --out")
    refuse_existing(out, overwrite=True)
    is_run = (out / "checkpoints").is_dir() and (out / "config.json").is_file()
    if out.exists() and config.overwrite and any(out.iterdir()) and not is_run:
        raise BadInput(f"{out}: is not the folder of a training run, so --overwrite leaves it alone; "
                       f"remove it yourself or give another --out")
    for name in ("model", "from_scratch", "train", "validation") if config.overwrite else ():
        needed = getattr(config, name, None)
        if needed and Path(needed).resolve().is_relative_to(out.resolve()):
            raise BadInput(f"{out}: holds --{name.replace('_', '-')} {needed}, which --overwrite would remove; give another --out")
    if config.resume and (out / "config.json").exists():
        before = expect(read_json(out / "config.json"), dict, str(out / "config.json"))
        ours = {k: v for k, v in resolved(config).items() if k not in marked(config, MAY_CHANGE)}
        changed = [name for name in ours if before.get(name) != ours[name]]
        if changed:
            raise BadInput(f"{out / 'config.json'}: the run was begun with another --{changed[0].replace('_', '-')} "
                           f"({before.get(changed[0])!r}); resume with the same settings")
        changed = [name for name, content in contents(config).items() if before.get(name, content) != content]
        if changed:
            raise BadInput(f"{out / 'config.json'}: the {changed[0]} is not what the run was begun with; "
                           f"put the file back, or give --overwrite")
    ranks.wait()  # before rank 0 changes the folder that the others still look at


def print_budget(model: Decoder, config: TrainConfig, examples: int, steps: int, tokens: int) -> None:
    """Parameters, tokens per step, steps, estimated memory: before step 0. `tokens`: in the trees of the first step."""
    print(f"budget: {sum(p.numel() for p in model.parameters()):,} parameters; {examples:,} examples, "
          f"{steps:,} steps of {config.batch_size}; first step {tokens:,} tokens in trees of at most {config.micro_tokens:,}")
    table = memory(model.config, config, ranks.count())
    print(f"memory, on each of {ranks.count()} ranks, about:" if ranks.count() > 1 else "memory, about:")
    for name, size in (table | {"together": sum(table.values())}).items():
        print(f"  {name:<58} {size / 1e9:7.2f} GB")


def memory(shape: ModelConfig, config: TrainConfig, n_ranks: int) -> dict[str, float]:
    """Estimated bytes on each of `n_ranks` ranks, by what they are for; the rank with the most rows, full trees."""
    with torch.device("meta"):
        model = Decoder(shape)
    rows = sum(math.ceil(len(p) / n_ranks) * p[0].numel() for p in model.parameters())
    layer = sum(p.numel() for p in model.layers[0].parameters())
    around = sum(p.numel() for p in model.parameters()) - layer * len(model.layers)  # embedding, last norm, head
    narrow = 2 if torch.device(config.device).type == "cuda" else 4  # bytes of a number in a matrix product
    copy = 2 if narrow == 2 else 0  # bytes of a weight's bf16 copy
    C, heads, wide = shape.hidden_size, (2 * shape.num_attention_heads + 2 * shape.num_key_value_heads) * shape.head_dim, shape.intermediate_size
    # bytes that a layer keeps of a token for its backward pass; on CPU, norms and SwiGLU are made again (Linear.after)
    kept = 2 * (6 * C + 2 * heads + 3 * wide) if narrow == 2 else 4 * (2 * C + heads + 2 * wide)
    chunk = head_chunk(config.device) * shape.vocab_size * 16  # logits, fp32, and three more of their size in the backward pass
    chunk += shape.vocab_size * shape.hidden_size * (copy + (4 if n_ranks == 1 else 0))  # the head's bf16 copy and new gradient
    table = {"weights, fp32": 4 * rows, "gradients, fp32": 4 * rows, "both moments, fp32": 8 * rows}
    if n_ranks > 1:
        table["gathered: two layers, embedding and head, their gradients"] = layer * (3 * narrow + 4) + around * 8
    if config.checkpoint_activations:  # of a layer, its input alone is kept, fp32; the rest while it is at work
        table["activations, checkpointed"] = config.micro_tokens * 4 * shape.hidden_size * len(model.layers)
        table["at work: a layer, or a chunk of logits"] = max(config.micro_tokens * kept + copy * layer, chunk)
    else:
        if copy and n_ranks == 1:
            table["weights again in bf16, for the backward pass"] = copy * rows
        table["activations"] = config.micro_tokens * kept * len(model.layers)
        table["at work: a chunk of logits"] = chunk
    return table
