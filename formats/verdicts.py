"""Verdicts, in our own words and in other people's.

The normal form is a last line "Verification: Is the step correct (Yes/No)? Yes". Models also write the answer
in bold, in a box, on the next line or in small letters, with a sentence behind it, and thinking models quote
the question first.
"""
import re
from typing import NamedTuple

QUESTION = "Is the step correct (Yes/No)?"
VERIFICATION = f"Verification: {QUESTION}"
# What may stand between a question and its answer (white space, markup, \\boxed{, <answer>), and the answer.
ANSWER = re.compile(r"(?:[^\w\\<]|_|\\[a-z]+|</?[a-z]+>)*(yes|no)(?![^\W_])", re.IGNORECASE)
# A second answer: "/No", "or No", or a word that stands alone, which the no of "Yes, no error" does not.
SECOND_ANSWER = re.compile(r"\W*(?:/\W*(yes|no)\b|\bor\W+(yes|no)\b|(yes|no)\b(?!,? *\w))", re.IGNORECASE)
THINKING_BEGINS = re.compile(r"<think(?:ing)?>|\[THINK\]")
THINKING_ENDS = re.compile(r"</think(?:ing)?>|\[/THINK\]")
MARKUP = " \t\r*_#`-"  # of Markdown, around the words of a line


class Verdict(NamedTuple):
    """The answer to the last verification question of a text."""
    yes: bool
    question: int  # where the question begins
    letter: int    # where the answer's word begins


def analysis_start(text: str) -> int:
    """Where the analysis begins: after the thinking, </think>, in which a model may quote the question.

    What a model that is still thinking has written is no analysis: then it begins at the text's end.
    """
    start = max((match.end() for match in THINKING_ENDS.finditer(text)), default=0)
    return len(text) if THINKING_BEGINS.search(text, start) else start


def find_verdict(text: str) -> Verdict | None:
    """The answer to the last question of an analysis, whatever surrounds it; None if there is none.

        a Yes:   ? Yes   ?** Yes   ? **Yes**   ?\\nYes   ? yes   ? \\boxed{Yes}   ? Yes, the step is correct.
        None:    ? Yes or No   ? Yes/No   ? Yes No   ? Yesterday   ? Hm.   ?
    """
    question = text.rfind(QUESTION, analysis_start(text))
    if question < 0:
        return None
    answer = ANSWER.match(text, question + len(QUESTION))
    if answer is None:
        return None
    word = answer[1].lower()
    second = SECOND_ANSWER.match(text, answer.end())
    if second and second[second.lastindex].lower() != word:
        return None
    return Verdict(word == "yes", question, answer.start(1))


def parse_verdict(text: str) -> bool | None:
    """What the last answer to the verification question says; None if there is none, or if it says both."""
    verdict = find_verdict(text)
    return None if verdict is None else verdict.yes


def has_one_verdict(text: str) -> bool:
    """Exactly one verification question in the whole analysis, and it is answered (the paper's filter)."""
    return text.count(QUESTION, analysis_start(text)) == 1 and find_verdict(text) is not None


def before_verdict(text: str) -> str:
    """A text that has a verdict, up to the question's line, or up to the words before it on the same line.

    The heading "Verification:", the markup around it and an <answer> that begins there belong to the verdict.
    """
    question = find_verdict(text).question
    line = text.rfind("\n", 0, question) + 1
    words = text[line:question].rstrip(MARKUP)
    heading = words.removesuffix(":").rstrip(MARKUP)
    if heading.endswith("Verification"):
        words = heading.removesuffix("Verification").rstrip(MARKUP)
    words = words.removesuffix("<answer>").rstrip(MARKUP)
    before = text[:line]
    if words.strip(MARKUP + ">"):
        return f"{before}{words}\n"
    return before.rstrip().removesuffix("<answer>") if before.rstrip().endswith("<answer>") else before


def normal_form(text: str) -> str:
    """An analysis that has a verdict, as it is trained on: without thinking, the verdict as its last line.

        <think>Hm.</think>\\n\\nRight.\\n**Verification: Is the step correct (Yes/No)?** yes!\\nDone.
        Right.\\nVerification: Is the step correct (Yes/No)? Yes
    """
    start = analysis_start(text)
    analysis = before_verdict(text)[start:]
    line = f"{VERIFICATION} {'Yes' if find_verdict(text).yes else 'No'}"
    return (analysis.lstrip() if start else analysis) + line


def verdict_letter(text: str) -> int:
    """Where the final verdict word begins in a text that has one."""
    return find_verdict(text).letter


def has_usual_word(text: str) -> bool:
    """Is a verdict's word " Yes" or " No", with the space? These are the tokens that P(Yes) compares."""
    return text[:verdict_letter(text)].endswith(" ") and text.startswith(("Yes", "No"), verdict_letter(text))
