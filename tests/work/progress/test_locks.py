"""One process at a time holds a folder, and one that is gone by then is held by nobody."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sov.base import artifacts
from megatron_sov.base.artifacts import is_held, new_artifact
from megatron_sov.base.errors import UserError
from megatron_sov.work.progress import locks
from megatron_sov.work.progress.locks import holding
from megatron_sov.work.progress.resumable import resumable_artifact


def test_a_folder_is_held_until_the_end(tmp_path: Path) -> None:
    folder, output = tmp_path / "deep/.out", tmp_path / "out"
    with holding(folder, output), pytest.raises(UserError) as raised, holding(folder, output):
        raise AssertionError("two hold it")
    assert str(raised.value) == (f"{output}: is being written by another process ({folder} is "
                                 "held); wait for it, or name another output")
    with holding(folder, output):
        assert folder.is_dir()


@pytest.mark.parametrize("another_one", [False, True])
def test_one_that_its_holder_removes_before_it_is_held_is_not_held(
        another_one: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ".out"

    def holds(fd: int) -> bool:
        folder.rename(tmp_path / "removed")
        if another_one:
            folder.mkdir()
        return True

    monkeypatch.setattr(locks, "holds", holds)
    with pytest.raises(UserError, match="another process"), holding(folder, tmp_path / "out"):
        raise AssertionError("two hold the output")


def test_one_that_its_holder_removes_before_it_is_opened_is_not_held(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(path: Path, flags: int) -> int:
        path.rmdir()
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "open", opened)
    with pytest.raises(UserError, match="being written by another process"), \
            holding(tmp_path / ".out", tmp_path / "out"):
        raise AssertionError("nobody holds what is gone")


def test_a_folder_is_held_as_long_as_its_process_lives(tmp_path: Path) -> None:
    program = """import os, sys
from megatron_sov.base.artifacts import holds
print(holds(os.open(sys.argv[1], os.O_RDONLY)), flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, cwd=Path(__file__).parents[3]) as other:
        assert other.stdout is not None and other.stdout.readline() == "True\n"
        assert is_held(tmp_path)
        other.kill()
    assert not is_held(tmp_path)
    assert not is_held(tmp_path / "missing")


def test_where_a_file_system_knows_no_locks_the_work_goes_on(tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(artifacts.fcntl, "flock", refuse)
    assert is_held(tmp_path) is None
    with new_artifact(tmp_path / "tokens", "tokens") as writer:
        (writer.path / "data.bin").touch()
    with resumable_artifact(tmp_path / "export", "hf_model", "sov make", {}) as artifact:
        (artifact.path / "model.safetensors").touch()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export", "tokens"]
    # of a container that was killed, or of one at work that has the same number
    (other := tmp_path / f".more.tmp-{os.getpid()}").mkdir()
    with (pytest.raises(UserError, match=f"or delete {other} if it is what a killed one left"),
          new_artifact(tmp_path / "more", "tokens")):
        raise AssertionError("unreachable")
    assert other.is_dir()


def test_where_folders_cannot_be_locked_a_file_in_them_is(tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    real = artifacts.holds

    def holds_files(fd: int) -> bool | None:  # as NFS does
        return None if os.path.isdir(f"/proc/self/fd/{fd}") else real(fd)

    monkeypatch.setattr(locks, "holds", holds_files)
    with (holding(tmp_path / "a", "a"), pytest.raises(UserError, match="is held"),
          holding(tmp_path / "a", "a")):
        raise AssertionError("two hold it")
    with holding(tmp_path / "a", "a"):
        assert os.listdir(tmp_path / "a") == [".lock"]
