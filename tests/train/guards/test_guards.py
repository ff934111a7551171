"""All guards: each checks the steps at which it is due."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sov.base.errors import ExitCode, SilentCorruption
from megatron_sov.engine.parallel.world import ParallelWorld
from megatron_sov.model.config import GuardConfig
from megatron_sov.train.guards import guards, guards as stragglers
from megatron_sov.train.guards.guards import Guards, SdcChecks

# Reaction to differing bits: reported with rank and host, and the run ends or continues, as configured.


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Three processes on two machines, with this one as rank 0; returns the events."""
    monkeypatch.setattr(guards.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(guards, "gather_objects", lambda mine: ["n1", "n1", "n2"])
    return []


class Events:
    """Collects events."""

    def __init__(self, told: list[dict[str, Any]]) -> None:
        self.told = told

    def write(self, event: str, **fields: Any) -> None:
        """Keep one."""
        self.told.append({"event": event, **fields})


def test_replicas_that_differ_end_the_run_before_the_checkpoint(monkeypatch: pytest.MonkeyPatch,
                                                                events: list[Any]) -> None:
    monkeypatch.setattr(guards.replica_checks, "find_differing_replicas", lambda model: [2])
    with pytest.raises(SilentCorruption, match=r"2 on n2\); nothing"):
        SdcChecks(GuardConfig()).compare_replicas(7, None, Events(events))  # type: ignore[arg-type]
    assert events[0]["event"] == "sdc" and events[0]["ranks"] == [2] and events[0]["hosts"] == ["n2"]
    SdcChecks(GuardConfig(compare_replicas=False)).compare_replicas(7, None,
                                                                    Events(events))  # type: ignore[arg-type]
    assert len(events) == 1, "switched off nothing is looked at"


def test_guards_can_be_set_to_continue(monkeypatch: pytest.MonkeyPatch, events: list[Any],
                                       capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(guards.replica_checks, "find_differing_replicas", lambda model: [0, 1])
    SdcChecks(GuardConfig(on_sdc="record")).compare_replicas(7, None,
                                                             Events(events))  # type: ignore[arg-type]
    assert events[0]["ranks"] == [0, 1] and "rank 0 on n1, rank 1 on n1" in capsys.readouterr().err


@pytest.mark.parametrize("again", [0.0, 1e-7])
def test_a_repetition_is_compared_bit_for_bit(monkeypatch: pytest.MonkeyPatch, events: list[Any],
                                              again: float) -> None:
    gradients = [torch.ones(3), torch.ones(2)]
    monkeypatch.setattr(guards.replica_checks, "list_gradients", lambda model: gradients)
    monkeypatch.setattr(guards.replica_checks, "gather_ranks_where", lambda holds: [0] if holds else [])
    checks = SdcChecks(GuardConfig(probe_every_steps=5))
    assert [step for step in range(1, 11) if checks.is_probe_due(step)] == [5, 10]
    turns: list[int] = []

    def compute(turn: int) -> None:
        turns.append(turn)
        gradients[1][1] += again * turn

    if again:
        with pytest.raises(SilentCorruption, match="rank 0 on n1"):
            checks.compare_repetition(5, None, compute, Events(events))  # type: ignore[arg-type]
    else:
        checks.compare_repetition(5, None, compute, Events(events))  # type: ignore[arg-type]
    assert turns == [0, 1] and bool(events) == bool(again)


# A step that stands still ends the process with its own exit code and leaves its stacks; a slow evaluation
# does not.


PROGRAM = """
import ctypes, json, sys, time
from pathlib import Path
from types import SimpleNamespace
from megatron_sov.train.guards import watchdog

case, folder = sys.argv[1], Path(sys.argv[2])
watchdog.MAX_GRACE_S = 0.5 if case == "lock" else 600.0  # a busy machine must not end it first
dog = watchdog.Watchdog(folder, 0, 0.0 if case == "off" else 0.4,
                        lambda step, places: (folder / "told.json").write_text(json.dumps([step, places])))
now_s = [0.0]
if case not in ("hang", "lock"):  # time passes where it is watched or not, however busy the machine is
    watchdog.time = SimpleNamespace(monotonic=lambda: now_s[0], sleep=time.sleep)
def stands_still():
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
elif case == "paused":
    dog.begin(3)
    with dog.pause():
        stands_still()
    assert dog._watched[0] == 3
    dog.end()
else:
    dog.end()
stands_still()
dog.close()
"""


def test_a_hang_is_reported_and_ended_except_in_slow_phases(tmp_path: Path) -> None:
    cases = {"hang": ExitCode.HANG, "lock": ExitCode.CRASH, "off": ExitCode.OK, "evaluation": ExitCode.OK,
             "paused": ExitCode.OK, "in time": ExitCode.OK}
    started = {}
    for case in cases:
        (tmp_path / case).mkdir()
        started[case] = subprocess.Popen([sys.executable, "-c", PROGRAM, case, str(tmp_path / case)],
                                         stderr=subprocess.PIPE, text=True)
    outputs = {case: process.communicate(timeout=600)[1] for case, process in started.items()}
    assert {case: process.returncode for case, process in started.items()} == cases
    step, places = json.loads((tmp_path / "hang" / "told.json").read_text())
    assert step == 3 and list(places.values()) == [[0]]
    stacks = (tmp_path / "hang" / "hang" / "step-3-rank-00000.txt").read_text()
    assert "rank 0 stood still in step 3 for 0.4 s" in stacks and "in stands_still" in stacks
    assert "made no progress for guards.hang_timeout_s = 0.4" in outputs["hang"]
    assert "Timeout" in outputs["lock"], "faulthandler's own thread needs no lock"


def test_computing_times_and_routing_are_looked_at_in_their_own_rhythms(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stragglers.collectives, "gather_numbers", lambda mine: [mine])
    settings = GuardConfig(straggler_every_steps=2, routing_every_steps=3, hang_timeout_s=0)
    guards = Guards(settings, ParallelWorld(0, 1, 0, 1, True, True), tmp_path, (), lambda step, places: None)
    guards.stragglers.clock = SimpleNamespace(seconds=lambda: 0.1)  # type: ignore[assignment]
    gathered: list[int] = []

    def gather() -> torch.Tensor:
        gathered.append(step)
        return torch.tensor([[3.0, 1.0]])

    load: Any = SimpleNamespace(gather=gather, biases=lambda: torch.zeros(1, 2))
    told: list[tuple[str, int]] = []
    events: Any = SimpleNamespace(write=lambda event, **fields: told.append((event, fields["step"])))
    for step in range(1, 7):
        guards.check_step(step, load, events)
    assert told == [("compute_time", 2), ("routing", 3), ("compute_time", 4), ("compute_time", 6),
                    ("routing", 6)]
    assert gathered == [3, 6], "a step that is not due costs no all-reduce"
