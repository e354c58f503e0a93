"""JSON files: errors that name file, line, field and remedy; outputs that are whole or absent.

    for where, row in read_jsonl("cases.jsonl"):         # where: "cases.jsonl:7"
        problem = get_field(row, "problem", str, where)  # or "cases.jsonl:7: field 'problem' is missing; ..."

    with writing("out.jsonl") as file:                   # out.jsonl is there when the block has ended
        file.write(json_line({"id": "a"}))
"""
import errno
import hashlib
import json
import os
import tempfile
from array import array
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Iterable, Iterator

from plumbing.errors import BadInput

WHITE_SPACE = b" \t\r\n\f\v\xef\xbb\xbf"  # and UTF-8's byte-order mark, which may be all that a line has


# ---------------------------------------------------------------------------------------------- reading

def parse_json(text: str | bytes, where: str, **hooks: Any) -> Any:
    """json.loads, with its hooks, whose every failure is a BadInput that says where."""
    try:
        value = json.loads(text.rstrip(), **hooks)  # the line's end would count as a second line in the error
        escape = b"\\u" if isinstance(text, bytes) else "\\u"
        if escape in text:  # perhaps a lone surrogate, which cannot be written out again
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: not valid JSON in UTF-8 ({error}); repair or remove it") from None


def read_json(path: str | Path) -> Any:
    """The value of a JSON file. Raises BadInput if the file is missing or broken."""
    path = existing(path)
    return parse_json(path.read_bytes(), str(path))


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict]]:
    """("FILE:LINE", object) for each non-empty line, as a stream. BadInput at a line that is no object."""
    path = existing(path)
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip(WHITE_SPACE):
                where = f"{path}:{number}"
                yield where, expect(parse_json(line, where), dict, where)


def existing(path: str | Path) -> Path:
    """The path, if a file is there; else BadInput."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: no such file; check the path")
    return path


class Lines:
    """A JSON-lines file that is read on demand: lines[i] -> ("FILE:LINE", object) of the i-th non-empty line.

    Memory holds two numbers for each line, and none of its content. The lines may be those of an open `file`;
    `path` is then its name.
    """
    before_number = ":"  # what stands between the file's name and the line's number
    hooks: ClassVar[dict[str, Any]] = {}  # of json.loads

    def __init__(self, path: str | Path, file: BinaryIO | None = None):
        self.path = Path(path)
        self.file = file or open(existing(path), "rb")  # noqa: SIM115, as it stays open
        self.offsets = array("q")  # the byte at which each non-empty line begins
        self.numbers = array("q")  # its number in the file, from 1
        offset = 0
        for number, line in enumerate(self.file, 1):
            if line.strip(WHITE_SPACE):
                self.offsets.append(offset)
                self.numbers.append(number)
            offset += len(line)

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, i: int) -> tuple[str, dict]:
        self.file.seek(self.offsets[i])
        where = f"{self.path}{self.before_number}{self.numbers[i]}"
        return where, expect(parse_json(self.file.readline(), where, **self.hooks), dict, where)


NAMES = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    dict: "an object",
    list: "a list",
    bool: "true or false",
}


def expect(value: Any, kind: type, where: str) -> Any:
    """The value, if it is of `kind`; else BadInput. A whole number is a number too; a bool is none."""
    kinds = (int, float) if kind is float else kind
    is_other_bool = isinstance(value, bool) and kind is not bool  # Python's bool is an int
    if is_other_bool or not isinstance(value, kinds):
        raise BadInput(f"{where}: expected {NAMES[kind]}, found {json.dumps(value)[:60]}; correct it")
    return value


def get_field(row: dict, name: str, kind: type, where: str) -> Any:
    """row[name], which must be there and of `kind`; else BadInput with file, line and field."""
    if name not in row:
        names = ", ".join(map(str, row))[:80] or "nothing"
        raise BadInput(f"{where}: field '{name}' is missing; add it (found: {names})")
    return expect(row[name], kind, f"{where}: field '{name}'")


def files_in(path: str | Path) -> list[Path]:
    """The file itself, or all files in a folder and in the folders within, sorted."""
    path = Path(path)
    return sorted(found for found in path.rglob("*") if found.is_file()) if path.is_dir() else [path]


def content_hash(words: str, paths: Iterable[Path]) -> str:
    """16 hexadecimal digits from some words and the content of some files."""
    digest = hashlib.blake2b(words.encode(), digest_size=8)
    for path in paths:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def fingerprint(*values: object) -> int:
    """A 64-bit number from what the values say, the same in every run."""
    content = repr(values).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


# ---------------------------------------------------------------------------------------------- writing

@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Give the file's name to an OSError that has none, as that of a write to a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def writing(path: str | Path) -> Iterator[Any]:
    """A text file that is written aside and renamed when it is whole. An error leaves nothing of it."""
    path = Path(path)
    aside = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with naming(path), open(aside, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    with writing(path) as file:
        json.dump(value, file, ensure_ascii=False, indent=2)
        file.write("\n")


def json_line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def refuse_existing(path: str | Path, overwrite: bool) -> None:
    """Raise BadInput if the output exists, without --overwrite, or if no file can be written there."""
    path = Path(path)
    if path.is_dir():
        raise BadInput(f"{path}: is a folder; give --out a file's name")
    if path.exists() and not overwrite:
        raise BadInput(f"{path}: exists already; give --overwrite to replace it, or another --out")
    refuse_unwritable(path)


def refuse_unwritable(path: Path) -> None:
    """Raise BadInput if nothing can be written there."""
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(2 ** 16))  # on a full disk a file can be made, and not filled
    except OSError as error:
        remedy = "make room" if error.errno == errno.ENOSPC else "see to the folder"
        raise BadInput(f"{path}: cannot be written ({folder}: {error.strerror}); "
                       f"{remedy}, or give another --out") from None
