"""Resumable artifacts and parts: finished files survive kills and errors."""

import dataclasses
import os
from pathlib import Path

import pytest

from megatron_sov.base.artifacts import FileRecord, find_damaged_files
from megatron_sov.base.digests import fingerprint_folder
from megatron_sov.base.errors import UserError
from megatron_sov.work.progress.journal import read_job, work_folder
from megatron_sov.work.progress.resumable import (
    CONTENT, begin_parts, open_parts, part_folder, resumable_artifact)


def test_finished_files_are_reused_for_equal_plan(tmp_path: Path) -> None:
    out, work = tmp_path / "out", work_folder(tmp_path / "out")

    def build(plan: int, end: type[BaseException] = KeyboardInterrupt, *, redo: bool = False) -> list[str]:
        """Finish files "a" and "b", then raise `end`; return the files that an earlier attempt finished."""
        with pytest.raises(end, match="no"), \
                resumable_artifact(out, "kind", "sov make", {"p": plan}, redo=redo) as artifact:
            finished = sorted(artifact.finished)
            for name in {"a", "b"} - artifact.finished.keys():
                (artifact.path / name).write_bytes(b"1234")
                artifact.finish(name, FileRecord.of(artifact.path / name))
            (artifact.path / "half").touch()
            raise end("no")
        return finished

    assert (build(1), build(1), build(1, UserError)) == ([], ["a", "b"], ["a", "b"])
    message = r"another command: .* discard the work .--redo.*\n  p was 1, and is 2"
    with pytest.raises(UserError, match=message), \
            resumable_artifact(out, "kind", "sov make", {"p": 2}):
        raise AssertionError("unreachable")
    assert (build(1), build(2, redo=True), build(2, redo=True)) == (["a", "b"], [], ["a", "b"])
    (work / CONTENT / "a").write_bytes(b"123")
    assert build(2) == ["b"]
    with resumable_artifact(out, "kind", "sov make", {"p": 2}) as artifact:
        assert not (artifact.path / "half").exists()
        with (pytest.raises(UserError, match="is being written by another process"),
              resumable_artifact(out, "kind", "sov make", {"p": 2})):
            raise AssertionError("unreachable")
        # recorded files are not read again: their hash is trusted
        artifact.finished["a"] = dataclasses.replace(artifact.finished["a"], digest="blake3:12")
    (damaged,) = find_damaged_files(out)
    assert damaged.startswith(f"{out / 'a'}: ") and os.listdir(tmp_path) == ["out"]


def test_fingerprint_detects_rewritten_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    finished = fingerprint_folder(tmp_path)
    os.utime(tmp_path / "file", ns=(1, 1))
    assert fingerprint_folder(tmp_path) != finished


def build_parts(output: Path, keys: list[str], made_by: str = "sov-data pack") -> list[str]:
    """Build parts, then raise; return the parts found at the start."""
    with pytest.raises(KeyboardInterrupt), open_parts(output, made_by) as work:
        existing = [key for key in keys if part_folder(work, key).is_dir()]
        for key in keys:
            part_folder(work, key).mkdir(parents=True, exist_ok=True)
        raise KeyboardInterrupt
    return existing


def test_matching_parts_are_reused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert (build_parts(out, ["ab1", "cd2"]), build_parts(out, ["cd2", "ef3"])) == ([], ["cd2"])
    assert read_job(work_folder(out)) == {"made_by": "sov-data pack", "num_done": 3,
                                          "identity": {"command": "sov-data pack"}}
    begin_parts(out, "sov-data pack")  # for jobs of a cluster
    with open_parts(out, "sov-data pack") as work:
        assert part_folder(work, "ab1").is_dir()
        with (pytest.raises(UserError, match="is being written by another process"),
              open_parts(out, "sov-data pack")):
            raise AssertionError("unreachable")
    assert list(tmp_path.iterdir()) == []


def test_parts_of_other_commands_are_not_removed(tmp_path: Path) -> None:
    build_parts(tmp_path / "out", ["ab1"])
    with (pytest.raises(UserError, match=r"out: .* unfinished work of another command: .*inspect .* --clear"
                                         r"(.|\n)*command was .sov-data pack., and is .sov-tokenizer train."),
          open_parts(tmp_path / "out", "sov-tokenizer train")):
        raise AssertionError("unreachable")
    (work_folder(tmp_path / "old") / "ab" / "ab1").mkdir(parents=True)
    with (pytest.raises(UserError, match=r"it contains .ab. but no readable job.json"),
          open_parts(tmp_path / "old", "sov-data pack")):
        raise AssertionError("unreachable")
    assert build_parts(tmp_path / "out", ["ab1"]) == ["ab1"]
    assert (work_folder(tmp_path / "old") / "ab/ab1").is_dir()
