"""Episodes with the tools of an environment as rows, token for token.

Our own engine is cut off between turns by a deadline, servers inside of one too.  An unfinished row keeps in
its outcome what another job needs to go on with it: its turns and the environment's state.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_sov.base.documents.shard_files import joined_routes
from megatron_sov.infer.engine import Engine
from megatron_sov.infer.request import Sampling, StopRule, Tokens
from megatron_sov.infer.tool_policy import EnginePolicy, run_with_policy
from megatron_sov.judge.tools.environment import Task
from megatron_sov.judge.tools.episode import Episode, EpisodeLines, GeneratedTurn, lines_of
from megatron_sov.judge.tools.playing import STREAMS, EpisodeTable, ToolPolicy, play
from megatron_sov.model.config.post_training import RolloutConfig
from megatron_sov.post.rl.generate import SampleAttempt, never
from megatron_sov.post.rl.responses import distribution_of, fresh_keys, sampling_of
from megatron_sov.rollouts.prompts import RolloutPrompt, stream_of
from megatron_sov.rollouts.rows import LAST_TURN, NOT_WRITTEN, UNFINISHED, Key, Rollout

GOES_ON = "goes_on"
"""In the outcome of an unfinished row: lines of `EpisodeLines`, as JSON."""


@dataclass(frozen=True)
class AskedEpisode:
    """An episode that is to be played."""

    task: Task
    key: Key
    """Of its row."""
    before: Rollout | None
    """The row with which it goes on; None: it begins."""

    def lines(self, number: int) -> list[dict[str, Any]]:
        """Return the lines of what was played of it, under a number."""
        if self.before is None or not self.before.outcome or GOES_ON not in self.before.outcome:
            return []
        begin, *turns = ({**line, "episode": number} for line in json.loads(self.before.outcome[GOES_ON]))
        return [{**begin, "routes": self.before.routes}, *turns]


@dataclass(frozen=True)
class Episodes:
    """Writes attempts; called by all processes of an engine together, of which the first gets the rows."""

    table: EpisodeTable
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
    with_routes: bool = False
    """Whether engines are asked which experts tokens visited."""

    def write(self, engine: Engine, attempts: Sequence[SampleAttempt],
              gives_way: Callable[[], bool] = never) -> list[list[Rollout]] | None:
        """Return the rows of attempts that are played together, see `generate.Writer`.

        Raises:
            UserError: a task is none of the environment's, or too long.
        """
        policy = EnginePolicy(engine, self.sampling, StopRule(self.end_ids))
        rows: list[list[Rollout]] | None = run_with_policy(
            policy, lambda sampler: self.played(sampler, attempts, gives_way))
        return rows

    def played(self, policy: ToolPolicy, attempts: Sequence[SampleAttempt],
               gives_way: Callable[[], bool] = never) -> list[list[Rollout]]:
        began_s, deadline_s = time.time(), self.rollout.deadline_s
        ends_s = self.clock_s() + deadline_s
        asked = [(attempt, one) for attempt in attempts for one in self.asked(attempt)]
        # Streams are of a response, not of its place: pieces that are joined must not change what is sampled.
        numbered = _OwnStreams(policy, [(attempt.piece.round, one.key) for attempt, one in asked])
        known = [line for number, (_, one) in enumerate(asked) for line in one.lines(number)]
        episodes = play([one.task for _, one in asked], numbered, self.table, EpisodeLines(known),
                        should_stop=lambda: bool(deadline_s) and (
                            self.clock_s() >= ends_s or gives_way()))
        rows = [(attempt, self.row(episode, one, attempt, began_s))
                for episode, (attempt, one) in zip(episodes, asked, strict=True)]
        return [[row for its, row in rows if its is attempt] for attempt in attempts]

    @property
    def sampling(self) -> Sampling:
        """Return how tokens are chosen; each turn says itself how long it may be."""
        return sampling_of(self.rollout, 1, with_routes=self.with_routes)

    def ids_of(self, prompt: RolloutPrompt) -> list[int]:
        """Return a text of a task as token ids, without asking an environment."""
        return self.table.encoder.encode(json.dumps(prompt.record, ensure_ascii=False))

    def asked(self, attempt: SampleAttempt) -> list[AskedEpisode]:
        if attempt.begun:
            return [AskedEpisode(row.record, row.key, row) for row in attempt.begun]
        return [AskedEpisode(prompt.record, key, None)
                for prompt, key in fresh_keys(attempt, self.rollout, self.chosen_by)]

    def row(self, episode: Episode, asked: AskedEpisode, attempt: SampleAttempt, began_s: float) -> Rollout:
        """Return the row of an episode that has ended, or was cut off."""
        before = asked.before
        first, ids = len(episode.prompt), np.array(episode.ids, np.int32)
        versions = np.full(len(ids), NOT_WRITTEN, np.int32)
        logprobs = np.zeros(len(ids), np.float32)
        for (start, end), written in zip(episode.spans, episode.written, strict=True):
            versions[start:end] = attempt.policy.step if written.versions is None else written.versions
            logprobs[start:end] = np.minimum(np.array(written.logprobs, np.float32), 0)
        if before is not None:
            # Tokens of earlier attempts keep the policy that wrote them.
            versions[first:first + len(before.versions)] = before.versions
        result = episode.result
        outcome = {GOES_ON: json.dumps(lines_of(episode))} if result is None else {
            "reward": result.reward, "status": result.status, "components": dict(result.components),
            "reason": result.reason, "reward_version": self.version,
            # rewards read this and not the row's text, in which tools and the template speak too
            LAST_TURN: episode.turns[-1].whole_text if episode.turns else ""}
        return Rollout(
            asked.key, attempt.piece.round, attempt.number, episode.task, ids[:first], ids[first:],
            logprobs[first:], versions[first:], UNFINISHED if result is None else episode.end,
            self.decode(ids[first:].tolist()), distribution_of(self.rollout), self.engine_name,
            began_s if before is None else before.began_s, time.time(), outcome,
            # what tools said behind the last turn was not read yet
            joined_routes(episode.routes, None, len(ids) - 1))


class _OwnStreams:
    """A policy that gives a turn a stream of its response's, whatever place its episode has among others."""

    def __init__(self, policy: ToolPolicy, keys: Sequence[tuple[int, Key]]) -> None:
        self._policy, self._keys = policy, keys

    def sample(self, prompts: Sequence[Tokens], max_new_tokens: int,
               streams: Sequence[int]) -> Sequence[GeneratedTurn]:
        return self._policy.sample(prompts, max_new_tokens, [self._stream(*divmod(stream, STREAMS))
                                                             for stream in streams])

    def _stream(self, number: int, turn: int) -> int:
        round_, key = self._keys[number]
        # no turn is sampled twice, so that the attempt changes nothing
        return stream_of(round_, key.prompt, key.sample, turn=turn)
