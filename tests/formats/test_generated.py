"""Files of each format with defects of every kind, made by bench/formats.py in miniature.

The counts are those they were made with.
"""

import importlib.util
import json

import pytest

from bench import formats


@pytest.mark.slow
@pytest.mark.parametrize("container", formats.CONTAINERS)
@pytest.mark.parametrize("name", formats.FORMATS)
def test_the_counts_are_those_that_the_file_was_made_with(tmp_path, name, container):
    if container == "parquet" and importlib.util.find_spec("pyarrow") is None:
        pytest.skip("pyarrow is not installed; pip install -r requirements-dev.txt")
    counts, read = formats.CONTAINERS[container](tmp_path / "rows", name, 500)
    found = formats.read_file(tmp_path / "rows")
    assert (found["counts"], found["read"]) == (counts, read)
    assert sum(n for reason, n in counts.items() if reason.startswith("dropped row")) == 500 - read > 0
    assert counts["dropped: the same case again"] > 0


@pytest.mark.parametrize("name", formats.FORMATS)
def test_every_defect_changes_a_row(name):
    make, defects = formats.FORMATS[name]
    solution = formats.Solution(1, "Problem?", ["one", "two", "three"], 1)
    row, counts = make(solution)
    for defect in defects:
        new, _ = defect(row, solution, counts)
        assert json.dumps(new) != json.dumps(row)
