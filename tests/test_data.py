"""The stages between the files.

Cases, samples, SFT examples and pairs. What is kept, what is dropped, and that it adds up.
"""
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest

import plumbing.rounds
import rprm
import train_dpo
import train_sft
from plumbing.rounds import in_order
from plumbing.cli import run
from conftest import ROOT, kill_and_resume
from data import CasesConfig, FilterConfig, SampleConfig, SftConfig, cases, even_pairs, fingerprint, pairs, sample, sft
from formats.verdicts import QUESTION, VERIFICATION, has_one_verdict, normal_form, parse_verdict
from rprm import Case, Prompt

SHORT = "Problem: {problem}\nBefore: {previous_steps}\nNow: {now_step}"
YES, NO = f"Right.\n{VERIFICATION} Yes", f"Wrong.\n{VERIFICATION} No"


# ---------------------------------------------------------------------------------------------- helpers

def data_py(*argv) -> None:
    run((CasesConfig, cases), (SampleConfig, sample), (SftConfig, sft), (FilterConfig, pairs), argv=[str(a) for a in argv])


def refused(capsys, *argv) -> str:
    """The one line of an ending with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        data_py(*argv)
    assert error.value.code == 2
    lines = [line for line in capsys.readouterr().err.split("\n") if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def table(out: str) -> dict[str, int]:
    """The last printed table."""
    return {name.strip(): int(n.replace(",", "")) for name, n in re.findall(r"^  (\S.*?) +([\d,]+)$", out.rpartition("\n\n")[2], re.M)}


def write(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows),
                    encoding="utf-8")
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def case_row(n: int, label: bool | None = True, problem: str | None = None) -> dict:
    return {"id": f"c{n}", "problem": problem or f"Problem {n}?", "previous_steps": ["Before."] * (n % 3),
            "now_step": f"{n} + 1 = {n + 1}.", "label": label}


def analysis(text: str, **changes) -> dict:
    return {"text": text, "verdict": parse_verdict(text), "p_yes": 0.5, "n_tokens": 9, "finished": True, "forced": False} | changes


def sample_row(n: int, label: bool | None, texts: list, problem: str | None = None) -> dict:
    case = case_row(n, label, problem)
    return {"id": case.pop("id"), "case": case, "analyses": [analysis(t) if isinstance(t, str) else t for t in texts]}


def numbered(text: str, n: int) -> list[str]:
    """n different analyses with the same end."""
    return [f"({i}) {text}" for i in range(n)]


def random_samples(n: int, seed: int = 0, problems: int | None = None) -> list[dict]:
    """Cases with analyses of every kind that is kept or dropped, in chance numbers."""
    rng = random.Random(seed)
    kinds = [YES, NO, YES, NO, "No verdict.", f"{VERIFICATION} Yes\n{VERIFICATION} Yes", f"{VERIFICATION} Yes or No"]

    def one(i: int) -> dict:
        text = rng.choice(kinds)
        if rng.random() < 0.1:
            return analysis(text, finished=False)
        return analysis(text if rng.random() < 0.3 else f"({i}) {text}")
    return [sample_row(i, rng.random() < 0.7, [one(j) for j in range(rng.randrange(9))], problem=problems and f"Problem {i % problems}?")
            for i in range(n)]


@pytest.fixture()
def short(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompt") / "short.txt"
    path.write_text(SHORT + "\n", encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------------------- cases

def bench_row(name: str, label: int, n_steps: int = 3) -> dict:
    return {"id": name, "problem": f"Problem of {name}", "steps": [f"{name} {i}" for i in range(n_steps)], "label": label}


def test_cases(tmp_path, capsys):
    """A line per labelled step, from several files of several formats.

    Equal cases once; the table says all.
    """
    write(tmp_path / "a.json", [json.dumps([bench_row("x", 1), bench_row("y", -1)], indent=1)])
    seed = {"id": 9, "query": "Q", "previous-steps": "", "now-step": "s", "expert-judge": "Negative"}
    write(tmp_path / "b.jsonl", [seed, seed | {"id": 10}, seed | {"expert-judge": "Positive"}])
    data_py("cases", "--input", tmp_path / "a.json", tmp_path / "b.jsonl", "--out", tmp_path / "cases.jsonl")
    lines = read(tmp_path / "cases.jsonl")
    assert lines[1] == {"id": "x-1", "problem": "Problem of x", "previous_steps": ["x 0"], "now_step": "x 1", "label": False}
    assert [(line["id"], line["label"]) for line in lines] == [
        ("x-0", True), ("x-1", False), ("y-0", True), ("y-1", True), ("y-2", True), ("9-0", False), ("9-0", True)]
    assert table(capsys.readouterr().out) == {"kept: correct step": 5, "kept: incorrect step": 2,
                                              "dropped: step after the first wrong one": 1,
                                              "of these, also labelled the other way": 1,
                                              "dropped: the same case again": 1}
    assert names(tmp_path) == ["a.json", "b.jsonl", "cases.jsonl"]


def test_cases_of_so_many_solutions(tmp_path, capsys):
    """--limit counts solutions over all files."""
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", [bench_row(f"{name}{i}", -1, 1) for i in range(3)])
    for limit, ids in ((2, ["a0", "a1"]), (3, ["a0", "a1", "a2"]), (4, ["a0", "a1", "a2", "b0"]),
                       (9, ["a0", "a1", "a2", "b0", "b1", "b2"])):
        data_py("cases", "--input", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--out", tmp_path / "c", "--limit", limit, "--overwrite")
        assert [line["id"] for line in read(tmp_path / "c")] == [f"{i}-0" for i in ids]
        assert f"cases from {len(ids)} solutions" in capsys.readouterr().out


def test_cases_of_the_real_processbench(processbench, tmp_path, capsys):
    path = tmp_path / "gsm8k.json"
    path.write_text(json.dumps(processbench), encoding="utf-8")
    data_py("cases", "--input", path, "--out", tmp_path / "cases.jsonl")
    assert len(read(tmp_path / "cases.jsonl")) == 1568
    assert table(capsys.readouterr().out) == {"kept: correct step": 1361, "kept: incorrect step": 207,
                                              "dropped: step after the first wrong one": 514}


SHEPHERD = {"input": "Q? Step 1: a=1. ки\nStep 2: b=2. ки", "label": "Q? Step 1: a=1. +\nStep 2: b=2. -"}
DEFECTS = [  # (row, why it is dropped, what is said of it)
    (bench_row("y", 7), "label out of range", "field 'label': 7 is out of range (-1 to 2)"),
    (
        bench_row("z", -1) | {"steps": ["a", " "]},
        "with a blank step",
        "field 'steps': needs at least one step",
    ),
    ({"input": "Q? a=1. ки", "label": "Q? a=1. +"}, "without Step 1:", "field 'input': needs a problem"),
    ({"instruction": "a", "x\x1b[2J\ny": "b"}, "of another shape", "fields instruction, x"),
]


def test_rows_with_defects_are_dropped_and_counted(tmp_path, capsys):
    """The good rows' cases are those of a file without the bad ones.

    The table says how many, why, and where the first stands.
    """
    good = [bench_row("x", 1), SHEPHERD, bench_row("w", -1, 1)]
    write(tmp_path / "good.jsonl", good)
    write(tmp_path / "mixed.jsonl", [good[0], *(row for row, *_ in DEFECTS), good[1], DEFECTS[0][0], good[2]])
    data_py("cases", "--input", tmp_path / "good.jsonl", "--out", tmp_path / "good")
    kept = table(capsys.readouterr().out)
    data_py("cases", "--input", tmp_path / "mixed.jsonl", "--out", tmp_path / "mixed")
    out = capsys.readouterr().out
    without_ids = [[{**line, "id": None} for line in read(tmp_path / name)] for name in ("good", "mixed")]
    assert without_ids[0] == without_ids[1] and len(without_ids[0]) == 5
    assert table(out) == kept | {f"dropped row: {reason}": 1 for _, reason, _ in DEFECTS} | {
        "dropped row: label out of range": 2
    }
    for number, (_, reason, said) in enumerate(DEFECTS, 2):
        assert re.search(
            f"^  the first dropped row: {re.escape(reason)}: {tmp_path}/mixed.jsonl:{number}: {re.escape(said)}",
            out,
            re.M,
        )
    assert "\x1b" not in out


@pytest.mark.parametrize("row, reason, said", DEFECTS, ids=[reason for _, reason, _ in DEFECTS])
def test_strict_makes_a_defect_an_error(tmp_path, capsys, row, reason, said):
    write(tmp_path / "a.jsonl", [bench_row("x", 1), row])
    assert f"{tmp_path}/a.jsonl:2: {said}" in refused(
        capsys, "cases", "--input", tmp_path / "a.jsonl", "--out", tmp_path / "c", "--strict"
    )
    assert names(tmp_path) == ["a.jsonl"]


@pytest.mark.parametrize("row, reason, said", DEFECTS, ids=[reason for _, reason, _ in DEFECTS])
def test_an_input_without_a_good_row_is_an_error(tmp_path, capsys, row, reason, said):
    """Also beside a good input: a wrong file must not vanish in a table."""
    write(tmp_path / "a.jsonl", [row, row])
    write(tmp_path / "good.jsonl", [bench_row("x", 1)])
    message = refused(
        capsys, "cases", "--input", tmp_path / "good.jsonl", tmp_path / "a.jsonl", "--out", tmp_path / "c"
    )
    assert f"{tmp_path}/a.jsonl:1: {said}" in message and names(tmp_path) == ["a.jsonl", "good.jsonl"]


def test_malformed_json_is_an_error_without_strict_too(tmp_path, capsys):
    write(tmp_path / "a.jsonl", [bench_row("x", 1), '{"id": ', bench_row("y", 1)])
    assert f"{tmp_path}/a.jsonl:2: not valid JSON" in refused(
        capsys, "cases", "--input", tmp_path / "a.jsonl", "--out", tmp_path / "c"
    )


def test_a_bad_row_leaves_no_cases(tmp_path, capsys):
    """The error names file, row and field; what was there before stays as it was."""
    write(tmp_path / "a.jsonl", [bench_row("x", 1), "7"])
    said = refused(capsys, "cases", "--input", tmp_path / "a.jsonl", "--out", tmp_path / "c")
    assert f"{tmp_path}/a.jsonl:2: expected an object, found 7" in said
    assert names(tmp_path) == ["a.jsonl"]
    (tmp_path / "c").write_text("old")
    assert "--overwrite" in refused(capsys, "cases", "--input", tmp_path / "a.jsonl", "--out", tmp_path / "c")
    refused(capsys, "cases", "--input", tmp_path / "a.jsonl", "--out", tmp_path / "c", "--overwrite")
    assert names(tmp_path) == ["a.jsonl", "c"] and (tmp_path / "c").read_text() == "old"
    assert "absent.json: no such file" in refused(capsys, "cases", "--input", tmp_path / "absent.json", "--out", tmp_path / "d")


# ---------------------------------------------------------------------------------------------- sample

@pytest.fixture()
def sampling(tiny_folder, short, tmp_path) -> tuple:
    """The flags of a sampling of 9 cases, and where it goes."""
    write(tmp_path / "cases.jsonl", [case_row(i, [True, False, None][i % 3]) for i in range(9)])
    out = tmp_path / "samples.jsonl"
    return out, ["sample", "--model", tiny_folder, "--device", "cpu", "--cases", tmp_path / "cases.jsonl", "--out", out, "--n", 3,
                 "--prompt-file", short, "--max-new-tokens", 10, "--batch-size", 2]


def test_sample(sampling, capsys):
    """n analyses per case, in the order of the cases; the prompt's words travel along; the table adds up."""
    out, flags = sampling
    data_py(*flags)
    lines = read(out)
    given = read(out.parent / "cases.jsonl")
    assert [{"id": line["id"]} | line["case"] for line in lines] == given
    assert all(len(line["analyses"]) == 3 for line in lines)
    assert set(lines[0]["analyses"][0]) == {"text", "verdict", "p_yes", "n_tokens", "finished", "forced"}
    assert len({a["text"] for line in lines for a in line["analyses"]}) > 20
    assert (out.parent / "samples.prompt.txt").read_text() == SHORT + "\n"
    counts = table(capsys.readouterr().out)
    assert counts["analyses"] == 27 == sum(n for name, n in counts.items() if name in ("verdict Yes", "verdict No", "verdict missing"))
    assert counts["cut off (--max-new-tokens or the context)"] == sum(not a["finished"] for line in lines for a in line["analyses"])
    assert names(out.parent) == ["cases.jsonl", "samples.jsonl", "samples.jsonl.config.json", "samples.prompt.txt"]


def test_sample_is_the_method_itself(sampling, tiny_folder):
    """The analyses are those that `Sampler` gives for the cases, whatever the batch."""
    out, flags = sampling
    data_py(*flags, "--seed", 4)
    config = SampleConfig(model=str(tiny_folder), cases="", out="", n=3, prompt_file=str(flags[flags.index("--prompt-file") + 1]),
                          max_new_tokens=10, seed=4, device="cpu")
    sampler = rprm.load_local_sampler(config, 3, force=False)
    for line in read(out):
        case = Case(line["case"]["problem"], tuple(line["case"]["previous_steps"]), line["case"]["now_step"])
        [(_, found)] = sampler.analyses([case])
        assert [a["text"] for a in line["analyses"]] == [a.text for a in found]


@pytest.mark.slow
def test_a_sampling_killed_by_the_system_resumes_to_the_same_file(tiny_folder, short, tmp_path):
    """SIGKILL to the process at two random moments, rounds of 8 cases."""
    write(tmp_path / "cases.jsonl", [case_row(i) for i in range(60)])
    flags = ["sample", "--model", tiny_folder, "--device", "cpu", "--cases", tmp_path / "cases.jsonl", "--n", 2, "--prompt-file", short,
             "--max-new-tokens", 24, "--batch-size", 1, "--out"]
    data_py(*flags, tmp_path / "whole.jsonl")
    kill_and_resume(["data.py", *flags, tmp_path / "killed.jsonl"], tmp_path / "killed.jsonl.part",
                    random.Random(5).sample(range(1, 40), 2))
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert names(tmp_path) == ["cases.jsonl"] + [f"{name}.{end}" for name in ("killed", "whole")
                                                 for end in ("jsonl", "jsonl.config.json", "prompt.txt")]


@pytest.mark.slow
@pytest.mark.parametrize("flags_too", [[], ["--complete"]], ids=["plain", "complete"])
def test_a_killed_sampling_resumes_to_the_same_file(sampling, capsys, flags_too, monkeypatch):
    """Killed before the first line, between two, in the midst of one and before the last rename: the same bytes, P(Yes) included.

    Rounds of 2 cases: whole ones are kept, and so is the last, shorter one; the one that was killed begins anew.
    """
    monkeypatch.setattr(plumbing.rounds, "ROUND", 1)
    out, flags = sampling
    flags = flags + flags_too
    data_py(*flags)
    whole, counts = out.read_bytes(), table(capsys.readouterr().out)
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    asked, analyses = [], rprm.Sampler.analyses
    monkeypatch.setattr(rprm.Sampler, "analyses", lambda sampler, cases: analyses(sampler, asked.append(found := list(cases)) or found))
    for size in (0, 11, ends[0], ends[3] + 40, ends[4] - 1, ends[7] + 1, len(whole)):
        Path(f"{out}.part").write_bytes(whole[:size])
        out.unlink()
        asked.clear()
        data_py(*flags, "--resume")
        assert out.read_bytes() == whole and not Path(f"{out}.part").exists()
        assert table(capsys.readouterr().out) == counts  # those of the earlier run included
        whole_lines = sum(end <= size for end in ends)
        assert sum(map(len, asked)) == 9 - (9 if whole_lines == 9 else whole_lines // 2 * 2)


def test_complete_gives_every_analysis_a_verdict(sampling, capsys):
    out, flags = sampling
    data_py(*flags, "--complete")
    counts = table(capsys.readouterr().out)
    assert counts["verdict Yes"] + counts["verdict No"] == counts["analyses"] == counts["verification line added (--complete)"] == 27
    labelled = [(a["verdict"], line["case"]["label"]) for line in read(out) for a in line["analyses"]]
    assert counts["verdict equal to the label"] == sum(verdict == label for verdict, label in labelled)
    for line in read(out):
        for a in line["analyses"]:
            assert parse_verdict(a["text"]) is a["verdict"] and 0 < a["p_yes"] < 1 and a["forced"]


def test_a_resumed_sampling_must_be_the_same_one(sampling, capsys, monkeypatch):
    """Another flag, other cases, a damaged line, or no --resume.

    Refused, and what is there stays. Nothing left to do is no error.
    """
    monkeypatch.setattr(plumbing.rounds, "ROUND", 1)
    out, flags = sampling
    data_py(*flags)
    whole = out.read_bytes()
    part = Path(f"{out}.part")
    data_py(*flags, "--resume")
    assert "nothing to resume" in capsys.readouterr().out and out.read_bytes() == whole
    assert "--seed" in refused(capsys, *flags, "--resume", "--seed", 1)
    assert "--overwrite" in refused(capsys, *flags)
    half = whole[:len(whole) // 2]
    out.rename(part)
    part.write_bytes(half)
    assert "--resume" in refused(capsys, *flags)
    assert "--seed" in refused(capsys, *flags, "--resume", "--seed", 1)
    assert "--max-new-tokens" in refused(capsys, *flags, "--resume", "--max-new-tokens", 11)
    assert part.read_bytes() == half
    cases_file = out.parent / "cases.jsonl"
    lines = cases_file.read_bytes()
    write(cases_file, [case_row(i) for i in range(1, 9)])
    assert f"{part}:1: field 'id'" in refused(capsys, *flags, "--resume")
    write(cases_file, [case_row(i) | {"now_step": "Another step."} for i in range(9)])
    assert f"{part}:1: field 'case'" in refused(capsys, *flags, "--resume")
    cases_file.write_bytes(lines)
    part.write_bytes(b'{"id": "c0", "case"\n' + half)
    assert f"{part}:1: not valid JSON" in refused(capsys, *flags, "--resume")
    data_py(*flags, "--overwrite")
    assert out.read_bytes() == whole and not part.exists()


BAD_CASES = {
    "a broken line": ('{"id": "x"', ":3: not valid JSON"),
    "no id": ({k: v for k, v in case_row(1).items() if k != "id"}, ":3: field 'id' is missing"),
    "id a number": (case_row(1) | {"id": 1}, ":3: field 'id'"),
    "empty step": (case_row(1) | {"now_step": ""}, ":3: field 'now_step' is empty"),
    "label a number": (case_row(1) | {"label": 1}, ":3: field 'label'"),
    "previous steps a text": (case_row(1) | {"previous_steps": "a"}, ":3: field 'previous_steps'"),
    "a list": ([1], ":3: expected an object"),
}


@pytest.mark.parametrize("kind", BAD_CASES)
def test_a_bad_case_names_file_line_and_field(sampling, capsys, kind):
    out, flags = sampling
    row, said = BAD_CASES[kind]
    write(out.parent / "cases.jsonl", [case_row(0), case_row(2), row])
    assert f"{out.parent}/cases.jsonl{said}" in refused(capsys, *flags)
    assert names(out.parent) == ["cases.jsonl"]


@pytest.mark.parametrize("changes, said", [
    ({"--model": "absent/folder"}, "absent/folder"), ({"--prompt-file": "absent.txt"}, "absent.txt: no such prompt file"),
    ({"--cases": "absent.jsonl"}, "absent.jsonl: no such file"), ({"--n": 0}, None), ({"--max-new-tokens": 0}, None),
])
@pytest.mark.slow
def test_a_sampling_that_cannot_start_leaves_nothing(sampling, capsys, changes, said):
    """So that the corrected command runs as it is, without --overwrite."""
    out, flags = sampling
    bad = list(flags)
    for name, value in changes.items():
        bad[bad.index(name) + 1] = value
    if said:
        assert said in refused(capsys, *bad)
    else:
        with pytest.raises(SystemExit) as error:
            data_py(*bad)
        assert error.value.code == 2 and f"argument {list(changes)[0]}: 0 is out of range" in capsys.readouterr().err
    assert names(out.parent) == ["cases.jsonl"]
    data_py(*flags)
    assert len(read(out)) == 9


@pytest.mark.slow
def test_a_case_longer_than_the_context(sampling, capsys):
    """It has no analyses, is counted and named, and the others are sampled as without it; so also in a resumed run."""
    out, flags = sampling
    rows = [case_row(i) for i in range(9)]
    data_py(*flags)
    without = {line["id"]: line for line in read(out)}
    write(out.parent / "cases.jsonl", [*rows[:4], case_row(99, problem="So long. " * 3000), *rows[4:]])
    data_py(*flags, "--overwrite")
    printed = capsys.readouterr().out
    assert "cases longer than the context: no analyses" in printed
    assert "not judged, as the prompt is longer than the model's context: c99\n" in printed
    lines = read(out)
    assert [line["id"] for line in lines] == ["c0", "c1", "c2", "c3", "c99", "c4", "c5", "c6", "c7", "c8"]
    for line in lines:
        texts = [a["text"] for a in line["analyses"]]
        assert texts == ([a["text"] for a in without[line["id"]]["analyses"]] if line["id"] != "c99" else [])
    whole = out.read_bytes()
    out.rename(f"{out}.part")
    Path(f"{out}.part").write_bytes(whole[:-20])
    data_py(*flags, "--resume")
    assert out.read_bytes() == whole and "context: c99\n" in capsys.readouterr().out


def test_values_in_any_order_come_out_in_order():
    for seed in range(20):
        order = random.Random(seed).sample(range(12), 12)
        assert list(in_order((i, [i]) for i in order)) == [[i] for i in range(12)]
    given = in_order(iter([(1, ["b"]), (0, ["a"]), (2, ["c"])]))
    assert next(given) == ["a"] and next(given) == ["b"]  # as soon as may be


# ---------------------------------------------------------------------------------------------- sft

def test_sft_keeps_one_right_verdict_at_the_end(tmp_path, capsys):
    """Each reason for which an analysis is dropped, counted; kept and dropped together are the analyses."""
    write(tmp_path / "s.jsonl", [
        sample_row(1, True, [YES, NO, "Hm.", f"{VERIFICATION} Yes\n{YES}", f"{YES}\nDone {QUESTION}", YES, analysis("Cut. " + YES, finished=False),
                             f"{VERIFICATION} Yes or No", f"More. {YES}"]),
        sample_row(2, False, [NO, YES, f"Also. {NO}"]), sample_row(3, None, [YES]), sample_row(4, True, []),
    ])
    data_py("sft", "--samples", tmp_path / "s.jsonl", "--out", tmp_path / "sft.jsonl", "--validation", 0)
    lines = read(tmp_path / "sft.jsonl")
    assert [(line["problem"], line["response"]) for line in lines] == [
        ("Problem 1?", YES), ("Problem 1?", f"More. {YES}"), ("Problem 2?", NO), ("Problem 2?", f"Also. {NO}")]
    own = Prompt((ROOT / "prompts" / "verify.txt").read_text(encoding="utf-8"), "verify.txt")
    assert lines[0]["prompt"] == own.fill(Case("Problem 1?", ("Before.",), "1 + 1 = 2."))
    counts = table(capsys.readouterr().out)
    assert counts == {"kept: train, Yes": 2, "kept: train, No": 2, "dropped: cut off (--max-new-tokens or context)": 1,
                      "cases without analyses": 1,
                      "dropped: the same analysis again": 1,
                      "dropped: no verdict at the end, or several": 4, "dropped: verdict not equal to the label": 2,
                     "dropped: analysis of a case without a label": 1}
    assert read(tmp_path / "sft.validation.jsonl") == []


OTHER_WORDS = [
    f"**{VERIFICATION}** Yes",
    f"{VERIFICATION} **Yes**",
    f"{VERIFICATION}\nYes",
    f"{VERIFICATION} yes",
    f"{VERIFICATION} \\boxed{{Yes}}",
    f"{VERIFICATION} Yes, the step is correct.",
    f"<answer>\n{VERIFICATION} Yes\n</answer>",
    f"{VERIFICATION} Yes\nThat is all.",
    f"<think>I must end with {VERIFICATION} No</think>{VERIFICATION} Yes",
]


@pytest.mark.parametrize("command", ["sft", "pairs"])
def test_verdicts_in_other_words_are_trained_on_in_the_normal_form(tmp_path, capsys, command):
    """Every response ends with the one line.

    Those that did not are counted, and what is then the same is taken once.
    """
    texts = [f"({i}) Right.\n{words}" for i, words in enumerate(OTHER_WORDS)]
    wrong = [re.sub("(?<![(])[Yy]es", "No", text) for text in texts]
    write(
        tmp_path / "s.jsonl",
        [sample_row(1, True, [*texts, *wrong, texts[0], f"(0) Right.\n{VERIFICATION} Yes"])],
    )
    data_py(
        command,
        "--samples",
        tmp_path / "s.jsonl",
        "--out",
        tmp_path / "t.jsonl",
        "--no-balance",
        "--validation",
        0,
        "--max-per-case",
        99,
    )
    responses = [
        line[name]
        for line in read(tmp_path / "t.jsonl")
        for name in line
        if name in ("response", "chosen", "rejected")
    ]
    assert len(set(responses)) == (len(texts) if command == "sft" else 2 * len(texts))
    assert all(has_one_verdict(text) and text == normal_form(text) and "<" not in text for text in responses)
    counts = table(capsys.readouterr().out)
    others = 9 + (8 if command == "pairs" else 0)  # with No in its place, the fourth is in the normal form
    assert (
        counts["of these, verdict put into the normal form"] == others
        and counts["dropped: the same analysis again"] == 2
    )
    if command == "pairs":
        assert (
            all(line["chosen"] != line["rejected"] for line in read(tmp_path / "t.jsonl"))
            and len(responses) == 2 * len(texts) ** 2
        )


@pytest.mark.parametrize("flags", [[], ["--no-balance"], ["--max-per-case", "1", "--validation", "0.5"]])
def test_kept_and_dropped_are_all_the_analyses(tmp_path, capsys, flags):
    rows = random_samples(200)
    write(tmp_path / "s.jsonl", rows)
    data_py("sft", "--samples", tmp_path / "s.jsonl", "--out", tmp_path / "sft.jsonl", *flags)
    counts = table(capsys.readouterr().out)
    of_cases = ("cases without analyses", "cases without a label and without analyses")
    assert sum(n for name, n in counts.items() if name not in of_cases) == sum(len(row["analyses"]) for row in rows)
    for name, path in (("train", "sft.jsonl"), ("validation", "sft.validation.jsonl")):
        kept = Counter(parse_verdict(line["response"]) for line in read(tmp_path / path))
        assert (kept[True], kept[False]) == (counts[f"kept: {name}, Yes"], counts[f"kept: {name}, No"])
        assert (kept[True] == kept[False]) == ("--no-balance" not in flags)
    assert ("dropped: to balance Yes and No" in counts) == ("--no-balance" not in flags)


def test_sft_max_per_case(tmp_path, capsys):
    write(tmp_path / "s.jsonl", [sample_row(1, True, numbered(YES, 6)), sample_row(2, False, numbered(NO, 3))])
    for most in (1, 2, 4, 9):
        data_py("sft", "--samples", tmp_path / "s.jsonl", "--out", tmp_path / "sft.jsonl", "--validation", 0, "--max-per-case", most,
                "--no-balance", "--overwrite")
        assert Counter(line["problem"] for line in read(tmp_path / "sft.jsonl")) == {"Problem 1?": min(6, most), "Problem 2?": min(3, most)}
        assert table(capsys.readouterr().out).get("dropped: over --max-per-case", 0) == max(0, 6 - most) + max(0, 3 - most)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["sft", "pairs"])
def test_the_split_is_by_problem(tmp_path, command):
    """No problem on both sides.

    About the asked share of them held out; the same whatever the order of the lines.
    """
    texts = numbered(YES, 2) + numbered(NO, 2)
    rows = [sample_row(i, i % 2 == 0, texts, problem=f"Problem {i % 300}?") for i in range(900)]
    sides = []
    for name, some in (("a", rows), ("b", rows[::-1])):
        write(tmp_path / f"{name}.s", some)
        data_py(command, "--samples", tmp_path / f"{name}.s", "--out", tmp_path / f"{name}.jsonl", "--validation", 0.3, "--no-balance")
        sides.append([{line["problem"] for line in read(tmp_path / file)} for file in (f"{name}.jsonl", f"{name}.validation.jsonl")])
    (train, held_out), other = sides
    assert not train & held_out and len(train | held_out) == 300 and [train, held_out] == other
    assert abs(len(held_out) - 90) < 5 * (300 * 0.3 * 0.7) ** 0.5  # odds of a false alarm: below 1e-6
    data_py(command, "--samples", tmp_path / "a.s", "--out", tmp_path / "c.jsonl", "--validation", 0.3, "--no-balance", "--seed", 1)
    assert {line["problem"] for line in read(tmp_path / "c.validation.jsonl")} != held_out


def test_the_balance_is_drawn_by_the_seed(tmp_path):
    """Which examples are left out is chance, not place: the same for the same seed, another for another."""
    write(tmp_path / "s.jsonl", [sample_row(i, i < 90, numbered(YES if i < 90 else NO, 1)) for i in range(100)])
    kept = []
    for seed in (0, 0, 1):
        data_py("sft", "--samples", tmp_path / "s.jsonl", "--out", tmp_path / "sft.jsonl", "--validation", 0, "--seed", seed, "--overwrite")
        kept.append([line["problem"] for line in read(tmp_path / "sft.jsonl")])
    assert kept[0] == kept[1] != kept[2] and len(kept[0]) == 20
    assert max(int(problem.split()[1][:-1]) for problem in kept[0][:10]) > 20  # ten of the first 90, not the first ten


@pytest.mark.parametrize("command", ["sft", "pairs"])
def test_examples_of_one_verdict_alone_are_kept_and_it_is_said(tmp_path, capsys, command):
    """A balance would leave none of them, and the next command without a file."""
    write(tmp_path / "s.jsonl", [sample_row(i, False, numbered(NO, 1) + numbered(YES, 1)) for i in range(3)])
    data_py(command, "--samples", tmp_path / "s.jsonl", "--out", tmp_path / "a.jsonl")
    printed = capsys.readouterr().out
    assert len(read(tmp_path / "a.jsonl")) == 3 and (tmp_path / "a.validation.jsonl").read_text() == ""
    assert "a.jsonl: not balanced, as the verdict of all 3 examples is No" in printed
    assert table(printed) == {"kept: train, No": 3} | ({"dropped: verdict not equal to the label": 3} if command == "sft" else {})


def test_several_files_of_samples(tmp_path):
    for n, (label, text) in enumerate([(True, YES), (False, NO)]):
        write(tmp_path / f"{n}.jsonl", [sample_row(n, label, [text])])
    data_py("sft", "--samples", tmp_path / "0.jsonl", tmp_path / "1.jsonl", "--out", tmp_path / "sft.jsonl", "--validation", 0)
    assert [line["response"] for line in read(tmp_path / "sft.jsonl")] == [YES, NO]


@pytest.mark.parametrize("kind", ["cases", "samples"])
def test_sft_direct(tmp_path, capsys, kind):
    """The verdict line alone under the direct prompt, one per labelled case.

    Cases will do as well as samples.
    """
    labels = [True, False, True, None, False]
    rows = [case_row(i, label) if kind == "cases" else sample_row(i, label, ["Hm."] * 3) for i, label in enumerate(labels)]
    write(tmp_path / "in.jsonl", rows)
    (tmp_path / "in.prompt.txt").write_text("of the analyses {} {} {}")  # the words for analyses are not those for direct answers
    data_py("sft", "--direct", "--samples", tmp_path / "in.jsonl", "--out", tmp_path / "sft.jsonl", "--validation", 0)
    lines = read(tmp_path / "sft.jsonl")
    assert [line["response"] for line in lines] == [f"{VERIFICATION} {'Yes' if label else 'No'}" for label in labels if label is not None]
    prompt = Prompt((ROOT / "prompts" / "direct.txt").read_text(encoding="utf-8"), "direct.txt")
    assert lines[1]["prompt"] == prompt.fill(Case("Problem 1?", ("Before.",), "1 + 1 = 2."))
    assert (tmp_path / "sft.prompt.txt").read_text(encoding="utf-8") == prompt.text
    assert table(capsys.readouterr().out) == {"kept: train, Yes": 2, "kept: train, No": 2, "dropped: analysis of a case without a label": 1}


@pytest.mark.parametrize("command", ["sft", "pairs"])
def test_the_prompt_travels(tmp_path, short, command):
    """Examples are made with the words of their samples, and carry them on; --prompt-file takes others."""
    write(tmp_path / "s.jsonl", [sample_row(1, True, [YES, NO]), sample_row(2, False, [YES, NO])])
    (tmp_path / "s.prompt.txt").write_text("Travelled. {now_step} {problem} {previous_steps}", encoding="utf-8")
    data_py(command, "--samples", tmp_path / "s.jsonl", "--out", tmp_path / "a.jsonl", "--validation", 0)
    assert read(tmp_path / "a.jsonl")[0]["prompt"] == "Travelled. Step 2: 1 + 1 = 2. Problem 1? Step 1: Before."
    assert (tmp_path / "a.prompt.txt").read_text() == "Travelled. {now_step} {problem} {previous_steps}\n"
    data_py(command, "--samples", tmp_path / "s.jsonl", "--out", tmp_path / "b.jsonl", "--validation", 0, "--prompt-file", short)
    assert read(tmp_path / "b.jsonl")[0]["prompt"] == "Problem: Problem 1?\nBefore: Step 1: Before.\nNow: Step 2: 1 + 1 = 2."
    assert (tmp_path / "b.prompt.txt").read_text() == SHORT + "\n"


# ---------------------------------------------------------------------------------------------- pairs

def test_even_pairs_uses_every_response_as_often():
    """For all small numbers.

    Distinct pairs, as many as may be, each response of a side used equally often give or take one.
    """
    for right in range(9):
        for wrong in range(9):
            for most in (*range(1, 14), 40, 100):
                found = even_pairs(right, wrong, most, seed=right + 100 * wrong)
                assert len(set(found)) == len(found) == min(most, right * wrong)
                for side, n in ((0, right), (1, wrong)):
                    used = Counter(pair[side] for pair in found)
                    assert set(used) <= set(range(n))
                    if found:
                        assert max(used.values()) - min(used[i] for i in range(n)) <= 1


def test_even_pairs_are_drawn_by_the_seed():
    assert even_pairs(6, 6, 4, 1) == even_pairs(6, 6, 4, 1)
    assert len({tuple(even_pairs(6, 6, 4, seed)) for seed in range(20)}) > 15
    first = Counter(even_pairs(4, 4, 1, seed)[0] for seed in range(1600))  # each of the 16 pairs about 100 times
    assert len(first) == 16 and all(abs(n - 100) < 6 * 10 for n in first.values())


def test_pairs_are_right_against_wrong(tmp_path, capsys):
    """Chosen.

    Verdict = label; rejected: the other verdict; both usable; each pair once; no response more often than
    needed.
    """
    write(tmp_path / "s.jsonl", [
        sample_row(1, True, numbered(YES, 3) + numbered(NO, 2) + ["Hm.", f"{YES}\nDone {QUESTION}", analysis(f"Cut. {NO}", finished=False)]),
        sample_row(2, False, numbered(YES, 1) + numbered(NO, 4)),
        sample_row(3, True, numbered(YES, 3)), sample_row(4, False, numbered(YES, 3)), sample_row(5, True, ["Hm."]),
        sample_row(6, None, [YES, NO]),
    ])
    data_py("pairs", "--samples", tmp_path / "s.jsonl", "--out", tmp_path / "p.jsonl", "--validation", 0, "--max-per-case", 4)
    lines = read(tmp_path / "p.jsonl")
    assert Counter(line["problem"] for line in lines) == {"Problem 1?": 4, "Problem 2?": 4}
    for line in lines:
        label = line["problem"] == "Problem 1?"
        assert parse_verdict(line["chosen"]) is label and parse_verdict(line["rejected"]) is not label
    assert len({(line["chosen"], line["rejected"]) for line in lines}) == 8
    assert sorted(Counter(line["chosen"] for line in lines).values()) == [1, 1, 1, 1, 1, 1, 2]
    assert sorted(Counter(line["rejected"] for line in lines).values()) == [2, 2, 4]
    assert table(capsys.readouterr().out) == {
        "kept: train, Yes": 4, "kept: train, No": 4, "not made: over --max-per-case": 2, "dropped: no verdict at the end, or several": 3,
        "dropped: cut off (--max-new-tokens or context)": 1, "cases without a pair: all right": 1, "cases without a pair: all wrong": 1,
        "cases without a pair: all unusable": 1, "dropped: analysis of a case without a label": 2}


@pytest.mark.parametrize("flags", [[], ["--no-balance"], ["--validation", "0.5", "--max-per-case", "2"]])
def test_pairs_made_and_not_made_are_the_product(tmp_path, capsys, flags):
    """Kept, left out for the balance and not made are right × wrong, summed over the cases.

    Both sides balanced.
    """
    rows = random_samples(300, seed=1)
    write(tmp_path / "s.jsonl", rows)
    data_py("pairs", "--samples", tmp_path / "s.jsonl", "--out", tmp_path / "p.jsonl", *flags)
    counts = table(capsys.readouterr().out)
    product = 0
    for row in rows:
        usable = {a["text"]: a["verdict"] for a in row["analyses"] if a["finished"] and has_one_verdict(a["text"])}
        right = sum(verdict == row["case"]["label"] for verdict in usable.values())
        product += right * (len(usable) - right)
    assert sum(n for name, n in counts.items() if name.startswith(("kept", "not made", "dropped: to balance"))) == product
    for name, path in (("train", "p.jsonl"), ("validation", "p.validation.jsonl")):
        kept = Counter(parse_verdict(line["chosen"]) for line in read(tmp_path / path))
        assert (kept[True], kept[False]) == (counts[f"kept: {name}, Yes"], counts[f"kept: {name}, No"])
        assert (kept[True] == kept[False]) == ("--no-balance" not in flags)
        assert all(parse_verdict(line["chosen"]) is not parse_verdict(line["rejected"]) is not None for line in read(tmp_path / path))


# ---------------------------------------------------------------------------------------------- small data


@pytest.mark.slow
@pytest.mark.parametrize("problems", [1, 2, 3])
@pytest.mark.parametrize("script, command", [(train_sft, "sft"), (train_dpo, "pairs")])
def test_a_few_cases_go_through_the_whole_pipeline(
    tmp_path, tiny_folder, short, capsys, script, command, problems
):
    """As the README has it, with the validation file that was written, which is empty here.

    It is said twice.
    """
    rows = [sample_row(i, i % 2 == 0, [YES, NO], problem=f"Problem {i % problems}?") for i in range(4)]
    write(tmp_path / "s.jsonl", rows)
    data_py(command, "--samples", tmp_path / "s.jsonl", "--out", tmp_path / "t.jsonl", "--prompt-file", short)
    assert read(tmp_path / "t.validation.jsonl") == [] and len(read(tmp_path / "t.jsonl")) == 4
    assert f"{tmp_path}/t.validation.jsonl: is empty, as there are so few problems" in capsys.readouterr().out
    script.main(
        script.Config(
            model=str(tiny_folder),
            train=str(tmp_path / "t.jsonl"),
            validation=str(tmp_path / "t.validation.jsonl"),
            out=str(tmp_path / "run"),
            device="cpu",
        )
    )
    assert (
        f"{tmp_path}/t.validation.jsonl: is empty; training goes on without validation"
        in capsys.readouterr().out
    )
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("command", ["sft", "pairs"])
def test_no_share_for_validation_takes_all_there_is_to_train_on(tmp_path, command):
    """Whatever the seed puts where.

    A problem alone, or one with Yes and another with No, of which either goes to validation.
    """
    for problems in (1, 2):
        write(
            tmp_path / "s.jsonl",
            [sample_row(i, i == 0, [YES, NO], problem=f"Problem {i % problems}?") for i in range(2)],
        )
        sizes = set()
        for seed in range(12):
            data_py(
                command,
                "--samples",
                tmp_path / "s.jsonl",
                "--out",
                tmp_path / "t.jsonl",
                "--validation",
                0.5,
                "--seed",
                seed,
                "--overwrite",
            )
            sizes.add((len(read(tmp_path / "t.jsonl")), len(read(tmp_path / "t.validation.jsonl"))))
        assert sizes == {(2, 0)}


# ---------------------------------------------------------------------------------------------- bad samples

BAD_SAMPLES = {
    "a broken line": ('{"id": 1,', ":3: not valid JSON"),
    "no analyses": ({k: v for k, v in sample_row(1, True, []).items() if k != "analyses"}, ":3: field 'analyses' is missing"),
    "analyses an object": (sample_row(1, True, []) | {"analyses": {}}, ":3: field 'analyses'"),
    "an analysis a text": (sample_row(1, True, []) | {"analyses": [YES]}, ":3: field 'analyses'[0]"),
    "no text": (sample_row(1, True, [YES, {"verdict": True}]), ":3: field 'analyses'[1]: field 'text' is missing"),
    "verdict a text": (sample_row(1, True, [analysis(YES, verdict="Yes")]), ":3: field 'analyses'[0].verdict"),
    "verdict a number": (sample_row(1, True, [analysis(YES, verdict=1)]), ":3: field 'analyses'[0].verdict"),
    "p_yes a text": (sample_row(1, True, [analysis(YES, p_yes="0.5")]), ":3: field 'analyses'[0].p_yes"),
    "finished a number": (sample_row(1, True, [analysis(YES, finished=1)]), ":3: field 'analyses'[0]: field 'finished'"),
    "case a text": (sample_row(1, True, [YES]) | {"case": "P"}, ":3: field 'case'"),
    "case without problem": (sample_row(1, True, [YES]) | {"case": {"previous_steps": [], "now_step": "s"}},
                             ":3: field 'problem' is missing"),
    "label a text": (sample_row(1, "Yes", [YES]), ":3: field 'label'"),
}


@pytest.mark.parametrize("command", ["sft", "pairs"])
@pytest.mark.parametrize("kind", BAD_SAMPLES)
def test_bad_samples_name_file_line_and_field(tmp_path, capsys, command, kind):
    """... and leave nothing, nor touch what an earlier run made."""
    row, said = BAD_SAMPLES[kind]
    write(tmp_path / "s.jsonl", [sample_row(1, True, [YES, NO]), sample_row(2, False, [YES, NO]), row])
    flags = [command, "--samples", tmp_path / "s.jsonl", "--out", tmp_path / "out.jsonl", "--validation", 0]
    assert f"{tmp_path}/s.jsonl{said}" in refused(capsys, *flags)
    assert names(tmp_path) == ["s.jsonl"]
    (tmp_path / "out.jsonl").write_text("old")
    refused(capsys, *flags, "--overwrite")
    assert names(tmp_path) == ["out.jsonl", "s.jsonl"] and (tmp_path / "out.jsonl").read_text() == "old"


@pytest.mark.parametrize("command", ["sft", "pairs"])
def test_samples_of_nothing_are_an_error(tmp_path, capsys, command):
    """No line at all; or cases without analyses, which are counted; or what is no list of them."""
    flags = [command, "--samples", write(tmp_path / "s.jsonl", []), "--out", tmp_path / "out.jsonl"]
    assert "(there are none)" in refused(capsys, *flags)
    write(tmp_path / "s.jsonl", [sample_row(1, True, []), sample_row(2, None, [])])
    with pytest.raises(SystemExit):
        data_py(*flags)
    counts = table(capsys.readouterr().out)
    assert counts["cases without analyses"] == counts["cases without a label and without analyses"] == 1
    for analyses in (5, None):
        write(tmp_path / "s.jsonl", [sample_row(1, None, []) | {"analyses": analyses}])
        assert "s.jsonl:1: field 'analyses'" in refused(capsys, *flags)


def test_a_file_without_cases_is_refused(tmp_path, tiny_folder, capsys):
    said = refused(capsys, "sample", "--model", tiny_folder, "--cases", write(tmp_path / "c.jsonl", []), "--out", tmp_path / "s.jsonl")
    assert "c.jsonl: has no cases" in said and names(tmp_path) == ["c.jsonl"]


@pytest.mark.parametrize("out", ["mine.jsonl", "mine.validation.jsonl"])
def test_the_filters_do_not_replace_what_they_read(tmp_path, capsys, out):
    """Nor does the file for validation, which lies beside --out."""
    samples = write(tmp_path / out, [sample_row(1, True, [YES, NO])])
    for command in ("sft", "pairs"):
        said = refused(capsys, command, "--samples", samples, "--out", tmp_path / "mine.jsonl", "--overwrite")
        assert f"{samples}: is read, as --samples" in said
    assert read(samples) == [sample_row(1, True, [YES, NO])]


@pytest.mark.parametrize("command", ["sft", "pairs"])
def test_nothing_to_keep_is_an_error(tmp_path, capsys, command):
    """With the table that says why, and no empty file."""
    write(tmp_path / "s.jsonl", [sample_row(1, True, ["Hm."] * 3), sample_row(2, None, [YES])])
    with pytest.raises(SystemExit) as error:
        data_py(command, "--samples", tmp_path / "s.jsonl", "--out", tmp_path / "out.jsonl")
    said = capsys.readouterr()
    assert error.value.code == 2 and "no example can be made" in said.err
    assert table(said.out)["dropped: no verdict at the end, or several"] == 3
    assert names(tmp_path) == ["s.jsonl"]


@pytest.mark.parametrize("command", ["sft", "pairs"])
def test_an_existing_output_is_kept(tmp_path, capsys, command):
    """Also where only the validation file is there; --overwrite replaces both."""
    write(tmp_path / "s.jsonl", [sample_row(1, True, [YES, NO]), sample_row(2, False, [YES, NO])])
    flags = [command, "--samples", tmp_path / "s.jsonl", "--out", tmp_path / "out.jsonl", "--validation", 0]
    for name in ("out.jsonl", "out.validation.jsonl"):
        (tmp_path / name).write_text("old")
        assert f"{name}: exists already" in refused(capsys, *flags)
        assert (tmp_path / name).read_text() == "old" and names(tmp_path) == [name, "s.jsonl"]
        (tmp_path / name).unlink()
    (tmp_path / "out.jsonl").write_text("old")
    data_py(*flags, "--overwrite")
    assert len(read(tmp_path / "out.jsonl")) == 2


def test_fingerprints_are_the_same_in_every_run():
    """The split must not change with Python's hash seed: a known value, and even over [0, 2**64)."""
    assert fingerprint(0, "x") == fingerprint(0, "x") != fingerprint(1, "x") != fingerprint(0, "y")
    import hashlib
    assert fingerprint(7, "Problem 1?") == int.from_bytes(hashlib.blake2b(b"(7, 'Problem 1?')", digest_size=8).digest(), "little")
    share = sum(fingerprint(0, f"Problem {i}") / 2 ** 64 for i in range(2000)) / 2000
    assert abs(share - 0.5) < 5 / (12 * 2000) ** 0.5
