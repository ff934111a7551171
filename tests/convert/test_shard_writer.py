"""The streaming writer: files have the right size and hash, and the safetensors library reads them."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from hypothesis import example, given, settings, strategies as st
from safetensors.torch import load_file

from megatron_sov.base.artifacts import FileRecord
from megatron_sov.checkpoint.safetensors_files import SAFETENSORS_DTYPES, TensorSpec
from megatron_sov.convert.hf_import import plan_shards, write_files

SPECS = st.lists(st.tuples(st.lists(st.integers(1, 5), min_size=1, max_size=3),
                           st.sampled_from(list(SAFETENSORS_DTYPES))),
                 min_size=1, max_size=8)


@settings(max_examples=30, deadline=None)
@given(SPECS, st.integers(1, 600))
@example([([1], torch.float32)] * 4, 8)  # files filled to the last byte
def test_safetensors_library_reads_our_shards(tmp_path_factory, shapes, max_shard_bytes: int) -> None:
    folder: Path = tmp_path_factory.mktemp("shards")
    specs = [TensorSpec(f"t{i}", tuple(shape), dtype) for i, (shape, dtype) in enumerate(shapes)]
    tensors = {spec.name: torch.randn(spec.shape).to(spec.dtype) for spec in specs}
    shards = plan_shards(specs, max_shard_bytes)
    assert [spec for shard in shards for spec in shard] == specs
    sizes = [[spec.size_bytes for spec in shard] for shard in shards]
    assert all(len(shard) == 1 or sum(shard) <= max_shard_bytes for shard in sizes)
    assert all(sum(shard) + following[0] > max_shard_bytes for shard, following in pairwise(sizes))
    records: dict[str, FileRecord] = {}
    files = {f"{i}.safetensors": shard for i, shard in enumerate(shards)}
    write_files(folder, files, lambda spec: tensors[spec.name], 3, records.__setitem__)
    assert records.keys() == files.keys()
    found = {}
    for file, record in records.items():
        raw = (folder / file).read_bytes()
        assert record == FileRecord(f"blake3:{blake3(raw).hexdigest()}", len(raw))
        header = json.loads(raw[8:8 + int.from_bytes(raw[:8], "little")])
        assert header.pop("__metadata__") == {"format": "pt"}
        assert all(entry["data_offsets"][0] % tensors[name].itemsize == 0 for name, entry in header.items())
        found |= load_file(folder / file)
    assert found.keys() == tensors.keys()
    assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in tensors.items())


def test_writer_holds_at_most_two_tensors_per_file(tmp_path: Path) -> None:
    """Of forty tensors of one megabyte, at most two per file exist at a time: one being written, one being
    read."""
    import weakref

    alive: list[weakref.ref] = []
    most = 0

    def read(spec: TensorSpec) -> torch.Tensor:
        nonlocal most
        tensor = torch.zeros(spec.shape, dtype=spec.dtype)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    files = {f"{k}.safetensors": [TensorSpec(f"t{i}", (1 << 18,), torch.float32) for i in range(20)]
             for k in range(2)}
    write_files(tmp_path, files, read, 2, lambda name, record: None)
    assert all((tmp_path / name).stat().st_size > 20 << 20 for name in files)
    assert most <= 4


def test_writer_rejects_duplicate_and_unplanned_tensors(tmp_path: Path) -> None:
    spec = TensorSpec("t", (2,), torch.float32)
    with pytest.raises(ValueError, match="t: would be"):
        write_files(tmp_path, {"f": [TensorSpec("s", (1,), torch.float32), spec, spec]},
                    lambda s: torch.zeros(s.shape), 1, print)
    with pytest.raises(ValueError, match=r"torch.float32 \(3,\), planned torch.float32"):
        write_files(tmp_path, {"f": [spec]}, lambda s: torch.zeros(3), 1, print)
