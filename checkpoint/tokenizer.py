"""tokenizer.json and the chat template: texts to token ids and back.

Texts are of two kinds. A *trusted* text (a chat template, a prompt file, pretraining text) may hold special
tokens, and they are meant as such. The text of a user or a model is *plain*: a special token spelled out in
it ("<|im_end|>") becomes its characters, never the token, so it can neither end a turn nor open one.

Some tokenizers (Llama 2, Mistral 7B) put a mark, "▁", before the first word of a text. What continues a text
does not get it. So a prompt is encoded as one text, and an answer as the continuation of its prompt.
"""
import threading
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer

from checkpoint.folder import find_folder
from checkpoint.template import ChatTemplate, Frame, read_template
from plumbing.errors import BadInput
from plumbing.files import expect, read_json

# what of a checkpoint belongs to its tokenizer; generation_config.json, as it names the ends of an answer
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json")
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
ANCHORS = ("\n", ".", ")", "1", "a")  # texts for a continuation to follow; one of them does not merge with it
PLAIN = -1  # no token's id: what stands before a continuation that follows plain text


@dataclass
class ChatTokenizer:
    """The tokenizer of a checkpoint, with its chat template around one user message."""
    backend: Tokenizer
    template: ChatTemplate | None
    system: str | None                 # the system message of every chat that has no other
    bos: str                           # what the tokenizer itself puts before a text: "<s>", or nothing
    added: dict[int, AddedToken]       # the tokens that are found in a text before it is cut into words
    eos_ids: list[int]                 # every id that ends an answer; the first ends the answers we train on
    vocab_size: int                    # config.json's: the model has no embedding for an id from here on
    marks_texts: bool = False          # whether the first word of a text gets a mark
    marks_sections: bool = False       # whether the first word after a special token gets it too
    prompt_end: int = PLAIN            # the last token of a chat
    frames: dict[str | None, Frame] = field(default_factory=dict)  # by system message
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    # ---------------------------------------------------------------------------- texts to ids

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain text that stands by itself."""
        return self.encoding(text, trusted=False).ids

    def encode_marked(self, text: str) -> list[int]:
        """Token ids of a trusted text that stands by itself."""
        return self.encoding(text, trusted=True).ids

    def chat(self, message: str, system: str | None = None) -> list[int]:
        """Token ids of the template with the user's message, ready for the answer.

        Message and system message (default: the one that the tokenizer was loaded with) are plain.
        """
        if system is None:
            system = self.system
        frame = self.frame(system)
        before = self.with_plain(frame.before, system)
        return self.join([*before, (frame.fit(message), False), (frame.after, True)])

    def conversation(self, pieces: Iterable[tuple[str, bool]]) -> list[int]:
        """Token ids of a prompt that is a whole conversation: no template is put around it.

        pieces: the texts that it consists of, and whether each is trusted (a prompt file) or plain (a case):

            [("<|im_start|>user ", True), ("Is 1 + 1 = 3?", False), ("<|im_end|><|im_start|>judge ", True)]

        They are encoded as one text, so words join across them. Unless a plain piece spells out a special
        token, the ids are those that Transformers gives for the joined text.
        """
        pieces = list(pieces)
        text = "".join(piece for piece, _ in pieces)
        if not text.startswith(self.bos):
            pieces.insert(0, (self.bos, True))
        return self.join(pieces)

    def prompt(self, pieces: list[tuple[str, bool]]) -> list[int]:
        """Token ids of a prompt in pieces, as those of `conversation`, ready for the answer.

        It is a whole conversation if its own words hold special tokens; else it is the message of a chat.
        """
        if any(trusted and self.has_special_tokens(text) for text, trusted in pieces):
            return self.conversation(pieces)
        return self.chat("".join(text for text, _ in pieces).strip())

    def has_special_tokens(self, text: str) -> bool:
        """Whether a trusted text holds special tokens: a prompt file that does is a whole conversation."""
        return bool(self.spelled_tokens(text, self.encoding(text, trusted=True)))

    def continuation(self, before: list[int] | str, text: str) -> list[int]:
        """Token ids of plain `text` that follows `before`: the last ones of the ids of both together.

        before: the ids so far, of prompt and answer or of the answer alone, or the answer's text so far.
                Where it is empty, the text begins the answer to a chat.

        With a tokenizer that marks no beginnings (byte-level BPE: Qwen, Llama 3) they are encode(text).
        """
        if not before:
            return self.section(self.prompt_end, text)
        return self.section(PLAIN if isinstance(before, str) else before[-1], text)

    def response(self, text: str, prompt: list[int] | None = None) -> list[int]:
        """Token ids of an answer to a prompt (default: to a chat), with the end of the turn."""
        return self.continuation(prompt or [], text) + self.eos_ids[:1]

    # ---------------------------------------------------------------------------- ids to texts

    def tokens_within(self, ids: list[int], length: int) -> int:
        """How many of the first tokens lie wholly within the first `length` characters of their text."""
        for n in reversed(range(len(ids) + 1)):
            if len(self.decode(ids[:n])) <= length:
                return n
        return 0

    def decode(self, ids: list[int]) -> str:
        with calling_the_library("tokenizer.json"):
            return self.backend.decode(ids, skip_special_tokens=False)

    # ---------------------------------------------------------------------------- how texts are joined

    def encoding(self, text: str, trusted: bool) -> Encoding:
        with calling_the_library("tokenizer.json"), self.lock:  # a server's requests are made side by side
            self.backend.encode_special_tokens = not trusted
            found = self.backend.encode(text, add_special_tokens=False)
        if found.ids and max(found.ids) >= self.vocab_size:
            raise BadInput(f"tokenizer.json: token {max(found.ids)} in {text[:40]!r} has no row in the "
                           f"model's vocabulary of {self.vocab_size}; "
                           "take tokenizer and config from the same checkpoint")
        return found

    def is_special(self, token: int) -> bool:
        return token in self.added and self.added[token].special

    def spelled_tokens(self, text: str, encoding: Encoding) -> list[tuple[int, int, int]]:
        """(token, start, stop) for each special token that a trusted text spells out.

        An encoding may hold others: "<unk>" stands for what has no token.
        """
        found = []
        for token, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if self.is_special(token):
                word = text[start:stop].strip()  # some tokens take the white space beside them
                if word == self.added[token].content:
                    found.append((token, start, stop))
        return found

    def join(self, pieces: list[tuple[str, bool]]) -> list[int]:
        """Token ids of trusted and plain pieces as one text."""
        text = "".join(piece for piece, _ in pieces)
        whole = self.encoding(text, trusted=True)
        meant = []
        for token, start, stop in self.spelled_tokens(text, whole):
            word = self.added[token].content
            first = text.index(word, start)
            if in_trusted_piece(pieces, first, first + len(word)):
                meant.append((token, start, stop))
        if len(meant) == sum(map(self.is_special, whole.ids)):
            return whole.ids
        # A plain piece spells out a special token: all that stands between those that are meant is plain.
        ids = []
        done = 0
        for token, start, stop in meant:
            ids += self.section(ids[-1] if ids else None, text[done:start])
            ids.append(token)
            done = stop
        return ids + self.section(ids[-1] if ids else None, text[done:])

    def section(self, last: int | None, text: str) -> list[int]:
        """Token ids of plain text that follows the token `last` (None: that begins a text)."""
        if last in self.added and self.added[last].rstrip:  # then white space belongs to that token
            text = text.lstrip()
        begins = last is None or (last in self.added and self.marks_sections)
        return self.encode(text) if begins or not self.marks_texts else self.without_mark(text)

    def without_mark(self, text: str) -> list[int]:
        """Token ids of plain text that follows other plain text."""
        for anchor in ANCHORS:
            head = self.encode(anchor)
            ids = self.encode(anchor + text)
            if head and ids[:len(head)] == head:
                return ids[len(head):]
        return self.encode(text)

    # ---------------------------------------------------------------------------- the chat template

    def frame(self, system: str | None) -> Frame:
        """What the template puts around a message; without a template, a newline stands after it."""
        if system not in self.frames:
            if self.template is not None:
                self.frames[system] = self.template.frame(system)
            elif system is None:
                self.frames[system] = Frame(before=self.bos, after="\n")
            else:
                raise BadInput("the checkpoint has no chat template to show a system message; leave it out")
        return self.frames[system]

    def with_plain(self, before: str, system: str | None) -> list[tuple[str, bool]]:
        """The template's text before the message in pieces: the system message in it is plain."""
        if system is None or not any(map(self.is_special, self.encode_marked(system))):
            return [(before, True)]
        shown = system.strip()
        if before.count(shown) != 1:
            raise BadInput(f"the system message {shown[:40]!r} spells out a special token, and the chat "
                           "template does not show it once as it is; leave that token out")
        start, end = before.split(shown)
        return [(start, True), (shown, False), (end, True)]


def in_trusted_piece(pieces: list[tuple[str, bool]], start: int, stop: int) -> bool:
    """Whether characters start .. stop-1 of the joined pieces lie in one piece, and that is trusted."""
    end = 0
    for piece, trusted in pieces:
        begin = end
        end = begin + len(piece)
        if begin <= start and stop <= end:
            return trusted
    return False


@contextmanager
def calling_the_library(path: Path | str):
    """A tokenizer.json that the tokenizers library cannot use is a BadInput, though it raises or panics.

    Its panics are BaseExceptions.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise BadInput(f"{path}: not a tokenizer that works ({str(error)[:80]}); download it again") from None


# -------------------------------------------------------------------------------- loading

def load_tokenizer(folder: str | Path, system: str | None = None,
                   template_args: dict[str, Any] | None = None) -> ChatTokenizer:
    """Read tokenizer.json, tokenizer_config.json, generation_config.json and the chat template of a folder.

    system:        the system message of every chat that has no other; without one, the template decides.
    template_args: further variables of the chat template, such as {"enable_thinking": False}.
    """
    folder = find_folder(folder)
    path = folder / "tokenizer.json"
    config = read_tokenizer_config(folder)
    named = named_tokens(config, folder)
    backend = load_backend(path, named)
    template = read_template(folder, config, named | (template_args or {}))
    eos_ids = read_eos_ids(folder, backend, named.get("eos_token"))
    tokenizer = ChatTokenizer(
        backend=backend, template=template, system=system, bos=text_start(backend), added={},
        eos_ids=eos_ids, vocab_size=read_vocab_size(folder, eos_ids))
    frame = tokenizer.frame(system)
    add_turn_end(tokenizer, frame.turn_end)
    mark_special(backend, tokenizer.eos_ids, frame.before + frame.after)
    tokenizer.added = backend.get_added_tokens_decoder()
    find_marks(tokenizer)
    tokenizer.prompt_end = (tokenizer.chat("a") or [PLAIN])[-1]
    return tokenizer


def load_backend(path: Path, named: dict[str, str]) -> Tokenizer:
    """The library's tokenizer. It neither cuts nor pads, and takes the named tokens for special ones."""
    if not path.is_file():
        raise BadInput(f"{path}: no such file; the checkpoint needs its tokenizer.json")
    with calling_the_library(path):
        backend = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        backend.no_truncation()
        backend.no_padding()
        known = {token.content for token in backend.get_added_tokens_decoder().values()}
        for text in named.values():
            if text not in known and backend.token_to_id(text) is not None:
                backend.add_special_tokens([AddedToken(text, normalized=False, special=True)])
    return backend


def read_tokenizer_config(folder: Path) -> dict:
    """tokenizer_config.json, and what older checkpoints have in special_tokens_map.json alone."""
    config = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            config |= expect(read_json(folder / name), dict, str(folder / name))
    return config


def named_tokens(config: dict, folder: Path) -> dict[str, str]:
    """The texts of the tokens that tokenizer_config.json gives a name: {"eos_token": "<|im_end|>"}."""
    found = {}
    for name in NAMED_TOKENS:
        token = config.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if token:
            found[name] = expect(token, str, f"{folder / 'tokenizer_config.json'}: field '{name}'")
    return found


def text_start(backend: Tokenizer) -> str:
    """What the tokenizer puts before a text by itself: "<s>", or nothing."""
    with calling_the_library("tokenizer.json"):
        found = backend.encode("a", add_special_tokens=True)
    start = ""
    for token, is_added in zip(found.tokens, found.special_tokens_mask, strict=True):
        if not is_added:
            break
        start += token
    return start


def read_eos_ids(folder: Path, backend: Tokenizer, eos_token: str | None) -> list[int]:
    """The ends of an answer: the tokenizer's own, then those of generation_config.json and config.json."""
    ids = []
    where = f"{folder / 'tokenizer_config.json'}: field 'eos_token'"
    if eos_token is not None:
        ids.append(backend.token_to_id(eos_token))
        if ids[0] is None:
            raise BadInput(f"{where}: {eos_token[:40]!r} is no token of tokenizer.json; "
                           "take both from the same checkpoint")
    added = backend.get_added_tokens_decoder()
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.is_file():
            value = expect(read_json(path), dict, str(path)).get("eos_token_id")
            for token in value if isinstance(value, list) else [value]:
                if token is not None:
                    ids.append(known_end(token, added, backend, f"{path}: field 'eos_token_id'"))
    if not ids:
        raise BadInput(f"{where} is missing, and no file has 'eos_token_id'; add one")
    return list(dict.fromkeys(ids))


def known_end(token: int, added: dict[int, AddedToken], backend: Tokenizer, where: str) -> int:
    """An id that ends answers. In another model's tokenizer it may be a word: they would end anywhere."""
    if expect(token, int, where) not in added:
        text = backend.id_to_token(token) if 0 <= token < 2 ** 32 else None
        raise BadInput(f"{where}: {token} is {'no token' if text is None else f'the word {text[:20]!r}'} of "
                       "tokenizer.json, and ends no answer; take both from the same checkpoint")
    return token


def add_turn_end(tokenizer: ChatTokenizer, turn_end: str) -> None:
    """Let the token that the template puts after an answer end one too.

    Base models' files name "<|endoftext|>" alone, and a model trained on the template ends with another.
    """
    for i, token in tokenizer.backend.get_added_tokens_decoder().items():
        is_first = bool(token.content.strip()) and turn_end.lstrip().startswith(token.content)
        if is_first and i not in tokenizer.eos_ids and i < tokenizer.vocab_size:
            tokenizer.eos_ids.append(i)


def read_vocab_size(folder: Path, eos_ids: list[int]) -> int:
    """The vocabulary of config.json's model (without one: any), which must hold the ends."""
    path = folder / "config.json"
    size = expect(read_json(path), dict, str(path)).get("vocab_size") if path.is_file() else None
    size = 2 ** 63 if size is None else expect(size, int, f"{path}: field 'vocab_size'")
    if not all(0 <= i < size for i in eos_ids):
        raise BadInput(f"{path}: field 'eos_token_id': {str(eos_ids)[:60]} are not all in the vocabulary "
                       f"of {size}; correct it")
    return size


def mark_special(backend: Tokenizer, eos_ids: list[int], template: str) -> None:
    """Have the ends, and the added tokens that the template shows, count as special.

    In some files they do not, and then the library would find them in plain text too.
    """
    with calling_the_library("tokenizer.json"):
        for i, token in backend.get_added_tokens_decoder().items():
            is_shown = bool(token.content.strip()) and token.content in template
            if not token.special and (i in eos_ids or is_shown):
                backend.add_special_tokens([AddedToken(
                    token.content, single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip,
                    normalized=token.normalized, special=True)])


def find_marks(tokenizer: ChatTokenizer) -> None:
    """Find out which first words the tokenizer marks: of a text, and of a text after a special token."""
    word = "A"
    by_itself = tokenizer.encode(word)
    tokenizer.marks_texts = by_itself != tokenizer.without_mark(word)
    end = tokenizer.added[tokenizer.eos_ids[0]].content
    tokenizer.marks_sections = tokenizer.encode_marked(end + word)[1:] == by_itself
