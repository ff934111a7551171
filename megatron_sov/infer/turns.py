"""An engine as what writes the turns of tool episodes: on one process, or on all of a layout together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from megatron_sov.base.errors import UserError
from megatron_sov.engine.mcore.parallel.values import broadcast_object
from megatron_sov.infer.engine import Engine
from megatron_sov.infer.request import Sampling, StopRule, Tokens
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
        return [GeneratedTurn(ids, logprobs)
                for ids, logprobs in zip(found.continuations, found.logprobs, strict=True)]


class _Shared:
    """A policy whose other processes are told what to sample, since an engine runs on all together."""

    def __init__(self, policy: EnginePolicy) -> None:
        self._policy = policy

    def sample(self, prompts: Sequence[Tokens], max_new_tokens: int,
               streams: Sequence[int]) -> list[GeneratedTurn]:
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
            broadcast_object((None, problem))
    return _sample_along(policy)


def _sample_along(policy: EnginePolicy) -> None:
    """Sample what the first process asks for, until it ends."""
    own: UserError | None = None
    while True:
        asked, problem = broadcast_object(None)
        if asked is None:
            break
        try:
            policy.sample(*asked)
        except UserError as e:  # the first process has met it as well, and ends the work
            own = e
    if problem:
        raise UserError(problem)
    if own is not None:
        raise own
