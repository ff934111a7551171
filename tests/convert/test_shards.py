"""The streaming writer: files that the safetensors library reads, within their size, with the hash of their bytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megatron_sov.convert.shards import SAFETENSORS_DTYPES, TensorSpec, plan_shards, write_shards

SPECS = st.lists(st.tuples(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.sampled_from(list(SAFETENSORS_DTYPES))),
                 min_size=1, max_size=8)


@settings(max_examples=30, deadline=None)
@given(SPECS, st.integers(1, 600))
def test_the_library_reads_what_we_write(tmp_path_factory, shapes, max_shard_bytes: int) -> None:
    folder: Path = tmp_path_factory.mktemp("shards")
    specs = [TensorSpec(f"t{i}", tuple(shape), dtype) for i, (shape, dtype) in enumerate(shapes)]
    tensors = {spec.name: torch.randn(spec.shape).to(spec.dtype) for spec in specs}
    shards = plan_shards(specs, max_shard_bytes)
    assert [spec for shard in shards for spec in shard] == specs
    assert all(len(shard) == 1 or sum(s.size_bytes for s in shard) <= max_shard_bytes for shard in shards)
    records = write_shards(folder, shards, lambda spec: tensors[spec.name])
    found = {}
    for file, record in records.items():
        raw = (folder / file).read_bytes()
        assert (record.sha256, record.size_bytes) == (hashlib.sha256(raw).hexdigest(), len(raw))
        header = json.loads(raw[8:8 + int.from_bytes(raw[:8], "little")])
        assert header.pop("__metadata__") == {"format": "pt"}
        assert all(entry["data_offsets"][0] % tensors[name].itemsize == 0 for name, entry in header.items())
        found |= load_file(folder / file)
    assert found.keys() == tensors.keys()
    assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in tensors.items())
    if len(shards) > 1:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == tensors.keys()


def test_memory_holds_one_tensor(tmp_path: Path) -> None:
    """Twenty tensors of one megabyte pass through while at most two are alive."""
    import weakref

    alive: list[weakref.ref] = []
    most = 0

    def read(spec: TensorSpec) -> torch.Tensor:
        nonlocal most
        tensor = torch.zeros(spec.shape, dtype=spec.dtype)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    specs = [TensorSpec(f"t{i}", (1 << 18,), torch.float32) for i in range(20)]
    write_shards(tmp_path, [specs], read)
    assert (tmp_path / "model.safetensors").stat().st_size > 20 << 20
    assert most <= 2
