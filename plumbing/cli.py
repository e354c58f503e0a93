"""Command lines made from dataclasses, and errors of one line.

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
import re
import sys
from types import UnionType
from typing import Any, Callable, Union, get_args, get_origin, get_type_hints

import torch

from plumbing import ranks
from plumbing.errors import BadInput, Complete, Stopped

EXIT_BAD_INPUT = 2
EXIT_LOST_RANK = 3
# where and how a model is asked: a resumed run may differ in these
HOW = ("server", "concurrency", "timeout", "retries", "api_key_env", "rank_timeout")


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
