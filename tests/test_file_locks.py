"""Locks: seen by other processes, gone with theirs, and no obstacle where a file system has none."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sov import file_locks
from megatron_sov.artifacts import new_artifact
from megatron_sov.convert.resume import resumable_artifact
from megatron_sov.errors import UserError


def test_a_folder_is_held_as_long_as_its_process_lives(tmp_path: Path) -> None:
    program = """import os, sys
from megatron_sov.file_locks import holds
print(holds(os.open(sys.argv[1], os.O_RDONLY)), flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]) as other:
        assert other.stdout is not None and other.stdout.readline() == "True\n"
        assert file_locks.is_held(tmp_path)
        other.kill()
    assert not file_locks.is_held(tmp_path)
    assert not file_locks.is_held(tmp_path / "missing")


def test_where_a_file_system_knows_no_locks_the_work_goes_on(tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(file_locks.fcntl, "flock", refuse)
    assert file_locks.is_held(tmp_path) is None
    with new_artifact(tmp_path / "tokens", "tokens") as writer:
        (writer.path / "data.bin").touch()
    with resumable_artifact(tmp_path / "export", "hf_model", {}) as artifact:
        (artifact.path / "model.safetensors").touch()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export", "tokens"]
    # of a container that was killed, or of one at work that has the same number
    (other := tmp_path / f".more.tmp-{os.getpid()}").mkdir()
    with (pytest.raises(UserError, match=f"or delete {other} if it is what a killed one left"),
          new_artifact(tmp_path / "more", "tokens")):
        raise AssertionError("unreachable")
    assert other.is_dir()
