"""The sampling engine: prompts as token ids in, K continuations of each out, with P(Yes) at every position.

It knows token ids only, never text. Keys and values are held in three parts, and decoding is one attention over them:

    root   the prefix that all prompts share (the instructions), once          read by all rows in one product
    part   the rest of each prompt (problem and steps), once per prompt        read by the prompt's rows in one product
    tail   what each row has sampled so far                                    read by the row alone

The K continuations of a prompt grow as a tree, too: those that have sampled the same tokens so far are one *row*, which is
computed once. Each of them draws its own next token, and where they differ the row branches. A model that is sure
of its words, as one is that was trained to judge, has far fewer rows than continuations.

Rows that end leave the batch and waiting prompts take their room. What a continuation samples depends on its own seed and
prompt only: it draws its t-th token with uniform(seed, t), whatever else is in the batch.

On a GPU the pass of a step is recorded once and replayed (`CudaGraph`): its thousands of small kernels then cost one launch. As
nothing in a recording can move or change its shape, each continuation is a row of its own from the start, the tails are read in
steps of WINDOW tokens, and rows that have ended stay, without effect, until so many have that a new recording is worth it.
"""
import math
from collections import deque
from dataclasses import dataclass
from typing import Callable, Iterable, Iterator, NamedTuple

import numpy as np
import torch

from plumbing.errors import BadInput
from model import Decoder, Tree, at_least_fp32, common_prefix, tree_attention

PREFILL_TOKENS = 4096    # prompts are prefilled in groups of about so many tokens
WINDOW = 64              # tails have room for so many tokens at first; on a GPU, as many more are read at a time
CANDIDATES = (64, 1024)  # top-p looks for the nucleus among so many tokens first, then among all


class Request(NamedTuple):
    ids: list[int]    # the prompt
    seeds: list[int]  # one 64-bit number per continuation: there are len(seeds) = K of them


@dataclass
class Continuation:
    ids: list[int]      # the sampled tokens, the end-of-text token not among them
    p_yes: list[float]  # p_yes[t] = P(Yes) / (P(Yes) + P(No)) where token t was sampled
    finished: bool      # ended by itself; False: cut off at max_new_tokens
    read: float | None = None  # P(Yes) after the words that `run` was told to add, None where there were none


def uniform(seeds: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """One number in [0, 1) per row from (seed, position): splitmix64 as a counter-based generator. int64 (R,) -> fp32 (R,)."""
    def shift(x, n):  # a logical shift; >> keeps the sign
        return (x >> n) & ((1 << (64 - n)) - 1)
    x = seeds + t * -7046029254386353131
    x = (x ^ shift(x, 30)) * -4658895280553007687
    x = (x ^ shift(x, 27)) * -7723592293110705685
    return shift(x ^ shift(x, 31), 40).float() * 2.0 ** -24


def sample(logits: torch.Tensor, row: torch.Tensor, u: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Draw S tokens, each from the distribution of a row, by inverting the nucleus's distribution function at u. Uses logits up.

    logits (R, V); row (S,) int64, whose distribution each draw is from; u (S,) in [0, 1) -> tokens (S,) int64

    The nucleus is the smallest set of most likely tokens whose probability reaches top_p. It is sorted only as far as
    needed to find the token at u, which is mostly among the first few.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)[row]
    p = torch.softmax(logits.div_(temperature), dim=-1, out=logits)  # in place: at this size, fresh memory costs more than the sums
    token = torch.empty_like(row)
    draws = torch.arange(len(row), device=row.device)  # those still without a token
    for width in CANDIDATES + (p.shape[1],):
        top, ids = p.topk(min(width, p.shape[1]), dim=-1)  # (R, width), most likely first
        place, sure = _invert(top, row, u, top_p, whole=width >= p.shape[1])
        token[draws] = ids[row, place]
        unsure = torch.nonzero(~sure)[:, 0]
        if not len(unsure):
            return token
        draws, u = draws[unsure], u[unsure]
        rows, row = row[unsure].unique(return_inverse=True)
        p = p[rows]


def _invert(p: torch.Tensor, row: torch.Tensor, u: torch.Tensor, top_p: float, whole: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the cumulative probability of its row passes u times the nucleus's.

    p (R, N) most likely first, row (S,), u (S,) -> places (S,), whether they are sure (S,). Where these N tokens (the `whole`
    vocabulary, or its head) stop short of top_p, the nucleus's probability is known to lie between top_p and top_p + the least
    of them; the place is sure if it is the same for both.
    """
    cumulative = p.cumsum(dim=-1)
    nucleus = (cumulative - p < top_p).sum(dim=-1, keepdim=True)  # a token is in while those before it do not reach top_p
    least = most = cumulative.gather(1, nucleus - 1)  # (R, 1)
    if not whole:
        short = least < top_p
        least, most = torch.where(short, top_p, least), torch.where(short, top_p + p[:, -1:], most)
    cumulative = cumulative[row]  # (S, N)
    place, latest = (torch.searchsorted(cumulative, u[:, None] * mass[row], right=True) for mass in (least, most))
    sure = (place == latest) & (place < p.shape[1])
    return torch.minimum(place, nucleus[row] - 1)[:, 0], sure[:, 0] | whole  # rounding must not step out of the nucleus


LOG2_E = math.log2(math.e)  # softmaxes written out here count in powers of two: on CPU, exp2 takes a third of the time of exp


def attend_part(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None):
    """Attention over one part of the keys: q (..., N, D) scaled by D^-0.5 and log2 e, k and v (..., L, D) -> out (..., N, D), and
    log sum exp of the scores (..., N). mask: 0 or -inf, added to the scores."""
    scores = at_least_fp32(q @ k.transpose(-1, -2))  # (..., N, L)
    if mask is not None:
        scores += mask
    highest = scores.amax(dim=-1, keepdim=True)
    total = scores.sub_(highest).exp2_().sum(dim=-1, keepdim=True)
    return (scores.to(v.dtype) @ v) / total, (highest + total.log2()).squeeze(-1) / LOG2_E


def attend_shared(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None):
    """attend_part for many queries of the same keys, (B, KV, N, D) and (B, KV, L, D), mask (B, 1, 1, L): on CPU, PyTorch's blocked
    kernel has no scores to write down (and is slower for few queries, which leave its blocks of 32 empty)."""
    if q.device.type != "cpu" or q.shape[2] < 16:
        return attend_part(q, k, v, mask)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=1 / LOG2_E)


def _finite(logits: torch.Tensor) -> torch.Tensor:
    """The logits after a prompt; broken weights show here, and not as an index error in the sampling."""
    if not bool(logits.isfinite().all()):
        raise BadInput("--model: its logits are not finite; the weights or the sizes in config.json are broken: take another checkpoint")
    return logits


class CudaGraph:
    """A function without arguments that reads and writes tensors on the GPU: run once, then recorded, then replayed.

    A replay does what was recorded, at the same places in memory: whatever changes from call to call must be changed in place, in
    tensors; Python's own numbers stay as they were. The tensor that it returns is overwritten by the next call.
    """

    def __init__(self, work: Callable[[], torch.Tensor]):
        self.work, self.warm, self.graph = work, False, None

    def __call__(self) -> torch.Tensor:
        if not self.warm:  # libraries load their kernels at the first call, which cannot be recorded
            self.warm = True
            return self.work()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.out = self.work()
        self.graph.replay()
        return self.out


class _Prompt(NamedTuple):
    """A prefilled prompt that waits for room."""
    index: int
    request: Request
    group: torch.Tensor   # keys and values of all that was prefilled with it, (2, layers, KV, T, D)
    path: torch.Tensor    # the places of this prompt's own tokens in it
    logits: torch.Tensor  # (V,) of the first new token


class _Seat(NamedTuple):
    """A prompt whose continuations are being decoded."""
    index: int                               # of the request
    continuations: list[Continuation | None]  # by sample number, None = not ended yet
    length: int                              # of its part


class _Shelf:
    """The parts of prompts of about the same length, side by side, so that one product reads them all."""

    def __init__(self, like: torch.Tensor, length: int):
        """like: keys and values (2, layers, KV, n, D), of any length n."""
        two, layers, KV, _, D = like.shape
        self.parts = like.new_zeros(two, layers, 0, KV, length, D)
        self.seats: list[_Seat] = []

    def add(self, seat: _Seat, part: torch.Tensor) -> None:
        self.parts = _grown(self.parts, 2, len(self.seats) + 1)
        self.parts[:, :, len(self.seats), :, :seat.length] = part
        self.seats.append(seat)

    def remove(self, seat: _Seat) -> None:
        """The last part takes the place that becomes free."""
        place, last = self.seats.index(seat), self.seats.pop()
        if place < len(self.seats):
            self.parts[:, :, place] = self.parts[:, :, len(self.seats)]
            self.seats[place] = last

    def mask(self) -> torch.Tensor:
        """(P, 1, 1, length): 0 where a part has a key, -inf behind its end."""
        lengths = torch.tensor([seat.length for seat in self.seats], device=self.parts.device)
        unseen = torch.arange(self.parts.shape[4], device=self.parts.device) >= lengths[:, None]
        return torch.zeros(unseen.shape, dtype=self.parts.dtype, device=unseen.device).masked_fill_(unseen, -torch.inf)[:, None, None]


def shelf_length(n: int) -> int:
    """The length of the shelf for parts of n tokens: two for each doubling (192, 256, 384, 512, ...), so that shelves are few and filled."""
    step = max(32, 2 ** ((n - 1).bit_length() - 2))
    return -(-n // step) * step


class Engine:
    """Sampling for one model and one set of parameters; `run` may be called again and again.

    max_rows: how many continuations (rows, if all of them differ) are decoded side by side. eos_ids: the tokens that end one.
    yes_no: the two token ids whose probabilities are compared. reserve: positions of the model's context that sampling leaves free.
    The counters say what was computed.
    """

    def __init__(self, model: Decoder, eos_ids: list[int], yes_no: tuple[int, int], temperature: float = 0.95,
                 top_p: float = 0.95, max_new_tokens: int = 4096, max_rows: int = 160, reserve: int = 0):
        self.model, self.max_rows, self.yes_no = model, max_rows, yes_no
        self.temperature, self.top_p, self.max_new_tokens = temperature, top_p, max_new_tokens
        self.context = model.config.max_position_embeddings - reserve
        self.eos = torch.tensor(eos_ids, dtype=torch.int64, device=model.device)
        self.recorded = CudaGraph if model.device.type == "cuda" else None  # what makes a step's pass a recording
        self.prompt_tokens = 0   # the prompts' lengths, summed
        self.prefill_tokens = 0  # those of them that were computed
        self.sampled = torch.zeros((), dtype=torch.int64, device=model.device)
        self._reset()

    @property
    def new_tokens(self) -> int:
        """Sampled tokens (counted on the device, so that no step waits for the sum)."""
        return int(self.sampled)

    def run(self, requests: Iterable[Request | None],
            added: Callable[[list[int]], list[int]] = lambda ids: []) -> Iterator[tuple[int, list[Continuation]]]:
        """(index of the request, its K continuations), each as soon as its last row ends: not in order.

        added(the tokens of a continuation that has ended) -> the tokens of words to put after it, or []: the row stays until they
        have passed the model, and P(Yes) is read behind them. At most `reserve` - 1 of them.

        Where `requests` gives None, it has nothing at present and is asked again after the next step; with nothing
        being decoded, None is the end.
        """
        self._reset()
        self.added = added
        waiting = iter(requests)
        while True:
            while self.ready or self._prefill(waiting):
                if self.rows and len(self.seed) + len(self.ready[0].request.seeds) > self.max_rows:
                    break
                self._seat(self.ready.popleft())
            if not self.rows:
                return
            if self._many_are_done():
                yield from self._retire()
            else:
                self._step()

    def _reset(self) -> None:
        c = self.model.config
        weight = self.model.embed.weight
        long = {"dtype": torch.int64, "device": weight.device}
        self.ready: deque[_Prompt] = deque()
        self.root_ids: np.ndarray | None = None
        self.root = weight.new_zeros(2, c.num_hidden_layers, c.num_key_value_heads, 0, c.head_dim)
        self.shelves: dict[int, _Shelf] = {}  # by the length of the parts on it
        self.seats: dict[int, _Seat] = {}     # by the index of the request
        self.tail = weight.new_zeros(2, c.num_hidden_layers, 0, c.num_key_value_heads, 0, c.head_dim)
        self.tokens = torch.zeros(0, 0, **long)     # (R, longest), what the rows have sampled
        self.p_yes = torch.zeros(0, 0, device=weight.device)
        # per continuation: its row, seed, and sample number
        self.row, self.seed, self.number = (torch.zeros(0, **long) for _ in range(3))
        # per row: its request, prompt length, tokens after it, and the most it may have
        self.request, self.start, self.length, self.limit = (torch.zeros(0, **long) for _ in range(4))
        self.given = torch.zeros(0, **long)  # per row: 0, or where its added words end: tokens before that are not sampled
        self.done = torch.zeros(0, dtype=torch.bool, device=weight.device)
        self.pending: dict[tuple[int, int], Continuation] = {}  # (request, number) -> one that has ended, while its added words are read
        self.rows = self.longest = self.requests = 0  # R, the length of the longest row, requests read so far
        self.window = 0  # tokens of the tails that a step reads; 0: to be set anew, since something has moved or changed its shape

    # ------------------------------------------------------------------------------------------ prompts

    @torch.no_grad()
    def _prefill(self, waiting: Iterator[Request | None]) -> bool:
        """Compute the next group of prompts as one tree below the root. False when none is waiting."""
        group, size = [], 0
        while size < PREFILL_TOKENS and len(group) < self.max_rows and (request := next(waiting, None)) is not None:
            group.append((self.requests, request, np.asarray(request.ids, dtype=np.int64)))
            self.requests += 1
            size += max(1, len(request.ids) - (0 if self.root_ids is None else len(self.root_ids)))
        if not group:
            return False
        self._fit_root([ids for _, _, ids in group])
        shared = len(self.root_ids)
        tree = Tree([request.ids[shared:] for _, request, _ in group]).to(self.model.device)
        hidden, cache = self._forward_tree(tree, shared)
        paths = [torch.from_numpy(path).to(self.model.device) for path in tree.paths]
        logits = _finite(self.model.logits(hidden))  # (prompts, V)
        self.ready.extend(_Prompt(index, request, cache, path, row)
                          for (index, request, _), path, row in zip(group, paths, logits))
        self.prompt_tokens += sum(len(ids) for _, _, ids in group)
        self.prefill_tokens += len(tree)
        return True

    def _forward_tree(self, tree: Tree, past: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states of the sequences' last tokens (S, C), and keys and values of all (2, layers, KV, T, D), of a tree below the root's
        first `past` tokens (all or none)."""
        last = torch.tensor([path[-1] for path in tree.paths], device=self.model.device)
        attention = tree_attention(tree.end, past)
        cache = self.root.new_empty(*self.root.shape[:3], len(tree), self.root.shape[4])

        def attend(layer, q, k, v):
            cache[0, layer], cache[1, layer] = k.transpose(0, 1), v.transpose(0, 1)
            return attention(layer, q, k, v, past=(self.root[0, layer], self.root[1, layer]) if past else None)
        return self.model(tree.ids, tree.positions + past, attend, last), cache

    def _fit_root(self, prompts: list[np.ndarray]) -> None:
        """Make the root a prefix of these prompts too (and leave each at least one token of its own).

        The first group decides; if a later prompt shares less, the root is cut there, and what is cut off moves in
        front of the parts of the prompts that are being decoded, each of which goes to a longer shelf.
        """
        first = prompts[0] if self.root_ids is None else self.root_ids
        shared = min(min(common_prefix(first, ids), len(ids) - 1) for ids in prompts)
        if self.root_ids is None:
            self.root_ids = first[:shared]
            if shared:
                self.root = self._forward_tree(Tree([list(self.root_ids)]).to(self.model.device), 0)[1]
                self.prefill_tokens += shared
        elif shared < len(self.root_ids):
            cut, shelves = self.root[:, :, :, shared:], self.shelves
            self.root, self.root_ids, self.shelves = self.root[:, :, :, :shared], self.root_ids[:shared], {}
            for shelf in shelves.values():
                for place, seat in enumerate(shelf.seats):
                    self._shelve(seat.index, seat.continuations, torch.cat((cut, shelf.parts[:, :, place, :, :seat.length]), dim=3))
            self.window = 0

    def _shelve(self, index: int, continuations: list[Continuation | None], part: torch.Tensor) -> None:
        """Put the part of a prompt, (2, layers, KV, n, D), on the shelf for its length."""
        seat, length = _Seat(index, continuations, part.shape[3]), shelf_length(part.shape[3])
        if length not in self.shelves:
            self.shelves[length] = _Shelf(part, length)
        self.shelves[length].add(seat, part)
        self.seats[index] = seat

    @torch.no_grad()
    def _seat(self, prompt: _Prompt) -> None:
        """Give a prefilled prompt a place on a shelf and its K continuations a row (on a GPU, K rows), and draw their first tokens."""
        R, K, length = self.rows, len(prompt.request.seeds), len(prompt.request.ids)
        new = K if self.recorded else 1
        self._shelve(prompt.index, [None] * K, prompt.group[:, :, :, prompt.path])
        self._make_room(R + new)

        def extend(column, values, n):
            return torch.cat((column, torch.as_tensor(values, dtype=column.dtype, device=column.device).expand(n)))
        self.row = extend(self.row, [R + k % new for k in range(K)], K)
        self.seed, self.number = extend(self.seed, prompt.request.seeds, K), extend(self.number, range(K), K)
        self.request, self.start = extend(self.request, prompt.index, new), extend(self.start, length, new)
        self.length, self.given, self.done = extend(self.length, 0, new), extend(self.given, 0, new), extend(self.done, False, new)
        self.limit = extend(self.limit, min(self.max_new_tokens, self.context - length), new)
        self.rows, self.longest = R + new, max(self.longest, 1)
        self._append(slice(R, R + new), slice(len(self.seed) - K, len(self.seed)), prompt.logits.repeat(new, 1))
        self.window = 0

    def _make_room(self, rows: int) -> None:
        self.tail = _grown(self.tail, 2, rows)
        self.tokens, self.p_yes = _grown(self.tokens, 0, rows), _grown(self.p_yes, 0, rows)

    @torch.no_grad()
    def read_p_yes(self, sequences: list[list[int]]) -> list[float]:
        """P(Yes) / (P(Yes) + P(No)) for the token after each sequence; one pass per group of about PREFILL_TOKENS tokens."""
        root = [] if self.root_ids is None else self.root_ids.tolist()
        shared = len(root) if all(len(s) > len(root) and s[:len(root)] == root for s in sequences) else 0
        found, group, size = [], [], 0
        for i, ids in enumerate(sequences):
            group.append(ids[shared:])
            size += len(group[-1])
            if size >= PREFILL_TOKENS or i == len(sequences) - 1:
                tree = Tree(group).to(self.model.device)
                hidden, _ = self._forward_tree(tree, shared)
                found += self._yes_against_no(_finite(at_least_fp32(self.model.logits(hidden)))).tolist()
                group, size = [], 0
        return found

    def _yes_against_no(self, logits: torch.Tensor) -> torch.Tensor:
        """A softmax over the logits of Yes and No alone: (N, V) -> P(Yes), (N,)."""
        yes, no = self.yes_no
        return torch.sigmoid(logits[:, yes] - logits[:, no])

    # ------------------------------------------------------------------------------------------ rows

    @torch.no_grad()
    def _step(self) -> None:
        """One more token for every row that is not done."""
        if not self.window:
            self._regroup()
        window = -(-self.longest // WINDOW) * WINDOW if self.recorded else self.longest
        if window != self.window:
            self.window = window
            self.tail = _grown(self.tail, 4, max(window, min(WINDOW, self.max_new_tokens)))
            self.tokens, self.p_yes = _grown(self.tokens, 1, window + 1), _grown(self.p_yes, 1, window + 1)
            self.decode = self.recorded(self._decode) if self.recorded else self._decode
        self.longest += 1
        self._append(slice(0, self.rows), slice(0, len(self.seed)), self.decode())

    def _decode(self) -> torch.Tensor:
        """The logits after every row's last token (R, V), whose keys and values go into the tails.

        What differs between two steps of the same window is all in tensors: self.length, self.tokens, self.tail.
        """
        rows, last = torch.arange(self.rows, device=self.model.device), self.length - 1
        window = torch.arange(self.window, device=self.model.device)
        unseen = torch.where(window <= last[:, None], 0.0, -torch.inf)[:, None, None]  # (R, 1, 1, window)

        def attend(layer, q, k, v):
            self.tail[0, layer, rows, :, last], self.tail[1, layer, rows, :, last] = k, v
            return self._attend(layer, q, unseen)
        return self.model.logits(self.model(self.tokens[rows, last], self.start + last, attend))

    def _attend(self, layer: int, q: torch.Tensor, unseen: torch.Tensor) -> torch.Tensor:
        """The rows' queries over root, part and tail, merged exactly. q (R, H, D) -> (R, H, D)."""
        R, KV, D = self.rows, self.tail.shape[3], self.tail.shape[5]
        q = (q * (D ** -0.5 * LOG2_E)).view(R, KV, -1, D)  # (R, KV, G, D): G queries share a key/value head
        G = q.shape[2]
        found = [attend_part(q, self.tail[0, layer, :R, :, :self.window], self.tail[1, layer, :R, :, :self.window], unseen)]
        # the rows of one prompt side by side: (P, KV, places, G, D), places that stay empty hold whatever they held
        self.grid[self.slot, :, self.place] = q
        grid, pieces, first = self.grid.flatten(2, 3), [], 0  # (P, KV, places * G, D)
        for parts, mask in self.shelved:
            n = len(mask)
            pieces.append(attend_shared(grid[first:first + n], parts[0, layer, :n], parts[1, layer, :n], mask))
            first += n
        out, lse = (torch.cat(both).view(*self.grid.shape[:4], -1)[self.slot, :, self.place] for both in zip(*pieces))
        found.append((out, lse.squeeze(-1)))  # (R, KV, G, D), (R, KV, G)
        if self.root.shape[3]:  # all rows at once: (1, KV, R * G, D)
            out, lse = attend_shared(q.transpose(0, 1).reshape(1, KV, R * G, D), self.root[:1, layer], self.root[1:, layer])
            found.append((out.view(KV, R, G, D).transpose(0, 1), lse.view(KV, R, G).transpose(0, 1)))
        # each part's share of the whole softmax
        weights = torch.stack([lse for _, lse in found]).softmax(dim=0).unsqueeze(-1)
        merged = weights[0] * found[0][0]  # at least fp32
        for weight, (out, _) in zip(weights[1:], found[1:]):
            merged = merged.addcmul_(weight, out)
        return merged.to(q.dtype).reshape(R, KV * G, D)

    def _append(self, rows: slice, draws: slice, logits: torch.Tensor) -> None:
        """Draw the next token of the continuations `draws`, which are those of `rows`, from the rows' logits (n, V), and write it down,
        with P(Yes) at its position.

        A row that is done stays as it is: what is drawn for it stands behind its end.
        """
        logits = at_least_fp32(logits)
        at, live = self.length[rows], ~self.done[rows]
        p_yes = self._yes_against_no(logits)
        self.tokens, self.p_yes = _grown(self.tokens, 1, self.longest), _grown(self.p_yes, 1, self.longest)
        self.p_yes[torch.arange(rows.start, rows.stop, device=at.device), at] = p_yes
        row = self.row[draws]
        place = self.length[row]
        token = sample(logits, row - rows.start, uniform(self.seed[draws], place), self.temperature, self.top_p)
        given = self.given[row] > 0
        token = torch.where(given, self.tokens[row, place], token)
        self.sampled += (~self.done[row] & ~given).sum()
        if not self.recorded:
            row = self._branch(draws, token)
            rows, at, live = slice(rows.start, self.rows), self.length[rows.start:], ~self.done[rows.start:]
        self.tokens[row, place] = token
        last = self.tokens[torch.arange(rows.start, rows.stop, device=at.device), at]
        ends = torch.isin(last, self.eos) & (self.given[rows] == 0)
        self.length[rows] += live
        self.done[rows] |= ends | (self.length[rows] >= self.limit[rows])

    def _branch(self, draws: slice, token: torch.Tensor) -> torch.Tensor:
        """Where continuations of one row have drawn different tokens, all but the first go on in new rows, copies of theirs so far.

        -> the row of each continuation of `draws` from now on.
        """
        row = self.row[draws]
        V = self.model.config.vocab_size
        pairs, which = torch.unique(row * V + token, return_inverse=True)  # sorted: those of a row side by side
        goes_on = pairs // V
        again = torch.zeros(len(pairs), dtype=torch.bool)
        again[1:] = goes_on[1:] == goes_on[:-1]  # not the first of its row
        parents = goes_on[again]
        if not len(parents):
            return row
        new = slice(self.rows, self.rows + len(parents))
        self._make_room(new.stop)
        window = self.longest  # of the tails and tokens that any row has
        self.tail[:, :, new, :, :window] = self.tail[:, :, :, :, :window].index_select(2, parents)
        self.tokens[new], self.p_yes[new] = self.tokens[parents], self.p_yes[parents]
        for name in ("request", "start", "length", "given", "limit", "done"):
            column = getattr(self, name)
            setattr(self, name, torch.cat((column, column[parents])))
        self.rows = new.stop
        goes_on[again] = torch.arange(new.start, new.stop)
        self.row[draws] = goes_on[which]
        self.window = 0
        return self.row[draws]

    def _many_are_done(self) -> bool:
        """Is it time to take out rows? Recordings last as long as the rows stay the same, and a look at `done` waits for the GPU."""
        if not self.recorded:
            return bool(self.done.any())
        return self.longest % 8 == 0 and int(self.done.sum()) >= max(1, self.rows // 16)

    def _retire(self) -> Iterator[tuple[int, list[Continuation]]]:
        """Take the rows that are done out of the batch, unless words are added to them; yield the requests that are complete with them."""
        mine = torch.nonzero(self.done[self.row])[:, 0]  # the continuations of the rows that are done
        numbers: dict[int, list[int]] = {}               # row -> their sample numbers
        for row, number in zip(self.row[mine].tolist(), self.number[mine].tolist()):
            numbers.setdefault(row, []).append(number)
        complete = []
        for row, own in numbers.items():
            seat = self.seats[int(self.request[row])]
            if given := int(self.given[row]):
                ended = self.pending.pop((seat.index, own[0]))
                ended.read = float(self.p_yes[row, given])
            elif self._add(row, ended := self._ended(row)):
                self.pending[seat.index, own[0]] = ended
                continue
            for number in own:
                seat.continuations[number] = ended
            if all(seat.continuations):
                complete.append(seat)
        for seat in complete:
            del self.seats[seat.index]
            self.shelves[shelf_length(seat.length)].remove(seat)
        self._compact_rows()
        self.window = 0
        yield from ((seat.index, seat.continuations) for seat in complete)

    def _ended(self, row: int) -> Continuation:
        n = int(self.length[row])
        ids, p_yes = self.tokens[row, :n].tolist(), self.p_yes[row, :n].tolist()
        finished = ids[-1] in self.eos.tolist()
        return Continuation(ids[:-1] if finished else ids, p_yes, finished)

    def _add(self, row: int, ended: Continuation) -> bool:
        """Put the added words, if any, behind a continuation, in place of its end-of-text token: its row then runs through them."""
        words = self.added(ended.ids)
        if words:
            given = len(ended.ids) + len(words)
            self.tokens, self.p_yes = _grown(self.tokens, 1, given + 1), _grown(self.p_yes, 1, given + 1)
            self.tokens[row, len(ended.ids):given] = torch.tensor(words, device=self.tokens.device)
            self.given[row], self.limit[row], self.done[row] = given, given + 1, False
        return bool(words)

    def _compact_rows(self) -> None:
        """Take out the rows that are done: the last ones move into their places."""
        keep = int((~self.done).sum())
        order = torch.arange(keep, device=self.done.device)
        holes = torch.nonzero(self.done[:keep])[:, 0]
        movers = torch.nonzero(~self.done[keep:])[:, 0] + keep
        order[holes] = movers
        renamed = torch.zeros(len(self.done), dtype=torch.int64, device=self.done.device)
        renamed[order] = torch.arange(keep, device=self.done.device)
        stays = ~self.done[self.row]
        self.row, self.seed, self.number = renamed[self.row[stays]], self.seed[stays], self.number[stays]
        for store, dim in ((self.tail, 2), (self.tokens, 0), (self.p_yes, 0)):
            store.index_copy_(dim, holes, store.index_select(dim, movers))
        for name in ("request", "start", "length", "given", "limit", "done"):
            setattr(self, name, getattr(self, name)[order])
        self.rows = len(order)
        self.longest = int(self.length.max()) if self.rows else 0

    def _regroup(self) -> None:
        """After a change of rows or prompts: the prompts in the order of the shelves, each one's rows side by side in a grid."""
        shelves = [shelf for shelf in self.shelves.values() if shelf.seats]
        self.shelved = [(shelf.parts, shelf.mask()) for shelf in shelves]
        slots = {seat.index: i for i, seat in enumerate(seat for shelf in shelves for seat in shelf.seats)}
        self.slot = torch.tensor([slots[index] for index in self.request.tolist()], device=self.request.device)
        order = self.slot.argsort(stable=True)
        counts = torch.bincount(self.slot, minlength=len(slots))
        self.place = torch.empty_like(order)  # of a row among those of its prompt
        self.place[order] = torch.arange(self.rows, device=order.device) - (counts.cumsum(0) - counts)[self.slot[order]]
        c = self.model.config
        self.grid = self.tail.new_zeros(len(slots), c.num_key_value_heads, int(counts.max()),
                                        c.num_attention_heads // c.num_key_value_heads, c.head_dim)


def _grown(store: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """`store` with room for `size` along `dim`: a quarter more when it must grow, so that growth is rare; new room is 0."""
    if store.shape[dim] >= size:
        return store
    old, shape = store.shape[dim], list(store.shape)
    shape[dim] = max(size, old + old // 4)
    grown = store.new_empty(shape)
    grown.narrow(dim, 0, old).copy_(store)
    grown.narrow(dim, old, shape[dim] - old).zero_()
    return grown
