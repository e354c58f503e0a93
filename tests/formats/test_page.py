"""The page of scores: its figures are those of score.py; what a reader does with it works in a browser."""
import json
import random
import re
import sys
from pathlib import Path

import pytest

import rprm
from conftest import watched_tab
from formats.page import TEXT_BYTES, judge_names, write_page
from formats.processbench import ProcessBench
from formats.rows import Solution
from formats.score_lines import predict, score_line
from plumbing.errors import BadInput
from rprm import Analysis

KS = (1, 4, 10)
HOSTILE = '</script><img src=x onerror="window.hacked = true"><b>bold</b>&amp;{script}'


# ---------------------------------------------------------------------------------------- scores to look at


P_YES = ([0.0, 0.25, 0.4], [0.5, 0.75, 1.0], [0.0, 0.1, 0.25, 0.5, 0.75, 1.0])  # of the samples of a step


def make_analysis(rng: random.Random, text: str, p_yes_of_step: list[float]) -> Analysis:
    """Any kind of analysis: with and without verdict, forced, cut off, without P(Yes)."""
    kind = rng.random()
    if kind < 0.05:
        return Analysis(text, None, None, 120, False)
    p_yes = rng.choice(p_yes_of_step)
    if kind < 0.1:
        return Analysis(text, None, p_yes, 120, False, forced=True)
    return Analysis(text, p_yes >= 0.5, p_yes, rng.randrange(20, 120), True)


def make_line(rng: random.Random, source: str, number: int, k: int) -> dict:
    n_steps = rng.randrange(1, 5)
    label = rng.choice([None, -1, -1, *range(n_steps)])
    steps = tuple(f"Step {t} of {number}." for t in range(n_steps))
    solution = Solution(f"{source}-{number}", f"Problem {number} of {source}?", steps, label)
    judged = []
    for t in range(rng.randrange(1, n_steps + 1)):
        texts = [f"{source}-{number}, step {t}, analysis {i}\nsecond line" for i in range(k)]
        p_yes = rng.choice(P_YES)
        judged.append([make_analysis(rng, text, p_yes) for text in texts])
    if rng.random() < 0.1:
        judged[-1] = [Analysis("nothing", None, None, 5, True)] * k
    return score_line(source, solution, judged, tuple(own for own in KS if own <= k), 0.5)


def write_scores(path: Path, lines: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def score_summary(lines: list[dict], ks: tuple[int, ...] = KS) -> list[dict]:
    """The rows of scores.summary.json, without what the page has none of: intervals and calibration."""
    table = ProcessBench(ks)
    for line in lines:
        table.add(line)
    left_out = re.compile(r".*_low|.*_high|ece|brier|auroc")
    rows = table.rows([line["source"] for line in lines])
    return [{name: value for name, value in row.items() if not left_out.fullmatch(name)} for row in rows]


def simple_line(number: int, label: int | None, p_yes: list[list[float | None]], **changes) -> dict:
    """A line whose analyses say Yes from 0.5 on."""
    steps = tuple(f"Step {t}." for t in range(len(p_yes)))
    judged = [
        [
            Analysis(f"analysis {i} of step {t}", None if p is None else p >= 0.5, p, 10, True)
            for i, p in enumerate(step)
        ]
        for t, step in enumerate(p_yes)
    ]
    solution = Solution(f"s{number}", "Problem?", steps, label)
    line = score_line("test", solution, judged, (len(p_yes[0]),), 0.5)
    return line | changes


@pytest.fixture(scope="module")
def judged() -> dict[str, list[dict]]:
    """Two judges, of which the second has seen other solutions too, and a third with one number a step."""
    rng = random.Random(0)
    tens = [make_line(rng, source, i, 10) for source in ("algebra", "logic") for i in range(27)]
    again = []
    for line in tens[:45]:
        solution = Solution(line["id"], line["problem"], tuple(line["steps"]), line["label"])
        steps = [[make_analysis(rng, f"analysis {i}", P_YES[2]) for i in range(10)] for _ in line["steps"]]
        again.append(score_line(line["source"], solution, steps, KS, 0.5))
    again += [make_line(rng, "logic", i, 10) for i in range(100, 105)]
    return {
        "first": tens,
        "second": again,
        "direct": [make_line(rng, "algebra", i, 1) for i in range(200, 210)],
    }


@pytest.fixture(scope="module")
def page_path(judged, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    paths = [write_scores(folder / f"scores.{name}.jsonl", lines) for name, lines in judged.items()]
    write_page(paths, folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def shared_tab(page_path, browser):
    with watched_tab(browser, page_path) as tab:
        yield ready(tab)


@pytest.fixture
def tab(shared_tab):
    """The page of the three judges as it was in the beginning, the first judge in focus."""
    shared_tab.evaluate("""() => {
        Object.assign(state, {threshold: 0.5, k: 10, judge: 0, source: "", outcome: "all", find: "",
                              disagreeing: false, cutOff: false, nullReward: false, differing: false,
                              shown: PAGE_OF_ROWS, opened: new Map()});
        for (const box of document.querySelectorAll("#filters input[type=checkbox]")) box.checked = false;
        update();
    }""")
    return shared_tab


def ready(tab):
    tab.wait_for_selector("body[data-ready]")
    return tab


def set_threshold(tab, value: float) -> None:
    tab.locator("#threshold").fill(str(value))


def shown_ids(tab) -> list[str]:
    while tab.locator("#more").is_visible():
        tab.locator("#more").click()
    return tab.locator(".solution .name strong").all_inner_texts()


# ---------------------------------------------------------------------------------------------- figures


def assert_same_rows(found: list[dict], expected: list[dict]) -> None:
    assert len(found) == len(expected)
    for own, row in zip(found, expected, strict=True):
        assert own.keys() == row.keys()
        for name, value in row.items():
            assert own[name] == (pytest.approx(value, rel=1e-12) if isinstance(value, float) else value), name


@pytest.mark.parametrize("k", KS)
def test_rows_are_those_of_scores_summary_json(tab, judged, k):
    for number, name in enumerate(("first", "second")):
        found = tab.evaluate(f"summaryRows(judges[{number}], solutions, {k}, 0.5)")
        assert_same_rows(found, [row for row in score_summary(judged[name]) if row["k"] == k])
    tab.locator("#k").select_option(str(k))
    shown = tab.locator("#summary tbody tr")
    assert shown.locator("td:nth-child(2)").all_inner_texts() == [str(k)] * 6 + ["1"]  # the third has one each
    [*_, average] = [row for row in score_summary(judged["first"]) if row["k"] == k]
    assert shown.nth(2).locator("td").nth(4).inner_text() == f"{average['f1']:.1f}"


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.3, 0.61, 0.75, 1.0])
def test_any_threshold_gives_what_score_py_would_have_given(tab, judged, threshold):
    """Among them those on which rewards lie: of two analyses with 0.25 and 0.75, say."""
    set_threshold(tab, threshold)
    lines = []
    for line in judged["first"]:
        steps = [[Analysis(**a) for a in step] for step in line["samples"]]
        lines.append(line | {"predictions": {str(k): predict(steps, k, threshold) for k in KS}})
    [*_, average] = [row for row in score_summary(lines) if row["k"] == 10]
    assert_same_rows(
        tab.evaluate("summaryRows(judges[0], solutions, state.k, state.threshold)")[-1:], [average]
    )
    names = ("f1", "error_accuracy", "correct_accuracy")
    shown = "F1 {:.1f} error {:.1f} correct {:.1f}".format(*(average[name] for name in names))
    assert tab.locator("#headline").inner_text().split() == shown.split()
    cells = tab.locator("#summary tbody tr").nth(2).locator("td").all_inner_texts()
    assert cells[2:5] == [f"{average[name]:.1f}" for name in ("error_accuracy", "correct_accuracy", "f1")]


@pytest.fixture(scope="module")
def odd_files() -> dict[str, list[dict]]:
    """A P(Yes) as a server may give it; a file without labels; a solution that is in a file three times."""
    return {
        "digits": [simple_line(0, -1, [[0.1 + 0.2]])],
        "unlabelled": [
            simple_line(1, -1, [[0.9]], source="labelled"),
            simple_line(2, None, [[0.9]], source="not labelled"),
        ],
        "thrice": [simple_line(3, 0, [[0.9]]), simple_line(3, 0, [[0.1]]), simple_line(3, 0, [[0.9]])],
    }


@pytest.fixture(scope="module")
def odd_tab(odd_files, tmp_path_factory, browser):
    folder = tmp_path_factory.mktemp("odd")
    write_page(
        [write_scores(folder / f"{name}.jsonl", lines) for name, lines in odd_files.items()],
        folder / "p.html",
    )
    with watched_tab(browser, folder / "p.html") as tab:
        yield ready(tab)


def test_a_p_yes_beyond_fp32_keeps_its_digits(odd_tab):
    """0.1 + 0.2 lies above 0.3 by the last bit of fp64."""
    assert odd_tab.evaluate("rewardsOf(judges[0], 1)[0]") == 0.1 + 0.2 > 0.3


@pytest.mark.parametrize("number, name", [(0, "digits"), (1, "unlabelled"), (2, "thrice")])
def test_odd_files_give_the_rows_of_score_py(odd_tab, odd_files, number, name):
    """Without an F1 for every file there is no average; a line that stands there again counts again."""
    found = odd_tab.evaluate(f"summaryRows(judges[{number}], solutions, 1, 0.5)")
    assert_same_rows(found, score_summary(odd_files[name], (1,)))
    headline = odd_tab.evaluate(f"headline(judges[{number}], solutions, '', 1, 0.5)")
    assert (
        headline["error_accuracy"]
        == {"digits": None, "unlabelled": None, "thrice": pytest.approx(100 / 3)}[name]
    )


def test_the_rewards_are_those_of_rprm(tmp_path, open_page, monkeypatch):
    """Whoever changes `rprm.reward`, to the largest P(Yes) say, changes it in the page too."""
    def largest(analyses):
        return max((a.p_yes for a in analyses if a.p_yes is not None), default=None)

    users = [module for module in sys.modules.values() if getattr(module, "reward", None) is rprm.reward]
    for module in users:
        monkeypatch.setattr(module, "reward", largest)
    lines = [simple_line(0, 0, [[0.1, None, 0.7, 0.3], [None] * 4])]
    write_page([write_scores(tmp_path / "s.jsonl", lines)], tmp_path / "p.html")
    tab = ready(open_page(tmp_path / "p.html"))
    assert [tab.evaluate(f"rewardsOf(judges[0], {k})[0]") for k in (1, 2, 3, 4)] == [0.1, 0.1, 0.7, 0.7]
    assert tab.evaluate("Number.isNaN(rewardsOf(judges[0], 4)[1])")
    tab.locator(".step").first.click()
    tab.locator(".analyses").wait_for()
    assert tab.locator(".dot-reward").all_inner_texts() == ["reward 0.700"]
    assert tab.locator(".reward-tick").count() == 1


def test_figures_by_hand(tmp_path, open_page):
    """Ten solutions of one step with reward 0.85, of which 8 are right.

    The Wilson interval of 8 in 10 is [0.490, 0.943].
    """
    lines = [simple_line(i, -1 if i < 8 else 0, [[0.8, 0.9, 0.85]]) for i in range(10)]
    lines.append(
        simple_line(10, 1, [[0.2] * 3, [0.2] * 3, [0.2] * 3])
    )  # the third step comes after the first wrong one
    write_page([write_scores(tmp_path / "s.jsonl", lines)], tmp_path / "p.html")
    tab = ready(open_page(tmp_path / "p.html"))
    steps = tab.evaluate("labelledSteps(judges[0], solutions, '', 3)")
    assert [step["right"] for step in steps] == [True] * 8 + [False] * 2 + [True, False]
    [bin] = tab.evaluate("reliability(labelledSteps(judges[0], solutions, '', 3))")
    assert (bin["count"], bin["share"]) == (10, 0.8)
    assert bin["reward"] == pytest.approx(0.85)
    assert (bin["low"], bin["high"]) == (pytest.approx(0.490, abs=5e-4), pytest.approx(0.943, abs=5e-4))
    assert tab.evaluate("histogram([0, 0.24, 0.25, 0.99, 1], 0, 1, 4)") == [2, 1, 0, 2]
    assert tab.evaluate("oddKs({k: 10})") == [1, 3, 5, 7, 9]
    assert tab.evaluate("niceTicks(0, 100)") == [0, 20, 40, 60, 80, 100]
    assert tab.evaluate("tokensPerStep(judges[0], solutions, '', 2)") == 20
    figures = tab.locator("#figures figure strong").all_inner_texts()
    assert figures == [
        "F1 against the threshold",
        "Rewards of right and wrong steps",
        "Reliability",
        "F1 against K",
        "F1 against tokens",
        "Tokens of an analysis",
    ]


# ---------------------------------------------------------------------------------------------- filters


def matches(line: dict, wanted: str, threshold: float = 0.5) -> bool:
    """What a filter lets through, from the line itself."""
    known = [[a["p_yes"] for a in step if a["p_yes"] is not None] for step in line["samples"]]
    rewards = [sum(step) / len(step) if step else None for step in known]
    below = [value is not None and value < threshold for value in rewards]
    prediction = below.index(True) if True in below else -1
    return {
        "wrong": line["label"] is not None and prediction != line["label"],
        "right": line["label"] is not None and prediction == line["label"],
        "unlabelled": line["label"] is None,
        "disagreeing": any(step and min(step) < threshold <= max(step) for step in known),
        "cut-off": any(not a["finished"] for step in line["samples"] for a in step),
        "null": None in rewards,
    }[wanted]


@pytest.mark.parametrize("wanted", ["wrong", "right", "unlabelled", "disagreeing", "cut-off", "null"])
def test_filters_show_what_they_say(tab, judged, wanted):
    if wanted in ("wrong", "right", "unlabelled"):
        tab.locator("#outcome").select_option(wanted)
    else:
        tab.locator(f"#{wanted}").check()
    expected = [line["id"] for line in judged["first"] if matches(line, wanted)]
    assert 0 < len(expected) < len(judged["first"])
    assert shown_ids(tab) == expected
    assert tab.locator("#count").inner_text().startswith(f"{len(expected)} of 69 solutions")
    if wanted == "wrong":  # the threshold moves on, and the list follows
        set_threshold(tab, 0.9)
        assert shown_ids(tab) == [line["id"] for line in judged["first"] if matches(line, wanted, 0.9)]


def test_more_rows_are_shown_on_request(tab):
    assert tab.locator(".solution").count() == 50
    assert tab.locator("#more").inner_text() == "Show 19 more of 19"
    tab.locator("#more").click()
    assert tab.locator(".solution").count() == 69
    assert not tab.locator("#more").is_visible()
    assert tab.evaluate(
        "document.activeElement.closest('.solution') === document.querySelectorAll('.solution')[50]"
    )


def test_words_of_the_problem_and_a_file_narrow_the_list(tab):
    tab.locator("#find").fill("PROBLEM 3 of")
    assert shown_ids(tab) == ["algebra-3", "logic-3"]
    tab.locator("#source").select_option("logic")
    assert shown_ids(tab) == ["logic-3"]
    assert tab.locator("#summary tbody th").all_inner_texts() == ["first: logic", "second: logic"]


def test_steps_on_which_judges_differ(tmp_path, open_page):
    """On step 1 of s0 the judges differ; of s1 one has no reward; s2 is not judged by one; s3 is the same."""
    ours = [
        simple_line(0, 1, [[0.9], [0.8]]),
        simple_line(1, -1, [[None]]),
        simple_line(2, -1, [[0.1]]),
        simple_line(3, 0, [[0.3], [0.3]]),
    ]
    theirs = [
        simple_line(3, 0, [[0.4], [0.2]]),
        simple_line(0, 1, [[0.7], [0.4]]),
        simple_line(1, -1, [[0.1]]),
    ]
    write_page(
        [write_scores(tmp_path / "a.jsonl", ours), write_scores(tmp_path / "b.jsonl", theirs)],
        tmp_path / "p.html",
    )
    tab = ready(open_page(tmp_path / "p.html"))
    assert tab.evaluate("solutions.map((_, i) => [...differingSteps(judges, i, 1, 0.5)])") == [
        [1],
        [],
        [],
        [],
    ]
    assert "the judges differ on 1 step of 1 solution of these" in tab.locator("#count").inner_text()
    tab.locator("#differing").check()
    assert shown_ids(tab) == ["s0"]
    names = tab.locator(".step").evaluate_all("bars => bars.map(bar => bar.getAttribute('aria-label'))")
    assert names == [
        "a, step 1, reward 0.900",
        "a, step 2, reward 0.800, labelled wrong, judges differ",
        "b, step 1, reward 0.700",
        "b, step 2, reward 0.400, first predicted wrong, labelled wrong, judges differ",
    ]
    set_threshold(tab, 0.85)  # now it is step 0 that they differ on
    assert tab.evaluate("[...differingSteps(judges, 0, 1, state.threshold)]") == [0]


# ---------------------------------------------------------------------------------------- a step is opened


def test_a_step_opens_to_its_analyses(tab, judged):
    number, line = next((i, line) for i, line in enumerate(judged["first"]) if len(line["samples"]) > 1)
    row = tab.locator(".solution").nth(number)
    row.locator(".step").nth(1).click()
    row.locator(".analyses").wait_for()
    samples = line["samples"][1]
    assert len({json.dumps(a) for a in samples}) == 10
    assert row.locator(".analyses .text").all_text_contents() == [a["text"] for a in samples]
    verdicts = {True: "Yes", False: "No", None: "no verdict"}
    assert row.locator(".analyses .verdict").all_text_contents() == [verdicts[a["verdict"]] for a in samples]
    for a, facts in zip(samples, row.locator(".facts").all_text_contents(), strict=True):
        assert ("P(Yes) unknown" if a["p_yes"] is None else f"P(Yes) {a['p_yes']:.3f}") in facts
        assert f"{a['n_tokens']} token" in facts
        assert ("cut off" in facts) == (not a["finished"])
        assert ("forced" in facts) == a["forced"]
    known = [a["p_yes"] for a in samples if a["p_yes"] is not None]
    dots = row.locator(".dot-row").first.locator(".sample-dot")
    assert dots.evaluate_all(
        "dots => dots.map(dot => Number(dot.style.getPropertyValue('--p')))"
    ) == pytest.approx(known, abs=1e-6)
    assert row.locator(".steps .now").text_content().startswith(line["steps"][1])
    tab.locator("#k").select_option("4")
    assert row.locator(".analyses .uncounted").count() == 6


def test_equal_analyses_share_a_card(tmp_path, open_page):
    line = simple_line(0, -1, [[0.9, 0.2, 0.9]])
    for sample, text in zip(line["samples"][0], ("same", "other", "same"), strict=True):
        sample["text"] = text
    write_page([write_scores(tmp_path / "s.jsonl", [line])], tmp_path / "p.html")
    tab = ready(open_page(tmp_path / "p.html"))
    tab.locator(".step").click()
    tab.locator(".analyses").wait_for()
    assert tab.locator(".numbers").all_text_contents() == ["Analyses 1, 3", "Analysis 2"]


def test_the_keyboard_reaches_everything(tmp_path, open_page):
    """The list is one stop of the Tab key, in which arrows move; Enter opens a step and Escape closes it."""
    lines = [simple_line(0, -1, [[0.9], [0.8], [0.7]]), simple_line(1, 0, [[0.2], [0.1]])]
    write_page([write_scores(tmp_path / "s.jsonl", lines)], tmp_path / "p.html")
    tab = ready(open_page(tmp_path / "p.html"))
    focus = "document.activeElement.getAttribute('aria-label') ?? document.activeElement.id"
    stops = []
    while not stops or "step" not in stops[-1]:
        tab.keyboard.press("Tab")
        stops.append(tab.evaluate(focus))
        assert len(stops) < 40
    assert [
        stop
        for stop in stops
        if stop in ("threshold", "k", "outcome", "disagreeing", "cut-off", "null", "find")
    ] == ["threshold", "k", "outcome", "disagreeing", "cut-off", "null", "find"]
    assert stops[-1] == "s, step 1, reward 0.900"
    for key, expected in (
        ("End", "s, step 3, reward 0.700"),
        ("ArrowDown", "s, step 2, reward 0.100"),
        ("ArrowRight", "s, step 2, reward 0.100"),
        ("Home", "s, step 1, reward 0.200, first predicted wrong, labelled wrong"),
        ("ArrowUp", "s, step 1, reward 0.900"),
        ("ArrowRight", "s, step 2, reward 0.800"),
    ):
        tab.keyboard.press(key)
        assert tab.evaluate(focus) == expected, key
    tab.keyboard.press("Enter")
    tab.locator(".analyses").wait_for()
    button = tab.get_by_role("button", name="s, step 2, reward 0.800")
    assert button.get_attribute("aria-expanded") == "true"
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.textContent") == "Close"
    tab.keyboard.press("Escape")
    assert tab.locator(".analyses").count() == 0
    assert tab.evaluate(focus) == "s, step 2, reward 0.800"
    tab.locator("#threshold").focus()
    tab.keyboard.press("ArrowRight")
    assert tab.locator("#threshold-value").inner_text() == "0.51"
    assert tab.get_by_role("group", name="s: first wrong step predicted: step 1; right").is_visible()


# ---------------------------------------------------------------------------------------- what is in the file


def test_hostile_text_stays_text(tmp_path, open_page):
    line = simple_line(0, 0, [[0.1]], source=HOSTILE, id=HOSTILE, problem=HOSTILE, steps=[HOSTILE])
    line["samples"][0][0]["text"] = HOSTILE
    run = tmp_path / "<img src=x onerror=alert(1)>"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 0, "split": "train", "loss": 1.0}\n', encoding="utf-8")
    judges = [write_scores(tmp_path / f"{name}.jsonl", [line]) for name in ("<b>one<b>", "{script}")]
    write_page(judges, tmp_path / "p.html", [run])
    assert "onerror" not in (tmp_path / "p.html").read_text(encoding="utf-8")
    tab = ready(open_page(tmp_path / "p.html"))
    tab.locator(".step").first.click()
    tab.locator(".analyses").wait_for()
    for where in (".name strong", ".problem-start", ".problem", ".analyses .text"):
        assert tab.locator(where).first.text_content() == HOSTILE
    assert tab.locator(".steps .now").text_content().startswith(HOSTILE)
    assert tab.locator("#summary tbody th").first.text_content() == f"<b>one<b>: {HOSTILE}"
    assert (
        tab.locator("#curves figcaption")
        .first.text_content()
        .startswith("<img src=x onerror=alert(1)>: loss")
    )
    assert tab.evaluate("[window.hacked, document.images.length, document.querySelectorAll('b').length]") == [
        None,
        0,
        0,
    ]


def test_scripts_that_are_not_the_pages_own_do_not_run(tmp_path, browser):
    """Were a text to get into the markup after all, the policy would still hold."""
    write_page([write_scores(tmp_path / "s.jsonl", [simple_line(0, -1, [[0.9]])])], tmp_path / "p.html")
    tab = browser.new_page()
    tab.goto((tmp_path / "p.html").as_uri())
    refused = []
    tab.on("console", lambda message: refused.append(message.text))
    tab.evaluate(
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hacked = true\">')"
    )
    tab.evaluate("""() => {
        const script = document.createElement("script");
        script.textContent = "window.hacked = true";
        document.body.append(script);
    }""")
    tab.evaluate("fetch('https://example.invalid/').catch(() => 0)")
    assert tab.evaluate("window.hacked") is None
    tab.close()
    for directive in ("img-src", "script-src", "connect-src"):
        assert any(directive in text for text in refused), refused


@pytest.mark.slow
def test_400_solutions_take_less_than_3_MB(tmp_path):
    """Texts that cannot be packed well: the page says how many it leaves out."""
    rng = random.Random(0)
    lines = []
    for i in range(400):
        line = simple_line(
            i,
            -1,
            [[0.9] * 10] * 4,
            steps=[f"{rng.getrandbits(800):x}" for _ in range(4)],
            problem=f"{rng.getrandbits(1200):x}",
        )
        for step in line["samples"]:
            for a in step:
                a["text"] = f"{rng.getrandbits(900):x}"
                a["p_yes"] = rng.random()
        line["rewards"] = [sum(a["p_yes"] for a in step) / 10 for step in line["samples"]]
        lines.append(line)
    said = write_page([write_scores(tmp_path / "s.jsonl", lines)], tmp_path / "p.html")
    assert TEXT_BYTES < (tmp_path / "p.html").stat().st_size < 3_000_000
    assert "of 400 judged solutions do not fit into 2.0 MB and are left out" in said


def test_the_texts_of_the_least_interest_are_left_out(tmp_path, open_page):
    """s0 and s4 are predicted wrongly; the samples of s2 and s3 disagree, and there is room for one of them."""
    lines = [
        simple_line(0, 0, [[0.9, 0.9]]),
        simple_line(1, -1, [[0.9, 0.9]]),
        simple_line(2, -1, [[0.9, 0.3]]),
        simple_line(3, -1, [[0.9, 0.3]]),
        simple_line(4, -1, [[0.1, 0.1]]),
    ]
    scores = [write_scores(tmp_path / "s.jsonl", lines)]
    write_page(scores, tmp_path / "all.html")
    blocks = [
        line
        for line in (tmp_path / "all.html").read_text(encoding="utf-8").splitlines()
        if 'id="texts-' in line
    ]
    one = max(len(block.split(">")[1].split("<")[0]) for block in blocks)
    said = write_page(scores, tmp_path / "p.html", text_bytes=3 * one + 3)
    assert "2 of 5 judged solutions" in said
    tab = ready(open_page(tmp_path / "p.html"))
    assert tab.evaluate("[0, 1, 2, 3, 4].filter(i => document.getElementById(`texts-0-${i}`))") == [0, 2, 4]
    assert "2 of 5 judged solutions are left out" in tab.locator("#about").inner_text()
    tab.locator(".solution").nth(1).locator(".step").click()
    assert "left out" in tab.locator(".opened .note").inner_text()
    assert tab.locator(".sample-dot").count() == 2


def test_names_of_judges():
    assert judge_names([Path("a/scores.dpo.jsonl"), Path("runs/sft/scores.jsonl"), Path("b/base.jsonl")]) == [
        "dpo",
        "sft",
        "base",
    ]
    assert judge_names([Path("a/scores.dpo.jsonl"), Path("b/scores.dpo.jsonl")]) == [
        "a/scores.dpo.jsonl",
        "b/scores.dpo.jsonl",
    ]


def test_a_step_without_analyses_is_in_the_page(tmp_path, open_page):
    """Its prompt was longer than the context: its reward is null."""
    lines = [simple_line(0, -1, [[0.9], []]), simple_line(1, 0, [[0.1]])]
    write_page([write_scores(tmp_path / "s.jsonl", lines)], tmp_path / "p.html")
    tab = ready(open_page(tmp_path / "p.html"))
    assert_same_rows(tab.evaluate("summaryRows(judges[0], solutions, 1, 0.5)"), score_summary(lines, (1,)))
    tab.get_by_role("button", name="s, step 2, reward null").click()
    assert "has no analyses" in tab.locator(".opened .note").inner_text()
    nothing = [simple_line(0, 0, [[]])]
    write_page([write_scores(tmp_path / "s.jsonl", nothing)], tmp_path / "none.html")
    tab = ready(open_page(tmp_path / "none.html"))
    assert tab.locator("#k").input_value() == "1"
    assert_same_rows(
        tab.evaluate("summaryRows(judges[0], solutions, 1, 0.5)"),
        score_summary([nothing[0] | {"predictions": {"1": -1}}], (1,)),
    )


def test_all_wrong_steps_of_prmbench_are_marked(tmp_path, open_page):
    """They are in no accuracy of ProcessBench's kind, as in score.py; all of their steps have a label."""
    prmbench = simple_line(0, 1, [[0.9], [0.2], [0.8], [0.3]], classification="confidence", error_steps=[2, 4, 9])
    lines = [prmbench, simple_line(1, -1, [[0.7]]), simple_line(2, 0, [[0.9], [0.9]])]
    write_page([write_scores(tmp_path / "s.jsonl", lines)], tmp_path / "p.html")
    tab = ready(open_page(tmp_path / "p.html"))
    assert_same_rows(tab.evaluate("summaryRows(judges[0], solutions, 1, 0.5)"), score_summary(lines[1:], (1,)))
    assert tab.evaluate("labelledSteps(judges[0], solutions, '', 1).map(step => step.right)") == [
        True, False, True, False, True, False,
    ]
    assert tab.locator(".solution .label").all_inner_texts() == ["wrong: steps 2, 4", "all right", "wrong: step 1"]
    marks = tab.locator(".solution").first.locator(".bar-mark").all_text_contents()
    assert marks == ["", "▲", "", "▲"]
    assert "PRMBench's rows are in no accuracy here" in tab.locator("#about").inner_text()
    write_page([write_scores(tmp_path / "s.jsonl", [prmbench])], tmp_path / "alone.html")
    assert "F1 –" in ready(open_page(tmp_path / "alone.html")).locator("#headline").inner_text()


@pytest.mark.parametrize(
    "broken, said",
    [
        ("{", "not valid JSON"),
        ({"samples": None}, "field 'samples'"),
        ({"samples": []}, "has 0 steps where the solution has 1"),
        ({"samples": [[]]}, "field 'rewards', step 1: 0.9 is not the reward of the samples, None"),
        ({"samples": [[{"text": "", "p_yes": 2, "n_tokens": 1, "finished": True}]]}, "is no probability"),
        ({"rewards": [0.4]}, "field 'rewards', step 1: 0.4 is not the reward of the samples, 0.9"),
        ({"rewards": [None]}, "field 'rewards', step 1"),
        ({"rewards": []}, "has 0 of them for 1 judged steps"),
        ({"label": 1}, "field 'label': 1 is out of range"),
        ({"source": 3}, "field 'source'"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(tmp_path, broken, said):
    (tmp_path / "p.html").write_text("what stood here before", encoding="utf-8")
    path = write_scores(tmp_path / "s.jsonl", [simple_line(0, -1, [[0.9]])])
    with open(path, "a", encoding="utf-8") as file:
        file.write(broken if isinstance(broken, str) else json.dumps(simple_line(1, -1, [[0.9]]) | broken))
    with pytest.raises(BadInput) as error:
        write_page([path], tmp_path / "p.html")
    assert f"{path}:2: " in str(error.value)
    assert said in str(error.value)
    assert (tmp_path / "p.html").read_text(encoding="utf-8") == "what stood here before"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["p.html", "s.jsonl"]


def test_a_file_without_lines_is_an_error(tmp_path):
    with pytest.raises(BadInput, match="has no scores"):
        write_page([write_scores(tmp_path / "s.jsonl", [])], tmp_path / "p.html")


# ---------------------------------------------------------------------------------------------- how it looks

PAIRS = [
    ("ink", "paper", 4.5),
    ("ink", "raised", 4.5),
    ("muted", "paper", 4.5),
    ("muted", "raised", 4.5),
    ("accent", "paper", 4.5),
    ("accent", "raised", 4.5),
    ("wrong", "paper", 4.5),
    ("wrong", "raised", 4.5),
    ("edge", "paper", 3),
    ("edge", "raised", 3),
    ("middle", "paper", 3),
    ("middle", "raised", 3),
]


def luminance(colour: str) -> float:
    """WCAG 2's relative luminance of "#rrggbb"."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_that_of_wcag_aa(tab, scheme):
    tab.emulate_media(color_scheme=scheme)
    colour = "name => getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim()"
    for front, back, least in PAIRS:
        values = sorted(luminance(tab.evaluate(colour, name)) for name in (front, back))
        assert (values[1] + 0.05) / (values[0] + 0.05) >= least, (front, back)
    dark = luminance(tab.evaluate(colour, "paper")) < 0.5
    assert dark == (scheme == "dark")


@pytest.mark.parametrize("width", [360, 800, 1280])
def test_nothing_stands_out_of_the_window(tab, width):
    tab.set_viewport_size({"width": width, "height": 900})
    tab.locator(".step").first.click()
    tab.locator(".analyses").wait_for()
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
