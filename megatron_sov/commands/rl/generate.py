"""Options and checks for `megatron-sov rl generate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_sov.base.errors import UserError, format_problems
from megatron_sov.base.settings import DeclaredCommand, Flag, NotNegative
from megatron_sov.commands.rl.inputs.prompts import (
    EnvironmentRequest, PromptOptions, SamplingOptions, resolve_environment)
from megatron_sov.infer.prompts import EngineOptions, ServerOptions
from megatron_sov.model.config import RunConfig
from megatron_sov.model.config.post_training import RolloutConfig
from megatron_sov.model.recipes.requested import RecipeOptions
from megatron_sov.rollouts.prompts import PromptList, parse_round_range, select_round_prompts
from megatron_sov.runs.checkpoints import check_model_path
from megatron_sov.runs.folder import FIXED_ROLLOUT_SETTINGS, RunFolder


@dataclass(frozen=True, kw_only=True)
class RlGenerateOptions(RecipeOptions, PromptOptions, SamplingOptions, EngineOptions, ServerOptions):
    """Generate responses for rounds with the policies of a run."""

    store: Annotated[Path, Flag(value="DIR", writes=True)]
    """Rollout store; created if it does not exist."""
    start_from: Annotated[Path, Flag("--from", "CHECKPOINT|HF_DIR")]
    """Policy of the first round: the start of `rl train`."""
    run: Annotated[Path, Flag(value="DIR", may_be_missing=True)]
    """Run folder of `rl train`, whose checkpoints are the later policies; may not exist yet."""
    rounds: Annotated[str | None, Flag(value="A-B")] = None
    """Rounds to generate (default: all in rollout.rounds)."""
    wait: Annotated[NotNegative, Flag(value="SECONDS")] = 0.0
    """Wait at most this long for a policy, or for pieces claimed by running jobs (default: only until the
    jobs are known to run; the command then exits with 75)."""


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


def check_generate(options: RlGenerateOptions) -> RolloutsRequest:
    """Check settings, prompts and environment."""
    # numpy; the help of the command does without
    from megatron_sov.commands.train.setup.data_defaults import complete_stage
    from megatron_sov.commands.train.setup.starts import request_with_model

    check_model_path(options.start_from, "--from ")
    prompts = options.read(is_asked=options.environment is None)
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


GENERATE = DeclaredCommand(RlGenerateOptions, check_generate,
                           "megatron_sov.commands.rl.generate_run:generate_rollouts")


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
