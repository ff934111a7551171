"""Events and artifacts of a run as plain data."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.commands.operate.run_state import in_full, read_state
from megatron_sov.publish.report.page import render
from megatron_sov.publish.report.run_data import read_run
from megatron_sov.runs.obs.events import EVENTS, EventLog, parse_event, read_events


def test_a_crash_and_a_restart_make_two_attempts_and_one_curve(runs: list[Path]) -> None:
    run = read_run(runs[0])
    assert run.curve("loss").steps.tolist() == list(range(1, 401))
    written = [e for e in read_events(runs[0] / "events.jsonl") if e["event"] == "step" and e["step"] == 220]
    assert len(written) == 2 and written[0]["loss"] != written[1]["loss"]
    assert run.curve("loss").values[219] == written[1]["loss"]
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
    assert run.wall_s() == 30 + 20
    assert run.attempts[1].outcome == "stopped: time limit"


def test_phases_end_where_the_next_begins(runs: list[Path]) -> None:
    assert read_run(runs[0]).phases == [("1", 1, 250), ("2.A", 251, 400)]


def test_a_resume_is_told_by_the_attempt_that_it_opens_whether_before_or_after_its_start(
        tmp_path: Path) -> None:
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
    assert [(n["when"], n["by"], n["step"]) for n in run.needles] \
        == [("before", "generation", 20), ("after", "generation", 20), ("after", "likelihood", 20)]
    assert [s["text"] for s in run.samples] == ["20", "20"]


def test_a_line_cut_off_by_a_kill_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"event": "step", "time_s": 1.0, "step": 1, "loss": '
                                           '2.0}\n{"event": "step", "time_')
    assert read_run(tmp_path).curve("loss").values.tolist() == [2.0]


def test_what_is_no_run_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no events.jsonl.*--run"):
        read_run(tmp_path / "missing")
    (tmp_path / "events.jsonl").touch()
    (tmp_path / "config.json").write_text('{"recipe": ')
    with pytest.raises(UserError, match=r"config\.json: is not valid JSON"):
        read_run(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"config\.json: holds a list"):
        read_run(tmp_path)


BAD = ("x", 1e308, None, [1], {"a": "b"}, True, -1, [["x"]], 10**30, [{}])


def test_fields_of_a_wrong_type_break_neither_report_nor_status(runs: list[Path], tmp_path: Path) -> None:
    kinds = {event["event"]: event for run in runs for event in read_events(run / EVENTS)}
    lines = [json.dumps(event | {name: bad}) for event in kinds.values() for name in event if name != "event"
             for bad in BAD]
    cell = kinds["needle"]["cells"][0]
    lines += [json.dumps(kinds["needle"] | {"cells": [cell, cell | {name: bad}]})
              for name in cell for bad in BAD]
    (tmp_path / EVENTS).write_text("\n".join([*map(json.dumps, kinds.values()), *lines]) + "\n")
    assert "Held-out loss" in render([read_run(tmp_path)])
    assert in_full(read_state(tmp_path))


def test_a_field_of_a_wrong_type_is_left_out_and_the_others_stay() -> None:
    event = {"event": "step", "time_s": 1e308, "step": 3, "loss": "x", "grad_norm": "nan", "lr": 0.1,
             "losses": {"a": 1.0, "b": [2]}, "note": ["kept"]}
    assert parse_event(json.dumps(event).encode()) == {
        "event": "step", "step": 3, "grad_norm": "nan", "lr": 0.1, "losses": {"a": 1.0}, "note": ["kept"]}
    assert parse_event(b'{"event": "step", "step": "x"}') is None
    assert parse_event(b'{"event": ["step"]}') is None
