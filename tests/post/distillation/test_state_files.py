"""Stored teacher outputs: packed rows keep every bit, and every process reports a damaged file."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sov.base.errors import UserError
from megatron_sov.engine.parallel.world import ParallelWorld
from megatron_sov.model.config import DistillationConfig
from megatron_sov.post.distillation import distill, state_files
from megatron_sov.post.distillation.state_files import StateFiles, StateFormat
from megatron_sov.train.data.sources import open_sources


def test_most_probable_tokens_keep_every_bit() -> None:
    token, logprobs = torch.tensor([[5, 200_000], [0, 7]]), torch.tensor([[-0.1, -3e-8], [-1e30, 0.0]])
    result = state_files.unpack_rows(state_files.pack_rows(token, logprobs))
    assert torch.equal(result[0], token) and torch.equal(result[1], logprobs)


def test_a_flipped_bit_is_reported_on_every_process(write_teacher_states: Any, packed_data: Any,
                                                    tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_teacher_states(tmp_path / "kept", [packed_data.chats], StateFormat("float32"), part_tokens=1000)
    sources = open_sources({str(packed_data.chats): 1.0}, 368)
    files = StateFiles(tmp_path / "kept", sources)
    teacher = distill.StoredTeacher([files], DistillationConfig(), sources, 368)
    numbers_by_rank: list[float] = []

    def gather_from_ranks(number: float) -> list[float]:
        numbers_by_rank.append(number)
        return numbers_by_rank

    monkeypatch.setattr(distill.collectives, "gather_numbers", gather_from_ranks)

    def verify() -> None:
        """Act as two processes in turn."""
        numbers_by_rank.clear()
        for rank in range(2):
            teacher.verify(ParallelWorld(rank, 2, rank, 2, True, True))

    verify()
    for file in [*sorted((tmp_path / "kept/states").iterdir())[:2], tmp_path / "kept/head.safetensors"]:
        whole = file.read_bytes()
        file.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
        with pytest.raises(UserError, match=f"{file.name}: its content differs .* make the states"):
            verify()
        file.write_bytes(whole)
