"""Ctrl-C during a long step: an answer at once, and a second one leaves with everything on disk intact."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_sov.commands.operate.run_state import read_state
from megatron_sov.runs.folder import FAULTS
from megatron_sov.runs.lock import recorded_holder
from megatron_sov.runs.obs.events import read_events

SETTINGS = ("train.steps=8", "train.checkpoint_every_steps=2", "train.async_save=false")


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run / "events.jsonl") if event["event"] == kind]


def is_slow(run: Path) -> bool:
    """Return whether the slow step has begun; until then a signal stops the run after the step before it."""
    return any((run / FAULTS).glob("slow-rank*.json"))


def interrupt(run: Path) -> None:
    """Send SIGINT to the launcher of a run's processes."""
    holder = recorded_holder(run)
    assert holder is not None, run
    os.kill(psutil.Process(holder["pid"]).ppid(), signal.SIGINT)


@pytest.mark.distributed
def test_ctrl_c_is_answered_before_the_step_has_ended(tmp_path: Path, pretrain: Any, start: Any, until: Any
                                                      ) -> None:
    run = tmp_path / "my run"
    # Rank 1 sleeps, so that rank 0 waits for it in a collective, in which Python handles no signal.
    process = start(pretrain(run, "--nproc", "2", "--inject", "slow-rank@step=4,rank=1,seconds=8,steps=1",
                             settings=SETTINGS))
    until(lambda: is_slow(run), process)
    interrupt(run)
    until(lambda: events(run, "stopping"), process)
    state = read_state(run)
    assert state.state == "stopping" and state.why.startswith("stopping after step 4 (about "), state
    assert len(events(run, "step")) == 3
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 75, errors
    (stopping,), (stop,) = events(run, "stopping"), events(run, "stop")
    assert stopping["text"].endswith(
        "s), then saving; Ctrl-C again: leave now, last checkpoint is step 2"), stopping
    assert stopping["text"] in errors and stop["reason"] == "SIGINT"
    assert stop["step"] == 4 and errors.splitlines()[-1] == (
        "stopped: everything is saved; last checkpoint: step 4; continue with: "
        f"megatron-sov resume '{run}'")
    assert read_state(run).state == "stopped"
    assert [event["step"] for event in events(run, "eval")] == [0]


@pytest.mark.distributed
@pytest.mark.parametrize("nproc", ["1", "2"])
def test_a_second_ctrl_c_leaves_at_once(tmp_path: Path, pretrain: Any, run_command: Any, start: Any,
                                        until: Any, nproc: str) -> None:
    run = tmp_path / "run"
    process = start(pretrain(run, "--nproc", nproc, "--inject", "slow-rank@step=4,seconds=900,steps=1",
                             settings=SETTINGS))
    until(lambda: is_slow(run), process)
    interrupt(run)
    until(lambda: events(run, "stopping"), process)
    assert process.poll() is None
    time.sleep(0.7)  # two signals within half a second are one Ctrl-C
    interrupt(run)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 75, errors
    assert errors.splitlines()[-1] == ("stopped: left at once; last checkpoint: step 2; continue with: "
                                       f"megatron-sov resume {run}")
    assert "Traceback" not in errors
    # The fault came in the run; without it the command goes on from the checkpoint.
    done = run_command("resume", str(run))
    assert done.returncode == 0, done.stderr
    assert [event["step"] for event in events(run, "eval")] == [0, 8]  # a resumed run is not evaluated again
