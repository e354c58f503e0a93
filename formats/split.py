"""Raw text of a solution -> its steps.

    split_steps("Tom has 3.\\n\\nHe buys 4.", "blank")              ['Tom has 3.', 'He buys 4.']
    split_steps("1. Tom has 3.\\n2. He buys 4.", "numbered")        the same
    split_steps("Tom has 3.\\nHe buys 4.", "lines")                 the same
    split_steps("Tom has 3. He buys 4.", "sentences")              the same
"""

import re
from itertools import pairwise

SPLITS = ("blank", "numbered", "lines", "sentences")
BLANK_LINES = re.compile(r"\n[^\S\n]*\n\s*")
# "1.", "1)", "Step 1:", "**Step 1.**", "### Step 1" where a line begins
NUMBER = re.compile(
    r"^[ \t#*]*(?:Step[ \t]+(\d+)(?:[.:)]|(?=[ \t*]*$))|(\d+)[.)])[ \t*]*(?=\s|$|(?<=\*))",
    re.IGNORECASE | re.MULTILINE,
)
SENTENCE_END = re.compile(r"""[.!?]["')\]]*\s+(?=[A-Z0-9$\\("'])""")
ABBREVIATIONS = (
    "e.g.",
    "i.e.",
    "cf.",
    "vs.",
    "mr.",
    "mrs.",
    "ms.",
    "dr.",
    "fig.",
    "eq.",
    "no.",
    "approx.",
    "resp.",
)


def split_steps(text: str, how: str) -> list[str]:
    """The steps of a text, none of which is blank. how: one of SPLITS."""
    if how == "blank":
        pieces = BLANK_LINES.split(text)
    elif how == "numbered":
        pieces = split_at_numbers(text)
    elif how == "lines":
        pieces = text.splitlines()
    else:
        pieces = split_sentences(text)
    return [piece.strip() for piece in pieces if piece.strip()]


def split_at_numbers(text: str) -> list[str]:
    """A step begins where a line begins with the next number, which is taken off.

    A list within a step, which begins with 1 again, does not end it. What stands before the first number
    belongs to the first step. A text without numbers is one step.
    """
    marks = []
    for mark in NUMBER.finditer(text):
        if int((mark[1] or mark[2])[:9]) == len(marks) + 1:
            marks.append(mark)
    if not marks:
        return [text]
    pieces = [text[mark.end() : following.start()] for mark, following in pairwise(marks)]
    pieces.append(text[marks[-1].end() :])
    before = text[: marks[0].start()].strip()
    if before:
        pieces[0] = f"{before}\n{pieces[0].strip()}"
    return pieces


def split_sentences(text: str) -> list[str]:
    """A sentence ends at . ! or ? before white space, if what follows begins like a sentence.

    It does not end within $math$, nor after an abbreviation.
    """
    pieces = []
    start = 0
    for end in SENTENCE_END.finditer(text):
        before = text[start : end.end()].rstrip()
        in_math = before.count("$") % 2 == 1
        last_word = before.rsplit(None, 1)[-1].lower().lstrip("(")
        if not in_math and last_word not in ABBREVIATIONS:
            pieces.append(before)
            start = end.end()
    pieces.append(text[start:])
    return pieces
