"""tokenizer.json and the chat template: texts to token ids and back."""
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from checkpoint.template import render
from plumbing.errors import BadInput
from plumbing.files import expect, read_json

# what of a checkpoint belongs to its tokenizer; generation_config.json, as it names the ends of an answer
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json")


@dataclass
class ChatTokenizer:
    """tokenizer.json with the checkpoint's chat template around one user message.

    A text from a user or a model is tokenised as text: a special token spelled out in it ("<|im_end|>")
    becomes the characters, never the token, so it can neither end a turn nor open one.
    """
    backend: Tokenizer
    before: list[int]  # the template's tokens before the user's message, up to the last special one
    lead: str          # its plain text from there to the message, tokenised with it: "[INST] " and a word join
    trail: str         # its plain text after the message, up to the next special token
    after: list[int]   # and the rest, up to where the answer begins
    eos_ids: list[int]  # every id that ends an answer; the first one ends the answers we train on
    vocab_size: int    # config.json's: the model has no embedding for an id from here on

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text."""
        with _calling_the_library("tokenizer.json"):
            ids = self.backend.encode(text, add_special_tokens=False).ids
        if ids and max(ids) >= self.vocab_size:
            raise BadInput(f"tokenizer.json: token {max(ids)} in {text[:40]!r} has no row in the model's vocabulary of {self.vocab_size}; "
                           f"take tokenizer and config from the same checkpoint")
        return ids

    def encode_marked(self, text: str) -> list[int]:
        """Token ids of a trusted text in which special tokens are meant as such (templates, pretraining text)."""
        self.backend.encode_special_tokens = False
        ids = self.encode(text)
        self.backend.encode_special_tokens = True
        return ids

    def chat(self, message: str) -> list[int]:
        """Token ids of the template with the user's message, ready for the answer."""
        return self.before + self.encode(self.lead + message + self.trail) + self.after

    def response(self, text: str) -> list[int]:
        """Token ids of an answer, with the end of the turn."""
        return self.encode(text) + self.eos_ids[:1]

    def decode(self, ids: list[int]) -> str:
        with _calling_the_library("tokenizer.json"):
            return self.backend.decode(ids, skip_special_tokens=False)


@contextmanager
def _calling_the_library(path: Path | str):
    """A tokenizer.json that the tokenizers library cannot use is a BadInput, whether the library raises or
    panics: its panics are BaseExceptions."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise BadInput(f"{path}: not a tokenizer that works ({str(error)[:80]}); download it again") from None


def load_tokenizer(folder: str | Path) -> ChatTokenizer:
    """Read tokenizer.json, tokenizer_config.json, generation_config.json and the chat template of a checkpoint folder."""
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise BadInput(f"{path}: no such file; the checkpoint needs its tokenizer.json")
    with _calling_the_library(path):
        backend = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        backend.no_truncation()
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
    config = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            config |= expect(read_json(folder / name), dict, str(folder / name))
    tokens = {name: _token_text(config.get(name), f"{folder / 'tokenizer_config.json'}: field '{name}'")
              for name in ("bos_token", "eos_token")}
    eos_ids = _eos_ids(folder, backend, tokens["eos_token"])
    before, after = _render_template(folder, config, tokens)
    special = [token.content for token in added.values()]
    with _calling_the_library(path):  # some files do not mark these as special, and then they would count as such in a user's text
        marks = [t for i, t in added.items() if i in eos_ids or (t.content.strip() and t.content in before + after)]
        backend.add_special_tokens([AddedToken(t.content, single_word=t.single_word, lstrip=t.lstrip, rstrip=t.rstrip,
                                               normalized=t.normalized) for t in marks])
    last = max((before.rfind(token) + len(token) for token in special if token in before), default=0)
    first = min((after.find(token) for token in special if token in after), default=len(after))
    tokenizer = ChatTokenizer(backend, [], before[last:], after[:first], [], eos_ids, _vocab_size(folder, eos_ids))
    tokenizer.before, tokenizer.after = tokenizer.encode_marked(before[:last]), tokenizer.encode_marked(after[first:])
    return tokenizer


def _token_text(token: str | dict | None, where: str) -> str:
    return expect((token.get("content") if isinstance(token, dict) else token) or "", str, where)


def _eos_ids(folder: Path, backend: Tokenizer, eos_token: str) -> list[int]:
    """The end-of-text ids: the tokenizer's own first, then generation_config.json's and config.json's (int or list)."""
    ids = [backend.token_to_id(eos_token)] if eos_token else []
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            value = expect(read_json(folder / name), dict, str(folder / name)).get("eos_token_id")
            ids += value if isinstance(value, list) else [value]
    ids = list(dict.fromkeys(i for i in ids if isinstance(i, int) and not isinstance(i, bool)))
    if not ids:
        raise BadInput(f"{folder / 'tokenizer_config.json'}: field 'eos_token' is missing, and no file has 'eos_token_id'; add one")
    return ids


def _vocab_size(folder: Path, eos_ids: list[int]) -> int:
    """The vocabulary of config.json's model (without one: any), which must hold the end-of-text ids."""
    path = folder / "config.json"
    size = expect(read_json(path), dict, str(path)).get("vocab_size") if path.is_file() else None
    size = 2 ** 63 if size is None else expect(size, int, f"{path}: field 'vocab_size'")
    if not all(0 <= i < size for i in eos_ids):
        raise BadInput(f"{path}: field 'eos_token_id': {str(eos_ids)[:60]} are not all in the vocabulary of {size}; correct it")
    return size


def _render_template(folder: Path, config: dict, tokens: dict[str, str]) -> tuple[str, str]:
    """What the checkpoint's chat template puts before and after the user's message. Without a template: nothing, and a newline."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            source = path.read_text(encoding="utf-8")
        except ValueError:
            raise BadInput(f"{path}: not a text in UTF-8; download it again") from None
    else:
        path, source = folder / "tokenizer_config.json", config.get("chat_template")
    if isinstance(source, list):  # several named templates
        source = next((t.get("template") for t in source if isinstance(t, dict) and t.get("name") == "default"), None)
    if source is None:
        return tokens["bos_token"], "\n"
    expect(source, str, f"{path}: field 'chat_template'")
    mark = "\ue000the message\ue001"
    try:
        text = render(source, messages=[{"role": "user", "content": mark}], add_generation_prompt=True, **tokens)
    except Exception as error:  # a template is a program: whatever it raises is its own fault
        raise BadInput(f"{path}: the chat template fails on one user message ({str(error)[:80]}); correct it") from None
    if text.count(mark) != 1:
        raise BadInput(f"{path}: the chat template shows the user's message {text.count(mark)} times, not once; correct it")
    before, after = text.split(mark)
    return before, after
