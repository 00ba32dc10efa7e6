"""The benchmark page shows the figures that were recorded, no others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import page

ROOT = Path(__file__).parents[2]


def results(rows: list[list[str]]) -> str:
    about = {"cpu": "a CPU", "cores": 2, "isa": ["avx2"], "memory_gib": 8.0, "python": "3.11.0", "torch": "2.13.0"}
    tables = [{"title": "speeds", "columns": ["", "tok/s"], "rows": rows}]
    charts = [{"title": "tok/s", "bars": {"penstock": 3.0, "peer": 2.0}}]
    return json.dumps({"machine": about, "tables": tables, "charts": charts})


def test_a_region_is_written_from_its_results_and_prose_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page.RESULTS.mkdir(parents=True)
    page.PAGE.write_text(
        "before\n<!-- results: engine -->\nold\n<!-- end -->\nbetween\n<!-- results: x -->\nx\n<!-- end -->\n"
    )
    (page.RESULTS / "engine.json").write_text(results([["penstock", "3"], ["peer", "2"]]))
    page.main()
    text = page.PAGE.read_text()
    assert text.startswith("before\n")
    assert "\nbetween\n" in text
    assert "old" not in text
    assert "| penstock | 3 |\n| peer | 2 |" in text
    assert "<!-- results: x -->\nx\n<!-- end -->" in text
    drawn = (page.RESULTS / "engine.svg").read_bytes()
    page.main()
    assert page.PAGE.read_text() == text
    assert (page.RESULTS / "engine.svg").read_bytes() == drawn


def test_the_committed_page_agrees_with_the_committed_results(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / page.PAGE).read_text()
    for source in (ROOT / page.RESULTS).glob("*.json"):
        recorded = json.loads(source.read_text())
        for table in recorded["tables"]:
            for row in table["rows"]:
                assert "| " + " | ".join(row) + " |" in text, f"{source.name} is newer: run python -m benchmarks.page"
