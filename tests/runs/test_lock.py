"""One living run in a folder; a killed one does not bar the way."""

from __future__ import annotations

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


def write_record(run: Path, **changed: Any) -> None:
    me = psutil.Process()
    record = {"host": socket.gethostname(), "pid": me.pid, "started_s": me.create_time(),
              "beat": 1, "process_table": process_table(), "token": "another"}
    (run / LOCK).write_text(json.dumps(record | changed))


def take(run: Path) -> None:
    held = RunLock(run)
    held.acquire()
    held.release()
    assert not (run / LOCK).exists()


def test_a_living_holder_is_named(tmp_path: Path) -> None:
    held = RunLock(tmp_path)
    held.acquire()
    with pytest.raises(UserError,
                       match=rf"held by a living run \(process {os.getpid()} on {socket.gethostname()}\)"):
        RunLock(tmp_path).acquire()
    held.release()
    take(tmp_path)


def test_a_dead_process_of_this_machine_frees_the_folder_at_once(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    write_record(tmp_path, pid=child.pid)
    take(tmp_path)


def test_a_dead_process_that_no_parent_has_taken_note_of_frees_the_folder_too(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"]) as child:
        zombie = psutil.Process(child.pid)
        while zombie.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.001)
        write_record(tmp_path, pid=child.pid, started_s=zombie.create_time())
        take(tmp_path)


def test_another_process_with_the_dead_ones_number_does_not_count(tmp_path: Path) -> None:
    write_record(tmp_path, started_s=psutil.Process().create_time() - 3600)
    take(tmp_path)


def test_a_clock_that_was_corrected_does_not_kill_a_living_holder(tmp_path: Path) -> None:
    write_record(tmp_path, started_s=psutil.Process().create_time() + 1)
    with pytest.raises(UserError, match="held by a living run"):
        RunLock(tmp_path).acquire()


ELSEWHERE: list[dict[str, Any]] = [
    {"host": "elsewhere"}, {"process_table": "the same boot, another namespace"},
    {"pid": 2 ** 22 + 1, "process_table": "the same boot, another namespace"}]
"""Same host name, same process number, another namespace: it may live, or not."""


@pytest.fixture
def life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """What a holder from elsewhere does while somebody watches it; a second passes at each look."""
    now_s = itertools.count()
    monkeypatch.setattr(lock.time, "monotonic", lambda: float(next(now_s)))

    def shows(does: Callable[[], object]) -> None:
        monkeypatch.setattr(lock.time, "sleep", lambda s: does())

    shows(lambda: None)
    return shows


@pytest.mark.parametrize("elsewhere", ELSEWHERE)
def test_a_holder_that_cannot_be_looked_up_holds_as_long_as_it_shows_life(
        tmp_path: Path, life: Callable[[Callable[[], object]], None], elsewhere: dict[str, Any],
        capsys: pytest.CaptureFixture[str]) -> None:
    write_record(tmp_path, **elsewhere)
    life(lambda: write_record(tmp_path, **elsewhere, beat=2))
    with pytest.raises(UserError, match="held by a living run"):
        RunLock(tmp_path).acquire()
    assert "waiting up to 60 s for its heartbeat" in capsys.readouterr().err
    life(lambda: None)
    take(tmp_path)  # whatever the clocks say: a whole lease has passed on this one


def test_a_lock_that_is_given_back_meanwhile_is_taken(
        tmp_path: Path, life: Callable[[Callable[[], object]], None]) -> None:
    write_record(tmp_path, host="elsewhere")
    life((tmp_path / LOCK).unlink)
    take(tmp_path)


def test_the_clock_of_the_disk_tells_people_whether_a_holder_elsewhere_lives(tmp_path: Path) -> None:
    write_record(tmp_path, host="elsewhere")
    assert find_living_holder(tmp_path) is not None
    os.utime(tmp_path / LOCK, (1, 1))
    assert find_living_holder(tmp_path) is None


@pytest.mark.skipif(subprocess.run(["unshare", "-pf", "--mount-proc", "true"], capture_output=True,
                                   check=False).returncode != 0, reason="no right to make a namespace")
def test_two_containers_of_one_host_name_are_two_holders(tmp_path: Path) -> None:
    """Both are process 1 of their own namespace."""
    code = ("import sys, time; from pathlib import Path; from megatron_sov.runs.lock import RunLock\n"
            "lock = RunLock(Path(sys.argv[1]), 12); lock.acquire(); print('held', flush=True)\n"
            "sys.stdin.readline(); print(lock._is_lost(), flush=True)")
    command = ["unshare", "-pf", "--mount-proc", "--kill-child", sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdin is not None and first.stdout is not None and first.stdout.readline() == "held\n"
        second = subprocess.run(command, input="", capture_output=True, text=True, check=False)
        assert second.returncode != 0 and "is held by a living run" in second.stderr
        first.stdin.write("\n")
        first.stdin.flush()
        assert first.stdout.readline() == "False\n"


@pytest.mark.parametrize("content", ["", "[]", "null", '{"host": 1}',
                                     '{"host": "a", "pid": "x", "started_s": 1}'])
def test_a_damaged_lock_bars_nobody(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK).write_text(content)
    take(tmp_path)


def test_signs_of_life_are_shown(tmp_path: Path) -> None:
    held = RunLock(tmp_path, lease_s=0.2)
    held.acquire()
    first = json.loads((tmp_path / LOCK).read_text())["beat"]
    deadline = time.monotonic() + 600
    while json.loads((tmp_path / LOCK).read_text())["beat"] == first:
        assert time.monotonic() < deadline, "it shows no life"
        time.sleep(0.02)
    held.release()


def test_a_holder_whose_folder_was_taken_ends_without_touching_it(tmp_path: Path) -> None:
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


def test_two_starts_at_once_give_one_holder(tmp_path: Path) -> None:
    write_record(tmp_path, pid=2 ** 22 + 1)  # no such process: both see a stale lock
    code = ("import sys, time; from pathlib import Path; from megatron_sov.base.errors import UserError\n"
            "from megatron_sov.runs.lock import RunLock\n"
            "print('ready', flush=True); sys.stdin.readline()\n"
            "try:\n    RunLock(Path(sys.argv[1])).acquire(); print('held', flush=True); "
            "sys.stdin.readline()\n"
            "except UserError: print('refused', flush=True)")
    starts = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for s in starts:
        assert s.stdout is not None and s.stdout.readline() == "ready\n"
    for s in starts:
        assert s.stdin is not None
        s.stdin.write("\n")
        s.stdin.flush()
    answers = [s.stdout.readline().strip() for s in starts if s.stdout is not None]
    for s in starts:
        s.communicate("\n", timeout=600)
    assert sorted(answers) == ["held", "refused", "refused", "refused"]


def test_the_start_before_of_the_same_slurm_job_does_not_bar_the_way(tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm gave up that start's nodes; without it the lease of a node that died would have to run out."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for job, restart in (("7", 1), ("7", 2), ("8", 0)):
        write_record(tmp_path, slurm_job=job, slurm_restart=restart)
        with pytest.raises(UserError, match="held by a living run"):
            RunLock(tmp_path).acquire()
    write_record(tmp_path, host="elsewhere", slurm_job="7", slurm_restart=0)
    take(tmp_path)
