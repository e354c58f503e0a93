"""A file of training examples: read, checked and tokenised on demand.

Here stands what real files need: rows that are over-long or teach nothing are left out and named, prompts may
be whole conversations, and plain texts are trained on at every token.
"""
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import TOKENIZER_FILES, ChatTokenizer
from formats.containers import STANDARD_INPUT, read_rows
from formats.turns import Turn
from model import Decoder
from plumbing import ranks
from plumbing.errors import BadInput
from plumbing.files import content_hash, files_in
from plumbing.table import StoredTable
from rprm import Prompt

Unit = tuple[list[int], list[list[int]]]  # an example: the ids of its prompt, and of each of its responses
MARGIN = 64  # tokens; see `most_tokens`
OVER_LONG = "as over-long"
EQUAL = "as pairs of equal responses"
NOTHING = "as texts of one token"


class Examples:
    """A file of training examples, tokenised on demand.

        train = Examples("sft.jsonl", read_example, tokenizer, micro_tokens=8192, context=4096)
        train.kept          # [0, 1, 3, ...]: the numbers of the examples that can be trained on
        train[3]            # (prompt ids, [response ids, ...]): one response, or chosen and rejected
        train.units([3, 0]) # {3: train[3], 0: train[0]}, for data.pack

    Every row is checked at the start. BadInput names file, line and field of a row that cannot be read. An
    example that is over-long, or teaches nothing, is left out, named and counted; so every step is dealt
    examples that can be trained on.

    read          makes a Turn of a row (formats/turns.py)
    micro_tokens  the tokens of a tree at most
    context       the tokens of a sequence, prompt and response, at most
    prompt        the words that go with the model. If they are a whole conversation, so are the rows' prompts
                  that were made with them
    """

    def __init__(self, path: str, read: Callable[[dict, str], Turn], tokenizer: ChatTokenizer,
                 micro_tokens: int, context: int, prompt: str | None = None):
        if path == STANDARD_INPUT:
            raise BadInput(f"{path}: training reads its examples more than once; "
                           "give a file, not standard input")
        self.path = Path(path)
        self.rows = read_rows(path)
        self.read = read
        self.tokenizer = tokenizer
        self.micro_tokens = micro_tokens
        self.context = context
        self.template_tokens = len(tokenizer.chat(""))
        self.conversation: Prompt | None = None
        if prompt is not None and tokenizer.has_special_tokens(prompt):
            self.conversation = Prompt(prompt, "the prompt's words")
            self.template_tokens += len(tokenizer.encode_marked(prompt))
        if not len(self.rows):
            raise BadInput(f"{path}: has no examples; make it anew")
        self.kept = self._check()

    @property
    def n_left_out(self) -> int:
        return len(self.rows) - len(self.kept)

    def _check(self) -> np.ndarray:
        """The numbers of the examples that can be trained on, (n,) int64. Prints which others there are."""
        kept = array("q")
        left_out = Counter({OVER_LONG: 0})
        problems = []
        n_systems = 0
        n_conversations = 0
        for i in tqdm(range(len(self.rows)), desc=f"reading {self.path.name}", unit=" examples", delay=5,
                      leave=False, disable=ranks.rank() > 0):
            turn = self.turn(i)
            n_systems += turn.system is not None
            n_conversations += self.pieces(turn) is not None
            reason, problem = self._problem(turn)
            if reason:
                left_out[reason] += 1
                problems.append(f"example {i + 1} {problem}")
            else:
                kept.append(i)
        for problem in problems:
            print(f"left out: {self.path} {problem}")
        counts = ", ".join(f"{reason}: {n:,}" for reason, n in left_out.items())
        print(f"{self.path}: {len(kept):,} examples; left out {counts}")
        if n_systems:
            print(f"{self.path}: {n_systems:,} examples have a system message of their own; "
                  "score with the same one (--system)")
        if self.conversation is not None:
            n_others = len(self.rows) - n_conversations
            print(f"{self.path}: {n_conversations:,} prompts are whole conversations, in the words that go "
                  f"with the model; the chat template is put around the other {n_others:,}")
        if not kept:
            raise BadInput(f"{self.path}: no example can be trained on (left out {counts}: {problems[0]}); "
                           "raise --micro-tokens or --context, or make the file anew")
        return np.array(kept)

    def _problem(self, turn: Turn) -> tuple[str, str]:
        """Why an example is left out: (the reason by which it is counted, the details); else ("", "")."""
        if len(set(turn.responses)) < len(turn.responses):
            return EQUAL, "has the same text as chosen and rejected"
        may_be_one_token = turn.prompt is None and len(turn.responses[0]) <= self.longest_token
        if may_be_one_token and self.encode(turn)[1] == [[]]:
            return NOTHING, "has a text of one token, which nothing stands before to predict"
        if self.most_tokens(turn) <= min(self.micro_tokens, self.context):
            return "", ""
        prompt, responses = self.encode(turn)
        longest = len(prompt) + max(map(len, responses))
        if longest > self.context:
            details = f"has {longest} tokens in a sequence, more than the model's context of {self.context}"
            return OVER_LONG, details
        together = len(prompt) + sum(map(len, responses))
        if together > self.micro_tokens:
            return OVER_LONG, f"has {together} tokens, more than --micro-tokens {self.micro_tokens}"
        return "", ""

    @cached_property
    def longest_token(self) -> int:
        """The characters of the vocabulary's longest token: a longer text has several tokens."""
        return max(map(len, self.tokenizer.backend.get_vocab(with_added_tokens=True)))

    def most_tokens(self, turn: Turn) -> int:
        """An upper bound of an example's tokens, which needs no tokenizer and is a hundred times as fast.

        A token holds at least one byte of the text. Tokenizers bring the text into a Unicode normal form
        first: it leaves an ASCII character as it is, and makes at most 33 bytes of any other. MARGIN is for
        the marks that a tokenizer adds to a text, the ends of responses, and what the template joins to it.
        """
        most = self.template_tokens + MARGIN
        for text in (turn.system or "", turn.prompt or "", *turn.responses):
            n_ascii = len(text.encode("ascii", "ignore"))
            most += n_ascii + 33 * (len(text) - n_ascii)
        return most

    def turn(self, i: int) -> Turn:
        where, row = self.rows[i]
        return self.read(row, where)

    def __getitem__(self, i: int) -> Unit:
        return self.encode(self.turn(i))

    def encode(self, turn: Turn) -> Unit:
        """The ids of the prompt, and of each response with the end of its turn."""
        if turn.prompt is None:
            return self.encode_text(turn.responses[0])
        pieces = self.pieces(turn)
        if pieces is not None:
            prompt = self.tokenizer.conversation(pieces)
        else:
            prompt = self.tokenizer.chat(turn.prompt, turn.system)
        return prompt, [self.tokenizer.response(text, prompt) for text in turn.responses]

    def pieces(self, turn: Turn) -> list[tuple[str, bool]] | None:
        """The pieces of a prompt that is a whole conversation; None for any other."""
        if self.conversation is None or turn.prompt is None or turn.system is not None:
            return None
        return pieces_of(self.conversation, turn.prompt)

    def encode_text(self, text: str) -> Unit:
        """A plain text is all response, but for its first token, which nothing stands before to predict."""
        ids = self.tokenizer.encode_marked(text)
        if not ids or ids[-1] not in self.tokenizer.eos_ids:
            ids += self.tokenizer.eos_ids[:1]
        return ids[:1], [ids[1:]]

    def units(self, numbers: Iterable[int]) -> dict[int, Unit]:
        """The examples with these numbers."""
        return {i: self[i] for i in numbers}

    def in_file_order(self, size: int) -> Iterator[list[int]]:
        """The numbers of all kept examples, `size` at a time."""
        for first in range(0, len(self.kept), size):
            yield self.kept[first:first + size].tolist()


def pieces_of(words: Prompt, message: str) -> list[tuple[str, bool]] | None:
    """The pieces (Prompt.fill_pieces) of which `fill` has made a message; None if it was not made with these
    words.
    """
    own = words.pieces[::2]
    pattern = "(.*?)".join(map(re.escape, [own[0].lstrip(), *own[1:-1], own[-1].rstrip()]))
    match = re.fullmatch(pattern, message, re.DOTALL)
    if match is None:
        return None
    found = []
    for text, value in zip(own, match.groups()):
        found.append((text, True))
        found.append((value, False))
    return [*found, (own[-1], True)]


def read_examples(train: str, validation: str | None, read: Callable[[dict, str], Turn],
                  tokenizer: ChatTokenizer, micro_tokens: int, context: int,
                  prompt: str | None = None) -> tuple[Examples, Examples | None]:
    """The examples of --train and of --validation.

    The second are None without it, and if the file is empty, as it is of few problems.
    """
    found = Examples(train, read, tokenizer, micro_tokens, context, prompt)
    if validation is None:
        return found, None
    if Path(validation).is_file() and Path(validation).stat().st_size == 0:
        print(f"{validation}: is empty; training goes on without validation")
        return found, None
    return found, Examples(validation, read, tokenizer, micro_tokens, context, prompt)


def reference_table(model: Decoder, folder: str, adapter: str | None, batch_size: int,
                    flags: tuple[object, ...], pairs: Examples) -> StoredTable:
    """The table of the reference's log-probabilities (train_dpo.py), kept beside the pairs.

    It is NAME.reference-HASH.npy beside NAME.jsonl. NaN: not computed yet. inf: a pair that is left out.
    """
    path = None
    if ranks.rank() == 0:
        flags = (*flags, pairs.conversation.text if pairs.conversation else None)
        path = reference_path(folder, adapter, pairs, batch_size, model.embed.weight, flags)
    table = StoredTable(path, len(pairs.rows), columns=2)
    is_kept = np.isin(np.arange(len(pairs.rows)), pairs.kept)
    table.rows[~is_kept] = np.inf
    return table


def reference_path(folder: str, adapter: str | None, pairs: Examples, batch_size: int, weight: Tensor,
                   flags: tuple[object, ...]) -> Path:
    """Where the table is kept.

    The hash in its name is of all that the table depends on: the pairs, the model, its adapters, the
    tokenizer, the chat template, and what shares a tree (the last digits of a log-probability depend on the
    rest of its tree).

    weight: one of the model's, which tells the device and the type of all
    flags:  what was said of the model and its tokenizer beside their files
    """
    words = f"{pairs.micro_tokens} {batch_size} {weight.device.type}"
    if weight.dtype != torch.float32:  # those of a model with adapters, on a GPU
        words += f" {weight.dtype}"
    words += f" {flags}"
    weights = sorted(Path(folder).glob("*.safetensors"))
    names = [name for name in ("config.json", *TOKENIZER_FILES) if (Path(folder) / name).is_file()]
    others = [Path(folder) / name for name in names]
    of_adapter = files_in(adapter) if adapter else []
    paths = [*files_in(pairs.path), *weights, *others, *of_adapter]
    name = content_hash(words, paths)
    return pairs.path.with_name(f"{pairs.path.stem}.reference-{name}.npy")
