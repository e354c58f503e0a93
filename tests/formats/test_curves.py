"""The curves of training runs: read, thinned, and drawn in the page."""
import json
from pathlib import Path

import pytest

from formats.curves import MOST_POINTS, read_curves, thinned
from formats.page import write_page
from plumbing.errors import BadInput


def write_run(folder: Path, rows: list[dict]) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def dpo_rows(steps: int) -> list[dict]:
    rows = []
    for step in range(steps):
        rows.append(
            {
                "step": step,
                "split": "train",
                "loss": 0.7 - step / 100,
                "accuracy": 0.5,
                "margin": step / 10,
                "lr": 1e-4,
                "chosen_logprob": -10.0,
                "rejected_logprob": -12.0 - step,
            }
        )
    rows.append(
        {
            "step": steps - 1,
            "split": "validation",
            "loss": 0.6,
            "accuracy": 0.75,
            "margin": 0.2,
            "chosen_logprob": -9.0,
            "rejected_logprob": -13.0,
            "yes_rate": 0.4,
        }
    )
    return rows


def test_a_panel_for_each_metric_that_was_logged(tmp_path):
    curves = read_curves(write_run(tmp_path / "dpo", dpo_rows(3)))
    assert (curves["name"], curves["steps"], curves["not_finite"]) == ("dpo", 3, 0)
    panels = {
        panel["title"]: {curve["name"]: curve["points"] for curve in panel["series"]}
        for panel in curves["panels"]
    }
    assert list(panels) == ["Loss", "Accuracy", "Margin", "Log-probability", "Yes rate"]
    assert panels["Loss"] == {
        "train": [[1, 0.7], [2, 0.69], [3, pytest.approx(0.68)]],
        "validation": [[3, 0.6]],
    }
    assert panels["Log-probability"]["rejected, train"] == [[1, -12.0], [2, -13.0], [3, -14.0]]
    assert panels["Yes rate"] == {"validation": [[3, 0.4]]}
    sft = read_curves(
        write_run(tmp_path / "sft", [{"step": 0, "split": "train", "loss": 1}]) / "metrics.jsonl"
    )
    assert sft["panels"] == [{"title": "Loss", "series": [{"name": "train", "points": [[1, 1]]}]}]


def test_a_long_curve_is_thinned_to_means():
    points = [[step, float(step % 2)] for step in range(1, 4 * MOST_POINTS + 2)]
    found = thinned(points)
    assert len(found) == -(-len(points) // 5) <= MOST_POINTS
    assert found[0] == [3.0, pytest.approx(0.6)]  # steps 1 to 5, of which three are odd
    assert found[-1] == [len(points), 1.0]  # the last group has one point
    assert thinned(points[:MOST_POINTS]) == points[:MOST_POINTS]


def test_values_that_are_not_finite_are_counted(tmp_path, open_page):
    run = write_run(
        tmp_path / "broken",
        [
            {"step": 0, "split": "train", "loss": 2.0},
            {"step": 1, "split": "train", "loss": float("nan")},
            {"step": 2, "split": "train", "loss": float("inf")},
        ],
    )
    curves = read_curves(run)
    assert curves["not_finite"] == 2
    assert curves["panels"][0]["series"][0]["points"] == [[1, 2.0]]
    write_page([], tmp_path / "p.html", [run, write_run(tmp_path / "dpo", dpo_rows(30))])
    tab = open_page(tmp_path / "p.html")
    tab.wait_for_selector("body[data-ready]")
    titles = tab.locator("#curves figure strong").all_text_contents()
    assert titles == [
        "broken: loss",
        "dpo: loss",
        "dpo: accuracy",
        "dpo: margin",
        "dpo: log-probability",
        "dpo: yes rate",
    ]
    assert (
        "2 values of this run not finite and left out."
        in tab.locator("#curves figcaption").first.text_content()
    )
    assert not tab.locator("#scores").is_visible()
    assert not tab.locator("#solutions-section").is_visible()
    figure = tab.locator("#curves figure").nth(4)
    assert (
        figure.locator("path.curve").count() == 2
    )  # chosen and rejected in training; of validation there is one dot each
    assert figure.locator("circle.dot").count() == 2
    last_point = figure.locator("path.curve").last.get_attribute("d").split(" L")[-1].split()
    figure.locator("summary").click()
    rows = figure.locator("tbody tr").all_inner_texts()
    assert rows[-2].split("\t") == ["rejected, train", "30", "-41"]
    assert float(last_point[0]) == pytest.approx(
        388
    )  # the last of 30 steps lies at the right end of the axis


@pytest.mark.parametrize(
    "row, said",
    [
        ({"split": "train", "loss": 1.0}, ":2: field 'step' is missing"),
        (
            {"step": 1, "split": "test", "loss": 1.0},
            ":2: field 'split': 'test' is neither train nor validation",
        ),
        ({"step": 1, "split": "train", "loss": "low"}, ":2: field 'loss': expected a number"),
    ],
)
def test_a_bad_line_is_named(tmp_path, row, said):
    run = write_run(tmp_path / "run", [{"step": 0, "split": "train", "loss": 1.0}, row])
    with pytest.raises(BadInput) as error:
        read_curves(run)
    assert str(run / "metrics.jsonl") + said in str(error.value)


def test_what_is_no_run_is_an_error(tmp_path):
    with pytest.raises(BadInput, match="no such file"):
        read_curves(tmp_path)
    with pytest.raises(BadInput, match="has no loss, accuracy"):
        read_curves(write_run(tmp_path / "empty", []))
