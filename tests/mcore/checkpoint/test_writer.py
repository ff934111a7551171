"""One safetensors file: the library reads what was written, and the record is the file's."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_sov.artifacts import FileRecord
from megatron_sov.mcore.checkpoint import writer
from megatron_sov.mcore.checkpoint.writer import SAFETENSORS_DTYPES, TensorSpec, write_file

SHAPES = st.lists(st.tuples(st.lists(st.integers(0, 5), max_size=3),
                            st.sampled_from(list(SAFETENSORS_DTYPES))), min_size=1, max_size=6)


@given(SHAPES, st.booleans())
def test_the_library_reads_it(tmp_path_factory: pytest.TempPathFactory,
                              drawn: list[tuple[list[int], torch.dtype]], beside: bool) -> None:
    path = tmp_path_factory.mktemp("file") / "t.safetensors"
    tensors = {f"t{i}": (torch.randn(shape) * 9).to(dtype) for i, (shape, dtype) in enumerate(drawn)}
    specs = [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
    with ThreadPoolExecutor(1) as reader:
        record = write_file(path, specs, lambda spec: tensors[spec.name], reader if beside else None)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(found[name].dtype == t.dtype and found[name].equal(t) for name, t in tensors.items())
    assert record == FileRecord(f"blake3:{blake3(path.read_bytes()).hexdigest()}", path.stat().st_size)


def test_pieces_of_a_large_tensor_are_hashed_in_order(tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_CHUNK_BYTES", 7)
    tensor = torch.arange(100, dtype=torch.int32)
    record = write_file(tmp_path / "t", [TensorSpec("a", (100,), torch.int32)], lambda spec: tensor)
    assert record.digest == f"blake3:{blake3((tmp_path / 't').read_bytes()).hexdigest()}"
    assert load_file(tmp_path / "t")["a"].equal(tensor)


def test_the_next_tensor_is_read_while_one_is_written(tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is not written before the second one is asked for, nor the third asked for before that."""
    asked, order = threading.Event(), list[str]()

    def read(spec: TensorSpec) -> torch.Tensor:
        order.append(f"read {spec.name}")
        if spec.name == "b":
            asked.set()
        return torch.zeros(9)

    def write(fd: int, raw: memoryview, now: Any = writer._write) -> None:
        if len(raw) == 36:
            assert asked.wait(600)
            order.append("written")
        now(fd, raw)

    monkeypatch.setattr(writer, "_write", write)
    specs = [TensorSpec(name, (9,), torch.float32) for name in "abc"]
    with ThreadPoolExecutor(1) as reader:
        write_file(tmp_path / "t", specs, read, reader)
    assert order.index("read b") < order.index("written") < order.index("read c")


def test_bytes_are_those_of_the_library_and_the_disk_begins_before_the_end(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[int, int]] = []
    monkeypatch.setattr(writer, "_start_write_back", lambda fd, start, size: begun.append((start, size)))
    monkeypatch.setattr(writer, "_WRITE_BACK_BYTES", 100)
    monkeypatch.setattr(writer, "_CHUNK_BYTES", 40)
    tensors = {"a": torch.randn(6, 10), "b": torch.randn(30), "c": torch.randn(5, 3).bfloat16()}
    specs = [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
    record = write_file(tmp_path / "ours", specs, lambda spec: tensors[spec.name])
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert record == FileRecord.of(tmp_path / "theirs")
    assert len(begun) > 1 and all(100 <= size < 300 for _, size in begun)
    assert [start for start, _ in begun] == [sum(size for _, size in begun[:i]) for i in range(len(begun))]
    assert sum(size for _, size in begun) > record.size_bytes - 100


def test_the_disk_is_really_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if writer._SYNC_FILE_RANGE is None:
        pytest.skip("only Linux can")
    told: list[int] = []

    def tell(*arguments: object, now: Any = writer._SYNC_FILE_RANGE) -> int:
        told.append(now(*arguments))
        return told[-1]

    monkeypatch.setattr(writer, "_SYNC_FILE_RANGE", tell)
    monkeypatch.setattr(writer, "_WRITE_BACK_BYTES", 1)
    write_file(tmp_path / "t", [TensorSpec("a", (9,), torch.float32)], lambda spec: torch.zeros(9))
    assert set(told) == {0}
