"""What policies of `megatron-sov rl` are asked, and how: prompts, or tasks of an environment."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from megatron_sov.base.documents.layouts import parse_renames
from megatron_sov.base.errors import UserError, warn
from megatron_sov.base.plugins.registry import PluginRequest
from megatron_sov.base.settings import Flag, apply_changes, excludes_field, parse_nested, requires_field
from megatron_sov.chat.folder import read_chat_encoder, read_chat_fields
from megatron_sov.chat.vocabulary import tokenizer_digest
from megatron_sov.infer.prompts import check_length
from megatron_sov.infer.request import Batching, BatchSize
from megatron_sov.judge.tools.environment import LIMITS, EpisodeLimits
from megatron_sov.judge.tools.registry import BUILT_IN, make, order
from megatron_sov.model.config import RunConfig
from megatron_sov.model.config.post_training import RolloutConfig
from megatron_sov.rollouts.prompts import (
    UNUSED_ROWS_FILE, PromptList, UnusedRows, find_shared_prompts, find_unused_rows, read_prompts,
    sampling_digest)
from megatron_sov.runs.launch_environment import is_first_rank

if TYPE_CHECKING:
    from megatron_sov.infer.engines.target import Target
    from megatron_sov.post.rl.generate.writers import RolloutSource

VALIDATION_OPTION = "--validation"
MAX_TOLD = 3
"""Held-out prompts that are named."""
OF_ROLLOUT = {"max_prompt_tokens": "max_prompt_tokens", "max_response_tokens": "max_new_tokens"}
"""Limit of an episode -> the setting of `rollout` that it is."""


@dataclass(frozen=True, kw_only=True)
class AskingOptions:
    """How prompts are asked."""

    plain: Annotated[bool, excludes_field("environment")] = False
    """Continue each prompt as it is, without the chat template."""
    environment: Annotated[str | None, Flag(
        value="ENV", help=f"Play the prompts as tasks of {', '.join(BUILT_IN)}, or of a class of your own, "
                          "FILE.py:NAME")] = None
    env_set: Annotated[tuple[str, ...], Flag(value="key=value"), requires_field("environment")] = ()
    """A setting of the environment; may be repeated."""
    limit: Annotated[tuple[str, ...], Flag(value="key=value"), requires_field("environment")] = ()
    """A limit of an episode, e.g. max_turns=7; may be repeated."""
    batch_size: BatchSize = Batching.batch_size


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """What policies are asked."""

    prompts: Annotated[Path, Flag(value="FILE|DIR")]
    """Rows of JSON lines, JSON, Parquet or Arrow, or a folder of `datasets`: `prompt` or `messages`, or a
    task, and what the reward needs."""
    renames: Annotated[tuple[str, ...], Flag("--columns", "TARGET=FIELD,...")] = ()
    """Read fields of other names, as prompt=question,answer=solution; FIELD+FIELD joins two by a line
    feed."""

    def read(self, *, is_asked: bool = False) -> PromptList:
        """Return the prompts, each once.

        Args:
            is_asked: see `read_prompts`.

        Raises:
            UserError: they, or --columns, cannot be read.
        """
        return read_prompts(self.prompts, parse_renames(self.renames, ()), is_asked=is_asked)

    def kept(self, prompts: PromptList, aside: UnusedRows, store: Path) -> PromptList:
        """Return the prompts that are asked, and tell of the others."""
        return kept(f"--prompts {self.prompts}", prompts, aside, store)


def kept(given: str, prompts: PromptList, aside: UnusedRows, store: Path) -> PromptList:
    """Return the prompts of a file that are asked, and print the account of the file; `given`: option and
    file."""
    if is_first_rank():
        listed = f"; {store / UNUSED_ROWS_FILE} lists them" if aside.rows else ""
        print(f"{given}: {aside.account.describe()}{listed}", file=sys.stderr)
    return prompts.exclude(aside.too_long)


def read_heldout(file: Path, renames: Sequence[str], trained: PromptList, *, is_asked: bool) -> PromptList:
    """Return the prompts of --validation that training does not ask too, each once, and tell of the others.

    Args:
        file: of --validation.
        renames: --columns.
        trained: the prompts that training asks.
        is_asked: see `read_prompts`.

    Raises:
        UserError: they cannot be read, or none is left.
    """
    found = read_prompts(file, parse_renames(renames, ()), VALIDATION_OPTION, is_asked=is_asked)
    known = find_shared_prompts(found, trained)
    if known:
        told = (f"{VALIDATION_OPTION} {file}: {len(known):,} of {len(found):,} prompts are asked in training "
                f"too ({', '.join(prompt.place for prompt in known[:MAX_TOLD])}"
                f"{', ...' if len(known) > MAX_TOLD else ''})")
        if len(known) == len(found):
            raise UserError(f"{told}; give prompts that --prompts does not have")
        if is_first_rank():
            warn(f"{told}; they are left out of the validation")
    return replace(found.exclude(prompt.id for prompt in known), num_trained=len(known))


@dataclass(frozen=True)
class AskedEnvironment:
    """The environment that prompts are played in."""

    order: PluginRequest
    version: str
    """Of its code and settings."""
    limits: EpisodeLimits


def environment_of(args: AskingOptions, config: RunConfig) -> AskedEnvironment | None:
    """Return the environment; None: there is none.

    Raises:
        UserError: the arguments contradict the settings.
    """
    if args.environment is None:
        return None
    if config.rollout.budget_text:
        raise UserError(f"--environment {args.environment}: turns of episodes are not told how long to be, "
                        f"as rollout.budget_text = {config.rollout.budget_text!r} asks; leave one of them "
                        "out")
    for given in args.limit:
        name = given.partition("=")[0]
        if name in OF_ROLLOUT:
            raise UserError(f"--limit {given}: is rollout.{OF_ROLLOUT[name]}; set it there")
    # a turn is a response: it may not be longer than rollout.max_new_tokens
    most_turn = min(EpisodeLimits.max_turn_tokens, config.rollout.max_new_tokens)
    own = [f"{name}={getattr(config.rollout, setting)}" for name, setting in OF_ROLLOUT.items()]
    limits = apply_changes(LIMITS["train"], [*own, f"max_turn_tokens={most_turn}", *args.limit], "--limit")
    asked = order(args.environment, parse_nested(args.env_set, "--env-set"))
    _, version = make(asked)
    return AskedEnvironment(asked, version, limits)


def refuse_too_long(rollout: RolloutConfig, environment: AskedEnvironment | None, start: Target) -> None:
    """Refuse responses, or turns, that reach beyond the end of the model.

    Raises:
        UserError: they may.
    """
    turn = "" if environment is None else " and a turn's max_turn_tokens"
    check_length(start, longest_of(rollout, environment), f"rollout.max_prompt_tokens = "
                 f"{rollout.max_prompt_tokens}, rollout.max_new_tokens = {rollout.max_new_tokens}{turn}",
                 "lower them")


def longest_of(rollout: RolloutConfig, environment: AskedEnvironment | None) -> int:
    # of a turn an engine is asked for the whole length that one may have, whatever is left of the episode
    more = 0 if environment is None else environment.limits.max_turn_tokens
    return rollout.max_prompt_tokens + rollout.max_new_tokens + more


def source_of(args: AskingOptions, config: RunConfig, prompts: PromptList, start: Target, *,
              engine_name: str, environment: AskedEnvironment | None) -> tuple[RolloutSource, UnusedRows]:
    """Return the source of rows, plain responses or episodes, and the prompts that it does not ask.

    Args:
        args: how prompts are asked.
        config: settings of the run.
        prompts: the file of prompts.
        start: the model that is asked first.
        engine_name: the engine that generates.
        environment: whose tasks are played; None: plain responses.

    Raises:
        UserError: a prompt is empty, all are too long, or the model has no chat template.
    """
    from megatron_sov.chat.encode import TurnEncoder
    from megatron_sov.infer.prompts import PromptEncoder
    from megatron_sov.judge.tools.playing import EpisodeTable
    from megatron_sov.post.rl.generate.episodes import Episodes
    from megatron_sov.post.rl.generate.responses import ResponseSource

    folder, rollout = start.tokenizer_folder, config.rollout
    chat = read_chat_encoder(folder)
    if not args.plain and chat is None:
        raise UserError(f"{folder}: has no chat template, by which prompts are asked; fine-tune on chats "
                        "first, or continue the prompts as they are with --plain")
    asker = PromptEncoder(start, not args.plain)
    chosen_by: dict[str, Any] = {"plain": args.plain, "chat": {
        "tokenizer": tokenizer_digest(folder), "form": sampling_digest(read_chat_fields(folder))}}
    if environment is None:
        responses = ResponseSource(asker, rollout, engine_name, args.plain, chosen_by,
                                   with_routes=config.policy.router_replay)
        return responses, find_unused_rows(prompts, responses.measure_long_prompts(prompts),
                                    rollout.max_prompt_tokens)
    limits = environment.limits
    assert chat is not None, "options refuse --plain"
    table = EpisodeTable(environment.order, TurnEncoder(chat, str(folder)), limits, args.batch_size)
    chosen_by |= {"environment": environment.version, "limits": asdict(limits)}
    episodes = Episodes(
        table=table, version=environment.version, decode=asker.decode, end_ids=asker.end_ids, rollout=rollout,
        engine_name=engine_name, chosen_by=chosen_by, with_routes=config.policy.router_replay)
    return episodes, find_unused_rows(prompts, {}, rollout.max_prompt_tokens)
