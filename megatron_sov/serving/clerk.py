"""Between the desk and the model: reads questions as tokens, has them join what is under way, tells what was
written."""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from megatron_sov.generate.live import Joining, News, Orders
from megatron_sov.serving.desk import Begun, Desk, Event, Ticket, Wrote
from megatron_sov.serving.reading import Read, Reader
from megatron_sov.serving.refusals import Refused

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

    def __init__(self, desk: Desk, reader: Reader, wants_stop: Callable[[], str | None],
                 must_stop: Callable[[], bool]) -> None:
        self._desk, self._reader = desk, reader
        self._wants_stop, self._must_stop = wants_stop, must_stop
        self._ready = deque[Joining]()
        self._under_way: dict[int, tuple[Ticket, int]] = {}
        self._next_number = 0
        self._deadline_s = float("inf")

    def orders(self, num_free: int, is_idle: bool) -> Orders:
        """Return who joins and who leaves, see `Office`."""
        leaving = self._leaving()
        if self._desk.closed is None and self._wants_stop() is not None:
            self._desk.close(CLOSING)
            self._deadline_s = time.monotonic() + DRAIN_S
        joining: list[Joining] = []
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
            return Orders(ends=True)
        return Orders(joining, leaving)

    def tell(self, news: Sequence[News]) -> None:
        """Tell clients what a row has brought, see `Office`."""
        told: list[tuple[Ticket, Event]] = []
        for one in news:
            ticket, sequence = self._under_way[one.number]
            told.append((ticket, Wrote(sequence, one.token, one.logprob, one.reason, one.ranked)))
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
        except Refused as e:
            self._desk.began(question.num_sequences)
            self._desk.tell([(ticket, e)])
            return True
        self._desk.tell([(ticket, Begun(tuple(map(len, read.prompts)), read.in_thoughts, read.end_ids,
                                         tuple(map(tuple, read.prompts)) if question.echoes else ()))])
        for place in range(question.num_sequences):
            prompt, choice = divmod(place, question.num_choices)
            sampling = replace(question.sampling, max_new_tokens=read.limits[prompt])
            self._ready.append(Joining(self._next_number, read.prompts[prompt], sampling, choice,
                                       read.end_ids, question.tells))
            self._under_way[self._next_number] = (ticket, place)
            self._next_number += 1
        return True

    def _read(self, ticket: Ticket) -> Read:
        try:
            return self._reader.read(ticket.question)
        except Refused:
            raise
        except Exception:  # of one request, for which the others must not be left
            traceback.print_exc()
            raise Refused(500, "the prompt cannot be read, by a defect; the server's own output says which"
                          ) from None

    def _leaving(self) -> list[int]:
        """Return the sequences under way for which nobody waits; those that have not begun are forgotten."""
        left = set(self._desk.taken_back())
        if not left:
            return []
        numbers = {number for number, asked in self._under_way.items() if asked in left}
        waiting = {joining.number for joining in self._ready} & numbers
        self._ready = deque(joining for joining in self._ready if joining.number not in waiting)
        self._desk.began(len(waiting))
        for number in numbers:
            del self._under_way[number]
        return sorted(numbers - waiting)

    def _give_up(self) -> None:
        """Tell those who still wait that nothing more comes."""
        self._desk.close(CLOSING)
        tickets = {ticket for ticket, _ in self._under_way.values()}
        while (ticket := self._desk.next()) is not None:
            tickets.add(ticket)
        self._desk.tell([(ticket, Refused(503, CLOSING)) for ticket in tickets])
