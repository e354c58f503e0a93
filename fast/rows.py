"""The columns of a batch, indexed and concatenated together.

Plain (generate.py): a row per continuation, all of one length, from the first token to the last. Here rows
come and go while others are decoded, so what is known of them stands in columns of equal length, and every
change of the batch is an index into all of them: `rows.select(order)` keeps, drops or repeats rows,
`rows.append(others)` adds some.
"""
from dataclasses import dataclass, fields
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Columns:
    """Tensors whose first dimension is the same: one entry per row."""

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def columns(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    def select(self, index: Tensor) -> Self:
        """The rows that `index` names, int64 or bool, in its order."""
        return type(self)(*(column[index] for column in self.columns()))

    def append(self, others: Self) -> Self:
        return type(self)(*(torch.cat(pair) for pair in zip(self.columns(), others.columns(), strict=True)))


@dataclass
class Rows(Columns):
    """What is decoded: R rows, each the common beginning of one or more continuations of a prompt."""
    request_id: Tensor  # (R,) int64, of its request
    start: Tensor       # (R,) int64, tokens of its prompt
    length: Tensor      # (R,) int64, tokens behind the prompt
    limit: Tensor       # (R,) int64, the most it may have of them
    done: Tensor        # (R,) bool
    tokens: Tensor      # (R, W) int64, W at least the longest length
    p_yes: Tensor       # (R, W) fp32, P(Yes) where each of them was sampled

    @classmethod
    def new(cls, request_id: int, start: int, limit: int, n: int, width: int, device: torch.device) -> "Rows":
        """n rows of one request that have no token yet."""
        def column(value: int) -> Tensor:
            return torch.full((n,), value, dtype=torch.int64, device=device)
        return cls(column(request_id), column(start), column(0), column(limit),
                   done=torch.zeros(n, dtype=torch.bool, device=device),
                   tokens=torch.zeros(n, width, dtype=torch.int64, device=device),
                   p_yes=torch.zeros(n, width, device=device))

    def widen(self, width: int) -> None:
        """Room for `width` tokens: a quarter more when there must be more, so that it is rare."""
        old = self.tokens.shape[1]
        if width > old:
            more = max(width, old + old // 4) - old
            self.tokens = F.pad(self.tokens, (0, more))
            self.p_yes = F.pad(self.p_yes, (0, more))


@dataclass
class Draws(Columns):
    """The continuations that are being sampled. Those that agree so far draw from one row."""
    row: Tensor     # (N,) int64, the row that each is in
    seed: Tensor    # (N,) int64
    number: Tensor  # (N,) int64, which of its request's K continuations it is
