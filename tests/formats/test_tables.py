"""A tally of several ranks is that of one; what it says besides the tables."""
from formats.tables import Tally, print_rows


def line(number: int, **fields) -> dict:
    """A line of scores.jsonl at K = 1: two steps, of which every third line has one that was too long."""
    analysis = {"text": "", "verdict": True, "p_yes": 0.25 + number % 3 / 4, "n_tokens": 10, "finished": True, "forced": False}
    samples = [[analysis], [] if number % 3 == 0 else [analysis]]
    return {"source": "a", "id": str(number), "problem": "P", "steps": ["x", "y"], "label": number % 3 - 1,
            "predictions": {"1": -1}, "samples": samples} | fields


LINES = [line(0), line(1), line(2), line(3), line(4, classification="circular", error_steps=[2]),
         line(5, label=None, candidate=0, left="min", samples=line(5)["samples"][:1])]


def tally_of(lines: list[dict]) -> Tally:
    tally = Tally((1,), (0.5,))
    for one in lines:
        tally.add(one)
    return tally


def test_the_tally_of_ranks_is_that_of_one(capsys):
    one = tally_of(LINES)
    ranks = Tally.sum([tally_of(LINES[rank::3]) for rank in range(3)])
    assert ranks.rows(["a"]) == one.rows(["a"])
    assert sorted(ranks.too_long) == sorted(one.too_long) == ["a 0 step 2", "a 3 step 2"]
    one.print_left()
    said = capsys.readouterr().out
    assert said == ("1 candidates were left when they could no longer be the best: 1 of 12 steps were not judged, about 8 tokens\n")
    ranks.print_left()
    assert capsys.readouterr().out == said
    tally_of(LINES[:5]).print_left()
    assert capsys.readouterr().out == ""


def test_each_benchmark_has_its_table(capsys):
    rows = tally_of(LINES).rows(["a"])
    assert [row["source"] for row in rows] == ["a", "PRMBench"] and [row["solutions"] for row in rows] == [5, 1]
    print_rows(rows)
    out = capsys.readouterr().out
    assert "error acc." in out and "PRMBench, K = 1" in out
    print_rows(tally_of(LINES[:4]).rows(["a"]))
    assert "PRMBench" not in capsys.readouterr().out
