"""PRM800K: several completions for each step of a solution, rated by a person; with one of them it went on.

    {"question": {"problem": "..."},
     "label": {"steps": [{"completions": [{"text": "...", "rating": 1, "flagged": null}, ...],
                          "chosen_completion": 0, "human_completion": null}, ...],
               "finish_reason": "found_error"},
     "is_quality_control_question": false, "is_initial_screening_question": false}

Ratings are 1, -1, and 0 for a neutral step. A step that its labeler could not rate is flagged.
"""
from collections import Counter
from typing import NamedTuple

from formats.rows import (
    AFTER_FIRST_WRONG,
    OUT_OF_RANGE,
    Defect,
    Labelled,
    check_number,
    text_of,
    truth,
    whole_number,
)
from plumbing.files import expect, get_field
from rprm import Case

# rows that are no solutions to learn from, by the field that says so
KINDS = {"is_quality_control_question": "quality control", "is_initial_screening_question": "screening"}
NEUTRAL = "dropped: neutral step"
AFTER_UNRATED = "dropped: step after one without a rating"
AFTER_NONE = "dropped: step after one with none chosen"


class Completion(NamedTuple):
    """One of the completions for a step."""
    text: str
    rating: int | None
    dropped: str | None  # why it is no case


def prm800k(row: dict, where: str, counts: Counter) -> Labelled:
    """Each completion rated 1 or -1 is a case; its previous steps are the chosen ones before it.

    The solution ends where they are no longer to be trusted: after a chosen step that is wrong or not rated.
    Where its labeler gave up, or found the problem broken, it is read up to there, which is counted.
    """
    for name, kind in KINDS.items():
        if row.get(name) is not None and truth(row[name], f"{where}: field '{name}'"):
            counts[f"dropped: {kind} row"] += 1
            return []
    problem = text_of(get_field(row, "question", dict, where), "problem", f"{where}: field 'question'")
    label = get_field(row, "label", dict, where)
    steps = get_field(label, "steps", list, f"{where}: field 'label'")
    check_number(steps, f"{where}: field 'label.steps'")
    if label.get("finish_reason") in ("bad_problem", "give_up"):
        counts[f"read as far as rated: finish_reason {label['finish_reason']}"] += 1
    found = []
    previous = ()
    end = None
    for i, step in enumerate(steps):
        here = f"{where}: field 'label.steps'[{i}]"
        completions = _completions(expect(step, dict, here), here)
        if end:
            counts[end] += len(completions)
            continue
        for j, completion in enumerate(completions):
            if completion.dropped:
                counts[completion.dropped] += 1
            else:
                found.append((f"{i}-{j}", Case(problem, previous, completion.text, completion.rating == 1)))
        text, end = _chosen(step, completions, here)
        previous += (text,)
    return found


def _completions(step: dict, here: str) -> list[Completion]:
    found = []
    for j, completion in enumerate(expect(step.get("completions") or [], list, f"{here}.completions")):
        where = f"{here}.completions[{j}]"
        text = get_field(expect(completion, dict, where), "text", str, where)
        rating = completion.get("rating")
        flagged = completion.get("flagged")
        if rating not in (1, 0, -1, None) or isinstance(rating, bool):
            raise Defect(OUT_OF_RANGE, f"{where}: field 'rating': {rating!r} is not 1, 0 or -1; correct it")
        dropped = None
        if not text.strip():
            dropped = "dropped: blank step"
        elif flagged is not None and truth(flagged, f"{where}: field 'flagged'"):
            dropped = "dropped: step that its labeler could not rate (flagged)"
        elif rating is None:
            dropped = "dropped: step without a rating"
        elif rating == 0:
            dropped = NEUTRAL
        found.append(Completion(text, rating, dropped))
    return found


def _chosen(step: dict, completions: list[Completion], here: str) -> tuple[str, str | None]:
    """(the step with which the solution goes on, None); or ("", why the steps after it are dropped)."""
    if step.get("chosen_completion") is not None:
        chosen = whole_number(step, "chosen_completion", here)
        if not 0 <= chosen < len(completions):
            raise Defect("chosen_completion out of range",
                         f"{here}: field 'chosen_completion': {chosen} is out of range "
                         f"(0 to {len(completions) - 1}); correct it")
        completion = completions[chosen]
        if completion.dropped not in (None, NEUTRAL):
            return "", AFTER_UNRATED
        return ("", AFTER_FIRST_WRONG) if completion.rating == -1 else (completion.text, None)
    human = step.get("human_completion")  # one that the labeler wrote, which counts as correct
    if human is None:
        return "", AFTER_NONE
    text = human.get("text") if isinstance(human, dict) else human
    if not expect(text, str, f"{here}: field 'human_completion'").strip():
        return "", AFTER_UNRATED
    return text, None
