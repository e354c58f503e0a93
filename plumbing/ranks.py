"""Many ranks: one process per GPU, started by torchrun. In a single process everything here does nothing.

    torchrun --nproc-per-node 8 -- train_sft.py --model FOLDER --train sft.jsonl --out runs/sft

Training cuts the model over the ranks (FSDP2): of every parameter, gradient and moment a rank holds some rows, and a layer
is whole on a rank only while it is at work. Sampling and scoring give every rank the whole model and a share of the cases.
Weights and gradients travel between the GPUs (NCCL), the few numbers that the ranks agree on between the CPUs (gloo).
All ranks must see the same files. Left out: tensor, pipeline and sequence parallelism.
"""
import math
import os
import sys
import time
import warnings
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn

patience = math.inf  # seconds, see `join`
FILE_BYTES = 4_000_000_000  # of a rank's tensors in one file of a checkpoint: so much is copied to the CPU at once


def join(device: str, timeout: float) -> None:
    """Meet the ranks that torchrun started. From here on rank 0 alone prints, and "cuda" means this rank's own GPU.

    A rank that dies breaks its connections: the others fail at their next collective, and torchrun ends them before.
    One that hangs without dying is given up by the others when they have waited for it for `timeout` seconds; one that
    has died too, without torchrun, where they wait in `meet`.
    """
    global patience
    patience = timeout
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout))
    if rank():
        sys.stdout = open(os.devnull, "w")


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
    """Beside other ranks a program ends without Python's clearing up: gloo's threads may still wait then, for a rank that is gone or
    (once in twenty runs, all being well) for nothing, and C++ aborts, with another exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_lost(error: Exception) -> bool:
    """Does the error say that another rank is gone, or did not answer in time?"""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


# ---------------------------------------------------------------------------------------------- what the ranks agree on

def share(items: Sequence) -> Sequence:
    """This rank's part of a list or range that is the same on every rank: each count()-th item."""
    return items[rank()::count()]


def total(*values: float) -> list[float]:
    """The sums of numbers over the ranks, in fp64."""
    return _reduced(values, dist.ReduceOp.SUM)


def highest(value: float) -> float:
    """The largest of the ranks' numbers."""
    return _reduced([value], dist.ReduceOp.MAX)[0]


def wait() -> None:
    """Until every rank has come here."""
    total(0)


def sign() -> None:
    """Tell the ranks that wait in `meet` that this one is at work."""
    if count() > 1:
        dist.distributed_c10d._get_default_store().add(f"signs of {rank()}", 1)


def meet() -> None:
    """Until every rank has come here, however long its work takes: one is given up when it has shown no sign for `patience`."""
    if count() == 1:
        return
    store = dist.distributed_c10d._get_default_store()  # what the ranks have found each other by: numbers under names
    meeting = store.add(f"meetings of {rank()}", 1)
    for other in range(count()):
        seen, since = None, time.monotonic()
        while store.add(f"meetings of {other}", 0) < meeting:
            signs = store.add(f"signs of {other}", 0)
            if signs != seen:
                seen, since = signs, time.monotonic()
            if time.monotonic() - since > patience:
                raise dist.DistError(f"rank {other} has shown no sign of work for {patience:.0f} seconds")
            time.sleep(0.1)


def _reduced(values, operation) -> list[float]:
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


# ---------------------------------------------------------------------------------------------- a model over the ranks

def shard(model: nn.Module, device: str) -> None:
    """Cut a decoder's parameters by rows over the ranks. Gradients are summed over the ranks, not averaged.

    On CUDA a layer's weights are gathered in bf16, as autocast would use them, and its gradients are summed in fp32.
    Embedding, last norm and head stay whole, in fp32, from the model's forward pass to the end of its backward pass,
    since response_logprobs uses the head after the forward pass.
    """
    if count() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh  # here, as these imports take a second
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    kind = torch.device(device).type
    mesh = init_device_mesh(kind, (count(),))
    narrow = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=narrow if kind == "cuda" else MixedPrecisionPolicy())
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for module in (*model.layers, model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no operation that divides


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters as the optimizer sees them: each rank's rows, also after a forward pass that had no backward pass."""
    if hasattr(model, "reshard"):
        model.reshard()
    return dict(model.named_parameters())


def own_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The rows (n, ...) of a tensor that lie on this rank, and the number of the first one."""
    if not hasattr(tensor, "to_local"):
        return tensor.detach(), 0
    return tensor.detach().to_local(), min(rank() * math.ceil(len(tensor) / count()), len(tensor))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All rows of a tensor, gathered: every rank must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


# ---------------------------------------------------------------------------------------------- checkpoints

def save_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Every rank writes the rows that it has, with PyTorch's distributed checkpoint (DCP).

    DCP's own format keeps its index in a pickle. Its safetensors format, used here, has none: each file says in its
    header where its rows belong, so any number of ranks reads what any other number wrote.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, save  # here, as the import takes a second
    numbers, size = {}, 0
    for name, tensor in tensors.items():
        numbers[name] = 1 + size // FILE_BYTES
        size += own_rows(tensor)[0].nbytes
    with _one_error():
        save(tensors, storage_writer=HuggingFaceStorageWriter(folder, numbers, save_distributed=True))


def load_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fill every rank's rows from what save_tensors wrote."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load
    with _one_error():
        load(tensors, storage_reader=HuggingFaceStorageReader(folder))


@contextmanager
def _one_error():
    """DCP's own exception is not even an Exception: raise what lies under it. And one rank is no cause for a warning."""
    from torch.distributed.checkpoint import CheckpointException
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from None
