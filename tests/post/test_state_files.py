"""What is kept of a teacher on disk: found by document and offset, with few files open at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sov.data.token_shards import open_sources
from megatron_sov.post import state_files
from megatron_sov.post.state_files import Kept, StateFiles


def test_most_probable_tokens_keep_every_bit() -> None:
    token, logprobs = torch.tensor([[5, 200_000], [0, 7]]), torch.tensor([[-0.1, -3e-8], [-1e30, 0.0]])
    found = state_files.unpacked(state_files.packed(token, logprobs))
    assert torch.equal(found[0], token) and torch.equal(found[1], logprobs)


def test_few_parts_are_mapped_at_a_time(kept_by_a_teacher: Any, packed_data: Any, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_files, "OPEN_PARTS", 3)
    kept_by_a_teacher(tmp_path / "kept", [packed_data.chats], Kept("float32"), part_tokens=100)
    (source,) = open_sources({str(packed_data.chats): 1.0}, 368)
    files, lengths = StateFiles(tmp_path / "kept", [source]), source.shard("train").lengths
    for document in [*range(len(lengths)), 0]:
        assert files.states(0, "train", document, 0, int(lengths[document])).abs().sum() > 0
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert len(list((tmp_path / "kept/states").iterdir())) > 10
    assert len({line.split()[-1] for line in maps if str(tmp_path) in line}) == 3
