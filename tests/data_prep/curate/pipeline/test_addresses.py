"""Addresses follow from values and contents alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_prep.curate.pipeline import addresses
from data_prep.curate.pipeline.addresses import (
    Batch, address, batches, describe_unknown, hashes_of, is_much, read_batch, tree_hash, unknown_inputs)
from data_prep.curate.pipeline.pipeline_file import load_pipeline
from megatron_sov.base.digests import BLAKE3, file_digest
from megatron_sov.base.errors import UserError


def test_an_address_is_of_values_and_not_of_their_order() -> None:
    assert address({"a": 1, "b": [1, 2]}) == address({"b": [1, 2], "a": 1}) != address({"a": 1, "b": [2, 1]})


def test_content_counts_and_place_does_not(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder / "in").mkdir(parents=True)
        (tmp_path / folder / "in/x").write_text("same")
    assert tree_hash(tmp_path / "one") == tree_hash(tmp_path / "two")
    assert tree_hash(tmp_path / "one/in/x") == tree_hash(tmp_path / "two/in/x")
    (tmp_path / "two/in/x").rename(tmp_path / "two/in/y")
    assert tree_hash(tmp_path / "one") != tree_hash(tmp_path / "two")


def test_files_are_read_again_only_when_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    really = addresses.file_digest
    monkeypatch.setattr(addresses, "file_digest",
                        lambda file, how: read.append(file.name) or really(file, how))
    files = [tmp_path / name for name in "abc"]
    for file in files:
        file.write_text(file.name)
    known = tmp_path / "known/x.json"
    first = hashes_of(files, known)
    os.utime(files[1], (1, 1))
    assert hashes_of(files, known) == first and sorted(read) == ["a", "b", "b", "c"]
    known.write_text("{half")
    assert hashes_of(files, known) == first and len(read) == 7
    with pytest.raises(UserError, match="gone: cannot be read"):
        hashes_of([tmp_path / "gone"])


def test_another_content_with_the_same_size_and_time_is_read(tmp_path: Path) -> None:
    file, known = tmp_path / "a", tmp_path / "known/x.json"
    file.write_text("one")
    before, stat = hashes_of([file], known), file.stat()
    file.write_text("two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == (stat.st_mtime_ns, stat.st_ino)
    assert hashes_of([file], known) != before


# Raw files that jobs read: shared out by size, each read once, known to the plan afterwards.


def test_batches_are_of_one_source_and_as_large_as_a_job_may_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "BATCH_BYTES", 10)
    monkeypatch.setattr(addresses, "BATCH_FILES", 3)
    sizes = {"a": {Path(str(i)): size for i, size in enumerate([4, 4, 4, 99, 0, 0, 0, 0])},
             "b": {Path("x"): 1}, "c": {}}
    found = list(batches(sizes))
    assert [(batch.source, len(batch.files)) for batch in found] == [("a", 2), ("a", 1), ("a", 1), ("a", 3),
                                                                     ("a", 1), ("b", 1)]
    assert [file for batch in found if batch.source == "a" for file in batch.files] == list("01234567")
    assert describe_unknown(sizes) == "111 B in 8 files of source a, 1 B in 1 files of source b"
    assert not is_much(sizes)
    monkeypatch.setattr(addresses, "READ_HERE_BYTES", 111)
    assert is_much(sizes)


def test_what_a_job_has_read_the_plan_knows(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, output = load_pipeline(raw / "pipeline.yaml"), raw / "out"
    (raw / "web/picture.png").write_bytes(b"no format reads it")
    unknown = unknown_inputs(pipeline, output)
    assert {name: len(files) for name, files in unknown.items()} == {"web": 6, "books": 4}
    for batch in batches(unknown):
        read_batch(batch, output)
    assert not any(unknown_inputs(pipeline, output).values())
    files = [raw / f"web/{i}.txt" for i in range(6)]
    with monkeypatch.context() as planning:
        planning.setattr(addresses, "_content_hash", None)
        found = addresses.hashes_of(files, addresses.known_file(output, "web"))
    assert found == {str(file): file_digest(file, BLAKE3).partition(":")[2][:32] for file in files}
    assert not (output / "inputs/parts/web").exists(), "it is in one file now"
    (raw / "web/3.txt").write_text("changed")
    assert list(unknown_inputs(pipeline, output)["web"]) == [raw / "web/3.txt"]
    with pytest.raises(UserError, match=r"gone\.txt: cannot be read"):
        read_batch(Batch("web", (str(raw / "gone.txt"),)), output)
