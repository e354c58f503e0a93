"""The ground floor: command lines made from dataclasses, errors of one line, files that are whole or absent.

Every script of the project has one frozen dataclass per command; `run` makes the command line from its fields:

    @dataclass(frozen=True)
    class Config:
        model: Annotated[str, "checkpoint: a Hugging Face folder"]
        k: Annotated[int, "analyses per step", (1, None)] = 10
"""
import argparse
import dataclasses
import errno
import json
import os
import re
import sys
import tempfile
from array import array
from contextlib import ExitStack, contextmanager, suppress
from itertools import cycle, islice
from pathlib import Path
from types import UnionType
from typing import Any, Callable, Iterable, Iterator, Union, get_args, get_origin, get_type_hints

import torch

import ranks

EXIT_BAD_INPUT = 2
EXIT_LOST_RANK = 3
# where and how a model is asked: a resumed run may differ in these
HOW = ("server", "concurrency", "timeout", "retries", "api_key_env", "rank_timeout")


class BadInput(Exception):
    """Something the user gave cannot be used. The message is one line: what, where (file, line, field), and the remedy."""


class Complete(Exception):
    """All is done already: a run that was killed just before its end was asked to go on. The message says so."""


class Stopped(Exception):
    """A signal asked to stop, and the work so far is saved. The message says how to go on."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


# ---------------------------------------------------------------------------------------------- command lines

def run(*commands: tuple[type, Callable], argv: list[str] | None = None) -> None:
    """Parse the command line into a config and call its main; `commands` are (config class, main) pairs.

    With several commands the first word chooses one by the name of its main. BadInput and file errors end the
    program with one line on stderr and exit code 2.
    """
    script = sys.modules[commands[0][1].__module__]
    parser = argparse.ArgumentParser(description=script.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    if len(commands) == 1:
        parsers = [parser]
        _add_fields(parser, commands[0][0])
    else:
        sub = parser.add_subparsers(dest="command", required=True)
        parsers = []
        for config_class, main in commands:
            parsers.append(sub.add_parser(main.__name__, help=main.__doc__.split("\n")[0], description=main.__doc__,
                                          formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False))
            _add_fields(parsers[-1], config_class)
    values = vars(parser.parse_args(argv))
    chosen = values.pop("command", commands[0][1].__name__)
    config_class, main = next((c, m) for c, m in commands if m.__name__ == chosen)
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items() if value is not None}
    config = config_class(**given)
    try:
        try:
            check_device(config)
            main(config)
        except Complete as complete:
            print(complete)
        ranks.leave()
    except (BadInput, OSError, MemoryError, RuntimeError, Stopped, KeyboardInterrupt) as error:
        message, code = _last_word(config, error)
        if message:
            print(message, file=sys.stderr)
        ranks.end(code)


def _last_word(config: Any, error: BaseException) -> tuple[str, int]:
    """What is said of an error that ends the program, and the exit code. Raises what is a defect of the program."""
    if isinstance(error, BadInput):
        return _one_line(str(error)), EXIT_BAD_INPUT
    if isinstance(error, OSError):
        return _one_line(f"{error.filename or 'output'}: {error.strerror or error}{_remedy(error)}"), EXIT_BAD_INPUT
    if isinstance(error, Stopped):
        return "" if ranks.rank() else str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        again = "; what is written is whole: give the same command with --resume to go on" if hasattr(config, "resume") else ""
        return f"interrupted{again}", 130
    if ranks.is_lost(error):
        return _one_line(f"rank {ranks.rank()} has lost another rank ({str(error)[:120]}); what is saved is whole: give the same command "
                         "with --resume to go on"), EXIT_LOST_RANK
    # torch.OutOfMemoryError is a RuntimeError, and so is that of its CPU allocator
    if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", str(error)):
        return _one_line(out_of_memory(config, error)), EXIT_BAD_INPUT
    raise error


def check_device(config: Any) -> None:
    """--device names something that is there."""
    name = getattr(config, "device", "cpu")
    try:
        missing = torch.device(name).type == "cuda" and not torch.cuda.is_available()
    except RuntimeError:
        raise BadInput(f"--device {name}: no such kind of device; give cpu, cuda or cuda:N") from None
    if missing:
        raise BadInput(f"--device {name}: this PyTorch finds no GPU; give --device cpu, or install a build of torch for CUDA")


def _remedy(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "; make room. What was saved before is whole: with --resume, where the command has it, the run goes on from there"
    return ""


def out_of_memory(config: Any, error: Exception) -> str:
    """What to lower: the first of these settings that the command has."""
    names = [name for name in ("micro_tokens", "batch_size") if hasattr(config, name)]
    lower = f"lower --{names[0].replace('_', '-')} (now {getattr(config, names[0])})" if names else "give it less at a time"
    if hasattr(config, "checkpoint_activations") and not config.checkpoint_activations:
        lower += " or give --checkpoint-activations, with which --resume goes on too"
    return f"out of memory ({str(error)[:100] or type(error).__name__}): {lower}; what was saved before is whole"


def _one_line(message: str) -> str:
    """An error's line. What a file put into the message can neither break the line, nor flood or steer the terminal."""
    if len(message) > 2000:
        message = f"{message[:1500]} ... {message[-400:]}"
    shown = "".join(c if c.isprintable() else " " for c in message)
    return f"error{f' of rank {ranks.rank()}' if ranks.rank() else ''}: {shown}"


def _add_fields(parser: argparse.ArgumentParser, config_class: type) -> None:
    """One flag per field; the type, the help and the range (low, high; None = open) come from its annotation."""
    hints = get_type_hints(config_class, include_extras=True)
    for field in dataclasses.fields(config_class):
        kind, help_text, *limits = get_args(hints[field.name])
        flag = "--" + field.name.replace("_", "-")
        required = field.default is dataclasses.MISSING
        options: dict[str, Any] = {"required": required, "help": help_text.replace("%", "%%"), "default": None}
        if not required:
            if field.default not in (None, (), ""):
                options["help"] += f" (default: {_shown(field.default)})"
        if get_origin(kind) in (Union, UnionType):  # X | None
            kind = next(arg for arg in get_args(kind) if arg is not type(None))
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
            continue
        if get_origin(kind) is tuple:
            kind, options["nargs"], options["action"] = get_args(kind)[0], "+", "extend"
        if limits and isinstance(limits[0][0], str):
            options["choices"] = limits[0]
        parser.add_argument(flag, type=_in_range(kind, limits[0]) if limits and "choices" not in options else kind,
                            metavar=None if "choices" in options else kind.__name__.upper(), **options)


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _in_range(kind: type, limits: tuple) -> Callable[[str], Any]:
    """A parser for argparse that refuses numbers outside [low, high] (and nan)."""
    low, high = limits

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind.__name__}") from None
        if not ((low is None or value >= low) and (high is None or value <= high)):
            bounds = f"at least {low}" if high is None else f"at most {high}" if low is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: give a number {bounds}")
        return value
    return parse


def resolved(config: Any) -> dict:
    """The config as a dict that JSON holds, for printing and for saving beside the output."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(config).items()}


def print_config(config: Any) -> None:
    print("config:", json.dumps(resolved(config), ensure_ascii=False))


# ---------------------------------------------------------------------------------------------- reading

def parse_json(text: str | bytes, where: str) -> Any:
    """json.loads whose every failure is a BadInput that says where."""
    try:
        value = json.loads(text.rstrip())  # a line's end would count as one more line in the error
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
            if line.strip():
                where = f"{path}:{number}"
                yield where, expect(parse_json(line, where), dict, where)


class Lines:
    """A JSON-lines file read on demand: in memory stand only the lines' places. lines[i] -> ("FILE:LINE", object)."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise BadInput(f"{path}: no such file; check the path")
        self.file = open(self.path, "rb")
        self.places, self.numbers = array("q"), array("q")  # 64-bit: where each non-empty line begins, and its number
        place = 0
        for number, line in enumerate(self.file, 1):
            if line.strip():
                self.places.append(place)
                self.numbers.append(number)
            place += len(line)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> tuple[str, dict]:
        self.file.seek(self.places[i])
        where = f"{self.path}:{self.numbers[i]}"
        return where, expect(parse_json(self.file.readline(), where), dict, where)


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
