"""Ctrl-C during a long step is acknowledged immediately; a second Ctrl-C ends the run and damages no file."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_sov.commands.operate.runs.run_state import read_run_state
from megatron_sov.runs.folder import FAULTS
from megatron_sov.runs.lock import read_lock
from tests.run_files import read_run_events

SETTINGS = ("train.steps=8", "train.checkpoint_every_steps=2", "train.async_save=false")


def is_slow(run: Path) -> bool:
    """Return whether the injected slow step has begun; a signal before it would stop the run a step early."""
    return any((run / FAULTS).glob("slow-rank*.json"))


def interrupt(run: Path) -> None:
    """Send SIGINT, the signal of Ctrl-C, to the launcher of a run's processes."""
    holder = read_lock(run)
    assert holder is not None, run
    os.kill(psutil.Process(holder["pid"]).ppid(), signal.SIGINT)


@pytest.mark.distributed
def test_ctrl_c_is_answered_before_the_step_has_ended(tmp_path: Path, pretrain: Any, start: Any,
                                                      until: Any) -> None:
    run = tmp_path / "my run"
    # Rank 1 sleeps, so rank 0 waits for it in a collective, during which Python runs no signal handler.
    process = start(pretrain(run, "--nproc", "2", "--inject", "slow-rank@step=4,rank=1,seconds=8,steps=1",
                             settings=SETTINGS))
    until(lambda: is_slow(run), process)
    interrupt(run)
    until(lambda: read_run_events(run, "stopping"), process)
    state = read_run_state(run)
    assert state.state == "stopping" and state.why.startswith("stopping after step 4 (about "), state
    assert len(read_run_events(run, "step")) == 3
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 75, errors
    (stopping,), (stop,) = read_run_events(run, "stopping"), read_run_events(run, "stop")
    assert stopping["text"].endswith(
        "s), then saving; Ctrl-C again: leave now, last checkpoint is step 2"), stopping
    assert stopping["text"] in errors and stop["reason"] == "SIGINT"
    assert stop["step"] == 4 and errors.splitlines()[-1] == (
        "stopped: everything is saved; last checkpoint: step 4; continue with: "
        f"megatron-sov resume '{run}'")
    assert read_run_state(run).state == "stopped"
    assert [event["step"] for event in read_run_events(run, "eval")] == [0]


@pytest.mark.distributed
@pytest.mark.essential
@pytest.mark.parametrize("nproc", [pytest.param("1", marks=pytest.mark.deep), "2"])
def test_a_second_ctrl_c_leaves_at_once(tmp_path: Path, pretrain: Any, run_checked: Any, start: Any,
                                        until: Any, nproc: str) -> None:
    run = tmp_path / "run"
    process = start(pretrain(run, "--nproc", nproc, "--inject", "slow-rank@step=4,seconds=900,steps=1",
                             settings=SETTINGS))
    until(lambda: is_slow(run), process)
    interrupt(run)
    until(lambda: read_run_events(run, "stopping"), process)
    assert process.poll() is None
    time.sleep(0.7)  # two signals within half a second are one Ctrl-C
    interrupt(run)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 75, errors
    assert errors.splitlines()[-1] == ("stopped: left at once; last checkpoint: step 2; continue with: "
                                       f"megatron-sov resume {run}")
    assert "Traceback" not in errors
    # The fault occurred in the run; without it the command resumes from the checkpoint.
    run_checked("resume", str(run))
    # a resumed run is not evaluated again
    assert [event["step"] for event in read_run_events(run, "eval")] == [0, 8]


SHORT = ("train.steps=6", "train.eval_every_steps=0")


@pytest.mark.distributed
def test_status_shows_why_a_run_ended(pretrain: Any, run_command: Any, tmp_path: Path,
                                      read_output: Any) -> None:
    refused, crashed, unguarded = tmp_path / "refused", tmp_path / "crashed", tmp_path / "unguarded"
    arguments = {refused: ("--inject", "nan@step=1,nan@step=2", "--set", "guards.rollback_after_skips=2"),
                 unguarded: ("--inject", "nan@step=3", "--set", "guards.skip=false", "--set",
                             "train.checkpoint_every_steps=2"),
                 crashed: ("--inject", "raise@step=2", "--set", "train.max_restarts=0")}
    results = {run: run_command(*pretrain(run, *words, settings=SHORT)) for run, words in arguments.items()}
    assert [results[run].returncode for run in (refused, crashed, unguarded)] == [2, 1, 2]
    reasons = {refused: "steps 1 to 2 were rejected in a row (the last: "
                          "the loss is nan), and no earlier checkpoint exists",
               unguarded: "step 3: the loss is nan and the gradient norm nan; "
                          "lower optim.lr = 0.004 and start a new --run --from "
                          f"{unguarded}/checkpoints/step-2, the last checkpoint, or switch on guards.skip",
               crashed: "rank 0 ended with exit code 1, and train.max_restarts = 0 lets no process start "
                          "again; find the cause"}
    for run, reason in reasons.items():
        assert f"error: {reason}" in results[run].stderr
        status = read_output("status", str(run))
        assert f"  state       ended ({reason}" in status
        assert ("  incidents   2 x step rejected (megatron-sov logs" in status) == (run == refused)
        assert f"ended by an error: {reason}" in read_output("logs", str(run))


FAILING_OBJECTIVE = """
import os, time
from megatron_sov.checkpoint.host_snapshot import HostSnapshot
from megatron_sov.train.objectives.data_objective import LanguageModelling

write = HostSnapshot.write


def slowly(self, folder, rank):
    time.sleep(1)
    write(self, folder, rank)


class Failing(LanguageModelling):
    def __init__(self, context):
        super().__init__(context)
        HostSnapshot.write = slowly

    def collect(self, policy, step):
        if step == 3 and os.environ["RANK"] == "1":
            raise ValueError("a defect of one process")
        return super().collect(policy, step)
"""


@pytest.mark.distributed
def test_a_checkpoint_in_progress_is_completed_after_an_error(pretrain: Any, run_checked: Any,
                                                              tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FAILING_OBJECTIVE)
    settings = (*SHORT, f"objective.name={tmp_path}/mine.py:Failing", "train.checkpoint_every_steps=2",
                "train.max_restarts=0")
    result = run_checked(*pretrain(tmp_path / "run", "--nproc", "2", settings=settings), code=1)
    assert "ValueError: a defect of one process" in result.stderr, result.stderr
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-2"]
    saved = read_run_events(tmp_path / "run", "checkpoint")
    assert [(e["step"], e["save_s"] > 1) for e in saved] == [(2, True)]
