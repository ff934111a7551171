"""Options for `megatron-sov rl reward`."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Lt

from megatron_sov.base.settings import DeclaredCommand, Flag, NotNegative
from megatron_sov.commands.score import REWARDS, JudgeOptions, RewardSet
from megatron_sov.model.config.post_training import RolloutConfig
from megatron_sov.post.rl.reward import ENVIRONMENT, NO_REWARD, resolve_reward_version
from megatron_sov.rollouts.rows import parse_round_range


@dataclass(frozen=True, kw_only=True)
class StoreRewardOptions:
    """A rollout store, and the reward for its responses."""

    store: Annotated[Path, Flag(value="DIR", writes=True)]
    """Rollout store with responses from `rl generate`, and their rewards."""
    reward: Annotated[str, Flag(value="NAME", help=f"{REWARDS}; {ENVIRONMENT}: the environment's rewards for "
                                f"its episodes; or {NO_REWARD}: 0, for training with a teacher only")]
    reward_set: RewardSet = ()


@dataclass(frozen=True, kw_only=True)
class RewardOptions(StoreRewardOptions, JudgeOptions):
    """Judge the responses in a store with a reward."""

    rounds: Annotated[str | None, Flag(value="A-B")] = None
    """Rounds to judge (default: all rounds in the store)."""
    wait: Annotated[NotNegative, Flag(value="SECONDS")] = 0.0
    """Wait at most this long for more responses (default: not at all). Exits with 75 if generation is
    incomplete by then, and with 0 after all --rounds are judged."""
    lease: Annotated[float, Ge(1), Lt(math.inf), Flag(value="SECONDS")] = RolloutConfig.lease_s
    """Take over a claim after its job has been silent for this long."""


@dataclass(frozen=True)
class RewardRequest:
    """Checked input for `reward_run.judge_store`."""

    options: RewardOptions
    rounds: range | None
    """None: every round in the store."""
    version: str


def check_reward(options: RewardOptions) -> RewardRequest:
    rounds = None if options.rounds is None else parse_round_range(options.rounds)
    # A wrong reward is refused before the command waits for the store.
    return RewardRequest(options, rounds, resolve_reward_version(options.reward, options.reward_set))


REWARD = DeclaredCommand(RewardOptions, check_reward, "megatron_sov.commands.rl.store.reward_run:judge_store")
