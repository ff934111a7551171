"""Safetensors files: bits equal those of the safetensors library, and damage is named."""

import json
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from hypothesis import given, strategies as st
from safetensors.torch import load_file, save_file

from megatron_sov.base.artifacts import FileRecord
from megatron_sov.base.errors import UserError
from megatron_sov.checkpoint import safetensors_files
from megatron_sov.checkpoint.safetensors_files import (
    SAFETENSORS_DTYPES, TensorFile, TensorSpec, write_tensors)


@given(st.data(), st.lists(st.integers(0, 6), max_size=4),
       st.sampled_from([torch.bfloat16, torch.float64, torch.bool]), st.sampled_from([1, 24, 1 << 25]))
def test_any_block_equals_the_saved_tensor(tmp_path_factory, data: st.DataObject, shape: list[int],
                                           dtype: torch.dtype, cover_bytes: int) -> None:
    path = tmp_path_factory.mktemp("file") / "t.safetensors"
    whole = (torch.arange(math.prod(shape)) % 251).reshape(shape).to(dtype)
    save_file({"before": torch.ones(3, dtype=torch.uint8), "t": whole}, path, metadata={"format": "pt"})
    bounds = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    block = [slice(*b) for b in bounds]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_files, "_COVER_BYTES", cover_bytes)  # small: each row by itself
        patch.setattr(safetensors_files, "_READ_BYTES", 7)
        file = TensorFile(path, "")
        assert file.read("t").equal(whole) and file.get_dtype("t") == dtype
        result = file.read("t", block)
    assert result.equal(whole[tuple(block)]) and result.shape == whole[tuple(block)].shape


def write_with_header(path: Path, change: Callable[[dict[str, Any]], Any], tail: bytes = b"") -> Path:
    """Write two float32 tensors [2] and change their header."""
    header = {name: {"dtype": "F32", "shape": [2], "data_offsets": [8 * i, 8 * i + 8]}
              for i, name in enumerate("ab")}
    text = change(header) or json.dumps(header)
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(16) + tail)
    return path


@pytest.mark.each(("change", "tail", "expected"), [
    (lambda h: h["b"].update(data_offsets=[8, 24], shape=[4]), b"",
     "b is cut off: the file ends 8 bytes too early"),
    (lambda h: h["b"].update(shape=[3]), b"", r"b has 8 bytes, which is not F32 \[3\]"),
    (lambda h: h["b"].update(data_offsets=[4, 12]), b"", "b does not begin where the tensor before it ends"),
    (lambda h: h["b"].update(shape=[-2]), b"", "b has 8 bytes"),
    (lambda h: h["b"].pop("dtype")[:0], b"", "dtype"),
    (lambda h: None, b"more", "4 bytes follow the last tensor"),
    (lambda h: json.dumps(h)[:-1] + ', "a": ' + json.dumps(h["a"]) + "}", b"", "a is in its header twice"),
    (lambda h: "[1, 2]", b"", "not a JSON object"),
    (lambda h: json.dumps(h).replace("[2]", "[1e999]"), b"", "has inf in its shape and offsets"),
    (lambda h: h["b"].update(data_offsets=[8.0, 16]), b"", r"b has 8\.0 in its shape and offsets"),
    (lambda h: "[" * 100_000, b"", "recursion"),
    (lambda h: "{", b"", "its header would have 1 of"),
    (lambda h: h["b"].update(shape=[9] * 20_000), b"", "b has 20000 axes, more than 64"),
    (lambda h: "{" + "".join(f'"{i}": 0,' for i in range(30_000)) + '"29999": 0}', b"",
     "29999 is in its header twice"),
])
def test_damaged_headers_name_the_tensor(tmp_path: Path, change, tail: bytes, expected: str) -> None:
    began_s = time.process_time()
    with pytest.raises(UserError, match=r"t\.safetensors: cannot be read as a safetensors file "
                                        rf".*{expected}.*; copy it again"):
        TensorFile(write_with_header(tmp_path / "t.safetensors", change, tail), "copy it again")
    assert time.process_time() - began_s < 1


def test_changed_files_and_unsupported_dtypes_raise_user_error(tmp_path: Path) -> None:
    path = write_with_header(tmp_path / "t.safetensors", lambda h: h["b"].update(dtype="F8_E4M3", shape=[8]))
    file = TensorFile(path, "copy it again")
    with pytest.raises(UserError, match="dtype F8_E4M3,"):
        file.read("b")
    with pytest.raises(UserError, match="lacks c"):
        file.read("c")
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(UserError, match=r"read .*become shorter.*; copy"):
        file.read("a")


# A single safetensors file: the library reads it, and its record equals its content.


SHAPES = st.lists(st.tuples(st.lists(st.integers(0, 5), max_size=3),
                            st.sampled_from(list(SAFETENSORS_DTYPES))), min_size=1, max_size=6)


@given(SHAPES, st.booleans())
def test_safetensors_library_reads_written_files(tmp_path_factory: pytest.TempPathFactory,
                                                 drawn: list[tuple[list[int], torch.dtype]],
                                                 beside: bool) -> None:
    path = tmp_path_factory.mktemp("file") / "t.safetensors"
    tensors = {f"t{i}": (torch.randn(shape) * 9).to(dtype) for i, (shape, dtype) in enumerate(drawn)}
    specs = [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
    with ThreadPoolExecutor(1) as reader:
        record = write_tensors(path, specs, lambda spec: tensors[spec.name], reader if beside else None)
    file = load_file(path)
    assert file.keys() == tensors.keys()
    assert all(file[name].dtype == t.dtype and file[name].equal(t) for name, t in tensors.items())
    assert record == FileRecord(f"blake3:{blake3(path.read_bytes()).hexdigest()}", path.stat().st_size)


def test_next_tensor_is_read_while_current_is_written(tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """The first tensor is written after the second is requested, and before the third is requested."""
    asked, order = threading.Event(), list[str]()

    def read(spec: TensorSpec) -> torch.Tensor:
        order.append(f"read {spec.name}")
        if spec.name == "b":
            asked.set()
        return torch.zeros(9)

    def write(fd: int, raw: memoryview, now: Any = safetensors_files._write_bytes) -> None:
        if len(raw) == 36:
            assert asked.wait(600)
            order.append("written")
        now(fd, raw)

    monkeypatch.setattr(safetensors_files, "_write_bytes", write)
    specs = [TensorSpec(name, (9,), torch.float32) for name in "abc"]
    with ThreadPoolExecutor(1) as reader:
        write_tensors(tmp_path / "t", specs, read, reader)
    assert order.index("read b") < order.index("written") < order.index("read c")


def test_bytes_equal_safetensors_and_write_back_starts_early(tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[int, int]] = []
    monkeypatch.setattr(safetensors_files, "_start_write_back",
                        lambda fd, start, size: begun.append((start, size)))
    monkeypatch.setattr(safetensors_files, "_WRITE_BACK_BYTES", 100)
    monkeypatch.setattr(safetensors_files, "_CHUNK_BYTES", 40)
    tensors = {"a": torch.randn(6, 10), "b": torch.randn(30), "c": torch.randn(5, 3).bfloat16()}
    specs = [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
    record = write_tensors(tmp_path / "ours", specs, lambda spec: tensors[spec.name])
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert record == FileRecord.of(tmp_path / "theirs")
    assert len(begun) > 1 and all(100 <= size < 300 for _, size in begun)
    assert [start for start, _ in begun] == [sum(size for _, size in begun[:i]) for i in range(len(begun))]
    assert sum(size for _, size in begun) > record.size_bytes - 100


def test_sync_file_range_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if safetensors_files._SYNC_FILE_RANGE is None:
        pytest.skip("only Linux can")
    told: list[int] = []

    def tell(*arguments: object, now: Any = safetensors_files._SYNC_FILE_RANGE) -> int:
        told.append(now(*arguments))
        return told[-1]

    monkeypatch.setattr(safetensors_files, "_SYNC_FILE_RANGE", tell)
    monkeypatch.setattr(safetensors_files, "_WRITE_BACK_BYTES", 1)
    write_tensors(tmp_path / "t", [TensorSpec("a", (9,), torch.float32)], lambda spec: torch.zeros(9))
    assert set(told) == {0}
