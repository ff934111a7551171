"""The checkpoint to go on from: the newest sound one; what is damaged is set aside, and said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_sov.artifacts import MANIFEST, new_artifact
from megatron_sov.obs.events import EVENTS, read_events
from megatron_sov.runs.folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run with checkpoints after 2, 4 and 6 steps."""
    folder = RunFolder(tmp_path / "run")
    for step in (2, 4, 6):
        with new_artifact(folder.checkpoint(step), "checkpoint") as artifact:
            (artifact.path / "state.json").write_text(f"{step} steps")
    return folder


def found(run: RunFolder, place: Any, **options: int) -> str | None:
    """Return the name of the checkpoint to go on from."""
    from megatron_sov.train.restoring import newest_sound

    checkpoint = newest_sound(run, place, **options)
    return checkpoint.name if checkpoint is not None else None


def names(run: RunFolder) -> list[str]:
    return sorted(p.name for p in run.checkpoints.iterdir())


def test_the_newest_up_to_a_step_is_taken_and_nothing_is_touched(run: RunFolder, alone: Any) -> None:
    assert found(run, alone) == "step-6"
    assert [found(run, alone, not_after=step) for step in (6, 5, 2, 1)] == [
        "step-6", "step-4", "step-2", None]
    assert names(run) == ["step-2", "step-4", "step-6"] and not (run.path / EVENTS).exists()


def test_damaged_ones_are_set_aside_for_the_one_before_and_said(
        run: RunFolder, alone: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (run.checkpoint(6) / "state.json").write_text("6 stepS")
    (run.checkpoint(4) / MANIFEST).unlink()
    assert found(run, alone) == "step-2"
    assert names(run) == ["damaged-step-4", "damaged-step-6", "step-2"]
    assert (run.checkpoints / "damaged-step-6/state.json").read_text() == "6 stepS", "it may be looked into"
    reasons = [f"{run.checkpoint(6)}/state.json: its content differs from the hash in the manifest",
               f"{run.checkpoint(4)}/{MANIFEST}: is missing"]
    texts = [f"{reason}; step-{step} is renamed to damaged-step-{step}, and the run goes on from the "
             "checkpoint before it" for reason, step in zip(reasons, (6, 4), strict=True)]
    assert capsys.readouterr().err.splitlines() == [f"warning: {text}" for text in texts]
    told = [{k: v for k, v in event.items() if k != "time_s"} for event in read_events(run.path / EVENTS)]
    assert [event for event in told if event["event"] == "warning"] == [
        {"event": "warning", "step": step, "text": text} for step, text in zip((6, 4), texts, strict=True)]
    assert [event for event in told if event["event"] == "damaged_checkpoint"] == [
        {"event": "damaged_checkpoint", "path": f"checkpoints/step-{step}", "reason": reason,
         "renamed_to": f"checkpoints/damaged-step-{step}"}
        for step, reason in zip((6, 4), reasons, strict=True)]
    assert found(run, alone) == "step-2" and len(list(read_events(run.path / EVENTS))) == 4, "once is enough"


def test_damage_after_the_step_asked_for_is_not_looked_for(run: RunFolder, alone: Any) -> None:
    (run.checkpoint(6) / "state.json").unlink()
    assert found(run, alone, not_after=4) == "step-4"
    assert names(run) == ["step-2", "step-4", "step-6"]


def test_where_all_are_damaged_there_is_none(run: RunFolder, alone: Any) -> None:
    for step in (2, 4, 6):
        (run.checkpoint(step) / MANIFEST).write_text("{")
    assert found(run, alone) is None
    assert names(run) == [f"damaged-step-{step}" for step in (2, 4, 6)]
