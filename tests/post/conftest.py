"""Packed preference pairs, and the states of a random teacher."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

VOCABULARY, TEACHER_HIDDEN = 368, 24


@pytest.fixture(scope="session")
def pairs(packed_data: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed preference pairs whose chosen answer is the right sum."""
    from data_prep.cli import main as sov_data

    folder = tmp_path_factory.mktemp("pairs")
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps({
        "prompt": f"What is {i} plus {i % 7}?", "chosen": f"{i} plus {i % 7} is {i + i % 7}.",
        "rejected": f"It is {i}." + " I am sure." * (i % 3)}) for i in range(60)))
    assert sov_data(["pack", "--tokenizer", str(packed_data.tokenizer), "--heldout", "0.2", "--workers", "1",
                     "--format", "preference", "--input", str(folder / "pairs.jsonl"),
                     "--output", str(folder / "pairs")]) == 0
    return folder / "pairs"


@pytest.fixture(scope="session")
def write_teacher_states() -> Callable[..., None]:
    """Return `write(out, data, state_format, part_tokens=400, teacher="one")`: write the artifact of a
    teacher with random states, which are the same in each format; any other teacher name is a wider model."""
    import torch
    from safetensors.torch import save_file

    from megatron_sov.base.artifacts import create_artifact
    from megatron_sov.post.distillation import state_files
    from megatron_sov.train.data.sources import describe_inputs, open_sources

    def write(out: Path, data: list[Path], state_format: Any, part_tokens: int = 400,
              teacher: str = "one") -> None:
        is_other = teacher != "one"
        random, hidden_size = torch.Generator().manual_seed(int(is_other)), TEACHER_HIDDEN + 8 * is_other
        head = torch.randn(VOCABULARY, hidden_size, generator=random) / 4
        sources = open_sources({str(folder): 1.0 for folder in data}, VOCABULARY)
        parts = state_files.plan_parts(sources, ("train", "heldout"), part_tokens)
        with create_artifact(out, state_files.KIND) as artifact:
            (artifact.path / "states").mkdir()
            for part in parts:
                rows = torch.randn(part.num_tokens, hidden_size, generator=random)
                if state_format.top_k:
                    logits = rows.double() @ head.double().T / state_format.temperature
                    logprobs, tokens = logits.log_softmax(-1).topk(state_format.top_k)
                    rows = state_files.pack_rows(tokens, logprobs)
                (artifact.path / part.file).write_bytes(rows.numpy().tobytes())
            save_file({state_files.HEAD_WEIGHT: head}, artifact.path / state_files.HEAD)
            artifact.content = state_files.build_content(parts, hidden_size, VOCABULARY, state_format)
            artifact.settings = {"teacher": f"blake3:{teacher}", "teacher_path": teacher}
            artifact.inputs += describe_inputs(sources)

    return write
