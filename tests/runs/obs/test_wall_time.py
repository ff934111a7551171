"""Where the time went: a planted log with an answer by hand, and what holds for every log."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import time
from typing import Any

import pytest
from hypothesis import given, strategies as st

from megatron_sov.runs import launch_environment
from megatron_sov.runs.obs.history import MAX_WARM_UP_STEPS, MeasuredStretch, Stretches
from megatron_sov.runs.obs.wall_time import CATEGORIES, Timekeeper, WallTime


def account(*events: tuple[float, str, dict[str, Any]], now_s: float | None = None,
            waits: bool = False) -> WallTime:
    keeper = Timekeeper()
    for time_s, kind, fields in events:
        keeper.add({"event": kind, "time_s": time_s, **fields})
    found = keeper.account(now_s, waits)
    assert found is not None
    return found


def step(time_s: float, number: int, step_time_s: float = 10.0) -> tuple[float, str, dict[str, Any]]:
    return time_s, "step", {"step": number, "step_time_s": step_time_s}


def start(time_s: float, began_s: float, resumed_from: int = 0) -> tuple[float, str, dict[str, Any]]:
    return time_s, "run_start", {"began_s": began_s, "resumed_from": resumed_from}


PLANTED = [
    start(1030, began_s=1000),                               # 30 s start-up
    step(1042, 1),                                           # 2 s start-up (first batch), 10 s step 1
    step(1052, 2), step(1062, 3), step(1072, 4),             # 30 s: steps 2 to 4
    (1073, "expert_load", {"step": 4}),                      # 1 s + 5 s evaluation
    (1078, "eval", {"step": 4}), (1078, "data_consumed", {"step": 4}),
    step(1091, 5),                                           # 3 s stall of checkpoint 4, 10 s step 5
    (1091.5, "checkpoint", {"step": 4, "stall_s": 3.0}),     # 0.5 s between steps, goes to step 5
    step(1101.5, 6),                                         # 10 s step 6; killed in step 7
    (1120, "warning", {"text": "something that marks no time"}),
    # 120 s waiting, 20 s start-up; steps 5, 6 are done again
    start(1241.5, began_s=1221.5, resumed_from=4),
    step(1251.5, 5), step(1261.5, 6),                        # 20 s
    (1271.5, "skip", {"step": 7, "reason": "spike"}),        # 10 s refused
    step(1281.5, 8),                                         # 10 s
    (1285.5, "checkpoint", {"step": 8, "stall_s": 4.0}),     # 4 s: the last one is waited for
    (1286, "stop", {"step": 8, "reason": "SIGUSR1"}),        # 0.5 s between steps
    start(1296, began_s=1290, resumed_from=8),               # 4 s waiting, 6 s start-up
    step(1306, 9), step(1316, 10),                           # 20 s, taken back
    (1318, "rollback", {"step": 10, "back_to": 8}),          # 2 s lost
    step(1328, 11),                                          # 10 s
    (1388, "hang", {"step": 12}),                            # 60 s lost
    (1390, "restart", {"step": 8}),                          # 2 s waiting
    start(1395, began_s=1290, resumed_from=11),              # 5 s start-up: same command, so not from 1290 on
    step(1405, 12),                                          # 10 s
    (1407, "checkpoint", {"step": 12, "stall_s": 2.0}),      # 2 s
    (1407, "run_end", {"step": 12}),
    (1417, "needle", {"step": 12, "when": "after"}),         # 10 s evaluation, part of the stage
    (9000, "needle", {"step": 12, "when": "eval"}), (9500, "data_consumed", {"step": 12}),  # days later
]


def test_a_planted_log_gives_the_answer_by_hand() -> None:
    found = account(*PLANTED)
    assert found.spent_s == pytest.approx({
        # steps 1-4; 5, 6 and 8 of the second attempt; 11; 12
        "productive": 10 + 30 + 20 + 10 + 0.5 + 10 + 10,
        # steps 5 and 6 of the first attempt, with 0.5 s; refused; taken back; hang
        "lost": 10.5 + 10 + 10 + 20 + 2 + 60,
        "evaluation": 6 + 10, "saving": 3 + 4 + 2, "startup": 32 + 20 + 6 + 5, "waiting": 120 + 4 + 2})
    assert found.total_s == pytest.approx(417) == pytest.approx(1417 - found.began_s)
    assert found.goodput == pytest.approx(90.5 / 417)


def test_steps_after_the_last_checkpoint_are_kept_only_while_the_run_lives() -> None:
    events = [start(0, 0), step(10, 1), (10, "checkpoint", {"step": 1, "stall_s": 0.0}), step(20, 2)]
    assert account(*events).spent_s["lost"] == 10
    alive = account(*events, now_s=25)
    assert (alive.spent_s["lost"], alive.spent_s["productive"], alive.total_s) == (0, 25, 25)
    queued = account(*events, now_s=25, waits=True)
    assert (queued.spent_s["lost"], queued.spent_s["productive"], queued.spent_s["waiting"]) == (10, 10, 5)


def test_rare_events_stand_for_all_steps_since_the_one_before() -> None:
    """log_every_steps = 10: five of the ten steps of an event are done again,
    and an evaluation came in between."""
    found = account(start(0, 0), step(100, 10), (135, "data_consumed", {"step": 13}), step(205, 20),
                    start(205, 205, 15), step(255, 20), (255, "run_end", {"step": 20}))
    assert found.spent_s == pytest.approx({"productive": 100 + 30 + 20 + 50, "lost": 50, "evaluation": 5,
                                           "saving": 0, "startup": 0, "waiting": 0})


def test_a_log_without_a_start_has_no_time() -> None:
    keeper = Timekeeper()
    keeper.add({"event": "step", "step": 1, "time_s": 5.0})
    assert keeper.account() is None


KINDS = ("run_start", "step", "skip", "checkpoint", "data_consumed", "rollback", "hang", "restart", "stop",
         "run_end", "needle", "warning")
SECONDS = st.floats(0, 1e6, allow_nan=False)
EVENTS = st.lists(st.tuples(st.sampled_from(KINDS), SECONDS, st.integers(0, 30), SECONDS, st.integers(0, 30)),
                  max_size=40)


@given(EVENTS, st.none() | SECONDS, st.booleans())
def test_categories_add_up_to_the_wall_time_whatever_the_log_says(drawn: list[Any], lived_s: float | None,
                                                                  waits: bool) -> None:
    events = [(time_s, kind, {"step": at, "resumed_from": other, "back_to": other, "began_s": value,
                              "stall_s": value, "step_time_s": value})
              for kind, time_s, at, value, other in drawn]
    events = [(0.0, "run_start", {"began_s": 0.0}), *events]
    last_s, ended = 0.0, False
    for time_s, kind, _ in events:  # what the sum must be: from the start to the last event that marks time
        ended = ended and kind != "run_start"
        if not ended and kind != "warning":
            last_s = max(last_s, time_s)
        ended = ended or kind == "run_end"
    found = account(*events, now_s=lived_s, waits=waits)
    assert set(found.spent_s) == set(CATEGORIES)
    assert min(found.spent_s.values()) >= -1e-6
    assert found.total_s == pytest.approx(max(last_s, lived_s or 0.0), abs=1e-3)
    assert math.isnan(found.goodput) or -1e-9 <= found.goodput <= 1 + 1e-9


# A process's start is found from its age, however the machine was booted and its clock was set.


PROGRAM = """
import json, sys, time
first_line_s = time.time()
from megatron_sov.runs.launch_environment import process_started_s
time.sleep(0.3)
print(json.dumps([first_line_s, sorted(process_started_s() for _ in range(9))[4]]))
"""
TICK_S = 0.02
"""A clock tick, twice over."""


def test_a_process_started_between_its_call_and_its_first_line() -> None:
    called_s = time.time()
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    first_line_s, started_s = json.loads(done.stdout)
    assert called_s - TICK_S <= started_s <= first_line_s + TICK_S


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux's kernel tells of a process")
@pytest.mark.parametrize("booted_s", [1000.0, 1000.76, 1000.999])
@pytest.mark.parametrize("set_by_s", [0.0, -7200.0, 0.4])
def test_neither_the_fraction_of_the_boot_second_nor_setting_the_clock_counts(
        booted_s: float, set_by_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """It started 12.34 s after the machine, and asks 20 s after it; somebody set the clock in between."""
    fields = ["4711", "(a ) name (R) 7)", "S", *["0"] * 18, "1234", "555"]
    monkeypatch.setattr(launch_environment, "open", lambda *a, **options: io.StringIO(" ".join(fields)),
                        raising=False)
    monkeypatch.setattr(launch_environment.os, "sysconf", {"SC_CLK_TCK": 100}.__getitem__)
    monkeypatch.setattr(launch_environment.time, "clock_gettime", {time.CLOCK_BOOTTIME: 20.0}.__getitem__)
    monkeypatch.setattr(launch_environment.time, "time", lambda: booted_s + 20 + set_by_s)
    assert launch_environment.process_started_s() == pytest.approx(booted_s + 12.34 + set_by_s, abs=1e-6)


# How long steps took, by start and stretch of the curriculum.


def collected(events: list[dict[str, Any]]) -> list[MeasuredStretch]:
    found = Stretches()
    for event in events:
        found.add(event)
    return found.all


def start_of(**fields: Any) -> dict[str, Any]:
    return {"event": "run_start", **fields}


def phase(step: int, name: str, size: int, seq_len: int = 32) -> dict[str, Any]:
    return {"event": "phase", "step": step, "name": name, "seq_len": seq_len, "global_batch_size": size}


def steps(first: int, *times_s: object) -> list[dict[str, Any]]:
    return [{"event": "step", "step": first + i, "step_time_s": t} for i, t in enumerate(times_s)]


def test_steps_belong_to_the_entry_of_the_ledger_that_holds_for_them() -> None:
    found = collected([start_of(num_ranks=2), phase(0, "a", 8), phase(3, "a", 16), phase(5, "b", 16, 64),
                       *steps(1, 1, 1, 1, 2, 2, 4)])
    assert [(s.phase, s.global_batch_size, s.seq_len, s.first_step, s.last_step) for s in found] == [
        ("a", 8, 32, 1, 3), ("a", 16, 32, 4, 5), ("b", 16, 64, 6, 6)]
    assert [s.follows for s in found] == [False, True, True]
    assert {s.start["num_ranks"] for s in found} == {2}


def test_each_start_is_told_apart_and_warms_up_anew() -> None:
    found = collected([start_of(), phase(0, "a", 8), *steps(1, *[9.0] * 2, *[1.0] * 8),
                       start_of(), phase(0, "a", 8), *steps(9, 9.0, *[2.0] * 4)])
    assert [s.typical_s() for s in found] == [1.0, 2.0]
    assert [len(s.times_s) for s in found] == [10, 5]


def test_the_first_steps_of_a_start_are_left_out_and_stalls_do_not_count() -> None:
    long = collected([start_of(), phase(0, "a", 8), *steps(1, *[50.0] * MAX_WARM_UP_STEPS, *[1.0] * 200)])[0]
    assert len(long.warm_times_s()) == 200 and long.typical_s() == 1.0
    short = collected([start_of(), phase(0, "a", 8), *steps(1, 50.0, 1.0, 1.0, 1.0, 60.0)])[0]
    assert short.typical_s() == 1.0, "a fifth of them at most is left out"
    (spoilt,) = collected([start_of(), phase(0, "a", 8), *steps(1, "nan", None, -1.0)])
    assert math.isnan(spoilt.typical_s())


def test_events_that_belong_to_no_start_are_passed_over() -> None:
    assert collected([phase(0, "a", 8), *steps(1, 1.0), {"event": "eval"}]) == []
    assert collected([start_of(), *steps(1, 1.0)]) == []
