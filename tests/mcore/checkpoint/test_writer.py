"""One safetensors file: the library reads what was written, and the record is the file's."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

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
    with ThreadPoolExecutor(1) as hasher:
        record = write_file(path, specs, lambda spec: tensors[spec.name], hasher if beside else None)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(found[name].dtype == t.dtype and found[name].equal(t) for name, t in tensors.items())
    assert (record.sha256, record.size_bytes) == (hashlib.sha256(path.read_bytes()).hexdigest(),
                                                  path.stat().st_size)


def test_pieces_of_a_large_tensor_are_hashed_in_order(tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_CHUNK_BYTES", 7)
    tensor = torch.arange(100, dtype=torch.int32)
    for hasher in (None, ThreadPoolExecutor(2)):
        record = write_file(tmp_path / "t", [TensorSpec("a", (100,), torch.int32)],
                            lambda spec: tensor, hasher)
        assert record.sha256 == hashlib.sha256((tmp_path / "t").read_bytes()).hexdigest()
        assert load_file(tmp_path / "t")["a"].equal(tensor)
