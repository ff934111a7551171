"""Raw files that jobs read: shared out by size, each read once, known to the plan afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.pipeline import addresses, inputs
from data_prep.pipeline.inputs import Batch, batches, is_much, read_batch, told, unknown_inputs
from data_prep.pipeline.pipeline_file import load_pipeline
from megatron_sov.digests import BLAKE3, file_digest
from megatron_sov.errors import UserError


def test_batches_are_of_one_source_and_as_large_as_a_job_may_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "BATCH_BYTES", 10)
    monkeypatch.setattr(inputs, "BATCH_FILES", 3)
    sizes = {"a": {Path(str(i)): size for i, size in enumerate([4, 4, 4, 99, 0, 0, 0, 0])},
             "b": {Path("x"): 1}, "c": {}}
    found = list(batches(sizes))
    assert [(batch.source, len(batch.files)) for batch in found] == [("a", 2), ("a", 1), ("a", 1), ("a", 3),
                                                                     ("a", 1), ("b", 1)]
    assert [file for batch in found if batch.source == "a" for file in batch.files] == list("01234567")
    assert told(sizes) == "111 B in 8 files of source a, 1 B in 1 files of source b"
    assert not is_much(sizes)
    monkeypatch.setattr(inputs, "READ_HERE_BYTES", 111)
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
        found = addresses.hashes_of(files, inputs.known_file(output, "web"))
    assert found == {str(file): file_digest(file, BLAKE3).partition(":")[2][:32] for file in files}
    assert not (output / "inputs/parts/web").exists(), "it is in one file now"
    (raw / "web/3.txt").write_text("changed")
    assert list(unknown_inputs(pipeline, output)["web"]) == [raw / "web/3.txt"]
    with pytest.raises(UserError, match=r"gone\.txt: cannot be read"):
        read_batch(Batch("web", (str(raw / "gone.txt"),)), output)
