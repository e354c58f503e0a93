"""The language model: a compact decoder (Llama, Mistral, Qwen2, Qwen3) that runs over trees of tokens.

Tokens are flat, (T, C), with no batch dimension and no padding. What a token may attend to is not the decoder's
business: the caller hands in `attend(layer, q, k, v)`. Training and prefill give it the attention of a tree
(`TreeAttention`, below); sampling gives it one over caches (generate.py).

Shapes: T tokens, C hidden size, H query heads, KV key/value heads, D head size, V vocabulary.
"""
import ctypes
import math
import os
from dataclasses import dataclass
from functools import cache, partial
from typing import Callable

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class ModelConfig:
    """The fields of config.json that the decoder uses, by their Hugging Face names (read by checkpoint.py)."""
    model_type: str
    vocab_size: int
    hidden_size: int                # C
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int        # H
    num_key_value_heads: int        # KV
    head_dim: int                   # D
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None       # None, or Llama 3's: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings
    tie_word_embeddings: bool
    max_position_embeddings: int
    qkv_bias: bool                  # Qwen2
    qk_norm: bool                   # Qwen3
    initializer_range: float = 0.02  # standard deviation of random weights, for training from scratch


def rope_tables(config: ModelConfig, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `apply_rope` multiplies with, in fp32: positions (T,) -> two (T, 1, D), cos twice, and sin with the sign of each half."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device) / config.head_dim
    inv_freq = 1.0 / config.rope_theta ** exponents  # (D/2,)
    if config.rope_scaling:  # Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, a ramp in between
        s = config.rope_scaling
        turns = s["original_max_position_embeddings"] * inv_freq / (2 * math.pi)  # full turns within the old context
        keep = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
        inv_freq = keep * inv_freq + (1 - keep) * inv_freq / s["factor"]
    angles = positions.float()[:, None, None] * inv_freq  # (T, 1, D/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the two halves of each head: x (T, heads, D). Half-split, as Hugging Face stores q and k."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """Norms, softmaxes and log-probabilities are never taken in bf16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@cache
def keep_freed_memory() -> None:
    """Have glibc keep the memory of tensors that are freed, for the next ones, and Linux give it in huge pages.

    By default large tensors go back to the system, and each new one is zeroed page by page: a tenth of a training step on CPU. Huge
    pages can be asked for by address only, so half of the machine's memory is reserved (not taken), marked and given to glibc as
    freed: all that comes later lies there. Elsewhere than on Linux this does nothing.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX, MADV_HUGEPAGE, HUGE = -1, -4, 14, 2 ** 21
    try:
        libc = ctypes.CDLL(None)
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    except (AttributeError, OSError, TypeError, ValueError):
        return
    if place := libc.malloc(size):
        libc.madvise(-(-place // HUGE) * HUGE, size - HUGE, MADV_HUGEPAGE)
        libc.free(place)


ONEDNN_SIZE = 2 ** 23  # multiply-adds of a product from which oneDNN is worth its call


class OneDNNLinear(torch.autograd.Function):
    """x (T, I), weight (O, I), bias (O,) or None -> x @ weight^T + bias, (T, O), in fp32 on CPU through oneDNN.

    x is kept for the backward pass, or, where `made` is (make, source), the source: x is then make(source).
    """

    @staticmethod
    def forward(ctx, x, weight, bias, made):
        ctx.make, source = made or (None, x)
        ctx.save_for_backward(source, weight)
        ctx.has_bias = bias is not None
        return OneDNNLinear.product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        if ctx.make:
            x = ctx.make(x)
        grad_x = OneDNNLinear.product(grad, weight.t(), None) if ctx.needs_input_grad[0] else None
        return grad_x, grad.t() @ x if ctx.needs_input_grad[1] else None, grad.sum(0) if ctx.has_bias else None, None

    @staticmethod
    def product(x, weight, bias):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None,
           made: tuple[Callable, torch.Tensor] | None = None) -> torch.Tensor:
    """F.linear (made: see OneDNNLinear). In fp32 on CPU that is MKL; oneDNN is faster on AMD: by 5% of a training step, nearly twice
    for the head on few rows."""
    if x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.shape[0] * weight.numel() >= ONEDNN_SIZE \
            and torch.backends.mkldnn.is_available():
        if torch.is_grad_enabled():
            return OneDNNLinear.apply(x, weight, bias, made)
        n, step = len(x), 16 if len(x) <= 256 else 64  # oneDNN compiles, and keeps, code for each length: in a long sampling, few shall do
        return OneDNNLinear.product(F.pad(x, (0, 0, 0, -n % step)) if n % step else x, weight, bias)[:n]
    return F.linear(x, weight, bias)


def head_chunk(device: torch.device | str) -> int:
    """How many tokens pass the LM head at once: (chunk, V) logits, never (T, V). More on a GPU: each makes a gradient of the whole head."""
    return 2048 if torch.device(device).type == "cuda" else 256


class Linear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)

    def after(self, make: Callable, x: torch.Tensor) -> torch.Tensor:
        """linear(make(x)), where `make` is so cheap that on CPU its result is made again for the backward pass instead of being kept."""
        return linear(make(x), self.weight, self.bias, (make, x))


class LeanRMSNorm(torch.autograd.Function):
    """F.rms_norm, which on CPU keeps the normalized x beside x for the backward pass, and takes more passes over both. x (..., C), weight (C,)."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt()  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        normal = x * scale
        grad_weight = (grad * normal).flatten(0, -2).sum(dim=0)
        grad = grad * weight
        along = (grad * normal).mean(dim=-1, keepdim=True)  # what changes the length of x alone changes nothing
        return normal.mul_(-along).add_(grad).mul_(scale), grad_weight, None


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide, weight = at_least_fp32(x), at_least_fp32(self.weight)
        if x.device.type == "cpu":
            return LeanRMSNorm.apply(wide, weight, self.eps).to(x.dtype)
        return F.rms_norm(wide, weight.shape, weight, self.eps).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        H, KV, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.sizes = (H, KV)
        self.head_dim = D
        self.qkv = Linear(config.hidden_size, (H + 2 * KV) * D, bias=config.qkv_bias)  # fused: one product, not three
        self.out = Linear(H * D, config.hidden_size, bias=False)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(D, config.rms_norm_eps), RMSNorm(D, config.rms_norm_eps)

    def forward(self, x: torch.Tensor, norm: "RMSNorm", cos: torch.Tensor, sin: torch.Tensor, attend: Callable) -> torch.Tensor:
        T, (H, KV) = x.shape[0], self.sizes
        qk, v = self.qkv.after(norm, x).view(T, -1, self.head_dim).split((H + KV, KV), dim=1)  # (T, H + KV, D), (T, KV, D)
        if self.qk_norm:
            q, k = qk.split((H, KV), dim=1)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=1)
        q, k = apply_rope(qk, cos, sin).split((H, KV), dim=1)  # (T, H, D), (T, KV, D)
        v = v.contiguous()  # as a view, it would keep all of qkv for the backward pass
        return self.out(attend(q, k, v).reshape(T, -1))  # (T, H, D) -> (T, H*D) -> (T, C)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, (T, 2 I) -> (T, I). It keeps its input alone for the backward pass, a quarter less than the same in autograd,
    and on CPU takes as many rows at a time as the caches hold."""

    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate_up, = ctx.saved_tensors
        grad_in, rows = torch.empty_like(gate_up), 256 if grad.device.type == "cpu" else max(1, len(grad))
        for out, both, g in zip(*(x.split(rows) for x in (grad_in, gate_up, grad))):
            (gate, up), (grad_gate, grad_up) = both.chunk(2, dim=-1), out.chunk(2, dim=-1)
            torch.mul(F.silu(gate), g, out=grad_up)
            torch.ops.aten.silu_backward(g * up, gate, grad_input=grad_gate)
        return grad_in


class MLP(nn.Module):
    """SwiGLU, with gate and up fused into one product."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor, norm: "RMSNorm") -> torch.Tensor:
        return self.down.after(SwiGLU.apply, self.gate_up.after(norm, x))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Callable,
                wanted: torch.Tensor | None = None) -> torch.Tensor:
        x = x + self.attention(x, self.attention_norm, cos, sin, attend)
        if wanted is not None:
            x = x.index_select(0, wanted)  # (N, C)
        return x + self.mlp(x, self.mlp_norm)


class Decoder(nn.Module):
    """The transformer. `forward` gives hidden states; `logits` applies the LM head where the caller wants it."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        # from_pretrained: on the meta device, nn.Embedding's own random start imports 800 modules
        self.embed = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size), freeze=False)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)
        self.checkpoint_activations = False  # recompute each layer in the backward pass: less memory, a third more work

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, attend: Callable, wanted: torch.Tensor | None = None) -> torch.Tensor:
        """ids (T,), positions (T,) -> hidden states after the last norm (T, C), or (N, C) of the tokens `wanted` (N,): behind the last
        attention, the others need not be computed.

        attend(layer, q (T, H, D), k (T, KV, D), v (T, KV, D)) -> (T, H, D)
        """
        x = self.embed(ids)  # (T, C)
        cos, sin = rope_tables(self.config, positions)
        for i, layer in enumerate(self.layers):
            given = (x, cos, sin, partial(attend, i), wanted if i == len(self.layers) - 1 else None)
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(layer, *given, use_reentrant=False)
            else:
                x = layer(*given)
        return self.norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (N, C) -> logits (N, V)."""
        return linear(hidden, self.embed.weight if self.head is None else self.head.weight)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Random weights for training from scratch, as in GPT-2: N(0, initializer_range²), residual outputs scaled by 1/sqrt(2 layers)."""
        for name, p in self.named_parameters():
            if name.endswith("norm.weight"):
                p.fill_(1.0)
            elif name.endswith("bias"):
                p.zero_()
            else:
                scale = (2 * len(self.layers)) ** -0.5 if name.endswith(("out.weight", "down.weight")) else 1.0
                p.normal_(0.0, self.config.initializer_range * scale, generator=generator)


class Tree:
    """Sequences packed so that every prefix they share stands once.

    The sequences are put in lexicographic order, which lays their trie out depth first: the tokens that continue
    token j (its subtree) are the contiguous run j .. end[j]-1. So one rule says who sees whom, with no node in sight:

        token q sees token j  <=>  j <= q < end[j]

    ids        (T,) int64, the tokens; T is at most the sum of the lengths
    positions  (T,) int64, each token's position in its sequence(s)
    end        (T,) int64, one past the last token of its subtree
    paths      for each sequence, in the order given, the places of its tokens: numpy int64 (length,)

    Prefixes are found by comparing token ids, so no boundary between texts can go wrong.
    """

    def __init__(self, sequences: list[list[int]]):
        arrays = [np.asarray(s, dtype=np.int64) for s in sequences]
        self.paths: list[np.ndarray] = [None] * len(arrays)
        ids, positions, size = [], [], 0
        end = np.zeros(sum(map(len, arrays)), dtype=np.int64)
        path = last = np.zeros(0, dtype=np.int64)
        for i in sorted(range(len(arrays)), key=lambda i: sequences[i]):
            shared = common_prefix(last, arrays[i])
            new = len(arrays[i]) - shared
            end[path[shared:]] = size  # the subtrees that this sequence leaves are complete
            path = np.concatenate((path[:shared], np.arange(size, size + new)))
            ids.append(arrays[i][shared:])
            positions.append(np.arange(shared, shared + new))
            size += new
            last = arrays[i]
            self.paths[i] = path
        end[path] = size
        self.ids = torch.from_numpy(np.concatenate(ids))
        self.positions = torch.from_numpy(np.concatenate(positions))
        self.end = torch.from_numpy(end[:size].copy())

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> "Tree":
        self.ids, self.positions, self.end = self.ids.to(device), self.positions.to(device), self.end.to(device)
        return self


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading tokens two sequences (int arrays) share."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


class TreeAttention:
    """Attention within a tree, called as attend(layer, q, k, v) -> (T, H, D).

    end (T,) is the tree's rule, above. `past` keys and values, (KV, past, D) per layer, may stand before all of it
    and are seen by every token (sampling's shared instructions).

    Queries go in blocks of at most `block`, and a block meets only the keys that one of its queries can see: its ancestors and
    itself. Blocks end where a subtree does, unless that would make them small, so that few see what concerns others alone.
    On CPU, what all queries behind the first branch see, the first `shared` keys, is left out of their blocks: they meet it together.
    """

    def __init__(self, end: torch.Tensor, past: int = 0, block: int = 128):
        T = len(end)
        branches = torch.nonzero(end < T)
        branch = int(branches[0]) if len(branches) else 0  # the tokens before it are seen by all behind it
        self.shared, self.first, self.splits = 0, T, 1  # the queries from `first` on meet the shared keys apart
        if end.device.type == "cpu" and past + branch:
            self.shared, self.splits = past + branch, torch.get_num_threads()  # the kernel's work is divided by heads and splits
            self.first = T - (T - branch) // self.splits * self.splits
        edges = [0]
        for edge in sorted({self.first, *end.tolist()}):  # where subtrees end; the last one is T
            if edge - edges[-1] >= block // 2 or edge in (self.first, T):
                pieces = -(-(edge - edges[-1]) // block)
                edges += np.linspace(edges[-1], edge, pieces + 1).astype(int)[1:].tolist()
        end = torch.cat((end.new_full((past,), past + T), end + past))
        self.blocks = []  # (first query, last query + 1, the keys seen (n,), what is added to the scores (1, 1, queries, n): 0 or -inf)
        for start, stop in zip(edges, edges[1:]):
            own = self.shared if start >= self.first else 0
            seen = own + torch.nonzero(end[own:past + stop] > past + start).squeeze(1)
            query = torch.arange(past + start, past + stop, device=end.device)[:, None]
            mask = torch.where((seen <= query) & (query < end[seen]), 0.0, -torch.inf)
            self.blocks.append((start, stop, seen, mask[None, None]))

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                 past: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        k, v = after_past(past, k, v)
        if q.device.type == "cpu":
            return BlockAttention.apply(q, k, v, self)
        out = []
        for start, stop, seen, mask in self.blocks:
            block = [x.transpose(0, 1)[None] for x in (q[start:stop], k.index_select(0, seen), v.index_select(0, seen))]
            out.append(F.scaled_dot_product_attention(*block, attn_mask=mask.to(q.dtype), enable_gqa=True))  # (1, H, queries, D)
        return torch.cat(out, dim=2)[0].transpose(0, 1)  # (T, H, D)

    def behind(self, *queries: torch.Tensor) -> list[torch.Tensor]:
        """What meets the shared keys, in as many splits as there are threads: (T, H, ...) -> (splits, H, n, ...) each."""
        return [x[self.first:].unflatten(0, (self.splits, -1)).transpose(1, 2) for x in queries]

    def before(self, *keys: torch.Tensor) -> list[torch.Tensor]:
        """The shared keys, the same for each split: (past + T, KV, D) -> (splits, KV, shared, D) each."""
        return [x[:self.shared].transpose(0, 1).expand(self.splits, -1, -1, -1) for x in keys]


class BlockAttention(torch.autograd.Function):
    """TreeAttention through PyTorch's flash kernel for CPU. Left to autograd, each block would keep its keys and values for the
    backward pass, and write down a gradient for all of q, k and v; here keys are gathered again, and gradients added in place.

    Shared keys and a query's own are two softmaxes, merged by their log-sum-exps. Given the merged one, the kernel's backward pass
    is right for either set of keys alone."""

    @staticmethod
    def forward(ctx, q, k, v, tree):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = torch.empty_like(q), at_least_fp32(q.new_empty(q.shape[:2]))  # (T, H, D), (T, H)
        for start, stop, seen, mask in tree.blocks:
            block = BlockAttention.of(q[start:stop], k.index_select(0, seen), v.index_select(0, seen))
            o, l = flash(*block, attn_mask=mask.to(q.dtype))  # (1, H, n, D), (1, H, n)
            out[start:stop], lse[start:stop] = o[0].transpose(0, 1), l[0].t()
        if tree.first < len(q):
            o, l = flash(*tree.behind(q), *tree.before(k, v))  # (splits, H, n, D), (splits, H, n)
            o, l = o.transpose(1, 2).flatten(0, 1), l.transpose(1, 2).flatten(0, 1)  # (splits * n, H, D), (splits * n, H)
            own, own_lse = out[tree.first:], lse[tree.first:]
            total = torch.logaddexp(own_lse, l)
            own.copy_(torch.lerp(at_least_fp32(own), at_least_fp32(o), (l - total).exp_()[..., None]))
            own_lse.copy_(total)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.tree = tree
        return out

    @staticmethod
    def backward(ctx, grad):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        (q, k, v, out, lse), tree = ctx.saved_tensors, ctx.tree
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for start, stop, seen, mask in tree.blocks:
            block = BlockAttention.of(q[start:stop], k.index_select(0, seen), v.index_select(0, seen))
            g, o = BlockAttention.of(grad[start:stop], out[start:stop])
            found = flash(g, *block, o, lse[start:stop].t()[None], 0.0, False, attn_mask=mask.to(q.dtype))
            block_q, block_k, block_v = (x[0].transpose(0, 1) for x in found)
            grad_q[start:stop] = block_q
            grad_k.index_add_(0, seen, block_k)
            grad_v.index_add_(0, seen, block_v)
        if tree.first < len(q):
            g, behind, o, l = tree.behind(grad, q, out, lse)
            more_q, more_k, more_v = flash(g, behind, *tree.before(k, v), o, l, 0.0, False)
            grad_q[tree.first:] += more_q.transpose(1, 2).flatten(0, 1)  # (splits, H, n, D) -> (splits * n, H, D)
            grad_k[:tree.shared] += more_k.sum(0).transpose(0, 1)        # (splits, KV, shared, D) -> (shared, KV, D)
            grad_v[:tree.shared] += more_v.sum(0).transpose(0, 1)
        return grad_q, grad_k, grad_v, None

    @staticmethod
    def of(*parts):
        """(n, heads, D) -> (1, heads, n, D) each, as the kernel takes them."""
        return [x.transpose(0, 1)[None] for x in parts]


def after_past(past: tuple[torch.Tensor, torch.Tensor] | None, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """k and v (T, KV, D) behind those of the past, (KV, past, D) each -> (past + T, KV, D)."""
    if past is None:
        return k, v
    return torch.cat((past[0].transpose(0, 1), k)), torch.cat((past[1].transpose(0, 1), v))


# ---------------------------------------------------------------------------------------------- the same on a GPU

FLEX_BLOCK = 128  # tokens of a block in flex_attention's mask


def tree_attention(end: torch.Tensor, past: int = 0) -> Callable:
    """The attention within a tree, by the device that it lies on."""
    return FlexTreeAttention(end, past) if end.device.type == "cuda" else TreeAttention(end, past)


class FlexTreeAttention:
    """What TreeAttention computes, through flex_attention: one kernel for all queries, which passes over the blocks that nobody sees."""

    def __init__(self, end: torch.Tensor, past: int = 0):
        self.mask = flex_mask(end, past)

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                 past: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        k, v = after_past(past, k, v)
        queries, keys = self.mask.shape[-2:]
        padded = [F.pad(x, (0, 0, 0, 0, 0, n - len(x))).transpose(0, 1)[None] for x, n in ((q, queries), (k, keys), (v, keys))]
        return compiled_flex_attention()(*padded, block_mask=self.mask, enable_gqa=True)[0, :, :len(q)].transpose(0, 1)  # (T, H, D)


@cache
def compiled_flex_attention() -> Callable:
    """Compiled for each length that it meets; not when this file is imported, since that alone would take seconds."""
    from torch.nn.attention.flex_attention import flex_attention
    torch._dynamo.config.recompile_limit = 64  # of lengths, with and without gradients; beyond it, all scores would be written down
    return torch.compile(flex_attention, dynamic=False)


def flex_mask(end: torch.Tensor, past: int):
    """The tree's rule as flex_attention's BlockMask: key j is seen by the queries begin[j] .. end[j]-1.

    As that is an interval, the least and greatest of a block's beginnings and ends tell which pairs of blocks need no look (nothing
    is seen) and which no mask (everything is). Lengths are rounded up to powers of two, so that few are compiled; the
    padding's keys are seen by nobody, and its queries see nothing.
    """
    from torch.nn.attention.flex_attention import BlockMask
    T = len(end)
    queries, keys = (max(FLEX_BLOCK, 2 ** math.ceil(math.log2(n))) for n in (T, past + T))
    long = {"dtype": torch.int32, "device": end.device}
    begin, stop = torch.full((keys,), queries, **long), torch.zeros(keys, **long)
    begin[:past], stop[:past] = 0, T
    begin[past:past + T], stop[past:past + T] = torch.arange(T, **long), end
    first = torch.arange(0, queries, FLEX_BLOCK, **long)[:, None]  # of each block's queries: (query blocks, 1)
    last = first + FLEX_BLOCK - 1
    begins, ends = begin.view(-1, FLEX_BLOCK), stop.view(-1, FLEX_BLOCK)  # (key blocks, 128)
    full = (begins.amax(1) <= first) & (ends.amin(1) > last)  # (query blocks, key blocks)
    partial = (begins.amin(1) <= last) & (ends.amax(1) > first) & ~full

    def listed(pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How many key blocks each query block has, and which they are (in front of the others)."""
        return pairs.sum(1, dtype=torch.int32)[None, None], pairs.int().argsort(dim=1, descending=True, stable=True).int()[None, None]
    return BlockMask.from_kv_blocks(*listed(partial), *listed(full), BLOCK_SIZE=FLEX_BLOCK,
                                    mask_mod=lambda batch, head, q, k: (begin[k] <= q) & (q < stop[k]))
