"""AdamW with both moments in 8 bits: a trained number takes 10 bytes, and not 16.

Plain (torch.optim.AdamW): weight, gradient and both moments in fp32, 4 bytes each. Here a moment is kept as
in arXiv 2110.02861: each row of a matrix is cut into blocks of BLOCK numbers. Of a block, its largest
absolute value is kept, the scale, and of each number a code: which of 256 fractions of the scale is nearest.
A step makes fp32 moments of the codes, updates them and the weight as AdamW does, and rounds the moments to
codes again; the weight's update uses them as they were before the rounding.

    weight     fp32    4 bytes
    gradient   fp32    4
    exp_avg    codes   1    + 4 of a scale for each block
    exp_avg_sq codes   1    + 4

Vectors (norms, biases) are few and keep fp32 moments. Blocks lie within rows, so ranks that have some rows
each (plumbing/ranks.py) have the codes of a single one. Gain: all weights of 7B fit one card of 80 GB
(docs/7b.md). torchao has the same optimizer, and a test compares the two; but it compiles with a C++ compiler
on a CPU, and its blocks depend on the number of ranks, so that checkpoints would too.
"""
import functools
import math
from typing import Any

import torch
from torch import Tensor

BLOCK = 256                # numbers that share a scale; a row that it does not divide is one block
NUMBERS_AT_ONCE = 2 ** 22  # numbers of a matrix whose moments are in fp32 at the same time


class AdamW8bit(torch.optim.Optimizer):
    """torch.optim.AdamW (arXiv 1711.05101) with moments of 8 bits for matrices."""

    def __init__(self, params: list[dict[str, Any]], lr: float, betas: tuple[float, float]):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": 1e-8, "weight_decay": 0.0})

    def new_state(self, p: Tensor, step: int = 0) -> dict[str, Any]:
        """The state of a parameter before its first step: zeros, cut over the ranks as the parameter is."""
        state = {"step": step}
        for moment in ("exp_avg", "exp_avg_sq"):
            if p.dim() < 2:
                state[moment] = torch.zeros_like(p)
            else:
                firsts = p.detach()[:, ::block_length(p)]  # a number of each block
                state[f"{moment}.codes"] = torch.zeros_like(p, dtype=torch.uint8)
                state[f"{moment}.scale"] = torch.zeros_like(firsts, memory_format=torch.contiguous_format)
        return state

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p] = self.new_state(p)
                state = self.state[p]
                state["step"] += 1
                own = {name: local(value) for name, value in state.items()}
                if p.dim() < 2:
                    update(local(p), local(p.grad), own["exp_avg"], own["exp_avg_sq"], state["step"], group)
                else:
                    update_matrix(local(p), local(p.grad), own, block_length(p), group)


def local(value: Any) -> Any:
    """A tensor's rows that lie on this rank."""
    return value.to_local() if hasattr(value, "to_local") else value


def block_length(p: Tensor) -> int:
    columns = p.shape[1]
    return BLOCK if columns % BLOCK == 0 else columns


def update_matrix(p: Tensor, grad: Tensor, state: dict[str, Any], block: int, group: dict[str, Any]) -> None:
    """A step of the matrix p (O, I), some rows at a time. state: codes (O, I), scales (O, I / block)."""
    rows_at_once = max(1, NUMBERS_AT_ONCE // p.shape[1])
    for first in range(0, len(p), rows_at_once):
        rows = slice(first, first + rows_at_once)
        moments = []
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            codes = state[f"{name}.codes"][rows]
            scale = state[f"{name}.scale"][rows]
            moments.append(decode(codes, scale, block, signed))
        exp_avg, exp_avg_sq = moments
        update(p[rows], grad[rows], exp_avg, exp_avg_sq, state["step"], group)
        for name, moment, signed in (("exp_avg", exp_avg, True), ("exp_avg_sq", exp_avg_sq, False)):
            codes, scale = encode(moment, block, signed)
            state[f"{name}.codes"][rows] = codes
            state[f"{name}.scale"][rows] = scale


def update(p: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int,
           group: dict[str, Any]) -> None:
    """AdamW's step number `step` (1, 2, ...), in place; all fp32, of one shape."""
    beta1, beta2 = group["betas"]
    p.mul_(1 - group["lr"] * group["weight_decay"])
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2 ** step)).add_(group["eps"])
    p.addcdiv_(exp_avg, root, value=-group["lr"] / (1 - beta1 ** step))


# ------------------------------------------------------------------------------------------ codes

def encode(x: Tensor, block: int, signed: bool) -> tuple[Tensor, Tensor]:
    """x fp32 (O, I) -> codes uint8 (O, I), scales fp32 (O, I / block)."""
    blocks = x.view(len(x), -1, block)
    scale = blocks.abs().amax(dim=-1)
    relative = blocks / scale.clamp(min=1e-12)[..., None]
    values = fractions(signed).to(x.device)
    halfway = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(relative, halfway, out_int32=True, right=True)
    return codes.to(torch.uint8).view(x.shape), scale


def decode(codes: Tensor, scale: Tensor, block: int, signed: bool) -> Tensor:
    """codes uint8 (O, I), scales fp32 (O, I / block) -> fp32 (O, I)."""
    values = fractions(signed).to(codes.device)
    relative = values[codes.int()].view(len(codes), -1, block)
    return (relative * scale[..., None]).view(codes.shape)


@functools.cache
def fractions(signed: bool) -> Tensor:
    """The 256 numbers in [-1, 1], or [0, 1], that codes stand for, ascending: fp32 (256,).

    0, 1, and each power of ten from 1e-6 to 1 times the middles of equal parts of [0.1, 1]: 1, 2, 4, ..., 64
    parts, and their negatives, or 2, 4, ..., 128 parts. So large numbers are kept to 1%, and small ones are
    not lost.
    """
    found = [0.0, 1.0]
    for i in range(7):
        n_parts = 2 ** i if signed else 2 ** (i + 1)
        edges = torch.linspace(0.1, 1, n_parts + 1, dtype=torch.float64)
        middles = 10.0 ** (i - 6) * (edges[1:] + edges[:-1]) / 2
        found += middles.tolist()
        if signed:
            found += (-middles).tolist()
    return torch.tensor(sorted(found), dtype=torch.float32)
