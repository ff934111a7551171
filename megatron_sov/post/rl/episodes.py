"""Episodes with the tools of an environment, as rows: what the policy wrote, what tools said, and what the
environment says of the end.

A deadline is looked at between turns.  An episode that it cuts off keeps, in its row's outcome, what another
job needs to go on with it: its turns and the environment's state.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from megatron_sov.config.rollout import RolloutConfig
from megatron_sov.generate.engine import Engine
from megatron_sov.generate.request import Sampling, Stop, Tokens
from megatron_sov.generate.turns import EnginePolicy, with_policy
from megatron_sov.post.rl.missing import Attempt, never
from megatron_sov.post.rl.responses import fresh_keys
from megatron_sov.rollouts.rows import NOT_WRITTEN, UNFINISHED, Key, Rollout
from megatron_sov.rollouts.sampling import stream_of
from megatron_sov.tools.environment import Task
from megatron_sov.tools.episode import Episode, EpisodeLines, Written, lines_of
from megatron_sov.tools.playing import STREAMS, Policy, Table, play

GOES_ON = "goes_on"
"""In the outcome of an unfinished row: lines of `tools.journal`, as JSON."""


@dataclass(frozen=True)
class Episodes:
    """Writes attempts; called by all processes of an engine together, of which the first gets the rows."""

    table: Table
    """The environment, the limits, and the policies' tokenizer."""
    version: str
    """Of the environment: its rewards'."""
    decode: Callable[[list[int]], str]
    """From token ids to text."""
    end_ids: tuple[int, ...]
    """Tokens that end a turn."""
    rollout: RolloutConfig
    engine_name: str
    """Told in the rows."""
    chosen_by: dict[str, Any]
    """What tokens are chosen by beside the settings of `rollout`, for the key."""
    clock_s: Callable[[], float] = time.monotonic
    """Which the deadline is on."""

    def write(self, engine: Engine, attempts: Sequence[Attempt],
              gives_way: Callable[[], bool] = never) -> list[list[Rollout]] | None:
        """Return the rows of attempts that are played together, see `generate.Writer`.

        Raises:
            UserError: a task is none of the environment's, or too long.
        """
        sampling = Sampling(1, self.rollout.temperature, seed=self.rollout.seed, for_training=True)
        policy = EnginePolicy(engine, sampling, Stop(self.end_ids))
        rows: list[list[Rollout]] | None = with_policy(
            policy, lambda sampler: self.played(sampler, attempts, gives_way))
        return rows

    def played(self, policy: Policy, attempts: Sequence[Attempt],
               gives_way: Callable[[], bool] = never) -> list[list[Rollout]]:
        """Return the rows of each attempt that a policy plays."""
        began_s, deadline_s = time.time(), self.rollout.deadline_s
        ends_s = self.clock_s() + deadline_s
        asked = [one for attempt in attempts for one in self._asked(attempt)]
        known = chain.from_iterable(_lines(number, row) for number, (_, _, _, row) in enumerate(asked))
        numbered = _OwnStreams(policy, [(attempt.piece.round, key) for attempt, _, key, _ in asked])
        episodes = play([task for _, task, _, _ in asked], numbered, self.table, EpisodeLines(known),
                        should_stop=lambda: bool(deadline_s) and (
                            self.clock_s() >= ends_s or gives_way()))
        rows = [(attempt, self._row(episode, key, before, attempt, began_s))
                for episode, (attempt, _, key, before) in zip(episodes, asked, strict=True)]
        return [[row for its, row in rows if its is attempt] for attempt in attempts]

    def _asked(self, attempt: Attempt) -> list[tuple[Attempt, Task, Key, Rollout | None]]:
        """Return the tasks of an attempt, with key and row of those that go on."""
        if attempt.begun:
            return [(attempt, row.record, row.key, row) for row in attempt.begun]
        return [(attempt, prompt.record, key, None)
                for prompt, key in fresh_keys(attempt, self.rollout, self.chosen_by)]

    def _row(self, episode: Episode, key: Key, before: Rollout | None, attempt: Attempt,
             began_s: float) -> Rollout:
        """Return an episode as a row; `before`: as the attempt before left it."""
        first, ids = len(episode.prompt), np.array(episode.ids, np.int32)
        versions = np.full(len(ids), NOT_WRITTEN, np.int32)
        logprobs = np.zeros(len(ids), np.float32)
        for (start, end), turn in zip(episode.spans, episode.turns, strict=True):
            versions[start:end] = attempt.policy.step
            logprobs[start:end] = np.minimum(np.array(turn.written.logprobs, np.float32), 0)
        if before is not None:
            versions[first:first + len(before.versions)] = before.versions
        result = episode.result
        outcome = {GOES_ON: json.dumps(lines_of(episode))} if result is None else {
            "reward": result.reward, "status": result.status, "components": dict(result.components),
            "reason": result.reason, "reward_version": self.version}
        return Rollout(
            key, attempt.piece.round, attempt.number, episode.task, ids[:first], ids[first:],
            logprobs[first:], versions[first:], UNFINISHED if result is None else episode.end,
            self.decode(ids[first:].tolist()), self.rollout.temperature, self.engine_name,
            began_s if before is None else before.began_s, time.time(), outcome)


class _OwnStreams:
    """A policy that gives a turn a stream of its response's, whatever place its episode has among others."""

    def __init__(self, policy: Policy, keys: Sequence[tuple[int, Key]]) -> None:
        self._policy, self._keys = policy, keys

    def sample(self, prompts: Sequence[Tokens], max_new_tokens: int,
               streams: Sequence[int]) -> Sequence[Written]:
        return self._policy.sample(prompts, max_new_tokens, [self._stream(*divmod(stream, STREAMS))
                                                             for stream in streams])

    def _stream(self, number: int, turn: int) -> int:
        round_, key = self._keys[number]
        # no turn is sampled twice, so that the attempt changes nothing
        return stream_of(round_, key.prompt, key.sample, turn=turn)


def _lines(number: int, row: Rollout | None) -> list[dict[str, Any]]:
    """Return the journal of an episode that goes on, under its place in this attempt."""
    if row is None or not row.outcome or GOES_ON not in row.outcome:
        return []
    return [{**line, "episode": number} for line in json.loads(row.outcome[GOES_ON])]
