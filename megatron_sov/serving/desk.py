"""Where requests wait, between the thread of the server and the one that the model runs on."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_sov.generate.request import Written
from megatron_sov.serving.bodies import Question
from megatron_sov.serving.refusals import Refused

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
    echoed: tuple[tuple[int, ...], ...] = ()
    """Ids of each prompt, where answers begin with it."""


@dataclass(frozen=True)
class Wrote:
    """A token of an answer."""

    sequence: int
    """Place of the answer in its request: that of its prompt times the choices, and of its choice."""
    token: int
    """Its id."""
    logprob: float
    """Its log-probability."""
    reason: str | None
    """Why the answer ends with it; None: it goes on."""
    ranked: tuple[Written, ...] = ()
    """What is asked of probable tokens, see `News`."""


Event = Begun | Wrote | Refused


@dataclass(eq=False)
class Ticket:
    """A request that waits or is answered."""

    question: Question
    """What is asked."""
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    """What comes of it, for the server's thread."""
    has_left: bool = False
    """Whether nobody waits for it any more."""


class Desk:
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

    def submit(self, question: Question) -> Ticket:
        """Take a request in.

        Raises:
            Refused: too many wait, or the server is about to end.
        """
        with self._changed:
            if self._closed is not None:
                raise Refused(503, self._closed)
            if question.num_sequences > self._max_waiting:
                raise Refused(400, f"{question.num_sequences} answers are asked for, and at most "
                                   f"{self._max_waiting} may wait here; send fewer at a time", "n")
            if self.num_waiting + question.num_sequences > self._max_waiting:
                raise Refused(429, f"{self.num_waiting} answers wait already, of at most "
                                   f"{self._max_waiting}; try again in {RETRY_S} s")
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
        self._loop.call_soon_threadsafe(_deliver, told)


def _deliver(told: Sequence[tuple[Ticket, Event]]) -> None:
    for ticket, event in told:
        ticket.events.put_nowait(event)
