"""Which tests `make test` runs, and how long one may take."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import tiers

ROOT = Path(__file__).parents[1]


def judged(used_s: float, tmp_path: Path, *, deep: bool = False, outcome: str = "passed",
           times: Path | None = None) -> Any:
    """Return the report of a test that took so much processor time."""
    item: Any = SimpleNamespace(
        nodeid="tests/test_a.py::test_b", stash={tiers.USED: used_s},
        config=SimpleNamespace(option=SimpleNamespace(processor_times=times)),
        get_closest_marker=lambda name: deep and name == "deep")
    report: Any = SimpleNamespace(when="call", outcome=outcome, passed=outcome == "passed", longrepr="")
    tiers.judge_processor_time(item, report)
    return report


def test_a_slow_test_fails_and_a_deep_one_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "measure_slowness", lambda: 1.0)
    assert judged(2.9, tmp_path).outcome == "passed"
    assert judged(3.1, tmp_path).outcome == "failed"
    assert "at most 3.0 s on this machine" in judged(3.1, tmp_path).longrepr
    assert judged(60, tmp_path, deep=True).outcome == "passed"
    assert judged(60, tmp_path, outcome="failed").longrepr == ""


def test_a_slow_machine_allows_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "measure_slowness", lambda: 2.0)
    assert judged(5.9, tmp_path).outcome == "passed"
    assert judged(6.1, tmp_path).outcome == "failed"
    assert tiers.measure_slowness() >= 1


def test_times_are_written_where_they_are_asked_for(tmp_path: Path) -> None:
    times = tmp_path / "times.jsonl"
    assert judged(60, tmp_path, times=times).outcome == "passed"
    assert json.loads(times.read_text()) == {"test": "tests/test_a.py::test_b", "seconds": 60, "deep": False}


def test_what_numba_compiles_is_in_no_tests_time() -> None:
    import numba

    before_s = tiers._imports["seconds"]
    assert numba.njit(lambda x: x + 1)(1) == 2
    assert tiers._imports["seconds"] > before_s


def test_the_fifths_share_all_files_and_depend_on_no_folder_above() -> None:
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    fifths = [tiers.fifth_of(file) for file in files]
    assert set(fifths) == set(range(tiers.NUM_FIFTHS))
    assert max(map(fifths.count, fifths)) < len(files) / 3
    assert fifths == [tiers.fifth_of(Path("/elsewhere") / file.relative_to(ROOT)) for file in files]
