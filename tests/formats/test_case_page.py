"""The page of one case: its tree is the trie of the analyses' tokens, the one that model.Tree packs."""
import random
from html.parser import HTMLParser
from pathlib import Path

import pytest

import rprm
from formats.case_page import Branch, Written, common_length, grow, name_analyses, size, write_case_page, written
from model import Tree

HOSTILE = '</span><script>window.hacked = true</script><img src=x onerror="window.hacked = true">'


def random_analyses(seed: int, count: int) -> list[Written]:
    """Analyses over three tokens, so that they share beginnings; some are the same, one begins another."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        ids = [rng.choice((0, 0, 0, 1, 2)) for _ in range(rng.randrange(0, 8))]
        found.append(Written([f" t{i}" for i in ids], [0.5] * len(ids), [0.5] * len(ids), True, 0.9, ids))
    return [*found, found[0]]


def paths(branch: Branch, before: list[tuple[int, int]]) -> dict[int, list[tuple[int, int]]]:
    """The stretches of tokens that lead to where each analysis ends."""
    here = [*before, (branch.start, branch.stop)]
    found = {number: here for number in branch.ended}
    for following in branch.branches:
        found |= paths(following, here)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_the_tree_is_the_trie_that_the_model_packs(seed):
    analyses = random_analyses(seed, 9)
    root = grow(analyses, list(range(10)), 0)
    prompt = 7  # model.Tree packs no empty sequence
    assert size(root) + 1 == len(Tree([[prompt, *analysis.ids] for analysis in analyses]))
    found = paths(root, [])
    assert sorted(found) == list(range(10))
    for number, stretches in found.items():
        stops = [stop for _, stop in stretches]
        assert [start for start, _ in stretches] == [0, *stops[:-1]]
        assert stops[-1] == len(analyses[number].ids)


def test_ids_tell_tokens_apart_that_look_the_same():
    """Two halves of letters are shown alike."""
    halves = [Written(["\ufffd"], None, [0.5], None, None, [id]) for id in (5, 6)]
    assert len(grow(halves, [0, 1], 0).branches) == 2
    assert len(grow([half._replace(ids=None) for half in halves], [0, 1], 0).branches) == 0
    assert common_length([[1, 2, 3], [1, 2], [1, 2, 4]]) == 2


def test_names_of_analyses():
    assert name_analyses([2]) == "Analysis 3"
    assert name_analyses([0, 2, 3, 4, 8]) == "Analyses 1, 3–5, 9"


CASE = ("Tom has 3 apples & buys 4.", ("He has 3.",), "3+4=8")
ANALYSES = [
    (["The sum", " is", " 7", ": No"], [0.99, 0.6, 0.04, 0.9], [0.5, 0.5, 0.5, 0.1], False, 0.1),
    (["The sum", " is", " 8", ": Yes"], [0.99, 0.6, 0.15, 0.3], [0.5, 0.5, 0.5, 0.8], True, 0.8),
    (["The sum", " is", " 7", ": No"], [0.99, 0.6, 0.04, 0.9], [0.5, 0.5, 0.5, 0.1], False, 0.1),
    (["Well"], [0.01], [0.5], None, 0.4),
    (["Well"], [0.01], [0.5], None, None),
]


def test_the_page_shows_the_case_the_reward_and_the_tree(tmp_path, open_page):
    write_case_page(tmp_path / "case.html", *CASE, ANALYSES, 0.35)
    tab = open_page(tmp_path / "case.html")
    assert tab.locator(".problem").text_content() == CASE[0]
    assert tab.locator(".steps li").all_text_contents() == ["He has 3.", "3+4=8 (the step to judge)"]
    assert tab.locator("h2").first.text_content() == "Reward: 0.3500"
    assert "P(Yes) at the verdicts: 0.100, 0.800, 0.100, 0.400" in tab.locator("h2 + p").first.text_content()
    assert (
        "5 analyses of 14 tokens in all make a tree of 7 tokens" in tab.locator("h2 + p").last.text_content()
    )
    assert [text.strip() for text in tab.locator(".tree summary").all_text_contents()] == [
        "Analyses 1–5",
        "Analyses 1–3 · 'The sum' has probability 0.990",
        "Analyses 1, 3 · ' 7' has probability 0.040",
        "Analysis 2 · ' 8' has probability 0.150",
        "Analyses 4–5 · 'Well' has probability 0.010",
    ]
    assert tab.locator(".tree .tokens").all_text_contents() == ["", "The sum is", " 7: No", " 8: Yes", "Well"]
    assert tab.locator(".tree .end").all_text_contents() == [
        "Analyses 1, 3: No · P(Yes) 0.100",
        "Analysis 2: Yes · P(Yes) 0.800",
        "Analysis 4: no verdict · P(Yes) 0.400, read after an added line",
        "Analysis 5: no verdict · P(Yes) unknown",
    ]
    shades = tab.locator(".tree .tokens span").evaluate_all("tokens => tokens.map(token => token.className)")
    assert shades == ["", "likely3", "likely0", "", "likely1", "likely2", "likely0"]
    assert (
        tab.locator(".tree .tokens span").nth(2).get_attribute("title")
        == "probability 0.040, P(Yes) here 0.500"
    )
    assert tab.locator("svg circle").count() == 4
    tab.locator(".tree summary").nth(1).focus()
    tab.keyboard.press("Enter")  # folds the branch
    assert not tab.get_by_text(" 7: No").is_visible()
    tab.set_viewport_size({"width": 360, "height": 900})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360


def test_without_probabilities_nothing_is_shaded(tmp_path):
    write_case_page(tmp_path / "case.html", *CASE, [(["a", "b"], None, [0.5, 0.9], None, None)], None)
    page = (tmp_path / "case.html").read_text(encoding="utf-8")
    assert "The probabilities of the tokens are not known." in page
    assert 'class="likely' not in page
    assert "Reward: null" in page


class Tags(HTMLParser):
    """The tags of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)


def test_hostile_text_stays_text(tmp_path, open_page):
    write_case_page(
        tmp_path / "case.html",
        HOSTILE,
        [HOSTILE],
        HOSTILE,
        [([HOSTILE, "x"], [0.5, 0.1], [0.5, 0.5], True, 0.5)],
        0.5,
    )
    tags = Tags((tmp_path / "case.html").read_text(encoding="utf-8")).found
    assert "script" not in tags
    assert "img" not in tags
    tab = open_page(tmp_path / "case.html")
    assert tab.locator(".problem").text_content() == HOSTILE
    assert tab.locator(".tokens span").first.text_content() == HOSTILE
    assert HOSTILE in tab.locator(".tree summary").text_content()
    assert tab.evaluate("[window.hacked, document.images.length]") == [None, 0]


def test_it_is_written_aside(tmp_path: Path):
    """An analysis that cannot be shown leaves what stood there before."""
    (tmp_path / "case.html").write_text("before", encoding="utf-8")
    with pytest.raises(IndexError):
        write_case_page(tmp_path / "case.html", *CASE, [(["a", "b"], [0.5], [0.5, 0.5], True, 0.5)], 0.5)
    assert (tmp_path / "case.html").read_text(encoding="utf-8") == "before"


def test_the_script_writes_the_page_of_its_analyses(tmp_path):
    """python rprm.py --html: P(Yes) at the verdict is the engine's, and the page holds the reward."""
    sampler = rprm.load_local_sampler(rprm.Config(device="cpu"), k=3, force=True)
    [(_, analyses)] = sampler.analyses([rprm.BUILT_IN])
    prompt = sampler.prompt_ids(rprm.BUILT_IN)
    found = written(sampler.model, sampler.tokenizer, sampler.engine.yes_no, prompt, analyses)
    for analysis, tokens in zip(analyses, found, strict=True):
        assert "".join(tokens.tokens) == analysis.text and len(tokens.probabilities) == len(tokens.tokens)
        assert analysis.text.endswith((" Yes", " No"))  # the verdict is the last token
        assert tokens.p_yes[-1] == pytest.approx(analysis.p_yes, abs=1e-5)
        assert all(0 < p <= 1 for p in tokens.probabilities)
    rprm.main(rprm.Config(device="cpu", k=3, html=str(tmp_path / "case.html")))
    assert f"{rprm.reward(analyses):.3f}"[:4] in (tmp_path / "case.html").read_text()
