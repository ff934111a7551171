"""Checks of `megatron-sov rl train`, `rl run` and `rl generate` before torch is imported."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sov.base.documents.layouts import parse_renames
from megatron_sov.base.errors import IS_CHECKING, Fix, UserError, format_problems, warn
from megatron_sov.base.plugins.registry import PluginRequest
from megatron_sov.base.settings import apply_changes, parse_nested
from megatron_sov.chat.vocabulary import TOKENIZER_JSON
from megatron_sov.commands.rl.options import (
    CHECKPOINT_OPTION, VALIDATION_OPTION, PromptOptions, RlGenerateOptions, RlRunOptions, RlTrainOptions,
    RoundsOptions, SamplingOptions, ScoringTeacherOptions, TeacherOption)
from megatron_sov.commands.train.setup.data_defaults import complete_stage
from megatron_sov.commands.train.setup.starts import request_with_model
from megatron_sov.commands.train.setup.training import TrainingRequest, check_stage, find_completed_run
from megatron_sov.infer.engines.server_process import check_vllm_program
from megatron_sov.infer.prompts import check_length
from megatron_sov.infer.request import MEGATRON
from megatron_sov.judge.tools.environment import LIMITS, EpisodeLimits
from megatron_sov.judge.tools.registry import build_versioned_environment, request_environment
from megatron_sov.model.config import RunConfig
from megatron_sov.model.config.post_training import PolicyConfig, RolloutConfig
from megatron_sov.model.config.run import add_rounds, retain_policies
from megatron_sov.post.rl.reward import NO_REWARD, check_reward_fields, resolve_reward_version
from megatron_sov.rollouts.prompts import PromptList, find_shared_prompts, read_prompts
from megatron_sov.rollouts.round_order import select_round_prompts
from megatron_sov.rollouts.rows import parse_round_range, read_domain
from megatron_sov.runs.checkpoints import check_model_path, find_tokenizer_folder
from megatron_sov.runs.folder import FIXED_ROLLOUT_SETTINGS, RunFolder
from megatron_sov.runs.launch_environment import is_first_rank

if TYPE_CHECKING:
    from megatron_sov.infer.engines.target import Target
    from megatron_sov.post.rl.teachers import ScoringTeacher

MAX_LISTED_PROMPTS = 3
"""How many prompts shared by --validation and --prompts a message lists."""
ROLLOUT_SETTINGS = {"max_prompt_tokens": "max_prompt_tokens", "max_response_tokens": "max_new_tokens"}
"""Field in `EpisodeLimits` -> setting in `rollout` with the same meaning."""


@dataclass(frozen=True, kw_only=True)
class RoundsRequest(TrainingRequest):
    """A training command with checked arguments, and the checked inputs of its rounds."""

    options: RoundsOptions
    start: Path
    """Checkpoint of --from."""
    tokenizer: Path
    """Tokenizer folder of `start`."""
    prompts: PromptList
    reward_version: str
    validation_prompts: PromptList | None
    """Prompts in --validation that training does not use; None: no validation."""
    live_teacher: Path | None = None
    """Checkpoint whose distributions the run learns (policy.method=gkd)."""
    scoring_teachers: "tuple[ScoringTeacher, ...]" = ()
    """Teachers that score responses, ordered by domain."""
    wait_s: float = 0.0
    """Time limit per round for generation and judging."""


@dataclass(frozen=True)
class EnvironmentRequest:
    """A tool environment with settings and `EpisodeLimits`."""

    order: PluginRequest
    """The environment's name or file, and its settings."""
    version: str
    limits: EpisodeLimits


@dataclass(frozen=True)
class CycleRequest:
    """Checked input for `cycle_run.run_cycle`."""

    options: RlRunOptions
    rounds: RoundsRequest
    environment: EnvironmentRequest | None


@dataclass(frozen=True)
class RolloutsRequest:
    """Checked input for `generate_run.generate_rollouts`."""

    options: RlGenerateOptions
    config: RunConfig
    rounds: range
    """Rounds to write, from 1."""
    prompts: PromptList
    environment: EnvironmentRequest | None


def check_train(options: RlTrainOptions) -> TrainingRequest:
    """Check the options; a complete run needs no inputs."""
    completed = find_completed_run(options)
    if completed is not None:
        return completed
    # in a chain of jobs, this job may start before the job that creates the store
    if not (options.wait or options.dry_run or options.store.exists()):
        raise UserError(f"--store {options.store}: does not exist; `rl train` learns from rounds that `rl "
                        "generate` and `rl reward` write, and `megatron-sov rl run` does all three (--wait "
                        "SECONDS waits for them)", Fix(command="rl run"))
    # `rl generate` loads the checkpoints of all rounds
    rounds = check_rounds(options, lambda config: retain_policies(add_rounds(config)))
    return replace(rounds, wait_s=options.wait)


def check_cycle(options: RlRunOptions) -> CycleRequest | TrainingRequest:
    """Check the options; a complete run needs no inputs."""
    completed = find_completed_run(options)
    if completed is not None:
        return completed
    # only the first process starts vLLM servers; check before anything is written
    if options.engine != MEGATRON and is_first_rank():
        check_vllm_program(options.engine_url, options.engine_python)
    rounds = check_rounds(options, is_asked=options.environment is None)
    return CycleRequest(options, rounds, resolve_environment(options, rounds.config))


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
    request = RoundsRequest(**vars(stage), tokenizer=tokenizer, prompts=prompts, reward_version=version,
                            validation_prompts=validation_prompts)
    if not (options.teacher or options.teacher_url):
        return request
    from megatron_sov.commands.rl.teacher_models import (  # imports torch
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
    """Return a sentence for every `rollout` setting whose value differs from the trainer's in folder `run`.

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


def read_training_prompts(options: PromptOptions, *, is_asked: bool) -> PromptList:
    """Read the distinct prompts in --prompts; `is_asked`: see `read_prompts`."""
    return read_prompts(options.prompts, parse_renames(options.renames, ()), is_asked=is_asked)


def read_validation_prompts(file: Path, renames: Sequence[str], training: PromptList, *, is_asked: bool
                            ) -> PromptList:
    """Read the prompts of --validation (`file`) that `training` lacks; warn about prompts in both files.
    `renames`: values of --columns; `is_asked`: see `read_prompts`."""
    prompts = read_prompts(file, parse_renames(renames, ()), VALIDATION_OPTION, is_asked=is_asked)
    shared = find_shared_prompts(prompts, training)
    if shared:
        places = ", ".join(prompt.place for prompt in shared[:MAX_LISTED_PROMPTS])
        more = ", ..." if len(shared) > MAX_LISTED_PROMPTS else ""
        overlap = (f"{VALIDATION_OPTION} {file}: {len(shared):,} of {len(prompts):,} prompts are also "
                   f"training prompts ({places}{more})")
        if len(shared) == len(prompts):
            raise UserError(f"{overlap}; pass prompts outside --prompts")
        if is_first_rank():
            warn(f"{overlap}; the validation omits them")
    return replace(prompts.exclude(prompt.id for prompt in shared), num_trained=len(shared))


def resolve_environment(options: SamplingOptions, config: RunConfig) -> EnvironmentRequest | None:
    if options.environment is None:
        return None
    rollout = config.rollout
    for limit in options.limit:
        name = limit.partition("=")[0]
        if name in ROLLOUT_SETTINGS:
            raise UserError(f"--limit {limit}: is rollout.{ROLLOUT_SETTINGS[name]}; set it there")
    # A turn is a response, bounded by `rollout.max_new_tokens`.
    max_turn_tokens = min(EpisodeLimits.max_turn_tokens, rollout.max_new_tokens)
    from_rollout = [f"{name}={getattr(rollout, setting)}" for name, setting in ROLLOUT_SETTINGS.items()]
    changes = [*from_rollout, f"max_turn_tokens={max_turn_tokens}", *options.limit]
    limits = apply_changes(LIMITS["train"], changes, "--limit")
    request = request_environment(options.environment, parse_nested(options.env_set, "--env-set"))
    _, version = build_versioned_environment(request)
    return EnvironmentRequest(request, version, limits)


def check_sequence_length(rollout: RolloutConfig, environment: EnvironmentRequest | None, start: "Target"
                          ) -> None:
    """Check that prompt and response, or the longest turn, fit the model's context."""
    turn = "" if environment is None else " and a turn's max_turn_tokens"
    check_length(start, count_max_tokens(rollout, environment), f"rollout.max_prompt_tokens = "
                 f"{rollout.max_prompt_tokens}, rollout.max_new_tokens = {rollout.max_new_tokens}{turn}",
                 "lower them")


def count_max_tokens(rollout: RolloutConfig, environment: EnvironmentRequest | None) -> int:
    """Return the tokens in the longest sequence, prompt included."""
    # Engines reserve the full length of a turn, even near the end of an episode.
    turn_tokens = 0 if environment is None else environment.limits.max_turn_tokens
    return rollout.max_prompt_tokens + rollout.max_new_tokens + turn_tokens


def check_tokenizer(start_from: Path, folder: Path) -> None:
    """Raise `UserError` unless the tokenizer folder of --from (`folder`) has a tokenizer."""
    if not (folder / TOKENIZER_JSON).is_file():
        raise UserError(f"--from {start_from}: has no tokenizer, which responses need; start from a "
                        "checkpoint or Hugging Face folder with a tokenizer")


def check_teachers(options: ScoringTeacherOptions, policy: PolicyConfig, reward: str, file: Path,
                   prompts: PromptList) -> None:
    """Check that the objective learns from the teachers, and that every prompt has a teacher."""
    parts, teachers = policy.parts, options.parse_teachers()
    if policy.learns_distributions:
        _check_single_teacher(teachers)
        return
    if teachers and not parts.opd_coeff:
        teacher = teachers[0]
        raise UserError(f"{teacher.option} {teacher.location}: policy.method = {policy.method} learns from "
                        "no teacher; set policy.method=opd or gkd, or policy.opd_coeff in addition to a "
                        "reward")
    if parts.opd_coeff and not teachers:
        raise UserError(f"policy.opd_coeff = {parts.opd_coeff:g}: needs a teacher; add --teacher or "
                        "--teacher-url")
    if reward == NO_REWARD and parts.advantage != "none":
        raise UserError(f"--reward {NO_REWARD}: policy.method = {policy.method} learns from rewards; choose "
                        "a reward, or set policy.method=opd")
    domains = {teacher.domain for teacher in teachers}
    for domain in domains:
        _check_one_per_domain([teacher for teacher in teachers if teacher.domain == domain])
    if not teachers or "" in domains:
        return
    for prompt in prompts:
        domain = read_domain(prompt.record)
        if domain not in domains:
            raise UserError(f"--prompts {file}: {prompt.place} has domain {domain!r}, and the teachers have "
                            f"{', '.join(map(repr, sorted(domains)))}; add a teacher for this domain, or a "
                            "teacher without a domain, which scores all other prompts")


def _check_single_teacher(teachers: list[TeacherOption]) -> None:
    """Raise `UserError` unless there is exactly one teacher, a checkpoint for every domain."""
    is_single = len(teachers) == 1
    if is_single and teachers[0].option == CHECKPOINT_OPTION and not teachers[0].domain:
        return
    listed = ", ".join(f"{teacher.option} {teacher.location}" for teacher in teachers) or "there is none"
    raise UserError("policy.method = gkd: learns from exactly one teacher checkpoint, for all prompts "
                    f"({listed}); pass one --teacher CHECKPOINT, or set policy.method=opd")


def _check_one_per_domain(teachers: list[TeacherOption]) -> None:
    """Raise `UserError` if a domain has two teachers; several URLs are replicas of one teacher."""
    if len(teachers) > 1 and any(teacher.option == CHECKPOINT_OPTION for teacher in teachers):
        first, second = teachers[:2]
        raise UserError(f"--teacher {first.location}: {second.option} {second.location} scores the same "
                        "prompts; prefix each with its domain, as math=...")
