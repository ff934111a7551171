"""Episodes whose turns servers write, each at its own pace: nobody waits for the longest turn of others, or
for their slowest tool.

An episode has a thread, which waits, and a process of its environment, which works.  What a server has read
of a conversation lies in its prefix cache: a turn costs what is new.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_sov.infer.engines.server_engine import ServerEngine
from megatron_sov.infer.request import Sampling, StopRule
from megatron_sov.judge.tools.environment import Task
from megatron_sov.judge.tools.episode import Episode, EpisodeLines, GeneratedTurn, begun, left_of, take_turn
from megatron_sov.judge.tools.host import EnvironmentHost
from megatron_sov.judge.tools.playing import EpisodeTable, scored, take_up
from megatron_sov.work.endpoints.token_server import ABORTED, TokenAnswer


@dataclass
class _EpisodeSeat:
    """An episode under way."""

    number: int
    task: Task
    known: list[dict[str, Any]]
    version: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Of what follows: nothing is asked for any more when it has been cut off."""
    is_cut_off: bool = False
    request: str = ""
    """Name of the last one."""


class EpisodeSeats:
    """Plays episodes, so many at a time."""

    def __init__(self, engine: ServerEngine, table: EpisodeTable, sampling: Sampling,
                 end_ids: tuple[int, ...], num: int) -> None:
        """Start nothing yet.

        Args:
            engine: writes the turns.
            table: what is played with.
            sampling: how tokens are chosen; each turn has a length of its own.
            end_ids: tokens that end a turn.
            num: episodes at a time.
        """
        self._engine, self._table, self._sampling, self._end_ids = engine, table, sampling, end_ids
        self._pool = ThreadPoolExecutor(num, "episode")
        self._free: deque[EnvironmentHost] = deque()
        self._hosts = contextlib.ExitStack()
        self._numbers = itertools.count()
        self._seats: dict[str, _EpisodeSeat] = {}

    def begin(self, number: int, task: Task, known: Sequence[dict[str, Any]],
              version: int) -> tuple[str, Future[Episode]]:
        """Return the name of an episode, and the episode when it has ended or was cut off.

        Args:
            number: of the task, for sentences.
            task: what is to be done.
            known: lines of what was played of it before.
            version: of the weights, where servers do not tell it.
        """
        name = str(next(self._numbers))
        self._seats[name] = seat = _EpisodeSeat(number, task, list(known), version)
        future = self._pool.submit(self._play, seat)
        # by whoever ends it; a dict's pop needs no lock
        future.add_done_callback(lambda _: self._seats.pop(name, None))
        return name, future

    def cut_off(self, names: Sequence[str]) -> None:
        """Have episodes given back as they are: in the middle of a turn, or behind the tools that are at
        work."""
        asked = []
        for seat in [seat for name in names if (seat := self._seats.get(name)) is not None]:
            with seat.lock:
                seat.is_cut_off = True
                asked.append(seat.request)
        # those that have been answered are no longer known, and nothing happens
        self._engine.fleet.abort([name for name in asked if name])

    def close(self) -> None:
        """End all episodes and their environments; those that a tool is at work for end behind it, within the
        limit of a call."""
        self.cut_off(list(self._seats))
        self._pool.shutdown(cancel_futures=True)
        self._hosts.close()

    def _play(self, seat: _EpisodeSeat) -> Episode:
        with self._host() as host:
            known = EpisodeLines(seat.known).episodes({seat.number: seat.task}).get(seat.number)
            episode = take_up(host, seat.number, seat.task, known, lambda opening: begun(
                seat.number, seat.task, opening, self._table.encoder, self._table.limits))
            while not episode.end:
                answer = self._ask(seat, episode)
                if answer is None or not self._take_in(seat, episode, answer, host):
                    # The next episode would end the session of this one at a server, in which it may go on.
                    host.end()
                    return episode
            episode.result = scored(host, episode)
            return episode

    @contextlib.contextmanager
    def _host(self) -> Iterator[EnvironmentHost]:
        """Give an environment that nobody plays in; those that have played once have their process still."""
        try:
            host = self._free.pop()
        except IndexError:
            host = self._hosts.enter_context(EnvironmentHost(self._table.asked, self._table.limits))
        try:
            yield host
        finally:
            self._free.append(host)

    def _ask(self, seat: _EpisodeSeat, episode: Episode) -> TokenAnswer | None:
        """Return what comes behind an episode; None: it has been cut off.

        Raises:
            UserError: no server answers any more.
        """
        left = left_of(episode, self._table.limits)
        [request] = self._engine.requests([episode.ids], [replace(self._sampling, max_new_tokens=left)],
                                          self._end_ids)
        with seat.lock:
            if seat.is_cut_off:
                return None
            seat.request = request.name
            future = self._engine.fleet.submit(request)
        [answer] = future.result()
        return answer

    def _take_in(self, seat: _EpisodeSeat, episode: Episode, answer: TokenAnswer,
                 host: EnvironmentHost) -> bool:
        """Make a turn of an answer; returns False where it is only a part of one."""
        ids = StopRule(self._end_ids).cut(answer.tokens)
        routes = None
        if self._sampling.with_routes:
            routes = self._engine.routes_of(answer, len(episode.ids) + len(ids) - 1)
        turn = episode.grow(GeneratedTurn(ids, answer.logprobs[:len(ids)],
                                          answer.token_versions(len(ids), seat.version), routes))
        is_whole = answer.reason != ABORTED or bool(set(turn.ids[-1:]) & set(self._end_ids))
        if not is_whole and len(turn.ids) < left_of(episode, self._table.limits):
            episode.begun = turn if turn.ids else None
            return False
        episode.turns.append(take_turn(episode, turn, host, self._table.encoder, self._table.limits))
        return True
