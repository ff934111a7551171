"""Options of commands that judge responses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from megatron_sov.base.settings import AtLeastOne, Flag, num_cores
from megatron_sov.judge.rewards.registry import BUILT_IN

REWARDS = f"{', '.join(BUILT_IN)}, or a class of your own, FILE.py:NAME"
RewardName = Annotated[str, Flag(value="NAME", help=REWARDS)]
RewardSet = Annotated[tuple[str, ...], Flag(value="key=value",
                                            help="A setting of the reward; may be repeated")]


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """How much is judged at a time."""

    workers: AtLeastOne = field(default_factory=num_cores)
    """Processes that judge (default: one for each core)."""
