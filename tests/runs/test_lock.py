"""The lock of a run's folder: a single living run, and release after a kill."""

import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.runs import lock
from megatron_sov.runs.lock import LOCK, RunLock, find_living_holder
from megatron_sov.work.progress.locks import process_table
from tests.waiting import wait_until


def write_record(run: Path, **fields: Any) -> None:
    me = psutil.Process()
    record = {"host": socket.gethostname(), "pid": me.pid, "started_s": me.create_time(),
              "beat": 1, "process_table": process_table(), "token": "another"}
    (run / LOCK).write_text(json.dumps(record | fields))


def acquire_and_release(run: Path) -> None:
    run_lock = RunLock(run)
    run_lock.acquire()
    run_lock.release()
    assert not (run / LOCK).exists()


def test_lock_error_names_living_holder(tmp_path: Path) -> None:
    run_lock = RunLock(tmp_path)
    run_lock.acquire()
    with pytest.raises(UserError,
                       match=rf"held by a living run \(process {os.getpid()} on {socket.gethostname()}\)"):
        RunLock(tmp_path).acquire()
    run_lock.release()
    acquire_and_release(tmp_path)


def test_dead_local_holder_frees_lock_at_once(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    write_record(tmp_path, pid=child.pid)
    acquire_and_release(tmp_path)


def test_zombie_holder_frees_lock(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"]) as child:
        zombie = psutil.Process(child.pid)
        while zombie.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.001)
        write_record(tmp_path, pid=child.pid, started_s=zombie.create_time())
        acquire_and_release(tmp_path)


def test_reused_pid_does_not_hold_lock(tmp_path: Path) -> None:
    write_record(tmp_path, started_s=psutil.Process().create_time() - 3600)
    acquire_and_release(tmp_path)


def test_clock_correction_does_not_free_lock(tmp_path: Path) -> None:
    write_record(tmp_path, started_s=psutil.Process().create_time() + 1)
    with pytest.raises(UserError, match="held by a living run"):
        RunLock(tmp_path).acquire()


REMOTE_HOLDERS: list[dict[str, Any]] = [
    {"host": "elsewhere"}, {"process_table": "the same boot, another namespace"},
    {"pid": 2 ** 22 + 1, "process_table": "the same boot, another namespace"}]
"""Same host name and pid in a different namespace: unknown state."""


SetAction = Callable[[Callable[[], object]], None]
"""Function that sets what the remote holder of the lock does while another run waits."""


@pytest.fixture
def set_remote_action(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SetAction:
    """Return the function that sets the remote holder's action; each look at the lock takes a second."""
    now_s = itertools.count()
    monkeypatch.setattr(lock.time, "monotonic", lambda: float(next(now_s)))

    def set_action(action: Callable[[], object]) -> None:
        monkeypatch.setattr(lock.time, "sleep", lambda process: action())

    set_action(lambda: None)
    return set_action


@pytest.mark.parametrize("remote_fields", REMOTE_HOLDERS)
def test_remote_holder_keeps_lock_while_heartbeats_arrive(
        tmp_path: Path, set_remote_action: SetAction, remote_fields: dict[str, Any],
        capsys: pytest.CaptureFixture[str]) -> None:
    write_record(tmp_path, **remote_fields)
    set_remote_action(lambda: write_record(tmp_path, **remote_fields, beat=2))
    with pytest.raises(UserError, match="held by a living run"):
        RunLock(tmp_path).acquire()
    assert "waiting up to 60 s for its heartbeat" in capsys.readouterr().err
    set_remote_action(lambda: None)
    acquire_and_release(tmp_path)  # independent of other clocks: a whole lease has passed on this one


def test_lock_released_while_waiting_is_acquired(
        tmp_path: Path, set_remote_action: SetAction) -> None:
    write_record(tmp_path, host="elsewhere")
    set_remote_action((tmp_path / LOCK).unlink)
    acquire_and_release(tmp_path)


def test_remote_holder_is_judged_by_file_time(tmp_path: Path) -> None:
    write_record(tmp_path, host="elsewhere")
    assert find_living_holder(tmp_path) is not None
    os.utime(tmp_path / LOCK, (1, 1))
    assert find_living_holder(tmp_path) is None


@pytest.mark.skipif(subprocess.run(["unshare", "-pf", "--mount-proc", "true"], capture_output=True,
                                   check=False).returncode != 0, reason="no right to make a namespace")
def test_containers_with_equal_host_names_differ(tmp_path: Path) -> None:
    """Both are process 1 of their own namespace."""
    code = ("import sys, time; from pathlib import Path; from megatron_sov.runs.lock import RunLock\n"
            "lock = RunLock(Path(sys.argv[1]), 12); lock.acquire(); print('held', flush=True)\n"
            "sys.stdin.readline(); print(lock._is_taken_over(), flush=True)")
    command = ["unshare", "-pf", "--mount-proc", "--kill-child", sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdin is not None and first.stdout is not None and first.stdout.readline() == "held\n"
        second = subprocess.run(command, input="", capture_output=True, text=True, check=False)
        assert second.returncode != 0 and "is held by a living run" in second.stderr
        first.stdin.write("\n")
        first.stdin.flush()
        assert first.stdout.readline() == "False\n"


@pytest.mark.each("content", ["", "[]", "null", '{"host": 1}', '{"host": "a", "pid": "x", "started_s": 1}'])
def test_damaged_lock_is_free(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK).write_text(content)
    acquire_and_release(tmp_path)


def test_holder_writes_heartbeats(tmp_path: Path) -> None:
    run_lock = RunLock(tmp_path, lease_s=0.2)
    run_lock.acquire()
    first = json.loads((tmp_path / LOCK).read_text())["beat"]
    wait_until(lambda: json.loads((tmp_path / LOCK).read_text())["beat"] != first)
    run_lock.release()


def test_holder_exits_after_takeover(tmp_path: Path) -> None:
    code = ("import sys, time; from pathlib import Path; from megatron_sov.runs.lock import RunLock\n"
            "RunLock(Path(sys.argv[1]), lease_s=0.2).acquire(); print('held', flush=True); time.sleep(600)")
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    while child.poll() is None:  # again and again: the holder may be between its look and its write
        write_record(tmp_path, host="elsewhere")
        time.sleep(0.01)
    _, errors = child.communicate()
    assert child.returncode == 1 and "another run took this folder" in errors
    assert json.loads((tmp_path / LOCK).read_text())["host"] == "elsewhere"


def test_concurrent_starts_give_single_holder(tmp_path: Path) -> None:
    write_record(tmp_path, pid=2 ** 22 + 1)  # no such process: both see a stale lock
    code = ("import sys, time; from pathlib import Path; from megatron_sov.base.errors import UserError\n"
            "from megatron_sov.runs.lock import RunLock\n"
            "print('ready', flush=True); sys.stdin.readline()\n"
            "try:\n    RunLock(Path(sys.argv[1])).acquire(); print('held', flush=True); "
            "sys.stdin.readline()\n"
            "except UserError: print('refused', flush=True)")
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    outcomes = [process.stdout.readline().strip() for process in processes if process.stdout is not None]
    for process in processes:
        process.communicate("\n", timeout=600)
    assert sorted(outcomes) == ["held", "refused", "refused", "refused"]


def test_earlier_restart_of_slurm_job_does_not_hold_lock(tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm has released the earlier start's nodes, so the lease need not expire."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for job, restart in (("7", 1), ("7", 2), ("8", 0)):
        write_record(tmp_path, slurm_job=job, slurm_restart=restart)
        with pytest.raises(UserError, match="held by a living run"):
            RunLock(tmp_path).acquire()
    write_record(tmp_path, host="elsewhere", slurm_job="7", slurm_restart=0)
    acquire_and_release(tmp_path)
