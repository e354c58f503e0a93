"""A JSON-lines output that a killed run continues.

    journal = Journal("out.jsonl", config, len(items))    # refuses what cannot be begun or continued
    for where, line in journal.check(items):  # the lines of a killed run that still count
        ...
    with journal:                             # from here on there are files
        for item in items[journal.done:]:
            journal.write(item | {"answer": work(item)})

While it is written, and after it:

    out.jsonl.part              the lines so far; out.jsonl in the end
    out.jsonl.1-of-2.part, ...  the same with two ranks: each has a part, and rank 0 merges them in the end
    out.jsonl.config.json       the settings, which a resumed run must have too
"""
import os
import re
from contextlib import ExitStack, suppress
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Iterable, Iterator

from plumbing import ranks
from plumbing.cli import MAY_CHANGE, flag_of, marked, resolved
from plumbing.errors import BadInput, Complete
from plumbing.files import (
    expect,
    json_line,
    naming,
    read_json,
    read_jsonl,
    refuse_existing,
    write_json,
    writing,
)


class Journal:
    """A JSON-lines output: OUT.part grows line by line and becomes OUT at the end.

    The config has the fields `resume` and `overwrite`, which say how this run begins. All others are saved,
    and a resumed run must have the same ones, those marked MAY_CHANGE apart. `done` lines of a killed run
    count: those of whole rounds of `round_size`, so what it had done of a round is done again; and all
    `n_items`, if they were done. With several ranks each has a part of its own, for its share of the items
    (ranks.share).
    """

    def __init__(self, out: str | Path, config: Any, n_items: int, round_size: int = 1):
        self.out = Path(out)
        self.parts = [Path(f"{out}.part")]
        if ranks.count() > 1:
            self.parts = [Path(f"{out}.{rank + 1}-of-{ranks.count()}.part") for rank in range(ranks.count())]
        self.part = self.parts[ranks.rank()]
        self.config_path = Path(f"{out}.config.json")
        self.config = resolved(config)
        del self.config["resume"], self.config["overwrite"]
        self.may_change = marked(config, MAY_CHANGE)
        self.done = 0
        self.goes_on = False
        begun = any(part.exists() for part in self.parts)
        ended = self.out.exists() and self.config_path.exists() and not begun
        self.complete = config.resume and ended
        if self.complete:  # for some items; `check` finds out whether it is for those of this run
            self._check_config()
            return
        has_lines = self.part.exists() and self.part.stat().st_size > 0
        if has_lines and not (config.resume or config.overwrite):
            raise BadInput(f"{self.part}: left by an unfinished run; "
                           "give --resume to go on or --overwrite to start anew")
        others = self._parts_of_other_runs()
        if others and not config.overwrite:
            raise BadInput(f"{others[0]}: left by an unfinished run of another number of ranks; "
                           "give --resume to as many or --overwrite to start anew")
        # an output beside the parts of an unfinished run is an older one, which that run had --overwrite for
        refuse_existing(out, config.overwrite or (config.resume and begun))
        self.goes_on = config.resume and has_lines
        if self.goes_on:
            self._check_config()
            self._read_part(n_items, round_size)

    def _parts_of_other_runs(self) -> list[Path]:
        """The parts that runs of other numbers of ranks have left."""
        if not self.out.parent.is_dir():
            return []
        pattern = re.compile(re.escape(self.out.name) + r"(\.\d+-of-\d+)?\.part")
        found = [path for path in self.out.parent.iterdir() if pattern.fullmatch(path.name)]
        return sorted(path for path in found if path not in self.parts)

    def _check_config(self) -> None:
        before = expect(read_json(self.config_path), dict, str(self.config_path))
        for name, value in self.config.items():
            if name not in self.may_change and before.get(name) != value:
                raise BadInput(f"{self.config_path}: the run had another {flag_of(name)} "
                               f"({before.get(name)!r}); resume with the same command or give --overwrite")

    def _read_part(self, n_items: int, round_size: int) -> None:
        """Count the whole lines of whole rounds, and cut off the rest. A kill may have torn the last line."""
        size = 0  # bytes of the lines so far
        size_done = 0  # of those that count
        with open(self.part, "r+b") as file:
            for number, line in enumerate(file, 1):
                size += len(line)
                ends_a_round = number % round_size == 0 or number == n_items
                if line.endswith(b"\n") and ends_a_round:
                    self.done = number
                    size_done = size
            file.truncate(size_done)

    def check(self, items: Iterable[dict]) -> Iterator[tuple[str, dict]]:
        """("FILE:LINE", object) for each line that counts, as a stream; before anything is written.

        Raises BadInput unless each line has the fields of its item, with the same content. Goes through all
        items once, those without a line too, so whatever is wrong with one comes up before the work. Raises
        Complete if the output was there already, with a line for each item.
        """
        items = iter(items)
        for number, (where, line) in enumerate(self._lines(), 1):
            item = next(items, None)
            changed = "id" if item is None else _difference(item, line)
            if changed:
                raise BadInput(f"{where}: field '{changed}' is not that of item {number} of the input; "
                               "give --overwrite to start anew")
            yield where, line
        further = sum(1 for _ in items)
        if self.complete and further:
            raise BadInput(f"{self.out}: is complete, but the input has {further} more items now; "
                           "give --overwrite to start anew")
        if self.complete:
            raise Complete(f"{self.out}: is complete already; nothing to resume (--overwrite makes it anew)")

    def _lines(self) -> Iterable[tuple[str, dict]]:
        """This rank's lines that count: from the complete output, or from its part."""
        if self.complete:
            return islice(read_jsonl(self.out), ranks.rank(), None, ranks.count())
        return islice(read_jsonl(self.part), self.done) if self.done else ()

    def __enter__(self) -> "Journal":
        ranks.wait()  # no rank writes before all have looked
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.part, "a" if self.goes_on else "w", encoding="utf-8")
        ranks.wait()  # no part has lines of an older run now, so the settings of that run may go
        if not self.goes_on and ranks.rank() == 0:
            for other in self._parts_of_other_runs():
                other.unlink()
            write_json(self.config_path, self.config)
        ranks.watch(self.parts)
        return self

    def write(self, value: dict) -> None:
        with naming(self.part):
            self.file.write(json_line(value))
            self.file.flush()

    def __exit__(self, kind, error, traceback) -> None:
        with suppress(OSError) if kind else naming(self.part):  # a full disk fails here again
            os.fsync(self.file.fileno())
            self.file.close()
        if kind is None:
            ranks.meet()  # the parts are whole
            if ranks.rank() == 0:
                self._merge()
        ranks.watch([])

    def _merge(self) -> None:
        """Make the output of the parts: their lines in turn, which is the order of the items."""
        if len(self.parts) == 1:
            os.replace(self.part, self.out)
            return
        with ExitStack() as stack, writing(self.out) as merged:
            files = [stack.enter_context(open(part, encoding="utf-8")) for part in self.parts]
            for file in cycle(files):
                line = file.readline()
                if not line:
                    break
                merged.write(line)
        for part in self.parts:
            part.unlink()


class NoJournal:
    """What stands for a journal where no file is written: nothing is done yet, and nothing is kept."""

    done = 0

    def check(self, items: Iterable[dict]) -> Iterator[tuple[str, dict]]:
        """Goes through all items once, so whatever is wrong with one comes up before the work."""
        for _ in items:
            pass
        return iter(())

    def write(self, value: dict) -> None:
        pass

    def __enter__(self) -> "NoJournal":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        pass


def _difference(item: dict, line: dict) -> str | None:
    """The first field of the item that the line lacks or has another value of; None if there is none."""
    for name, value in item.items():
        if name not in line or line[name] != value:
            return name
    return None
