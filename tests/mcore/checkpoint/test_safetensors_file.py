"""Safetensors files read block by block: the same bits as the library's, for any block,
and damage is named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from megatron_sov.errors import UserError
from megatron_sov.mcore.checkpoint import safetensors_file
from megatron_sov.mcore.checkpoint.safetensors_file import TensorFile


@given(st.data(), st.lists(st.integers(0, 6), max_size=4),
       st.sampled_from([torch.bfloat16, torch.float64, torch.bool]), st.sampled_from([1, 24, 1 << 25]))
def test_any_block_has_the_bits_that_were_saved(tmp_path_factory, data: st.DataObject, shape: list[int],
                                                dtype: torch.dtype, cover_bytes: int) -> None:
    path = tmp_path_factory.mktemp("file") / "t.safetensors"
    whole = (torch.arange(math.prod(shape)) % 251).reshape(shape).to(dtype)
    save_file({"before": torch.ones(3, dtype=torch.uint8), "t": whole}, path, metadata={"format": "pt"})
    bounds = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    block = [slice(*b) for b in bounds]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_file, "_COVER_BYTES", cover_bytes)  # small: each row by itself
        patch.setattr(safetensors_file, "_READ_BYTES", 7)
        file = TensorFile(path, "")
        assert file.read("t").equal(whole) and file.dtype("t") == dtype
        found = file.read("t", block)
    assert found.equal(whole[tuple(block)]) and found.shape == whole[tuple(block)].shape


def _with_header(path: Path, change: Callable[[dict[str, Any]], Any], tail: bytes = b"") -> Path:
    """Write two float32 tensors [2] and change their header."""
    header = {name: {"dtype": "F32", "shape": [2], "data_offsets": [8 * i, 8 * i + 8]}
              for i, name in enumerate("ab")}
    text = change(header) or json.dumps(header)
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(16) + tail)
    return path


@pytest.mark.parametrize(("change", "tail", "expected"), [
    (lambda h: h["b"].update(data_offsets=[8, 24], shape=[4]), b"",
     "b is cut off: the file ends 8 bytes too early"),
    (lambda h: h["b"].update(shape=[3]), b"", r"b has 8 bytes, which is not F32 \[3\]"),
    (lambda h: h["b"].update(data_offsets=[4, 12]), b"", "b does not begin where the tensor before it ends"),
    (lambda h: h["b"].update(shape=[-2]), b"", "b has 8 bytes"),
    (lambda h: h["b"].pop("dtype")[:0], b"", "dtype"),
    (lambda h: None, b"more", "4 bytes follow the last tensor"),
    (lambda h: json.dumps(h)[:-1] + ', "a": ' + json.dumps(h["a"]) + "}", b"",
     "a stands in its header twice"),
    (lambda h: "[1, 2]", b"", "no JSON object"),
    (lambda h: json.dumps(h).replace("[2]", "[1e999]"), b"", "has inf among its shape and offsets"),
    (lambda h: h["b"].update(data_offsets=[8.0, 16]), b"", r"b has 8\.0 among its shape and offsets"),
    (lambda h: "[" * 100_000, b"", "recursion"),
    (lambda h: "{", b"", "its header would have 1 of"),
])
def test_damaged_headers_are_refused_by_name(tmp_path: Path, change, tail: bytes, expected: str) -> None:
    with pytest.raises(UserError, match=r"t\.safetensors: cannot be read as a safetensors file "
                                        rf".*{expected}.*; copy it again"):
        TensorFile(_with_header(tmp_path / "t.safetensors", change, tail), "copy it again")


def test_files_that_change_or_hold_other_kinds_of_numbers(tmp_path: Path) -> None:
    path = _with_header(tmp_path / "t.safetensors", lambda h: h["b"].update(dtype="F8_E4M3", shape=[8]))
    file = TensorFile(path, "copy it again")
    with pytest.raises(UserError, match=r"b has dtype F8_E4M3, but only .* without quantisation"):
        file.read("b")
    with pytest.raises(UserError, match="lacks c"):
        file.read("c")
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(UserError, match=r"a cannot be read .*become shorter.*; copy it again"):
        file.read("a")
