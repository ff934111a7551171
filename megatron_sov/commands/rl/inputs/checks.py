"""Checks of `megatron-sov rl train`, `rl run` and `rl generate` before torch is imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sov.base.errors import IS_CHECKING, ExitCode, Fix, UserError, format_problems
from megatron_sov.commands.rl.cycle import RlRunOptions
from megatron_sov.commands.rl.generate import RlGenerateOptions
from megatron_sov.commands.rl.inputs.prompts import (
    EnvironmentRequest, check_tokenizer, read_training_prompts, read_validation_prompts, resolve_environment)
from megatron_sov.commands.rl.inputs.teachers import check_teachers
from megatron_sov.commands.rl.train import RlTrainOptions, RoundsOptions
from megatron_sov.commands.train.setup.data_defaults import complete_stage
from megatron_sov.commands.train.setup.starts import request_with_model
from megatron_sov.commands.train.setup.training import TrainingRequest, check_stage, find_completed_run
from megatron_sov.infer.engines.server_process import check_vllm_program
from megatron_sov.infer.request import MEGATRON
from megatron_sov.model.config import RunConfig
from megatron_sov.model.config.post_training import RolloutConfig
from megatron_sov.model.config.run import add_rounds, retain_policies
from megatron_sov.post.rl.reward import check_reward_fields, resolve_reward_version
from megatron_sov.rollouts.prompts import PromptList, select_round_prompts
from megatron_sov.rollouts.rows import parse_round_range
from megatron_sov.runs.checkpoints import check_model_path, find_tokenizer_folder
from megatron_sov.runs.folder import FIXED_ROLLOUT_SETTINGS, RunFolder, fixed_settings
from megatron_sov.runs.launch_environment import is_first_rank

if TYPE_CHECKING:
    from megatron_sov.post.rl.teachers import ScoringTeacher


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
    policy_settings: Mapping[str, Any]
    """Settings with an effect on training, in JSON values; they identify the run's policies."""
    live_teacher: Path | None = None
    """Checkpoint whose distributions the run learns (policy.method=gkd)."""
    scoring_teachers: tuple[ScoringTeacher, ...] = ()
    """Teachers that score responses, ordered by domain."""
    wait_s: float = 0.0
    """Time limit per round for generation and judging."""


@dataclass(frozen=True)
class CycleRequest:
    """Checked input for `cycle_run.run_cycle`."""

    options: RlRunOptions
    rounds: RoundsRequest


@dataclass(frozen=True)
class RolloutsRequest:
    """Checked input for `generate_run.generate_rollouts`."""

    options: RlGenerateOptions
    config: RunConfig
    rounds: range
    """Rounds to write, from 1."""
    prompts: PromptList
    """Every prompt in --prompts."""
    environment: EnvironmentRequest | None


def check_train(options: RlTrainOptions) -> RoundsRequest | int:
    """Check the options. For a complete run, print the summary instead."""
    if report_completed_run(options):
        return ExitCode.OK
    # a job that a chain submits first may wait for the store
    if not (options.wait or options.dry_run or options.store.exists()):
        raise UserError(f"--store {options.store}: does not exist; `rl train` learns from rounds that `rl "
                        "generate` and `rl reward` write, and `megatron-sov rl run` does all three (--wait "
                        "SECONDS waits for them)", Fix(command="rl run"))
    return replace(check_rounds(options, complete_train_settings), wait_s=options.wait)


def check_cycle(options: RlRunOptions) -> CycleRequest | int:
    """Check the options. For a complete run, print the summary instead."""
    if report_completed_run(options):
        return ExitCode.OK
    # checked before anything is written; the first process runs the servers
    if options.engine != MEGATRON and is_first_rank():
        check_vllm_program(options.engine_url, options.engine_python)
    return CycleRequest(options, check_rounds(options, is_asked=options.environment is None))


def check_generate(options: RlGenerateOptions) -> RolloutsRequest:
    """Check settings, prompts and environment."""
    check_model_path(options.start_from, "--from ")
    prompts = read_training_prompts(options, is_asked=options.environment is None)
    request = request_with_model(options, options.start_from, "policy")
    # completed like in `rl train`, so that both jobs count rounds equally
    config = complete_stage(request, request.config(), "policy", None, len(prompts)).config
    rollout = config.rollout
    problems = [*map(str, rollout.problems()), *find_other_settings(options.run, rollout)]
    if problems:
        raise UserError(format_problems("rl generate", problems))
    rounds = choose_rounds(options.rounds, rollout.rounds)
    if 0 < rollout.rounds < rounds[-1]:
        raise UserError(f"--rounds {options.rounds}: rollout.rounds = {rollout.rounds}, and no later round "
                        "is trained; choose rounds up to it, or raise rollout.rounds here and in `rl train`")
    select_round_prompts(prompts, rollout, rounds[0])  # refuses a file with too few prompts
    return RolloutsRequest(options, config, rounds, prompts, resolve_environment(options, config))


def report_completed_run(options: RoundsOptions) -> bool:
    """If the run is complete, print the summary and return True; needs no inputs."""
    completed = find_completed_run(options)
    if completed is None:
        return False
    from megatron_sov.commands.train.training_run import run_training  # imports torch

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
    prompts = read_training_prompts(options, is_asked=is_asked)
    version = resolve_reward_version(options.reward, options.reward_set)
    stage = check_stage(options, num_prompts=len(prompts), complete=complete)
    first_round = select_round_prompts(prompts, stage.config.rollout, 1)
    check_reward_fields(options.reward, options.reward_set, first_round, f"--prompts {options.prompts}")
    check_teachers(options, stage.config.policy, options.reward, options.prompts, prompts)
    if not (options.dry_run or IS_CHECKING.get()):
        from megatron_sov.commands.train.training_run import convert_request_start  # imports torch

        stage = convert_request_start(stage)
    assert stage.start is not None, "--from is required"
    tokenizer = find_tokenizer_folder(stage.start)
    check_tokenizer(options.start_from, tokenizer)
    validation_prompts = None
    if options.validation is not None:
        validation_prompts = read_validation_prompts(options.validation, options.renames, prompts,
                                                     is_asked=is_asked)
    settings = fixed_settings(stage.config) | {"train.steps": stage.config.train.steps}
    request = RoundsRequest(options, stage, stage.start, tokenizer, prompts, version, validation_prompts,
                            policy_settings=settings)
    if not (options.teacher or options.teacher_url):
        return request
    from megatron_sov.commands.rl.inputs.teacher_models import (  # imports torch
        find_live_teacher, find_scoring_teachers)

    if stage.config.policy.learns_distributions:
        return replace(request, live_teacher=find_live_teacher(options, tokenizer))
    return replace(request, scoring_teachers=find_scoring_teachers(options, stage.config, tokenizer))


def choose_rounds(text: str | None, last: int) -> range:
    """Return the rounds in --rounds; without the option, rounds 1 to `last`."""
    if text is not None:
        return parse_round_range(text)
    if not last:
        raise UserError("rollout.rounds = 0: there are no rounds; set it, or pass --rounds")
    return range(1, last + 1)


def find_other_settings(run: Path, rollout: RolloutConfig) -> list[str]:
    """Return a sentence for every `rollout` setting with another value in the trainer's run.

    Both jobs count rounds by these settings: with different values one waits for pieces that the other never
    writes. `rounds`, `max_staleness`, `deadline_s` and `lease_s` may differ, since a resumed run may change
    them.
    """
    trained = RunFolder(run).config()
    if trained is None:
        return []
    return [f"rollout.{name} = {getattr(rollout, name)}: --run {run} trains with "
            f"{getattr(trained.rollout, name)}; use equal values" for name in FIXED_ROLLOUT_SETTINGS
            if getattr(rollout, name) != getattr(trained.rollout, name)]
