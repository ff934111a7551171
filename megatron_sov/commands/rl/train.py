"""Options and checks for `megatron-sov rl train`; `rl run` shares them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from megatron_sov.base.settings import DeclaredCommand, Flag, NotNegative, ProblemCode, SettingsProblem

<<<<<<< HEAD
from megatron_sov.commands.rl.inputs.prompts import VALIDATION_OPTION, PromptOptions
from megatron_sov.commands.rl.inputs.teachers import ScoringTeacherOptions
from megatron_sov.commands.rl.store.reward import StoreRewardOptions
from megatron_sov.commands.train.setup.stage_options import TunedOptions

=======
from megatron_sov.commands.rl.inputs.prompts import (
    VALIDATION_OPTION, PromptOptions, check_tokenizer, read_validation_prompts)
from megatron_sov.commands.rl.inputs.teachers import ScoringTeacherOptions, check_teachers
from megatron_sov.commands.rl.store.reward import StoreRewardOptions
from megatron_sov.commands.train.setup.stage_options import TunedOptions
from megatron_sov.model.config import RunConfig
from megatron_sov.model.config.run import add_rounds, retain_policies
from megatron_sov.post.rl.reward import check_reward_fields, resolve_reward_version
from megatron_sov.rollouts.prompts import PromptList, select_round_prompts
from megatron_sov.runs.checkpoints import find_tokenizer_folder

>>>>>>> main

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, kw_only=True)
class RoundsOptions(TunedOptions, PromptOptions, StoreRewardOptions, ScoringTeacherOptions):
    """Options for commands that train on rounds of rollouts."""

    stage: ClassVar[str] = "rl"
    groups: ClassVar[tuple[str, ...]] = ("policy", "rollout", "distillation", "preference")
    validation: Annotated[Path | None, Flag(VALIDATION_OPTION, "FILE|DIR")] = None
    """Held-out prompts in the form of --prompts. `rl run` evaluates its policies on them every
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


<<<<<<< HEAD
TRAIN = DeclaredCommand(RlTrainOptions, "megatron_sov.commands.rl.inputs.checks:check_train",
                        "megatron_sov.commands.rl.train_run:train_rounds")
=======
@dataclass(frozen=True)
class RoundsRequest:
    """Checked input for `train_run.train_rounds`."""

    options: RoundsOptions
    stage: TrainingRequest
    start: Path
    """Checkpoint of --from."""
    tokenizer: Path
    """Tokenizer folder of `start`."""
    prompts: PromptList
    """Every prompt in --prompts."""
    reward_version: str
    validation_prompts: PromptList | None
    """Prompts in --validation that training does not use; None: no validation."""
    wait_s: float = 0.0
    """Time limit per round for generation and judging."""


def check_train(options: RlTrainOptions) -> RoundsRequest | int:
    """Check the options. For a complete run, print the summary instead."""
    if report_completed_run(options):
        return ExitCode.OK
    return replace(check_rounds(options, complete_train_settings), wait_s=options.wait)


TRAIN = DeclaredCommand(RlTrainOptions, check_train, "megatron_sov.commands.rl.train_run:train_rounds")


def report_completed_run(options: RoundsOptions) -> bool:
    """If the run is complete, print the summary and return True; needs no inputs."""
    # numpy and torch; the help of the command does without
    from megatron_sov.commands.train.setup.training import find_completed_run

    completed = find_completed_run(options)
    if completed is None:
        return False
    from megatron_sov.commands.train.training_run import run_training  # torch

    run_training(completed)
    return True


def complete_train_settings(config: RunConfig) -> RunConfig:
    """Add the settings that follow from the rounds, and retain the checkpoints that `rl generate` loads."""
    return retain_policies(add_rounds(config))


def check_rounds(options: RoundsOptions, complete: Callable[[RunConfig], RunConfig] = add_rounds, *,
                 is_asked: bool = False) -> RoundsRequest:
    """Check settings, prompts, reward, teachers and gate.

    Args:
        options: options of the command.
        complete: adds the settings that follow from others.
        is_asked: whether each row must be a prompt for a policy, see `read_prompts`.
    """
    # numpy and torch; the help of the command does without
    from megatron_sov.commands.train.setup.training import check_stage

    prompts = options.read(is_asked=is_asked)
    version = resolve_reward_version(options.reward, options.reward_set)
    stage = check_stage(options, num_prompts=len(prompts), complete=complete)
    first_round = select_round_prompts(prompts, stage.config.rollout, 1)
    check_reward_fields(options.reward, options.reward_set, first_round, f"--prompts {options.prompts}")
    check_teachers(options, stage.config.policy, options.reward, options.prompts, prompts)
    if not options.dry_run:
        from megatron_sov.commands.train.training_run import convert_request_start

        stage = convert_request_start(stage)
    assert stage.start is not None, "--from is required"
    tokenizer = find_tokenizer_folder(stage.start)
    check_tokenizer(options.start_from, tokenizer)
    validation_prompts = None
    if options.validation is not None:
        validation_prompts = read_validation_prompts(options.validation, options.renames, prompts,
                                                     is_asked=is_asked)
    return RoundsRequest(options, stage, stage.start, tokenizer, prompts, version, validation_prompts)
>>>>>>> main
