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
    """Return two owned halves of each tensor, and one half that another process owns."""
    found = []
    for key, tensor in whole.items():
        middle = len(tensor) // 2
        rest = (0,) * (tensor.dim() - 1)
        found += [LocalShard(key, tensor[:middle], tuple(tensor.shape), (0, *rest), (0,)),
                  LocalShard(key, tensor[middle:], tuple(tensor.shape), (middle, *rest), (0,)),
                  LocalShard(key, tensor[middle:], tuple(tensor.shape), (middle, *rest), (1,))]
    return found


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
    copy = HostSnapshot()
    copy.copy_blocks({"model": split_into_blocks(tensors)})
    for tensor in tensors.values():
        tensor.zero_()
    copy.write(tmp_path, rank=300)
    written = SnapshotRecord.read(tmp_path, 300)
    assert len(written.files) >= 3 and all(name.startswith("model/00001/rank-00300-")
                                           for name in written.files)
    write_index(tmp_path, "model", written.indices["model"])
    reader = TensorReader(tmp_path)
    for key, tensor in before.items():
        assert reader.read(key).equal(tensor), key
    for name, record in written.files.items():
        assert record == FileRecord.of(tmp_path / name)
        assert load_file(tmp_path / name), "the library reads it as well"


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

    def addresses(whole: dict[str, torch.Tensor]) -> dict[tuple[object, ...], int]:
        copy.copy_blocks({"model": split_into_blocks(whole)})
        return {key: t.data_ptr() for key, t in copy._memory.items()}

    first = addresses(tensors)
    assert addresses(tensors) == first and all(address % 64 == 0 for address in first.values())
    fewer = addresses({"w": tensors["w"]})
    assert fewer.items() < first.items() and len(fewer) == 2
    spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in copy._memory.values())
    assert all(a[1] <= b[0] for a, b in pairwise(spans)), "no two blocks share memory"


def test_run_in_threads_raises_the_first_error_at_the_end() -> None:
    done: list[int] = []

    def fails() -> None:
        raise OSError("no space")

    run_in_threads([lambda i=i: done.append(i) for i in range(20)], 3)  # type: ignore[misc]
    assert sorted(done) == list(range(20))
    with pytest.raises(OSError, match="no space"):
        run_in_threads([fails, *(lambda: done.append(99) for _ in range(20))], 1)
    assert 99 not in done, "nothing is begun after a failure"


def test_writer_threads_share_cores_between_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_snapshot.os, "sched_getaffinity", lambda pid: range(16))
    for ranks, threads in (("1", 4), ("8", 4), ("16", 2), ("64", 2)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert host_snapshot.count_writers() == threads
