"""All guards: each checks the steps at which it is due."""

import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sov.base.errors import ExitCode, SilentCorruption
from megatron_sov.engine.parallel.world import ParallelWorld
from megatron_sov.model import recipes
from megatron_sov.model.config import GuardConfig
from megatron_sov.train.guards import guards
from megatron_sov.train.guards.guards import Guards, SdcChecks

# Reaction to differing bits: reported with rank and host, and the run ends or continues, as configured.


class ListedEvents:
    """Event log that keeps events in a list."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def write(self, event: str, **fields: Any) -> None:
        """Add an event."""
        self.events.append({"event": event, **fields})


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Event log of rank 0 among three processes on two machines."""
    monkeypatch.setattr(guards.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(guards, "gather_objects", lambda host: ["n1", "n1", "n2"])
    return ListedEvents()


def test_replicas_that_differ_end_the_run_before_the_checkpoint(monkeypatch: pytest.MonkeyPatch,
                                                                log: Any) -> None:
    model: Any = None  # never read
    monkeypatch.setattr(guards.replica_checks, "find_differing_replicas", lambda model: [2])
    with pytest.raises(SilentCorruption, match=r"2 on n2\); nothing"):
        SdcChecks(GuardConfig()).compare_replicas(7, model, log)
    (event,) = log.events
    assert event["event"] == "sdc" and event["ranks"] == [2] and event["hosts"] == ["n2"]
    SdcChecks(GuardConfig(compare_replicas=False)).compare_replicas(7, model, log)
    assert len(log.events) == 1, "replicas are not compared"


def test_guards_can_be_set_to_continue(monkeypatch: pytest.MonkeyPatch, log: Any,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = None
    monkeypatch.setattr(guards.replica_checks, "find_differing_replicas", lambda model: [0, 1])
    SdcChecks(GuardConfig(on_sdc="record")).compare_replicas(7, model, log)
    assert log.events[0]["ranks"] == [0, 1]
    assert "rank 0 on n1, rank 1 on n1" in capsys.readouterr().err


@pytest.mark.parametrize("error", [0.0, 1e-7])
def test_a_repetition_is_compared_bit_for_bit(monkeypatch: pytest.MonkeyPatch, log: Any,
                                              error: float) -> None:
    model: Any = None
    gradients = [torch.ones(3), torch.ones(2)]
    monkeypatch.setattr(guards.replica_checks, "list_gradients", lambda model: gradients)
    monkeypatch.setattr(guards.replica_checks, "gather_ranks_where", lambda holds: [0] if holds else [])
    checks = SdcChecks(GuardConfig(probe_every_steps=5))
    assert [step for step in range(1, 11) if checks.is_probe_due(step)] == [5, 10]
    turns: list[int] = []

    def compute(turn: int) -> None:
        turns.append(turn)
        gradients[1][1] += error * turn

    with pytest.raises(SilentCorruption, match="rank 0 on n1") if error else nullcontext():
        checks.compare_repetition(5, model, compute, log)
    assert turns == [0, 1] and bool(log.events) == bool(error)


# A step that hangs ends the process with its own exit code and leaves its stacks; a slow evaluation does not.


PROGRAM = """
import ctypes, json, sys, time
from pathlib import Path
from types import SimpleNamespace
from megatron_sov.train.guards import watchdog

case, folder = sys.argv[1], Path(sys.argv[2])
watchdog.MAX_GRACE_S = 0.5 if case == "lock" else 600.0  # a busy machine must not end it first
def write_report(step, places):
    (folder / "report.json").write_text(json.dumps([step, places]))
dog = watchdog.Watchdog(folder, 0, 0.0 if case == "off" else 0.4, write_report)
now_s = [0.0]
if case == "after short steps":
    watchdog.MAX_GRACE_S = 0.5
if case not in ("hang", "lock"):  # the other cases set the clock, so a busy machine cannot change them
    watchdog.time = SimpleNamespace(monotonic=lambda: now_s[0], sleep=time.sleep)
def hang():
    now_s[0] += 1000.0
    time.sleep(1.0 if case != "hang" else 3600)
if case == "lock":
    dog.begin(3)
    ctypes.PyDLL(None).sleep(3600)  # holds Python's lock all the time
if case in ("hang", "off"):
    dog.begin(3)
elif case == "in time":
    dog.begin(3)
    now_s[0] += 0.3
    time.sleep(1.0)
    dog.end()
elif case == "after short steps":
    dog._timeout_s = 1500.0
    for step in range(20):
        dog.begin(step)
        now_s[0] += 7.0
        dog.end()
    dog.begin(20)
    now_s[0] += 69.0
    time.sleep(1.5)
    now_s[0] += 2.0
    time.sleep(3600)
elif case == "paused":
    dog.begin(3)
    with dog.pause():
        hang()
    assert dog._watched[0] == 3
    dog.end()
else:
    dog.end()
hang()
dog.close()
"""


def test_a_hang_is_reported_and_ended_except_in_slow_phases(tmp_path: Path) -> None:
    cases = {"hang": ExitCode.HANG, "lock": ExitCode.CRASH, "off": ExitCode.OK, "evaluation": ExitCode.OK,
             "paused": ExitCode.OK, "in time": ExitCode.OK, "after short steps": ExitCode.HANG}
    processes = {}
    for case in cases:
        (tmp_path / case).mkdir()
        processes[case] = subprocess.Popen([sys.executable, "-c", PROGRAM, case, str(tmp_path / case)],
                                           stderr=subprocess.PIPE, text=True)
    outputs = {case: process.communicate(timeout=600)[1] for case, process in processes.items()}
    assert {case: process.returncode for case, process in processes.items()} == cases
    step, places = json.loads((tmp_path / "hang" / "report.json").read_text())
    assert step == 3 and list(places.values()) == [[0]]
    stacks = (tmp_path / "hang" / "hang" / "step-3-rank-00000.txt").read_text()
    assert "rank 0 stood still in step 3 for 0.4 s" in stacks and "in hang\n" in stacks
    assert "made no progress for guards.hang_timeout_s = 0.4" in outputs["hang"]
    # steps of 7 s: 69 s are no hang, 71 s are
    assert "made no progress for 70 s, 10 times the median step" in outputs["after short steps"]
    assert "Timeout" in outputs["lock"], "faulthandler's own thread needs no lock"


def test_compute_times_and_routing_are_checked_at_their_own_intervals(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards.collectives, "gather_numbers", lambda number: [number])
    settings = GuardConfig(straggler_every_steps=2, routing_every_steps=3, hang_timeout_s=0)
    config = replace(recipes.get("tiny-solar-open"), guards=settings)
    all_guards = Guards(config, ParallelWorld(0, 1, 0, 1, True, True), tmp_path, (),
                        lambda step, places: None)
    all_guards.stragglers.clock = SimpleNamespace(seconds=lambda: 0.1)  # type: ignore[assignment]
    gather_steps: list[int] = []

    def gather() -> torch.Tensor:
        gather_steps.append(step)
        return torch.tensor([[3.0, 1.0]])

    load: Any = SimpleNamespace(gather=gather, biases=lambda: torch.zeros(1, 2))
    log: Any = ListedEvents()
    for step in range(1, 7):
        all_guards.check_step(step, load, log)
    assert [(event["event"], event["step"]) for event in log.events] == [
        ("compute_time", 2), ("routing", 3), ("compute_time", 4), ("compute_time", 6), ("routing", 6)]
    assert gather_steps == [3, 6], "a step that is not due costs no all-reduce"
