"""Artifacts that are made file by file: what is finished stays, through kills and errors."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sov.base.artifacts import FileRecord, damaged_files
from megatron_sov.base.digests import fingerprint
from megatron_sov.base.errors import UserError
from megatron_sov.work.progress import journal
from megatron_sov.work.progress.journal import work_folder
from megatron_sov.work.progress.resumable import CONTENT, resumable_artifact


def test_what_is_finished_stays_for_the_same_plan(tmp_path: Path) -> None:
    out, work = tmp_path / "out", work_folder(tmp_path / "out")

    def attempt(plan: int, end: type[BaseException] = KeyboardInterrupt, *, redo: bool = False) -> list[str]:
        """Finish files "a" and "b" and end so; return what was there before."""
        with pytest.raises(end, match="no"), \
                resumable_artifact(out, "kind", "sov make", {"p": plan}, redo=redo) as artifact:
            before = sorted(artifact.finished)
            for name in {"a", "b"} - artifact.finished.keys():
                (artifact.path / name).write_bytes(b"1234")
                artifact.finish(name, FileRecord.of(artifact.path / name))
            (artifact.path / "half").touch()
            raise end("no")
        return before

    assert (attempt(1), attempt(1), attempt(1, UserError)) == ([], ["a", "b"], ["a", "b"])
    with pytest.raises(UserError, match=r"another command: .* begin anew .--redo.*\n  p was 1, and is 2"), \
            resumable_artifact(out, "kind", "sov make", {"p": 2}):
        raise AssertionError("unreachable")
    assert (attempt(1), attempt(2, redo=True), attempt(2, redo=True)) == (["a", "b"], [], ["a", "b"])
    (work / CONTENT / "a").write_bytes(b"123")
    assert attempt(2) == ["b"]
    with resumable_artifact(out, "kind", "sov make", {"p": 2}) as artifact:
        assert not (artifact.path / "half").exists()
        # what is on record is not read again: its hash is believed
        artifact.finished["a"] = dataclasses.replace(artifact.finished["a"], digest="blake3:12")
    (damaged,) = damaged_files(out)
    assert damaged.startswith(f"{out / 'a'}: ") and os.listdir(tmp_path) == ["out"]


def test_an_error_before_anything_is_finished_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError), resumable_artifact(tmp_path / "out", "kind", "sov make", {}) as artifact:
        (artifact.path / "a").touch()
        raise UserError("no")
    assert list(tmp_path.iterdir()) == []


def test_two_processes_do_not_make_one_artifact(tmp_path: Path) -> None:
    code = ("import sys, time; from pathlib import Path\n"
            "from megatron_sov.work.progress.resumable import resumable_artifact\n"
            "with resumable_artifact(Path(sys.argv[1]), 'kind', 'sov make', {}):\n"
            "    print('in', flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None and other.stdout.readline() == b"in\n"
        with (pytest.raises(UserError, match="is being written by another process"),
              resumable_artifact(tmp_path / "out", "kind", "sov make", {})):
            raise AssertionError("unreachable")
        assert work_folder(tmp_path / "out").is_dir()
    finally:
        other.kill()
        other.wait()
    with resumable_artifact(tmp_path / "out", "kind", "sov make", {}) as artifact:
        (artifact.path / "f").touch()  # the lock went with the process
    assert (tmp_path / "out/f").exists()


def test_a_disk_that_has_no_room_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, data: str) -> None:
        raise UserError(f"{path}: no space left on the device")

    monkeypatch.setattr(journal, "atomic_write", refuse)
    with (pytest.raises(UserError, match=r"job\.json: no space left"),
          resumable_artifact(tmp_path / "out", "kind", "sov make", {})):
        raise AssertionError("unreachable")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_an_earlier_version_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    with (pytest.raises(UserError, match=r"\.out\.partial holds unfinished work of an earlier version"),
          resumable_artifact(tmp_path / "out", "kind", "sov make", {})):
        raise AssertionError("unreachable")


def test_a_fingerprint_tells_a_file_that_was_written_again(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    before = fingerprint(tmp_path)
    os.utime(tmp_path / "file", ns=(1, 1))
    assert fingerprint(tmp_path) != before
