"""Options and checks of `megatron-sov eval passk`."""

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
from megatron_sov.commands.shared_options import OverwriteOptions, RecordOptions, RedoOptions
from megatron_sov.infer.engine import ChosenEngine
from megatron_sov.infer.request import Batching, BatchSize, RankOptions, ResponseSampling, Temperature
from megatron_sov.judge.rewards.registry import MadeReward, make, order
from megatron_sov.runs.checkpoints import check_model_path
from megatron_sov.runs.folder import RunEvents

PROMPT = "prompt"
"""Field of a row."""


@dataclass(frozen=True)
class JudgedSampling(ResponseSampling):
    """Sampling of judged responses."""

    max_new_tokens: AtLeastOne = 1024
    """Longest response."""
    temperature: Temperature = 1.0


@dataclass(frozen=True, kw_only=True)
class JudgedSamplingOptions(JudgeOptions):
    """Sampling and judging of responses, without --k."""

    reward: RewardName
    reward_set: RewardSet = ()
    right_from: Annotated[Finite, Flag(value="R")] = 1.0
    """Least reward of a right response."""
    samples: AtLeastOne = 8
    """Responses to each prompt."""
    sampling: JudgedSampling = field(default_factory=JudgedSampling)
    stop: tuple[Annotated[str, MinLen(1)], ...] = ()
    """Text that ends a response; repeat it."""
    chat: bool = False
    """Frame each prompt by the chat template."""
    engine: ChosenEngine = None
    batch_size: BatchSize = Batching.batch_size

    def problems(self) -> list[SettingsProblem]:
        return [] if self.samples == 1 or self.sampling.temperature else [
            SettingsProblem(ProblemCode.RULE, "samples",
                            "are the same response again and again at --temperature 0",
                            self.samples, "raise the temperature, or take one sample")]


@dataclass(frozen=True, kw_only=True)
class EvalPasskOptions(JudgedSamplingOptions, RecordOptions, RankOptions, OverwriteOptions,
                       RedoOptions):
    """Sample responses to prompts, have a reward judge them, estimate pass@k and maj@k."""

    target: Annotated[Path, Flag("TARGET")]
    """Checkpoint, run (its newest one) or Hugging Face folder that answers --input."""
    input: Annotated[Path, Flag(value="PROMPTS.jsonl")]
    """A JSON object per line, with `prompt` (text, or messages with --chat) and what the reward needs."""
    k: Annotated[tuple[AtLeastOne, ...], Flag(value="K", many=True)] = ()
    """Sizes of the draws (default 1, 2, 4, ... up to the fewest scored samples of a prompt)."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder to make: the figures, and every response with its reward."""

    def problems(self) -> list[SettingsProblem]:
        p = super().problems()
        if max(self.k, default=1) > self.samples:
            p.append(SettingsProblem(ProblemCode.RULE, "k", f"is more than --samples {self.samples}",
                                     max(self.k), fix=Fix(options=("--samples", str(max(self.k))))))
        return p


@dataclass(frozen=True)
class PasskRequest:
    """Checked input of `eval_passk_run.estimate_passk`."""

    options: EvalPasskOptions
    events: RunEvents
    order: PluginRequest
    reward: MadeReward


def check_passk(options: EvalPasskOptions) -> PasskRequest:
    events = RunEvents(options.run)
    check_model_path(options.target)
    reward_order = order(options.reward, parse_nested(options.reward_set, "--reward-set"))
    reward = make(reward_order)
    check_rows(options.input, field=PROMPT)
    return PasskRequest(options, events, reward_order, reward)


PASSK = DeclaredCommand(EvalPasskOptions, check_passk,
                        "megatron_sov.commands.evaluate.eval_passk_run:estimate_passk")
