"""Rounds that go on are asked for what they were begun with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.artifacts import new_artifact
from megatron_sov.base.errors import UserError
from megatron_sov.model.config import RolloutConfig
from megatron_sov.runs.rounds import (
    Policy, RunPolicies, build_start_policy, find_round_policy, record_or_check_settings)


def test_what_is_done_holds_rounds_to_what_they_were_begun_with(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    note = folder / "rounds" / "rounds.json"

    def enter(samples: int) -> None:
        # an option that repeats is a tuple, which the note has as a list
        record_or_check_settings(folder, note, {"samples": samples, "from": "base", "reward_set": ("a=1",)}, "--run")

    enter(4)
    (folder / "rounds/.answers.work").mkdir()
    (folder / "rounds/.answers.work/0.bin").touch()
    enter(8)  # a mended command, before anything is done
    (folder / "rounds/answers").touch()
    enter(8)
    with pytest.raises(UserError, match="samples = 8, now"):
        enter(4)
    note.write_text("[1")
    with pytest.raises(UserError, match="choose another --run"):
        enter(8)
    note.unlink()
    with pytest.raises(UserError, match="rounds; choose another --run"):
        enter(8)
    with pytest.raises(UserError, match=r"--run .*answers:"):
        record_or_check_settings(folder / "rounds/answers", folder / "rounds/answers/rounds.json", {}, "--run")


def test_files_that_each_command_makes_are_nothing_that_was_done(tmp_path: Path) -> None:
    folder, made = tmp_path / "probe", tmp_path / "probe/problems.jsonl"

    def enter(k: int) -> None:
        record_or_check_settings(folder, folder / "asked.json", {"k": k}, "--output", "answers", {made})

    enter(4)
    made.touch()
    enter(8)
    (folder / "answers.jsonl").touch()
    with pytest.raises(UserError, match="begun with k"):
        enter(4)


# Which checkpoint writes a round.


def checkpoint(path: Path, **state: Any) -> Path:
    with new_artifact(path, "checkpoint") as artifact:
        artifact.content = {"step": path.name}
        (artifact.path / "state.json").write_text(json.dumps({"name": path.name, **state}))
    return path


def test_the_newest_end_of_a_round_writes_it_if_it_is_not_too_old(tmp_path: Path) -> None:
    start, run = checkpoint(tmp_path / "start"), tmp_path / "run"
    rollout = RolloutConfig(steps_per_round=2)
    first = build_start_policy(start)
    assert find_round_policy(run, start, 1, rollout) == first  # there is no run yet
    assert find_round_policy(run, start, 2, rollout) is None
    assert find_round_policy(run, start, 2, RolloutConfig(steps_per_round=2, max_staleness=1)) == first

    policies = run_of(run, start)
    expected = trained(policies, range(1, 4))
    steps = {step: checkpoint(run / "checkpoints" / f"step-{step}", feed={"trained": f"{step}"})
             for step in (2, 3, 5)}
    policies = run_of(run, start)
    trained(policies, range(1, 3))
    steps[4] = checkpoint(run / "checkpoints/step-4", feed=policies.state())
    newest = Policy(steps[4], 4, expected[2].sha256)  # 5 lies inside of a round
    assert [find_round_policy(run, start, number, rollout) for number in (1, 3, 4)] == [newest, newest, None]


def run_of(run: Path, start: Path, **settings: Any) -> RunPolicies:
    rollout = RolloutConfig(steps_per_round=2, max_staleness=1)
    return RunPolicies(run, build_start_policy(start), rollout, settings)


def trained(policies: RunPolicies, rounds: range) -> list[Policy]:
    """Have a run train rounds; returns the policies that begin them."""
    found = []
    for number in rounds:
        found.append(policies.at(2 * number - 2))
        policies.begin(2 * number - 2, f"documents of round {number}")
    return found


def test_a_run_is_known_by_what_it_was_trained_on_and_goes_on_as_the_same_from_any_checkpoint(
        tmp_path: Path) -> None:
    start, run = checkpoint(tmp_path / "start"), tmp_path / "run"
    whole = run_of(run, start, lr=1)
    expected = trained(whole, range(1, 6))
    assert expected[0] == build_start_policy(start) and len({policy.sha256 for policy in expected}) == 5
    assert [(policy.path, policy.step) for policy in expected[1:]] == [(run, 2 * n) for n in range(1, 5)]
    assert trained(run_of(tmp_path / "elsewhere", start, lr=1), range(1, 3))[1].sha256 == expected[1].sha256
    assert trained(run_of(run, start, lr=2), range(1, 3))[1].sha256 != expected[1].sha256
    # a kill, and the checkpoints behind step 3, in the middle of round 2, and behind step 4
    for step in (3, 4):
        before = run_of(run, start, lr=1)
        trained(before, range(1, 3))
        kept = checkpoint(run / "checkpoints" / f"step-{step}", feed=json.loads(json.dumps(before.state())))
        again = run_of(run, start, lr=1)
        again.restore(json.loads((kept / "state.json").read_text())["feed"])
        if step == 3:
            again.begin(3, "documents of round 2")
        assert trained(again, range(3, 6)) == expected[2:]
        # who may have begun what is published next
        assert [again.is_own(p.step, p.sha256) for p in expected[3:]] == [True, True]
        assert not again.is_own(6, expected[1].sha256) and again.is_own(2, "pruned long ago")
    # jobs beside it know the checkpoint by the same
    assert find_round_policy(run, start, 3, RolloutConfig(steps_per_round=2)) == Policy(
        run / "checkpoints/step-4", 4, expected[2].sha256)


def test_weights_that_were_taken_back_are_another_policy(tmp_path: Path) -> None:
    start = checkpoint(tmp_path / "start")
    policies = run_of(tmp_path / "run", start)
    before = trained(policies, range(1, 3))
    kept = policies.state()
    trained(policies, range(3, 5))
    policies.restore(kept)
    assert policies.at(8).sha256 not in {policy.sha256 for policy in before}
    assert policies.at(8).sha256 != run_of(tmp_path / "run", start).at(0).sha256
