"""Rounds that go on are asked for what they were begun with."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sov.base.artifacts import manifest_sha256, new_artifact
from megatron_sov.base.errors import UserError
from megatron_sov.model.config import RolloutConfig
from megatron_sov.runs.rounds import Policy, enter_rounds, policy_of_round


def test_what_is_done_holds_rounds_to_what_they_were_begun_with(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    note = folder / "rounds" / "rounds.json"

    def enter(samples: int) -> None:
        # an option that repeats is a tuple, which the note has as a list
        enter_rounds(folder, note, {"samples": samples, "from": "base", "reward_set": ("a=1",)}, "--run")

    enter(4)
    (folder / "rounds/.answers.work").mkdir()
    (folder / "rounds/.answers.work/0.bin").touch()
    enter(8)  # a mended command, before anything is done
    (folder / "rounds/answers").touch()
    enter(8)
    with pytest.raises(UserError, match=r"run: its rounds were begun with samples = 8, now it is 4; resume "
                       r"with the same .--samples 8., or"):
        enter(4)
    note.write_text("[1")
    with pytest.raises(UserError, match=r"rounds.json: is damaged .* or choose another --run"):
        enter(8)
    note.unlink()
    with pytest.raises(UserError, match="run: is not empty and holds no rounds; choose another --run"):
        enter(8)
    with pytest.raises(UserError, match=r"--run .*answers: is a file; choose another one"):
        enter_rounds(folder / "rounds/answers", folder / "rounds/answers/rounds.json", {}, "--run")


def test_files_that_each_command_makes_are_nothing_that_was_done(tmp_path: Path) -> None:
    folder, made = tmp_path / "probe", tmp_path / "probe/problems.jsonl"

    def enter(k: int) -> None:
        enter_rounds(folder, folder / "asked.json", {"k": k}, "--output", "answers", {made})

    enter(4)
    made.touch()
    enter(8)
    (folder / "answers.jsonl").touch()
    with pytest.raises(UserError, match="probe: its answers were begun with k = 8, now it is 4"):
        enter(4)


# Which checkpoint writes a round.


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
