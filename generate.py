"""Sampling: prompts as token ids in, K continuations of each out, with P(Yes) at every position.

    engine = Engine(model, eos_ids, yes_no=(yes_id, no_id))
    engine.add(Request(ids=[5, 6, 7], seeds=[1, 2, 3]))      # three continuations of one prompt
    while engine.busy:
        for request_id, continuations in engine.step():
            ...

`Engine` inherits `add`, `busy` and `step` from `Queue` (plumbing/queues.py): `step` takes a batch of waiting
requests and calls `generate`. The engine knows token ids only, never text. Every continuation has a row with
a copy of its prompt's keys and values, and all rows decode one token a step until the last one ends.
fast/engine.py samples the same tokens sooner: finished rows leave its batch, prompts are kept once, and rows
that agree are computed once.

A continuation depends on its own seed and prompt only: it draws its t-th token with uniform(seed, t).

Shapes: R rows, T tokens, V vocabulary, KV key/value heads, L positions of the cache, D head size.
"""
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model import Decoder, Tree, at_least_fp32
from plumbing.errors import BadInput
from plumbing.queues import Queue

LOOK_EVERY = 32  # steps between two looks at whether all rows are done, since a look waits for the GPU
CACHE_STEP = 64  # positions by which the cache grows


class Request(NamedTuple):
    ids: list[int]    # the prompt
    seeds: list[int]  # one 64-bit number per continuation: there are len(seeds) = K of them


@dataclass
class Continuation:
    ids: list[int]      # the sampled tokens, the end-of-text token not among them
    # p_yes[t] = P(Yes) / (P(Yes) + P(No)) where token t was sampled, the end-of-text token among them
    p_yes: list[float]
    end: int | None     # the end-of-text token; None: it was cut off, at max_new_tokens or the context
    p_yes_after_suffix: float | None = None  # P(Yes) behind these tokens and the engine's suffix for them

    @property
    def finished(self) -> bool:
        return self.end is not None


def uniform(seeds: Tensor, t: Tensor) -> Tensor:
    """One number in [0, 1) for each row, by splitmix64: seeds and positions, int64 (R,) each -> fp32 (R,)."""
    x = seeds + t * (0x9E3779B97F4A7C15 - 2 ** 64)  # its constants, as int64
    x = (x ^ shift_right(x, 30)) * (0xBF58476D1CE4E5B9 - 2 ** 64)
    x = (x ^ shift_right(x, 27)) * (0x94D049BB133111EB - 2 ** 64)
    x = x ^ shift_right(x, 31)
    return shift_right(x, 40).float() * 2.0 ** -24


def shift_right(x: Tensor, n: int) -> Tensor:
    """A logical shift of int64; >> would repeat the sign."""
    return (x >> n) & ((1 << (64 - n)) - 1)


def sample(logits: Tensor, u: Tensor, temperature: float, top_p: float) -> Tensor:
    """Draw a token from each row's nucleus, by the inverse CDF: logits (R, V), u (R,) -> (R,) int64.

    u is uniform in [0, 1). The nucleus is the smallest set of most likely tokens whose probability reaches
    top_p.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    # (R, V), most likely first
    p, ids = torch.softmax(logits / temperature, dim=-1).sort(dim=-1, descending=True)
    cumulative = p.cumsum(dim=-1)
    # A token is in while those before it do not reach top_p
    size = (cumulative - p < top_p).sum(dim=-1, keepdim=True)
    mass = cumulative.gather(1, size - 1)  # (R, 1): the nucleus's probability
    index = torch.searchsorted(cumulative, u[:, None] * mass, right=True)
    index = torch.minimum(index, size - 1)  # rounding must not step out of the nucleus
    return ids.gather(1, index)[:, 0]


def yes_against_no(logits: Tensor, yes_no: tuple[int, int]) -> Tensor:
    """A softmax over the logits of Yes and No alone: (R, V) -> P(Yes), fp32 (R,)."""
    yes, no = yes_no
    return torch.sigmoid(at_least_fp32(logits[:, yes]) - at_least_fp32(logits[:, no])).float()


def check_finite(logits: Tensor) -> None:
    """Broken weights show here, and not as an index error in the sampling."""
    if not bool(logits.isfinite().all()):
        raise BadInput(
            "--model: its logits are not finite; the weights or the sizes in config.json are broken: "
            "take another checkpoint"
        )


class Engine(Queue):
    """Sampling for one model and one set of parameters.

    eos_ids    the tokens that end a continuation
    yes_no     the two token ids whose probabilities are compared
    max_rows   how many continuations are decoded side by side, which bounds a batch of the queue
    reserve    positions of the context that are kept free behind a continuation, for a suffix
    suffix_of  from a continuation's tokens to those of its suffix, after which P(Yes) is read: at most
               `reserve` - 1 of them, mostly none

    The counters say what was computed.
    """

    def __init__(self, model: Decoder, eos_ids: list[int], yes_no: tuple[int, int], temperature: float = 0.95,
                 top_p: float = 0.95, max_new_tokens: int = 4096, max_rows: int = 160, reserve: int = 0,
                 suffix_of: Callable[[list[int]], list[int]] = lambda ids: []):
        self.model = model
        self.yes_no = yes_no
        self.suffix_of = suffix_of
        self.temperature = temperature
        self.top_p = top_p
        self.max_new_tokens = max_new_tokens
        self.max_rows = max_rows
        self.max_positions = model.config.max_position_embeddings - reserve
        self.eos = torch.tensor(eos_ids, dtype=torch.int64, device=model.device)
        self.prompt_tokens = 0   # the prompts' lengths, summed
        self.prefill_tokens = 0  # those of them that were computed
        # Sampled tokens are counted on the device, so that no step waits for the sum.
        self.sampled = torch.zeros((), dtype=torch.int64, device=model.device)
        self.restart()

    @property
    def new_tokens(self) -> int:
        """Sampled tokens, end-of-text tokens among them."""
        return int(self.sampled)

    @torch.inference_mode()
    def generate(self, requests: list[Request]) -> list[list[Continuation]]:
        """The K continuations of each request, with P(Yes) behind the suffixes of those that have one."""
        if self.max_new_tokens == 0:
            found = [[Continuation([], [], end=None) for _ in request.seeds] for request in requests]
        else:
            found = self.decode_all(requests)
        with_suffix = []
        sequences = []
        for request, continuations in zip(requests, found, strict=True):
            for c in continuations:
                suffix = self.suffix_of(c.ids)
                if suffix:
                    with_suffix.append(c)
                    sequences.append(request.ids + c.ids + suffix)
        for c, p_yes in zip(with_suffix, self.read_p_yes(sequences), strict=True):
            c.p_yes_after_suffix = p_yes
        return found

    def decode_all(self, requests: list[Request]) -> list[list[Continuation]]:
        """Prefill, then one token a step for all rows."""
        device = self.model.device
        rows = [(i, seed) for i, request in enumerate(requests) for seed in request.seeds]
        owner, seeds = torch.tensor(rows, device=device).unbind(dim=1)  # of each row: its request, its seed
        prompt_length = torch.tensor([len(request.ids) for request in requests], device=device)[owner]
        # The most that a row may sample
        limit = (self.max_positions - prompt_length).clamp(max=self.max_new_tokens)
        longest_prompt = max(len(request.ids) for request in requests)
        steps = int(limit.max())

        logits, cache = self.prefill([request.ids for request in requests], owner)
        check_finite(logits)
        length = torch.zeros_like(owner)  # tokens that each row has sampled
        done = torch.zeros_like(owner, dtype=torch.bool)
        tokens = []
        p_yes = []
        for t in range(steps):
            logits = at_least_fp32(logits)  # (R, V)
            token = sample(logits, uniform(seeds, length), self.temperature, self.top_p)
            tokens.append(token)
            p_yes.append(yes_against_no(logits, self.yes_no))
            length += ~done
            done |= torch.isin(token, self.eos) | (length >= limit)
            if t % LOOK_EVERY == LOOK_EVERY - 1 and done.all():
                break
            if t < steps - 1:
                if cache[0].shape[3] == longest_prompt + t:  # full
                    cache = [F.pad(layer, (0, 0, 0, CACHE_STEP)) for layer in cache]
                logits = self.decode(token, prompt_length + t, cache)
        self.sampled += length.sum()

        # R lists; tokens past a row's length are discarded
        tokens = torch.stack(tokens, dim=1).tolist()
        p_yes = torch.stack(p_yes, dim=1).tolist()
        found: list[list[Continuation]] = [[] for _ in requests]
        for i, n, row_tokens, row_p_yes in zip(owner.tolist(), length.tolist(), tokens, p_yes, strict=True):
            found[i].append(self.continuation_of(row_tokens[:n], row_p_yes[:n]))
        return found

    def continuation_of(self, tokens: list[int], p_yes: list[float]) -> Continuation:
        """The tokens that a row has sampled, as a continuation."""
        if tokens[-1] in self.eos.tolist():
            return Continuation(tokens[:-1], p_yes, end=tokens[-1])
        return Continuation(tokens, p_yes, end=None)

    def prefill(self, prompts: list[list[int]], owner: Tensor) -> tuple[Tensor, list[Tensor]]:
        """All prompts in one pass -> the logits after each row's prompt (R, V), and the rows' cache.

        The cache has a tensor (2, R, KV, L, D) for each layer: keys and values by row. A row's prompt lies at
        its left; what lies behind the row's own positions is padding, which `decode` masks.
        """
        tree = Tree(prompts).to(self.model.device)
        self.prompt_tokens += sum(map(len, prompts))
        self.prefill_tokens += len(tree)
        paths = pad_sequence([torch.from_numpy(path) for path in tree.paths], batch_first=True)
        index = paths.to(self.model.device)[owner]  # (R, L): where in the tree each row's prompt lies
        attend_in_tree = self.model.tree_attention(tree.end)
        keys_values = []  # of each layer, (2, T, KV, D)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys_values.append(torch.stack((k, v)))
            return attend_in_tree(layer, q, k, v)
        hidden = self.model(tree.ids, tree.positions, attend)  # (T, C)
        # (2, T, KV, D) -> (2, R, L, KV, D) -> (2, R, KV, L, D)
        cache = [layer[:, index].transpose(2, 3).contiguous() for layer in keys_values]
        logits = self.model.logits(hidden[last_tokens(tree)])  # (prompts, V)
        return logits[owner], cache

    def decode(self, token: Tensor, position: Tensor, cache: list[Tensor]) -> Tensor:
        """A step: each row's last token (R,) at its position (R,) -> the logits after it (R, V).

        Its keys and values go into the cache.
        """
        rows = torch.arange(len(token), device=token.device)
        visible = torch.arange(cache[0].shape[3], device=token.device) <= position[:, None]  # (R, L)
        mask = visible[:, None, None]  # (R, 1, 1, L)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = cache[layer]  # (R, KV, L, D)
            keys[rows, :, position] = k
            values[rows, :, position] = v
            # (R, H, 1, D)
            y = F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=mask, enable_gqa=True)
            return y[:, :, 0]
        return self.model.logits(self.model(token, position, attend))

    @torch.inference_mode()
    def read_p_yes(self, sequences: list[list[int]]) -> list[float]:
        """P(Yes) / (P(Yes) + P(No)) for the token after each sequence."""
        found = []
        for ids in sequences:
            tree = Tree([ids]).to(self.model.device)
            hidden = self.model(tree.ids, tree.positions, self.model.tree_attention(tree.end))  # (T, C)
            logits = self.model.logits(hidden[-1:])  # (1, V)
            check_finite(logits)
            found += yes_against_no(logits, self.yes_no).tolist()
        return found


def last_tokens(tree: Tree) -> Tensor:
    """Where in a tree each sequence's last token stands: (sequences,)."""
    return torch.tensor([int(path[-1]) for path in tree.paths], device=tree.ids.device)
