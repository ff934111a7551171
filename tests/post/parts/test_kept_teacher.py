"""What is kept of a teacher is refused where it is not what the settings ask for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron

prepare_megatron()
from megatron_sov.config import DistillationConfig  # noqa: E402
from megatron_sov.errors import UserError  # noqa: E402
from megatron_sov.post.parts.kept_teacher import KeptTeacher  # noqa: E402
from megatron_sov.post.state_files import Kept  # noqa: E402


@pytest.mark.parametrize(("kept", "asked", "vocab_size", "text"), [
    (Kept(), {"top_k": 8}, 368, r"states: holds the final hidden states of the teacher, and "
                                r"distillation.top_k = 8 asks for the 8 most probable tokens; set it to 0"),
    (Kept(top_k=8), {}, 368, r"holds the 8 most probable tokens of the teacher, and distillation.top_k = 0 "),
    (Kept(top_k=8, temperature=2.0), {"top_k": 8}, 368,
     r"are those at temperature 2.0, and distillation.temperature = 1.0; set it to that"),
    (Kept(), {}, 400, r"its teacher has 368 token ids, the student model.vocab_size = 400; choose a teacher"),
])
def test_what_was_not_asked_for_is_refused(kept: Kept, asked: dict[str, Any], vocab_size: int,
                                           text: str) -> None:
    files: Any = SimpleNamespace(folder=Path("states"), kept=kept, vocab_size=368)
    with pytest.raises(UserError, match=text):
        KeptTeacher(files, DistillationConfig(**asked), vocab_size)
    KeptTeacher(files, DistillationConfig(top_k=kept.top_k, temperature=kept.temperature), 368)
