"""How many threads PyTorch computes with, chosen by the size of the work."""
import os

import torch

SMALL = 10_000_000  # parameters; the matrices of a smaller model gain nothing from a second thread


def choose_threads(parameters: int, device: str) -> None:
    """One thread for a small model on CPU, and say so; else PyTorch's own choice. OMP_NUM_THREADS overrides.

    Threads that share a small product wait for each other at its end, and they wait long beside another job
    that keeps a core busy.
    """
    if parameters < SMALL and torch.device(device).type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
        print(f"threads: 1, as a model of {parameters:,} parameters gains nothing from more "
              "(OMP_NUM_THREADS overrides)")
