"""The plot and the table of ratios in bench/README.md, from the committed results.

    python bench/plot.py     # after a change of bench/ratios.json, which holds what bench/run.py printed

A row of ratios.json has the work, its unit, our rate, the plain path's (null: not measured), the peer's name
and rate, the ratio of ours to the peer's before either was rounded, and the ratio that was wanted (null: none
was). The plot goes to ratios.svg, the table between the markers of README.md.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the project's modules; this folder is `bench`
from plumbing.cli import print_config, run
from plumbing.errors import BadInput
from plumbing.files import writing

BEGIN = "<!-- ratios -->"
END = "<!-- end of ratios -->"
COLOURS = {"Transformers": "#2f81b7", "TRL": "#2f81b7", "vLLM": "#3a9d78", "llama.cpp": "#8a6fb3"}


@dataclass(frozen=True)
class Config:
    results: Annotated[str, "rows of results, as JSON"] = str(HERE / "ratios.json")
    page: Annotated[str, "the page whose table is replaced"] = str(HERE / "README.md")
    out: Annotated[str, "the plot"] = str(HERE / "ratios.svg")


def main(config: Config) -> None:
    print_config(config)
    rows = json.loads(Path(config.results).read_text(encoding="utf-8"))
    page = replace_table(Path(config.page).read_text(encoding="utf-8"), table(rows), config.page)
    with writing(config.page) as file:
        file.write(page)
    draw(rows, config.out)


def table(rows: list[dict]) -> str:
    """The rows in Markdown, e.g. "| SFT | 0.37 examples/s | – | TRL | 0.0791 | **4.7×** | 6× |"."""
    lines = ["| work | ours | plain | peer | its rate | ours / its | wanted |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        plain = "–" if row["plain"] is None else number(row["plain"])
        wanted = "–" if row["wanted"] is None else f"{row['wanted']}×"
        ours = f"{number(row['ours'])} {row['unit']}"
        ratio = f"**{row['ratio']:.1f}×**"
        cells = [row["work"], ours, plain, row["peer"], number(row["rate"]), ratio, wanted]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def number(value: float) -> str:
    """Three digits: 44,800 and 0.0791."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def replace_table(page: str, table: str, where: str) -> str:
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise BadInput(f"{where}: has no markers {BEGIN} and {END}; put them back")
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def draw(rows: list[dict], path: str) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams["svg.hashsalt"] = "ratios"  # the same file each time
    figure, axes = plt.subplots(figsize=(9, 0.34 * len(rows) + 0.8), layout="constrained")
    for i, row in enumerate(rows):
        axes.barh(i, row["ratio"], height=0.62, color=COLOURS[row["peer"].split()[0]])
        end = max(row["ratio"], row["wanted"] or 0)
        axes.text(end + 0.15, i, f"{row['ratio']:.1f}× {row['peer']}", va="center")
        if row["plain"] is not None:
            axes.barh(i, row["plain"] / row["rate"], height=0.2, color="#f0a35e")
        if row["wanted"] is not None:
            axes.vlines(row["wanted"], i - 0.42, i + 0.42, color="#222222", linewidth=2)
    axes.axvline(1, color="#888888", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(rows)), [row["work"] for row in rows])
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(matplotlib.ticker.MultipleLocator(2))
    axes.set_xlim(0, 1.4 * max(row["ratio"] for row in rows))
    axes.set_xlabel("times as fast as the peer (dashed: as fast; black: the goal; orange: the plain path)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    run((Config, main))
