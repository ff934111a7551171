"""Generation by engine servers: a request per response, per group of short responses, or per turn of an
episode.

A queue over complete rounds keeps the servers full; a piece is published when its rows are finished. During
the last responses of a round, servers already generate responses of later rounds (`rollout.max_staleness`),
and continue them with the next weights: every token has a policy version.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from queue import Empty, SimpleQueue
from typing import Any, ClassVar, Protocol

from megatron_sov.base.errors import UserError
from megatron_sov.engine.parallel.world import run_on_main
from megatron_sov.infer.engines.server_engine import ServerEngine
from megatron_sov.infer.request import StopRule
from megatron_sov.model.config.post_training import RolloutConfig
from megatron_sov.post.rl.generate.episodes import Episodes, PlannedEpisode, ServerEpisodePlayer
from megatron_sov.post.rl.generate.pieces import PieceQueue, SampleAttempt
from megatron_sov.post.rl.generate.responses import GeneratedTokens, ResponseSource
from megatron_sov.post.rl.generate.servers import LiveServers
from megatron_sov.post.rl.generate.writers import GenerationSettings, LoadPolicy, RolloutSource
from megatron_sov.rollouts.round_order import select_round_prompts
from megatron_sov.rollouts.rows import LENGTH, STOP, UNFINISHED, Rollout
from megatron_sov.runs.rounds import Policy, can_generate_round
from megatron_sov.train.feed import FeedView
from megatron_sov.work.endpoints.token_server import ABORTED, TokenAnswer, TokenRequest
from megatron_sov.work.progress.progress_bar import create_bar

SLICE_S = 5.0
"""Seconds of generation between two collectives, in which other processes wait for `run_on_main`."""
LOOKUP_S = 1.0
"""Seconds between two lookups for pending pieces in the store."""
AHEAD = 2
"""Limit for requested responses, as a multiple of `room`, if other jobs generate too or a deadline runs:
further claims would only wait in the queue."""


@dataclass
class RequestWriter:
    """Generates rows by servers that receive the live weights; a `RolloutWriter`."""

    completes_all: ClassVar[bool] = False
    settings: GenerationSettings
    servers: LiveServers
    _policy: Policy | None = None
    _queue: RolloutRequestQueue | None = None
    """Requests across rounds, on rank 0."""

    def write(self, view: FeedView, rounds: range, policy: Policy, asked_to_stop: Callable[[], bool]
              ) -> dict[str, float]:
        source, servers, self._policy = self.settings.source, self.servers, policy
        assert isinstance(source, (ResponseSource, Episodes)), "the source needs an engine in this process"
        while run_on_main(view.world, lambda: not asked_to_stop() and servers.is_opening(SLICE_S)):
            view.checkpointer.advance()
        if not run_on_main(view.world, lambda: servers.is_open):
            return {}
        servers.push_weights(view, policy)
        run_on_main(view.world, lambda: self._open_queue(rounds, asked_to_stop).begin(rounds, asked_to_stop))
        # Checked while the servers generate, before the first piece is published.
        first_prompt = select_round_prompts(self.settings.prompts, self.settings.rollout, rounds[0])[0]
        servers.check(view, policy, source.encode_prompt(first_prompt))

        def advance() -> bool:
            queue = self._open_queue(rounds, asked_to_stop)
            return queue.advance(SLICE_S, lambda: queue.pieces.pending.is_open(rounds[0]))

        while run_on_main(view.world, advance):
            view.checkpointer.advance()
        return dict(run_on_main(view.world, lambda: servers.meters))

    def close(self) -> None:
        if self._queue is not None:
            self._queue.close()
        self.servers.close()

    def _open_queue(self, rounds: range, asked_to_stop: Callable[[], bool]) -> RolloutRequestQueue:
        if self._queue is None:
            engine = self.servers.engine
            assert engine is not None, "the servers are not open"
            self._queue = RolloutRequestQueue(
                requests=build_requests(engine, self.settings.source, engine.room, is_live=True),
                pieces=self.settings.build_queue(rounds, self._find_policy, asked_to_stop),
                load_policy=None, room=engine.room)
        return self._queue

    def _find_policy(self, number: int) -> Policy | None:
        """Return the live policy if round `number` allows the policy's step."""
        policy = self._policy
        if policy is None or not can_generate_round(policy.step, number, self.settings.rollout):
            return None
        return policy


def write_by_requests(requests: RowRequests, pieces: PieceQueue, room: int, load_policy: LoadPolicy
                      ) -> dict[str, Any]:
    """Generate all pending pieces, with every checkpoint that appears; return `pieces.summary`."""
    queue = RolloutRequestQueue(requests=requests, pieces=pieces, load_policy=load_policy, room=room)
    with create_bar("write", pieces.pending.num_pieces, "piece") as bar:
        try:
            while queue.advance(SLICE_S, lambda: True):
                bar.update(pieces.pending.num_complete - bar.n)
        finally:
            # After a failure too: a remaining claim would block other jobs until the lease ends.
            queue.close()
    return pieces.summary


@dataclass(frozen=True)
class PendingRow:
    """A row that a server generates."""

    name: str
    """Name for `abort`."""
    future: Future[Any]
    build_row: Callable[[], Rollout]
    """Builds the row after `future` is done."""
    is_begun: Callable[[], bool]
    """Whether a server has accepted the request, or an episode has a thread; starts the deadline."""


class RowRequests(Protocol):
    """Requests rows from servers."""

    rollout: RolloutConfig

    def begin(self, attempt: SampleAttempt) -> list[PendingRow]:
        """Request an attempt's rows, in order."""

    def abort(self, names: Sequence[str]) -> None:
        """End rows early, with the tokens generated so far."""

    def close(self) -> None:
        ...


def build_requests(engine: ServerEngine, source: RolloutSource, room: int, *, is_live: bool = False
                   ) -> RowRequests:
    """Build the requests for `source`, at most `room` at a time; `is_live`: this run updates the weights."""
    if isinstance(source, Episodes):
        return EpisodeRequests(engine, source, room)
    assert isinstance(source, ResponseSource), f"{type(source).__name__} sends no requests"
    rollout = source.rollout
    # Join the samples of a prompt if neither weights nor a deadline interrupt the round, and no slot idles.
    are_joined = (is_live and not rollout.max_staleness and not rollout.deadline_s
                  and rollout.prompts_per_round * rollout.samples_per_prompt <= room)
    return ResponseRequests(engine, source, are_joined=are_joined)


class ResponseRequests:
    """Requests for single-turn responses: per row, or for several short rows."""

    def __init__(self, engine: ServerEngine, source: ResponseSource, *, are_joined: bool = False) -> None:
        self._engine, self._source, self.rollout = engine, source, source.rollout
        self._are_joined = are_joined

    def begin(self, attempt: SampleAttempt) -> list[PendingRow]:
        rows = self._source.begin(attempt)
        requests = self._engine.requests(
            [[*row.prompt_tokens.tolist(), *row.tokens.tolist()] for row in rows],
            [self._source.build_row_sampling(row) for row in rows],
            self._source.encoder.end_ids, are_joined=self._are_joined)
        remaining = iter(rows)
        pending: list[PendingRow] = []
        for request in requests:
            pending += self._submit_request(attempt, request, list(islice(remaining, request.num_answers)))
        return pending

    def abort(self, names: Sequence[str]) -> None:
        self._engine.fleet.abort(names)

    def close(self) -> None:
        """Do nothing: the engine's fleet ends the requests."""

    def _submit_request(self, attempt: SampleAttempt, request: TokenRequest, rows: list[Rollout]
                        ) -> list[PendingRow]:
        """Submit a request with an answer per row; the request completes the futures of all `rows`."""
        answers = self._engine.fleet.submit(request)
        futures: list[Future[Any]] = [Future() for _ in rows]

        def finish_rows(_: Future[Any]) -> None:
            for future in futures:
                future.set_result(None)

        answers.add_done_callback(finish_rows)
        return [PendingRow(request.name, future, partial(self._build_row, attempt, row, answers, index),
                           answers.running)
                for index, (future, row) in enumerate(zip(futures, rows, strict=True))]

    def _build_row(self, attempt: SampleAttempt, row: Rollout, answers: Future[list[TokenAnswer]], index: int
                   ) -> Rollout:
        """Append the tokens of answer `index` to a row."""
        answer = answers.result()[index]
        tokens = StopRule(self._source.encoder.end_ids).cut(answer.tokens)
        reason = {STOP: STOP, LENGTH: LENGTH, ABORTED: UNFINISHED}[answer.reason]
        routes = None
        if self._source.with_routes:
            # The policy has not read the last token.
            num_read = len(row.prompt_tokens) + len(row.tokens) + len(tokens) - 1
            routes = self._engine.extract_routes(answer, num_read)
        return self._source.append_tokens(row, attempt, GeneratedTokens(
            tokens, answer.logprobs[:len(tokens)], reason,
            answer.token_versions(len(tokens), attempt.policy.step), routes))


class EpisodeRequests:
    """Requests for episodes with tools: per turn and row."""

    def __init__(self, engine: ServerEngine, episodes: Episodes, room: int) -> None:
        self._episodes, self.rollout = episodes, episodes.rollout
        self._player = ServerEpisodePlayer(engine=engine, table=episodes.table,
                                           sampling=episodes.turn_sampling, end_ids=episodes.end_ids,
                                           num_threads=max(room, episodes.table.parallel))

    def begin(self, attempt: SampleAttempt) -> list[PendingRow]:
        return [self._begin_episode(attempt, number, episode)
                for number, episode in enumerate(self._episodes.plan_episodes(attempt))]

    def abort(self, names: Sequence[str]) -> None:
        self._player.abort(names)

    def close(self) -> None:
        self._player.close()

    def _begin_episode(self, attempt: SampleAttempt, number: int, planned: PlannedEpisode) -> PendingRow:
        began_s = time.time()
        name, future = self._player.begin(number, planned.task, planned.lines(number), attempt.policy.step)
        return PendingRow(name, future,
                          lambda: self._episodes.build_row(future.result(), planned, attempt, began_s),
                          future.running)


@dataclass
class PendingAttempt:
    """An attempt whose rows servers generate."""

    attempt: SampleAttempt
    indices: dict[Future[Any], int]
    """Future of an unfinished row -> index in `rows`."""
    rows: list[PendingRow]
    deadlines_s: dict[int, float] = field(default_factory=dict)
    """Index in `rows` -> deadline, for rows that have begun."""
    finished: dict[int, Rollout] = field(default_factory=dict)
    aborted: set[int] = field(default_factory=set)


@dataclass(kw_only=True)
class RolloutRequestQueue:
    """Pending requests, on the process with the servers."""

    requests: RowRequests
    pieces: PieceQueue
    load_policy: LoadPolicy | None
    """Loads another policy into the servers; None: the servers always have the live policy."""
    room: int
    """Responses that the servers generate at a time."""
    clock_s: Callable[[], float] = time.monotonic
    under_way: list[PendingAttempt] = field(default_factory=list)
    _loaded_step: int = 0
    """Step of the servers' weights."""
    _next_lookup_s: float = 0.0
    _finished: SimpleQueue[Future[Any]] = field(default_factory=SimpleQueue)

    def begin(self, rounds: range, asked_to_stop: Callable[[], bool]) -> None:
        """Request the pending pieces in `rounds`, in addition to earlier rounds, if a policy exists."""
        self.pieces.asked_to_stop = asked_to_stop
        self.pieces.pending.add_rounds(rounds)
        # At once, because the previous lookup did not include `rounds`.
        has_requests = not asked_to_stop() and self._request_attempts() and bool(self.under_way)
        self._next_lookup_s = self.clock_s() + LOOKUP_S if has_requests else 0.0

    def advance(self, limit_s: float, is_needed: Callable[[], bool]) -> bool:
        """Send requests, collect finished rows and publish complete pieces, for `limit_s` seconds.

        Args:
            limit_s: time limit of the call.
            is_needed: whether a required piece is under way or pending.

        Returns:
            Whether to call again: required pieces are missing and may still come.
        """
        ends_s = self.clock_s() + limit_s
        while is_needed():
            if self.pieces.asked_to_stop():
                return False
            if self._is_lookup_due() and not self._request_attempts() and not self.under_way:
                return False
            remaining_s = ends_s - self.clock_s()
            if self.under_way:
                self._collect_rows(self._wait_for_rows(min(max(remaining_s, 0.0), LOOKUP_S)))
            elif remaining_s > 0:
                time.sleep(min(remaining_s, LOOKUP_S))
            self._abort_late_rows()
            if remaining_s <= 0:
                return True
        return False

    def close(self) -> None:
        """Abort the pending rows and release their claims."""
        self.requests.close()
        self.pieces.pending.release()

    def _is_lookup_due(self) -> bool:
        """Return whether to look for pending pieces now, and if so, set the time of the next lookup: after
        `LOOKUP_S`, because a lookup reads the store piece by piece, or after the next published piece."""
        if self.clock_s() < self._next_lookup_s:
            return False
        self._next_lookup_s = self.clock_s() + LOOKUP_S
        return True

    def _request_attempts(self) -> bool:
        """Claim and request more rows while there is room; return False if no piece is left to wait for."""
        num_more = self._max_rows() - sum(len(attempt.indices) for attempt in self.under_way)
        if num_more <= 0:
            return True
        attempts = self.pieces.next_attempts(num_more, is_busy=bool(self.under_way))
        if attempts is None:
            return False
        if not attempts:
            if self.load_policy is None and not self.under_way and self.pieces.pending.is_stuck:
                # The next policy learns from this round: no newer policy will continue the rows.
                raise UserError(f"rollout.deadline_s = {self.requests.rollout.deadline_s:g}: some responses "
                                "did not get one token in a whole attempt; raise it, or request fewer at a "
                                "time (rollout.piece_prompts)")
            return True
        policy = attempts[0].policy
        if self.load_policy is not None and policy.step != self._loaded_step:
            self.load_policy(policy)
            self._loaded_step = policy.step
        for attempt in attempts:
            self._request_rows(attempt)
        return True

    def _max_rows(self) -> int:
        if self.load_policy is None and not self.requests.rollout.deadline_s:
            # Unlimited, because no requests are sent during optimizer steps, and the servers must not idle.
            return sys.maxsize
        return AHEAD * self.room

    def _request_rows(self, attempt: SampleAttempt) -> None:
        rows = self.requests.begin(attempt)
        for row in rows:
            row.future.add_done_callback(self._finished.put)
        indices = {row.future: index for index, row in enumerate(rows)}
        self.under_way.append(PendingAttempt(attempt, indices, rows))

    def _abort_late_rows(self) -> None:
        deadline_s, now_s = self.requests.rollout.deadline_s, self.clock_s()
        if not deadline_s:
            return
        for attempt in self.under_way:
            late = set()
            for index in attempt.indices.values():
                if index not in attempt.deadlines_s and attempt.rows[index].is_begun():
                    attempt.deadlines_s[index] = now_s + deadline_s
                if index not in attempt.aborted and now_s >= attempt.deadlines_s.get(index, math.inf):
                    late.add(index)
            attempt.aborted |= late
            if late:
                self.requests.abort([attempt.rows[index].name for index in sorted(late)])

    def _wait_for_rows(self, limit_s: float) -> set[Future[Any]]:
        """Wait for finished rows, at most `limit_s` seconds; return their futures."""
        finished: set[Future[Any]] = set()
        with contextlib.suppress(Empty):
            finished.add(self._finished.get(timeout=limit_s))
            while True:
                finished.add(self._finished.get_nowait())
        return finished

    def _collect_rows(self, finished: set[Future[Any]]) -> None:
        """Build the finished rows, and publish attempts with all rows."""
        for pending in list(self.under_way):
            for future in finished & pending.indices.keys():
                index = pending.indices.pop(future)
                pending.finished[index] = pending.rows[index].build_row()
            if not pending.indices:
                self.under_way.remove(pending)
                rows = [pending.finished[index] for index in range(len(pending.rows))]
                self.pieces.publish([pending.attempt], [rows])
                self._next_lookup_s = 0.0
