"""Continuous batching over a tree of continuations.

Plain (generate.Engine): a batch of requests is decoded until its last row ends, with a row for each
continuation. Fast:

- Finished rows leave the batch, and waiting prompts take their slots, so that no row is decoded in vain.
- The K continuations of a prompt grow as a tree. Those that have sampled the same tokens so far are one row,
  which is computed once.
  Each draws its own next token, and where they differ the row branches. A model that is sure of its words, as
  one is that was trained to judge, has far fewer rows than continuations: the small world's computes a fifth
  of the tokens that it samples.
- Prompts are prefilled as a tree below the prefix that all of them share, and the prefix is computed once
  (fast/cache.py).
- P(Yes) after a missing verdict is read behind a continuation while its keys and values are there: it ends
  with a suffix (`suffix_of`), and suffixes of continuations that end together pass the model together.
- Where P(Yes) is read after other sequences, they pass as trees.

Why it samples what the plain one does: a token depends on its row's logits and on uniform(seed, t), neither
of which knows the batch. Gain: 10 times Transformers' `generate` on 2 cores (bench/README.md); suffixes
35% of the reward's time without it.
"""
from collections import deque
from typing import Callable, Iterator, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor

import generate
from fast.cache import Cache
from fast.nucleus import sample
from fast.rows import Draws, Rows
from generate import Continuation, Request, check_finite, last_tokens, uniform, yes_against_no
from model import Tree, common_prefix

PREFILL_TOKENS = 4096  # prompts are prefilled in groups of about so many tokens, shared ones counted once
WINDOW = 64            # tokens that the rows have room for at first
SUFFIX_ROWS = 32       # suffixes that pass together at most, since their rows' keys are copied for it


class PrefilledPrompt(NamedTuple):
    """A prompt that waits for a slot."""
    request_id: int
    request: Request
    keys_values: Tensor  # of all that was prefilled with it, (2, layers, KV, T, D)
    path: Tensor         # which of them are this prompt's own
    logits: Tensor       # (V,), of the first new token


class Engine(generate.Engine):
    """generate.Engine with continuous batching; what `max_rows` bounds is the continuations side by side."""

    done_share = 1 / 16  # rows are taken out when so many of them are done

    def restart(self) -> None:
        super().restart()
        device = self.model.device
        self.ready: deque[PrefilledPrompt] = deque()
        self.prefix_ids: np.ndarray | None = None
        self.waiting_tokens = 0  # tokens of the waiting prompts that are not computed yet
        self.cache = self.new_cache()
        self.rows = Rows.new(0, 0, 0, n=0, width=0, device=device)
        self.draws = Draws(*(torch.zeros(0, dtype=torch.int64, device=device) for _ in range(3)))
        # request id -> its K continuations, None = not ended yet
        self.answers: dict[int, list[Continuation | None]] = {}
        self.longest = 0        # tokens of the longest row
        self.arranged = False   # is the cache arranged for these rows and prompts?
        self.decoded_width = 0  # tokens of each row that a step reads

    def new_cache(self) -> Cache:
        return Cache(self.model)

    def add(self, request: Request) -> int:
        before = self.waiting[-1][1].ids if self.waiting else self.prefix_ids
        ids = np.asarray(request.ids, dtype=np.int64)
        shared = 0 if before is None else common_prefix(np.asarray(before, dtype=np.int64), ids)
        self.waiting_tokens += len(ids) - shared
        return super().add(request)

    @property
    def has_room(self) -> bool:
        """Is another prompt wanted for the next group to be prefilled?"""
        is_small = self.waiting_tokens < PREFILL_TOKENS and len(self.waiting) < self.max_rows
        return not self.ready and is_small

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.ready or len(self.rows))

    @torch.inference_mode()
    def step(self) -> list[tuple[int, list[Continuation]]]:
        """Fill a slot, let finished rows leave, or give every row a token. -> requests that are answered."""
        if self.max_new_tokens == 0 and self.waiting:
            return self.read_waiting()
        if not self.ready and self.waiting:
            self.prefill_waiting()
        if self.ready and self.fits(self.ready[0].request):
            self.fill_slot(self.ready.popleft())
            return []
        if self.many_are_done():
            return self.retire()
        if len(self.rows):
            self.decode_step()
        return []

    # ------------------------------------------------------------------------------------------ prompts

    def fits(self, request: Request) -> bool:
        return not len(self.rows) or len(self.draws) + len(request.seeds) <= self.max_rows

    def prefill_waiting(self) -> None:
        """Compute the waiting prompts as one tree below the prefix."""
        group = list(self.waiting)
        self.waiting.clear()
        self.waiting_tokens = 0
        prompts = [np.asarray(request.ids, dtype=np.int64) for _, request in group]
        self.fit_prefix(prompts)
        prefix = len(self.prefix_ids)
        tree = Tree([request.ids[prefix:] for _, request in group]).to(self.model.device)
        hidden, keys_values = self.forward_tree(tree, prefix)
        logits = self.model.logits(hidden)  # (prompts, V)
        check_finite(logits)
        for (request_id, request), path, row in zip(group, tree.paths, logits, strict=True):
            own = torch.from_numpy(path).to(self.model.device)
            self.ready.append(PrefilledPrompt(request_id, request, keys_values, own, row))
        self.prompt_tokens += sum(map(len, prompts))
        self.prefill_tokens += len(tree)

    def forward_tree(self, tree: Tree, past: int) -> tuple[Tensor, Tensor]:
        """A tree below the prefix's first `past` tokens (all or none).

        -> hidden states of the sequences' last tokens (S, C), keys and values of all tokens (2, layers, KV,
        T, D)
        """
        prefix = self.cache.prefix
        attention = self.model.tree_attention(tree.end, past)
        keys_values = prefix.new_empty(*prefix.shape[:3], len(tree), prefix.shape[4])

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys_values[0, layer] = k.transpose(0, 1)
            keys_values[1, layer] = v.transpose(0, 1)
            before = (prefix[0, layer], prefix[1, layer]) if past else None
            return attention(layer, q, k, v, past=before)
        hidden = self.model(tree.ids, tree.positions + past, attend)  # (T, C)
        return hidden[last_tokens(tree)], keys_values

    def fit_prefix(self, prompts: list[np.ndarray]) -> None:
        """Make the prefix one of these prompts too, and leave each at least one token of its own.

        The first group decides. If a later prompt shares less, the prefix is cut there, for the prompts in
        slots as well.
        """
        first = prompts[0] if self.prefix_ids is None else self.prefix_ids
        shared = min(min(common_prefix(first, ids), len(ids) - 1) for ids in prompts)
        if self.prefix_ids is None:
            self.prefix_ids = first[:shared]
            if shared:
                tree = Tree([self.prefix_ids.tolist()]).to(self.model.device)
                _, self.cache.prefix = self.forward_tree(tree, 0)
                self.prefill_tokens += shared
        elif shared < len(self.prefix_ids):
            self.prefix_ids = self.prefix_ids[:shared]
            self.cache.shorten_prefix(shared)
            self.arranged = False

    def rows_of(self, k: int) -> int:
        """The rows that K continuations begin with: one, as they agree on everything so far."""
        return 1

    def fill_slot(self, prompt: PrefilledPrompt) -> None:
        """Give a prefilled prompt a slot and its K continuations their rows, and draw their first tokens."""
        K = len(prompt.request.seeds)
        R = len(self.rows)
        new = self.rows_of(K)
        start = len(prompt.request.ids)
        device = self.model.device
        self.cache.add_prompt(prompt.request_id, prompt.keys_values[:, :, :, prompt.path])
        self.cache.make_room(R + new)
        self.answers[prompt.request_id] = [None] * K
        self.longest = max(self.longest, 1)
        self.rows.widen(self.longest)
        limit = min(self.max_new_tokens, self.max_positions - start)
        width = self.rows.tokens.shape[1]
        self.rows = self.rows.append(Rows.new(prompt.request_id, start, limit, new, width, device))
        number = torch.arange(K, device=device)
        seed = torch.tensor(prompt.request.seeds, dtype=torch.int64, device=device)
        self.draws = self.draws.append(Draws(R + number % new, seed, number))
        self.arranged = False
        self.append(
            slice(R, R + new), slice(len(self.draws) - K, len(self.draws)), prompt.logits.repeat(new, 1)
        )

    # ------------------------------------------------------------------------------------------ decoding

    def decode_step(self) -> None:
        """One more token for every row that is not done."""
        width = self.width()
        if not self.arranged:
            self.cache.arrange(self.rows.request_id)
        if not self.arranged or width != self.decoded_width:
            self.cache.make_room(len(self.rows), max(width, min(WINDOW, self.max_new_tokens)))
            self.rows.widen(width + 1)
            self.run_decode = self.decode_function()
        self.arranged = True
        self.decoded_width = width
        self.longest += 1
        self.append(slice(0, len(self.rows)), slice(0, len(self.draws)), self.run_decode())

    def width(self) -> int:
        """How many tokens of each row a step reads."""
        return self.longest

    def decode_function(self) -> Callable[[], Tensor]:
        return self.decode

    def decode(self) -> Tensor:
        """The logits after every row's last token (R, V), whose keys and values go into the cache."""
        device = self.model.device
        row = torch.arange(len(self.rows), device=device)
        last = self.rows.length - 1
        self.cache.begin_step(last, self.decoded_width)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.cache.rows[0, layer, row, :, last] = k
            self.cache.rows[1, layer, row, :, last] = v
            return self.cache.attend(layer, q)
        hidden = self.model(self.rows.tokens[row, last], self.rows.start + last, attend)
        return self.model.logits(hidden)

    def append(self, rows: slice, draws: slice, logits: Tensor) -> None:
        """Draw the next token of the continuations `draws`, those of `rows`, from the rows' logits (n, V).

        It is written down with P(Yes) at its position. A row that is done stays as it is: what is drawn for
        it stands behind its end.
        """
        device = logits.device
        self.rows.widen(self.longest)
        position = self.rows.length[rows]
        row_index = torch.arange(rows.start, rows.stop, device=device)
        self.rows.p_yes[row_index, position] = yes_against_no(logits, self.yes_no)

        row = self.draws.row[draws]  # of each draw
        position = self.rows.length[row]
        u = uniform(self.draws.seed[draws], position)
        token = sample(logits, row - rows.start, u, self.temperature, self.top_p)
        self.sampled += (~self.rows.done[row]).sum()

        row = self.branch(draws, token)  # there may be more rows now, behind the others
        rows = slice(rows.start, len(self.rows))
        self.rows.tokens[row, position] = token
        row_index = torch.arange(rows.start, rows.stop, device=device)
        last = self.rows.tokens[row_index, self.rows.length[rows]]
        ends = torch.isin(last, self.eos)
        self.rows.length[rows] += ~self.rows.done[rows]
        self.rows.done[rows] |= ends | (self.rows.length[rows] >= self.rows.limit[rows])

    def branch(self, draws: slice, token: Tensor) -> Tensor:
        """Where continuations of a row have drawn different tokens, all but the first go on in copies of it.

        -> the row of each continuation of `draws` from now on.
        """
        row = self.draws.row[draws]
        V = self.model.config.vocab_size
        # (row, token) as a number; sorted, so by rows
        pairs, which = torch.unique(row * V + token, return_inverse=True)
        next_row = pairs // V
        is_new = torch.zeros(len(pairs), dtype=torch.bool)
        is_new[1:] = next_row[1:] == next_row[:-1]  # not the first of its row
        parents = next_row[is_new]
        if not len(parents):
            return row
        R = len(self.rows)
        self.cache.copy_rows(parents, R, self.longest)
        self.rows = self.rows.append(self.rows.select(parents))
        next_row[is_new] = torch.arange(R, len(self.rows))
        self.draws.row[draws] = next_row[which]
        self.arranged = False
        return self.draws.row[draws]

    # ------------------------------------------------------------------------------------------ ends

    def many_are_done(self) -> bool:
        """Is it time to take out rows? Suffixes are read sooner together."""
        return int(self.rows.done.sum()) >= max(1, int(len(self.rows) * self.done_share))

    def retire(self) -> list[tuple[int, list[Continuation]]]:
        """Take finished rows out. -> the requests that are answered with them."""
        numbers_of = self.draws_of_done_rows()
        ended = {row: self.continuation_of_row(row) for row in numbers_of}
        self.read_suffixes(ended)
        answered = []
        for row, numbers in numbers_of.items():
            request_id = int(self.rows.request_id[row])
            for number in numbers:
                self.answers[request_id][number] = ended[row]
            if all(self.answers[request_id]):
                answered.append((request_id, self.answers.pop(request_id)))
        for request_id, _ in answered:
            self.cache.remove_prompt(request_id)
        self.drop_done_rows()
        self.arranged = False
        return answered

    def draws_of_done_rows(self) -> dict[int, list[int]]:
        """Row -> the numbers of its continuations, for each row that is done."""
        mine = self.draws.select(self.rows.done[self.draws.row])
        numbers: dict[int, list[int]] = {}
        for row, number in zip(mine.row.tolist(), mine.number.tolist(), strict=True):
            numbers.setdefault(row, []).append(number)
        return numbers

    def continuation_of_row(self, row: int) -> Continuation:
        n = int(self.rows.length[row])
        return self.continuation_of(self.rows.tokens[row, :n].tolist(), self.rows.p_yes[row, :n].tolist())

    def read_suffixes(self, ended: dict[int, Continuation]) -> None:
        """Read P(Yes) behind the suffixes of the continuations that have ended, by row, many in one pass."""
        with_suffix = []  # (row, continuation, suffix)
        for row, continuation in ended.items():
            suffix = self.suffix_of(continuation.ids)
            if suffix:
                with_suffix.append((row, continuation, suffix))
        for first in range(0, len(with_suffix), SUFFIX_ROWS):
            rows, continuations, suffixes = zip(*with_suffix[first:first + SUFFIX_ROWS], strict=True)
            found = self.pass_suffixes(rows, [c.ids for c in continuations], suffixes)
            for continuation, p_yes in zip(continuations, found.tolist(), strict=True):
                continuation.p_yes_after_suffix = p_yes

    def read_waiting(self) -> list[tuple[int, list[Continuation]]]:
        """Answer the waiting requests with continuations of no tokens."""
        request_ids, requests = zip(*self.waiting, strict=True)
        self.waiting.clear()
        self.waiting_tokens = 0
        return list(zip(request_ids, self.generate(list(requests)), strict=True))

    @torch.inference_mode()
    def read_p_yes(self, sequences: list[list[int]]) -> list[float]:
        """P(Yes) / (P(Yes) + P(No)) for the token after each sequence, in trees of about PREFILL_TOKENS."""
        found = []
        for group in groups_of(sequences, PREFILL_TOKENS):
            tree = Tree(group).to(self.model.device)
            hidden = self.model(tree.ids, tree.positions, self.model.tree_attention(tree.end))
            logits = self.model.logits(hidden[last_tokens(tree)])
            check_finite(logits)
            found += yes_against_no(logits, self.yes_no).tolist()
        return found

    def pass_suffixes(self, rows: Sequence[int], before: Sequence[list[int]],
                      suffixes: Sequence[list[int]]) -> Tensor:
        """P(Yes) after each suffix (R,), which stands in its row behind the ids `before`.

        Its keys and values go behind those of its row, in place of the end-of-text token. The last token of a
        row that was cut off has none yet, so the pass begins with a row's last token.
        """
        device = self.model.device
        passed = [ids[-1:] + suffix for ids, suffix in zip(before, suffixes, strict=True)]
        R = len(passed)
        S = max(map(len, passed))
        row = torch.tensor(rows, device=device)
        last = torch.tensor([len(ids) - 1 for ids in passed], device=device)
        # (R, S); what is padded stands behind all that is looked at
        ids = torch.tensor([ids + [0] * (S - len(ids)) for ids in passed], device=device)
        first = torch.tensor([max(0, len(ids) - 1) for ids in before], device=device)
        position = first[:, None] + torch.arange(S, device=device)  # (R, S), in the rows
        width = int(first.max()) + S
        behind = torch.arange(width, device=device) > position[:, :, None]  # (R, S, width)
        mask = torch.where(behind, -torch.inf, 0.0)
        self.cache.make_room(len(self.rows), width)
        self.cache.arrange(self.rows.request_id[row].repeat_interleave(S))

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.cache.rows[0, layer, row[:, None], :, position] = k.view(R, S, *k.shape[1:])
            self.cache.rows[1, layer, row[:, None], :, position] = v.view(R, S, *v.shape[1:])
            return self.cache.attend_suffixes(layer, q, row, mask)
        positions = self.rows.start[row][:, None] + position
        hidden = self.model(ids.flatten(), positions.flatten(), attend).view(R, S, -1)
        logits = self.model.logits(hidden[torch.arange(R, device=device), last])  # (R, V)
        return yes_against_no(logits, self.yes_no)

    def drop_done_rows(self) -> None:
        """The last rows that go on overwrite the first ones that are done."""
        done = self.rows.done
        device = done.device
        keep = int((~done).sum())
        order = torch.arange(keep, device=device)
        target = torch.nonzero(done[:keep])[:, 0]
        source = torch.nonzero(~done[keep:])[:, 0] + keep
        order[target] = source
        new_index = torch.zeros(len(done), dtype=torch.int64, device=device)
        new_index[order] = torch.arange(keep, device=device)
        self.draws = self.draws.select(~done[self.draws.row])
        self.draws.row = new_index[self.draws.row]
        self.cache.move_rows(source, target)
        self.rows = self.rows.select(order)
        self.longest = int(self.rows.length.max()) if keep else 0


def groups_of(sequences: list[list[int]], tokens: int) -> Iterator[list[list[int]]]:
    """The sequences in order, in groups that reach `tokens` tokens."""
    group = []
    size = 0
    for ids in sequences:
        group.append(ids)
        size += len(ids)
        if size >= tokens:
            yield group
            group = []
            size = 0
    if group:
        yield group
