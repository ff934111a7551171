"""Requests of all clients, and the one thread that has the model answer them together."""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from megatron_sov.infer.engines.live_generation import BatchChanges, NewSequence, TokenEvent
from megatron_sov.serve.bodies import BodyReader, ReadBody, RefusedRequest, ServedQuestion

# Where requests wait, between the thread of the server and the one that the model runs on.

RETRY_S = 5
"""After which a client that was turned away may come back."""


@dataclass(frozen=True)
class Begun:
    """A request's prompts have been read as tokens."""

    prompt_tokens: tuple[int, ...]
    """Of each prompt."""
    in_thoughts: bool
    """Whether the template has opened the thoughts that the answer begins with."""
    end_ids: tuple[int, ...]
    """Tokens that end an answer."""


@dataclass(frozen=True)
class Wrote:
    """A token of an answer."""

    sequence: int
    """Place of the answer in its request: that of its prompt times the choices, and of its choice."""
    token: int
    """Its id."""
    reason: str | None
    """Why the answer ends with it; None: it goes on."""


Event = Begun | Wrote | RefusedRequest


@dataclass(eq=False)
class Ticket:
    """A request that waits or is answered."""

    question: ServedQuestion
    """What is asked."""
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    """What comes of it, for the server's thread."""
    has_left: bool = False
    """Whether nobody waits for it any more."""


class RequestQueue:
    """Takes requests in on the server's thread and hands them to the model's.

    Args:
        max_waiting: answers that may wait for the model.
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = threading.Condition()
        self._tickets = deque[Ticket]()
        self._left: list[tuple[Ticket, int]] = []
        self._closed: str | None = None
        self.num_waiting = 0
        """Answers that the model has not begun."""

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Tell on which loop the server runs, before the first request."""
        self._loop = loop

    # on the server's thread

    @property
    def closed(self) -> str | None:
        """Why nothing is taken in; None: something is."""
        return self._closed

    def submit(self, question: ServedQuestion) -> Ticket:
        """Take a request in.

        Raises:
            Refused: too many wait, or the server is about to end.
        """
        with self._changed:
            if self._closed is not None:
                raise RefusedRequest(503, self._closed)
            if question.num_sequences > self._max_waiting:
                raise RefusedRequest(400, f"{question.num_sequences} answers are asked for, and at most "
                                          f"{self._max_waiting} may wait here; send fewer at a time", "n")
            if self.num_waiting + question.num_sequences > self._max_waiting:
                raise RefusedRequest(429, f"{self.num_waiting} answers wait already, of at most "
                                          f"{self._max_waiting}; try again in {RETRY_S} s")
            # Under the same lock as the check, so that two requests cannot take one place.
            ticket = Ticket(question)
            self._tickets.append(ticket)
            self.num_waiting += question.num_sequences
            self._changed.notify()
        return ticket

    def leave(self, ticket: Ticket, sequence: int | None = None) -> None:
        """Say that nobody waits for a request any more, or for one of its answers."""
        with self._changed:
            if sequence is None:
                ticket.has_left = True
            places = range(ticket.question.num_sequences) if sequence is None else [sequence]
            self._left += [(ticket, place) for place in places]
            self._changed.notify()

    # on the model's thread

    def next(self, wait_s: float = 0.0) -> Ticket | None:
        """Return the request that waits longest, if any; waits for one for so long, or until one leaves."""
        with self._changed:
            if not self._tickets and wait_s:
                self._changed.wait(wait_s)
            # Those whose client has left are passed over, and no longer count as waiting.
            while self._tickets:
                ticket = self._tickets.popleft()
                if not ticket.has_left:
                    return ticket
                self.num_waiting -= ticket.question.num_sequences
        return None

    def began(self, num_sequences: int) -> None:
        """Take note that answers no longer wait."""
        with self._changed:
            self.num_waiting -= num_sequences

    def taken_back(self) -> list[tuple[Ticket, int]]:
        """Return the answers for which nobody waits any more, each once."""
        with self._changed:
            # Taken as a whole: what leaves from now on is for the next look.
            left, self._left = self._left, []
        return left

    def close(self, why: str) -> None:
        """Take nothing in any more; what waits is still answered."""
        with self._changed:
            self._closed = why

    def tell(self, told: Sequence[tuple[Ticket, Event]]) -> None:
        """Hand over what has come of requests."""
        if self._loop is None:
            raise RuntimeError("a desk that is not open has no requests")
        # asyncio queues belong to the server's loop, and are not safe from this thread.
        self._loop.call_soon_threadsafe(_deliver, told)


def _deliver(told: Sequence[tuple[Ticket, Event]]) -> None:
    for ticket, event in told:
        ticket.events.put_nowait(event)


# Between the desk and the model: reads questions as tokens, has them join what is under way, tells what was
# written.

WAIT_S = 0.5
"""For which the model's thread waits for a request before it looks at other things."""
DRAIN_S = 120.0
"""After a wish to stop, for which answers are written on."""
CLOSING = "the server is about to end; ask another one, or this one when it is back"


class Clerk:
    """An office of `continue_live`, on the first process's main thread.

    Args:
        desk: where requests wait.
        reader: of the model.
        wants_stop: says why to stop in good order; None: go on.
        must_stop: whether to stop at once.
    """

    def __init__(self, desk: RequestQueue, reader: BodyReader, wants_stop: Callable[[], str | None],
                 must_stop: Callable[[], bool]) -> None:
        self._desk, self._reader = desk, reader
        self._wants_stop, self._must_stop = wants_stop, must_stop
        self._ready = deque[NewSequence]()
        self._under_way: dict[int, tuple[Ticket, int]] = {}
        self._next_number = 0
        self._deadline_s = float("inf")

    def choose_changes(self, num_free: int, is_idle: bool) -> BatchChanges:
        """Return who joins and who leaves, see `Office`."""
        # First who leaves, so that no slot is given to an answer that nobody wants.
        leaving = self._leaving()
        if self._desk.closed is None and self._wants_stop() is not None:
            # Nothing new comes in; what waits and what is written has until the deadline.
            self._desk.close(CLOSING)
            self._deadline_s = time.monotonic() + DRAIN_S
        joining: list[NewSequence] = []
        # Only while nothing runs: else the wait would hold up every answer under way.
        wait_s = WAIT_S if is_idle and self._desk.closed is None else 0.0
        while len(joining) < num_free:
            if not self._ready and not self._read_next(wait_s if not joining else 0.0):
                break
            if self._ready:
                joining.append(self._ready.popleft())
                self._desk.began(1)
        idle = is_idle and not joining
        ends = self._must_stop() or (self._desk.closed is not None
                                     and (idle or time.monotonic() > self._deadline_s))
        if ends:
            self._give_up()
            return BatchChanges(ends=True)
        return BatchChanges(joining, leaving)

    def report_tokens(self, news: Sequence[TokenEvent]) -> None:
        """Tell clients what a row has brought, see `Office`."""
        told: list[tuple[Ticket, Event]] = []
        for one in news:
            ticket, sequence = self._under_way[one.number]
            told.append((ticket, Wrote(sequence, one.token, one.reason)))
            if one.reason is not None:
                del self._under_way[one.number]
        self._desk.tell(told)

    def _read_next(self, wait_s: float) -> bool:
        """Read the request that waits longest as tokens; returns whether there was one."""
        ticket = self._desk.next(wait_s)
        if ticket is None:
            return False
        question = ticket.question
        try:
            read = self._read(ticket)
        except RefusedRequest as e:
            self._desk.began(question.num_sequences)
            self._desk.tell([(ticket, e)])
            return True
        self._desk.tell([(ticket, Begun(tuple(map(len, read.prompts)), read.in_thoughts, read.end_ids))])
        # Answers of one request are sequences of their own, prompt by prompt.
        for place in range(question.num_sequences):
            prompt, choice = divmod(place, question.num_choices)
            sampling = replace(question.sampling, max_new_tokens=read.limits[prompt])
            self._ready.append(NewSequence(self._next_number, read.prompts[prompt], sampling, choice,
                                       read.end_ids))
            self._under_way[self._next_number] = (ticket, place)
            self._next_number += 1
        return True

    def _read(self, ticket: Ticket) -> ReadBody:
        try:
            return self._reader.read(ticket.question)
        except RefusedRequest:
            raise
        except Exception:  # of one request, for which the others must not be left
            traceback.print_exc()
            raise RefusedRequest(500,
                                 "the prompt cannot be read, by a defect; the server's own output says which"
                                 ) from None

    def _leaving(self) -> list[int]:
        """Return the sequences under way for which nobody waits; those that have not begun are forgotten."""
        # Tickets are compared by identity (`eq=False`), so a pair names one answer.
        left = set(self._desk.taken_back())
        if not left:
            return []
        numbers = {number for number, asked in self._under_way.items() if asked in left}
        # Those that never joined are forgotten here; the others must leave on every process.
        waiting = {joining.number for joining in self._ready} & numbers
        self._ready = deque(joining for joining in self._ready if joining.number not in waiting)
        self._desk.began(len(waiting))
        for number in numbers:
            del self._under_way[number]
        return sorted(numbers - waiting)

    def _give_up(self) -> None:
        self._desk.close(CLOSING)
        # Clients wait for a last event each, whether their answers have begun or not.
        tickets = {ticket for ticket, _ in self._under_way.values()}
        while (ticket := self._desk.next()) is not None:
            tickets.add(ticket)
        self._desk.tell([(ticket, RefusedRequest(503, CLOSING)) for ticket in tickets])
