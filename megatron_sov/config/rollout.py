"""Rounds of reinforcement learning: how many prompts are asked, how often, and by which policy."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_sov.config.model import STRICT


@dataclass(frozen=True)
class RolloutConfig:
    """What `rl` generates and trains in rounds; the settings of responses stand here as well, since a
    trainer computes at the temperature that they were drawn at."""

    __pydantic_config__ = STRICT
    rounds: int = 0
    """Rounds of generation, reward and training; 0: no reinforcement learning."""
    prompts_per_round: int = 64
    """Prompts (groups) that a round trains on."""
    samples_per_prompt: int = 8
    """Responses to each prompt: the size of a group."""
    steps_per_round: int = 1
    """Optimizer steps of a round, each with its own part of the round's groups.  1: on-policy; more:
    off-policy, by ratios against the policy that begins the round."""
    max_staleness: int = 0
    """Rounds of training that a policy may be behind the round that it writes for; 0: a round is written by
    the policy that the round before has trained."""
    temperature: float = 1.0
    """Of samples; the trainer divides its logits by the same."""
    max_new_tokens: int = 1024
    """Longest response; with tools, of all turns and results together."""
    max_prompt_tokens: int = 1024
    """Longest prompt; longer ones are refused by name."""
    piece_prompts: int = 8
    """Prompts of a piece of work, which one job claims and publishes as one part of the store."""
    deadline_s: float = 0.0
    """Seconds after which a piece's unfinished responses are kept as far as they are, to be continued by the
    next policy; 0: none."""
    lease_s: float = 600.0
    """Seconds without a sign of life after which a job's claim may be taken over."""
    budgets_tokens: tuple[int, ...] = ()
    """Lengths that the responses of a group are asked to have, each by an equal part of them, in order;
    empty: what a prompt's own field `target_tokens` says, if it has one."""
    budget_text: str = ""
    """Words with which a response begins that is asked to have a length, {tokens} in the place of the number;
    they count as part of its prompt. Empty: it is not told."""
    seed: int = 0
    """Of the prompts' order, and of samples."""

    def problems(self) -> list[str]:
        """Return one sentence for every rule that these settings break."""
        counts = {"rounds": 0, "prompts_per_round": 1, "samples_per_prompt": 1, "steps_per_round": 1,
                  "max_staleness": 0, "max_new_tokens": 1, "max_prompt_tokens": 1, "piece_prompts": 1,
                  "seed": 0}
        p = [f"rollout.{name} = {getattr(self, name)} must be at least {least}"
             for name, least in counts.items() if getattr(self, name) < least]
        if not 0 < self.temperature < math.inf:
            p.append(f"rollout.temperature = {self.temperature} must be a number greater than 0")
        if not 0 <= self.deadline_s < math.inf:
            p.append(f"rollout.deadline_s = {self.deadline_s} must be a number that is not negative")
        if not 1 <= self.lease_s < math.inf:
            p.append(f"rollout.lease_s = {self.lease_s} must be at least 1")
        if not p and self.prompts_per_round % self.steps_per_round:
            p.append(f"rollout.prompts_per_round = {self.prompts_per_round} must be a multiple of "
                     f"rollout.steps_per_round = {self.steps_per_round}")
        return p + self._budget_problems()

    def _budget_problems(self) -> list[str]:
        p, budgets = [], list(self.budgets_tokens)
        if any(not 1 <= budget <= self.max_new_tokens for budget in budgets):
            p.append(f"rollout.budgets_tokens = {budgets} must lie between 1 and rollout.max_new_tokens = "
                     f"{self.max_new_tokens}")
        if budgets and self.samples_per_prompt % len(budgets):
            p.append(f"rollout.samples_per_prompt = {self.samples_per_prompt} must be a multiple of the "
                     f"{len(budgets)} rollout.budgets_tokens")
        if self.budget_text and "{tokens}" not in self.budget_text:
            p.append(f"rollout.budget_text = {self.budget_text!r} must have {{tokens}} in the number's place")
        return p
