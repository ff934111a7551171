"""Stored teacher outputs: packed rows keep every bit, every process reports a damaged file, and outputs that
do not match the settings are refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sov.base.errors import UserError
from megatron_sov.engine.parallel.world import ParallelWorld
from megatron_sov.model.config import DistillationConfig
from megatron_sov.post.distillation import distill, state_files
from megatron_sov.post.distillation.distill import StoredTeacher
from megatron_sov.post.distillation.state_files import StateFiles, StateFormat
from megatron_sov.train.data.sources import open_sources


def test_most_probable_tokens_keep_every_bit() -> None:
    token, logprobs = torch.tensor([[5, 200_000], [0, 7]]), torch.tensor([[-0.1, -3e-8], [-1e30, 0.0]])
    result = state_files.unpack_rows(state_files.pack_rows(token, logprobs))
    assert torch.equal(result[0], token) and torch.equal(result[1], logprobs)


def test_a_flipped_bit_is_reported_on_every_process(write_teacher_states: Any, packed_data: Any,
                                                    tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_teacher_states(tmp_path / "stored", [packed_data.chats], StateFormat("float32"), part_tokens=1000)
    sources = open_sources({str(packed_data.chats): 1.0}, 368)
    files = StateFiles(tmp_path / "stored", sources)
    teacher = StoredTeacher([files], DistillationConfig(), sources, 368)
    numbers_by_rank: list[float] = []

    def gather_from_ranks(number: float) -> list[float]:
        numbers_by_rank.append(number)
        return numbers_by_rank

    monkeypatch.setattr(distill.collectives, "gather_numbers", gather_from_ranks)

    def verify() -> None:
        """Verify as rank 0, then as rank 1, which sees the numbers of both."""
        numbers_by_rank.clear()
        for rank in range(2):
            teacher.verify(ParallelWorld(rank, 2, rank, 2, True, True))

    verify()
    for file in [*sorted((tmp_path / "stored/states").iterdir())[:2], tmp_path / "stored/head.safetensors"]:
        whole = file.read_bytes()
        file.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
        with pytest.raises(UserError, match=f"{file.name}: its content differs .* make the states"):
            verify()
        file.write_bytes(whole)


def build_files(state_format: StateFormat, **other_fields: Any) -> Any:
    """Return a stand-in for `StateFiles`; `other_fields` replaces fields other than its format."""
    fields = {"folder": Path("states"), "state_format": state_format, "vocab_size": 368, "teacher": "one",
              "dtype": torch.bfloat16, "sources": {}}
    return SimpleNamespace(**(fields | other_fields))


@pytest.mark.each(("stored", "settings", "vocab_size", "message"), [
    (StateFormat(), {"top_k": 8}, 368,
     r"states: holds the final hidden states of the teacher, and distillation.top_k = 8 asks for the 8 most "
     r"probable tokens; set it to 0"),
    (StateFormat(top_k=8), {}, 368,
     r"holds the 8 most probable tokens of the teacher, and distillation.top_k = 0 "),
    (StateFormat(top_k=8, temperature=2.0), {"top_k": 8}, 368,
     r"are those at temperature 2.0, and distillation.temperature = 1.0; set it to that"),
    (StateFormat(), {}, 400,
     r"its teacher has 368 token ids, the student model.vocab_size = 400; choose a teacher"),
])
def test_states_in_another_format_are_refused(stored: StateFormat, settings: dict[str, Any], vocab_size: int,
                                              message: str) -> None:
    with pytest.raises(UserError, match=message):
        StoredTeacher([build_files(stored)], DistillationConfig(**settings), [], vocab_size)
    matching = DistillationConfig(top_k=stored.top_k, temperature=stored.temperature)
    StoredTeacher([build_files(stored)], matching, [], 368)


def test_every_source_was_read_by_a_teacher() -> None:
    sources: Any = [SimpleNamespace(name=name, artifact=f"data/{name}") for name in ("first", "second")]
    folders = [build_files(StateFormat(), sources={1: 0}), build_files(StateFormat(), sources={0: 0})]
    assert StoredTeacher(folders, DistillationConfig(), sources, 368).teacher == "one"
    with pytest.raises(UserError, match="source 'first' of data/first"):
        StoredTeacher(folders[:1], DistillationConfig(), sources, 368)
    # the description names each source's teacher, so that a resumed run must use the same teachers
    folders[0].teacher = "another"
    assert StoredTeacher(folders, DistillationConfig(), sources, 368).teacher == "first: one, second: another"
