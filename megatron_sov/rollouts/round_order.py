"""The prompts of a round, in order, split into pieces.

Order and pieces depend on `RolloutConfig` and the round alone, so every job of a run agrees on them.
"""

from dataclasses import dataclass

import numpy as np

from megatron_sov.base.errors import UserError
from megatron_sov.model.config.post_training import RolloutConfig
from megatron_sov.rollouts.prompts import PromptList
from megatron_sov.rollouts.rows import format_part_name

_FURTHER = 1
"""Entropy for the order of further prompts, in addition to seed and round."""


@dataclass(frozen=True)
class PromptPiece:
    """Prompts that a job claims together and publishes in a single part."""

    round: int
    """From 1."""
    number: int
    """Index within the round, from 0."""
    prompts: PromptList

    def part(self, attempt: int = 0) -> str:
        return format_part_name(self.round, self.number, attempt)


def select_round_prompts(prompts: PromptList, rollout: RolloutConfig, number: int) -> PromptList:
    """Return the prompts for a round, in an order that depends on `rollout.seed` and the round's number
    alone.

    Each epoch is a permutation. A round may continue in the next epoch; its prompts come later there, so that
    no round contains a prompt twice.
    """
    count, per_round = len(prompts), rollout.prompts_per_round
    if per_round > count:
        raise UserError(f"rollout.prompts_per_round = {per_round}: there are {count} prompts, and a round "
                        "has each prompt at most once; lower it, or add prompts")
    # Position of the round's first prompt in the concatenated epochs.
    epoch, place = divmod((number - 1) * per_round, count)
    order = _epoch_order(rollout.seed, epoch, count, per_round)[place:place + per_round]
    # The round ends in the next epoch, which avoids the prompts already in the round.
    if len(order) < per_round:
        following = _epoch_order(rollout.seed, epoch + 1, count, per_round)
        order = np.append(order, following[:per_round - len(order)])
    return prompts.select(order)


def split_into_pieces(prompts: PromptList, number: int, piece_prompts: int, begin: int = 0
                      ) -> list[PromptPiece]:
    """Split a round's prompts into pieces, numbered from `begin`."""
    return [PromptPiece(number, i, prompts[first:first + piece_prompts])
            for i, first in enumerate(range(0, len(prompts), piece_prompts), begin)]


def plan_round_pieces(prompts: PromptList, rollout: RolloutConfig, number: int,
                      more: int = 0) -> list[PromptPiece]:
    """Return the pieces for round `number` (from 1): its prompts, and `more` pieces of further prompts.

    Further prompts replace groups that do not learn; fewer pieces are returned at the end of the file. Their
    order depends on seed and round alone, so that the runs of a store agree.
    """
    round_list = select_round_prompts(prompts, rollout, number)
    planned = split_into_pieces(round_list, number, rollout.piece_prompts)
    if more:
        order = _shuffle_indices(len(prompts), rollout.seed, number, _FURTHER)
        further = order[~np.isin(order, prompts.find_indices(round_list.ids))][:more * rollout.piece_prompts]
        planned += split_into_pieces(prompts.select(further), number, rollout.piece_prompts, len(planned))
    return planned


def _epoch_order(seed: int, epoch: int, count: int, per_round: int) -> np.ndarray:
    """Return [count] int64: the order of prompts in an epoch.

    If a round began in the previous epoch, its prompts from there come after the end of that round. The end
    of that epoch depends on its own predecessor only if an epoch has fewer than two rounds.
    """
    # Go back to an epoch that begins with a round, or whose end does not depend on earlier epochs.
    first = epoch
    while first * count % per_round and (count < 2 * per_round or first == epoch):
        first -= 1
    order = _shuffle_indices(count, seed, first)
    for number in range(first + 1, epoch + 1):
        # Prompts from the previous epoch in the round that continues in this epoch.
        carried, previous = number * count % per_round, order
        order = _shuffle_indices(count, seed, number)
        if carried:
            ahead = ~np.isin(order, previous[-carried:])
            # The round takes further prompts up to `per_round`; the rest keeps the shuffled order.
            ahead &= np.cumsum(ahead) <= per_round - carried
            order = np.concatenate([order[ahead], order[~ahead]])
    return order


def _shuffle_indices(count: int, *entropy: int) -> np.ndarray:
    # Seed and epoch form an entropy sequence, so that nearby seeds have unrelated orders.
    return np.random.default_rng(entropy).permutation(count)
