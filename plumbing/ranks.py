"""Many ranks: one process for each GPU, started by torchrun. In a single process nothing here does anything.

    torchrun --nproc-per-node 8 -- train_sft.py --model FOLDER --train sft.jsonl --out runs/sft

Training cuts the model over the ranks (FSDP2): each rank holds some rows of every parameter, gradient and
moment, and a layer is whole on a rank only while it is at work. Sampling and scoring give every rank the
whole model and a share of the cases. Weights and gradients travel between the GPUs (NCCL), the few numbers
that the ranks agree on between the CPUs (gloo). All ranks must see the same files. Left out: tensor, pipeline
and sequence parallelism.

How a lost rank is noticed:

    it dies    its connections break, so the others fail at their next collective; torchrun ends them before
    it hangs   the others give it up after `patience` seconds. In training they wait for it in a collective,
               whose timeout that is. After a sampling they wait in `meet`. There the slowest rank may need
               hours, so the seconds count from the time at which it last wrote to its file
"""
import math
import os
import sys
import time
import warnings
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Iterator, NoReturn, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

FILE_BYTES = 4_000_000_000  # of a checkpoint's file, at most: a rank copies so much to the CPU at once
NEVER = timedelta(days=10_000)

patience = math.inf  # seconds, set by `join`
meetings: dist.ProcessGroup | None = None  # all ranks, set by `join`: a group without a timeout, for `meet`
files_at_work: list[Path] = []  # the file that each rank writes to, set by `watch`


# ------------------------------------------------------------------------------------------ beginning and end

def join(device: str, timeout: float) -> None:
    """Meet the ranks that torchrun started. From here on rank 0 alone prints, and "cuda" is this rank's GPU.

    timeout: seconds after which a rank that hangs is given up.
    """
    global patience, meetings
    patience = timeout
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    backend = "gloo"
    if torch.device(device).type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    meetings = dist.new_group(backend="gloo", timeout=NEVER)
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, as it stays open


def leave() -> None:
    """End the program when all is well; in a single process, do nothing."""
    if dist.is_initialized():
        dist.destroy_process_group()
        _exit(0)


def end(code: int) -> NoReturn:
    """End the program with an error's exit code."""
    if dist.is_initialized():
        _exit(code)
    sys.exit(code)


def _exit(code: int) -> NoReturn:
    """End the program without Python's clearing up.

    Threads of gloo may still wait then, for a rank that is gone or (once in twenty runs, all being well) for
    nothing, and C++ would abort, with another exit code.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_lost(error: BaseException) -> bool:
    """Does the error say that another rank is gone, or did not answer in time?"""
    has_other_ranks = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return has_other_ranks and (isinstance(error, dist.DistError) or "gloo" in str(error))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


# ------------------------------------------------------------------------------------ what the ranks agree on

def share(items: Sequence) -> Sequence:
    """This rank's share of a list or range that is the same on every rank: each count()-th item."""
    return items[rank()::count()]


def total(*values: float) -> list[float]:
    """The sums of numbers over the ranks, in fp64."""
    return _reduced(values, dist.ReduceOp.SUM)


class Means:
    """Means over the pairs of all ranks: `add` takes the values of some pairs, (pairs,) each, by name."""

    def __init__(self):
        self.sums = {}
        self.n_pairs = 0

    def add(self, n_pairs: int, **values: Tensor) -> None:
        self.n_pairs += n_pairs
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().sum().item()

    def result(self) -> dict[str, float]:
        *sums, n_pairs = total(*self.sums.values(), self.n_pairs)
        means = {name: value / n_pairs for name, value in zip(self.sums, sums, strict=True)}
        return means | {"pairs": int(n_pairs)}


def highest(value: float) -> float:
    """The largest of the ranks' numbers."""
    return _reduced([value], dist.ReduceOp.MAX)[0]


def wait() -> None:
    """Wait until every rank has come here, `patience` seconds at most."""
    total(0)


def _reduced(values: Sequence[float], operation: dist.ReduceOp) -> list[float]:
    if count() == 1:
        return list(values)
    numbers = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(numbers, operation)
    return numbers.tolist()


def from_first(array: np.ndarray) -> np.ndarray:
    """The array as rank 0 has it, copied into the other ranks' arrays (of the same shape and dtype)."""
    if count() > 1:
        dist.broadcast(torch.from_numpy(array), 0)
    return array


def gather(value: Any) -> list:
    """Every rank's value, in the order of the ranks, once all have come here (`meet`)."""
    meet()
    values = [value] * count()
    if count() > 1:
        dist.all_gather_object(values, value)
    return values


# ---------------------------------------------------------------------------------------------- signs of life

def watch(files: list[Path]) -> None:
    """From here on, rank r shows that it is at work by writing to files[r]. With [], `meet` is `wait`."""
    global files_at_work
    files_at_work = files


def sign_of_life() -> None:
    """Show the ranks that wait in `meet` that this one is at work, though it has nothing to write yet."""
    if count() > 1 and files_at_work:
        os.utime(files_at_work[rank()])


def meet() -> None:
    """Wait until every rank has come here, however long its work takes.

    A rank is given up when its file has had the same time of modification for `patience` seconds. A rank that
    waits here touches its file, so it is not given up itself. A time is compared with earlier ones of the
    same file alone, as the clocks of two machines differ. A network file system may show it a minute late, so
    `patience` should be longer there.
    """
    if count() == 1:
        return
    if not files_at_work:
        wait()
        return
    arrival = dist.barrier(group=meetings, async_op=True)
    modified = [0] * count()  # each file's time of modification
    since = [0.0] * count()  # when this rank first saw it, on its own clock
    while not arrival.is_completed():
        sign_of_life()
        now = time.monotonic()
        for other, file in enumerate(files_at_work):
            latest = file.stat().st_mtime_ns
            if latest != modified[other]:
                modified[other] = latest
                since[other] = now
            if now - since[other] > patience:
                raise dist.DistError(f"rank {other} has shown no sign of work for {patience:.0f} seconds")
        time.sleep(0.1)
    arrival.wait()  # raises the barrier's error, if a rank has died
    wait()  # so that no rank goes on, and removes its file, while another still looks at it


# ------------------------------------------------------------------------------------- a model over the ranks

def shard(model: nn.Module, device: str) -> None:
    """Cut a decoder's parameters by rows over the ranks. Gradients are summed over the ranks, not averaged.

    On CUDA a layer's weights are gathered in bf16, as autocast would use them, and its gradients are summed
    in fp32. Last norm and head stay whole, in fp32, from the model's forward pass to the end of its backward
    pass: the loss uses the head after the forward pass. So does the embedding where it is the head too.
    """
    if count() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh  # here, as these imports take a second
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    kind = torch.device(device).type
    mesh = init_device_mesh(kind, (count(),))
    precision = MixedPrecisionPolicy()
    if kind == "cuda":
        precision = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    groups = [*model.layers, model]
    if model.head is not None:
        fully_shard(model.embed, mesh=mesh)
        groups.append(model.embed)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for module in groups:
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no operation that divides


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters as the optimizer sees them, by name: this rank's rows of each.

    A forward pass without a backward pass leaves the whole parameters in the model; they go first.
    """
    if hasattr(model, "reshard"):
        model.reshard()
    return dict(model.named_parameters())


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those of the `parameters` that are not frozen."""
    return {name: parameter for name, parameter in parameters(model).items() if parameter.requires_grad}


def own_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """The rows (n, ...) of a tensor that lie on this rank, and the number of the first one."""
    if not hasattr(tensor, "to_local"):
        return tensor.detach(), 0
    rows_of_a_rank = math.ceil(len(tensor) / count())  # the last ranks may have fewer, or none
    first = min(rank() * rows_of_a_rank, len(tensor))
    return tensor.detach().to_local(), first


def whole(tensor: Tensor) -> Tensor:
    """The tensor with all its rows, gathered from the ranks. Every rank must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


# ---------------------------------------------------------------------------------------------- checkpoints

def save_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Every rank writes the rows that it has, with PyTorch's distributed checkpoint (DCP).

    DCP's own format keeps its index in a pickle. Its safetensors format, used here, has none: each file says
    in its header where its rows belong, so any number of ranks reads what any other number wrote.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, save  # here, as it takes a second

    file_numbers = {}  # which file each tensor goes into
    size = 0
    for name, tensor in tensors.items():
        file_numbers[name] = 1 + size // FILE_BYTES
        rows, _ = own_rows(tensor)
        size += rows.nbytes
    writer = HuggingFaceStorageWriter(folder, file_numbers, save_distributed=True)
    with _plain_errors():
        save(tensors, storage_writer=writer)


def load_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill every rank's rows from what save_tensors wrote."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    with _plain_errors():
        load(tensors, storage_reader=HuggingFaceStorageReader(folder))


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise a rank's own error in place of DCP's exception, which collects those of all ranks.

    DCP's warning that there is one rank alone is left out.
    """
    from torch.distributed.checkpoint import CheckpointException

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            first_error, _ = next(iter(error.failures.values()))
            raise first_error from None
