"""Charts of the report, curves of steps, and the events that they are read from."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from megatron_sov.base.errors import UserError
from megatron_sov.base.pages.page import Chart
from megatron_sov.commands.operate.runs.run_state import format_run_state, read_run_state
from megatron_sov.publish.report.charts import (
    MAX_POINTS, draw_heldout_charts, draw_loss_charts, draw_needle_charts)
from megatron_sov.publish.report.page import render_report
from megatron_sov.publish.report.run_data import read_run
from megatron_sov.publish.report.steps import Curve, StepTable, compute_moving_mean, downsample
from megatron_sov.runs.obs.events import EVENTS, EventLog, final_step_events, parse_event, read_events
from tests.run_files import read_run_events


def list_series_names(chart: Chart) -> list[str]:
    return [series.name for series in chart.plot.series]


def test_the_loss_is_drawn_at_every_step_with_its_moving_mean(runs: list[Path]) -> None:
    run = read_run(runs[0])
    loss, _, by_source = draw_loss_charts(run)
    raw, mean = loss.plot.series
    assert (raw.name, raw.is_faint, mean.name) == ("each step", True, "mean of 8 steps")
    curve = run.get_curve("loss")
    drawn = dict(zip(curve.steps.tolist(), curve.values.tolist(), strict=True))
    assert len(raw.x) <= MAX_POINTS and all(drawn[x] == y for x, y in zip(raw.x, raw.y, strict=True))
    assert list_series_names(by_source) == ["english", "korean", "code"]


def test_phases_are_bands_and_restarts_are_rules(runs: list[Path]) -> None:
    plot = draw_loss_charts(read_run(runs[0]))[0].plot
    assert plot.bands == [("1", 1, 251), ("2.A", 251, 400)] and plot.rules == [("restart", 233)]


def test_a_diverged_run_is_marked_in_its_report(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    for step in range(1, 101):
        log.write("step", step=step, loss=2.0 if step < 60 else float("nan"), grad_norm=float("inf"),
                  tokens=step)
    page = render_report([read_run(tmp_path)])
    assert "41 values are not finite and not drawn (first at step 60)." in page
    assert "Global gradient norm" not in page  # nothing left to draw


def test_heldout_chart_has_a_line_for_each_source_and_the_total(runs: list[Path]) -> None:
    (bits,) = draw_heldout_charts(read_run(runs[0]))
    assert list_series_names(bits) == ["english", "korean", "code", "all sources"]
    assert bits.plot.y.title == "bits per byte"


def test_needles_have_a_map_for_each_kind_and_language() -> None:
    cells = [
        {"kind": kind, "language": "english", "length_tokens": length, "depth": depth,
         "distractors": length // 64, "correct": round(20 * share), "samples": 20, "interval": [0.25, 0.75]}
        for kind, gain in (("single", 0.1), ("multi-key", 0.0))
        for length, shares in ((4096, (0.9, 0.8, 0.7)), (8192, (0.6, 0.5, 0.4)))
        for depth, share in zip((0.0, 0.5, 0.95), (s + gain for s in shares), strict=True)]
    single, many = draw_needle_charts({"step": 7, "when": "after", "cells": cells})
    heat = many.plot
    assert (heat.columns, heat.rows) == (["4,096", "8,192"], ["0 %", "50 %", "95 %"])
    np.testing.assert_allclose(heat.values, [[0.9, 0.6], [0.8, 0.5], [0.7, 0.4]], rtol=1e-6)
    np.testing.assert_allclose(single.plot.values, [[1.0, 0.7], [0.9, 0.6], [0.8, 0.5]], rtol=1e-6)
    assert heat.shown[0] == ["90 %", "60 %"]
    assert heat.notes[0][1] == "12 of 20 right, 95 % interval 25 % to 75 %; 128 other needles"
    assert many.caption == ("After the extension, step 7: multi-key, english, "
                            "20 samples a cell; 65 % right.")


# Step curves: restarts, downsampling, smoothing.

steps_in_any_order = st.lists(st.fixed_dictionaries(
    {"event": st.just("step"), "step": st.integers(0, 30), "loss": st.floats(0, 10)}, optional={
        "losses_by_source": st.dictionaries(st.sampled_from(["en", "ko"]), st.floats(0, 10), max_size=2)}),
                              max_size=60)


@given(steps_in_any_order)
def test_the_last_of_a_repeated_step_counts_as_in_final_steps(events: list[dict]) -> None:
    table = StepTable()
    for event in events:
        table.add_event(event)
    curves = table.build_curves()
    final = final_step_events(events)
    if final:
        loss = curves[""]["loss"]
        assert loss.steps.tolist() == [e["step"] for e in final]
        assert loss.values.tolist() == [e["loss"] for e in final]
    for name in ("en", "ko"):
        expected = {e["step"]: e["losses_by_source"][name]
                    for e in final if name in e.get("losses_by_source", {})}
        result = curves["losses_by_source"].get(name)
        assert expected == (dict(zip(result.steps.tolist(), result.values.tolist(), strict=True))
                            if result else {})


def test_phases_come_from_step_events() -> None:
    table = StepTable()
    # a restart repeats steps 2 to 4, of which step 3 is now in phase "a"
    for step, phase in ((1, "a"), (2, "a"), (3, "b"), (4, "b"), (2, "a"), (3, "a"), (4, "b"), (5, "a")):
        table.add_event({"event": "step", "step": step, "phase": phase})
    assert table.find_phases() == [("a", 1, 3), ("b", 4, 4), ("a", 5, 5)]
    assert StepTable().find_phases() == []


def test_numbers_spelt_as_text_are_read() -> None:
    table = StepTable()
    for step, loss in enumerate((1.5, "nan", "inf", "-inf", None)):  # as JSON has no such numbers
        table.add_event({"event": "step", "step": step, "loss": loss})
    loss = table.build_curves()[""]["loss"]
    np.testing.assert_array_equal(loss.values, [1.5, math.nan, math.inf, -math.inf])
    assert loss.steps.tolist() == [0, 1, 2, 3]  # a step without a loss has no point
    assert loss.drop_nonfinite().steps.tolist() == [0]


def test_downsampling_keeps_every_spike_of_a_long_curve() -> None:
    noise = np.random.default_rng(0)
    values = noise.normal(size=300_000) * 0.01
    spikes = random.Random(0).sample(range(300_000), 100)
    values[spikes] = 5 + np.arange(100)
    drawn = downsample(Curve("loss", np.arange(300_000) + 1, values), 2000)
    assert len(drawn.steps) <= 2000
    assert drawn.steps[0] == 1 and drawn.steps[-1] == 300_000
    assert np.all(np.diff(drawn.steps) > 0)
    assert drawn.values.max() == 104 and drawn.values.min() == values.min()
    # 2000 points are minimum and maximum of 999 stretches of 300 steps: only a higher spike hides another
    for spike in spikes:
        near = np.abs(drawn.steps - 1 - spike) <= 301
        assert drawn.values[near].max() >= values[spike]


def test_moving_mean_agrees_with_convolution() -> None:
    values = np.random.default_rng(1).normal(size=101)
    smooth = compute_moving_mean(Curve("loss", np.arange(101), values), 7)
    np.testing.assert_allclose(smooth.values[3:-3], np.convolve(values, np.ones(7) / 7, mode="valid"))
    np.testing.assert_allclose(smooth.values[0], values[:4].mean())


def test_a_crash_and_a_restart_make_two_attempts_and_one_curve(runs: list[Path]) -> None:
    run = read_run(runs[0])
    assert run.get_curve("loss").steps.tolist() == list(range(1, 401))
    written = [e for e in read_run_events(runs[0], "step") if e["step"] == 220]
    assert len(written) == 2 and written[0]["loss"] != written[1]["loss"]
    assert run.get_curve("loss").values[219] == written[1]["loss"]
    first, second = run.attempts
    assert (first.last_step, first.outcome) == (233, "ended without a word (killed, or still running)")
    assert (second.last_step, second.outcome, second.resume_reason) == (
        400, "complete", "continued from step-200")


def test_wall_time_leaves_out_the_pause_between_attempts(tmp_path: Path) -> None:
    times = [("run_start", 100.0), ("step", 130.0), ("run_start", 5000.0), ("step", 5010.0), ("stop", 5020.0),
             ("conversion", 99999.0)]
    lines = [json.dumps({"event": event, "time_s": time_s, "step": 1, "reason": "time limit"})
             for event, time_s in times]
    (tmp_path / "events.jsonl").write_text("\n".join(lines) + "\n")
    run = read_run(tmp_path)
    assert run.wall_time_s == (130 - 100) + (5020 - 5000)  # a conversion is no training
    assert run.attempts[1].outcome == "stopped: time limit"


def test_a_resume_belongs_to_its_attempt_in_any_event_order(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    for before in (True, False):
        if before:
            log.write("resume", step=1, reason="continued from step-1")
        log.write("run_start", resumed_from=1)
        if not before:
            log.write("resume", step=1, reason="the node was lost")
        log.write("step", step=2, loss=1.0)
    assert [a.resume_reason for a in read_run(tmp_path).attempts] == [
        "continued from step-1", "the node was lost"]


def test_bits_per_byte_of_all_sources_are_weighted_by_bytes(tmp_path: Path) -> None:
    # 1000 bytes at 2 bits and 3000 bytes at 1 bit: 5000 bits / 4000 bytes
    log = EventLog(tmp_path / "events.jsonl")
    log.write("eval", step=10, heldout={
        "ko": {"tokens": 500, "loss": 2 * 1000 / 500 * math.log(2), "bits_per_byte": 2.0},
        "en": {"tokens": 600, "loss": 1 * 3000 / 600 * math.log(2), "bits_per_byte": 1.0},
        "broken": {"tokens": 600, "loss": float("nan"), "bits_per_byte": float("nan")}})
    run = read_run(tmp_path)
    assert run.overall_bits_per_byte.values.tolist() == pytest.approx([1.25])


def test_needles_and_samples_are_the_newest(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    for step in (10, 20):
        log.write("needle", step=step, when="before", by="generation", cells=[])
        log.write("needle", step=step, when="after", by="generation", cells=[])
        log.write("needle", step=step, when="after", by="likelihood", cells=[])
        log.write("sample", step=step, prompt="a", text=str(step))
        log.write("sample", step=step, prompt="b", text=str(step))
    run = read_run(tmp_path)
    assert [(needles["when"], needles["by"], needles["step"]) for needles in run.needles] == [
        ("before", "generation", 20), ("after", "generation", 20), ("after", "likelihood", 20)]
    assert [s["text"] for s in run.samples] == ["20", "20"]


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; pass the folder of a training command's --run"):
        read_run(tmp_path / "missing")
    (tmp_path / "events.jsonl").touch()
    (tmp_path / "config.json").write_text('{"recipe": ')
    with pytest.raises(UserError, match=r"config\.json: is not valid JSON"):
        read_run(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"config\.json: contains a list"):
        read_run(tmp_path)


WRONG_VALUES = ("x", 1e308, None, [1], {"a": "b"}, True, -1, [["x"]], 10**30, [{}])


def test_fields_of_a_wrong_type_break_neither_report_nor_status(runs: list[Path], tmp_path: Path) -> None:
    by_kind = {event["event"]: event for run in runs for event in read_events(run / EVENTS)}
    events = list(by_kind.values())
    events += [event | {name: value} for event in by_kind.values() for name in event if name != "event"
               for value in WRONG_VALUES]
    needle = by_kind["needle"]
    cell = needle["cells"][0]
    events += [needle | {"cells": [cell, cell | {name: value}]} for name in cell for value in WRONG_VALUES]
    (tmp_path / EVENTS).write_text("".join(json.dumps(event) + "\n" for event in events))
    assert "Held-out loss" in render_report([read_run(tmp_path)])
    assert format_run_state(read_run_state(tmp_path))


def test_a_field_of_wrong_type_is_dropped_alone() -> None:
    event = {"event": "step", "time_s": 1e308, "step": 3, "loss": "x", "grad_norm": "nan", "lr": 0.1,
             "losses": {"a": 1.0, "b": [2]}, "note": ["kept"]}
    assert parse_event(json.dumps(event).encode()) == {
        "event": "step", "step": 3, "grad_norm": "nan", "lr": 0.1, "losses": {"a": 1.0}, "note": ["kept"]}
    assert parse_event(b'{"event": "step", "step": "x"}') is None
    assert parse_event(b'{"event": ["step"]}') is None
