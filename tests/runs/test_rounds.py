"""Resumed rounds require the recorded settings."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.artifacts import create_artifact
from megatron_sov.base.errors import UserError
from megatron_sov.model.config import RolloutConfig
from megatron_sov.runs.rounds import (
    Policy, RunPolicies, build_start_policy, find_round_policy, record_or_check_settings)


def test_rounds_with_results_reject_other_settings(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    note = folder / "rounds" / "rounds.json"

    def record_settings(samples: int) -> None:
        # an option that repeats is a tuple, which the note has as a list
        record_or_check_settings(folder, note, {"samples": samples, "from": "base", "reward_set": ("a=1",)},
                                 "--run")

    record_settings(4)
    (folder / "rounds/.answers.work").mkdir()
    (folder / "rounds/.answers.work/0.bin").touch()
    record_settings(8)  # a corrected command, before any work
    (folder / "rounds/answers").touch()
    record_settings(8)
    with pytest.raises(UserError, match="samples = 8, now"):
        record_settings(4)
    note.write_text("[1")
    with pytest.raises(UserError, match="choose another --run"):
        record_settings(8)
    note.unlink()
    with pytest.raises(UserError, match="rounds; choose another --run"):
        record_settings(8)
    with pytest.raises(UserError, match=r"--run .*answers:"):
        record_or_check_settings(folder / "rounds/answers", folder / "rounds/answers/rounds.json", {},
                                 "--run")


def test_rewritten_files_do_not_count_as_results(tmp_path: Path) -> None:
    folder, input_file = tmp_path / "probe", tmp_path / "probe/problems.jsonl"

    def record_settings(k: int) -> None:
        record_or_check_settings(folder, folder / "asked.json", {"k": k}, "--output", "answers", {input_file})

    record_settings(4)
    input_file.touch()
    record_settings(8)
    (folder / "answers.jsonl").touch()
    with pytest.raises(UserError, match="begun with k"):
        record_settings(4)


# Which checkpoint writes a round.


def write_checkpoint(path: Path, **state: Any) -> Path:
    with create_artifact(path, "checkpoint") as artifact:
        artifact.content = {"step": path.name}
        (artifact.path / "state.json").write_text(json.dumps({"name": path.name, **state}))
    return path


def test_round_policy_respects_max_staleness(tmp_path: Path) -> None:
    start, run = write_checkpoint(tmp_path / "start"), tmp_path / "run"
    rollout = RolloutConfig(steps_per_round=2)
    first = build_start_policy(start)
    assert find_round_policy(run, start, 1, rollout) == first  # there is no run yet
    assert find_round_policy(run, start, 2, rollout) is None
    assert find_round_policy(run, start, 2, RolloutConfig(steps_per_round=2, max_staleness=1)) == first

    policies = create_policies(run, start)
    expected = train_rounds(policies, range(1, 4))
    steps = {step: write_checkpoint(run / "checkpoints" / f"step-{step}", feed={"trained": f"{step}"})
             for step in (2, 3, 5)}
    policies = create_policies(run, start)
    train_rounds(policies, range(1, 3))
    steps[4] = write_checkpoint(run / "checkpoints/step-4", feed=policies.state())
    newest = Policy(steps[4], 4, expected[2].sha256)  # 5 lies inside of a round
    assert [find_round_policy(run, start, number, rollout) for number in (1, 3, 4)] == [newest, newest, None]


def create_policies(run: Path, start: Path, **settings: Any) -> RunPolicies:
    rollout = RolloutConfig(steps_per_round=2, max_staleness=1)
    return RunPolicies(run, build_start_policy(start), rollout, settings)


def train_rounds(policies: RunPolicies, rounds: range) -> list[Policy]:
    """Train rounds; return the policy before each round."""
    round_policies = []
    for number in rounds:
        round_policies.append(policies.at(2 * number - 2))
        policies.begin(2 * number - 2, f"documents of round {number}")
    return round_policies


def test_policy_digests_survive_resume_from_any_checkpoint(tmp_path: Path) -> None:
    start, run = write_checkpoint(tmp_path / "start"), tmp_path / "run"
    policies = create_policies(run, start, lr=1)
    expected = train_rounds(policies, range(1, 6))
    assert expected[0] == build_start_policy(start) and len({policy.sha256 for policy in expected}) == 5
    assert [(policy.path, policy.step) for policy in expected[1:]] == [(run, 2 * n) for n in range(1, 5)]
    assert train_rounds(create_policies(tmp_path / "elsewhere", start, lr=1),
                        range(1, 3))[1].sha256 == expected[1].sha256
    assert train_rounds(create_policies(run, start, lr=2), range(1, 3))[1].sha256 != expected[1].sha256
    # a kill, and the checkpoints after step 3, in the middle of round 2, and after step 4
    for step in (3, 4):
        killed = create_policies(run, start, lr=1)
        train_rounds(killed, range(1, 3))
        checkpoint = write_checkpoint(run / "checkpoints" / f"step-{step}",
                                      feed=json.loads(json.dumps(killed.state())))
        resumed = create_policies(run, start, lr=1)
        resumed.restore(json.loads((checkpoint / "state.json").read_text())["feed"])
        if step == 3:
            resumed.begin(3, "documents of round 2")
        assert train_rounds(resumed, range(3, 6)) == expected[2:]
        # which may have started the next round
        assert [resumed.is_own(p.step, p.sha256) for p in expected[3:]] == [True, True]
        assert not resumed.is_own(6, expected[1].sha256) and resumed.is_own(2, "pruned long ago")
    # other jobs identify the checkpoint in the same way
    assert find_round_policy(run, start, 3, RolloutConfig(steps_per_round=2)) == Policy(
        run / "checkpoints/step-4", 4, expected[2].sha256)


def test_rollback_gives_another_policy(tmp_path: Path) -> None:
    start = write_checkpoint(tmp_path / "start")
    policies = create_policies(tmp_path / "run", start)
    killed = train_rounds(policies, range(1, 3))
    state = policies.state()
    train_rounds(policies, range(3, 5))
    policies.restore(state)
    assert policies.at(8).sha256 not in {policy.sha256 for policy in killed}
    assert policies.at(8).sha256 != create_policies(tmp_path / "run", start).at(0).sha256
