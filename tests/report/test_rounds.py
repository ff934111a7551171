"""Rounds of reinforcement learning in the report, from the manifests that they were published with."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np

from megatron_sov.artifacts import new_artifact
from megatron_sov.pages.charts import Chart
from megatron_sov.report.rounds import read_rounds, round_section


def publish(run: Path, number: int, **content: object) -> None:
    with new_artifact(run / "rounds" / f"{number:04d}", "tokens") as artifact:
        artifact.content = {"round": number, **content}


def means(reward: float, **more: object) -> dict[str, object]:
    return {"responses": 64, "reward": reward, "components": {"right": reward, "<b>form</b>": 1.0},
            "response_tokens": 12.5, "truncated": 0.25, "staleness_steps": 0.0,
            "domains": {"sums": {"responses": 64, "reward": reward}}} | more


def values(chart: Chart) -> dict[str, list[float]]:
    return {curve["name"]: np.frombuffer(base64.b64decode(curve["y"]["bdata"]), np.float32).tolist()
            for curve in json.loads(chart.figure_json)["data"]}


def test_a_round_is_a_point_of_each_curve_and_a_row(tmp_path: Path) -> None:
    publish(tmp_path, 2, means=means(0.75), groups={"learns": 6, "all right": 2}, late=[["p", 1]],
            late_from=[[1, "q", 0, ""], [1, "q", 3, "all_right"]], unjudged={"failed": 3})
    publish(tmp_path, 1, means=means(0.5), groups={"learns": 8}, late=[], unjudged={})
    section = round_section(read_rounds(tmp_path))
    assert values(section.charts[0]) == {"reward": [0.5, 0.75], "&lt;b&gt;form&lt;/b&gt;": [1, 1],
                                         "right": [0.5, 0.75]}
    assert values(section.charts[-1]) == {"all right": [0, 2], "learns": [8, 6]}
    assert section.tables[0].rows == [
        ["1", "64", "0.5000", "12.5", "25.0%", "8", "–", "–", "0", "0"],
        ["2", "64", "0.7500", "12.5", "25.0%", "6", "all right 2", "failed 3", "1", "2"]]


def test_a_round_without_a_judged_response_and_a_damaged_one_break_nothing(tmp_path: Path) -> None:
    publish(tmp_path, 1, means={"responses": 0}, groups={}, late=[], unjudged={"failed": 9})
    publish(tmp_path, 2, means=means(0.5), groups={"learns": 1}, late=[], unjudged={})
    (tmp_path / "rounds" / "0002" / "manifest.json").write_text("{")
    rows = round_section(read_rounds(tmp_path)).tables[0].rows
    assert [row[0] for row in rows] == ["1"] and rows[0][-3] == "failed 9"


def test_a_run_without_rounds_has_no_section(tmp_path: Path) -> None:
    section = round_section(read_rounds(tmp_path))
    assert not (section.charts or section.tables)
