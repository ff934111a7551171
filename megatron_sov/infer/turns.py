"""A model that plays episodes with tools: its engine writes the turns, on one process or on all of a layout
together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_sov.base.digests import file_digest
from megatron_sov.base.errors import UserError
from megatron_sov.chat.encode import TurnEncoder
from megatron_sov.chat.folder import (
    CONFIG_JSON, SPECIAL_JSON, TEMPLATE_FILE, TOKENIZER_JSON, read_chat_encoder)
from megatron_sov.engine.parallel.values import broadcast_object
from megatron_sov.infer.asking import check_engine, check_length, stop_ids
from megatron_sov.infer.engine import Engine, EngineName, engine_for, run_engine
from megatron_sov.infer.engines.load import load_tokenizer
from megatron_sov.infer.engines.target import Target, find_target
from megatron_sov.infer.request import Batching, Sampling, StopRule, Tokens
from megatron_sov.judge.tools.environment import EpisodeLimits
from megatron_sov.judge.tools.episode import GeneratedTurn
from megatron_sov.judge.tools.playing import ToolPolicy


class EnginePolicy:
    """An engine that writes turns."""

    def __init__(self, engine: Engine, sampling: Sampling, stop: StopRule) -> None:
        """Take an engine.

        Args:
            engine: which.
            sampling: how tokens are chosen; each turn says itself how long it may be.
            stop: what ends a turn.
        """
        self._engine, self._sampling, self._stop = engine, sampling, stop

    def sample(self, prompts: Sequence[Tokens], max_new_tokens: int,
               streams: Sequence[int]) -> list[GeneratedTurn]:
        found = self._engine.generate(prompts, replace(self._sampling, max_new_tokens=max_new_tokens),
                                      stop=self._stop, streams=streams)
        routes = [None] * len(prompts) if found.routes is None else found.routes
        return [GeneratedTurn(ids, logprobs, routes=its)
                for ids, logprobs, its in zip(found.continuations, found.logprobs, routes, strict=True)]


class _Shared:
    """A policy whose other processes are told what to sample, since an engine runs on all together."""

    def __init__(self, policy: EnginePolicy) -> None:
        self._policy = policy

    def sample(self, prompts: Sequence[Tokens], max_new_tokens: int,
               streams: Sequence[int]) -> list[GeneratedTurn]:
        # The pair is (what to sample, a problem); a problem comes with None and ends the others' loop.
        return self._policy.sample(*broadcast_object(((prompts, max_new_tokens, streams), ""))[0])


def with_policy(policy: EnginePolicy, work: Callable[[ToolPolicy], Any]) -> Any:
    """Return what some work with a policy gives; called by all processes of the engine together.

    The work runs on the first process alone, so that tools act once; the others sample along, and get None.

    Raises:
        UserError: the work has met it; on every process, so that none waits for another.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work(policy)
    if dist.get_rank() == 0:
        problem = ""
        try:
            return work(_Shared(policy))
        except UserError as e:
            problem = str(e)
            raise
        finally:
            # However the work ends: the others wait for this message.
            broadcast_object((None, problem))
    return _sample_along(policy)


def _sample_along(policy: EnginePolicy) -> None:
    own: UserError | None = None
    while True:
        asked, problem = broadcast_object(None)
        # The first process has finished, or failed.
        if asked is None:
            break
        try:
            policy.sample(*asked)
        except UserError as e:  # the first process has met it as well, and ends the work
            own = e
    if problem:
        raise UserError(problem)
    # An error that the first process did not meet is this one's own.
    if own is not None:
        raise own


def chat_digests(folder: Path) -> dict[str, str]:
    """Return the digests of the files that say how a folder's chats become ids, by their names."""
    files = [folder / name for name in (TOKENIZER_JSON, CONFIG_JSON, TEMPLATE_FILE, SPECIAL_JSON)]
    return {file.name: file_digest(file) for file in files if file.is_file()}


@dataclass(frozen=True)
class Runs:
    """How an engine runs the model."""

    engine: EngineName | None
    """None: the one that fits."""
    settings: Sequence[str]
    """`key=value` changes of layout and precision."""
    nproc: int | None
    """Local processes."""
    option: str = "--set"
    """That the settings are given by."""


class Player:
    """A model with its chat template, and an engine."""

    def __init__(self, path: Path, runs: Runs, limits: EpisodeLimits, way_out: str,
                 template: dict[str, Any] | None = None) -> None:
        """Check what can be checked before the model is loaded.

        Args:
            path: the model.
            runs: how.
            limits: of an episode.
            way_out: what a user does whose model ends before an episode may.
            template: variables of the chat template.

        Raises:
            UserError: the engine cannot run the model, it is too short, or has no chat template.
        """
        self.target: Target = find_target(path)
        self.engine = runs.engine or engine_for(self.target)
        self._runs = runs
        self._longest = limits.max_prompt_tokens + limits.max_response_tokens + limits.max_turn_tokens
        check_engine(self.engine, self.target, runs.settings, runs.nproc, runs.option)
        check_length(self.target, self._longest, "max_prompt_tokens, max_response_tokens and max_turn_tokens "
                     "of an episode", way_out)
        folder = self.target.tokenizer_folder
        chat = read_chat_encoder(folder)
        if chat is None:
            raise UserError(f"{folder}: has no chat template; fine-tune on chats first")
        self.encoder = TurnEncoder(chat, str(folder), template or {})
        # a turn that eos ends is no whole one
        self._ends = stop_ids(self.target, load_tokenizer(folder).eos_token_id, chat)
        self.chat = chat_digests(folder)
        """File of the chat template -> its hash."""

    def run(self, sampling: Sampling, num_parallel: int, played: Callable[[ToolPolicy], Any]) -> Any:
        """Return what is played by the model as a policy; None on other processes than the first."""
        def work(engine: Engine) -> Any:
            return with_policy(EnginePolicy(engine, sampling, StopRule(self._ends)), played)

        return run_engine(self.engine, self.target, work, longest=self._longest,
                          batching=Batching(num_parallel), settings=self._runs.settings,
                          nproc=self._runs.nproc, option=self._runs.option)
