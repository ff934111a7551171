"""What published runs of reinforcement learning set, over the recipe of the model that they go on from.

Of these runs some numbers were not published, and no default claims otherwise: MGPO's lambda and the clip of
VibeThinker-1.5B are left out, so that a run has to set them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from megatron_sov.recipes.sources import Source, Sources, ours, published

TYPHOON, VIBETHINKER, SOLAR = "arXiv 2601.18129", "arXiv 2511.06221", "arXiv 2601.07022"
Values = dict[str, tuple[Any, Source]]
"""Dotted setting -> its value, and where that comes from."""
TINY = {"rollout.rounds": 2, "rollout.prompts_per_round": 8, "rollout.samples_per_prompt": 4,
        "rollout.max_prompt_tokens": 64, "rollout.max_new_tokens": 64, "policy.overlong_buffer_tokens": 16,
        "policy.knowledge_batch_size": 4}
"""Sizes of a tiny run, in place of those that a stage sets."""


@dataclass(frozen=True)
class PolicyStage:
    """A run that learns from its own responses."""

    about: str
    """A line for lists."""
    base: str
    """Recipe that has the model."""
    values: Values

    def settings(self) -> list[str]:
        """Return what `--set` would be given over the base."""
        return [f"{key}={value if isinstance(value, str) else json.dumps(value)}"
                for key, (value, _) in self.values.items()]

    def tiny_settings(self) -> list[str]:
        """Return the same at a size for two CPU cores."""
        return [*self.settings(), *(f"{key}={size}" for key, size in TINY.items() if key in self.values)]

    def sources(self) -> Sources:
        """Return setting -> source of what is set over the base."""
        return {key: source for key, (_, source) in self.values.items()}


def _ink(run: str, prompt_tokens: int, response_tokens: int, batch: int, steps: int, epochs: int) -> Values:
    """Return a run of InK-GRPO, the single-turn one or the agentic one."""
    told = published(f"{TYPHOON}, InK-GRPO, {run} run and its released script")
    return {
        "objective.name": ("policy", told),
        "policy.method": ("ink_grpo", told),
        "policy.aggregation": ("token", told),
        "policy.clip_low": (0.2, told),
        "policy.clip_high": (0.24, told),
        "policy.kl": ("none", told),
        "policy.knowledge_coeff": (0.1, told),
        "policy.knowledge_share": (0.6, told),
        "policy.knowledge_batch_size": (batch, told),
        "policy.overlong_buffer_tokens": (1024, told),
        "policy.overlong_penalty": (1.0, told),
        "rollout.prompts_per_round": (32, told),
        "rollout.samples_per_prompt": (8, told),
        "rollout.steps_per_round": (steps, told),
        "rollout.temperature": (0.7, told),
        "rollout.max_prompt_tokens": (prompt_tokens, told),
        "rollout.max_new_tokens": (response_tokens, told),
        "rollout.rounds": (100, ours(f"{epochs} epochs are published; their rounds follow from the prompts")),
        "optim.lr": (1e-6, told),
        **_steady(1e-6),
    }


def _steady(lr: float) -> Values:
    """Return a rate that stays as it is."""
    why = ours("not published: a steady rate")
    return {"optim.schedule": ("constant", why), "optim.min_lr": (lr, why), "optim.warmup_steps": (0, why),
            "optim.weight_decay": (0.0, why)}


def _mgpo(stage: str, response_tokens: int, length: Source) -> Values:
    """Return a stage of VibeThinker's signal phase, of which lambda, clip, group, rate and batch were not
    published."""
    told = published(f"{VIBETHINKER}, signal phase: {stage}")
    return {
        "objective.name": ("policy", told),
        "policy.method": ("mgpo", told),
        "policy.kl": ("none", told),
        "policy.aggregation": ("sequence", told),
        "rollout.max_new_tokens": (response_tokens, length),
        "rollout.samples_per_prompt": (16, ours("not published: enough to tell shares of right answers")),
        "rollout.rounds": (100, ours("not published")),
        "optim.lr": (1e-6, ours("not published")),
        **_steady(1e-6),
    }


_GSPO = published("arXiv 2507.18071; Solar's own clip was not seen")
_PHASE_A = published(f"{SOLAR}, SnapPO, phase A")
STAGES: dict[str, PolicyStage] = {
    "typhoon-s-4b-legal": PolicyStage(
        "InK-GRPO on legal questions, with the laws as text beside: single turn, on-policy", "qwen3-4b-2507",
        _ink("single-turn", 2048, 4096, batch=64, steps=1, epochs=2)),
    "typhoon-s-4b-legal-agent": PolicyStage(
        "InK-GRPO with search_law and read_law, four updates a batch", "qwen3-4b-2507",
        _ink("agentic", 2048, 8192, batch=16, steps=4, epochs=1)),
    "vibethinker-1.5b-math-16k": PolicyStage(
        "MGPO on mathematics, responses up to 16K", "vibethinker-1.5b",
        _mgpo("mathematics at 16K", 16384, published(f"{VIBETHINKER}, training: 16K"))),
    "vibethinker-1.5b-math-32k": PolicyStage(
        "MGPO on mathematics, responses up to 32K", "vibethinker-1.5b",
        _mgpo("mathematics at 32K", 32768, published(f"{VIBETHINKER}, training: 32K"))),
    "vibethinker-1.5b-code": PolicyStage(
        "MGPO on code, behind mathematics", "vibethinker-1.5b",
        _mgpo("code", 32768, ours("not published: that of the stage before"))),
    "solar-open-102b-rl": PolicyStage(
        "SnapPO's phase A: GSPO over about 200,000 prompts, four steps a snapshot", "solar-open-102b-dpo", {
            "objective.name": ("policy", _PHASE_A),
            "policy.method": ("gspo", _PHASE_A),
            "policy.kl": ("none", _PHASE_A),
            "policy.clip_low": (3e-4, _GSPO),
            "policy.clip_high": (4e-4, _GSPO),
            "rollout.steps_per_round": (4, _PHASE_A),
            "rollout.samples_per_prompt": (16, published(f"{SOLAR}, SnapPO: 8 to 16")),
            "rollout.prompts_per_round": (512, ours("not published")),
            "rollout.rounds": (400, ours("about 200,000 prompts are published")),
            "optim.lr": (1e-6, ours("not published")),
            **_steady(1e-6)}),
}
"""Recipe -> what it sets."""
