"""Play tool-use episodes with a model on an inference engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_sov.base.digests import hash_file
from megatron_sov.base.errors import UserError
from megatron_sov.chat.encode import TurnEncoder
from megatron_sov.chat.folder import (
    CONFIG_JSON, SPECIAL_JSON, TEMPLATE_FILE, TOKENIZER_JSON, read_chat_encoder)
from megatron_sov.engine.parallel.values import broadcast_object
from megatron_sov.infer.engine import Engine, check_engine, choose_engine, run_with_engine
from megatron_sov.infer.engines.load import load_tokenizer
from megatron_sov.infer.engines.target import Target, find_target
from megatron_sov.infer.prompts import check_length, read_stop_ids
from megatron_sov.infer.request import Batching, EngineName, Sampling, StopRule, Tokens
from megatron_sov.judge.tools.environment import EpisodeLimits
from megatron_sov.judge.tools.episode import GeneratedTurn
from megatron_sov.judge.tools.playing import ToolPolicy


class EnginePolicy:
    """Generates turns with an engine.

    Args:
        engine: inference engine.
        sampling: sampling settings; each turn sets its own `max_new_tokens`.
        stop: ends a turn.
    """

    def __init__(self, engine: Engine, sampling: Sampling, stop: StopRule) -> None:
        self._engine, self._sampling, self._stop = engine, sampling, stop

    def sample(self, prompts: Sequence[Tokens], max_new_tokens: int,
               streams: Sequence[int]) -> list[GeneratedTurn]:
        generated = self._engine.generate(prompts, replace(self._sampling, max_new_tokens=max_new_tokens),
                                          stop=self._stop, streams=streams)
        routes = [None] * len(prompts) if generated.routes is None else generated.routes
        return [GeneratedTurn(ids, logprobs, routes=route)
                for ids, logprobs, route in zip(generated.continuations, generated.logprobs, routes,
                                                strict=True)]


class _BroadcastPolicy:
    """Policy on the first process, which broadcasts each request to the engine's other processes."""

    def __init__(self, policy: EnginePolicy) -> None:
        self._policy = policy

    def sample(self, prompts: Sequence[Tokens], max_new_tokens: int,
               streams: Sequence[int]) -> list[GeneratedTurn]:
        # (request, error): an error comes with request None and ends the loop on the other processes
        return self._policy.sample(*broadcast_object(((prompts, max_new_tokens, streams), ""))[0])


def run_with_policy(policy: EnginePolicy, work: Callable[[ToolPolicy], Any]) -> Any:
    """Run `work` with a policy and return the result (collective over the engine's processes).

    Only the first process runs `work`, so that tools act once; the other processes join its sampling and
    return None. Raises `UserError`: `work` raised it; on every process, so that none hangs.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work(policy)
    if dist.get_rank() == 0:
        problem = ""
        try:
            return work(_BroadcastPolicy(policy))
        except UserError as e:
            problem = str(e)
            raise
        finally:
            # the other processes wait for a message even after an error
            broadcast_object((None, problem))
    return _join_sampling(policy)


def _join_sampling(policy: EnginePolicy) -> None:
    local_error: UserError | None = None
    while True:
        request, problem = broadcast_object(None)
        # The first process has finished or failed.
        if request is None:
            break
        try:
            policy.sample(*request)
        except UserError as e:  # the first process raises the same error and ends the loop
            local_error = e
    if problem:
        raise UserError(problem)
    # only this process raised the error
    if local_error is not None:
        raise local_error


@dataclass(frozen=True)
class EngineChoice:
    """Engine settings."""

    engine: EngineName | None
    """None: the model's default engine."""
    settings: Sequence[str]
    """`key=value` changes to layout and precision."""
    nproc: int | None
    """Local processes."""
    option: str = "--set"
    """Option that sets `settings`, for messages."""


class EpisodePlayer:
    """A model with chat template and engine, checked before the model is loaded.

    Args:
        path: the model.
        choice: engine and its settings.
        limits: limits of an episode.
        remedy: advice if the context of the model is too short.
        template: variables of the chat template.

    Raises:
        UserError: the engine cannot run the model, its context is too short, or it has no chat template.
    """

    def __init__(self, path: Path, choice: EngineChoice, limits: EpisodeLimits, remedy: str,
                 template: dict[str, Any] | None = None) -> None:
        self.target: Target = find_target(path)
        self.engine = choice.engine or choose_engine(self.target)
        self._choice = choice
        self._longest = limits.max_prompt_tokens + limits.max_response_tokens + limits.max_turn_tokens
        check_engine(self.engine, self.target, choice.settings, choice.nproc, choice.option)
        check_length(self.target, self._longest, "max_prompt_tokens, max_response_tokens and max_turn_tokens "
                     "of an episode", remedy)
        folder = self.target.tokenizer_folder
        chat = read_chat_encoder(folder)
        if chat is None:
            raise UserError(f"{folder}: has no chat template; fine-tune on chats first")
        self.encoder = TurnEncoder(chat, str(folder), template or {})
        # turn ends only: a turn that ends with eos is incomplete
        self._ends = read_stop_ids(self.target, load_tokenizer(folder).eos_token_id, chat)
        files = [folder / name for name in (TOKENIZER_JSON, CONFIG_JSON, TEMPLATE_FILE, SPECIAL_JSON)]
        self.chat = {file.name: hash_file(file) for file in files if file.is_file()}
        """File that determines the chat encoding -> digest."""

    def run(self, sampling: Sampling, num_parallel: int, play: Callable[[ToolPolicy], Any]) -> Any:
        """Run `play` with the model as policy; returns None except on the first process."""
        def run_policy(engine: Engine) -> Any:
            return run_with_policy(EnginePolicy(engine, sampling, StopRule(self._ends)), play)

        return run_with_engine(self.engine, self.target, run_policy, longest=self._longest,
                               batching=Batching(num_parallel), settings=self._choice.settings,
                               nproc=self._choice.nproc, option=self._choice.option)
