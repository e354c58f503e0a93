"""Tables of text, a line for each row and a column for each field.

    print_columns(rows, [Column("source", "source", 16, "s"), Column("F1", "f1", 20, ".1f", interval=True)])

    source                            F1
    gsm8k              61.2 [57.9, 64.6]
"""

from collections.abc import Iterable
from typing import Any, NamedTuple


class Column(NamedTuple):
    title: str
    field: str
    width: int
    form: str  # as of format(); "s" is put to the left
    interval: bool = False  # show the fields FIELD_low and FIELD_high too


def print_columns(rows: Iterable[dict], columns: Iterable[Column]) -> None:
    print("".join(aligned(column.title, column) for column in columns))
    for row in rows:
        print("".join(aligned(cell(row, column), column) for column in columns))


def aligned(text: str, column: Column) -> str:
    if column.form == "s":
        return f"{text:<{column.width}}"
    return f"{text:>{column.width}}"


def cell(row: dict, column: Column) -> str:
    value = row.get(column.field)
    text = shown(value, column.form)
    if not column.interval or value is None:
        return text
    low = row.get(f"{column.field}_low")
    high = row.get(f"{column.field}_high")
    return f"{text} [{shown(low, column.form)}, {shown(high, column.form)}]"


def shown(value: Any, form: str) -> str:
    """A number in its format; what is undefined is a dash."""
    return "-" if value is None else format(value, form)
