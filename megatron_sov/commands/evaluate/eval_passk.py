"""Options and checks for `megatron-sov eval passk`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from annotated_types import MinLen

from megatron_sov.base.documents.rows import check_rows
from megatron_sov.base.errors import Fix
from megatron_sov.base.plugins.registry import PluginRequest
from megatron_sov.base.settings import (
    AtLeastOne, DeclaredCommand, Finite, Flag, ProblemCode, SettingsProblem, parse_nested)
from megatron_sov.commands.score import JudgeOptions, RewardName, RewardSet
from megatron_sov.commands.shared_options import FigureOptions, OverwriteOptions, RedoOptions
from megatron_sov.infer.engine import ChosenEngine
from megatron_sov.infer.request import Batching, BatchSize, RankOptions, Sampling, Temperature
from megatron_sov.judge.rewards.registry import VersionedReward, build_versioned_reward, request_reward
from megatron_sov.runs.checkpoints import check_model
from megatron_sov.runs.folder import RunEvents

PROMPT = "prompt"
"""Field of an input row that holds the prompt."""


@dataclass(frozen=True)
class JudgedSampling(Sampling):
    """Sampling settings for judged responses."""

    max_new_tokens: AtLeastOne = 1024
    """Longest response."""
    temperature: Temperature = 1.0


@dataclass(frozen=True, kw_only=True)
class JudgedSamplingOptions(JudgeOptions):
    """Sampling and judging options, without --k."""

    reward: RewardName
    reward_set: RewardSet = ()
    right_from: Annotated[Finite, Flag(value="R")] = 1.0
    """Minimum reward for a correct response."""
    samples: AtLeastOne = 8
    """Responses per prompt."""
    sampling: JudgedSampling = field(default_factory=JudgedSampling)
    stop: tuple[Annotated[str, MinLen(1)], ...] = ()
    """Text that ends a response; may be repeated."""
    chat: bool = False
    """Format prompts with the chat template."""
    engine: ChosenEngine = None
    batch_size: BatchSize = Batching.batch_size

    def problems(self) -> list[SettingsProblem]:
        if self.samples == 1 or self.sampling.temperature:
            return []
        return [SettingsProblem(ProblemCode.RULE, "samples", "are equal responses at --temperature 0",
                                self.samples, "add --temperature 1, or take one sample")]


@dataclass(frozen=True, kw_only=True)
class EvalPasskOptions(JudgedSamplingOptions, FigureOptions, RankOptions, OverwriteOptions, RedoOptions):
    """Sample responses to prompts, score them with a reward, and estimate pass@k and maj@k."""

    target: Annotated[Path, Flag("TARGET")]
    """Checkpoint, run (newest checkpoint) or Hugging Face folder that responds to --input."""
    input: Annotated[Path, Flag(value="PROMPTS.jsonl")]
    """JSONL file with `prompt` (text, or messages with --chat) and the fields that the reward needs."""
    k: Annotated[tuple[AtLeastOne, ...], Flag(value="K", many=True)] = ()
    """Values of k (default 1, 2, 4, ... up to the smallest number of scored samples per prompt)."""
    output: Annotated[Path, Flag(value="DIR")]
    """Output folder: figures, and responses with rewards."""

    def problems(self) -> list[SettingsProblem]:
        p = super().problems()
        if max(self.k, default=1) > self.samples:
            p.append(SettingsProblem(ProblemCode.RULE, "k", f"is more than --samples {self.samples}",
                                     max(self.k), fix=Fix(options=("--samples", str(max(self.k))))))
        return p


@dataclass(frozen=True)
class PasskRequest:
    """Checked input for `eval_passk_run.estimate_passk`."""

    options: EvalPasskOptions
    events: RunEvents
    order: PluginRequest
    reward: VersionedReward


def check_passk(options: EvalPasskOptions) -> PasskRequest:
    """Check target, reward and prompts without loading the model."""
    events = RunEvents(options.run)
    check_model(options.target, options.settings, options.nproc)
    reward_order = request_reward(options.reward, parse_nested(options.reward_set, "--reward-set"))
    reward = build_versioned_reward(reward_order)
    check_rows(options.input, field=PROMPT)
    return PasskRequest(options, events, reward_order, reward)


PASSK = DeclaredCommand(EvalPasskOptions, check_passk,
                        "megatron_sov.commands.evaluate.eval_passk_run:estimate_passk")
