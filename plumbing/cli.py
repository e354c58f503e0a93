"""Command lines made of dataclasses, and errors of one line.

A script has one frozen dataclass for each of its commands, and `run` makes the command line of its fields:

    @dataclass(frozen=True)
    class Config:
        model: Annotated[str, "checkpoint: a Hugging Face folder"]
        k: Annotated[int, "analyses per step", (1, None)] = 10
        dtype: Annotated[str, "of the weights", ("float32", "bfloat16")] = "float32"
        timeout: Annotated[float, "seconds to wait for an answer", (0.1, None), MAY_CHANGE] = 600.0

    def main(config: Config) -> None:
        ...

    run((Config, main))

    python script.py --model FOLDER --k 4

An annotation holds the type, the help, and then, if the field has them, its range (lowest, highest; None =
open) or its choices, and its marks. A mark is what a field says of itself (`MAY_CHANGE`: a resumed run may
differ in it), so that nothing here has to know the names of the scripts' fields. Three names do have a
meaning: `device` and `out` are checked before the work (`out` is no file that the command reads, a field
marked INPUT), and a command with the field `resume` says that it can go on.
"""
import argparse
import dataclasses
import errno
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Callable, Iterator, Sequence, Union, get_args, get_origin, get_type_hints

import torch

from plumbing import ranks
from plumbing.errors import BadInput, Complete, Stopped

EXIT_BAD_INPUT = 2
EXIT_LOST_RANK = 3
EXIT_INTERRUPTED = 130
LONGEST_MESSAGE = 2000  # characters
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_COMPILER = "no C compiler is found, which makes the kernels for a GPU: install gcc, or give --plain"
Main = Callable[[Any], None]  # what a command does with its config


# ---------------------------------------------------------------------------------------------- marks

@dataclass(frozen=True)
class Mark:
    """An item of a field's annotation. `marked` lists the fields that have it."""
    meaning: str


MAY_CHANGE = Mark("a resumed run may differ in this field")
INPUT = Mark("a file or folder that the command reads: --overwrite does not replace it")
LOWER_IF_MEMORY_RUNS_OUT = Mark("a lower number here needs less memory")
GIVE_IF_MEMORY_RUNS_OUT = Mark("this flag, given, saves memory, and a resumed run may give it")


def marked(config: Any, mark: Mark) -> list[str]:
    """The names of the config's fields that have the mark, in their order."""
    hints = get_type_hints(type(config), include_extras=True)
    return [field.name for field in dataclasses.fields(config) if mark in get_args(hints[field.name])]


def flag_of(name: str) -> str:
    """The flag of a field: "max_new_tokens" -> "--max-new-tokens"."""
    return "--" + name.replace("_", "-")


# ------------------------------------------------------------------------------------------ running a command

def run(*commands: tuple[type, Main], default: str | None = None, argv: list[str] | None = None) -> None:
    """Parse the command line into a config and call its main; `commands` are (config class, main) pairs.

    With several commands the first word chooses one by the name of its main; a command line that begins with
    a flag is one of the `default` command. BadInput and file errors end the program with one line on stderr
    and exit code 2.
    """
    argv = sys.argv[1:] if argv is None else argv
    if default is not None and _names_no_command(argv):
        argv = [default, *argv]
    config_class, main, values = _parse(commands, argv)
    config = None
    try:
        config = config_class(**values)
        check_device(config)
        if getattr(config, "out", None) is not None:
            refuse_input(config.out, config)
        _call(main, config)
        ranks.leave()
    except (BadInput, OSError, MemoryError, RuntimeError, Stopped, KeyboardInterrupt) as error:
        message, code = _last_word(config, error)
        if message:
            print(message, file=sys.stderr)
        ranks.end(code)


def _call(main: Main, config: Any) -> None:
    try:
        main(config)
    except Complete as complete:
        print(complete)


def check_device(config: Any) -> None:
    """Raise BadInput unless this machine has the config's `device`."""
    name = getattr(config, "device", "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadInput(f"--device {name}: no such kind of device; give cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BadInput(f"--device {name}: this PyTorch finds no GPU; "
                       "give --device cpu, or install a build of torch for CUDA")


def refuse_input(out: str | Path, config: Any) -> None:
    """Raise BadInput if the file `out` is one that the command reads, as --overwrite would replace it."""
    out = Path(out)
    if not out.is_file():
        return
    for flag, path in inputs_of(config):
        if out.resolve().is_relative_to(path.resolve()):  # it is that file, or in that folder
            raise BadInput(f"{out}: is read, as {flag} {path}; give another --out")


def inputs_of(config: Any) -> Iterator[tuple[str, Path]]:
    """(flag, path) of each file and folder that the command reads, by the config's fields marked INPUT."""
    for name in marked(config, INPUT):
        value = getattr(config, name)
        paths = value if isinstance(value, tuple) else (value,)
        for path in paths:
            if path:
                yield flag_of(name), Path(path)


def resolved(config: Any) -> dict:
    """The config as a dict that JSON holds, for printing and for saving beside the output."""
    values = dataclasses.asdict(config)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def print_config(config: Any) -> None:
    print("config:", json.dumps(resolved(config), ensure_ascii=False))


def print_table(title: str, counts: Counter) -> None:
    """Counts by name, what was kept first."""
    print(f"\n{title}")
    width = max([50, *map(len, counts)])
    for name in sorted(counts, key=lambda name: (not name.startswith("kept"), name)):
        if counts[name]:
            print(f"  {name:<{width}} {counts[name]:>9,}")


# ----------------------------------------------------------------------------------------- errors of one line

def _last_word(config: Any, error: BaseException) -> tuple[str, int]:
    """The message of an error that ends the program, and the exit code. A defect is raised again."""
    if isinstance(error, BadInput):
        return _one_line(str(error)), EXIT_BAD_INPUT
    if isinstance(error, OSError):
        return _one_line(_file_error(error)), EXIT_BAD_INPUT
    if isinstance(error, Stopped):
        return "" if ranks.rank() else str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return _interrupted(config), EXIT_INTERRUPTED
    if ranks.is_lost(error):
        return _one_line(_lost_rank(error)), EXIT_LOST_RANK
    if _is_out_of_memory(error):
        return _one_line(out_of_memory(config, error)), EXIT_BAD_INPUT
    if re.search(r"C(\+\+)? compiler", str(error)):  # the words of Triton and of torch.compile
        return _one_line(NO_COMPILER), EXIT_BAD_INPUT
    raise error


def _lost_rank(error: BaseException) -> str:
    return (f"rank {ranks.rank()} has lost another rank ({str(error)[:120]}); "
            "what is saved is whole: give the same command with --resume to go on")


def _file_error(error: OSError) -> str:
    remedy = ""
    if error.errno in DISK_IS_FULL:
        remedy = ("; make room. What was saved before is whole: with --resume, where the command has it, "
                  "the run goes on from there")
    return f"{error.filename or 'output'}: {error.strerror or error}{remedy}"


def _interrupted(config: Any) -> str:
    if not hasattr(config, "resume"):
        return "interrupted"
    return "interrupted; what is written is whole: give the same command with --resume to go on"


def _is_out_of_memory(error: BaseException) -> bool:
    """NumPy and Python raise MemoryError, PyTorch a RuntimeError of which only the message tells."""
    if isinstance(error, MemoryError):
        return True
    return re.search("out of memory|can't allocate memory", str(error)) is not None


def out_of_memory(config: Any, error: BaseException) -> str:
    """The message of an error of memory: it names the field to lower, with its value."""
    remedy = "give it less at a time"
    to_lower = marked(config, LOWER_IF_MEMORY_RUNS_OUT)
    if to_lower:
        remedy = f"lower {flag_of(to_lower[0])} (now {getattr(config, to_lower[0])})"
    for name in marked(config, GIVE_IF_MEMORY_RUNS_OUT):
        if not getattr(config, name):
            remedy += f" or give {flag_of(name)}, with which --resume goes on too"
    reason = str(error)[:100] or type(error).__name__
    return f"out of memory ({reason}): {remedy}; what was saved before is whole"


def _one_line(message: str) -> str:
    """An error's line. Text of a file in it cannot break the line, nor flood or steer the terminal."""
    if len(message) > LONGEST_MESSAGE:
        message = f"{message[:1500]} ... {message[-400:]}"
    shown = "".join(c if c.isprintable() else " " for c in message)
    who = f" of rank {ranks.rank()}" if ranks.rank() else ""
    return f"error{who}: {shown}"


# ---------------------------------------------------------------------------------------------- parsing

def _names_no_command(argv: list[str]) -> bool:
    """Is there no first word, or is it a flag, but not one that asks for the help on all commands?"""
    return not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help"))


def _parse(commands: Sequence[tuple[type, Main]], argv: list[str]) -> tuple[type, Main, dict]:
    """The chosen command's config class and main, and the values of the flags that were given."""
    by_name = {main.__name__: (config_class, main) for config_class, main in commands}
    values = vars(_make_parser(by_name).parse_args(argv))
    first_name = next(iter(by_name))
    config_class, main = by_name[values.pop("command", first_name)]
    given = {}
    for name, value in values.items():
        if value is not None:  # else the dataclass has the default
            given[name] = tuple(value) if isinstance(value, list) else value
    return config_class, main, given


def _make_parser(by_name: dict[str, tuple[type, Main]]) -> argparse.ArgumentParser:
    """A parser with the flags of the only command, or with a parser for each of several."""
    first_class, first_main = next(iter(by_name.values()))
    # no abbreviations: a new flag must not change what an old command means
    layout = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    script = sys.modules[first_main.__module__]
    parser = argparse.ArgumentParser(description=script.__doc__, **layout)
    if len(by_name) == 1:
        _add_flags(parser, first_class)
        return parser
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, (config_class, main) in by_name.items():
        first_paragraph = " ".join(main.__doc__.split("\n\n")[0].split())
        first_sentence = first_paragraph.split(". ")[0].rstrip(".")
        subparser = subparsers.add_parser(name, help=first_sentence, description=main.__doc__, **layout)
        _add_flags(subparser, config_class)
    return parser


def _add_flags(parser: argparse.ArgumentParser, config_class: type) -> None:
    """One flag for each field."""
    hints = get_type_hints(config_class, include_extras=True)
    for field in dataclasses.fields(config_class):
        _add_flag(parser, field, hints[field.name])


def _add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field, hint: Any) -> None:
    """The flag of one field: its annotation tells the type, the help, and the range or the choices."""
    kind, help_text, *more = get_args(hint)
    limits = next((item for item in more if isinstance(item, tuple)), None)
    if field.default not in (dataclasses.MISSING, None, (), ""):
        help_text += f" (default: {_shown(field.default)})"
    options: dict[str, Any] = {
        "required": field.default is dataclasses.MISSING,
        "help": help_text.replace("%", "%%"),
        "default": None,
    }
    if get_origin(kind) in (Union, UnionType):  # int | None -> int
        kind = next(member for member in get_args(kind) if member is not NoneType)
    if kind is bool:
        parser.add_argument(flag_of(field.name), action=argparse.BooleanOptionalAction, **options)
        return
    if get_origin(kind) is tuple:  # tuple[int, ...] -> int, several times
        kind = get_args(kind)[0]
        options["nargs"] = "+"
        options["action"] = "extend"
    if limits and isinstance(limits[0], str):
        options["choices"] = limits
    else:
        options["metavar"] = kind.__name__.upper()
        if limits:
            kind = _in_range(kind, *limits)
    parser.add_argument(flag_of(field.name), type=kind, **options)


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _in_range(kind: type, low: Any, high: Any) -> Callable[[str], Any]:
    """A parser for argparse that refuses numbers outside [low, high], and nan."""
    if high is None:
        bounds = f"at least {low}"
    elif low is None:
        bounds = f"at most {high}"
    else:
        bounds = f"from {low} to {high}"

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind.__name__}") from None
        high_enough = low is None or value >= low
        low_enough = high is None or value <= high
        if not (high_enough and low_enough):  # nan is neither
            raise argparse.ArgumentTypeError(f"{text} is out of range: give a number {bounds}")
        return value
    return parse
