"""Host snapshots: independent copies, reused memory, and writing by several threads."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_sov.base.artifacts import FileRecord
from megatron_sov.checkpoint import host_snapshot
from megatron_sov.checkpoint.host_snapshot import HostSnapshot, SnapshotRecord, run_in_threads
from megatron_sov.checkpoint.sharded_tensors import TensorReader, write_index
from megatron_sov.engine.model.local_shards import LocalShard


def split_into_blocks(whole: dict[str, torch.Tensor]) -> list[LocalShard]:
    """Return both halves of each tensor, owned by this process, and the second half again as a replica."""
    blocks = []
    for key, tensor in whole.items():
        middle = len(tensor) // 2
        zeros = (0,) * (tensor.dim() - 1)
        blocks += [LocalShard(key, tensor[:middle], tuple(tensor.shape), (0, *zeros), (0,)),
                   LocalShard(key, tensor[middle:], tuple(tensor.shape), (middle, *zeros), (0,)),
                   LocalShard(key, tensor[middle:], tuple(tensor.shape), (middle, *zeros), (1,))]
    return blocks


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"w": torch.randn(6, 5, generator=generator), "turned": torch.randn(3, 8, generator=generator).T,
            "half": torch.randn(4, 3, generator=generator).bfloat16(),
            "bias": torch.randn(5, generator=generator), "empty": torch.zeros(4, 0)}


def test_snapshot_is_independent_of_live_tensors(tmp_path: Path, tensors: dict[str, torch.Tensor],
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_snapshot, "MIN_FILE_BYTES", 1)
    monkeypatch.setattr(host_snapshot, "count_writers", lambda: 3)
    before = {key: t.clone() for key, t in tensors.items()}
    snapshot = HostSnapshot()
    snapshot.copy_blocks({"model": split_into_blocks(tensors)})
    for tensor in tensors.values():
        tensor.zero_()
    snapshot.write(tmp_path, rank=300)
    record_of_rank = SnapshotRecord.read(tmp_path, 300)
    assert len(record_of_rank.files) >= 3
    assert all(name.startswith("model/00001/rank-00300-") for name in record_of_rank.files)
    write_index(tmp_path, "model", record_of_rank.indices["model"])
    reader = TensorReader(tmp_path)
    for key, tensor in before.items():
        assert reader.read(key).equal(tensor), key
    for name, record in record_of_rank.files.items():
        assert record == FileRecord.of(tmp_path / name)
        assert load_file(tmp_path / name), "the safetensors package reads the file as well"


def test_unchanged_tensors_are_written_without_copy(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    copied, uncopied = HostSnapshot(), HostSnapshot()
    copied.copy_blocks({"model": split_into_blocks(tensors)})
    uncopied.copy_blocks({"model": split_into_blocks(tensors)}, tensors_change=False)
    assert copied._memory and not uncopied._memory
    files = []
    for snapshot, folder in ((copied, tmp_path / "copied"), (uncopied, tmp_path / "uncopied")):
        folder.mkdir()
        snapshot.write(folder, rank=0)
        files.append({name: (folder / name).read_bytes() for name in SnapshotRecord.read(folder, 0).files})
    assert files[0] == files[1]


def test_snapshot_memory_is_reused_and_freed_with_its_block(tensors: dict[str, torch.Tensor]) -> None:
    copy = HostSnapshot()

    def copy_and_list_addresses(whole: dict[str, torch.Tensor]) -> dict[tuple[object, ...], int]:
        copy.copy_blocks({"model": split_into_blocks(whole)})
        return {key: t.data_ptr() for key, t in copy._memory.items()}

    first = copy_and_list_addresses(tensors)
    assert copy_and_list_addresses(tensors) == first and all(address % 64 == 0 for address in first.values())
    fewer = copy_and_list_addresses({"w": tensors["w"]})
    assert fewer.items() < first.items() and len(fewer) == 2
    spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in copy._memory.values())
    assert all(a[1] <= b[0] for a, b in pairwise(spans)), "no two blocks share memory"


def test_run_in_threads_raises_the_first_error_at_the_end() -> None:
    completed: list[int] = []

    def raise_no_space() -> None:
        raise OSError("no space")

    run_in_threads([lambda i=i: completed.append(i) for i in range(20)], 3)  # type: ignore[misc]
    assert sorted(completed) == list(range(20))
    with pytest.raises(OSError, match="no space"):
        run_in_threads([raise_no_space, *(lambda: completed.append(99) for _ in range(20))], 1)
    assert 99 not in completed, "no task starts after a failure"


def test_writer_threads_share_cores_between_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_snapshot.os, "sched_getaffinity", lambda pid: range(16))
    for ranks, threads in (("1", 4), ("8", 4), ("16", 2), ("64", 2)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert host_snapshot.count_writers() == threads
