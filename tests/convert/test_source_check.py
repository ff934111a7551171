"""The source's hashes are computed beside the conversion, and what comes of a damaged file never counts."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from megatron_sov import convert
from megatron_sov.artifacts import MANIFEST, FileRecord, file_damage, new_artifact
from megatron_sov.convert import shard_writer, source_check
from megatron_sov.convert.resume import ResumableArtifact
from megatron_sov.convert.source_check import checked_source
from megatron_sov.errors import UserError


class Folder:
    """Weights of which the files `a` and `b` hold one tensor each, `A` and `B`."""

    def __init__(self, path: Path) -> None:
        self.path: Any = path
        self.model: Any = None
        self.links: Any = []

    def held_in(self, file: str) -> list[str]:
        return [file.upper()] if file in ("a", "b") else []

    def files_of(self, name: str) -> set[str]:
        return {name.lower()}

    def names(self) -> Any: ...
    def dtype(self, name: str) -> Any: ...
    def read(self, name: str) -> Any: ...


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    with new_artifact(tmp_path / "weights", "hf_model") as artifact:
        artifact.content = {"parts": ["model", "optimizer"]}
        (artifact.path / "optimizer").mkdir()
        for name in ("a", "b", "optimizer/o"):
            (artifact.path / name).write_text(name)
    return Folder(tmp_path / "weights")


def test_what_is_inside_does_not_wait_for_the_hashes(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()

    def later(file: Path, record: FileRecord) -> str | None:
        assert begun.wait(600)
        return file_damage(file, record)

    monkeypatch.setattr(source_check, "file_damage", later)
    with checked_source(folder, workers=1) as check:
        begun.set()
        check.require(["A"])


def test_only_what_was_made_of_damaged_files_is_refused(folder: Folder) -> None:
    (folder.path / "b").write_text("B")
    with (pytest.raises(UserError, match=r"b: its content differs .*\(it holds B\); copy or download it"),
          checked_source(folder, workers=2) as check):
        check.require(["A"])
        with pytest.raises(UserError, match="b: its content differs"):
            check.require(["A", "B"])


def test_damage_explains_what_else_goes_wrong(folder: Folder) -> None:
    with pytest.raises(ZeroDivisionError), checked_source(folder, workers=2):
        raise ZeroDivisionError
    (folder.path / "a").unlink()
    with pytest.raises(UserError, match="a: is missing"), checked_source(folder, workers=2):
        raise ZeroDivisionError


def test_other_parts_and_folders_without_a_manifest_are_not_looked_at(folder: Folder) -> None:
    (folder.path / "optimizer/o").write_text("?")
    with checked_source(folder, workers=1):
        pass
    (folder.path / MANIFEST).unlink()
    (folder.path / "a").unlink()
    with checked_source(folder, workers=1) as check:
        check.require(["A"])


def test_an_export_counts_a_file_only_when_what_it_was_made_of_is_whole(
        solar_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, counted, too_early = threading.Event(), threading.Event(), list[bool]()

    def after_the_writing(file: Path, record: FileRecord) -> str | None:
        if file.suffix == ".safetensors":
            assert written.wait(600)
            too_early.append(counted.wait(0.1))
        return file_damage(file, record)

    def write(*arguments: Any, now: Any = shard_writer.write_file) -> FileRecord:
        record: FileRecord = now(*arguments)
        written.set()
        return record

    def finish(*arguments: Any, now: Any = ResumableArtifact.finish) -> None:
        counted.set()
        now(*arguments)

    convert.from_hf(solar_dir, tmp_path / "ckpt")
    monkeypatch.setattr(source_check, "file_damage", after_the_writing)
    monkeypatch.setattr(shard_writer, "write_file", write)
    monkeypatch.setattr(ResumableArtifact, "finish", finish)
    convert.to_hf(tmp_path / "ckpt", tmp_path / "hf")
    assert counted.is_set() and too_early == [False]
