"""Routing alarms: raised when a threshold is crossed, once until the condition has passed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sov.model import recipes
from megatron_sov.model.config import GuardConfig, apply_settings
from megatron_sov.runs.obs.events import EventLog, read_events
from megatron_sov.train.guards import guards
from megatron_sov.train.guards.guards import MAX_LISTED_RANKS, RoutingMonitor, Stragglers
from tests.run_files import read_run_events

# Tokens per expert of one layer, four experts.
ALL_EXPERTS, ONE_EXPERT, TWO_EXPERTS = [4.0, 4.0, 4.0, 4.0], [16.0, 0.0, 0.0, 0.0], [8.0, 8.0, 0.0, 0.0]
DENSE = [0.0] * 4
"""Load and biases of a layer without experts."""
EQUAL_BIASES, SPREAD_BIASES = [0.1] * 4, [0.9, 0.0, 0.0, -0.2]


def list_alarms(tmp_path: Path,
                records: list[tuple[list[list[float]], list[list[float]]]],
                *settings: str) -> list[tuple[int, str, int, str]]:
    """Record routing every 10 steps and return the alarms.

    Args:
        tmp_path: folder for the event log.
        records: (load, biases), each of shape [layers, experts].
        settings: of the run.

    Returns:
        (step, kind, layer, text) of each alarm.
    """
    log = EventLog(tmp_path / "events.jsonl")
    monitor = RoutingMonitor(apply_settings(recipes.get("tiny-solar-open"), [
        "guards.routing_every_steps=10", "guards.min_load_entropy=0.3", "guards.dead_after_records=2",
        *settings]))
    for step, (load, biases) in zip(range(10, 10 * len(records) + 10, 10), records, strict=True):
        assert monitor.is_due(step) and not monitor.is_due(step + 1)
        monitor.record_load(step, torch.tensor(load, dtype=torch.float64),
                            torch.tensor(biases, dtype=torch.float64), log)
    log.close()
    return [(e["step"], e["kind"], e["layer"], e["text"]) for e in read_run_events(tmp_path, "alarm")]


def test_alarms_come_once_until_they_have_passed(tmp_path: Path) -> None:
    layer_records = [(ALL_EXPERTS, EQUAL_BIASES), (ONE_EXPERT, EQUAL_BIASES), (ONE_EXPERT, EQUAL_BIASES),
                     (TWO_EXPERTS, SPREAD_BIASES), (ALL_EXPERTS, EQUAL_BIASES), (ONE_EXPERT, EQUAL_BIASES)]
    alarms = list_alarms(tmp_path, [([DENSE, load], [DENSE, biases]) for load, biases in layer_records])
    assert [(step, kind) for step, kind, _, _ in alarms] == [
        (20, "collapse"), (30, "dead experts"), (40, "router bias"), (60, "collapse")]
    assert {layer for _, _, layer, _ in alarms} == {2}, "layers count from 1, and the first one is dense"
    assert "experts 1, 2, 3 got no token in 2 routing records in a row" in alarms[1][3]
    assert "lie 1.100 apart" in alarms[2][3]


def test_records_hold_the_figures_of_every_routed_layer(tmp_path: Path) -> None:
    list_alarms(tmp_path, [([DENSE, TWO_EXPERTS, ALL_EXPERTS], [DENSE, SPREAD_BIASES, EQUAL_BIASES])])
    (record,) = read_run_events(tmp_path, "routing")
    assert record["layers"] == [2, 3] and record["dead"] == [2, 0] and record["max_violation"] == [1.0, 0.0]
    assert [round(entropy, 3) for entropy in record["entropy"]] == [0.5, 1.0]
    assert [round(spread, 3) for spread in record["bias_spread"]] == [1.1, 0.0]


def test_a_stage_whose_busiest_process_exceeds_its_memory_alarms(tmp_path: Path) -> None:
    """Per pipeline stage of two layers, over the layers of a process: single layers may exceed the limit."""
    loads = [[9.0, 6.0, 0.0, 1.0], [2.0, 1.0, 7.0, 6.0], [9.0, 5.0, 1.0, 1.0], [8.0, 6.0, 1.0, 1.0], DENSE]
    settings = ("model.num_layers=4", "parallel.pp=2", "parallel.ep=2", "gpu.expert_imbalance=1.6")
    (alarm,) = list_alarms(tmp_path, [(loads, [EQUAL_BIASES] * 5)], *settings)
    # Of 16 tokens per layer, process 0 (experts 0 and 1) gets 15 and 3 in the first stage: 1.125 times the
    # mean of 8. In the second stage it gets 14 and 14: 1.75 times the mean.
    assert alarm[:3] == (10, "expert memory", 3)
    assert "layers 3 to 4: the busiest expert process gets 1.75" in alarm[3]


def test_a_dense_model_has_no_records(tmp_path: Path) -> None:
    assert list_alarms(tmp_path, [([DENSE], [DENSE])]) == []
    assert list(read_events(tmp_path / "events.jsonl")) == []


# The report of compute times: averages over an interval, slow ranks named, and only the slowest ranks of
# large worlds listed.


def report_times(monkeypatch: pytest.MonkeyPatch, rank_0_times: list[float],
                 other_averages: list[float]) -> list[dict[str, Any]]:
    """Report compute times every 4 steps, as rank 0, and return the events.

    Args:
        monkeypatch: replaces the exchange between ranks.
        rank_0_times: seconds of each step, from step 3.
        other_averages: average seconds of the other ranks.
    """
    written_events: list[dict[str, Any]] = []
    monkeypatch.setattr(guards.collectives, "gather_numbers", lambda average: [average, *other_averages])
    stragglers = Stragglers(GuardConfig(straggler_every_steps=4, straggler_ratio=1.5))
    log: Any = SimpleNamespace(
        write=lambda event, **fields: written_events.append({"event": event, **fields}))
    for step, seconds in enumerate(rank_0_times, start=3):
        stragglers.clock = SimpleNamespace(  # type: ignore[assignment]
            seconds=lambda seconds=seconds: seconds)
        stragglers.add_step(step, log)
    return written_events


def test_an_interval_ends_at_multiples_whenever_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    events = report_times(monkeypatch, [0.1, 0.3, 0.2, 0.2, 0.2, 0.6], [0.2, 0.2])
    assert [(e["step"], e["seconds"]["0"]) for e in events] == [(4, pytest.approx(0.2)),
                                                                (8, pytest.approx(0.3))]
    assert all(e["event"] == "compute_time" and e["slow"] == [] for e in events), (
        "1.5 times is not more than 1.5 times")


def test_ranks_far_above_the_median_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    times, *alarms = report_times(monkeypatch, [0.2, 0.2], [0.2, 0.9, 0.25])
    assert times["median_s"] == 0.2 and times["slow"] == [2]
    assert [(a["event"], a["rank"]) for a in alarms] == [("alarm", 2)]
    assert alarms[0]["text"] == "rank 2 computes 0.9 s a step, the median process 0.2 s"


def test_only_the_slowest_of_many_ranks_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    (times,) = report_times(monkeypatch, [0.1, 0.1], [0.2 + 0.0001 * i for i in range(200)])  # 201 ranks
    assert [int(rank) for rank in times["seconds"]] == list(range(201 - MAX_LISTED_RANKS, 201))
