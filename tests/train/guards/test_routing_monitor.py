"""Routing alarms: raised when a threshold is crossed, once until the condition has passed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sov.model.config import GuardConfig
from megatron_sov.runs.obs.events import EventLog, read_events
from megatron_sov.train.guards import guards
from megatron_sov.train.guards.guards import MAX_LISTED_RANKS, RoutingMonitor, Stragglers
from tests.run_files import read_run_events

EVEN, ONE, HALF = [4.0, 4.0, 4.0, 4.0], [16.0, 0.0, 0.0, 0.0], [8.0, 8.0, 0.0, 0.0]
DENSE, FLAT, APART = [0.0] * 4, [0.1] * 4, [0.9, 0.0, 0.0, -0.2]


def alarms(tmp_path: Path,
           records: list[tuple[list[list[float]], list[list[float]]]]) -> list[tuple[int, str, int, str]]:
    """Feed records of (load, biases); return (step, kind, layer, text) of each alarm."""
    log = EventLog(tmp_path / "events.jsonl")
    watch = RoutingMonitor(GuardConfig(routing_every_steps=10, min_load_entropy=0.3, dead_after_records=2))
    for step in range(10, 10 * len(records) + 10, 10):
        assert watch.is_due(step) and not watch.is_due(step + 1)
        load, biases = records[step // 10 - 1]
        watch.record_load(step, torch.tensor(load, dtype=torch.float64),
                     torch.tensor(biases, dtype=torch.float64), log)
    log.close()
    raised = read_run_events(tmp_path, "alarm")
    return [(e["step"], e["kind"], e["layer"], e["text"]) for e in raised]


def test_alarms_come_once_until_they_have_passed(tmp_path: Path) -> None:
    quiet = [DENSE, FLAT]
    loads = [EVEN, ONE, ONE, HALF, EVEN, ONE]
    result = alarms(tmp_path, [([DENSE, load], [DENSE, APART] if load is HALF else quiet) for load in loads])
    assert [(step, kind) for step, kind, _, _ in result] == [
        (20, "collapse"), (30, "dead experts"), (40, "router bias"), (60, "collapse")]
    assert {layer for _, _, layer, _ in result} == {2}, "layers count from 1, and the first one is dense"
    assert "experts 1, 2, 3 got no token in 2 routing records in a row" in result[1][3]
    assert "lie 1.100 apart" in result[2][3]


def test_records_hold_the_figures_of_every_routed_layer(tmp_path: Path) -> None:
    alarms(tmp_path, [([DENSE, HALF, EVEN], [DENSE, APART, FLAT])])
    (record,) = read_run_events(tmp_path, "routing")
    assert record["layers"] == [2, 3] and record["dead"] == [2, 0] and record["max_violation"] == [1.0, 0.0]
    assert ([round(x, 3) for x in record["entropy"]] == [0.5, 1.0]
            and [round(x, 3) for x in record["bias_spread"]] == [1.1, 0.0])


def test_a_dense_model_has_no_records(tmp_path: Path) -> None:
    assert alarms(tmp_path, [([DENSE], [DENSE])]) == [] and list(read_events(tmp_path / "events.jsonl")) == []


# The report of computing times: averages over a stretch, the slow ones named, large worlds cut to the
# slowest.


def report_times(monkeypatch: pytest.MonkeyPatch, others: list[float], own: list[float],
                 ratio: float = 1.5) -> list[dict[str, Any]]:
    """Report this process's times next to averages of others, as rank 0; return the events."""
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(guards.collectives, "gather_numbers", lambda mine: [mine, *others])
    watch = Stragglers(GuardConfig(straggler_every_steps=4, straggler_ratio=ratio))
    events: Any = SimpleNamespace(write=lambda event, **fields: told.append({"event": event, **fields}))
    for step, seconds in enumerate(own, start=3):
        watch.clock = SimpleNamespace(seconds=lambda seconds=seconds: seconds)  # type: ignore[assignment]
        watch.add_step(step, events)
    return told


def test_a_stretch_ends_at_multiples_whenever_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    result = report_times(monkeypatch, [0.2, 0.2], [0.1, 0.3, 0.2, 0.2, 0.2, 0.6])
    assert [(e["step"], e["seconds"]["0"]) for e in result] == [(4, pytest.approx(0.2)),
                                                                (8, pytest.approx(0.3))]
    assert all(e["event"] == "compute_time" and e["slow"] == [] for e in result), (
        "1.5 times is not more than 1.5 times")


def test_the_slow_are_those_far_above_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    measured, *alarms = report_times(monkeypatch, [0.2, 0.9, 0.25], [0.2, 0.2])
    assert measured["median_s"] == 0.2 and measured["slow"] == [2]
    assert [(a["event"], a["rank"]) for a in alarms] == [("alarm", 2)]
    assert alarms[0]["text"] == "rank 2 computes 0.9 s a step, the median process 0.2 s"


def test_of_many_processes_the_slowest_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    (measured,) = report_times(monkeypatch, [0.2 + 0.0001 * i for i in range(200)], [0.1, 0.1])
    assert [int(rank) for rank in measured["seconds"]] == list(range(201 - MAX_LISTED_RANKS, 201))
