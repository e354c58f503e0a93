"""A judged case as text: the case, its analyses, and the reward as a sum.

case is a rprm.Case and analysis a rprm.Analysis, which are not imported, as rprm.py imports this file.
"""


def print_judged(case, analyses: list, reward: float | None) -> None:
    print_case(case)
    for number, analysis in enumerate(analyses, 1):
        print_analysis(number, analysis)
    print_reward(analyses, reward)


def print_case(case) -> None:
    print(f"problem: {case.problem}")
    for i, step in enumerate(case.previous_steps, 1):
        print(f"given   Step {i}: {step}")
    print(f"judge   Step {len(case.previous_steps) + 1}: {case.now_step}")


def print_analysis(number: int, analysis) -> None:
    print(f"\n--- {heading(number, analysis, ', cut off at --max-new-tokens or the context')}")
    print(analysis.text)


def heading(number: int, analysis, cut_off: str) -> str:
    """A line about an analysis. cut_off: the words for one that was cut off.

    analysis 1: verdict Yes, P(Yes) 0.998, 42 tokens
    """
    verdict = {True: "Yes", False: "No", None: "missing"}[analysis.verdict]
    if analysis.p_yes is None:
        p_yes = "P(Yes) unknown"
    else:
        p_yes = f"P(Yes) {analysis.p_yes:.3f}" + (" (forced)" if analysis.forced else "")
    end = "" if analysis.finished else cut_off
    return f"analysis {number}: verdict {verdict}, {p_yes}, {analysis.n_tokens} tokens{end}"


def print_reward(analyses: list, reward: float | None) -> None:
    """The reward, and the P(Yes) that it is made of."""
    forced = sum(a.forced for a in analyses)
    print(f"\nforced: {forced} of {len(analyses)} analyses had no verdict and were read after an added line")
    if reward is None:
        print("reward: null (no analysis has a verdict; raise --max-new-tokens or leave out --no-force)")
        return
    p_yes = [f"{a.p_yes:.3f}" for a in analyses if a.p_yes is not None]
    print(f"reward: {reward:.4f}, of P(Yes) {', '.join(p_yes)}")
