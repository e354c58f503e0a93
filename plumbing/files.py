"""Files: JSON and JSON lines with errors that name file, line, field and remedy; outputs that are whole or absent."""
import json
import os
import tempfile
from array import array
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Iterator

from plumbing.errors import BadInput


WHITE_SPACE = b" \t\r\n\f\v\xef\xbb\xbf"  # and UTF-8's byte-order mark, which may be all that a line has


# ---------------------------------------------------------------------------------------------- reading

def parse_json(text: str | bytes, where: str, **hooks: Any) -> Any:
    """json.loads, with its hooks, whose every failure is a BadInput that says where."""
    try:
        value = json.loads(text.rstrip(), **hooks)  # a line's end would count as one more line in the error
        if (b"\\u" if isinstance(text, bytes) else "\\u") in text:  # a lone surrogate cannot be written out again
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: not valid JSON in UTF-8 ({error}); repair or remove it") from None


def read_json(path: str | Path) -> Any:
    """The value of a JSON file. Raises BadInput where it is missing or broken."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: no such file; check the path")
    return parse_json(path.read_bytes(), str(path))


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict]]:
    """("FILE:LINE", object) for each non-empty line, as a stream. Raises BadInput at the first line that is no object."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: no such file; check the path")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip(WHITE_SPACE):
                where = f"{path}:{number}"
                yield where, expect(parse_json(line, where), dict, where)


class Lines:
    """A JSON-lines file read on demand: in memory stand only the lines' places. lines[i] -> ("FILE:LINE", object).

    The lines may be those of an open file instead; then `path` is but its name.
    """
    before_number = ":"  # what stands between the file's name and the line's number
    hooks: dict[str, Any] = {}  # of json.loads

    def __init__(self, path: str | Path, file: BinaryIO | None = None):
        self.path = Path(path)
        if file is None and not self.path.is_file():
            raise BadInput(f"{path}: no such file; check the path")
        self.file = file or open(self.path, "rb")
        self.places, self.numbers = array("q"), array("q")  # 64-bit: where each non-empty line begins, and its number
        place = 0
        for number, line in enumerate(self.file, 1):
            if line.strip(WHITE_SPACE):
                self.places.append(place)
                self.numbers.append(number)
            place += len(line)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> tuple[str, dict]:
        self.file.seek(self.places[i])
        where = f"{self.path}{self.before_number}{self.numbers[i]}"
        return where, expect(parse_json(self.file.readline(), where, **self.hooks), dict, where)


NAMES = {str: "a text", int: "a whole number", float: "a number", dict: "an object", list: "a list", bool: "true or false"}


def expect(value: Any, kind: type, where: str) -> Any:
    """`value` if it is of `kind` (a bool is not a number); else BadInput."""
    kinds = (int, float) if kind is float else kind
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        raise BadInput(f"{where}: expected {NAMES[kind]}, found {json.dumps(value)[:60]}; correct it")
    return value


def get_field(row: dict, name: str, kind: type, where: str) -> Any:
    """row[name], which must be there and of `kind`; else BadInput with file, line and field."""
    if name not in row:
        raise BadInput(f"{where}: field '{name}' is missing; add it (found: {', '.join(map(str, row))[:80] or 'nothing'})")
    return expect(row[name], kind, f"{where}: field '{name}'")


# ---------------------------------------------------------------------------------------------- writing

@contextmanager
def naming(path: str | Path):
    """A write that fails (a full disk) does not say where; this does."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def writing(path: str | Path):
    """A text file that is written aside and renamed when whole; after an error nothing is left."""
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
    """BadInput where the output is there already and --overwrite was not given, or where nothing can be written."""
    path = Path(path)
    if path.exists() and not overwrite:
        raise BadInput(f"{path}: exists already; give --overwrite to replace it, or another --out")
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(2 ** 16))
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({folder}: {error.strerror}); make room, or give another --out") from None
