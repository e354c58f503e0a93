"""What rows are kept in.

Whatever it is, the same rows come out, each with the place that an error will name.
"""

import bz2
import gzip
import io
import json
import lzma
import sys
import tracemalloc

import pytest

from formats import containers
from formats.containers import read_rows
from plumbing.errors import BadInput

ROWS = [{"id": n, "text": f"ü\u2028 {n}", "steps": ["a", "b" * n], "none": None} for n in range(5)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
MARK = b"\xef\xbb\xbf"


def refused(path) -> str:
    with pytest.raises(BadInput) as error:
        list(read_rows(path))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture()
def stdin(monkeypatch):
    """stdin(bytes): what standard input has."""

    def give(content: bytes):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    return give


def test_several_ranks_do_not_share_standard_input(stdin, monkeypatch):
    """Each would read a part of it."""
    stdin(b'{"a": 1}\n')
    monkeypatch.setattr("plumbing.ranks.count", lambda: 2)
    with pytest.raises(BadInput, match="standard input: several ranks cannot share it"):
        read_rows("-")


# -------------------------------------------------------------------------------------- bytes around the rows


@pytest.mark.parametrize(
    "content, between",
    [
        (LINES, ":"),
        (MARK + LINES, ":"),
        (LINES.replace(b"\n", b"\r\n"), ":"),
        (MARK + LINES.replace(b"\n", b"\r\n"), ":"),
        (LINES.rstrip(), ":"),
        (LINES.decode().encode("utf-16"), ":"),
        (LINES.decode().replace("\n", "\r\n").encode("utf-16"), ":"),
        (b"\xfe\xff" + LINES.decode().encode("utf-16-be"), ":"),
        (json.dumps(ROWS).encode(), ": row "),
        (MARK + json.dumps(ROWS, indent=1).encode(), ": row "),
        (MARK + b"\r\n" + json.dumps(ROWS, indent=1).replace("\n", "\r\n").encode(), ": row "),
        (json.dumps(ROWS).encode("utf-16"), ": row "),
    ],
    ids=[
        "lines",
        "mark",
        "CRLF",
        "mark and CRLF",
        "no last line end",
        "UTF-16",
        "UTF-16 and CRLF",
        "UTF-16 BE",
        "array",
        "array and mark",
        "array, mark and CRLF",
        "array in UTF-16",
    ],
)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_the_same_rows(tmp_path, stdin, content, between, packed):
    """From a file with any name and from standard input."""
    path = tmp_path / "rows"
    content = gzip.compress(content, mtime=0) if packed else content
    path.write_bytes(content)
    rows = read_rows(path)
    assert [row for _, row in rows] == ROWS and len(rows) == 5 and rows[3][1] == ROWS[3]
    assert [where for where, _ in rows] == [f"{path}{between}{n}" for n in range(1, 6)]
    stdin(content)
    rows = read_rows("-")
    assert [row for _, row in rows] == ROWS
    assert rows[4][0] == f"standard input{between}5"


def test_a_mark_within(tmp_path):
    """Files that were put together with their marks; and lines with nothing but a mark."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(MARK + b"\n" + MARK + LINES + MARK + LINES + MARK)
    assert [row for _, row in read_rows(path)] == ROWS * 2 and read_rows(path)[0][0] == f"{path}:2"


@pytest.mark.parametrize("content", [b"", MARK, b"\n\n", gzip.compress(b"", mtime=0), b"[]", MARK + b"[]"])
def test_no_rows(tmp_path, content):
    (tmp_path / "rows").write_bytes(content)
    assert list(read_rows(tmp_path / "rows")) == []


def test_nan_is_nothing(tmp_path):
    text = '{"label": NaN, "steps": [1.0, NaN], "deep": {"x": NaN}, "big": Infinity}'
    for name, content in (("lines", text + "\n"), ("array", f"[{text}]")):
        (tmp_path / name).write_text(content)
        [(_, row)] = read_rows(tmp_path / name)
        assert row == {"label": None, "steps": [1.0, None], "deep": {"x": None}, "big": float("inf")}


@pytest.mark.parametrize(
    "content, said",
    [
        (b"PK\x03\x04...", "is a zip archive; unpack it first"),
        (b"\x28\xb5\x2f\xfd...", "packed by zstd"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "pointer of Git LFS"),
        (gzip.compress(LINES, mtime=0)[:-9], "cannot be unpacked"),
        (gzip.compress(LINES, mtime=0)[:40] + b"\x00" * 40, "cannot be unpacked"),
        (bz2.compress(LINES), "packed by bzip2; unpack it first"),
        (lzma.compress(LINES), "packed by xz; unpack it first"),
        (b"\xff\xfe\x00\xd8{", "begins as UTF-16 and is not"),
        (gzip.compress(b'{"a": 1}\n{"a": \n', mtime=0), "rows:2: not valid JSON"),
    ],
)
def test_what_cannot_be_opened_says_why(tmp_path, content, said):
    (tmp_path / "rows").write_bytes(content)
    assert (message := refused(tmp_path / "rows")).startswith(str(tmp_path)) and said in message


# ---------------------------------------------------------------------------------------------- folders


def test_a_folder_of_shards(tmp_path, capsys):
    """In the order of their names, those of folders within too.

    What is not read is said, and what is hidden is not there.
    """
    (tmp_path / "data").mkdir()
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "old.jsonl").write_bytes(LINES)
    (tmp_path / "README.md").write_text("# Data")
    (tmp_path / "data" / "part-10.json").write_text(json.dumps(ROWS[3:]))
    (tmp_path / "data" / "part-02.jsonl.gz").write_bytes(gzip.compress(LINES, mtime=0))
    (tmp_path / "data" / "part-05.jsonl").write_bytes(b"")
    rows = read_rows(tmp_path)
    assert [row for _, row in rows] == ROWS + ROWS[3:] and len(rows) == 7
    assert (
        rows[1][0] == f"{tmp_path}/data/part-02.jsonl.gz:2"
        and rows[6][0] == f"{tmp_path}/data/part-10.json: row 2"
    )
    assert f"{tmp_path}: 3 files of rows; left out: README.md\n" in capsys.readouterr().out
    for i in (-1, 7):
        with pytest.raises(IndexError):
            rows[i]


@pytest.mark.parametrize(
    "names, splits",
    [
        (("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"), "test, train"),
        (("phase1_train.jsonl", "phase1_test.jsonl"), "test, train"),
        (("train/0.json", "validation/0.json"), "train, validation"),
        (("latest.json", "trainer.json", "part.json"), None),
        (("train-0.json", "train-1.json"), None),
        (("a_test.json", "b_test.json"), None),
    ],
)
def test_a_folder_of_several_splits_is_refused(tmp_path, names, splits):
    for name in names:
        (tmp_path / "d" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "d" / name).write_text("[]")
    if splits:
        assert f"{tmp_path}/d: holds several splits ({splits}); name the files of one" in refused(
            tmp_path / "d"
        )
    else:
        assert list(read_rows(tmp_path / "d")) == []


def test_a_folder_without_rows(tmp_path):
    (tmp_path / "README.md").write_text("x")
    assert "a folder without files of rows" in refused(tmp_path)


# ---------------------------------------------------------------------------------------------- parquet


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    """One line that says how to get it."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1....PAR1")
    assert f"{tmp_path}/x.parquet: to read parquet, pyarrow is needed: pip install pyarrow" in refused(
        tmp_path / "x.parquet"
    )


@pytest.fixture()
def write_parquet():
    pyarrow = pytest.importorskip("pyarrow", reason="pip install -r requirements-dev.txt")
    parquet = pytest.importorskip("pyarrow.parquet")

    def write(path, rows: list[dict], **options):
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
        return path

    return write


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.slow
def test_parquet(tmp_path, stdin, write_parquet, packed):
    """Nested values, several row groups, any order; from standard input too."""
    path = write_parquet(tmp_path / "x.parquet", ROWS * 3, row_group_size=4)
    if packed:
        path.write_bytes(gzip.compress(path.read_bytes(), mtime=0))
    rows = read_rows(path)
    assert [row for _, row in rows] == ROWS * 3 and rows[13] == (f"{path}: row 14", ROWS[3])
    stdin(path.read_bytes())
    assert [row for _, row in read_rows("-")] == ROWS * 3


def test_parquets_own_values(tmp_path, write_parquet):
    """NaN is null; text that is stored as bytes is text; a date is shown."""
    import datetime

    path = write_parquet(
        tmp_path / "x.parquet", [{"a": float("nan"), "b": "ü".encode(), "c": datetime.date(2025, 1, 2)}]
    )
    assert read_rows(path)[0][1] == {"a": None, "b": "ü", "c": "2025-01-02"}


def test_a_broken_parquet_file(tmp_path, write_parquet):
    path = write_parquet(tmp_path / "x.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:-10])
    assert f"{path}: not a readable parquet file" in refused(path)


# ---------------------------------------------------------------------------------------------- memory


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lines", "gzip", "standard input", "parquet"])
def test_memory_is_flat(tmp_path, stdin, request, kind, monkeypatch):
    """Eight megabytes of rows in a tenth of that: in Python's memory stand the lines' places alone."""
    monkeypatch.setattr(containers, "CHUNK", 2**16)
    monkeypatch.setattr(containers, "BATCH", 50)
    rows = [{"id": n, "text": "x" * 2000} for n in range(4000)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = tmp_path / "rows"
    if kind == "parquet":
        request.getfixturevalue("write_parquet")(path, rows, row_group_size=500)
    elif kind == "standard input":
        stdin(lines)
    else:
        path.write_bytes(gzip.compress(lines, mtime=0) if kind == "gzip" else lines)
    del rows, lines
    source = "-" if kind == "standard input" else path
    tracemalloc.start()
    try:
        count = sum(len(row["text"]) == 2000 for _, row in read_rows(source))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 4000 and peak < 800_000, peak
