"""The bar of where the time went."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sov.obs.wall_time import CATEGORIES, WallTime
from megatron_sov.report.run_data import read_run
from megatron_sov.report.times import MEANINGS, time_section
from megatron_sov.runs.lock import RunLock


def test_the_bar_and_the_table_say_the_same() -> None:
    spent_s = {"productive": 3000.0, "lost": 600.0, "evaluation": 120.0, "saving": 30.0, "startup": 150.0,
               "waiting": 100.0}
    section = time_section(WallTime(0.0, spent_s))
    (chart,), (table,) = section.charts, section.tables
    bars = json.loads(chart.figure_json)["data"]
    assert {b["name"]: b["x"][0] for b in bars} == pytest.approx({CATEGORIES[k]: v / 40
                                                                  for k, v in spent_s.items()})
    assert table.rows[1][:3] == ["lost steps", "10 min 0 s", "15.0%"]
    assert chart.caption == "Of 1 h 6 min since the first start, 75.0% moved the model forward."
    assert set(MEANINGS) == set(CATEGORIES)


def test_without_a_start_there_is_nothing() -> None:
    assert (not time_section(None).charts
            and not time_section(WallTime(0.0, dict.fromkeys(CATEGORIES, 0.0))).tables)


def test_a_living_run_keeps_its_steps_after_the_last_checkpoint(tmp_path: Path) -> None:
    lines = [{"event": "run_start", "time_s": 0.0, "began_s": 0.0},
             {"event": "step", "step": 1, "time_s": 8.0, "step_time_s": 8.0}]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lock = RunLock(tmp_path)
    lock.acquire()
    living = read_run(tmp_path).wall_time
    lock.release()
    ended = read_run(tmp_path).wall_time
    assert living is not None and living.spent_s["productive"] == 8
    assert ended is not None and ended.spent_s["lost"] == 8
