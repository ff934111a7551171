"""Stored teacher outputs that do not match the settings are refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sov.base.errors import UserError
from megatron_sov.model.config import DistillationConfig
from megatron_sov.post.distillation.distill import StoredTeacher
from megatron_sov.post.distillation.state_files import StateFormat


def build_files(kept: StateFormat, **more: Any) -> Any:
    fields = {"folder": Path("states"), "state_format": kept, "vocab_size": 368, "teacher": "one",
              "dtype": torch.bfloat16, "sources": {}}
    return SimpleNamespace(**(fields | more))


@pytest.mark.each(("kept", "asked", "vocab_size", "text"), [
    (StateFormat(), {"top_k": 8}, 368, r"states: holds the final hidden states of the teacher, and "
                                r"distillation.top_k = 8 asks for the 8 most probable tokens; set it to 0"),
    (StateFormat(top_k=8), {}, 368,
     r"holds the 8 most probable tokens of the teacher, and distillation.top_k = 0 "),
    (StateFormat(top_k=8, temperature=2.0), {"top_k": 8}, 368,
     r"are those at temperature 2.0, and distillation.temperature = 1.0; set it to that"),
    (StateFormat(), {}, 400,
     r"its teacher has 368 token ids, the student model.vocab_size = 400; choose a teacher"),
])
def test_states_in_another_format_are_refused(kept: StateFormat, asked: dict[str, Any], vocab_size: int,
                                              text: str) -> None:
    with pytest.raises(UserError, match=text):
        StoredTeacher([build_files(kept)], DistillationConfig(**asked), [], vocab_size)
    StoredTeacher([build_files(kept)], DistillationConfig(top_k=kept.top_k, temperature=kept.temperature), [],
                  368)


def test_every_source_was_read_by_a_teacher() -> None:
    sources: Any = [SimpleNamespace(name=name, artifact=f"data/{name}") for name in ("first", "second")]
    folders = [build_files(StateFormat(), sources={1: 0}), build_files(StateFormat(), sources={0: 0})]
    assert StoredTeacher(folders, DistillationConfig(), sources, 368).teacher == "one"
    with pytest.raises(UserError, match="source 'first' of data/first"):
        StoredTeacher(folders[:1], DistillationConfig(), sources, 368)
    # a run with two teachers resumes with the same two, each over the same source
    folders[0].teacher = "another"
    assert StoredTeacher(folders, DistillationConfig(), sources, 368).teacher == "first: one, second: another"
