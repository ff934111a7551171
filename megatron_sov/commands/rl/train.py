"""Options and checks for `megatron-sov rl train`; `rl run` shares them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from megatron_sov.base.settings import DeclaredCommand, Flag, NotNegative, ProblemCode, SettingsProblem
from megatron_sov.commands.rl.inputs.options import VALIDATION_OPTION, PromptOptions
from megatron_sov.commands.rl.inputs.teachers import ScoringTeacherOptions
from megatron_sov.commands.rl.store.reward import StoreRewardOptions
from megatron_sov.commands.train.setup.stage_options import TunedOptions


@dataclass(frozen=True, kw_only=True)
class RoundsOptions(TunedOptions, PromptOptions, StoreRewardOptions, ScoringTeacherOptions):
    """Options for commands that train on rounds of rollouts."""

    stage: ClassVar[str] = "rl"
    groups: ClassVar[tuple[str, ...]] = ("policy", "rollout", "distillation", "preference")
    validation: Annotated[Path | None, Flag(VALIDATION_OPTION, "FILE|DIR")] = None
    """Held-out prompts, in the same form as --prompts. `rl run` evaluates its policies on them every
    rollout.validation_every_rounds."""

    def deciding_options(self) -> dict[str, Any]:
        return {"validation": self.validation}


@dataclass(frozen=True, kw_only=True)
class RlTrainOptions(RoundsOptions):
    """Train on rounds that separate jobs generate and judge."""

    wait: Annotated[NotNegative, Flag(value="SECONDS")] = 0.0
    """Wait at most this long for the next judged round before the run exits with 75 (default: not at all)."""

    def problems(self) -> list[SettingsProblem]:
        if self.validation is None:
            return []
        return [SettingsProblem(
            ProblemCode.RULE, "validation", "needs an engine to generate responses, and `rl train` has none",
            self.validation, "use `rl run`, or measure its checkpoints by `megatron-sov eval passk`")]


TRAIN = DeclaredCommand(RlTrainOptions, "megatron_sov.commands.rl.inputs.checks:check_train",
                        "megatron_sov.commands.rl.train_run:train_rounds")
