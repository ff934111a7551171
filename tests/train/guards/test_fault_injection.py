"""Injected faults: their notation, when they occur, and that each occurs once in a run."""

import json
import math
from pathlib import Path

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.runs.obs.events import EventLog, read_events
from megatron_sov.train.guards.fault_injection import (
    FAULT_STATES, Fault, FaultInjector, corrupt_checkpoint, list_pending_faults, parse_faults)


def test_one_argument_may_list_several_faults() -> None:
    faults = parse_faults(
        ["kill@step=5,rank=1,nan@step=9", "spike@step=3,factor=50", "slow-rank@rank=1,step=7,seconds=0.5"], 2)
    assert faults == (Fault("kill", "step", 5, 1), Fault("nan", "step", 9),
                      Fault("spike", "step", 3, 0, {"factor": 50.0}),
                      Fault("slow-rank", "step", 7, 1, {"seconds": 0.5, "steps": 100.0}))
    assert [parse_faults([f.name], 2)[0] for f in faults] == list(faults), "a name is a valid argument"
    for kind, states in FAULT_STATES.items():
        assert [parse_faults([f"{kind}@{state}=4"], 1)[0].state for state in states] == list(states)


@pytest.mark.each(("text", "message"), [
    ("kil@step=5", "unknown fault 'kil'; did you mean 'kill'?"),
    ("kill", "'' must be start=NUMBER or load=NUMBER or step=NUMBER or save=NUMBER or rank=NUMBER"),
    ("kill@rank=1", "must have exactly one of start=N, load=N, step=N, save=N"),
    ("nan@step=x", "'step=x' must be"), ("kill@step=5,bit=3", "'bit=3' must be"),
    ("kill@step=1,load=2", "must have exactly one of"),
    ("nan@step=1,rank=2", "rank 2 does not exist; the run has 2"),
    ("nan@step=1,nan@step=1", "is passed twice"),
])
def test_a_fault_that_cannot_be_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError) as e:
        parse_faults([text], 2)
    assert message in str(e.value) and str(e.value).startswith(f"--inject {text.split(',nan')[0]}: ")


def test_a_fault_occurs_once_on_its_process_and_is_logged_once(tmp_path: Path) -> None:
    faults = parse_faults(["nan@step=5,rank=1", "spike@step=7,rank=1", "raise@save=4,rank=1"], 2)
    other, mine = FaultInjector(faults, tmp_path, 0), FaultInjector(faults, tmp_path, 1)
    assert other.get_loss_factor(5) == 1.0 and mine.get_loss_factor(4) == 1.0
    assert math.isnan(mine.get_loss_factor(6)) and mine.get_loss_factor(6) == 1.0
    assert mine.get_loss_factor(9) == 1e4
    mine.trigger("step", 9)
    restarted = FaultInjector(faults, tmp_path, 1)
    assert restarted.get_loss_factor(5) == 1.0
    with pytest.raises(RuntimeError, match="--inject raise@save=4,rank=1"):
        restarted.trigger("save", 4)
    for rank_zero in (other, FaultInjector(faults, tmp_path, 0)):
        log = EventLog(tmp_path / "events.jsonl")
        rank_zero.record_events(log)
        log.close()
    events = [(e["kind"], e["state"], e["step"], e["rank"]) for e in read_events(tmp_path / "events.jsonl")]
    assert events == [("nan", "step", 6, 1), ("spike", "step", 9, 1), ("raise", "save", 4, 1)]
    late = parse_faults(["hang@step=99"], 2)
    assert list_pending_faults([*faults, *late], tmp_path) == list(late)


def test_a_slow_process_is_slow_for_a_while(tmp_path: Path) -> None:
    faults = parse_faults(["slow-rank@step=3,seconds=0.2,steps=2", "slow-rank@step=4,seconds=0.1,steps=9"], 1)
    slow = FaultInjector(faults, tmp_path, 0)
    assert [slow.delay_s(step) for step in (2, 3, 4, 5)] == pytest.approx([0, 0.2, 0.3, 0.1])


def test_a_corrupted_checkpoint_differs_in_one_byte_of_its_largest_file(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"step": 1}))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a").write_bytes(bytes(1000))
    corrupt_checkpoint(tmp_path)
    assert sum(byte != 0 for byte in (tmp_path / "model" / "a").read_bytes()) == 1
    assert json.loads((tmp_path / "state.json").read_text()) == {"step": 1}
