"""Torch's loader and optimizer continue from a written checkpoint on a transformers model, and back."""

from pathlib import Path
from typing import Any

import pytest

from megatron_sov.cli import main
from megatron_sov.convert.dcp.to_dcp import to_dcp
from tests.convert.test_to_megatron import FIRST, SAVED_AFTER, STEPS, Case
from tests.packing import Packed

JOBS = str(Path(__file__).with_name("torch_training.py"))
DENSE, EXPERTS = "tiny-qwen3", "tiny-qwen3-moe"


def continue_torch(case: Case, job: Any, num_ranks: int, saved: str = "") -> Any:
    return job(JOBS, "continue_torch", num_ranks, {
        "folder": str(case.folder / f"out/step-{FIRST}"), "batches": str(case.folder / "batches.pt"),
        "saved": str(case.folder / saved), "saved_after": SAVED_AFTER if saved else 0})


@pytest.mark.distributed
def test_torch_loop_continues_with_our_losses(ranks: Any, job: Any, packed_data: Packed, tmp_path: Path
                                              ) -> None:
    case = Case(job, packed_data, tmp_path / "run", DENSE, "fp64")
    (expected,), = ranks(case.training)
    source = to_dcp(case.folder / f"checkpoints/step-{FIRST}", case.folder / "out")
    assert (source.step, source.num_updates) == (FIRST, FIRST)
    (losses,), = ranks(continue_torch(case, job, 1, "theirs"))
    assert len(losses) == STEPS and max(expected) - min(expected) > 0.5
    assert losses == pytest.approx(expected, rel=1e-12)
    ours = case.folder / "ours"
    assert main(["convert", "from-dcp", str(case.folder / "theirs"), str(ours), "--model",
                 str(case.folder / "out")]) == 0
    (resumed,), = ranks(case.resume_from(ours))
    assert resumed == pytest.approx(expected[SAVED_AFTER:], rel=1e-12)
