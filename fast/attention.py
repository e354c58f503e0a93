"""Attention within a tree, on CPU: in blocks of queries that meet only the keys they can see, and shared keys
apart.

Plain (model.tree_attention): one call of SDPA with a (T, T) mask, which computes all T² scores and throws
most of them away.

Fast: the tree's rule, j <= q < end[j], is an interval, so queries q0 .. q1-1 can see key j only if j < q1 and
end[j] > q0. Each block of queries gathers those keys, and the mask is written for them alone. And the keys
that all later tokens see, a common prompt, are left out of the blocks: all queries meet them in one product.
The two softmaxes of a query are then merged, exactly:

    over a set of keys S with scores s_j:   out_S = sum_j exp(s_j - L_S) v_j,   L_S = log sum_j exp(s_j)
    over two sets:  L = logaddexp(L_A, L_B),   out = exp(L_A - L) out_A + exp(L_B - L) out_B

The backward pass needs the merged `out` and L and nothing else. With p_j = exp(s_j - L), the share of key j
in the *whole* softmax,

    grad_v_j = p_j grad_out,   grad_s_j = p_j (grad_out · v_j - grad_out · out)

so a kernel that is given the merged out and L in place of its own computes the right gradients for either set
alone, and the gradients of a query's two sets add up.

Gain: DPO's trees need 5.25M query-key pairs where blocks of 256 wherever they fall need 6.44M and a full mask
22M; a layer of DPO's first tree 342 -> 272 ms forward and backward with the shared keys apart (bench/LOG.md).
"""
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from model import at_least_fp32

Past = tuple[Tensor, Tensor]  # keys and values before the tree, (KV, past, D) each


class TreeAttention:
    """Called as attend(layer, q, k, v) -> (T, H, D).

    `past` keys and values may stand before the whole tree, and every token sees them (the instructions that
    prompts share).

    A block has at most `block` queries. It ends where a subtree does, unless that would make it small, so
    that few of its queries gather keys that only others see. `shared` keys at the front are met by all
    queries from `first` on together, in as many `splits` as there are threads, since the kernel deals heads
    and splits to threads.
    """

    def __init__(self, end: Tensor, past: int = 0, block: int = 128):
        T = len(end)
        branches = torch.nonzero(end < T)
        # Every later token sees the tokens before the first branch
        branch = int(branches[0]) if len(branches) else 0
        self.shared = 0
        self.first = T
        self.splits = 1
        if past + branch:
            self.shared = past + branch
            self.splits = torch.get_num_threads()
            self.first = T - (T - branch) // self.splits * self.splits
        end_with_past = torch.cat((end.new_full((past,), past + T), end + past))
        edges = self._block_edges(end, block)
        # (first query, last query + 1, keys that are seen (n,), added to the scores: 0 or -inf (1, 1,
        # queries, n))
        self.blocks = []
        for start, stop in pairwise(edges):
            own = self.shared if start >= self.first else 0
            seen = own + torch.nonzero(end_with_past[own:past + stop] > past + start).squeeze(1)
            query = torch.arange(past + start, past + stop, device=end.device)[:, None]
            visible = (seen <= query) & (query < end_with_past[seen])  # (queries, n)
            mask = torch.where(visible, 0.0, -torch.inf)
            self.blocks.append((start, stop, seen, mask[None, None]))

    def _block_edges(self, end: Tensor, block: int) -> list[int]:
        """Where blocks begin, and T: at the ends of subtrees and at `first`, in pieces of at most `block`."""
        edges = [0]
        for edge in sorted({self.first, *end.tolist()}):
            size = edge - edges[-1]
            if size >= block // 2 or edge in (self.first, len(end)):
                pieces = -(-size // block)
                inner = np.linspace(edges[-1], edge, pieces + 1).astype(int)
                edges += inner[1:].tolist()
        return edges

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, past: Past | None = None) -> Tensor:
        k, v = after_past(past, k, v)
        return BlockAttention.apply(q, k, v, self)

    def late_queries(self, *tensors: Tensor) -> list[Tensor]:
        """What meets the shared keys, in splits: (T, H, ...) -> (splits, H, n, ...) each."""
        return [x[self.first:].unflatten(0, (self.splits, -1)).transpose(1, 2) for x in tensors]

    def shared_keys(self, *tensors: Tensor) -> list[Tensor]:
        """The shared keys, the same for each split: (past + T, KV, D) -> (splits, KV, shared, D) each."""
        return [x[:self.shared].transpose(0, 1).expand(self.splits, -1, -1, -1) for x in tensors]


def after_past(past: Past | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v (T, KV, D) behind those of the past, (KV, past, D) each -> (past + T, KV, D)."""
    if past is None:
        return k, v
    past_k, past_v = past
    return torch.cat((past_k.transpose(0, 1), k)), torch.cat((past_v.transpose(0, 1), v))


class BlockAttention(torch.autograd.Function):
    """TreeAttention through PyTorch's flash kernel for CPU.

    q (T, H, D), k and v (past + T, KV, D) -> (T, H, D)

    Left to autograd, each block would keep its gathered keys and values for the backward pass, and write down
    a gradient for all of q, k and v. Here keys are gathered again, and gradients are added in place.
    """

    @staticmethod
    def forward(ctx, q, k, v, tree):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out = torch.empty_like(q)
        lse = at_least_fp32(q.new_empty(q.shape[:2]))  # (T, H)
        for start, stop, seen, mask in tree.blocks:
            block = as_heads(q[start:stop], k.index_select(0, seen), v.index_select(0, seen))
            block_out, block_lse = flash(*block, attn_mask=mask.to(q.dtype))  # (1, H, n, D), (1, H, n)
            out[start:stop] = block_out[0].transpose(0, 1)
            lse[start:stop] = block_lse[0].t()
        if tree.first < len(q):
            # (splits, H, n, D), (splits, H, n)
            shared_out, shared_lse = flash(*tree.late_queries(q), *tree.shared_keys(k, v))
            shared_out = shared_out.transpose(1, 2).flatten(0, 1)  # (splits * n, H, D)
            shared_lse = shared_lse.transpose(1, 2).flatten(0, 1)  # (splits * n, H)
            own = out[tree.first:]
            own_lse = lse[tree.first:]
            merged_lse = torch.logaddexp(own_lse, shared_lse)
            shared_weight = (shared_lse - merged_lse).exp_()[..., None]
            own.copy_(torch.lerp(at_least_fp32(own), at_least_fp32(shared_out), shared_weight))
            own_lse.copy_(merged_lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.tree = tree
        return out

    @staticmethod
    def backward(ctx, grad):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        q, k, v, out, lse = ctx.saved_tensors
        tree = ctx.tree
        grad_q = torch.empty_like(q)
        grad_k = torch.zeros_like(k)
        grad_v = torch.zeros_like(v)
        for start, stop, seen, mask in tree.blocks:
            block = as_heads(q[start:stop], k.index_select(0, seen), v.index_select(0, seen))
            block_grad, block_out = as_heads(grad[start:stop], out[start:stop])
            found = flash(
                block_grad,
                *block,
                block_out,
                lse[start:stop].t()[None],
                0.0,
                False,
                attn_mask=mask.to(q.dtype),
            )
            block_q, block_k, block_v = (x[0].transpose(0, 1) for x in found)
            grad_q[start:stop] = block_q
            grad_k.index_add_(0, seen, block_k)
            grad_v.index_add_(0, seen, block_v)
        if tree.first < len(q):
            late_grad, late_q, late_out, late_lse = tree.late_queries(grad, q, out, lse)
            more_q, more_k, more_v = flash(
                late_grad, late_q, *tree.shared_keys(k, v), late_out, late_lse, 0.0, False
            )
            # (splits, H, n, D) -> (splits * n, H, D)
            grad_q[tree.first:] += more_q.transpose(1, 2).flatten(0, 1)
            # (splits, KV, shared, D) -> (shared, KV, D)
            grad_k[:tree.shared] += more_k.sum(0).transpose(0, 1)
            grad_v[:tree.shared] += more_v.sum(0).transpose(0, 1)
        return grad_q, grad_k, grad_v, None


def as_heads(*tensors: Tensor) -> list[Tensor]:
    """(n, heads, D) -> (1, heads, n, D) each, as the kernel takes them."""
    return [x.transpose(0, 1)[None] for x in tensors]
