"""Rotary embeddings for a longer context than a model was first trained with: linear, Llama 3.1, YaRN.

A pair of a head turns by its frequency from one position to the next. For a longer context the turns are
slowed down by `factor`: all of them (linear), or the slow ones alone, which do not come round within the old
context (Llama 3.1, YaRN, arXiv 2309.00071). `keep`, per pair, says how much of its frequency stays:

    new frequency = keep * frequency + (1 - keep) * frequency / factor

All in fp32, as in Transformers: far out, the last bit of a frequency shows in the angle.
"""
import math

import torch
from torch import Tensor


def stretched_frequencies(scaling: dict, theta: float, head_dim: int) -> tuple[float, ...]:
    """(D/2,): the new frequency of each pair.

    scaling: "rope_type" and its numbers, as checkpoint/config.py reads them
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / theta ** exponents
    if scaling["rope_type"] == "linear":
        keep = torch.zeros(head_dim // 2)
    elif scaling["rope_type"] == "llama3":
        keep = llama3_keep(scaling, frequencies)
    else:
        keep = yarn_keep(scaling, theta, head_dim)
    new = keep * frequencies + (1 - keep) * frequencies / scaling["factor"]
    return tuple(new.tolist())


def llama3_keep(scaling: dict, frequencies: Tensor) -> Tensor:
    """(D/2,): by a pair's full turns within the old context, from 0 at `low_freq_factor` of them to 1 at
    `high_freq_factor`.
    """
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    return ((turns - low) / (high - low)).clamp(0, 1)


def yarn_keep(scaling: dict, theta: float, head_dim: int) -> Tensor:
    """(D/2,): by a pair's number, from 1 at the pair with `beta_fast` full turns to 0 at that with
    `beta_slow`.
    """
    def pair_with(turns: float) -> float:
        wavelength = scaling["original_max_position_embeddings"] / turns
        return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_with(scaling["beta_fast"]), pair_with(scaling["beta_slow"])
    if scaling["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001
    pairs = torch.arange(head_dim // 2, dtype=torch.float32)
    return 1 - ((pairs - first) / (last - first)).clamp(0, 1)
