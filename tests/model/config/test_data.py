"""Optimizer steps from token budgets, batch sizes and a batch-size ramp, against summing step by step and
by hand."""

import dataclasses

import pytest
from hypothesis import given, strategies as st

from megatron_sov import recipes
from megatron_sov.base.errors import UserError
from megatron_sov.model.config import (
    DataConfig, PhaseConfig, RolloutConfig, RunConfig, TrainConfig, apply_settings)
from megatron_sov.model.config.data import batch_size_at, find_ramp_changes, phase_steps
from megatron_sov.model.config.run import add_rounds, retain_policies

RAMP = TrainConfig(tokens=1, global_batch_size=12, ramp_from_batch_size=4, ramp_increment=4, ramp_steps=10)


def test_the_ramp_by_hand() -> None:
    """From 4 to 12 in increments of 4 within 10 steps: two equal intervals, and the full size from step 10
    on."""
    assert [batch_size_at(RAMP, PhaseConfig("a"), s) for s in range(12)] == [4] * 5 + [8] * 5 + [12] * 2
    assert find_ramp_changes(RAMP, PhaseConfig("a")) == [5, 10]
    assert [batch_size_at(RAMP, PhaseConfig("a", global_batch_size=6), s) for s in (0, 5, 10)] == [4, 6, 6]
    assert [batch_size_at(RAMP, PhaseConfig("a", global_batch_size=24), s) for s in (0, 5, 10)] == [4, 8, 24]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(1, 60))
def test_a_ramp_grows_by_its_increment_and_ends_on_time(first: int, more: int, increment: int,
                                                        steps: int) -> None:
    train = TrainConfig(global_batch_size=first + more, ramp_from_batch_size=first, ramp_increment=increment,
                        ramp_steps=steps)
    sizes = [batch_size_at(train, PhaseConfig("a"), s) for s in range(steps + 1)]
    assert sizes[0] == first and sizes[-1] == first + more
    assert sizes == sorted(sizes)
    assert all((size - first) % increment == 0 for size in sizes[:-1])
    changes = find_ramp_changes(train, PhaseConfig("a"))
    assert changes == [s for s in range(1, steps + 1) if sizes[s] > sizes[s - 1]]


budgets = st.lists(st.tuples(st.integers(500, 20_000), st.sampled_from([8, 16, 50]),
                             st.sampled_from([0, 3, 7])), min_size=1, max_size=4)


@given(budgets, st.sampled_from([0, 1, 2]), st.integers(1, 30))
def test_a_phase_lasts_until_its_tokens_are_spent(raw: list[tuple[int, int, int]], ramp: int,
                                                  ramp_steps: int) -> None:
    phases = tuple(PhaseConfig(str(i), tokens=t, seq_len=n, global_batch_size=b)
                   for i, (t, n, b) in enumerate(raw))
    train = TrainConfig(global_batch_size=5, ramp_from_batch_size=ramp, ramp_increment=1,
                        ramp_steps=ramp_steps)
    step = 0
    for phase, steps in zip(phases, phase_steps(DataConfig(phases=phases), train), strict=True):
        sizes = [batch_size_at(train, phase, s) * phase.seq_len for s in range(step, step + steps)]
        assert steps == 1 or abs(sum(sizes) - phase.tokens) <= max(sizes)
        step += steps


def test_shares_of_a_token_budget_by_hand() -> None:
    """30,000 tokens to 8 samples of 100 and 10,000 to 8 of 200: 37.5 and 6.25 steps."""
    phases = (PhaseConfig("a", share=3, seq_len=100), PhaseConfig("b", share=1, seq_len=200))
    assert phase_steps(DataConfig(phases=phases), TrainConfig(tokens=40_000, global_batch_size=8)) == [38, 6]


def test_given_steps_are_divided_by_the_budgets_of_phases() -> None:
    """By tokens: 10 steps of the first to 5 of the second, whose samples are twice as long; by share:
    as the shares say."""
    phases = (PhaseConfig("a", tokens=8000, seq_len=100), PhaseConfig("b", tokens=8000, seq_len=200))
    assert phase_steps(DataConfig(phases=phases), TrainConfig(steps=30, global_batch_size=8)) == [20, 10]
    shares = (PhaseConfig("a", share=10.8), PhaseConfig("b", share=5.3), PhaseConfig("c", share=3.9))
    assert phase_steps(DataConfig(phases=shares), TrainConfig(steps=200)) == [108, 53, 39]


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=6), st.integers(1, 500))
def test_every_step_belongs_to_one_phase(shares: list[float], steps: int) -> None:
    phases = tuple(PhaseConfig(str(i), share=share) for i, share in enumerate(shares))
    result = phase_steps(DataConfig(phases=phases), TrainConfig(steps=steps))
    assert sum(result) == steps and min(result) >= 0
    for share, count in zip(shares, result, strict=True):
        assert count == pytest.approx(steps * share / sum(shares), abs=1)


# Rounds as phases of a run.


def apply_data_settings(*settings: str) -> RunConfig:
    base = dataclasses.replace(recipes.get("tiny-solar-open"), rollout=RolloutConfig(
        rounds=7, steps_per_round=3, prompts_per_round=6, max_prompt_tokens=10, max_new_tokens=20))
    return apply_settings(base, ["data.phases.0.seq_len=32", *settings])


def test_each_round_is_a_phase() -> None:
    config = add_rounds(apply_data_settings())
    assert [phase.name for phase in config.data.phases] == [f"round-000{n}" for n in range(1, 8)]
    assert {phase.seq_len for phase in config.data.phases} == {32} and config.train.steps == 21
    assert config.phase_starts() == [0, 3, 6, 9, 12, 15, 18] and config.num_steps() == 21
    assert add_rounds(config) == config, "a config with rounds, such as a run's config.json, stays as it is"


def test_policies_stay_as_long_as_a_generator_may_ask_for_them() -> None:
    assert retain_policies(apply_data_settings("train.keep_checkpoints=1")).train.keep_checkpoints == 2
    stale = apply_data_settings("rollout.max_staleness=2", "train.checkpoint_every_steps=1",
                                "train.keep_checkpoints=1")
    assert retain_policies(stale).train.keep_checkpoints == 12  # 4 rounds of 3
    assert retain_policies(apply_data_settings("train.keep_checkpoints=0")).train.keep_checkpoints == 0  # all
    # without a separate generator, no other process asks for older policies
    assert add_rounds(stale).train.keep_checkpoints == 1


@pytest.mark.each(("settings", "message"), [
    ("data.phases.0.seq_len=29", "20 = 30 tokens; make"),
    ("data.phases.0.seq_len=64 rollout.max_new_tokens=4090 model.max_position_tokens=4096", "seq_len = 64:"),
    ("rollout.rounds=0", r"rollout.rounds = 0: nothing"),
    ("data.phases.0.lr=1e-3", r"0.001 and .*rounds use optim.lr")])
def test_settings_that_rounds_cannot_follow_are_refused(settings: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        add_rounds(apply_data_settings(*settings.split()))
