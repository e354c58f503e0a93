"""Command lines from dataclasses, errors that name file and line, outputs that are whole or absent."""
import errno
import json
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
import torch

from conftest import ROOT
from plumbing import cli
from plumbing import files as plumbing_files
from plumbing.cli import (
    GIVE_IF_MEMORY_RUNS_OUT,
    LOWER_IF_MEMORY_RUNS_OUT,
    MAY_CHANGE,
    marked,
)
from plumbing.errors import BadInput, Complete
from plumbing.journal import Journal

# ---------------------------------------------------------------------------------------------- command lines

@dataclass(frozen=True)
class Config:
    model: Annotated[str, "a folder"]
    out: Annotated[str | None, "a file"] = None
    k: Annotated[int, "samples", (1, None)] = 10
    top_p: Annotated[float, "nucleus, of 100%", (0.0, 1.0)] = 0.95
    seed: Annotated[int | None, "seed"] = None
    at: Annotated[tuple[int, ...], "values of k"] = (1, 10)
    device: Annotated[str, "where", ("cpu", "meta")] = "cpu"
    force: Annotated[bool, "force a verdict"] = True


@dataclass(frozen=True)
class Other:
    steps: Annotated[int, "steps"] = 3


def parse(*argv: str) -> Config:
    """The config that `cli.run` makes of a command line."""
    got = []

    def main(config: Config) -> None:
        """Take the config."""
        got.append(config)
    cli.run((Config, main), argv=list(argv))
    return got[0]


def refused(capsys, *argv: str) -> str:
    """What stands on stderr when the command line is refused: with exit code 2 and without a traceback."""
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in error
    return error


def test_defaults_come_from_the_dataclass():
    assert parse("--model", "m") == Config(model="m")


def test_every_field_is_a_flag_of_its_type():
    got = parse("--model", "m", "--out", "o", "--k", "3", "--top-p", "0.5", "--seed", "7",
                "--at", "2", "4", "8", "--device", "meta", "--no-force")
    assert got == Config("m", "o", 3, 0.5, 7, (2, 4, 8), "meta", False)
    assert parse("--model", "m", "--force").force is True


def test_tuple_fields_are_tuples():
    assert parse("--model", "m", "--at", "5").at == (5,)
    twice = parse("--model", "m", "--at", "5", "6", "--at", "7")
    assert twice.at == (5, 6, 7)  # nothing is lost
    assert isinstance(parse("--model", "m").at, tuple)


@pytest.mark.parametrize("argv, names", [
    (["--model", "m", "--modle", "m"], "--modle"),
    # no abbreviations: a new flag must not change what an old command means
    (["--model", "m", "--top", "0.5"], "--top "),
    (["--model", "m", "--top_p", "0.5"], "--top_p"),
    (["--model", "m", "stray"], "stray"),
    ([], "--model"),
    (["--model", "m", "--k", "0"], "--k"),
    (["--model", "m", "--k", "2.5"], "--k"),
    (["--model", "m", "--k"], "--k"),
    (["--model", "m", "--top-p", "1.01"], "--top-p"),
    (["--model", "m", "--top-p", "-0.01"], "--top-p"),
    (["--model", "m", "--top-p", "nan"], "--top-p"),
    (["--model", "m", "--seed", "x"], "--seed"),
    (["--model", "m", "--at"], "--at"),
    (["--model", "m", "--at", "1", "x"], "--at"),
    (["--model", "m", "--device", "tpu"], "--device"),
    (["--model", "m", "--force", "yes"], "yes"),
])
def test_bad_flags_are_refused_by_name(capsys, argv, names):
    assert names in refused(capsys, *argv).splitlines()[-1]


def test_a_range_is_told_and_includes_its_ends(capsys):
    assert "from 0.0 to 1.0" in refused(capsys, "--model", "m", "--top-p", "2")
    assert "at least 1" in refused(capsys, "--model", "m", "--k", "-3")
    assert parse("--model", "m", "--top-p", "1", "--k", "1").top_p == 1.0
    assert parse("--model", "m", "--top-p", "0").top_p == 0.0


def test_help_shows_each_flag_with_its_text_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "--top-p FLOAT nucleus, of 100% (default: 0.95)" in text
    assert "--at INT [INT ...] values of k (default: 1 10)" in text
    assert "--no-force" in text


def test_the_first_word_chooses_the_command(capsys):
    called = []

    def cases(config: Config) -> None:
        """Make cases."""
        called.append(("cases", config))

    def pairs(config: Other) -> None:
        """Make pairs."""
        called.append(("pairs", config))
    commands = (Config, cases), (Other, pairs)
    cli.run(*commands, argv=["pairs", "--steps", "5"])
    cli.run(*commands, argv=["cases", "--model", "m"])
    assert called == [("pairs", Other(5)), ("cases", Config("m"))]
    for argv in ([], ["nothing"], ["pairs", "--model", "m"]):
        with pytest.raises(SystemExit) as stop:
            cli.run(*commands, argv=argv)
        assert stop.value.code == 2
    assert len(called) == 2 and "Traceback" not in capsys.readouterr().err


def test_a_command_line_that_begins_with_a_flag_is_one_of_the_default_command(capsys):
    called = []

    def cases(config: Config) -> None:
        """Make cases."""
        called.append(config)

    def pairs(config: Other) -> None:
        """Make pairs, whose
        first sentence goes on. The second is for --help of pairs."""
        called.append(config)
    commands = (Config, cases), (Other, pairs)
    cli.run(*commands, default="cases", argv=["--model", "m"])
    cli.run(*commands, default="cases", argv=["cases", "--model", "pairs"])
    cli.run(*commands, default="pairs", argv=[])
    cli.run(*commands, default="cases", argv=["pairs", "--steps", "5"])
    assert called == [Config("m"), Config("pairs"), Other(), Other(5)]
    for argv, code, said in ((["nothing", "--model", "m"], 2, "invalid choice: 'nothing'"), (["--steps", "5"], 2, "--model"),
                             (["--help"], 0, "Make pairs, whose first sentence goes on\n")):
        with pytest.raises(SystemExit) as stop:
            cli.run(*commands, default="cases", argv=argv)
        assert stop.value.code == code
        printed = capsys.readouterr()
        assert said in printed.out + printed.err


SCRIPT = '''"""A script that fails."""
from dataclasses import dataclass
from typing import Annotated
from plumbing import cli
from plumbing.errors import BadInput

@dataclass(frozen=True)
class Config:
    path: Annotated[str, "a file"]

def main(config):
    open(config.path).close()
    raise BadInput("samples.jsonl:3: field 'verdict' is missing;\\nadd it")

cli.run((Config, main))
'''


@pytest.mark.slow
def test_a_script_ends_with_one_line_and_exit_code_2(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    for path, said in (("no/such/file", "no/such/file: No such file or directory"),
                       (str(script), "samples.jsonl:3: field 'verdict' is missing; add it")):
        done = subprocess.run([sys.executable, script, "--path", path], capture_output=True, text=True,
                              env={"PYTHONPATH": str(ROOT)})
        assert (done.returncode, done.stderr, done.stdout) == (2, f"error: {said}\n", "")


def test_what_a_file_says_neither_breaks_nor_floods_the_line_nor_steers_the_terminal(capsys):
    def main(config):
        raise BadInput("rows.jsonl:1: found \x1b[2J\r\u2028\x85" + "x" * 10 ** 6 + "; correct it")
    with pytest.raises(SystemExit):
        cli.run((Config, main), argv=["--model", "m"])
    said = capsys.readouterr().err
    assert said.startswith("error: rows.jsonl:1: found  [2J   xxx") and said.endswith("x; correct it\n")
    assert len(said) < 2000


@dataclass(frozen=True)
class Training:
    batch_size: Annotated[int, "examples"] = 128
    micro_tokens: Annotated[int, "tokens", (1, None), LOWER_IF_MEMORY_RUNS_OUT] = 8192
    checkpoint_activations: Annotated[bool, "less memory", GIVE_IF_MEMORY_RUNS_OUT] = False


@dataclass(frozen=True)
class SamplingJob:
    batch_size: Annotated[int, "cases", LOWER_IF_MEMORY_RUNS_OUT] = 16


def run_out_of_gpu_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("fail", [
    lambda: torch.empty(2 ** 60, dtype=torch.uint8),
    lambda: np.empty(2 ** 60, dtype=np.uint8),
    lambda: bytearray(2 ** 60),
    run_out_of_gpu_memory,
])
def test_out_of_memory_says_what_to_lower(capsys, fail):
    for config, said in ((Training, "lower --micro-tokens (now 4096) or give --checkpoint-activations"),
                         (SamplingJob, "lower --batch-size (now 16); ")):
        with pytest.raises(SystemExit) as stop:
            cli.run((config, lambda _: fail()), argv=["--micro-tokens", "4096"] if config is Training else [])
        [error] = capsys.readouterr().err.strip().split("\n")
        assert stop.value.code == 2 and error.startswith("error: out of memory (") and said in error


@pytest.mark.parametrize("words", [
    "Failed to find C compiler. Please specify via CC environment variable.",
    "InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx",
])
def test_a_machine_without_a_compiler_is_told_of_plain(capsys, words):
    def main(config):
        raise RuntimeError(words)
    with pytest.raises(SystemExit) as stop:
        cli.run((Other, main), argv=[])
    [error] = capsys.readouterr().err.strip().split("\n")
    assert stop.value.code == 2 and error.startswith("error: no C compiler") and error.endswith("give --plain")


def test_out_of_memory_without_a_setting_to_lower(capsys):
    """Nor is a flag recommended that was given."""
    def main(config):
        raise MemoryError
    with pytest.raises(SystemExit):
        cli.run((Other, main), argv=[])
    assert capsys.readouterr().err == ("error: out of memory (MemoryError): give it less at a time; "
                                       "what was saved before is whole\n")
    with pytest.raises(SystemExit):
        cli.run((Training, main), argv=["--checkpoint-activations"])
    assert "lower --micro-tokens (now 8192); what" in capsys.readouterr().err


def test_a_mark_is_found_and_is_no_range(capsys):
    """Wherever it stands behind the help; the flag's range, choices and default are those of the rest."""
    @dataclass(frozen=True)
    class Marked:
        at: Annotated[tuple[int, ...], "several", (1, None), MAY_CHANGE] = (3,)
        kind: Annotated[str, "one of two", MAY_CHANGE, ("a", "b")] = "a"
        fast: Annotated[bool, "sooner", MAY_CHANGE] = False
        seed: Annotated[int, "seed", LOWER_IF_MEMORY_RUNS_OUT] = 0
    got = []

    def take(config):
        got.append(config)
    for argv in ([], ["--at", "1", "2", "--kind", "b", "--fast", "--seed", "-5"]):
        cli.run((Marked, take), argv=argv)
    assert got == [Marked(), Marked((1, 2), "b", True, -5)]
    assert marked(got[0], MAY_CHANGE) == ["at", "kind", "fast"]
    assert marked(got[0], LOWER_IF_MEMORY_RUNS_OUT) == ["seed"]
    for argv in (["--at", "0"], ["--kind", "c"]):
        with pytest.raises(SystemExit):
            cli.run((Marked, take), argv=argv)
        assert argv[0] in capsys.readouterr().err


def test_flags_that_do_not_go_together_are_one_line(capsys):
    """A config may refuse its own values."""
    @dataclass(frozen=True)
    class Refusing:
        first: Annotated[bool, "not with --second"] = False
        second: Annotated[bool, "not with --first"] = False

        def __post_init__(self):
            if self.first and self.second:
                raise BadInput("--first has no meaning with --second; leave it out")
    with pytest.raises(SystemExit) as stop:
        cli.run((Refusing, lambda config: None), argv=["--first", "--second"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: --first has no meaning with --second; leave it out\n"


def test_an_error_in_the_program_is_not_hidden():
    """Only what the user gave is reported in one line; a bug keeps its traceback."""
    def main(config):
        raise ZeroDivisionError

    def shapes(config):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(ZeroDivisionError):
        cli.run((Other, main), argv=[])
    with pytest.raises(RuntimeError, match="shapes"):
        cli.run((Other, shapes), argv=[])


def test_the_resolved_config_is_json(capsys):
    cli.print_config(Config("m", at=(1, 2)))
    line = capsys.readouterr().out
    assert line.startswith("config: ") and json.loads(line.removeprefix("config: "))["at"] == [1, 2]


# ---------------------------------------------------------------------------------------------- reading

def says(error: pytest.ExceptionInfo, *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message


def test_read_jsonl_gives_each_object_with_its_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n  \n{"text": "line\u2028separator, é"}', encoding="utf-8")
    found = list(plumbing_files.read_jsonl(path))
    assert found == [(f"{path}:1", {"a": 1}), (f"{path}:4", {"text": "line\u2028separator, é"})]


@pytest.mark.parametrize("line", [
    pytest.param(b'{"a": 1', id="torn"),
    pytest.param(b"nonsense", id="no JSON"),
    pytest.param(b'{"a": "\xff"}', id="not UTF-8"),
    pytest.param(b'{"a": "\\ud800"}', id="lone surrogate"),
    pytest.param(b"[1, 2]", id="list"),
    pytest.param(b"3", id="number"),
    pytest.param(b"[" * 100_000, id="too deep"),
])
def test_read_jsonl_names_file_and_line(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b'\n{"a": 2}\n')
    rows = plumbing_files.read_jsonl(path)
    assert next(rows)[1] == {"a": 1}
    with pytest.raises(BadInput) as error:
        next(rows)
    says(error, f"{path}:3: ")


def test_a_missing_file_is_named(tmp_path):
    for read in (plumbing_files.read_json, lambda path: next(plumbing_files.read_jsonl(path))):
        with pytest.raises(BadInput) as error:
            read(tmp_path / "none.json")
        says(error, str(tmp_path / "none.json"), "no such file")


def test_read_json_names_the_broken_file(tmp_path):
    (tmp_path / "a.json").write_text("{", encoding="utf-8")
    with pytest.raises(BadInput) as error:
        plumbing_files.read_json(tmp_path / "a.json")
    says(error, str(tmp_path / "a.json"))


@pytest.mark.parametrize("kind, good, bad", [
    (str, "x", 3), (int, 3, 3.5), (int, -1, True), (float, 0.5, "0.5"), (float, 1, None), (float, 1.0, False),
    (dict, {}, []), (list, [], {}), (bool, False, 0), (str, "", None)])
def test_a_field_must_be_of_its_kind(kind, good, bad):
    assert plumbing_files.get_field({"f": good}, "f", kind, "a.jsonl:7") == good
    with pytest.raises(BadInput) as error:
        plumbing_files.get_field({"f": bad}, "f", kind, "a.jsonl:7")
    says(error, "a.jsonl:7: field 'f'", plumbing_files.NAMES[kind])


def test_a_missing_field_is_named_with_those_found():
    with pytest.raises(BadInput) as error:
        plumbing_files.get_field({"id": 1, "text": 2}, "label", bool, "a.jsonl:7")
    says(error, "a.jsonl:7: field 'label' is missing", "id, text")


# ---------------------------------------------------------------------------------------------- writing

def files(folder) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}


def test_writing_makes_the_file_and_its_folder(tmp_path):
    with plumbing_files.writing(tmp_path / "new" / "a.txt") as file:
        file.write("é\n")
    assert files(tmp_path / "new") == {"a.txt": "é\n"}


@pytest.mark.parametrize("error", [ValueError, BadInput, KeyboardInterrupt])
def test_writing_leaves_nothing_after_an_error(tmp_path, error):
    with pytest.raises(error), plumbing_files.writing(tmp_path / "a.txt") as file:
        file.write("half")
        raise error
    assert files(tmp_path) == {}


def test_writing_keeps_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(ValueError), plumbing_files.writing(path) as file:
        file.write("half")
        file.flush()
        assert path.read_text(encoding="utf-8") == "old"
        raise ValueError
    assert files(tmp_path) == {"a.txt": "old"}
    with plumbing_files.writing(path) as file:
        file.write("new")
    assert files(tmp_path) == {"a.txt": "new"}


def test_written_json_reads_back(tmp_path):
    value = {"text": "é\u2028\n", "list": [1, 2.5, None, True]}
    plumbing_files.write_json(tmp_path / "a.json", value)
    assert plumbing_files.read_json(tmp_path / "a.json") == value
    line = plumbing_files.json_line(value)
    assert line.count("\n") == 1 and json.loads(line) == value


@pytest.mark.parametrize("out", ["file/out.jsonl", "file/new/out.jsonl"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, out):
    """A root may write everywhere, so a file stands here where a folder is needed."""
    (tmp_path / "file").touch()
    with pytest.raises(BadInput) as error:
        plumbing_files.refuse_existing(tmp_path / out, overwrite=False)
    says(error, str(tmp_path / out), "cannot be written", "Not a directory")
    plumbing_files.refuse_existing(tmp_path / "new/folder/out.jsonl", overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # and looking leaves nothing


def test_an_output_that_is_a_folder_is_refused(tmp_path):
    for overwrite in (False, True):
        with pytest.raises(BadInput) as error:
            plumbing_files.refuse_existing(tmp_path, overwrite)
        says(error, str(tmp_path), "is a folder")


@dataclass(frozen=True)
class Reading:
    out: Annotated[str, "written"]
    files: Annotated[tuple[str, ...], "read", cli.INPUT] = ()
    one: Annotated[str | None, "read", cli.INPUT] = None


def test_an_output_that_is_read_is_refused(tmp_path, capsys, monkeypatch):
    """The file itself, by another name, or one in a folder that is read; --overwrite would replace it."""
    (tmp_path / "folder").mkdir()
    inputs = [tmp_path / "a", tmp_path / "folder/b"]
    for path in inputs:
        path.write_text("input")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    calls = []

    def keep(config):
        """Keep it."""
        calls.append(config)

    def code_of(*argv) -> int | None:
        try:
            cli.run((Reading, keep), argv=[str(word) for word in argv])
        except SystemExit as end:
            return end.code
    for out, flags in ((inputs[0], ["--files", inputs[1], inputs[0]]), (inputs[0], ["--one", tmp_path / "link"]),
                       (tmp_path / "link", ["--one", inputs[0]]), (inputs[1], ["--one", tmp_path / "folder"])):
        assert code_of("--out", out, *flags) == 2 and not calls
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"{out}: is read, as {flags[0]} ") or line.startswith(f"error: {out}: is read, as {flags[0]} ")
    assert code_of("--out", tmp_path / "new", "--one", inputs[0]) is None
    assert code_of("--out", inputs[0], "--one", inputs[1]) is None
    assert len(calls) == 2 and [path.read_text() for path in inputs] == ["input", "input"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_write_that_fails_names_its_file(tmp_path):
    (tmp_path / "out.jsonl.part").symlink_to("/dev/full")
    with pytest.raises(OSError) as error, Journal(tmp_path / "out.jsonl", OVERWRITE, MANY) as journal:
        journal.write({"n": 0})
    assert error.value.filename == str(journal.part) and error.value.errno == errno.ENOSPC


def test_an_existing_output_is_refused_unless_overwritten(tmp_path):
    plumbing_files.refuse_existing(tmp_path / "a", overwrite=False)
    (tmp_path / "a").touch()
    plumbing_files.refuse_existing(tmp_path / "a", overwrite=True)
    with pytest.raises(BadInput) as error:
        plumbing_files.refuse_existing(tmp_path / "a", overwrite=False)
    says(error, str(tmp_path / "a"), "--overwrite")


# ----------------------------------------------------------------------------------------- a resumable output

MANY = 10 ** 6  # items, more than any test writes lines

@dataclass(frozen=True)
class Job:
    seed: int = 0
    at: tuple[int, ...] = (1, 2)
    max_steps: int = 3
    resume: bool = False
    overwrite: bool = False


RESUME, OVERWRITE = Job(resume=True), Job(overwrite=True)


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


@pytest.fixture
def killed(tmp_path):
    """OUT of a run that died in the middle of its third line."""
    out = tmp_path / "out.jsonl"
    with pytest.raises(RuntimeError), Journal(out, Job(), MANY) as journal:
        journal.write({"n": 0})
        journal.write({"n": 1, "text": "é\u2028"})
        raise RuntimeError
    with open(f"{out}.part", "ab") as file:
        file.write('{"n": 2, "text": "é'.encode()[:-1])  # torn within a character
    return out


def test_a_journal_becomes_the_output_at_the_end(tmp_path):
    out = tmp_path / "new" / "out.jsonl"
    with Journal(out, Job(), MANY) as journal:
        assert journal.done == 0
        journal.write({"n": 0})
        assert rows(journal.part) == [{"n": 0}] and not out.exists()  # a kill now would lose nothing
    assert rows(out) == [{"n": 0}]
    assert {path.name for path in out.parent.iterdir()} == {"out.jsonl", "out.jsonl.config.json"}
    assert plumbing_files.read_json(f"{out}.config.json") == {"seed": 0, "at": [1, 2], "max_steps": 3}


def test_a_killed_run_resumes_after_its_last_whole_line(killed):
    assert not killed.exists()
    with Journal(killed, RESUME, MANY) as journal:
        assert journal.done == 2
        journal.write({"n": 2})
    assert [row["n"] for row in rows(killed)] == [0, 1, 2]
    assert not journal.part.exists()


def test_resuming_twice_loses_nothing(killed):
    for n in (2, 3):
        with pytest.raises(RuntimeError), Journal(killed, RESUME, MANY) as journal:
            assert journal.done == n
            journal.write({"n": n})
            raise RuntimeError
    with Journal(killed, RESUME, MANY) as journal:
        pass
    assert [row["n"] for row in rows(killed)] == [0, 1, 2, 3]


@pytest.mark.parametrize("changed", [{"seed": 1}, {"at": (1, 2, 3)}, {"max_steps": 4}])
def test_a_changed_config_is_not_resumed(killed, changed):
    before = {p.name: p.read_bytes() for p in killed.parent.iterdir()}
    with pytest.raises(BadInput) as error:
        Journal(killed, replace(RESUME, **changed), MANY)
    says(error, "--" + next(iter(changed)).replace("_", "-"), f"{killed}.config.json")
    assert {p.name: p.read_bytes() for p in killed.parent.iterdir()} == before


def test_a_field_that_may_change_is_resumed(tmp_path):
    """It is saved all the same, and what it was is no reason to refuse."""
    @dataclass(frozen=True)
    class Marked(Job):
        address: Annotated[str, "where", MAY_CHANGE] = "here"
    out = tmp_path / "out.jsonl"
    with pytest.raises(RuntimeError), Journal(out, Marked(), MANY) as journal:
        journal.write({"n": 0})
        raise RuntimeError
    assert plumbing_files.read_json(f"{out}.config.json")["address"] == "here"
    assert Journal(out, Marked(address="there", resume=True), MANY).done == 1
    with pytest.raises(BadInput, match="another --seed"):
        Journal(out, Marked(seed=1, address="there", resume=True), MANY)


def test_an_unfinished_run_is_not_thrown_away_unasked(killed):
    with pytest.raises(BadInput) as error:
        Journal(killed, Job(), MANY)
    says(error, f"{killed}.part", "--resume", "--overwrite")
    with Journal(killed, OVERWRITE, MANY) as journal:
        assert journal.done == 0
    assert rows(killed) == []


def test_a_complete_output_is_neither_resumed_nor_replaced(tmp_path):
    out = tmp_path / "out.jsonl"
    with Journal(out, Job(), MANY) as journal:
        journal.write({"n": 0})
    for config, items, kind, word in (
        (RESUME, [{"n": 0}], Complete, ": is complete already"),
        (Job(), [], BadInput, ": exists already"),
        (Job(seed=1, resume=True), [], BadInput, "another --seed"),
        # the input is another one by now
        (RESUME, [{"n": 1}], BadInput, ":1: field 'n'"),
        (RESUME, [], BadInput, ":1: field 'id'"),
        (RESUME, [{"n": 0}, {"n": 1}], BadInput, "1 more items"),
    ):
        with pytest.raises(kind) as error:
            list(Journal(out, config, MANY).check(items))
        says(error, str(out), word, "--overwrite")
    assert rows(out) == [{"n": 0}]


def test_overwriting_keeps_the_old_output_until_the_end(tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text('{"old": 1}\n', encoding="utf-8")
    with Journal(out, OVERWRITE, MANY) as journal:
        journal.write({"n": 0})
        assert rows(out) == [{"old": 1}]
    assert rows(out) == [{"n": 0}]


def test_resume_without_an_earlier_run_starts_one(tmp_path):
    with Journal(tmp_path / "out.jsonl", RESUME, MANY) as journal:
        assert journal.done == 0
    assert rows(tmp_path / "out.jsonl") == []


@pytest.mark.parametrize("content", [None, "{", "[]"], ids=["missing", "broken", "no object"])
def test_a_spoilt_config_of_the_killed_run_is_named(killed, content):
    path = killed.with_name(killed.name + ".config.json")
    path.unlink() if content is None else path.write_text(content, encoding="utf-8")
    with pytest.raises(BadInput) as error:
        Journal(killed, RESUME, MANY)
    says(error, str(path))


def test_a_broken_whole_line_is_an_error_and_not_dropped(killed):
    with open(f"{killed}.part", "ab") as file:
        file.write(b'\n{"n": 3}\n')  # the torn line is now a line of its own
    with pytest.raises(BadInput) as error:
        list(Journal(killed, RESUME, MANY).check({} for _ in range(4)))
    says(error, f"{killed}.part:3")


@pytest.mark.parametrize("round_size, kept", [(1, 5), (2, 4), (3, 3), (4, 4), (6, 0)])
def test_lines_count_in_whole_rounds(tmp_path, round_size, kept):
    out = tmp_path / "out.jsonl"
    with pytest.raises(RuntimeError), Journal(out, Job(), MANY) as journal:
        for n in range(5):
            journal.write({"n": n})
        raise RuntimeError
    with Journal(out, RESUME, MANY, round_size) as journal:
        assert journal.done == kept
        journal.write({"n": "new"})
    assert [row["n"] for row in rows(out)] == [*range(kept), "new"]


def test_all_lines_count_if_there_is_one_for_each_item(tmp_path):
    """Killed between its last line and the renaming: a last round that is shorter than the others is whole."""
    out = tmp_path / "out.jsonl"
    with pytest.raises(RuntimeError), Journal(out, Job(), 5, 3) as journal:
        for n in range(5):
            journal.write({"n": n})
        raise RuntimeError
    with Journal(out, RESUME, 5, 3) as journal:
        assert journal.done == 5
    assert [row["n"] for row in rows(out)] == [*range(5)]


def test_lines_must_be_those_of_the_items(killed):
    """Those that are come out; the items after them are gone through too."""
    items = iter([{"n": 0}, {"n": 1}, {"n": 2}, {"n": 3}])
    found = list(Journal(killed, RESUME, MANY).check(items))
    assert found == [(f"{killed}.part:1", {"n": 0}), (f"{killed}.part:2", {"n": 1, "text": "é\u2028"})]
    assert list(items) == []
    for items, said in (
        ([{"n": 0}, {"n": 1, "text": "e"}], ":2: field 'text'"),
        ([{"n": 1}], ":1: field 'n'"),
        ([{"n": 0}], ":2: field"),
    ):
        with pytest.raises(BadInput) as error:
            list(Journal(killed, RESUME, MANY).check(items))
        says(error, f"{killed}.part{said}")


def test_a_killed_overwriting_goes_on(tmp_path):
    """The old output is still there, and no sign of a complete run. Without a line, --resume begins anew."""
    out = tmp_path / "out.jsonl"
    out.write_text('{"old": 1}\n', encoding="utf-8")
    with pytest.raises(RuntimeError), Journal(out, OVERWRITE, MANY) as journal:
        journal.write({"n": 0})
        raise RuntimeError
    for config in (RESUME, replace(RESUME, overwrite=True)):
        assert Journal(out, config, MANY).done == 1
    with Journal(out, RESUME, MANY) as journal:
        journal.write({"n": 1})
    assert rows(out) == [{"n": 0}, {"n": 1}]
    Path(f"{out}.part").touch()  # killed between making the part and writing the config
    with Journal(out, replace(OVERWRITE, resume=True, seed=5), MANY) as journal:
        journal.write({"n": 2})
    assert rows(out) == [{"n": 2}] and plumbing_files.read_json(f"{out}.config.json")["seed"] == 5


def test_lines_are_read_on_demand(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"a": 0}\n\n \r\n{"a": "é\u2028"}\n[1]\n{"a": 2}'.encode())
    lines = plumbing_files.Lines(path)
    assert len(lines) == 4
    assert lines[3] == (f"{path}:6", {"a": 2})
    assert lines[1] == (f"{path}:4", {"a": "é\u2028"})
    assert lines[0][1] == {"a": 0}
    with pytest.raises(BadInput) as error:
        lines[2]
    says(error, f"{path}:5: expected an object")
    with pytest.raises(BadInput) as error:
        plumbing_files.Lines(tmp_path / "absent")
    says(error, "no such file")


# ------------------------------------------------------------------------------------- devices, interruptions

@dataclass(frozen=True)
class OnDevice:
    device: Annotated[str, "where to run"] = "cpu"
    resume: Annotated[bool, "go on"] = False


@pytest.mark.parametrize("device, said", [
    ("gpu", "no such kind of device"),
    ("cuda:x", "no such kind of device"),
    ("cuda", "finds no GPU"),
])
def test_a_device_that_is_not_there_is_one_line(capsys, monkeypatch, device, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        cli.run((OnDevice, lambda config: None), argv=["--device", device])
    assert stop.value.code == 2
    assert re.fullmatch(rf"error: --device {device}: .*{said}.*\n", capsys.readouterr().err)


def test_an_interruption_says_how_to_go_on(capsys):
    def main(config):
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as stop:
        cli.run((OnDevice, main), argv=[])
    assert stop.value.code == 130 and "--resume" in capsys.readouterr().err


def test_a_broken_line_has_one_line_number(tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(BadInput, match=r"broken.jsonl:2: .*line 1 column"):
        list(plumbing_files.read_jsonl(path))
