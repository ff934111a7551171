"""Rounds of reinforcement learning: how many prompts are asked, how often, and by which policy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Lt

from megatron_sov.base.settings import (
    AboveZero, AtLeastOne, NotNegative, NotNegativeInt, SettingsProblem, find_broken)


@dataclass(frozen=True)
class RolloutConfig:
    """What `rl` generates and trains in rounds; the settings of responses stand here as well, since a
    trainer computes at the temperature that they were drawn at."""

    rounds: NotNegativeInt = 0
    """Rounds of generation, reward and training; 0: no reinforcement learning."""
    prompts_per_round: AtLeastOne = 64
    """Prompts (groups) that a round trains on."""
    samples_per_prompt: AtLeastOne = 8
    """Responses to each prompt: the size of a group."""
    steps_per_round: AtLeastOne = 1
    """Optimizer steps of a round, each with its own part of the round's groups.  1: on-policy; more:
    off-policy, by ratios against the policy that begins the round."""
    max_staleness: NotNegativeInt = 0
    """Rounds of training that a policy may be behind the round that it writes for; 0: a round is written by
    the policy that the round before has trained."""
    temperature: AboveZero = 1.0
    """Of samples; the trainer divides its logits by the same."""
    max_new_tokens: AtLeastOne = 1024
    """Longest response; with tools, of all turns and results together."""
    max_prompt_tokens: AtLeastOne = 1024
    """Longest prompt; longer ones are refused by name."""
    piece_prompts: AtLeastOne = 8
    """Prompts of a piece of work, which one job claims and publishes as one part of the store."""
    deadline_s: NotNegative = 0.0
    """Seconds after which a piece's unfinished responses are kept as far as they are, to be continued by the
    next policy; 0: none."""
    lease_s: Annotated[float, Ge(1), Lt(math.inf)] = 600.0
    """Seconds without a sign of life after which a job's claim may be taken over."""
    budgets_tokens: tuple[AtLeastOne, ...] = ()
    """Lengths that the responses of a group are asked to have, each by an equal part of them, in order;
    empty: what a prompt's own field `target_tokens` says, if it has one."""
    budget_text: str = ""
    """Words with which a response begins that is asked to have a length, {tokens} in the place of the number;
    they count as part of its prompt. Empty: it is not told."""
    seed: NotNegativeInt = 0
    """Of the prompts' order, and of samples."""

    def problems(self) -> list[SettingsProblem]:
        """Return every rule that these settings break."""
        budgets = self.budgets_tokens
        return find_broken(
            self, "rollout",
            (self.prompts_per_round % self.steps_per_round == 0, "prompts_per_round",
             f"must be a multiple of rollout.steps_per_round = {self.steps_per_round}"),
            (max(budgets, default=0) <= self.max_new_tokens, "budgets_tokens",
             f"must be at most rollout.max_new_tokens = {self.max_new_tokens}"),
            (self.samples_per_prompt % max(1, len(budgets)) == 0, "samples_per_prompt",
             f"must be a multiple of the {len(budgets)} rollout.budgets_tokens"),
            (not self.budget_text or "{tokens}" in self.budget_text, "budget_text",
             "must have {tokens} in the number's place"))
