"""Rounds as phases of a run."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_sov import recipes
from megatron_sov.config import RolloutConfig, RunConfig, apply_settings
from megatron_sov.config.rounds import with_rounds
from megatron_sov.errors import UserError


def asked(*settings: str) -> RunConfig:
    base = dataclasses.replace(recipes.get("tiny-solar-open"), rollout=RolloutConfig(
        rounds=7, steps_per_round=3, prompts_per_round=6, max_prompt_tokens=10, max_new_tokens=20))
    return apply_settings(base, ["data.phases.0.seq_len=32", *settings])


def test_each_round_is_a_phase_of_its_steps() -> None:
    config = with_rounds(asked())
    assert [phase.name for phase in config.data.phases] == [f"round-000{n}" for n in range(1, 8)]
    assert {phase.seq_len for phase in config.data.phases} == {32} and config.train.steps == 21
    assert config.phase_starts() == [0, 3, 6, 9, 12, 15, 18] and config.num_steps() == 21
    assert with_rounds(config) == config, "a run's own config.json is taken again"


def test_policies_stay_as_long_as_a_generator_may_ask_for_them() -> None:
    assert with_rounds(asked("train.keep_checkpoints=1")).train.keep_checkpoints == 2
    stale = asked("rollout.max_staleness=2", "train.checkpoint_every_steps=1", "train.keep_checkpoints=1")
    assert with_rounds(stale).train.keep_checkpoints == 12  # 4 rounds of 3
    assert with_rounds(asked("train.keep_checkpoints=0")).train.keep_checkpoints == 0  # all


def test_rows_that_do_not_hold_a_response_are_refused() -> None:
    with pytest.raises(UserError, match=r"seq_len = 29: a row holds whole .* 10 \+ .* 20 = 30; make rows"):
        with_rounds(asked("data.phases.0.seq_len=29"))
    with pytest.raises(UserError, match=r"rollout.rounds = 0: there is nothing to train"):
        with_rounds(asked("rollout.rounds=0"))


def test_a_rate_of_the_phase_is_not_passed_over_in_silence() -> None:
    with pytest.raises(UserError, match=r"data.phases.0 has lr = 0.001 and .*follow optim.lr"):
        with_rounds(asked("data.phases.0.lr=1e-3"))
