"""Decoding's keys and values, each kept and read as often as needed and no more.

Plain (generate.py): every row has a copy of its prompt's keys and values, and each step reads all of them.
But all prompts begin with the same instructions, and K rows share a prompt. So the keys that a row's query
attends to stand in three places:

    prefix    what all prompts share, once           all rows' queries meet it in one product
    prompts   the rest of each prompt, once a slot   the queries of the prompt's rows meet it in one product
    rows      what each row has sampled              each row's query meets it alone

and the softmax over all of them is merged from three, exactly (the identity in fast/attention.py, with any
number of sets):

    weight_S = exp(L_S) / sum of exp(L_S'),   out = sum of weight_S out_S,   L_S = log sum exp of the scores
    over S

Gain: prefix and prompt are read once and not R times; a step of 160 rows of SmolLM2 with 700 tokens of prompt
reads 90 MB of keys and values instead of 1.5 GB.

Shapes: R rows, P slots, H query heads in KV groups of G, D head size.
"""
from typing import NamedTuple

import torch
from torch import Tensor

from model import Decoder, at_least_fp32


class Slot(NamedTuple):
    """A prompt that is being decoded: its request, and its tokens behind the prefix."""
    request_id: int
    length: int


class Bucket:
    """Prompts of about the same length, side by side, which one product reads.

    keys_values (2, layers, P, KV, L, D)
    """

    def __init__(self, like: Tensor, length: int):
        """like: keys and values (2, layers, KV, n, D), of any length n."""
        two, layers, KV, _, D = like.shape
        self.keys_values = like.new_zeros(two, layers, 0, KV, length, D)
        self.slots: list[Slot] = []

    def add(self, slot: Slot, keys_values: Tensor) -> None:
        n = len(self.slots)
        self.keys_values = with_room(self.keys_values, 2, n + 1)
        self.keys_values[:, :, n, :, :slot.length] = keys_values
        self.slots.append(slot)

    def remove(self, slot: Slot) -> None:
        """The last slot moves to the index that becomes free."""
        index = self.slots.index(slot)
        last = self.slots.pop()
        if index < len(self.slots):
            self.keys_values[:, :, index] = self.keys_values[:, :, len(self.slots)]
            self.slots[index] = last

    def lengths(self) -> Tensor:
        """(P,) int64, of the slots."""
        return torch.tensor([slot.length for slot in self.slots], device=self.keys_values.device)

    def mask(self) -> Tensor:
        """(P, 1, 1, L): 0 where a slot has a key, -inf behind its end."""
        keys = torch.arange(self.keys_values.shape[4], device=self.keys_values.device)
        padding = keys >= self.lengths()[:, None]
        mask = torch.zeros(padding.shape, dtype=self.keys_values.dtype, device=self.keys_values.device)
        return mask.masked_fill_(padding, -torch.inf)[:, None, None]


def bucket_length(n: int) -> int:
    """The bucket for prompts of n tokens: two for each doubling (192, 256, 384, 512, ...)."""
    step = max(32, 2 ** ((n - 1).bit_length() - 2))
    return -(-n // step) * step


class RowsBySlot(NamedTuple):
    """Which rows each slot has, for R rows and P slots; all int64.

    Slot p has the rows order[first[p]], ..., count[p] of them; row r is the index[r]-th of slot[r].
    """
    slot: Tensor   # (R,)
    index: Tensor  # (R,)
    order: Tensor  # (R,)
    first: Tensor  # (P,)
    count: Tensor  # (P,)
    most: int            # rows of the largest slot

    @classmethod
    def of(cls, slot: Tensor, n_slots: int) -> "RowsBySlot":
        """slot (R,): that of each row."""
        order = slot.argsort(stable=True)
        count = torch.bincount(slot, minlength=n_slots)
        first = count.cumsum(0) - count
        index = torch.empty_like(order)
        index[order] = torch.arange(len(order), device=order.device) - first[slot[order]]
        return cls(slot, index, order, first, count, int(count.max()))


class Cache:
    """Keys and values of prefix, prompts and rows, and the attention over them."""

    def __init__(self, model: Decoder):
        c = model.config
        weight = model.embed.weight
        self.KV = c.num_key_value_heads
        self.G = c.num_attention_heads // c.num_key_value_heads
        self.D = c.head_dim
        self.prefix = weight.new_zeros(2, c.num_hidden_layers, self.KV, 0, self.D)
        self.buckets: dict[int, Bucket] = {}
        self.slots: dict[int, Slot] = {}  # by request id
        # (2, layers, at least R, KV, at least W, D)
        self.rows = weight.new_zeros(2, c.num_hidden_layers, 0, self.KV, 0, self.D)

    # ------------------------------------------------------------------------------------- prefix and prompts

    @property
    def prefix_length(self) -> int:
        return self.prefix.shape[3]

    def add_prompt(self, request_id: int, keys_values: Tensor) -> None:
        """keys_values (2, layers, KV, n, D): of the prompt's tokens behind the prefix."""
        slot = Slot(request_id, keys_values.shape[3])
        length = bucket_length(slot.length)
        if length not in self.buckets:
            self.buckets[length] = Bucket(keys_values, length)
        self.buckets[length].add(slot, keys_values)
        self.slots[request_id] = slot

    def remove_prompt(self, request_id: int) -> None:
        slot = self.slots.pop(request_id)
        self.buckets[bucket_length(slot.length)].remove(slot)

    def shorten_prefix(self, length: int) -> None:
        """What is cut off the prefix moves in front of each prompt, which goes to a longer bucket."""
        cut = self.prefix[:, :, :, length:]
        self.prefix = self.prefix[:, :, :, :length]
        old = self.buckets
        self.buckets = {}
        for bucket in old.values():
            for i, slot in enumerate(bucket.slots):
                own = bucket.keys_values[:, :, i, :, :slot.length]
                self.add_prompt(slot.request_id, torch.cat((cut, own), dim=3))

    # ------------------------------------------------------------------------------------------ rows

    def make_room(self, rows: int, width: int = 0) -> None:
        self.rows = with_room(self.rows, 2, rows)
        self.rows = with_room(self.rows, 4, width)

    def copy_rows(self, source: Tensor, first: int, width: int) -> None:
        """Rows first, first + 1, ... become copies of the rows `source`, of their first `width` tokens."""
        self.make_room(first + len(source))
        new = slice(first, first + len(source))
        self.rows[:, :, new, :, :width] = self.rows[:, :, :, :, :width].index_select(2, source)

    def move_rows(self, source: Tensor, target: Tensor) -> None:
        self.rows.index_copy_(2, target, self.rows.index_select(2, source))

    # ------------------------------------------------------------------------------------------ attention

    def arrange(self, request_ids: Tensor) -> None:
        """Put each slot's rows side by side, after a change of rows or prompts. request_ids (R,) of the rows
        """
        buckets = [bucket for bucket in self.buckets.values() if bucket.slots]
        self.in_use = [(bucket, bucket.mask()) for bucket in buckets]
        slots = [slot for bucket in buckets for slot in bucket.slots]
        slot_of = {slot.request_id: i for i, slot in enumerate(slots)}
        slot_of_row = [slot_of[request_id] for request_id in request_ids.tolist()]
        slot = torch.tensor(slot_of_row, device=request_ids.device)
        self.by_slot = RowsBySlot.of(slot, len(slots))
        # Room for the queries of each slot's rows (attend_prompts)
        self.queries = self.rows.new_zeros(len(slots), self.KV, self.by_slot.most, self.G, self.D)

    def begin_step(self, last: Tensor, width: int) -> None:
        """Before `attend`: row r's query stands at last[r] in its row, and sees the keys up to there.

        last (R,) int64; width: no row has more keys
        """
        behind = torch.arange(width, device=last.device) > last[:, None]  # (R, width)
        self.mask = torch.where(behind, -torch.inf, 0.0)[:, None, None]

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """The rows' queries over all three sets of keys: q (R, H, D) -> (R, H, D)."""
        R = len(q)
        width = self.mask.shape[3]
        q = (q * self.D ** -0.5).view(R, self.KV, self.G, self.D)
        keys, values = self.rows[:, layer, :R, :, :width]
        return self.attend_before(layer, q, attend_few(q, keys, values, self.mask))

    def attend_suffixes(self, layer: int, q: Tensor, row: Tensor, mask: Tensor) -> Tensor:
        """The same for S tokens of each of the rows `row` (R,): q (R S, H, D) -> (R S, H, D).

        mask (R, S, width), of the rows' own keys
        """
        R, S, width = mask.shape
        q = (q * self.D ** -0.5).view(R * S, self.KV, self.G, self.D)
        keys, values = self.rows[:, layer, row, :, :width]  # (R, KV, width, D)
        by_row = q.view(R, S, self.KV, self.G, self.D).permute(0, 2, 3, 1, 4)  # (R, KV, G, S, D)
        out, lse = attend_few(by_row, keys[:, :, None], values[:, :, None], mask[:, None, None])
        out = out.permute(0, 3, 1, 2, 4).reshape(R * S, self.KV, self.G, self.D)
        lse = lse.permute(0, 3, 1, 2).reshape(R * S, self.KV, self.G)
        return self.attend_before(layer, q, (out, lse))

    def attend_before(self, layer: int, q: Tensor, own: tuple[Tensor, Tensor]) -> Tensor:
        """Prompts and prefix, merged with `own`, what the same queries found in their rows' own keys.

        q (R, KV, G, D) -> (R, H, D)
        """
        found = [own, self.attend_prompts(layer, q)]
        if self.prefix_length:
            found.append(self.attend_prefix(layer, q))
        return merge(found).to(q.dtype).reshape(len(q), -1, self.D)

    def attend_prompts(self, layer: int, q: Tensor) -> tuple[Tensor, Tensor]:
        """Each slot's rows over its prompt: q (R, KV, G, D) -> out (R, KV, G, D), log-sum-exp (R, KV, G)."""
        # (P, KV, rows of a slot, G, D); padding holds whatever it held
        slot = self.by_slot.slot
        index = self.by_slot.index
        self.queries[slot, :, index] = q
        queries = self.queries.flatten(2, 3)
        outs = []
        lses = []
        first = 0
        for bucket, mask in self.in_use:
            n = len(mask)
            keys, values = bucket.keys_values[:, layer, :n]
            out, lse = attend_many(queries[first:first + n], keys, values, mask)
            outs.append(out)
            lses.append(lse)
            first += n
        P, KV, most = self.queries.shape[:3]
        out = torch.cat(outs).view(P, KV, most, self.G, self.D)
        lse = torch.cat(lses).view(P, KV, most, self.G)
        return out[slot, :, index], lse[slot, :, index]

    def attend_prefix(self, layer: int, q: Tensor) -> tuple[Tensor, Tensor]:
        """All rows at once over the prefix: q (R, KV, G, D) -> out (R, KV, G, D), log-sum-exp (R, KV, G)."""
        R = len(q)
        queries = q.transpose(0, 1).reshape(1, self.KV, R * self.G, self.D)
        out, lse = attend_many(queries, self.prefix[:1, layer], self.prefix[1:, layer])
        out = out.view(self.KV, R, self.G, self.D).transpose(0, 1)
        lse = lse.view(self.KV, R, self.G).transpose(0, 1)
        return out, lse


def attend_few(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention written out: q (..., N, D), scaled by D^-0.5; k and v (..., L, D); mask 0 or -inf.

    -> out (..., N, D), and log sum exp of the scores (..., N)
    """
    scores = at_least_fp32(q @ k.transpose(-1, -2))  # (..., N, L)
    if mask is not None:
        scores += mask
    highest = scores.amax(dim=-1, keepdim=True)
    total = scores.sub_(highest).exp_().sum(dim=-1, keepdim=True)
    out = (scores.to(v.dtype) @ v) / total
    lse = (highest + total.log()).squeeze(-1)
    return out, lse


def attend_many(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """attend_few for many queries of the same keys, (B, KV, N, D) and (B, KV, L, D), mask (B, 1, 1, L).

    On CPU, PyTorch's blocked kernel has no scores to write down; for few queries it is slower, as its blocks
    of 32 stay empty.
    """
    if q.device.type != "cpu" or q.shape[2] < 16:
        return attend_few(q, k, v, mask)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=1.0)


def merge(found: list[tuple[Tensor, Tensor]]) -> Tensor:
    """One softmax from those over disjoint sets of keys.

    (out (..., D), log-sum-exp (...)) of each -> out (..., D), at least fp32
    """
    weights = torch.stack([lse for _, lse in found]).softmax(dim=0).unsqueeze(-1)  # each set's share
    merged = weights[0] * found[0][0]
    for weight, (out, _) in zip(weights[1:], found[1:], strict=True):
        merged = merged.addcmul_(weight, out)
    return merged


def with_room(store: Tensor, dim: int, size: int) -> Tensor:
    """`store` with room for `size` along `dim`; new room is 0. It grows by a quarter at least, so rarely."""
    old = store.shape[dim]
    if old >= size:
        return store
    shape = list(store.shape)
    shape[dim] = max(size, old + old // 4)
    grown = store.new_empty(shape)  # and not F.pad or cat with zeros, which write twice
    grown.narrow(dim, 0, old).copy_(store)
    grown.narrow(dim, old, shape[dim] - old).zero_()
    return grown
