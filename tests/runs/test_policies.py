"""Which checkpoint writes a round."""

from __future__ import annotations

from pathlib import Path

from megatron_sov.artifacts import manifest_sha256, new_artifact
from megatron_sov.config import RolloutConfig
from megatron_sov.runs.policies import Policy, policy_of_round


def checkpoint(path: Path) -> Path:
    with new_artifact(path, "checkpoint") as artifact:
        artifact.content = {"step": path.name}
    return path


def test_the_newest_end_of_a_round_writes_it_if_it_is_not_too_old(tmp_path: Path) -> None:
    start, run = checkpoint(tmp_path / "start"), tmp_path / "run"
    rollout = RolloutConfig(steps_per_round=2)
    first = Policy(start, 0, manifest_sha256(start))
    assert policy_of_round(run, start, 1, rollout) == first  # there is no run yet
    assert policy_of_round(run, start, 2, rollout) is None
    assert policy_of_round(run, start, 2, RolloutConfig(steps_per_round=2, max_staleness=1)) == first

    steps = {step: checkpoint(run / "checkpoints" / f"step-{step}") for step in (2, 3, 4, 5)}
    newest = Policy(steps[4], 4, manifest_sha256(steps[4]))  # 5 lies inside of a round
    assert [policy_of_round(run, start, number, rollout) for number in (1, 3, 4)] == [newest, newest, None]
