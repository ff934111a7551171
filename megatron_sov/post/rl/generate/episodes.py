"""Play episodes in which a policy uses an environment's tools; a row stores an episode's exact tokens.

`Episodes` plays episodes on an engine in this process, a turn of all episodes at a time, and stops between
turns at a deadline. `ServerEpisodePlayer` requests turns from servers, for each episode independently, and
stops inside a turn. The `outcome` of an unfinished row contains the turns and the state of the environment,
with which the next attempt continues.
"""

import contextlib
import itertools
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from megatron_sov.base.documents.shard_files import merge_routes
from megatron_sov.infer.engine import Engine
from megatron_sov.infer.engines.server_engine import ServerEngine
from megatron_sov.infer.request import Sampling, StopRule, Tokens
from megatron_sov.infer.tool_policy import EnginePolicy, run_with_policy
from megatron_sov.judge.tools.environment import Task
from megatron_sov.judge.tools.episode import (
    Episode, EpisodeLines, GeneratedTurn, begin_episode, build_episode_records, count_remaining_tokens,
    take_turn)
from megatron_sov.judge.tools.host import EnvironmentHost
from megatron_sov.judge.tools.playing import (
    STREAMS_PER_EPISODE, EpisodeSettings, ToolPolicy, play_episodes, resume_or_begin, score_episode)
from megatron_sov.model.config.post_training import RolloutConfig
from megatron_sov.post.rl.generate.pieces import SampleAttempt, never_yield
from megatron_sov.post.rl.generate.responses import build_keys, build_sampling, choose_logprob_temperature
from megatron_sov.rollouts.prompts import RolloutPrompt, compute_stream
from megatron_sov.rollouts.rows import LAST_TURN, NOT_WRITTEN, UNFINISHED, Key, Rollout
from megatron_sov.work.endpoints.token_server import ABORTED, TokenAnswer

CONTINUATION = "goes_on"
"""Key in an unfinished row's outcome: the episode's recorded lines (see `EpisodeLines`) as JSON."""


@dataclass(frozen=True)
class PlannedEpisode:
    """An episode to begin or to continue."""

    task: Task
    key: Key
    previous: Rollout | None
    """The unfinished row to continue; None: a new episode."""

    def lines(self, number: int) -> list[dict[str, Any]]:
        """Return the recorded lines in `previous`, renumbered to `number`."""
        if self.previous is None or not self.previous.outcome or CONTINUATION not in self.previous.outcome:
            return []
        recorded = json.loads(self.previous.outcome[CONTINUATION])
        first, *turns = ({**line, "episode": number} for line in recorded)
        return [{**first, "routes": self.previous.routes}, *turns]


@dataclass(frozen=True)
class Episodes:
    """Plays episodes. All processes of an engine call `write` together; the first process gets the rows."""

    table: EpisodeSettings
    """Environment, limits and tokenizer."""
    version: str
    """Environment and reward version."""
    decode: Callable[[list[int]], str]
    end_ids: tuple[int, ...]
    """Token ids that end a turn."""
    rollout: RolloutConfig
    engine_name: str
    chosen_by: dict[str, Any]
    """See `RolloutSource.chosen_by`."""
    clock_s: Callable[[], float] = time.monotonic
    with_routes: bool = False
    """Whether engines return expert routes."""

    def write(self, engine: Engine, attempts: Sequence[SampleAttempt],
              should_yield: Callable[[], bool] = never_yield) -> list[list[Rollout]] | None:
        """Play the attempts together, and return the rows of each; see `writers.RolloutSource.write`."""
        policy = EnginePolicy(engine, self.turn_sampling, StopRule(self.end_ids))
        rows: list[list[Rollout]] | None = run_with_policy(
            policy, lambda sampler: self.play_attempts(sampler, attempts, should_yield))
        return rows

    def play_attempts(self, policy: ToolPolicy, attempts: Sequence[SampleAttempt],
                      should_yield: Callable[[], bool] = never_yield) -> list[list[Rollout]]:
        began_s, deadline_s = time.time(), self.rollout.deadline_s
        ends_s = self.clock_s() + deadline_s

        def should_stop() -> bool:
            return bool(deadline_s) and (self.clock_s() >= ends_s or should_yield())

        planned = [(attempt, episode) for attempt in attempts for episode in self.plan_episodes(attempt)]
        # Random streams depend on the response: playing several pieces together must not change samples.
        policy = _StreamsByKey(policy, [(attempt.piece.round, episode.key) for attempt, episode in planned])
        lines = [line for number, (_, episode) in enumerate(planned) for line in episode.lines(number)]
        episodes = play_episodes([episode.task for _, episode in planned], policy, self.table,
                                 EpisodeLines(lines), should_stop=should_stop)
        rows = [(attempt, self.build_row(episode, plan, attempt, began_s))
                for episode, (attempt, plan) in zip(episodes, planned, strict=True)]
        return [[row for owner, row in rows if owner is attempt] for attempt in attempts]

    @property
    def turn_sampling(self) -> Sampling:
        """Sampling settings; every turn replaces `max_new_tokens`."""
        return build_sampling(self.rollout, 1, with_routes=self.with_routes)

    def encode_prompt(self, prompt: RolloutPrompt) -> list[int]:
        """Encode the task, without calling the environment."""
        return self.table.encoder.encode(json.dumps(prompt.record, ensure_ascii=False))

    def plan_episodes(self, attempt: SampleAttempt) -> list[PlannedEpisode]:
        if attempt.unfinished:
            return [PlannedEpisode(row.record, row.key, row) for row in attempt.unfinished]
        return [PlannedEpisode(prompt.record, key, None)
                for prompt, key in build_keys(attempt, self.rollout, self.chosen_by)]

    def build_row(self, episode: Episode, planned: PlannedEpisode, attempt: SampleAttempt, began_s: float
                  ) -> Rollout:
        """Return the row for a finished or cut-off episode."""
        previous = planned.previous
        first, ids = len(episode.prompt), np.array(episode.ids, np.int32)
        versions = np.full(len(ids), NOT_WRITTEN, np.int32)
        logprobs = np.zeros(len(ids), np.float32)
        for (start, end), turn in zip(episode.spans, episode.written, strict=True):
            versions[start:end] = attempt.policy.step if turn.versions is None else turn.versions
            logprobs[start:end] = np.minimum(np.array(turn.logprobs, np.float32), 0)
        if previous is not None:
            # Tokens of earlier attempts have the version of an earlier policy.
            versions[first:first + len(previous.versions)] = previous.versions
        return Rollout(
            planned.key, attempt.piece.round, attempt.number, episode.task, ids[:first],
            tokens=ids[first:], logprobs=logprobs[first:], versions=versions[first:],
            finish_reason=UNFINISHED if episode.result is None else episode.end,
            response=self.decode(ids[first:].tolist()), temperature=choose_logprob_temperature(self.rollout),
            engine=self.engine_name, began_s=began_s if previous is None else previous.began_s,
            ended_s=time.time(), outcome=self._describe_outcome(episode),
            # Tool results after the last turn have no routes, because no policy has read them yet.
            routes=merge_routes(episode.routes, None, len(ids) - 1))

    def _describe_outcome(self, episode: Episode) -> dict[str, Any]:
        result = episode.result
        if result is None:
            return {CONTINUATION: json.dumps(build_episode_records(episode))}
        return {"reward": result.reward, "status": result.status, "components": dict(result.components),
                "reason": result.reason, "reward_version": self.version,
                # Rewards read the last turn; the text of the row contains tool results and template too.
                LAST_TURN: episode.turns[-1].standalone_text if episode.turns else ""}


class _StreamsByKey:
    """A policy that derives random streams from response and turn instead of the index in a batch."""

    def __init__(self, policy: ToolPolicy, keys: Sequence[tuple[int, Key]]) -> None:
        self._policy, self._keys = policy, keys

    def sample(self, prompts: Sequence[Tokens], max_new_tokens: int,
               streams: Sequence[int]) -> Sequence[GeneratedTurn]:
        return self._policy.sample(prompts, max_new_tokens,
                                   [self._find_stream(*divmod(stream, STREAMS_PER_EPISODE))
                                    for stream in streams])

    def _find_stream(self, number: int, turn: int) -> int:
        round_, key = self._keys[number]
        # Independent of the attempt, because no turn is sampled twice.
        return compute_stream(round_, key.prompt, key.sample, turn=turn)


@dataclass
class _RunningEpisode:
    """An episode in a thread of `ServerEpisodePlayer`."""

    number: int
    task: Task
    lines: list[dict[str, Any]]
    version: int
    """Policy step of the weights, for servers that do not report it."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Guards `is_aborted` and `request`: no request is sent after the abort."""
    is_aborted: bool = False
    request: str = ""
    """Name of the latest request; "": none yet."""


class ServerEpisodePlayer:
    """Plays episodes by servers, up to `num_threads` at a time.

    A thread per episode waits for turns and for a process of the environment. The prefix cache of a server
    has the earlier turns of a conversation: a turn costs only new tokens.
    """

    def __init__(self, *, engine: ServerEngine, table: EpisodeSettings, sampling: Sampling,
                 end_ids: tuple[int, ...], num_threads: int) -> None:
        self._engine, self._table, self._sampling, self._end_ids = engine, table, sampling, end_ids
        self._pool = ThreadPoolExecutor(num_threads, "episode")
        self._free_hosts: deque[EnvironmentHost] = deque()
        self._hosts = contextlib.ExitStack()
        self._numbers = itertools.count()
        self._running: dict[str, _RunningEpisode] = {}

    def begin(self, number: int, task: Task, lines: Sequence[dict[str, Any]],
              version: int) -> tuple[str, Future[Episode]]:
        """Start an episode; return its name, and a future of the finished or aborted episode.

        Args:
            number: number of the task, for messages.
            task: the task.
            lines: recorded lines of an unfinished episode.
            version: policy step of the weights, for servers that do not report it.
        """
        name = str(next(self._numbers))
        self._running[name] = episode = _RunningEpisode(number, task, list(lines), version)
        future = self._pool.submit(self._play, episode)
        # dict.pop is atomic, so the thread that ends the episode needs no lock.
        future.add_done_callback(lambda _: self._running.pop(name, None))
        return name, future

    def abort(self, names: Sequence[str]) -> None:
        """End episodes early: inside a turn, or after the running tool calls."""
        requests = []
        for name in names:
            episode = self._running.get(name)  # None: the episode has just ended in its thread
            if episode is not None:
                with episode.lock:
                    episode.is_aborted = True
                    requests.append(episode.request)
        # Servers ignore the names of answered requests.
        self._engine.fleet.abort([name for name in requests if name])

    def close(self) -> None:
        """Abort all episodes and end the environments; running tool calls end within `limits`."""
        self.abort(list(self._running))
        self._pool.shutdown(cancel_futures=True)
        self._hosts.close()

    def _play(self, running: _RunningEpisode) -> Episode:
        with self._borrow_host() as host:
            episodes = EpisodeLines(running.lines).read_episodes({running.number: running.task})
            recorded = episodes.get(running.number)
            begin = partial(begin_episode, running.number, running.task, encoder=self._table.encoder,
                            limits=self._table.limits)
            episode = resume_or_begin(host, running.number, running.task, recorded, begin)
            while not episode.end:
                answer = self._request_turn(running, episode)
                if answer is None or not self._append_turn(running, episode, answer, host):
                    # Keep the session for another attempt: the next episode in this host would end it.
                    host.end()
                    return episode
            episode.result = score_episode(host, episode)
            return episode

    @contextlib.contextmanager
    def _borrow_host(self) -> Iterator[EnvironmentHost]:
        """Yield an idle environment, or start one; an environment's process serves many episodes."""
        try:
            host = self._free_hosts.pop()
        except IndexError:
            host = self._hosts.enter_context(EnvironmentHost(self._table.request, self._table.limits))
        try:
            yield host
        finally:
            self._free_hosts.append(host)

    def _request_turn(self, running: _RunningEpisode, episode: Episode) -> TokenAnswer | None:
        """Request the next turn; None: the episode was aborted."""
        limit = count_remaining_tokens(episode, self._table.limits)
        [request] = self._engine.requests([episode.ids], [replace(self._sampling, max_new_tokens=limit)],
                                          self._end_ids)
        with running.lock:
            if running.is_aborted:
                return None
            running.request = request.name
            future = self._engine.fleet.submit(request)
        [answer] = future.result()
        return answer

    def _append_turn(self, running: _RunningEpisode, episode: Episode, answer: TokenAnswer,
                     host: EnvironmentHost) -> bool:
        """Append a turn to the episode. An incomplete turn goes to `episode.begun`; then return False."""
        ids = StopRule(self._end_ids).cut(answer.tokens)
        routes = None
        if self._sampling.with_routes:
            routes = self._engine.extract_routes(answer, len(episode.ids) + len(ids) - 1)
        turn = episode.extend_turn(GeneratedTurn(ids, answer.logprobs[:len(ids)],
                                                 answer.token_versions(len(ids), running.version), routes))
        is_ended = any(token in self._end_ids for token in turn.ids[-1:])
        is_full = len(turn.ids) >= count_remaining_tokens(episode, self._table.limits)
        if answer.reason == ABORTED and not is_ended and not is_full:
            episode.begun = turn if turn.ids else None
            return False
        episode.turns.append(take_turn(episode, turn, host, self._table.encoder, self._table.limits))
        return True
