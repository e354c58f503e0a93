"""A judged solution as text: a line for each step."""

from formats.case_text import heading
from formats.samples import read_analyses
from rprm import Analysis


def print_solution(line: dict, threshold: float, show: bool) -> None:
    """A text line for each judged step, the prediction, and with `show` the analyses."""
    print(f"\nproblem: {line['problem']}")
    for t, (raw, value) in enumerate(zip(line["samples"], line["rewards"])):
        analyses = read_analyses({"analyses": raw}, f"step {t + 1}")
        yes, no, missing = (sum(a.verdict is verdict for a in analyses) for verdict in (True, False, None))
        shown = "null " if value is None else f"{value:.3f}"
        predicted = "wrong" if value is not None and value < threshold else "right"
        print(
            f"Step {t + 1}: reward {shown}  {predicted}  verdicts {yes} Yes, {no} No, {missing} missing  "
            f"| {line['steps'][t]}"
        )
        if show:
            print_analyses(analyses)
    judged = len(line["samples"])
    if judged < len(line["steps"]):
        print(f"(steps {judged + 1} to {len(line['steps'])} not judged: --all-steps goes on)")
    print(
        "first step predicted wrong: "
        + (f"step {line['prediction'] + 1}" if line["prediction"] >= 0 else "none")
    )


def print_analyses(analyses: list[Analysis]) -> None:
    for number, analysis in enumerate(analyses, 1):
        print(f"  --- {heading(number, analysis, ', cut off')}")
        print("    " + analysis.text.replace("\n", "\n    "))
