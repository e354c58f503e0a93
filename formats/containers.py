"""What rows are kept in: the one place that opens all of it.

    read_rows("phase2_train.jsonl")         JSON lines
    read_rows("gsm8k.json")                 a JSON array, or a single object
    read_rows("train-00000.parquet")        parquet, where pyarrow is installed
    read_rows("math-shepherd.jsonl.gz")     any of these, packed by gzip
    read_rows("data")                       a folder: all files of rows in it, in the order of their names
    read_rows("-")                          standard input, with any of these files in it

Each is a sequence: rows[i] is ("FILE:LINE", object), read when it is asked for. The first bytes of a file
tell what it is, and not its name. Byte-order marks and CRLF are no part of a row, and what pandas writes as
NaN is null.

JSON lines are read where they lie. Parquet, gzip and standard input are first copied as JSON lines into a
temporary file without a name (in the folder that TMPDIR names): so memory stays flat, and every row can be
reached. An array is read whole, which takes about six times the file's size in memory: 2 GB at 300 MB.
"""
import gzip
import io
import json
import re
import sys
import tempfile
import zlib
from bisect import bisect
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, ClassVar, Iterable, Iterator, Sequence

from plumbing import ranks
from plumbing.errors import BadInput
from plumbing.files import Lines, expect, naming, parse_json

STANDARD_INPUT = "-"
CHUNK = 2 ** 17  # bytes (or characters) that are copied at a time
BATCH = 1000     # rows of a parquet file that are in memory at a time
# the first bytes of files
GZIP = b"\x1f\x8b"
PARQUET = b"PAR1"
UTF16 = (b"\xff\xfe", b"\xfe\xff")
UTF8_MARK = b"\xef\xbb\xbf"
FOREIGN = {
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"\x28\xb5\x2f\xfd": "packed by zstd; unpack it first",
    b"BZh": "packed by bzip2; unpack it first",
    b"\xfd7zXZ\x00": "packed by xz; unpack it first",
    b"version https://git-lfs": "no data, but a pointer of Git LFS; fetch the file itself with git lfs pull",
}
ROW_FILES = re.compile(r"\.(json|jsonl|ndjson|parquet)(\.gz)?$")
SPLIT = re.compile(r"(?<![a-z])(train|test|validation|valid|val|dev|eval)(?![a-z])")

Rows = Sequence[tuple[str, dict]]


def read_rows(path: str | Path) -> Rows:
    """The rows of a file, of a folder of files, or of standard input ("-"). Raises BadInput."""
    if str(path) == STANDARD_INPUT:
        if ranks.count() > 1:
            raise BadInput("standard input: several ranks cannot share it; write it to a file, and name that")
        return _rows_of(_copied(iter(lambda: sys.stdin.buffer.read(CHUNK), b"")), "standard input")
    path = Path(path)
    if path.is_dir():
        return Shards([_rows_of(open(shard, "rb"), str(shard)) for shard in _row_files(path)])
    if not path.is_file():
        raise BadInput(f"{path}: no such file; check the path")
    return _rows_of(open(path, "rb"), str(path))


def _rows_of(file: BinaryIO, name: str) -> Rows:
    """The rows of an open file. `name` stands for it in errors."""
    head = file.read(32)
    file.seek(0)
    for magic, remedy in FOREIGN.items():
        if head.startswith(magic):
            raise BadInput(f"{name}: is {remedy}")
    if head.startswith(GZIP):
        return _rows_of(_copied(_unpacked(gzip.open(file), name)), name)
    if head.startswith(PARQUET):
        return ParquetRows(name, _copied(_parquet_lines(file, name)))
    if head.startswith(UTF16):
        return _json_rows(_copied(_utf8(file, name)), name)
    return _json_rows(file, name)


def _json_rows(file: BinaryIO, name: str) -> Rows:
    """JSON lines, read on demand; or the rows of an array, or of a single object that has several lines."""
    first = _first_line(file)
    if not first.startswith(b"[") and first != b"{":
        return JsonLines(name, file)
    value = parse_json(file.read(), name, parse_constant=_constant)
    rows = []
    for number, row in enumerate(value if isinstance(value, list) else [value], 1):
        where = f"{name}: row {number}"
        rows.append((where, expect(row, dict, where)))
    return rows


def _first_line(file: BinaryIO) -> bytes:
    """The beginning of the first line that is not blank; the file is at its start again."""
    first = file.readline(CHUNK).removeprefix(UTF8_MARK).strip()
    while not first and (line := file.readline(CHUNK)):
        first = line.strip()
    file.seek(0)
    return first


def _constant(name: str) -> float | None:
    """The value of NaN, Infinity and -Infinity, which are no JSON, but which Python and pandas write."""
    return None if name == "NaN" else float(name)


class JsonLines(Lines):
    """Lines whose NaN is null."""
    hooks: ClassVar = {"parse_constant": _constant}


class ParquetRows(JsonLines):
    """A parquet file's rows, copied one to a line."""
    before_number = ": row "


class Shards(Sequence):
    """The rows of several files, one after the other."""

    def __init__(self, shards: list[Rows]):
        self.shards = shards
        self.ends = list(accumulate(map(len, shards)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: int) -> tuple[str, dict]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        shard = bisect(self.ends, i)
        before = self.ends[shard - 1] if shard else 0
        return self.shards[shard][i - before]


# ---------------------------------------------------------------------------------------------- folders

def _row_files(folder: Path) -> list[Path]:
    """The files of rows in a folder and in the folders within. What is left out is printed.

    Raises BadInput where the names tell of several splits: who trains on a folder does not mean its test
    split.
    """
    found = []
    left_out = []
    splits = set()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        if ROW_FILES.search(path.name):
            found.append(path)
            splits.update(SPLIT.findall(str(name).lower()))
        else:
            left_out.append(str(name))
    if not found:
        raise BadInput(f"{folder}: a folder without files of rows (.json, .jsonl, .ndjson, .parquet, "
                       "and those packed by gzip); check the path")
    if len(splits) > 1:
        raise BadInput(f"{folder}: holds several splits ({', '.join(sorted(splits))}); "
                       f"name the files of one, as {folder}/*{max(splits)}*")
    more = f"; left out: {', '.join(left_out)[:200]}" if left_out else ""
    print(f"{folder}: {len(found)} files of rows{more}")
    return found


# ---------------------------------------------------------------------------------------------- copies

def _copied(chunks: Iterable[bytes]) -> BinaryIO:
    """A temporary file with these bytes, at its start. It has no name and goes with its last reader."""
    file = tempfile.TemporaryFile()  # noqa: SIM115, as it stays open
    with naming(tempfile.gettempdir()):
        for chunk in chunks:
            file.write(chunk)
        file.flush()
    file.seek(0)
    return file


def _unpacked(file: BinaryIO, name: str) -> Iterator[bytes]:
    try:
        while chunk := file.read(CHUNK):
            yield chunk
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{name}: cannot be unpacked ({error}), broken or cut short; fetch it anew") from None


def _utf8(file: BinaryIO, name: str) -> Iterator[bytes]:
    """UTF-16, as some editors and shells write it, in UTF-8."""
    text = io.TextIOWrapper(file, encoding="utf-16", newline="")
    try:
        while chunk := text.read(CHUNK):
            yield chunk.encode()
    except UnicodeError as error:
        raise BadInput(f"{name}: begins as UTF-16 and is not ({error}); save it as UTF-8") from None


def _parquet_lines(file: BinaryIO, name: str) -> Iterator[bytes]:
    """A line of JSON for each row; only BATCH rows are in memory at a time."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise BadInput(f"{name}: to read parquet, pyarrow is needed: pip install pyarrow "
                       f"(or convert the file to JSON lines)") from None
    try:
        for batch in ParquetFile(file).iter_batches(batch_size=BATCH):
            for row in batch.to_pylist():
                yield json.dumps(row, default=_plain).encode() + b"\n"
    except (pyarrow.ArrowException, OSError) as error:
        raise BadInput(f"{name}: not a readable parquet file ({error}); fetch it anew") from None


def _plain(value: object) -> str:
    """What JSON does not have: bytes are text that was not marked as such; dates and the like are shown."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
