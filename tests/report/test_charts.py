"""Figures: what is drawn, and what the note below says was not."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sov.obs.events import EventLog
from megatron_sov.pages.charts import Chart
from megatron_sov.report.charts import expert_chart, heldout_charts, loss_charts, needle_charts, plan_chart
from megatron_sov.report.page import render
from megatron_sov.report.run_data import ExpertLoad, read_run


def traces(chart: Chart) -> list[dict[str, Any]]:
    return json.loads(chart.figure_json)["data"]


def numbers(packed: dict[str, str]) -> np.ndarray:
    """Return plotly's typed array: base64 of little-endian numbers, with a shape where there are
    several dimensions."""
    values = np.frombuffer(base64.b64decode(packed["bdata"]), dtype=packed["dtype"])
    return values.reshape([int(n) for n in packed["shape"].split(",")]) if "shape" in packed else values


def test_the_loss_is_drawn_at_every_step_with_its_moving_mean(runs: list[Path]) -> None:
    run = read_run(runs[0])
    raw, mean, *marks = traces(loss_charts(run)[0])
    assert [m["name"] for m in marks] == ["step not learned", "alarm"]
    assert (raw["name"], mean["name"]) == ("each step", "mean of 8 steps")
    assert numbers(raw["x"]).tolist() == list(range(1, 401))
    np.testing.assert_allclose(numbers(raw["y"]), run.curve("loss").values, rtol=1e-6)
    assert [t["name"] for t in traces(loss_charts(run)[2])] == ["english", "korean", "code"]


def test_phases_are_shaded_and_restarts_marked(runs: list[Path]) -> None:
    layout = json.loads(loss_charts(read_run(runs[0]))[0].figure_json)["layout"]
    assert [(s["type"], s["x0"], s["x1"]) for s in layout["shapes"]] == [
        ("rect", 251, 400), ("line", 233, 233)]
    assert [a["text"] for a in layout["annotations"]] == ["1", "2.A"]


def test_a_diverged_run_is_reported_and_says_so(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    for step in range(1, 101):
        log.write("step", step=step, loss=2.0 if step < 60 else float("nan"), grad_norm=float("inf"),
                  tokens=step)
    page = render([read_run(tmp_path)])
    assert "41 values are not finite and not drawn (first at step 60)." in page
    assert "Global gradient norm" not in page  # nothing left to draw


def test_heldout_has_a_line_for_each_source_and_one_for_all(runs: list[Path]) -> None:
    loss, bits = heldout_charts(read_run(runs[0]))
    assert [t["name"] for t in traces(loss)] == ["english", "korean", "code"]
    assert [t["name"] for t in traces(bits)] == ["english", "korean", "code", "all sources"]


def test_expert_load_is_shown_in_multiples_of_the_fair_share() -> None:
    chart = expert_chart(ExpertLoad(step=9, layers=[2, 3], load=np.array([[0.25] * 4, [0.1, 0.2, 0.3, 0.4]])))
    heat = traces(chart)[0]
    np.testing.assert_allclose(numbers(heat["z"]), [[1, 1, 1, 1], [0.4, 0.8, 1.2, 1.6]], rtol=1e-6)
    assert heat["y"] == ["2", "3"] and "25 % of the tokens" in chart.caption


def test_needles_have_a_map_for_each_kind_and_language() -> None:
    cells = [
        {"kind": kind, "language": "english", "length_tokens": length, "depth": depth,
         "distractors": length // 64, "correct": round(20 * share), "samples": 20, "interval": [0.25, 0.75]}
        for kind, gain in (("single", 0.1), ("multi-key", 0.0))
        for length, shares in ((4096, (0.9, 0.8, 0.7)), (8192, (0.6, 0.5, 0.4)))
        for depth, share in zip((0.0, 0.5, 0.95), (s + gain for s in shares), strict=True)]
    single, many = needle_charts({"step": 7, "when": "after", "by": "likelihood", "cells": cells})
    heat = traces(many)[0]
    assert (heat["x"], heat["y"]) == (["4,096", "8,192"], ["0%", "50%", "95%"])
    np.testing.assert_allclose(numbers(heat["z"]), [[0.9, 0.6], [0.8, 0.5], [0.7, 0.4]], rtol=1e-6)
    np.testing.assert_allclose(numbers(traces(single)[0]["z"]),
                               [[1.0, 0.7], [0.9, 0.6], [0.8, 0.5]], rtol=1e-6)
    assert heat["customdata"][0][1] == "12 of 20 right, 95 % interval 25% to 75%<br>128 other needles"
    assert many.caption == ("After the extension, step 7: multi-key, english by likelihood, "
                            "20 samples a cell; 65.0% right.")


def test_plan_and_consumption_are_shares_of_their_own_totals() -> None:
    plan, consumed = traces(plan_chart({"step": 1, "tokens": {"en": 30, "extra": 10},
                                        "plan": {"en": 50, "ko": 50}}))
    assert plan["y"] == consumed["y"] == ["en", "ko", "extra"]
    assert plan["x"] == [50, 50, 0] and consumed["x"] == pytest.approx([75, 0, 25])
    assert plan_chart({}) is None
