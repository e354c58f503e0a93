"""A JSON-lines output that a killed run continues."""
import os
import re
from contextlib import ExitStack, suppress
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Iterable, Iterator

from plumbing import ranks
from plumbing.cli import HOW, resolved
from plumbing.errors import BadInput, Complete
from plumbing.files import expect, json_line, naming, read_json, read_jsonl, refuse_existing, write_json, writing


class Journal:
    """A JSON-lines output that a killed run continues: OUT.part grows line by line and becomes OUT at the end.

    journal = Journal(out, config)      # refuses what cannot be; journal.done: how many lines of a killed run still count
    for where, line in journal.check(items): ...
    with journal:                       # from here on there are files
        journal.write(object)

    The config stands beside it (OUT.config.json); a resumed run must have the same one, `resume`, `overwrite` and HOW apart.
    Lines count in whole rounds of `round_size`. With several ranks each has a part of its own for its share of the items
    (ranks.share), and rank 0 merges them.
    """

    def __init__(self, out: str | Path, config: Any, round_size: int = 1):
        self.out, n = Path(out), ranks.count()
        self.parts = [Path(f"{out}.part")] if n == 1 else [Path(f"{out}.{rank + 1}-of-{n}.part") for rank in range(n)]
        self.part = self.parts[ranks.rank()]
        self.config_path = Path(f"{out}.config.json")
        self.config = {k: v for k, v in resolved(config).items() if k not in ("resume", "overwrite")}
        self.done = 0
        begun = any(part.exists() for part in self.parts)
        left = self.part.exists() and self.part.stat().st_size > 0
        self.complete = config.resume and self.out.exists() and not begun and self.config_path.exists()
        if self.complete:  # `check` says so, if it is complete for these items
            self._check_config()
            return
        if not config.resume and left and not config.overwrite:
            raise BadInput(f"{self.part}: left by an unfinished run; give --resume to go on or --overwrite to start anew")
        if self._others() and not config.overwrite:
            raise BadInput(f"{self._others()[0]}: left by an unfinished run of another number of ranks; give --resume to as many "
                           f"or --overwrite to start anew")
        self.goes_on = config.resume and left
        refuse_existing(out, config.overwrite or (config.resume and begun))  # what was begun beside an older output had --overwrite
        if self.goes_on:
            self._check_config()
            self._read_part(round_size)

    def _others(self) -> list[Path]:
        """What runs of other numbers of ranks left."""
        found = self.out.parent.iterdir() if self.out.parent.is_dir() else ()
        pattern = re.compile(re.escape(self.out.name) + r"(\.\d+-of-\d+)?\.part")
        return sorted(path for path in found if pattern.fullmatch(path.name) and path not in self.parts)

    def _check_config(self) -> None:
        before = expect(read_json(self.config_path), dict, str(self.config_path))
        changed = [k for k in self.config if k not in HOW and before.get(k) != self.config[k]]
        if changed:
            raise BadInput(f"{self.config_path}: the run had another --{changed[0].replace('_', '-')} "
                           f"({before.get(changed[0])!r}); resume with the same command or give --overwrite")

    def _read_part(self, round_size: int) -> None:
        """Count the whole lines in whole rounds; cut off the rest, the last of which the kill may have left torn."""
        place = end = 0
        with open(self.part, "r+b") as file:
            for number, line in enumerate(file, 1):
                place += len(line)
                if line.endswith(b"\n") and number % round_size == 0:
                    self.done, end = number, place
            file.truncate(end)

    def check(self, items: Iterable[dict]) -> Iterator[tuple[str, dict]]:
        """("FILE:LINE", object) for each line that counts, as a stream; before anything is written.

        BadInput unless the lines begin this run's work: each has the fields of its item, with the same content. All items
        are gone through, once, those without a line too: whatever is wrong with one comes up before the work.
        Complete if the output was there already, with a line for each item.
        """
        items = iter(items)
        lines = islice(read_jsonl(self.part), self.done) if self.done else ()
        if self.complete:
            lines = islice(read_jsonl(self.out), ranks.rank(), None, ranks.count())
        for number, (where, line) in enumerate(lines, 1):
            item = next(items, {"id": object()})  # where there is no item: one that no line has
            changed = [name for name in item if name not in line or line[name] != item[name]]
            if changed:
                raise BadInput(f"{where}: field '{changed[0]}' is not that of item {number} of the input; give --overwrite to start anew")
            yield where, line
        more = sum(1 for _ in items)
        if self.complete and more:
            raise BadInput(f"{self.out}: is complete, but the input has {more} more items now; give --overwrite to start anew")
        if self.complete:
            raise Complete(f"{self.out}: is complete already; nothing to resume (--overwrite makes it anew)")

    def __enter__(self):
        ranks.wait()  # no rank writes before all have looked
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.part, "a" if self.goes_on else "w", encoding="utf-8")
        ranks.wait()
        if not self.goes_on and ranks.rank() == 0:
            for other in self._others():
                other.unlink()
            write_json(self.config_path, self.config)  # after the parts are empty, which --resume takes for nothing begun
        return self

    def write(self, value: dict) -> None:
        with naming(self.part):
            self.file.write(json_line(value))
            self.file.flush()
        ranks.sign()

    def __exit__(self, kind, error, traceback) -> None:
        with suppress(OSError) if kind else naming(self.part):  # a full disk fails here again
            os.fsync(self.file.fileno())
            self.file.close()
        if kind is None:
            ranks.meet()  # for the other parts to be whole
            if ranks.rank() == 0:
                self._merge()

    def _merge(self) -> None:
        """The output from the parts: their lines in turn, which is the order of the items."""
        if len(self.parts) == 1:
            os.replace(self.part, self.out)
            return
        with ExitStack() as stack, writing(self.out) as merged:
            files = cycle([stack.enter_context(open(part, encoding="utf-8")) for part in self.parts])
            merged.writelines(iter(lambda: next(files).readline(), ""))
        for part in self.parts:
            part.unlink()
