"""How many threads PyTorch computes with, chosen by the size of the work."""
import os

import torch
from torch import nn

SMALL = 10_000_000  # parameters; the matrices of a smaller model gain nothing from a second thread


def choose_threads(model: nn.Module) -> None:
    """One thread for a small model on CPU, and say so; else PyTorch's own choice. OMP_NUM_THREADS overrides.

    Threads that share a small product wait for each other at its end, and beside another job that keeps a
    core busy they wait long.
    """
    parameters = sum(p.numel() for p in model.parameters())
    if parameters < SMALL and model.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
        print(
            f"threads: 1, as a model of {parameters:,} parameters gains nothing from more "
            "(OMP_NUM_THREADS overrides)"
        )
