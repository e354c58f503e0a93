"""ProcessBench's table, made of lines of scores.jsonl.

    counts = Counter()
    for line in lines:
        count_line(counts, line, ks=(1, 4))
    print_summary(summary(counts, sources=["gsm8k"], ks=(1, 4)))

Only counts are kept, so that any number of lines can pass, and the counts of several ranks can be added.
"""
from collections import Counter

Counts = Counter[tuple[str, int, str]]  # (source, K, name) -> a number


def count_line(counts: Counts, line: dict, ks: tuple[int, ...]) -> None:
    """Add what the table says of a line, at each K: its first K analyses of each step count."""
    for k in set(ks):
        for name, number in numbers_of(line, k).items():
            counts[line["source"], k, name] += number


def numbers_of(line: dict, k: int) -> dict[str, int]:
    """The numbers of a line at one K, which the table sums."""
    label = line["label"]
    if label is None:
        kind = "unlabelled"
    elif label == -1:
        kind = "correct"
    else:
        kind = "wrong"
    steps = [analyses[:k] for analyses in line["samples"]]
    analyses = [analysis for step in steps for analysis in step]
    return {
        "solutions": 1,
        kind: 1,
        f"{kind}, predicted so": int(label is not None and line["predictions"][str(k)] == label),
        "steps": len(steps),
        "null_rewards": sum(all(analysis["p_yes"] is None for analysis in step) for step in steps),
        "analyses": len(analyses),
        "unparsed": sum(analysis["verdict"] is None for analysis in analyses),
        "truncated": sum(not analysis["finished"] for analysis in analyses),
        "forced": sum(analysis["forced"] for analysis in analyses),
        "tokens": sum(analysis["n_tokens"] for analysis in analyses),
    }


def percent(number: int, of: int) -> float | None:
    return 100 * number / of if of else None


def accuracies(found: int, wrong: int, kept: int, correct: int) -> dict[str, float | None]:
    """ProcessBench's three figures in percent. None where there is nothing to take them over.

    found: of the `wrong` solutions, those whose first wrong step was predicted
    kept: of the `correct` ones, those in which no step was predicted wrong
    F1 is the harmonic mean of both accuracies, which is not the usual F1.
    """
    error = percent(found, wrong)
    right = percent(kept, correct)
    if error is None or right is None:
        f1 = None
    elif error + right == 0:
        f1 = 0.0
    else:
        f1 = 2 * error * right / (error + right)
    return {"error_accuracy": error, "correct_accuracy": right, "f1": f1}


def summary(counts: Counts, sources: list[str], ks: tuple[int, ...]) -> list[dict]:
    """A row for each source and K, and the average over the sources if there are several."""
    rows = []
    for k in sorted(set(ks)):
        # A file given twice is one source
        own = [summary_row(counts, source, k) for source in dict.fromkeys(sources)]
        rows += own
        if len(own) > 1 and all(row["f1"] is not None for row in own):
            rows.append(average_row(own))
    return rows


def summary_row(counts: Counts, source: str, k: int) -> dict:
    """The accuracies of one source at one K, and what its analyses were like (rates in percent)."""
    def n(name: str) -> int:
        return counts[source, k, name]

    return {
        "source": source,
        "k": k,
        "solutions": n("solutions"),
        "unlabelled": n("unlabelled"),
        **accuracies(n("wrong, predicted so"), n("wrong"), n("correct, predicted so"), n("correct")),
        "unparsed": percent(n("unparsed"), n("analyses")),
        "truncated": percent(n("truncated"), n("analyses")),
        "forced": n("forced"),
        "null_rewards": n("null_rewards"),
        "tokens_per_step": n("tokens") / n("steps"),
    }


MEANS = ("error_accuracy", "correct_accuracy", "f1", "unparsed", "truncated", "tokens_per_step")
SUMS = ("solutions", "unlabelled", "forced", "null_rewards")


def average_row(rows: list[dict]) -> dict:
    """The average over the sources: figures are averaged, numbers of solutions and steps are summed."""
    average = {"source": "average", "k": rows[0]["k"]}
    for name in MEANS:
        values = [row[name] for row in rows]
        average[name] = None if None in values else sum(values) / len(values)
    for name in SUMS:
        average[name] = sum(row[name] for row in rows)
    return average


# ---------------------------------------------------------------------------------------------- printing

COLUMNS = (  # title, field of a row, width, format
    ("K", "k", 4, "d"),
    ("solutions", "solutions", 11, "d"),
    ("error acc.", "error_accuracy", 12, ".1f"),
    ("correct acc.", "correct_accuracy", 14, ".1f"),
    ("F1", "f1", 7, ".1f"),
    ("unparsed %", "unparsed", 12, ".1f"),
    ("truncated %", "truncated", 13, ".1f"),
    ("forced", "forced", 8, "d"),
    ("null", "null_rewards", 6, "d"),
    ("tokens/step", "tokens_per_step", 13, ".0f"),
)


def print_summary(rows: list[dict]) -> None:
    print("\n" + f"{'source':<16}" + "".join(f"{title:>{width}}" for title, _, width, _ in COLUMNS))
    for row in rows:
        cells = [f"{cell(row[name], form):>{width}}" for _, name, width, form in COLUMNS]
        print(f"{row['source']:<16}" + "".join(cells))
    print(
        "(error and correct accuracy and F1 in percent; unparsed: analyses without a verdict of their own; "
        "forced: those of\n them that were read after an added verification line; "
        "null: steps without any P(Yes), never predicted wrong)"
    )
    unlabelled = sum(
        row["unlabelled"] for row in rows if row["k"] == rows[0]["k"] and row["source"] != "average"
    )
    if unlabelled:
        print(f"{unlabelled} solutions have no label and count in no accuracy")


def cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
