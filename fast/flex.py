"""Attention within a tree, on a GPU: flex_attention with the tree's intervals as its mask.

Plain (model.tree_attention): SDPA with a (T, T) mask. Fast: one kernel for all queries, which passes over the
blocks of 128 × 128 that nobody sees. Key j is seen by the queries begin[j] .. end[j]-1, with begin[j] = j. As
that is an interval, the least and greatest beginning and end in a block of keys tell which pairs of blocks
need no look (nothing is seen) and which no mask (all is).

Each length is compiled for, which takes some ten seconds. Prefill, whose lengths differ from call to call,
does not wait for that: there SDPA takes the whole mask.
"""
import math
from functools import cache
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fast.attention import Past, after_past, as_heads
from model import tree_mask

BLOCK = 128  # tokens of a block in flex_attention's mask


def tree_attention(end: Tensor, past: int = 0) -> "FlexTreeAttention | MaskedTreeAttention":
    """The attention for a tree on a GPU: for prefill, which runs in inference mode, or for training."""
    if torch.is_inference_mode_enabled():
        return MaskedTreeAttention(end, past)
    return FlexTreeAttention(end, past)


class MaskedTreeAttention:
    """Called as attend(layer, q, k, v) -> (T, H, D), as fast.attention.TreeAttention is."""

    def __init__(self, end: Tensor, past: int = 0):
        self.mask = F.pad(tree_mask(end), (past, 0), value=True)  # (T, past + T)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, past: Past | None = None) -> Tensor:
        k, v = after_past(past, k, v)
        H = q.shape[1]
        heads = as_heads(q, for_each_query_head(k, H), for_each_query_head(v, H))
        out = F.scaled_dot_product_attention(*heads, attn_mask=self.mask)  # (1, H, T, D)
        return out[0].transpose(0, 1)


class FlexTreeAttention:
    """Called as attend(layer, q, k, v) -> (T, H, D), as fast.attention.TreeAttention is."""

    def __init__(self, end: Tensor, past: int = 0):
        self.mask = flex_mask(end, past)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, past: Past | None = None) -> Tensor:
        k, v = after_past(past, k, v)
        queries, keys = self.mask.shape[-2:]
        H = q.shape[1]
        padded_q = as_padded_heads(q, queries)
        padded_k = as_padded_heads(for_each_query_head(k, H), keys)
        padded_v = as_padded_heads(for_each_query_head(v, H), keys)
        out = compiled_flex_attention()(padded_q, padded_k, padded_v, block_mask=self.mask)
        return out[0, :, :len(q)].transpose(0, 1)  # (1, H, queries, D) -> (T, H, D)


def for_each_query_head(x: Tensor, H: int) -> Tensor:
    """k or v (n, KV, D) -> (n, H, D).

    The backward pass goes over a block of keys with all queries that see it. The instructions' keys are seen
    by all: with a copy for each query head that work is spread over H / KV times as many blocks.
    """
    return x.repeat_interleave(H // x.shape[1], dim=1)


def as_padded_heads(x: Tensor, length: int) -> Tensor:
    """(n, heads, D) -> (1, heads, length, D), zeros behind the n."""
    return F.pad(x, (0, 0, 0, 0, 0, length - len(x))).transpose(0, 1)[None]


@cache
def compiled_flex_attention() -> Callable:
    """Compiled for each length that it meets; and not on import, since that alone would take seconds."""
    from torch.nn.attention.flex_attention import flex_attention
    allow_variants()
    return torch.compile(flex_attention, dynamic=False)


def allow_variants() -> None:
    """How often a function may be compiled anew: for other lengths, types, with and without gradients.

    Beyond PyTorch's 8 it would not be compiled, and flex_attention would write down all scores.
    """
    torch._dynamo.config.recompile_limit = 64


def flex_mask(end: Tensor, past: int):
    """The tree's rule as flex_attention's BlockMask, for `past` keys that all see, then the T of the tree.

    Lengths are rounded up to powers of two, so that few are compiled. Nobody sees the padding's keys, and its
    queries see nothing.
    """
    from torch.nn.attention.flex_attention import BlockMask
    T = len(end)
    queries = padded_length(T)
    keys = padded_length(past + T)
    options = {"dtype": torch.int32, "device": end.device}
    begin = torch.full((keys,), queries, **options)
    stop = torch.zeros(keys, **options)
    begin[:past] = 0
    stop[:past] = T
    begin[past:past + T] = torch.arange(T, **options)
    stop[past:past + T] = end
    first = torch.arange(0, queries, BLOCK, **options)[:, None]  # of each block's queries: (query blocks, 1)
    last = first + BLOCK - 1
    begins = begin.view(-1, BLOCK)  # (key blocks, 128)
    stops = stop.view(-1, BLOCK)
    full = (begins.amax(1) <= first) & (stops.amin(1) > last)  # (query blocks, key blocks)
    partial = (begins.amin(1) <= last) & (stops.amax(1) > first) & ~full
    return BlockMask.from_kv_blocks(*listed(partial), *listed(full), BLOCK_SIZE=BLOCK,
                                    mask_mod=lambda batch, head, q, k: (begin[k] <= q) & (q < stop[k]))


def padded_length(n: int) -> int:
    return max(BLOCK, 2 ** math.ceil(math.log2(n)))


def listed(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Of a table (query blocks, key blocks): how many key blocks each query block has, and which."""
    numbers = pairs.sum(1, dtype=torch.int32)
    indices = pairs.int().argsort(dim=1, descending=True, stable=True).int()
    return numbers[None, None], indices[None, None]
