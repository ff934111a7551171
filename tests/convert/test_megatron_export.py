"""Megatron-Core's own model, optimizer and scheduler continue from a written `torch_dist` checkpoint."""

from pathlib import Path
from typing import Any

import pytest

from megatron_sov.convert.megatron_export import to_megatron
from tests.packing import Packed

JOBS = str(Path(__file__).with_name("stock_training.py"))
FIRST, STEPS = 4, 20
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {"tp2": (2, {"tp": 2}), "pp2": (2, {"pp": 2}), "ep2": (2, {"ep": 2}),
                                                  "dp2": (2, {})}


def train(ranks: Any, job: Any, data: Path, run: Path, precision: str) -> list[float]:
    """Train our trainer, export the checkpoint after step `FIRST`, and return the losses after it."""
    (losses,), = ranks(job(JOBS, "train_ours", 1, {"data": str(data), "run": str(run), "precision": precision,
                                                   "first": FIRST, "steps": STEPS}))
    return list(losses)


def continue_from(job: Any, folder: Path, run: Path, precision: str, size: int, layout: dict[str, int],
                  distributed: bool) -> Any:
    return job(JOBS, "continue_stock", size, {
        "folder": str(folder), "batches": str(run / "batches.pt"), "precision": precision, "layout": layout,
        "distributed": distributed})


@pytest.mark.distributed
def test_stock_training_continues_with_our_losses(ranks: Any, job: Any, packed_data: Packed, tmp_path: Path) -> None:
    expected = train(ranks, job, packed_data.text, tmp_path / "run", "fp64")
    report = to_megatron(tmp_path / f"run/checkpoints/step-{FIRST}", tmp_path / "out")
    assert (report.step, report.num_updates, report.schedule_problem) == (FIRST, FIRST, "")
    (losses,), = ranks(continue_from(job, tmp_path / "out", tmp_path / "run", "fp64", 1, {}, False))
    assert len(losses) == STEPS and max(expected) - min(expected) > 0.5
    assert losses == pytest.approx(expected, rel=1e-12)
