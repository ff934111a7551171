"""Writes rounds by engine servers: a request is for one response, for some short ones of a prompt, or for a
turn of an episode, a queue over whole rounds keeps the servers full, and a piece is published as soon as its
own rows are there.

Nobody waits for the slowest: while the last responses of a round are written, those of later rounds
(`rollout.max_staleness`) are under way, and go on by the next weights when these come.  Each token has the
version that wrote it.
"""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from megatron_sov.base.errors import UserError
from megatron_sov.convert import export_weights, to_hf
from megatron_sov.engine.parallel.world import on_main
from megatron_sov.infer.decoder.logprobs import Question, answer_logprobs
from megatron_sov.infer.engines.server_engine import ServerEngine, ServerPlaces, serving_engine
from megatron_sov.infer.engines.server_process import EngineServers
from megatron_sov.infer.engines.target import find_target
from megatron_sov.infer.request import StopRule, Tokens
from megatron_sov.model.config.post_training import RolloutConfig
from megatron_sov.model.pretrained import CONFIG
from megatron_sov.post.rl.episodes import AskedEpisode, Episodes
from megatron_sov.post.rl.generate import PieceQueue, SampleAttempt, Take, Writer
from megatron_sov.post.rl.responses import ResponseSource, WrittenTokens
from megatron_sov.post.rl.seats import EpisodeSeats
from megatron_sov.rollouts.rows import LENGTH, STOP, UNFINISHED, Rollout
from megatron_sov.runs.rounds import Policy
from megatron_sov.train.stages.feed import FeedView
from megatron_sov.work.endpoints.token_server import ABORTED, TokenAnswer, TokenRequest
from megatron_sov.work.progress.progress_bar import create_bar

STEP_S = 5.0
"""Of writing between two looks at what else is to be done: other processes wait for a message meanwhile."""
LOOK_S = 1.0
"""Between two looks at what other jobs have left to do."""
AHEAD = 2
"""Responses that are asked for, as multiples of those that servers write at a time, where other jobs write
into the store too, or a deadline runs: more would only be claimed and lie in the queue."""
KNOWN_TOKENS = 256
"""Of a prompt, whose log-probabilities are compared after an update."""
MAX_GAP_NATS = 0.25
"""Mean difference of a known text's log-probabilities between trainer and engine, per token: bf16 stays far
below, and a layer that was wrongly updated is above."""


@dataclass(frozen=True)
class RowUnderWay:
    """A row that is being written."""

    name: str
    """By which it can be cut off."""
    future: Future[Any]
    """Ends when it is written."""
    row: Callable[[], Rollout]
    """Gives it then."""
    is_begun: Callable[[], bool]
    """Whether a server has taken it, or an episode has a seat: what waits for one is not late."""


class RowRequests(Protocol):
    """Has servers write rows, each by itself."""

    rollout: RolloutConfig

    def begin(self, attempt: SampleAttempt) -> list[RowUnderWay]:
        """Ask for all rows of an attempt, in order.

        Raises:
            UserError: a prompt is too long, or the template refuses it.
        """
        ...

    def cut_off(self, names: Sequence[str]) -> None:
        """End rows where they are; what was written of them stays."""
        ...

    def close(self) -> None:
        """Give up all that is under way."""
        ...


class ResponseRequests:
    """Plain responses: a request for each row, or for some that are short."""

    def __init__(self, engine: ServerEngine, source: ResponseSource, *, are_joined: bool = False) -> None:
        self._engine, self._source, self.rollout = engine, source, source.rollout
        self._are_joined = are_joined

    def begin(self, attempt: SampleAttempt) -> list[RowUnderWay]:
        rows = self._source.begin(attempt)
        asked = self._engine.requests([[*row.prompt_tokens.tolist(), *row.tokens.tolist()] for row in rows],
                                      [self._source.sampling_of(row) for row in rows],
                                      self._source.asker.end_ids, are_joined=self._are_joined)
        left = iter(rows)
        return [one for request in asked
                for one in self._asked(attempt, request, list(islice(left, request.num_answers)))]

    def cut_off(self, names: Sequence[str]) -> None:
        self._engine.fleet.abort(names)

    def close(self) -> None:
        """Leave requests to the fleet, which ends with the engine."""

    def _asked(self, attempt: SampleAttempt, request: TokenRequest, rows: list[Rollout]) -> list[RowUnderWay]:
        """Ask for rows that one request is for; each has a future of its own, which ends with the
        request's."""
        answers = self._engine.fleet.submit(request)
        own: list[Future[Any]] = [Future() for _ in rows]

        def settle(_: Future[Any]) -> None:
            for future in own:
                future.set_result(None)

        answers.add_done_callback(settle)
        return [RowUnderWay(request.name, future, partial(self._row, attempt, row, answers, place),
                            answers.running)
                for place, (future, row) in enumerate(zip(own, rows, strict=True))]

    def _row(self, attempt: SampleAttempt, row: Rollout, answers: Future[list[TokenAnswer]], place: int
             ) -> Rollout:
        return self._grown(attempt, row, answers.result()[place])

    def _grown(self, attempt: SampleAttempt, row: Rollout, answer: TokenAnswer) -> Rollout:
        written = StopRule(self._source.asker.end_ids).cut(answer.tokens)
        reason = {STOP: STOP, LENGTH: LENGTH, ABORTED: UNFINISHED}[answer.reason]
        routes = None
        if self._source.with_routes:
            read = len(row.prompt_tokens) + len(row.tokens) + len(written) - 1
            routes = self._engine.routes_of(answer, read)
        return self._source.grown(row, attempt, WrittenTokens(
            written, answer.logprobs[:len(written)], reason,
            answer.token_versions(len(written), attempt.policy.step), routes))


class EpisodeRequests:
    """Episodes with tools: a request for each turn of each row."""

    def __init__(self, engine: ServerEngine, episodes: Episodes, room: int) -> None:
        self._episodes, self.rollout = episodes, episodes.rollout
        self._seats = EpisodeSeats(engine, episodes.table, episodes.sampling, episodes.end_ids,
                                   max(room, episodes.table.parallel))

    def begin(self, attempt: SampleAttempt) -> list[RowUnderWay]:
        return [self._asked(attempt, number, asked)
                for number, asked in enumerate(self._episodes.asked(attempt))]

    def cut_off(self, names: Sequence[str]) -> None:
        self._seats.cut_off(names)

    def close(self) -> None:
        self._seats.close()

    def _asked(self, attempt: SampleAttempt, number: int, asked: AskedEpisode) -> RowUnderWay:
        began_s = time.time()
        name, future = self._seats.begin(number, asked.task, asked.lines(number), attempt.policy.step)
        return RowUnderWay(name, future,
                           lambda: self._episodes.row(future.result(), asked, attempt, began_s),
                           future.running)


def row_requests(engine: ServerEngine, writer: Writer, room: int, *, is_live: bool = False) -> RowRequests:
    """Return what has servers write the rows of a writer, so many at a time; `is_live`: for the run that
    changes their weights itself."""
    if isinstance(writer, Episodes):
        return EpisodeRequests(engine, writer, room)
    assert isinstance(writer, ResponseSource), f"{type(writer).__name__} asks no servers"
    rollout = writer.rollout
    # Neither other weights nor a deadline come while a round is written, and no place waits for another
    # response.
    are_joined = (is_live and not rollout.max_staleness and not rollout.deadline_s
                  and rollout.prompts_per_round * rollout.samples_per_prompt <= room)
    return ResponseRequests(engine, writer, are_joined=are_joined)


@dataclass
class AttemptUnderWay:
    """A piece whose rows are being written."""

    attempt: SampleAttempt
    asked: dict[Future[Any], int]
    """Rows to come -> place among the rows."""
    rows: list[RowUnderWay]
    """All of them."""
    ends_s: dict[int, float] = field(default_factory=dict)
    """Rows that are begun -> when the deadline of each comes."""
    done: dict[int, Rollout] = field(default_factory=dict)
    cut_off: set[int] = field(default_factory=set)


@dataclass
class ResponseQueue:
    """What is under way; of one process, which has the servers."""

    requests: RowRequests
    desk: PieceQueue
    take: Take | None
    """Gives the servers another policy; None: they always have that which writes."""
    room: int
    """Responses that servers write at a time."""
    clock_s: Callable[[], float] = time.monotonic
    under_way: list[AttemptUnderWay] = field(default_factory=list)
    _held: int = 0
    """Step of the policy that the servers have."""
    _next_look_s: float = 0.0
    _answered: SimpleQueue[Future[Any]] = field(default_factory=SimpleQueue)

    def begin(self, rounds: range, asked_to_stop: Callable[[], bool]) -> None:
        """Ask for what these rounds miss, which a policy that is there writes.

        Args:
            rounds: beside those that were begun before.
            asked_to_stop: looked at from now on.
        """
        self.desk.asked_to_stop = asked_to_stop
        self.desk.missing.add_rounds(rounds)
        # the look before found nothing left, and the next one would only come when its time has passed
        is_asked = not asked_to_stop() and self._fill() and bool(self.under_way)
        self._next_look_s = self.clock_s() + LOOK_S if is_asked else 0.0

    def advance(self, limit_s: float, needed: Callable[[], bool]) -> bool:
        """Ask for what is missing, take in what comes and publish what is complete, for so many seconds.

        Args:
            limit_s: after which it comes back.
            needed: whether something that is waited for is still under way or missing.

        Returns:
            Whether to go on: what is needed is not complete, and is not waited for in vain.
        """
        ends_s = self.clock_s() + limit_s
        while needed():
            if self.desk.asked_to_stop() or (self._fills() and not self._fill() and not self.under_way):
                return False
            left_s = ends_s - self.clock_s()
            if self.under_way:
                self._take_in(self._answers(min(max(left_s, 0.0), LOOK_S)))
            elif left_s > 0:
                time.sleep(min(left_s, LOOK_S))
            self._cut_off()
            if left_s <= 0:
                return True
        return False

    def close(self) -> None:
        """Give up what is under way."""
        self.requests.close()
        self.desk.missing.leave()

    def _fills(self) -> bool:
        """Return whether it is time to look for more: behind each piece that was published, and now and then,
        since a look costs a look at the store for each piece."""
        if self.clock_s() < self._next_look_s:
            return False
        self._next_look_s = self.clock_s() + LOOK_S
        return True

    def _fill(self) -> bool:
        """Claim and ask for more, while there is room; returns False when there is nothing more to come."""
        num_more = self._most() - sum(len(piece.asked) for piece in self.under_way)
        if num_more <= 0:
            return True
        found = self.desk.next(num_more, is_busy=bool(self.under_way))
        if found is None:
            return False
        if isinstance(found, str):
            if self.take is None and not self.under_way and self.desk.missing.is_stuck:
                # the next policy learns from this very round
                raise UserError(f"rollout.deadline_s = {self.requests.rollout.deadline_s:g}: some responses "
                                "did not get one token in a whole attempt; raise it, or ask for fewer at a "
                                "time (rollout.piece_prompts)")
            return True
        policy = found[0].policy
        if self.take is not None and policy.step != self._held:
            self.take(policy)
            self._held = policy.step
        for attempt in found:
            self._ask(attempt)
        return True

    def _most(self) -> int:
        """Return how many responses are asked for at a time."""
        if self.take is None and not self.requests.rollout.deadline_s:
            # while the trainer learns nobody asks for more, and servers are to have work all the time
            return sys.maxsize
        return AHEAD * self.room

    def _ask(self, attempt: SampleAttempt) -> None:
        rows = self.requests.begin(attempt)
        for row in rows:
            row.future.add_done_callback(self._answered.put)
        self.under_way.append(AttemptUnderWay(attempt, {row.future: n for n, row in enumerate(rows)}, rows))

    def _cut_off(self) -> None:
        """End the responses whose deadline has come."""
        deadline_s, now_s = self.requests.rollout.deadline_s, self.clock_s()
        for piece in self.under_way if deadline_s else ():
            late = set()
            for number in piece.asked.values():
                if number not in piece.ends_s and piece.rows[number].is_begun():
                    piece.ends_s[number] = now_s + deadline_s
                if number not in piece.cut_off and now_s >= piece.ends_s.get(number, math.inf):
                    late.add(number)
            piece.cut_off |= late
            if late:
                self.requests.cut_off([piece.rows[number].name for number in sorted(late)])

    def _answers(self, limit_s: float) -> set[Future[Any]]:
        """Return the answers that have come, after so many seconds at the latest."""
        done: set[Future[Any]] = set()
        with contextlib.suppress(Empty):
            done.add(self._answered.get(timeout=limit_s))
            while True:
                done.add(self._answered.get_nowait())
        return done

    def _take_in(self, done: set[Future[Any]]) -> None:
        for piece in list(self.under_way):
            for future in done & piece.asked.keys():
                number = piece.asked.pop(future)
                piece.done[number] = piece.rows[number].row()
            if not piece.asked:
                self.under_way.remove(piece)
                self.desk.publish([piece.attempt], [[piece.done[i] for i in range(len(piece.rows))]])
                self._next_look_s = 0.0


def write_by_requests(requests: RowRequests, take: Take, desk: PieceQueue, room: int) -> dict[str, Any]:
    """Write what is missing until nothing is, by checkpoints as they come; returns what `desk.summary`
    says."""
    queue = ResponseQueue(requests, desk, take, room)
    with create_bar("write", desk.missing.num_pieces, "piece") as bar:
        try:
            while queue.advance(STEP_S, lambda: True):
                bar.update(desk.missing.num_done - bar.n)
        finally:
            # After a failure too: a claim that stays would hold other jobs up until its lease ends.
            queue.close()
    return desk.summary


@dataclass
class LiveServers:
    """Servers that write for a run, by its live weights; one object on each process, of which the first has
    the servers."""

    name: str
    """Of the engine."""
    start: Path
    """What the run starts from: a checkpoint, or a Hugging Face folder."""
    places: ServerPlaces
    settings: EngineServers
    longest: int
    """Tokens of the longest sequence."""
    vocab_size: int
    with_routes: bool
    meters: dict[str, float] = field(default_factory=dict)
    engine: ServerEngine | None = None
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    _opening: Future[None] | None = None
    _opened: Any = None
    _over: threading.Event = field(default_factory=threading.Event)
    """Ends the servers, also while they are being started."""
    _held: int | None = None
    """Step of the weights that the servers have; None: not known, for somebody else may have asked them."""

    @property
    def is_open(self) -> bool:
        return self.engine is not None and self._opening is None

    def is_opening(self, limit_s: float) -> bool:
        """Return whether the servers are still being started, on the first process, after so many seconds.

        Raises:
            UserError: they cannot be.
        """
        if self.engine is None and self._opening is None:
            self._opening = self._pool.submit(self._open)
        if self._opening is not None and wait([self._opening], limit_s).done:
            opening, self._opening = self._opening, None
            opening.result()
        return self._opening is not None

    def _open(self) -> None:
        target = find_target(self.start)
        model = target.path if target.is_hf else self.places.logs / "model"
        if not (model / CONFIG).is_file():
            # servers read its config, and begin with its weights
            to_hf(target.path, model)
        self._opened = serving_engine(self.name, model, self.vocab_size, self.longest, self.settings,
                                      self.places, with_routes=self.with_routes, over=self._over)
        self.engine = self._opened.__enter__()
        if not self.places.urls:
            self._held = 0

    def push(self, view: FeedView, policy: Policy) -> None:
        """Give the servers the live weights; called by all processes together.

        Args:
            view: the run, whose model is the policy.
            policy: which its weights are.

        Raises:
            UserError: the servers do not take them.
        """
        began_s = time.monotonic()
        if on_main(view.world, lambda: self._held != policy.step):
            self._send(view, policy)
        self.meters = {"push_s": time.monotonic() - began_s}

    def check(self, view: FeedView, policy: Policy, known: Tokens) -> None:
        """See that the servers have the live weights; called by all processes together, also while the
        servers write.

        Args:
            view: the run, whose model is the policy.
            policy: which its weights are.
            known: a text, whose log-probabilities trainer and servers must agree on.

        Raises:
            UserError: the servers say something else of the text.
        """
        text = list(known[:KNOWN_TOKENS])
        if len(text) > 1:
            [[own]] = answer_logprobs(view.policy, [Question(text[:1], [text[1:]])])
            on_main(view.world, lambda: self._compare(text, own, policy))

    def close(self) -> None:
        self._over.set()  # whoever waits for a server at an address waits for half an hour
        self._pool.shutdown()
        if self._opened is not None:
            self._opened.__exit__(None, None, None)
            self._opened = self.engine = None

    def _send(self, view: FeedView, policy: Policy) -> None:
        view.policy.model.finish_param_gather()
        weights, problem = export_weights(view.policy.model), ""
        if view.world.is_main:
            assert self.engine is not None, "the servers are not open"
            try:
                self.engine.update(weights, policy.step)
                self._held = policy.step
            except UserError as e:
                problem = str(e)
        else:
            for _ in weights:  # takes part in gathering, and is given nothing
                pass
        on_main(view.world, partial(_raise, problem))

    def _compare(self, text: Sequence[int], own: Sequence[float], policy: Policy) -> None:
        assert self.engine is not None, "the servers are not open"
        gaps = [sum(abs(a - b) for a, b in zip(told, own, strict=True)) / len(own)
                for told in self.engine.fleet.score(text)]
        gap = self.meters["engine_gap_nats"] = max(gaps, default=0.0)
        if gap > MAX_GAP_NATS:
            raise UserError(f"--engine {self.name}: a server's log-probabilities of a known text are "
                            f"{gap:.3g} nats a token from the trainer's at step "
                            f"{policy.step} (at most {MAX_GAP_NATS:g}): it has not taken the weights, or "
                            "computes this model otherwise, and would not write as this policy")


def _raise(problem: str) -> None:
    if problem:
        raise UserError(problem)

