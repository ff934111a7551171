"""Rounds of reinforcement learning as phases of a curriculum."""

from __future__ import annotations

import dataclasses

from megatron_sov.base.errors import UserError
from megatron_sov.model.config.data import PhaseConfig
from megatron_sov.model.config.run import RunConfig


def with_rounds(config: RunConfig) -> RunConfig:
    """Return the settings of a run whose phases are its rounds; of settings that have them already, the same.

    Steps follow from the rounds, a row's length from the (first) phase that was asked for, and so many
    checkpoints stay that a generator finds the policy of each round that it may still write.

    Raises:
        UserError: no rounds are asked for, or no row, or a row does not hold the longest response; or the
            phase has a learning rate of its own.
    """
    rollout, train = config.rollout, config.train
    if rollout.rounds < 1:
        raise UserError(f"rollout.rounds = {rollout.rounds}: there is nothing to train; set it to at least 1")
    phase = config.data.phases[0]
    if phase.lr or phase.rewarm_steps:
        raise UserError(f"data.phases.0 has lr = {phase.lr:g} and rewarm_steps = {phase.rewarm_steps}: "
                        "rounds follow optim.lr and optim.schedule; set these, and leave the phase alone")
    seq_len = phase.seq_len
    longest = rollout.max_prompt_tokens + rollout.max_new_tokens
    if longest > seq_len:
        raise UserError(f"data.phases.0.seq_len = {seq_len}: a row holds whole responses, the longest has "
                        f"rollout.max_prompt_tokens {rollout.max_prompt_tokens} + "
                        f"rollout.max_new_tokens {rollout.max_new_tokens} = {longest}; make rows longer, or "
                        "responses shorter")
    phases = tuple(PhaseConfig(f"round-{number:04d}", seq_len=seq_len)
                   for number in range(1, rollout.rounds + 1))
    # those inside of a round, and the one at its end
    of_a_round = 1 + (rollout.steps_per_round - 1) // train.checkpoint_every_steps
    needed = (rollout.max_staleness + 2) * of_a_round
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, phases=phases),
        train=dataclasses.replace(
            train, steps=rollout.rounds * rollout.steps_per_round, tokens=0,
            keep_checkpoints=max(train.keep_checkpoints, needed) if train.keep_checkpoints else 0))
