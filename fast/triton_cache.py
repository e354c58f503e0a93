"""Decoding's attention on a GPU, in a kernel written in Triton.

Plain (fast/cache.py): the three sets of keys that a row sees, prefix, prompt and own, have a softmax each, of
some ten operations, and the results are merged. A step of 28 layers starts a thousand kernels for it.

Fast: one kernel for each set (for the prompts one for each bucket of lengths). A softmax can be taken up
where another one ended, since all that it needs to know of the keys before is their result and their
log-sum-exp. With highest = L, total = 1 and sum = out at first,

    highest' = max(highest, scores)
    total'   = total * exp(highest - highest') + sum of exp(scores - highest')
    sum'     = sum   * exp(highest - highest') + sum of exp(scores - highest') v
    out = sum / total,   L = highest + log(total)

is the softmax over the keys before and the new ones. So the kernel goes over the prefix, is started again
where it ended for the prompts, and again for the rows. And it reads no more of a row's keys than there are.
"""
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fast.cache import Cache

BLOCK = 64             # queries, and keys, that a program looks at together, at most
BLOCK_BYTES = 2 ** 14  # and of each at most so many bytes, to fit the shared memory of a card of 24 GB


class Groups(NamedTuple):
    """Which rows see the same keys: group g has the rows order[first[g]], ..., count[g] of them.

    Its keys are the first length[g] ones; all int64. most: rows of the largest group
    """
    order: Tensor
    first: Tensor
    count: Tensor
    length: Tensor
    most: int


class TritonCache(Cache):
    """fast.cache.Cache with another `attend`."""

    def arrange(self, request_ids: Tensor) -> None:
        super().arrange(request_ids)
        R = len(request_ids)
        device = request_ids.device
        self.row = torch.arange(R, device=device)
        self.one = torch.ones_like(self.row)
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        self.all_rows = Groups(self.row, zero, zero + R, zero + self.prefix_length, R)
        self.by_bucket = []  # (keys and values (2, layers, P, KV, L, D), the groups of its slots)
        rows = self.by_slot
        start = 0
        for bucket, _ in self.in_use:
            mine = slice(start, start + len(bucket.slots))
            groups = Groups(rows.order, rows.first[mine], rows.count[mine], bucket.lengths(), rows.most)
            self.by_bucket.append((bucket.keys_values, groups))
            start = mine.stop

    def begin_step(self, last: Tensor, width: int) -> None:
        self.each_row = Groups(self.row, self.row, self.one, last + 1, 1)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        q = q.contiguous()
        out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)  # (R, H)
        before = None
        if self.prefix_length:
            attend_groups(q, self.prefix[:, layer, None], self.all_rows, before, out, lse)
            before = out
        for keys_values, groups in self.by_bucket:
            attend_groups(q, keys_values[:, layer], groups, before, out, lse)
        y = torch.empty_like(q)
        attend_groups(q, self.rows[:, layer], self.each_row, out, y, lse)
        return y


def attend_groups(q: Tensor, keys_values: Tensor, groups: Groups, before: Tensor | None,
                  out: Tensor, lse: Tensor) -> None:
    """The queries of each group over its keys: q (R, H, D), keys_values (2, groups, KV, L, D).

    before (R, H, D) with lse (R, H): where the softmax is taken up; None: there were no keys before. Written
    to out (R, H, D) and lse.
    """
    H, D = q.shape[1:]
    keys, values = keys_values
    KV = keys.shape[1]
    G = H // KV
    options = options_for(D, q.dtype, G * groups.most)
    grid = (len(groups.first), KV, triton.cdiv(G * groups.most, options["QUERIES"]))
    attend_kernel[grid](
        q, out if before is None else before, out, lse, keys, values,
        groups.order, groups.first, groups.count, groups.length,
        D ** -0.5, keys.stride(0), keys.stride(1),
        H, G, D, before is not None, **options,
    )


def options_for(D: int, dtype: torch.dtype, n_queries: int) -> dict:
    """What the kernel is compiled for: the size of a head, padded; queries and keys at a time; how products
    are rounded; how many loads are under way.
    """
    width = max(16, triton.next_power_of_2(D))
    most = max(16, min(BLOCK, BLOCK_BYTES // (width * dtype.itemsize)))
    is_fp32 = dtype == torch.float32
    return {
        "WIDTH": width,
        "QUERIES": max(16, min(most, triton.next_power_of_2(n_queries))),
        "KEYS": most,
        "PRECISION": "ieee" if is_fp32 else "tf32",
        "num_stages": 2 if is_fp32 else 3,
    }


@triton.jit
def attend_kernel(
    q, before, out, lse, keys, values, order, first, count, length, scale, group_stride, head_stride,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, IS_BEGUN: tl.constexpr,
    WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):
    """A program has QUERIES of the queries that a group's rows have in the G heads of one KV head."""
    group = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    n = tl.program_id(2) * QUERIES + tl.arange(0, QUERIES)
    n_rows = tl.load(count + group)
    is_query = n < n_rows * G
    row = tl.load(order + tl.load(first + group) + n // G, mask=is_query, other=0)
    index = row * H + kv_head * G + n % G  # of (R, H)
    d = tl.arange(0, WIDTH)
    at = index[:, None] * D + d[None, :]
    is_number = is_query[:, None] & (d < D)[None, :]
    query = tl.load(q + at, mask=is_number, other=0.0)  # (QUERIES, WIDTH)
    if IS_BEGUN:
        highest = tl.load(lse + index, mask=is_query, other=0.0)
        total = tl.full((QUERIES,), 1.0, tl.float32)
        result = tl.load(before + at, mask=is_number, other=0.0)
    else:
        highest = tl.full((QUERIES,), float("-inf"), tl.float32)
        total = tl.zeros((QUERIES,), tl.float32)
        result = tl.zeros((QUERIES, WIDTH), tl.float32)

    base = group * group_stride + kv_head * head_stride
    n_keys = tl.load(length + group)
    if tl.program_id(2) * QUERIES >= n_rows * G:  # a program for the rows that a larger group has
        n_keys = n_keys * 0
    for begin in range(0, n_keys, KEYS):
        key = begin + tl.arange(0, KEYS)
        is_key = key < n_keys
        at_key = base + key[:, None] * D + d[None, :]
        is_key_number = is_key[:, None] & (d < D)[None, :]
        k = tl.load(keys + at_key, mask=is_key_number, other=0.0)  # (KEYS, WIDTH)
        v = tl.load(values + at_key, mask=is_key_number, other=0.0)
        scores = tl.dot(query, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where(is_key[None, :], scores, float("-inf"))  # (QUERIES, KEYS)
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp(scores - new_highest[:, None])
        shrink = tl.exp(highest - new_highest)
        total = total * shrink + tl.sum(weights, axis=1)
        result = result * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        highest = new_highest
    tl.store(out + at, result / total[:, None], mask=is_number)
    tl.store(lse + index, highest + tl.log(total), mask=is_query)
