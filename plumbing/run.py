"""What the training scripts share: batches, schedule, optimizer, and the run, which is all that is on disk.

A run's folder:

    config.json             the settings, and a hash of each data file
    metrics.jsonl           one line per optimizer step, and one per validation
    checkpoints/step-N/     all that a killed run needs to go on (the last --keep of them): what is trained
    model/, adapter/        the result: the best model by validation loss, or the last one without validation

The loop itself stands in the scripts:

    run = Run(out, settings, model, optimizer, steps, save_every, keep, resume, results)
    for step in run.progress():     # saves a checkpoint when it is time, or when a signal asks to stop
        ...                         # forward, backward, clip
        run.check_finite(loss, norm, examples)
        optimizer.step()
        run.log("train", {"loss": loss}, shown=("loss",))
    run.finish()
"""
import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from plumbing import ranks
from plumbing.adamw_8bit import AdamW8bit
from plumbing.errors import BadInput, Stopped
from plumbing.files import json_line, naming, read_json, write_json, writing
from plumbing.settings import summary_writer_class

# ------------------------------------------------------------------------------ batches, schedule, optimizer

def epoch_batches(examples: Sequence[int], batch_size: int, epochs: int, max_steps: int | None,
                  seed: int) -> tuple[int, Callable[[int], list[int]]]:
    """Deal examples to optimizer steps -> (the number of steps, step -> the numbers of its examples).

    The order within an epoch depends on the seed and the epoch alone, so a resumed run needs to know no more
    than the number of its step.
    """
    steps_per_epoch = math.ceil(len(examples) / batch_size)
    steps = steps_per_epoch * epochs
    if max_steps is not None:
        steps = min(steps, max_steps)

    def batch_of(step: int) -> list[int]:
        epoch, step_in_epoch = divmod(step, steps_per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(examples)
        first = step_in_epoch * batch_size
        return order[first:first + batch_size].tolist()
    return steps, batch_of


def learning_rate(step: int, steps: int, peak: float, warmup: float, schedule: str) -> float:
    """Linear warm-up from peak / warm-up steps, then constant or a cosine to 0 that ends after the last step.

    warmup: the share of the steps. Of 10 steps with peak 1 and warmup 0.2: 0.5, 1.0, 1.0, 0.96, ..., 0.04.
    """
    warmup_steps = round(warmup * steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    angle = math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)  # from 0 to pi
    return peak * 0.5 * (1 + math.cos(angle))


def make_optimizer(model: nn.Module, lr: float, weight_decay: float, beta2: float,
                   adamw_8bit: bool = False) -> torch.optim.Optimizer:
    """AdamW in two groups: the weights of matrices decay, those of vectors (norms, biases) do not."""
    parameters = ranks.trained(model).values()
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    if adamw_8bit:
        return AdamW8bit(groups, lr=lr, betas=(0.9, beta2))
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2), fused=True)


def new_state(optimizer: torch.optim.Optimizer, p: Tensor, step: int) -> dict[str, Any]:
    """The optimizer's state of a parameter after `step` steps, with moments of 0."""
    if isinstance(optimizer, AdamW8bit):
        return optimizer.new_state(p, step)
    return {
        "step": torch.tensor(float(step), device=p.device),  # AdamW counts for each parameter
        "exp_avg": torch.zeros_like(p),
        "exp_avg_sq": torch.zeros_like(p),
    }


def precision(device: torch.device | str) -> torch.autocast:
    """On CUDA the matrix products, and nothing else, run in bf16; on the CPU all is fp32. Weights stay fp32.

    autocast keeps no cache, since a pass uses each weight once: a cache would hold all of them in bf16 until
    the pass ends.
    """
    kind = torch.device(device).type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda", cache_enabled=False)


# ------------------------------------------------------------------------------ the run

class Run:
    """A training run on the disk: how far it has come, its checkpoints, its log, its best model."""

    def __init__(self, out: str, settings: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer,
                 steps: int, save_every: int, keep: int, resume: bool,
                 results: dict[str, Callable[[Path], None]], tensorboard: bool = False):
        """results: what the run ends in: the name of a folder -> what writes it."""
        self.out = Path(out)
        self.settings = settings
        self.model = model
        self.optimizer = optimizer
        self.steps = steps
        self.save_every = save_every
        self.keep = keep
        self.results = results
        self.step = 0         # optimizer steps done
        self.best = math.inf  # the lowest validation loss so far
        self.stop_signal = 0  # the signal that has asked to stop; 0: none has
        checkpoints = self._checkpoints() if resume else []
        if checkpoints:
            self._restore(checkpoints[-1])
        if ranks.rank() == 0:
            self._open_folder(resume)
        self.board = None  # TensorBoard's writer
        if tensorboard and ranks.rank() == 0:
            self.board = summary_writer_class()(str(self.out / "tensorboard"), purge_step=self.step)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask_to_stop)

    def _ask_to_stop(self, number: int, frame: Any) -> None:
        self.stop_signal = number

    # ------------------------------------------------------------------------------------------ in the loop

    def progress(self) -> Iterator[int]:
        """The steps still to do. Saves a checkpoint every so many steps, and when a signal asks to stop."""
        stop = 0
        self.bar = tqdm(total=self.steps, initial=self.step, desc="train", unit="step",
                        disable=ranks.rank() > 0)
        with self.bar:
            while self.step < self.steps and not stop:
                yield self.step
                self.step += 1
                self.bar.update()
                stop = int(ranks.highest(self.stop_signal))  # whichever rank was asked, all stop
                if stop or self.step % self.save_every == 0 or self.step == self.steps:
                    self.save()
        if self.step < self.steps:
            raise Stopped(f"stopped by {signal.Signals(stop).name} after step {self.step}, which is saved; "
                          "give the same command with --resume to go on", stop)

    def check_finite(self, loss: float, norm: float, examples: list[int]) -> None:
        """Raise BadInput, before the update, if the step's loss or the norm of its gradient is not finite."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise BadInput(f"step {self.step}: loss {loss}, gradient norm {norm} "
                           f"(examples {examples[:8]}...): "
                           "nothing was updated, and the last checkpoint is whole; "
                           "lower --lr or look at these examples")

    def log(self, split: str, metrics: dict[str, float], shown: tuple[str, ...]) -> None:
        """Append a line to metrics.jsonl, and show some of the metrics (rank 0)."""
        if ranks.rank():
            return
        with naming(self.out / "metrics.jsonl"):
            self.log_file.write(json_line({"step": self.step, "split": split} | metrics))
            self.log_file.flush()
        if self.board is not None:
            for name, value in metrics.items():
                self.board.add_scalar(f"{split}/{name}", value, self.step)
            self.board.flush()
        line = ", ".join(f"{name} {metrics[name]:.4g}" for name in shown)
        if split == "train":
            self.bar.set_postfix_str(line)
        else:
            self.bar.write(f"step {self.step + 1}: {split} {line}")

    def is_due(self, every: int) -> bool:
        """Is it time, after this step, for what is done every so many steps and after the last one?"""
        return (self.step + 1) % every == 0 or self.step + 1 == self.steps

    def keep_if_best(self, loss: float, validation: Path) -> None:
        """Save the model if its validation loss, over the file `validation`, is the lowest so far."""
        if not math.isfinite(loss):
            raise BadInput(f"step {self.step + 1}: the validation loss is {loss}, and no model can be chosen "
                           "by it; the last checkpoint is whole; "
                           f"lower --lr or look at --validation {validation}")
        if loss < self.best:
            self.best = loss
            self.save_result()

    def finish(self) -> None:
        """After the last step: without a validation the last model is the result."""
        folders = ", ".join(f"{name}: {self.out / name}" for name in self.results)
        if self.best < math.inf:
            folders += f" (validation loss {self.best:.4f})"
        else:
            self.save_result()
        print(folders)

    def save_result(self) -> None:
        for name, save in self.results.items():
            save(self.out / name)

    # ------------------------------------------------------------------------------------------ checkpoints

    def _checkpoints(self) -> list[Path]:
        return sorted((self.out / "checkpoints").glob("step-*[0-9]"))

    def _tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds, by name: what is trained and both moments, this rank's rows of them."""
        parameters = ranks.trained(self.model)
        tensors = {name: p.detach() for name, p in parameters.items()}
        for name, p in parameters.items():
            for key, value in self.optimizer.state[p].items():
                if key != "step":
                    tensors[f"{name}.{key}"] = value
        return tensors

    def save(self) -> None:
        """Write a checkpoint aside, rename it, and remove older ones.

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
            best = None if self.best == math.inf else self.best  # JSON has no infinity
            write_json(aside / "state.json", {"step": self.step, "best": best})
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(aside, folder)
            self._remove_old()
        ranks.wait()  # a rank that then stops would have torchrun end rank 0 too

    def _remove_old(self) -> None:
        """Remove all but the last --keep checkpoints, and what a killed run left half-written."""
        for old in [*self._checkpoints()[:-self.keep], *(self.out / "checkpoints").glob("*.tmp")]:
            shutil.rmtree(old)

    def _restore(self, folder: Path) -> None:
        state = read_json(folder / "state.json")
        self.step = state["step"]
        self.best = math.inf if state["best"] is None else state["best"]
        for p in ranks.trained(self.model).values():
            self.optimizer.state[p] = new_state(self.optimizer, p, self.step)
        ranks.load_tensors(folder, self._tensors())
        print(f"resumed from {folder}")

    # ------------------------------------------------------------------------------------------ the folder

    def _open_folder(self, resume: bool) -> None:
        """Make the run's folder, or clear away what a killed run left in it (rank 0)."""
        replaced = self.out.with_name(self.out.name + ".replaced")
        if self.out.exists() and not resume:
            shutil.rmtree(replaced, ignore_errors=True)
            self.out.rename(replaced)  # first: a kill while files go must not leave half of a run to --resume
        shutil.rmtree(replaced, ignore_errors=True)  # also what such a kill has left
        (self.out / "checkpoints").mkdir(parents=True, exist_ok=True)
        self._remove_old()
        if not (self.out / "config.json").exists():
            write_json(self.out / "config.json", self.settings)
        self._trim_log()
        log = self.out / "metrics.jsonl"
        self.log_file = open(log, "a", encoding="utf-8")  # noqa: SIM115, as it stays open

    def _trim_log(self) -> None:
        """Forget what was logged after the checkpoint that the run goes on from."""
        path = self.out / "metrics.jsonl"
        if not path.exists():
            return
        whole_lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        with writing(path) as file:
            for line in whole_lines:
                if json.loads(line)["step"] < self.step:
                    file.write(line + "\n")
