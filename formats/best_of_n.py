"""Best-of-N: of several candidates for a problem, the one whose steps have the best rewards.

The score of a candidate is an aggregate of its steps' rewards: their min, mean, last or product. The pick is
the candidate with the highest score, of equals the first. Scores are compared to six digits, since the reward
of the same step, judged twice, may differ by rounding. Its accuracy stands beside

    pass@1         the mean over all candidates
    vote           the answer that most candidates give; of equals the one that comes first
    vote by min    the same, where each vote counts as much as its candidate's score (for each aggregate)
    oracle         pass@N: a candidate is right, whichever

at N = 1, 2, 4, ... candidates: the mean over all choices of N among those of a problem, in closed form where
there is one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np

from formats.answers import answer_classes, find_answer, has_math_verify, same_answer
from formats.bootstrap import interval, weights_of
from formats.columns import Column, print_columns
from formats.rows import Solution
from formats.scores import Scored
from plumbing.errors import BadInput
from rprm import Analysis, reward

AGGREGATES = ("min", "mean", "last", "product")
FALLING = ("min", "product")  # no further step can raise these, as no reward is above 1
LEAST = 1e-300  # the logarithm of a reward of 0 is that of this
SUBSETS = 1000  # so many choices of N candidates are drawn where there are more


@dataclass
class Problem:
    """A problem with its candidates, in the order in which they are given."""

    candidates: list[Scored]
    answers: list[str | None]  # of each candidate
    correct: list[bool | None]  # None = unknown


# --------------------------------------------------------------------------------------- scores of candidates


def aggregate(rewards: np.ndarray, how: str) -> float:
    """The score of a candidate from the rewards of its steps; -inf if it has none.

    Null rewards are left out. For `last` that of the last step counts alone. A product is given as its
    logarithm, which does not vanish over many steps and has the same order.
    """
    if how == "last":
        rewards = rewards[-1:]
    known = rewards[~np.isnan(rewards)]
    if not len(known):
        return -np.inf
    if how == "min":
        return float(known.min())
    if how == "product":
        return math.fsum(np.log(np.maximum(known, LEAST)))  # rounded once: a further step never raises it
    return float(known.mean())


def rank_of(score: float) -> float:
    """The score as it is compared with others: scores that differ by rounding alone are equal."""
    return round(score, 6)


def weight(score: float, how: str) -> float:
    """What a vote with this score counts: the aggregate itself, 0 if there is none."""
    if score == -np.inf:
        return 0.0
    return float(np.exp(score)) if how == "product" else score


class Race:
    """Which candidates can no longer be the best of their problem, while all of them are being judged.

    A candidate's score by one of FALLING can only fall. One whose steps by now give less than a complete
    candidate has lost, and so has one that gives as much and comes later: the first of equals is picked.
    """

    def __init__(self, how: str | None):
        """how: one of FALLING; None: nobody loses before the end."""
        self.how = how
        self.best: dict[str, tuple[float, int]] = {}  # problem -> (rank_of score, -number) of the best

    def finish(self, number: int, solution: Solution, steps: list[list[Analysis]]) -> None:
        """All steps of a candidate are judged. number: its number in the order of the candidates."""
        if self.how is None:
            return
        problem = solution.problem.strip()
        own = rank_of(score_by_now(steps, self.how)), -number
        self.best[problem] = max(own, self.best.get(problem, own))

    def is_lost(self, number: int, solution: Solution, steps: list[list[Analysis]]) -> bool:
        """steps: the analyses of the steps that are judged by now."""
        best = self.best.get(solution.problem.strip())
        if best is None:
            return False
        score = rank_of(score_by_now(steps, self.how))
        return score > -np.inf and (score, -number) < best  # without any reward nothing is known yet


def score_by_now(steps: list[list[Analysis]], how: str) -> float:
    rewards = [reward(analyses) for analyses in steps]
    return aggregate(np.array([np.nan if value is None else value for value in rewards], dtype=float), how)


# ---------------------------------------------------------------------------------------------- problems


def check_left(scores: Sequence[Scored], by: str, k: int | None, aggregates: Sequence[str]) -> None:
    """Raise BadInput if a candidate was left (judge --best) that this other choice may pick."""
    for line in scores:
        if line.left is None:
            continue
        if by != "problem" or k is not None or tuple(aggregates) != (line.left,):
            raise BadInput(
                f"{line.where}: was left, as it could no longer be the best of its problem by {line.left}; "
                f"give --aggregate {line.left} alone, without --k and --by, or judge the solutions anew "
                f"without --best"
            )


def group(scores: Sequence[Scored], by: str) -> list[Problem]:
    """The candidates of each problem, in the order of the first ones. by: "problem", its text, or "id", with
    the source.
    """
    groups: dict[tuple[str, ...], list[Scored]] = {}
    for line in scores:
        if line.left is None:
            line.check_judged(len(line.solution.steps))
        key = (line.solution.problem.strip(),) if by == "problem" else (line.source, line.solution.id)
        groups.setdefault(key, []).append(line)
    return [make_problem(candidates) for candidates in groups.values()]


def make_problem(candidates: list[Scored]) -> Problem:
    """Raises BadInput if the rows of a problem have several true answers."""
    true_answer = None
    for line in candidates:
        answer = line.solution.extra.get("answer")
        if answer is None:
            continue
        if true_answer is not None and not same_answer(true_answer, answer):
            raise BadInput(
                f"{line.where}: field 'answer': {answer[:40]!r} is not that of {candidates[0].where}, "
                f"a candidate for the same problem ({true_answer[:40]!r}); correct it"
            )
        true_answer = true_answer or answer
    answers = [answer_of(line) for line in candidates]
    correct = [
        is_correct(line, answer, true_answer) for line, answer in zip(candidates, answers, strict=True)
    ]
    return Problem(candidates, answers, correct)


def answer_of(line: Scored) -> str | None:
    """The candidate's answer: as given, else as found in its text."""
    given = line.solution.extra.get("final_answer")
    return given if given is not None else find_answer("\n".join(line.solution.steps))


def is_correct(line: Scored, answer: str | None, true_answer: str | None) -> bool | None:
    """Is a candidate right: as given; else by the problem's true answer; else by its label, if no step of it
    is wrong.

    A candidate without an answer is wrong where the true one is known.
    """
    if "correct" in line.solution.extra:
        return line.solution.extra["correct"]
    if true_answer is not None:
        return answer is not None and same_answer(true_answer, answer)
    if line.solution.label is not None:
        return line.solution.label == -1
    return None


def picks(problem: Problem, aggregates: Sequence[str]) -> dict:
    """The line of best.jsonl: the pick by each aggregate."""
    first = problem.candidates[0]
    line = {
        "source": first.source,
        "id": first.solution.id,
        "problem": first.solution.problem,
        "candidates": len(problem.candidates),
        "picks": {},
    }
    for how in aggregates:
        scores = [aggregate(candidate.rewards, how) for candidate in problem.candidates]
        number = int(np.argmax([rank_of(score) for score in scores]))
        solution = problem.candidates[number].solution
        line["picks"][how] = {
            "candidate": number,
            "score": None if scores[number] == -np.inf else weight(scores[number], how),
            "steps": list(solution.steps),
            "answer": problem.answers[number],
            "correct": problem.correct[number],
        }
    return line


# -------------------------------------------------------------------------------------------- accuracy over N


def accuracy_of_best(order: np.ndarray, correct: np.ndarray, n: int) -> float:
    """How often the pick of n of the M candidates is right, over all choices of n.

    order: the candidates from the best to the worst. The j-th best is the pick of those choices that hold it
    and n - 1 of the M - 1 - j worse ones:

        sum_j correct[order[j]] * C(M - 1 - j, n - 1) / C(M, n)
    """
    M = len(order)
    chances = [comb(M - 1 - j, n - 1) / comb(M, n) for j in range(M)]
    return float(np.dot(chances, correct[order]))


def accuracy_of_oracle(correct: np.ndarray, n: int) -> float:
    """How often one of n of the M candidates is right: 1 - C(wrong, n) / C(M, n)."""
    M = len(correct)
    return 1 - comb(M - int(correct.sum()), n) / comb(M, n)


def accuracy_of_vote(
    classes: Sequence[int | None], weights: np.ndarray, correct: np.ndarray, chosen: np.ndarray
) -> float:
    """How often the answer with the most votes is right, over S choices of n of the candidates.

    classes: the number of each candidate's answer, None without one. weights: what its vote counts. chosen:
    (S, n), the candidates of each choice in their order. Where none of them has an answer, the vote is wrong.
    """
    n = chosen.shape[1]
    names = np.array([-1 if name is None else name for name in classes])
    votes = np.zeros((len(chosen), len(classes)))  # (S, classes)
    first = np.full(
        (len(chosen), len(classes)), len(classes)
    )  # the first candidate of each class in a choice
    rows = np.arange(len(chosen))
    for column in reversed(range(n)):
        candidate = chosen[:, column]
        has_answer = names[candidate] >= 0
        name = names[candidate][has_answer]
        votes[rows[has_answer], name] += weights[candidate][has_answer]
        first[rows[has_answer], name] = candidate[has_answer]
    best = np.where(first < len(classes), votes, -1.0)
    tied = best == best.max(axis=1, keepdims=True)
    winner = np.where(tied, first, len(classes)).min(
        axis=1
    )  # (S,): the first candidate with the winning answer
    return float(np.append(correct, False)[winner].mean())


def choices(M: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """All choices of n of M numbers, as sorted rows, (S, n); SUBSETS drawn ones where there are more."""
    if comb(M, n) <= SUBSETS:
        return np.array(list(combinations(range(M), n)))
    return np.sort(np.argsort(rng.random((SUBSETS, M)), axis=1)[:, :n], axis=1)


def accuracies(
    problem: Problem, aggregates: Sequence[str], n: int, rng: np.random.Generator
) -> dict[str, float]:
    """The chance to be right at n candidates, by each way of choosing. A problem with fewer than n gives all
    it has.
    """
    correct = np.array(problem.correct, dtype=float)
    n = min(n, len(correct))
    classes = answer_classes(problem.answers)
    chosen = choices(len(correct), n, rng)
    found = {"pass@1": float(correct.mean())}
    scores = {
        how: np.array([aggregate(candidate.rewards, how) for candidate in problem.candidates])
        for how in aggregates
    }
    for how in aggregates:
        order = np.argsort([-rank_of(score) for score in scores[how]], kind="stable")
        found[how] = accuracy_of_best(order, correct, n)
    found["vote"] = accuracy_of_vote(classes, np.ones(len(correct)), correct, chosen)
    for how in aggregates:
        weights = np.array([weight(score, how) for score in scores[how]])
        found[f"vote by {how}"] = accuracy_of_vote(classes, weights, correct, chosen)
    found["oracle"] = accuracy_of_oracle(correct, n)
    return found


def sizes(problems: Sequence[Problem]) -> list[int]:
    """N = 1, 2, 4, ... and the largest number of candidates."""
    most = max(len(problem.candidates) for problem in problems)
    found = [1]
    while found[-1] * 2 <= most:
        found.append(found[-1] * 2)
    return found if found[-1] == most else [*found, most]


def table(problems: Sequence[Problem], aggregates: Sequence[str]) -> list[dict]:
    """A row for each way of choosing and N: the accuracy in percent over problems, with its 95% interval.

    Problems of which a candidate's correctness is unknown are left out. There is no vote where no candidate
    has an answer. Of a candidate that was left (judge --best) it is known only that it loses among all: then
    there is but the largest N, and no vote by score.
    """
    known = [problem for problem in problems if None not in problem.correct]
    if not known:
        return []
    some_were_left = any(candidate.left for problem in known for candidate in problem.candidates)
    has_answers = any(answer is not None for problem in known for answer in problem.answers)
    weights = weights_of([np.ones(len(known), dtype=bool)]) / len(known)
    rng = np.random.default_rng(0)
    rows = []
    for n in sizes(known)[-1:] if some_were_left else sizes(known):
        of_problems = [accuracies(problem, aggregates, n, rng) for problem in known]
        for name in of_problems[0]:
            if name.startswith("vote") and not has_answers:
                continue
            if name.startswith("vote by") and some_were_left:
                continue
            values = 100 * np.array([found[name] for found in of_problems])
            low, high = interval(weights @ values)
            rows.append(
                {
                    "by": name,
                    "n": n,
                    "problems": len(known),
                    "accuracy": float(values.mean()),
                    "accuracy_low": low,
                    "accuracy_high": high,
                }
            )
    return rows


def print_table(problems: Sequence[Problem], aggregates: Sequence[str]) -> None:
    """The accuracies, a line for each way of choosing and a column for each N; and what they are made of."""
    rows = table(problems, aggregates)
    fewest = min(len(problem.candidates) for problem in problems)
    most = max(len(problem.candidates) for problem in problems)
    print(f"\n{len(problems)} problems with {fewest if fewest == most else f'{fewest} to {most}'} candidates")
    if not rows:
        print("no table: it is not known which candidates are right (give `answer` or `correct` with them)")
        return
    ns = list(dict.fromkeys(row["n"] for row in rows))
    lines: dict[str, dict] = {}
    for row in rows:
        line = lines.setdefault(row["by"], {"by": row["by"]})
        for end in ("", "_low", "_high"):
            line[f"{row['n']}{end}"] = row[f"accuracy{end}"]
    columns = [Column("chosen by", "by", 18, "s")]
    columns += [Column(f"N = {n}", str(n), 22, ".1f", True) for n in ns]
    print_columns(lines.values(), columns)
    print("(percent of the problems; the mean over choices of N candidates; 95%: bootstrap over problems)")
    if fewest < most:
        print("A problem with fewer than N candidates gives all that it has.")
    left_out = len(problems) - rows[0]["problems"]
    if left_out:
        print(f"{left_out} problems are left out: not all their candidates are known to be right or wrong.")
    if not has_math_verify():
        print("Answers were compared as numbers and as text; `pip install math-verify` compares mathematics.")
