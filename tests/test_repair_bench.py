"""The tables of docs/repair.md and docs/budget.md: made of the files of results, and the area by hand."""

import json
from pathlib import Path

import pytest

from scripts import LEADERBOARD, scripts

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def bench():
    with scripts(*LEADERBOARD, "repair_table", "repair", "inference", "edits", "budget") as found:
        yield found


def test_the_page_has_the_tables_of_the_results(bench):
    page = (ROOT / "docs" / "repair.md").read_text(encoding="utf-8")
    for name, lines in bench.repair_table.tables(ROOT / "benchmarks" / "results" / "repair").items():
        assert "\n".join(lines) in page, f"{name}: run python benchmarks/repair.py table"


def test_the_page_has_the_tables_of_the_edits(bench):
    page = (ROOT / "docs" / "repair.md").read_text(encoding="utf-8")
    results = json.loads(bench.edits.TARGET.read_text(encoding="utf-8"))
    assert set(results) == set(bench.edits.PARTS)
    for name, part in results.items():
        lines = bench.edits.table(part)
        assert len(lines) > 4 and "\n".join(lines) in page, f"{name}: run python benchmarks/edits.py table"


def test_the_page_has_the_table_of_the_budgets(bench):
    page = (ROOT / "docs" / "budget.md").read_text(encoding="utf-8")
    assert "\n".join(bench.budget.table()) in page, "run python benchmarks/budget.py table"


def test_the_best_plain_rate_by_hand(bench):
    """The best mean over the seeds that all rates have; chosen by the other seed, the other rate."""

    def run(factor, seed, value, task="sst2"):
        return bench.budget.Cell(task, "plain", 60, factor, seed), {"task": {"after": {"value": value}}}

    found = [run(1.0, 0, 0.8), run(1.0, 1, 0.6), run(2.0, 0, 0.7), run(2.0, 1, 0.8), run(2.0, 2, 0.9)]
    rates = bench.budget._plain_runs(found)["sst2", 60]
    assert bench.budget._best(rates) == {0: 0.7, 1: 0.8, 2: 0.9} == bench.budget._best(rates, {1})
    assert bench.budget._best(rates, {0}) == {0: 0.8, 1: 0.6} and bench.budget._best({}) == {}
    assert bench.budget._best(rates, {2}) == {}  # no other rate was run with it
    runs = [(bench.budget.Cell("sst2", "kept", 60, 1.0, seed), value, rates) for seed, value in ((0, 0.75), (1, 0.75))]
    said = bench.budget._against(runs, "here")  # 5 and -5 points of the best; chosen by the other seed, 5 and 15
    assert "+0.0 (standard error 5.0, 2 runs) points" in said and "+10.0 (standard error 5.0, 2 runs) against" in said
    cell = bench.budget.Cell("rte", "kept", 250, 1 / 3, 2)
    assert cell.path.name == "rte.kept.250.x0.33.2.json"


def test_areas_by_hand(bench):
    """Gains from 0.5 to 0.9. WiSE-FT: (0.5, 0.8) and the tuned model (1, 0.2): 0.5 * 0.8 + 0.5 * 0.2 = 0.5."""
    ends = [
        ["base", "base", "coarse+fine", 0.5, [], 1.0, []],
        ["tuned", "tuned model", "coarse+fine", 0.9, [], 0.2, []],
    ]
    looked = [
        ["WiSEFT alpha 0.5", "WiSEFT", "coarse", 0.7, [], 0.8, []],
        ["WiSEFT alpha 0.5 parts 0.7/0.5", "WiSEFT, bent", "coarse", 0.7, [], 0.9, []],  # 0.05 more than the line
        ["TIES density 0.1", "TIES", "coarse", 0.4, [], 0.9, []],  # below the base: no gain
        ["TIES density 0.1", "TIES", "coarse+fine", 0.9, [], 1.0, []],  # the second look does not count
    ]
    assert bench.repair_table.areas([*ends, *looked]) == pytest.approx(
        {"WiSEFT": 0.5, "WiSEFT, bent": 0.55, "TIES": 0.2}
    )
