"""The gate's section: every check, the cells that failed last, and the search."""

from __future__ import annotations

from typing import Any

from megatron_sov.report.gates import MAX_CELLS, gate_section

CELL = {"kind": "multi-key", "language": "thai", "length_tokens": 2048, "depth": 0.5, "correct": 9,
        "samples": 20, "interval": [0.258, 0.658]}


def check(step: int, passed: bool, judged: bool, cells: list[dict[str, Any]]) -> dict[str, Any]:
    return {"event": "gate", "step": step, "passed": passed, "judged": judged, "min_steps": 40,
            "threshold": 0.9, "loss": 2.31, "start_loss": 2.3, "loss_limit": 2.35, "failing_cells": cells,
            "failing_rows": [{}] * len(cells), "rows": [{"accuracy": 0.45}, {"accuracy": 0.97}]}


def test_checks_failing_cells_and_the_search() -> None:
    search = {"scanned_tokens": {"web": 500}, "train_tokens": {"web": 90_000}, "questions": 812,
              "questions_found": 0, "windows": 1000, "windows_found": 3, "window_tokens": 32,
              "overlap": 0.003}
    found = [check(0, False, False, [CELL]), check(20, False, True, []), check(40, False, False, [CELL])]
    section = gate_section(found, [search])
    checks, cells, searched = section.tables
    assert [[str(row[i]) for i in (0, 1, 4)] for row in checks.rows] == [
        ["0", "45.0%", "1"], ["20", "45.0%", "0"], ["40", "45.0%", "1"]]
    assert "FAILED" in str(checks.rows[0][-1]) and str(checks.rows[1][-1]) == "good, before step 40"
    assert cells.rows == [["multi-key", "thai", "2,048", "50%", "9 of 20", "25.8% to 65.8%"]]
    assert [row[1] for row in searched.rows] == ["0 of 812", "3 of 1,000 (0.30%)", "500 of 90,000"]


def test_long_lists_end_and_a_run_without_a_gate_has_no_section() -> None:
    section = gate_section([check(9, False, False, [CELL] * (MAX_CELLS + 2))], [])
    assert section.tables[1].rows[-1][0] == "and 2 more"
    passed = gate_section([check(9, True, True, [])], [])
    assert len(passed.tables) == 1 and "passed" in str(passed.tables[0].rows[0][-1])
    assert gate_section([], []).tables == []
