"""Which checkpoints of a run are found, and which stay when it is pruned."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sov.artifacts import new_artifact
from megatron_sov.errors import UserError
from megatron_sov.mcore.run_checkpoints import find_checkpoint, latest, prune


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints after 5, 10 and 100 steps."""
    for step in (5, 10, 100):
        with new_artifact(tmp_path / "checkpoints" / f"step-{step}", "checkpoint"):
            continue
    return tmp_path


def test_the_newest_whole_checkpoint_counts(run: Path) -> None:
    (run / "checkpoints" / "step-200").mkdir()  # without a manifest
    newest = run / "checkpoints" / "step-100"
    assert latest(run / "checkpoints") == find_checkpoint(run) == find_checkpoint(newest) == newest


def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="has no complete checkpoint yet"):
        find_checkpoint(tmp_path)


def test_pruning_keeps_the_newest(run: Path) -> None:
    prune(run / "checkpoints", 0)
    assert len(list((run / "checkpoints").iterdir())) == 3
    prune(run / "checkpoints", 2)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-10", "step-100"]
