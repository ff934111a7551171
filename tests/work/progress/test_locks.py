"""Folder locks and claims across processes."""

import errno
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base import artifacts
from megatron_sov.base.artifacts import create_artifact, is_locked
from megatron_sov.base.errors import UserError
from megatron_sov.work.progress import locks
from megatron_sov.work.progress.locks import Claim, Claims, list_holders, lock_folder
from megatron_sov.work.progress.resumable import resumable_artifact
from tests.waiting import wait_until


def test_folder_lock_lasts_until_end_of_block(tmp_path: Path) -> None:
    folder, output = tmp_path / "deep/.out", tmp_path / "out"
    with lock_folder(folder, output), pytest.raises(UserError) as raised, lock_folder(folder, output):
        raise AssertionError("two hold it")
    assert str(raised.value) == (f"{output}: is being written by another process ({folder} is "
                                 "held); wait for it, or name another output")
    with lock_folder(folder, output):
        assert folder.is_dir()


@pytest.mark.parametrize("is_recreated", [False, True])
def test_folder_removed_before_locking_is_not_locked(
        is_recreated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ".out"

    def lock_after_removal(fd: int) -> bool:
        folder.rename(tmp_path / "removed")
        if is_recreated:
            folder.mkdir()
        return True

    monkeypatch.setattr(locks, "try_lock", lock_after_removal)
    with pytest.raises(UserError, match="another process"), lock_folder(folder, tmp_path / "out"):
        raise AssertionError("two hold the output")


def test_folder_removed_before_opening_is_not_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def remove_then_fail(path: Path, flags: int) -> int:
        path.rmdir()
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "open", remove_then_fail)
    with pytest.raises(UserError, match="being written by another process"), \
            lock_folder(tmp_path / ".out", tmp_path / "out"):
        raise AssertionError("nobody holds what is gone")


def test_folder_lock_ends_with_process(tmp_path: Path) -> None:
    program = """import os, sys
from megatron_sov.base.artifacts import try_lock
print(try_lock(os.open(sys.argv[1], os.O_RDONLY)), flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, cwd=Path(__file__).parents[3]) as observer:
        assert observer.stdout is not None and observer.stdout.readline() == "True\n"
        assert is_locked(tmp_path)
        observer.kill()
    assert not is_locked(tmp_path)
    assert not is_locked(tmp_path / "missing")


def test_file_system_without_locks_is_tolerated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(artifacts.fcntl, "flock", refuse)
    assert is_locked(tmp_path) is None
    with create_artifact(tmp_path / "tokens", "tokens") as writer:
        (writer.path / "data.bin").touch()
    with resumable_artifact(tmp_path / "export", "hf_model", "sov make", {}) as artifact:
        (artifact.path / "model.safetensors").touch()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export", "tokens"]
    # of a container that was killed, or of one at work that has the same number
    (observer := tmp_path / f".more.tmp-{os.getpid()}").mkdir()
    with (pytest.raises(UserError, match=f"or delete {observer} if it is what a killed one left"),
          create_artifact(tmp_path / "more", "tokens")):
        raise AssertionError("unreachable")
    assert observer.is_dir()


def test_lock_file_replaces_unlockable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try_lock = artifacts.try_lock

    def lock_files_only(fd: int) -> bool | None:  # as NFS does
        return None if os.path.isdir(f"/proc/self/fd/{fd}") else try_lock(fd)

    monkeypatch.setattr(locks, "try_lock", lock_files_only)
    with (lock_folder(tmp_path / "a", "a"), pytest.raises(UserError, match="is held"),
          lock_folder(tmp_path / "a", "a")):
        raise AssertionError("two hold it")
    with lock_folder(tmp_path / "a", "a"):
        assert os.listdir(tmp_path / "a") == [".lock"]


class Clock:
    """A clock set by the test."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def take_claim(claims: Claims, name: str = "a") -> Claim:
    """Take a claim that is free."""
    claim = claims.take(name)
    assert claim is not None
    return claim


def test_claim_lasts_until_release(tmp_path: Path) -> None:
    first, second = Claims(tmp_path, 60), Claims(tmp_path, 60)
    claim = take_claim(first)
    assert second.take("a") is None and first.take("a") is None
    take_claim(second, "b")
    claim.release()
    new_claim = take_claim(second)
    assert not claim.renew() and new_claim.renew()
    assert [(h.name, h.pid, h.is_released) for h in list_holders(tmp_path)] == [
        ("a", os.getpid(), False), ("b", os.getpid(), False)]


def test_claim_without_heartbeat_expires(tmp_path: Path) -> None:
    clock = Clock()
    dead, observer = take_claim(Claims(tmp_path, 60)), Claims(tmp_path, 60, clock)
    assert observer.take("a") is None  # the lease runs from the first look
    clock.now_s += 59
    assert observer.take("a") is None
    clock.now_s += 1
    new_claim = take_claim(observer)
    assert not dead.renew() and new_claim.renew()
    dead.release()  # its content no longer counts
    assert Claims(tmp_path, 60).take("a") is None and new_claim.renew()


def test_claim_of_dead_local_process_is_free_at_once(tmp_path: Path) -> None:
    def die() -> None:
        take_claim(Claims(tmp_path, 60))
        os._exit(0)

    holder = multiprocessing.get_context("fork").Process(target=die)
    holder.start()
    holder.join()
    assert take_claim(Claims(tmp_path, 60)).renew()
    # the process id of another machine has no meaning here
    take_claim(Claims(tmp_path, 60), "b")
    file = tmp_path / "b/1.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"host": "another", "pid": holder.pid}))
    assert Claims(tmp_path, 60).take("b") is None


def test_claim_may_be_dead_until_heartbeat(tmp_path: Path) -> None:
    clock = Clock()
    live_claim, observer = take_claim(Claims(tmp_path, 60)), Claims(tmp_path, 60, clock)
    dead = take_claim(Claims(tmp_path, 60), "dead")
    assert not observer.may_be_dead("a")  # nobody asked for it
    assert observer.take("a") is None and observer.take("dead") is None
    assert observer.may_be_dead("a") and observer.may_be_dead("dead")
    assert live_claim.renew() and observer.take("a") is None and observer.take("dead") is None
    assert not observer.may_be_dead("a") and observer.may_be_dead("dead")
    clock.now_s += 60
    assert take_claim(observer, "dead").renew() and not dead.renew() and not observer.may_be_dead("dead")


def test_heartbeat_is_change_of_content(tmp_path: Path) -> None:
    clock = Clock()
    live_claim, observer = take_claim(Claims(tmp_path, 60)), Claims(tmp_path, 60, clock)
    for _ in range(4):
        assert observer.take("a") is None
        assert live_claim.renew()
        for file in (tmp_path / "a").iterdir():  # the clocks of the holder and the disk show 1970
            os.utime(file, (0, 0))
        clock.now_s += 1e6
    assert observer.take("a") is None


def test_empty_claim_file_expires(tmp_path: Path) -> None:
    clock = Clock()
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.json").write_bytes(b'{"beat":')
    observer = Claims(tmp_path, 60, clock)
    assert observer.take("a") is None
    assert [(h.host, h.pid) for h in list_holders(tmp_path)] == [("", 0)]
    clock.now_s += 60
    assert take_claim(observer).renew()


def test_deleted_claim_is_lost(tmp_path: Path) -> None:
    claim = take_claim(Claims(tmp_path, 60))
    (tmp_path / "a/1.json").unlink()
    (tmp_path / "a").rmdir()
    assert not claim.renew()
    claim.release()
    assert list(tmp_path.iterdir()) == []


def test_renewal_thread_writes_heartbeats(tmp_path: Path) -> None:
    # a lease of another length may be watched: the thread has its own
    claim, observer = take_claim(Claims(tmp_path, 0.04)), Claims(tmp_path, 60)
    with claim.renew_while_open():
        before = (tmp_path / "a/1.json").read_bytes()
        wait_until(lambda: (tmp_path / "a/1.json").read_bytes() != before)
        assert observer.take("a") is None
    assert take_claim(observer).renew()


def take_all(number: int, folder: Path, log: Path, names: list[str], barrier: Any) -> None:
    """Take all claims concurrently with other processes, then die: the claims become free.

    Args:
        number: number of this process.
        folder: folder of the claims.
        log: file that gets a line for each taken claim.
        names: claims to take.
        started: barrier at the beginning and at the end.
    """
    claims = Claims(folder, 60)
    barrier.wait()
    for name in names[number % 3:] + names[:number % 3]:
        if claims.take(name) is not None:
            with open(log, "a", encoding="utf-8") as f:
                f.write(f"{name} {number}\n")
    barrier.wait()  # none is dead before all have looked
    os._exit(0)


@pytest.mark.deep
@pytest.mark.distributed
def test_single_process_wins_claim_and_takeover(tmp_path: Path) -> None:
    names, fork = [f"piece-{i}" for i in range(40)], multiprocessing.get_context("fork")
    for holder in (1, 2, 3):
        log, barrier = tmp_path / f"{holder}.log", fork.Barrier(4)
        arguments = (tmp_path / "claims", log, names, barrier)
        processes = [fork.Process(target=take_all, args=(number, *arguments)) for number in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * 4
        new_claim = [line.split()[0] for line in log.read_text().splitlines()]
        assert sorted(new_claim) == sorted(names), "each by exactly one of the four"
        assert all((tmp_path / f"claims/{name}/{holder}.json").is_file() for name in names)
