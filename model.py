"""The language model: a decoder (Llama, Mistral, Qwen2, Qwen3) as its equations read, and the trees of tokens
that it runs over.

    x = x + attention(norm(x))
    x = x + down(silu(gate(norm(x))) * up(norm(x)))

Tokens lie flat, (T, C), with no batch dimension and no padding: a batch is a tree of tokens (`Tree`). Which
tokens a token attends to is not the decoder's business; the caller hands in `attend(layer, q, k, v)`.
Training and prefill give it the attention of a tree (`tree_attention`), decoding gives it one over a cache
(generate.py). What makes this faster stands in fast/.

Shapes: T tokens, C hidden size, H query heads, KV key/value heads, D head size, V vocabulary.
"""
from dataclasses import dataclass
from functools import partial
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed_in_backward

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # attend(layer, q, k, v) -> (T, H, D)


@dataclass(frozen=True)
class ModelConfig:
    """The fields of config.json that the decoder uses, by their Hugging Face names."""
    model_type: str
    vocab_size: int                 # V
    hidden_size: int                # C
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int        # H
    num_key_value_heads: int        # KV
    head_dim: int                   # D
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None       # for a longer context, as config.json has it; None = not stretched
    tie_word_embeddings: bool
    max_position_embeddings: int
    qkv_bias: bool                  # Qwen2
    qk_norm: bool                   # Qwen3
    # What rope_scaling comes to (checkpoint/rope.py): the frequency of each pair, (D/2,), and YaRN's factor
    # of cosines and sines
    stretched_frequencies: tuple[float, ...] | None = None
    rope_attention_factor: float = 1.0
    initializer_range: float = 0.02  # standard deviation of random weights (checkpoint/scratch.py)


def at_least_fp32(x: Tensor) -> Tensor:
    """Norms, softmaxes and log-probabilities are never taken in bf16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---------------------------------------------------------------------------------------------- the decoder

def rope_frequencies(config: ModelConfig) -> Tensor:
    """(D/2,) fp32 on the CPU: by how many radians each pair of a head turns from one position to the next."""
    if config.stretched_frequencies is not None:
        return torch.tensor(config.stretched_frequencies, device="cpu")
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    return 1.0 / config.rope_theta ** exponents


def rope_tables(frequencies: Tensor, positions: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """(cos, cos) and (-sin, sin) of position * frequency, fp32 (T, 1, D) each. factor: YaRN's, else 1."""
    angles = positions.float()[:, None, None] * frequencies  # (T, 1, D/2)
    cos = angles.cos() * factor
    sin = angles.sin() * factor
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head: x (T, heads, D). Half-split, as Hugging Face stores q and k."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)  # (x1, x2) -> (x2, x1)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight = at_least_fp32(self.weight)
        return F.rms_norm(at_least_fp32(x), weight.shape, weight, self.eps).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_query = config.num_attention_heads
        self.n_key = config.num_key_value_heads
        self.head_dim = config.head_dim
        size = self.n_query * self.head_dim
        fused = (self.n_query + 2 * self.n_key) * self.head_dim
        self.qkv = nn.Linear(config.hidden_size, fused, bias=config.qkv_bias)  # one product, not three
        self.out = nn.Linear(size, config.hidden_size, bias=False)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Callable) -> Tensor:
        """attend(q, k, v) -> (T, H, D): an `Attend` that has its layer."""
        q, k, v = self.heads(self.qkv(x), cos, sin)
        return self.out(attend(q, k, v).flatten(1))  # (T, H, D) -> (T, H D)

    def heads(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(T, (H + 2 KV) D) -> q (T, H, D) and k (T, KV, D), turned to their positions, and v (T, KV, D)."""
        heads = qkv.view(len(qkv), -1, self.head_dim)
        q, k, v = heads.split((self.n_query, self.n_key, self.n_key), dim=1)
        if self.qk_norm:
            q = self.q_norm(q)
            k = self.k_norm(k)
        q = apply_rope(q, cos, sin)
        k = apply_rope(k, cos, sin)
        return q, k, v.contiguous()  # a view of v would keep all of qkv for the backward pass


class MLP(nn.Module):
    """SwiGLU, down(silu(gate(x)) * up(x)), with gate and up in one product."""

    hidden_act = "silu"  # what config.json calls the activation; checkpoints with another are refused

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activate(self.gate_up(x)))

    @staticmethod
    def activate(gate_up: Tensor) -> Tensor:
        """(T, 2 I) -> (T, I)"""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up


class Layer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Callable) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, attend)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """The transformer. `forward` gives hidden states; the caller applies `logits` where it needs them.

    fast.speed_up puts faster functions in the place of some of these, which is why `heads`, `activate` and
    `logprobs` are functions of their own.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        table = torch.empty(config.vocab_size, config.hidden_size)
        # nn.Embedding(V, C) would draw values, and on the meta device that imports sympy, a second's work
        self.embed = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = None
        if not config.tie_word_embeddings:
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Recompute each layer in the backward pass: less memory, a third more work
        self.checkpoint_activations = False
        self.tree_attention = tree_attention  # fast.speed_up puts a faster one here, which knows a prefix too
        self.frequencies = rope_frequencies(config)  # (D/2,), and no buffer, as .to(bfloat16) would round it

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def forward(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """ids (T,), positions (T,) -> hidden states after the last norm, (T, C).

        attend(layer, q (T, H, D), k (T, KV, D), v (T, KV, D)) -> (T, H, D)
        """
        x = self.embed(ids)  # (T, C)
        self.frequencies = self.frequencies.to(ids.device)  # copied by the first pass alone
        cos, sin = rope_tables(self.frequencies, positions, self.config.rope_attention_factor)
        for i, layer in enumerate(self.layers):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = recomputed_in_backward(layer, x, cos, sin, partial(attend, i), use_reentrant=False)
            else:
                x = layer(x, cos, sin, partial(attend, i))
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (N, C) -> logits (N, V)."""
        if self.head is None:
            return F.linear(hidden, self.embed.weight)
        return self.head(hidden)

    def logprobs(self, hidden: Tensor, target: Tensor) -> Tensor:
        """log p(target) after each hidden state: hidden (N, C), target (N,) -> (N,) at least fp32."""
        return logprobs_of(self.logits(hidden), target)


# ------------------------------------------------------------------------------------------ a batch is a tree

class Tree:
    """Sequences packed so that every prefix they share stands once.

    Sorted, the sequences lie in their trie depth first: the tokens that continue token j, its subtree, are
    the contiguous run j .. end[j]-1. So one rule says who sees whom, with no node in sight:

        token q sees token j  <=>  j <= q < end[j]

        A B C D      ids        A  B  C  D  E  F
        A B E        positions  0  1  2  3  2  1      (C D and E both continue A B;
        A F          end        6  5  4  4  5  6       F continues A)

    ids        (T,) int64, the tokens; T is at most the sum of the lengths
    positions  (T,) int64, each token's position in its sequences
    end        (T,) int64, one past the last token of its subtree
    paths      for each sequence, in the order given: where in `ids` its tokens stand, numpy int64 (length,)

    Prefixes are found by comparing token ids, so no boundary between texts can go wrong. The result of the
    model is exactly that of the separate sequences, gradients included.

        >>> tree = Tree([[1, 2, 3, 4], [1, 2, 5], [1, 6]])
        >>> tree.ids.tolist(), tree.end.tolist(), tree.paths[1].tolist()
        ([1, 2, 3, 4, 5, 6], [6, 5, 4, 4, 5, 6], [0, 1, 4])
    """

    def __init__(self, sequences: list[list[int]]):
        self.paths: list[np.ndarray] = [np.zeros(0, dtype=np.int64)] * len(sequences)
        new_ids = []
        new_positions = []
        end = np.zeros(sum(map(len, sequences)), dtype=np.int64)
        size = 0  # tokens of the tree so far
        before = path = np.zeros(0, dtype=np.int64)  # the sequence before, and where its tokens stand
        for i in sorted(range(len(sequences)), key=sequences.__getitem__):
            ids = np.asarray(sequences[i], dtype=np.int64)
            shared = common_prefix(before, ids)
            positions = np.arange(shared, len(ids))  # of the tokens that are new
            end[path[shared:]] = size  # nothing more will continue these tokens
            path = np.concatenate((path[:shared], size + positions - shared))
            new_ids.append(ids[shared:])
            new_positions.append(positions)
            size += len(positions)
            self.paths[i] = path
            before = ids
        end[path] = size
        self.ids = torch.from_numpy(np.concatenate(new_ids))
        self.positions = torch.from_numpy(np.concatenate(new_positions))
        self.end = torch.from_numpy(end[:size].copy())

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> "Tree":
        """Move the tree itself. -> the tree."""
        self.ids = self.ids.to(device)
        self.positions = self.positions.to(device)
        self.end = self.end.to(device)
        return self


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading tokens two sequences (int arrays) share."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def tree_mask(end: Tensor) -> Tensor:
    """The rule of `Tree` as a mask, (T, T) bool: mask[q, j] says that q sees j."""
    index = torch.arange(len(end), device=end.device)
    query = index[:, None]
    return (index <= query) & (query < end)


def tree_attention(end: Tensor) -> Attend:
    """Attention within a tree: end (T,), the rule of `Tree` -> attend(layer, q, k, v)."""
    mask = tree_mask(end)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q.transpose(0, 1)[None]  # (T, H, D) -> (1, H, T, D)
        k = k.transpose(0, 1)[None]
        v = v.transpose(0, 1)[None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return y[0].transpose(0, 1)  # (T, H, D)
    return attend


def logprobs_of(logits: Tensor, target: Tensor) -> Tensor:
    """log p(target) at each position: logits (N, V), target (N,) -> (N,) at least fp32."""
    logits = at_least_fp32(logits)
    of_target = logits.gather(1, target[:, None])[:, 0]
    return of_target - logits.logsumexp(dim=-1)  # F.cross_entropy is less exact on CPU (bench/LOG.md)


def head_chunk(device: torch.device | str, n_tokens: int) -> int:
    """How many of a tree's `n_tokens` tokens pass the LM head at once: (chunk, V) logits, never (T, V).

    On a GPU few chunks are cheaper, as the backward pass of each makes a gradient of the whole head.
    """
    if torch.device(device).type == "cpu":
        return 256
    return max(512, n_tokens // 8)
