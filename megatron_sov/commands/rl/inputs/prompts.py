"""Read prompts and environments from options, with checks that need no model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sov.base.documents.layouts import parse_renames
from megatron_sov.base.errors import UserError, warn
from megatron_sov.base.plugins.registry import PluginRequest
from megatron_sov.base.settings import apply_changes, parse_nested
from megatron_sov.chat.vocabulary import TOKENIZER_JSON
from megatron_sov.commands.rl.inputs.options import VALIDATION_OPTION, PromptOptions, SamplingOptions
from megatron_sov.infer.prompts import check_length
from megatron_sov.judge.tools.environment import LIMITS, EpisodeLimits
from megatron_sov.judge.tools.registry import build_versioned_environment, request_environment
from megatron_sov.model.config import RunConfig
from megatron_sov.model.config.post_training import RolloutConfig
from megatron_sov.rollouts.prompts import (
    UNUSED_ROWS_FILE, PromptList, UnusedRows, find_shared_prompts, read_prompts)
from megatron_sov.runs.launch_environment import is_first_rank

if TYPE_CHECKING:
    from megatron_sov.infer.engines.target import Target

MAX_LISTED_PROMPTS = 3
"""Limit on held-out prompts in a warning."""
ROLLOUT_SETTINGS = {"max_prompt_tokens": "max_prompt_tokens", "max_response_tokens": "max_new_tokens"}
"""Field in `EpisodeLimits` -> setting in `rollout` with the same meaning."""


def read_training_prompts(options: PromptOptions, *, is_asked: bool) -> PromptList:
    """Read the distinct prompts in --prompts.

    Args:
        options: options that name the prompts.
        is_asked: whether each row must be a prompt for a policy, see `read_prompts`.
    """
    return read_prompts(options.prompts, parse_renames(options.renames, ()), is_asked=is_asked)


def drop_unused_prompts(source: str, prompts: PromptList, unused: UnusedRows, store: Path) -> PromptList:
    """Return the prompts without `unused.too_long`, and print the counts for the file."""
    if is_first_rank():
        listed = f"; {store / UNUSED_ROWS_FILE} lists them" if unused.rows else ""
        print(f"{source}: {unused.account.describe()}{listed}", file=sys.stderr)
    return prompts.exclude(unused.too_long)


def read_validation_prompts(file: Path, renames: Sequence[str], training: PromptList, *, is_asked: bool
                            ) -> PromptList:
    """Read the prompts that only --validation contains; warn about prompts in both files.

    Args:
        file: file of --validation.
        renames: values of --columns.
        training: prompts of --prompts.
        is_asked: whether each row must be a prompt for a policy, see `read_prompts`.
    """
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


@dataclass(frozen=True)
class EnvironmentRequest:
    """A tool environment with settings and `EpisodeLimits`."""

    order: PluginRequest
    version: str
    limits: EpisodeLimits


def resolve_environment(options: SamplingOptions, config: RunConfig) -> EnvironmentRequest | None:
    """Return the environment from --environment, or None."""
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


def check_sequence_length(rollout: RolloutConfig, environment: EnvironmentRequest | None, start: Target
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
    """Check that the start has a tokenizer."""
    if not (folder / TOKENIZER_JSON).is_file():
        raise UserError(f"--from {start_from}: has no tokenizer, which responses need; start from a "
                        "checkpoint or Hugging Face folder with a tokenizer")
