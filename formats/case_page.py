"""One HTML page of the K analyses of a case, as the tree in which they branch: the trie of their tokens.

    first = Written([" 3", "+", "4"], [0.9, 0.5, 1.0], [0.4, 0.5, 0.9], verdict=True, p_yes_at_verdict=0.9)
    write_case_page(Path("case.html"), case.problem, case.previous_steps, case.now_step, [first, ...], 0.9)

`write_sampled_case` makes these of a sampler's analyses: python rprm.py --html case.html.

What several analyses have in common stands once, as it is computed once. Each token is shaded by its
probability, and each analysis ends in its verdict and P(Yes). The page has no script; <details> fold a
branch. All text is escaped.
"""
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, NamedTuple, Sequence

import torch

from checkpoint import ChatTokenizer
from formats.markup import template
from generate import yes_against_no
from model import Decoder, Tree, at_least_fp32
from plumbing.files import writing

STYLES = ("look.css", "case_page.css")
# A token less likely than the first of these has the darkest ground; from the last on it has none.
SHADES = (0.05, 0.2, 0.5, 0.9)


class Written(NamedTuple):
    """An analysis, token by token."""

    tokens: list[str]
    probabilities: list[float] | None  # of each token, given those before it
    p_yes: list[float]  # P(Yes) where each token was written
    verdict: bool | None  # None: there is none
    p_yes_at_verdict: float | None  # with no verdict: read after an added line
    ids: list[int] | None = None  # the tokens' ids, by which analyses branch; None: by their texts


@dataclass
class Branch:
    """Tokens that some analyses have in common, and what follows them."""

    numbers: list[int]  # of the analyses, from 0
    start: int  # tokens [start, stop) of each of them
    stop: int
    ended: list[int]  # those that end here
    branches: list["Branch"]  # how the others go on, at least two of them where none ends here


def write_case_page(
    out: Path,
    problem: str,
    previous_steps: Sequence[str],
    now_step: str,
    continuations: Sequence[Written | tuple],
    reward: float | None,
) -> None:
    """Write the page; the analyses are numbered in the order in which they are given.

    reward: the step's; None if no analysis has a P(Yes)
    """
    analyses = [Written(*continuation) for continuation in continuations]
    root = grow(analyses, list(range(len(analyses))), 0)
    body = [
        show_case(problem, previous_steps, now_step),
        show_reward(analyses, reward),
        show_sizes(analyses, root),
        show_legend(analyses),
        '<ul class="tree">\n',
        show_branch(analyses, root),
        "</ul>\n",
    ]
    head, tail = template("case_page.html", STYLES).split("<!-- case -->")
    with writing(out) as file:
        file.write(head + "".join(body) + tail)


def write_sampled_case(out: Path, sampler: Any, case: Any, analyses: Sequence, reward: float | None) -> None:
    """Write the page of a case that a sampler has analysed, all of them those of rprm.py."""
    ids = sampler.prompt_ids(case)
    tokens = written(sampler.model, sampler.tokenizer, sampler.engine.yes_no, ids, analyses)
    write_case_page(out, case.problem, case.previous_steps, case.now_step, tokens, reward)


@torch.no_grad()
def written(model: Decoder, tokenizer: ChatTokenizer, yes_no: tuple[int, int], prompt: list[int],
            analyses: Sequence) -> list[Written]:
    """Analyses (text, verdict, p_yes) token by token: one pass over the tree of the prompt's ids and theirs.

    The texts are encoded again, so where the model has sampled other tokens of the same text these are shown.
    """
    answers = [tokenizer.continuation([], a.text) for a in analyses]
    tree = Tree([prompt + ids for ids in answers]).to(model.device)
    hidden = model(tree.ids, tree.positions, model.tree_attention(tree.end))
    found = []
    for analysis, ids, path in zip(analyses, answers, tree.paths, strict=True):
        logits = at_least_fp32(model.logits(hidden[path[len(prompt) - 1:-1]]))  # (n, V)
        token = torch.tensor(ids, dtype=torch.int64, device=logits.device)
        probabilities = logits.softmax(dim=-1).gather(1, token[:, None])[:, 0].tolist()
        p_yes = yes_against_no(logits, yes_no).tolist()
        texts = [tokenizer.decode([i]) for i in ids]
        found.append(Written(texts, probabilities, p_yes, analysis.verdict, analysis.p_yes, ids))
    return found


# ---------------------------------------------------------------------------------------------- the trie


def grow(analyses: list[Written], numbers: list[int], start: int) -> Branch:
    """The branch of those analyses, which agree on all tokens before `start`."""
    keys = [keys_of(analyses[number]) for number in numbers]
    stop = start + common_length([key[start:] for key in keys])
    ended = []
    following: dict[object, list[int]] = {}  # the next token -> the analyses that have it
    for number, key in zip(numbers, keys, strict=True):
        if len(key) == stop:
            ended.append(number)
        else:
            following.setdefault(key[stop], []).append(number)
    branches = [grow(analyses, some, stop) for some in following.values()]
    return Branch(numbers, start, stop, ended, branches)


def keys_of(analysis: Written) -> list:
    """What the tokens are told apart by."""
    return analysis.tokens if analysis.ids is None else analysis.ids


def common_length(sequences: list[list]) -> int:
    """How many leading items all sequences share."""
    length = 0
    for items in zip(*sequences, strict=False):
        if len(set(items)) > 1:
            break
        length += 1
    return length


def size(branch: Branch) -> int:
    """The tokens of the tree from this branch on."""
    return branch.stop - branch.start + sum(size(following) for following in branch.branches)


# ---------------------------------------------------------------------------------------------- the page


def show_case(problem: str, previous_steps: Sequence[str], now_step: str) -> str:
    steps = "".join(f"<li>{escape(step)}</li>" for step in previous_steps)
    note = '<span class="note">(the step to judge)</span>'
    now = f'<li class="now" aria-current="step">{escape(now_step)} {note}</li>'
    return f'<p class="problem">{escape(problem)}</p>\n<ol class="steps">{steps}{now}</ol>\n'


def show_reward(analyses: list[Written], reward: float | None) -> str:
    """The reward, the P(Yes) that it is made of, and both on a line from 0 to 1."""
    known = [analysis.p_yes_at_verdict for analysis in analyses if analysis.p_yes_at_verdict is not None]
    if reward is None:
        return "<h2>Reward: null</h2>\n<p>No analysis has a P(Yes).</p>\n"
    values = ", ".join(f"{value:.3f}" for value in known)
    return (
        f"<h2>Reward: {reward:.4f}</h2>\n"
        f"<p>P(Yes) at the verdicts: {values}</p>\n"
        + show_dots(analyses, reward)
    )


def show_dots(analyses: list[Written], reward: float) -> str:
    """P(Yes) as dots on a line from 0 to 1, piled up where they would hide each other, and the reward."""
    width = 400
    left = 14
    piles: dict[int, list[tuple[float, str]]] = {}
    for number, analysis in enumerate(analyses, 1):
        if analysis.p_yes_at_verdict is not None:
            x = left + analysis.p_yes_at_verdict * width
            verdict = name_of(analysis.verdict)
            title = f"analysis {number}: {verdict}, P(Yes) {analysis.p_yes_at_verdict:.3f}"
            circle = f'class="{verdict}" r="4"><title>{title}</title></circle>'
            piles.setdefault(round(x / 8), []).append((x, circle))
    highest = max(len(pile) for pile in piles.values())
    rise = min(6, 60 / highest)
    bottom = 10 + rise * highest
    circles = []
    for pile in piles.values():
        for height, (x, rest) in enumerate(pile):
            circles.append(f'<circle cx="{x:.1f}" cy="{bottom - 7 - rise * height:.1f}" {rest}')
    half = left + width / 2
    x = left + reward * width
    lines = (
        f'<line class="half" x1="{half}" x2="{half}" y1="0" y2="{bottom:.1f}"/>'
        f'<line class="axis" x1="{left}" x2="{left + width}" y1="{bottom:.1f}" y2="{bottom:.1f}"/>'
        f'<line class="reward" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom:.1f}" y2="{bottom + 8:.1f}"/>'
    )
    ticks = "".join(
        f'<text x="{left + value * width}" y="{bottom + 20:.1f}" text-anchor="middle">{text}</text>'
        for value, text in ((0, "0"), (0.5, "½"), (1, "1"))
    )
    return (
        f'<svg class="dots" viewBox="0 0 {width + 2 * left} {bottom + 24:.1f}" role="img" '
        f'aria-label="P(Yes) of the analyses on a line from 0 to 1; the reward is {reward:.4f}">'
        f"{lines}{''.join(circles)}{ticks}</svg>\n"
    )


def show_sizes(analyses: list[Written], root: Branch) -> str:
    tokens = sum(len(analysis.tokens) for analysis in analyses)
    return (
        f"<h2>Tree</h2>\n<p>{len(analyses)} analyses of {tokens} tokens in all make a tree of {size(root)} "
        "tokens: what they have in common stands once, and each draws its own next token where they "
        "branch.</p>\n"
    )


def show_legend(analyses: list[Written]) -> str:
    if all(analysis.probabilities is None for analysis in analyses):
        return '<p class="note">The probabilities of the tokens are not known.</p>\n'
    marks = []
    low = 0.0
    for shade, high in enumerate(SHADES):
        marks.append(f'<span class="likely{shade}">{low:g} to {high:g}</span>')
        low = high
    marks.append(f"<span>{low:g} to 1</span>")
    return f'<p class="note legend">Probability of a token: {" ".join(marks)}</p>\n'


def show_branch(analyses: list[Written], branch: Branch) -> str:
    """A branch as an item of a list: which analyses go this way, the tokens, the verdicts of those that end
    here, and the branches that follow."""
    first = analyses[branch.numbers[0]]
    tokens = "".join(show_token(first, i) for i in range(branch.start, branch.stop))
    ends = show_ends(analyses, branch.ended)
    following = "".join(show_branch(analyses, one) for one in branch.branches)
    if following:
        following = f"<ul>\n{following}</ul>\n"
    return (
        f"<li><details open><summary>{show_way(analyses, branch)}</summary>\n"
        f'<p class="tokens">{tokens}</p>\n{ends}{following}</details></li>\n'
    )


def show_way(analyses: list[Written], branch: Branch) -> str:
    """The analyses that go this way, and the probability of the token that leads here."""
    way = name_analyses(branch.numbers)
    first = analyses[branch.numbers[0]]
    if branch.start == branch.stop or first.probabilities is None:
        return way
    token = escape(repr(first.tokens[branch.start]))
    return f"{way} · {token} has probability {first.probabilities[branch.start]:.3f}"


def show_token(analysis: Written, i: int) -> str:
    """The token, shaded, with its numbers as a tooltip."""
    facts = [f"P(Yes) here {analysis.p_yes[i]:.3f}"]
    shade = ""
    if analysis.probabilities is not None:
        probability = analysis.probabilities[i]
        facts.insert(0, f"probability {probability:.3f}")
        shade = shade_of(probability)
    return f'<span{shade} title="{", ".join(facts)}">{escape(analysis.tokens[i])}</span>'


def shade_of(probability: float) -> str:
    for shade, limit in enumerate(SHADES):
        if probability < limit:
            return f' class="likely{shade}"'
    return ""


def show_ends(analyses: list[Written], numbers: list[int]) -> str:
    """A line for each verdict and P(Yes) with which analyses end."""
    lines: dict[str, list[int]] = {}
    for number in numbers:
        lines.setdefault(show_verdict(analyses[number]), []).append(number)
    return "".join(f'<p class="end">{name_analyses(some)}: {line}</p>\n' for line, some in lines.items())


def show_verdict(analysis: Written) -> str:
    verdict = name_of(analysis.verdict)
    shown = "no verdict" if verdict == "missing" else verdict
    if analysis.p_yes_at_verdict is None:
        p_yes = "P(Yes) unknown"
    else:
        p_yes = f"P(Yes) {analysis.p_yes_at_verdict:.3f}"
        if analysis.verdict is None:
            p_yes += ", read after an added line"
    return f'<strong class="verdict {verdict}">{shown}</strong> · {p_yes}'


def name_analyses(numbers: list[int]) -> str:
    """[0, 2, 3, 4] -> "Analyses 1, 3–5"."""
    runs = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    listed = []
    for first, last in runs:
        listed.append(str(first + 1) if first == last else f"{first + 1}–{last + 1}")
    return f"{'Analyses' if len(numbers) > 1 else 'Analysis'} {', '.join(listed)}"


def name_of(verdict: bool | None) -> str:
    return {True: "Yes", False: "No", None: "missing"}[verdict]
