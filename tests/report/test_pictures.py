"""The first screen's pictures: one line through all stages."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_sov.obs.events import EventLog
from megatron_sov.pages.charts import Chart
from megatron_sov.report.pictures import pictures
from megatron_sov.report.run_data import read_run


def lines(chart: Chart) -> dict[str, tuple[list[float], list[float]]]:
    """Return each trace's x and y by its name."""
    return {trace["name"]: tuple(np.frombuffer(base64.b64decode(trace[axis]["bdata"]),
                                               dtype=trace[axis]["dtype"]).tolist() for axis in "xy")
            for trace in json.loads(chart.figure_json)["data"]}


def stage(path: Path, num_steps: int, tokens: int, heldout_at: int) -> Path:
    """Write a stage whose steps have `tokens` tokens each, and whose loss is its step."""
    path.mkdir()
    log = EventLog(path / "events.jsonl")
    for step in range(1, num_steps + 1):
        counted = {"tokens": step * tokens} if tokens else {}
        log.write("step", step=step, loss=float(step), tokens_per_s=9.0, **counted)
    log.write("eval", step=heldout_at, heldout={"en": {"loss": 1.0, "bits_per_byte": 2.0, "tokens": 5}})
    log.close()
    return path


def test_stages_follow_one_another_by_tokens(tmp_path: Path) -> None:
    runs = [read_run(stage(tmp_path / "a", 3, 100, 3)), read_run(stage(tmp_path / "b", 2, 10, 0))]
    loss, heldout, speed = pictures(runs)
    assert lines(loss) == {"a": ([100, 200, 300], [1, 2, 3]), "b": ([310, 320], [1, 2])}
    assert lines(heldout) == {"en": ([300, 300], [2, 2])}  # the second was measured before b's first step
    assert speed.caption == "Tokens per second."


def test_steps_stand_for_tokens_where_a_stage_has_none(tmp_path: Path) -> None:
    runs = [read_run(stage(tmp_path / "a", 3, 100, 3)), read_run(stage(tmp_path / "b", 2, 0, 1))]
    loss = pictures(runs)[0]
    assert lines(loss)["b"] == ([4, 5], [1, 2])
    assert json.loads(loss.figure_json)["layout"]["xaxis"]["title"]["text"] == "optimizer steps"


def test_the_last_needles_are_the_third_picture(runs: list[Path]) -> None:
    *_, needles = pictures([read_run(path) for path in runs])
    assert needles.caption == "Needles found by extend: multi-key, english."
    assert len(json.loads(needles.figure_json)["data"][0]["x"]) == 4


@pytest.mark.parametrize("event", [{"event": "run_start"},
                                   {"event": "step", "step": 1, "loss": float("nan")}])
def test_without_figures_there_is_nothing_to_draw(event: dict, tmp_path: Path) -> None:
    EventLog(tmp_path / "events.jsonl").write(**event)
    assert pictures([read_run(tmp_path)]) == []
