"""Queue requests from HTTP clients, and schedule their sequences into the running batch."""

import asyncio
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from megatron_sov.infer.engines.live_generation import BatchChanges, NewSequence, TokenEvent
from megatron_sov.serve.bodies import CompletionRequest, EncodedRequest, RefusedRequest, RequestEncoder

RETRY_AFTER_S = 5
"""`Retry-After` for refused clients."""
WAIT_S = 0.5
"""Longest wait of the model's thread for a request."""
DRAIN_TIMEOUT_S = 120.0
"""Time for unfinished answers after a signal."""
CLOSING = "the server is shutting down; use another server, or retry after a restart"


@dataclass(frozen=True)
class RequestStarted:
    """Event: the prompts of a request are encoded."""

    prompt_tokens: tuple[int, ...]
    in_thoughts: bool
    """As in `EncodedRequest`."""
    end_ids: tuple[int, ...]
    """Stop tokens."""


@dataclass(frozen=True)
class TokenWritten:
    """Event: an answer has a new token."""

    sequence: int
    """Index of the answer: prompt times `num_choices` plus choice."""
    token: int
    reason: str | None
    """Finish reason, if the token is the last."""


Event = RequestStarted | TokenWritten | RefusedRequest


@dataclass(eq=False)
class QueuedRequest:
    request: CompletionRequest
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    """Events for the HTTP thread."""
    is_abandoned: bool = False
    """Whether the client disconnected."""


class RequestQueue:
    """Passes requests from the HTTP thread to the model's thread, and events back.

    Args:
        max_waiting: limit on answers that wait for the model.
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = threading.Condition()
        self._requests = deque[QueuedRequest]()
        self._abandoned: list[tuple[QueuedRequest, int]] = []
        self._close_reason: str | None = None
        self.num_waiting = 0
        """Answers in the queue."""

    def bind_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        """Set the HTTP thread's event loop, before the first request."""
        self._loop = loop

    @property
    def close_reason(self) -> str | None:
        """Reason for refusing new requests; None while open."""
        return self._close_reason

    def submit(self, request: CompletionRequest) -> QueuedRequest:
        """Add a request (HTTP thread).

        Raises:
            RefusedRequest: the queue is full or closed.
        """
        with self._changed:
            if self._close_reason is not None:
                raise RefusedRequest(503, self._close_reason)
            if request.num_sequences > self._max_waiting:
                raise RefusedRequest(400, f"{request.num_sequences} answers are asked for, and at most "
                                          f"{self._max_waiting} may wait here; send fewer at a time", "n")
            if self.num_waiting + request.num_sequences > self._max_waiting:
                raise RefusedRequest(429, f"{self.num_waiting} answers wait already, of at most "
                                          f"{self._max_waiting}; try again in {RETRY_AFTER_S} s")
            queued = QueuedRequest(request)
            self._requests.append(queued)
            self.num_waiting += request.num_sequences
            self._changed.notify()
        return queued

    def abandon_request(self, queued: QueuedRequest, sequence: int | None = None) -> None:
        """Stop generating a request, or a single answer (HTTP thread)."""
        with self._changed:
            if sequence is None:
                queued.is_abandoned = True
            sequences = range(queued.request.num_sequences) if sequence is None else [sequence]
            self._abandoned += [(queued, index) for index in sequences]
            self._changed.notify()

    def pop_request(self, wait_s: float = 0.0) -> QueuedRequest | None:
        """Remove and return the oldest request (model's thread); wait up to `wait_s` for a change."""
        with self._changed:
            if not self._requests and wait_s:
                self._changed.wait(wait_s)
            while self._requests:
                queued = self._requests.popleft()
                if not queued.is_abandoned:
                    return queued
                self.num_waiting -= queued.request.num_sequences
        return None

    def mark_started(self, num_sequences: int) -> None:
        """Count answers as no longer waiting (model's thread)."""
        with self._changed:
            self.num_waiting -= num_sequences

    def pop_abandoned(self) -> list[tuple[QueuedRequest, int]]:
        """Remove and return abandoned answers (model's thread)."""
        with self._changed:
            abandoned, self._abandoned = self._abandoned, []
        return abandoned

    def close(self, reason: str) -> None:
        """Refuse new requests; queued requests are still answered."""
        with self._changed:
            self._close_reason = reason

    def deliver_events(self, events: Sequence[tuple[QueuedRequest, Event]]) -> None:
        """Put events into the requests' queues (model's thread)."""
        if self._loop is None:
            raise RuntimeError("the queue has no event loop; call bind_loop first")
        # asyncio queues belong to the event loop and are not thread-safe
        self._loop.call_soon_threadsafe(_put_events, events)


def _put_events(events: Sequence[tuple[QueuedRequest, Event]]) -> None:
    for queued, event in events:
        queued.events.put_nowait(event)


class BatchScheduler:
    """A `RequestSource` on the main thread of the first rank.

    Args:
        queue: waiting requests.
        encoder: tokenizer and chat template.
        get_stop_reason: reason for an orderly stop; None to continue.
        must_stop: whether to stop at once.
    """

    def __init__(self, queue: RequestQueue, encoder: RequestEncoder,
                 get_stop_reason: Callable[[], str | None], must_stop: Callable[[], bool]) -> None:
        self._queue, self._encoder = queue, encoder
        self._get_stop_reason, self._must_stop = get_stop_reason, must_stop
        self._ready = deque[NewSequence]()
        self._active: dict[int, tuple[QueuedRequest, int]] = {}
        self._next_number = 0
        self._deadline_s = float("inf")

    def choose_changes(self, num_free: int, is_idle: bool) -> BatchChanges:
        """Return joining and leaving sequences; see `RequestSource`."""
        # abandoned answers first, so that they take no slot
        leaving = self._pop_leaving()
        if self._queue.close_reason is None and self._get_stop_reason() is not None:
            self._queue.close(CLOSING)
            self._deadline_s = time.monotonic() + DRAIN_TIMEOUT_S
        joining: list[NewSequence] = []
        # wait only while idle: waiting would delay running answers
        wait_s = WAIT_S if is_idle and self._queue.close_reason is None else 0.0
        while len(joining) < num_free:
            if not self._ready and not self._encode_next(wait_s if not joining else 0.0):
                break
            if self._ready:
                joining.append(self._ready.popleft())
                self._queue.mark_started(1)
        is_drained = (is_idle and not joining) or time.monotonic() > self._deadline_s
        if self._must_stop() or (self._queue.close_reason is not None and is_drained):
            self._refuse_remaining()
            return BatchChanges(ends=True)
        return BatchChanges(joining, leaving)

    def report_tokens(self, events: Sequence[TokenEvent]) -> None:
        """Pass new tokens to the clients; see `RequestSource`."""
        written: list[tuple[QueuedRequest, Event]] = []
        for event in events:
            queued, sequence = self._active[event.number]
            written.append((queued, TokenWritten(sequence, event.token, event.reason)))
            if event.reason is not None:
                del self._active[event.number]
        self._queue.deliver_events(written)

    def _encode_next(self, wait_s: float) -> bool:
        """Encode the oldest request into `_ready`; return whether the queue had one."""
        queued = self._queue.pop_request(wait_s)
        if queued is None:
            return False
        request = queued.request
        try:
            encoded = self._encode_request(request)
        except RefusedRequest as e:
            self._queue.mark_started(request.num_sequences)
            self._queue.deliver_events([(queued, e)])
            return True
        started = RequestStarted(tuple(map(len, encoded.prompts)), encoded.in_thoughts, encoded.end_ids)
        self._queue.deliver_events([(queued, started)])
        for sequence in range(request.num_sequences):
            prompt, choice = divmod(sequence, request.num_choices)
            sampling = replace(request.sampling, max_new_tokens=encoded.limits[prompt])
            self._ready.append(NewSequence(self._next_number, encoded.prompts[prompt], sampling, choice,
                                           encoded.end_ids))
            self._active[self._next_number] = (queued, sequence)
            self._next_number += 1
        return True

    def _encode_request(self, request: CompletionRequest) -> EncodedRequest:
        try:
            return self._encoder.encode_request(request)
        except RefusedRequest:
            raise
        except Exception:  # a defect in one request must not end the others
            traceback.print_exc()
            raise RefusedRequest(500, "the prompt cannot be encoded because of a defect; the server's own "
                                      "output shows it") from None

    def _pop_leaving(self) -> list[int]:
        """Return abandoned sequences in the batch, and drop those in `_ready`."""
        # `QueuedRequest` compares by identity, so a pair identifies an answer
        abandoned = set(self._queue.pop_abandoned())
        if not abandoned:
            return []
        numbers = {number for number, answer in self._active.items() if answer in abandoned}
        waiting = {sequence.number for sequence in self._ready} & numbers
        self._ready = deque(sequence for sequence in self._ready if sequence.number not in waiting)
        self._queue.mark_started(len(waiting))
        for number in numbers:
            del self._active[number]
        return sorted(numbers - waiting)

    def _refuse_remaining(self) -> None:
        """Send a last event to every client with an unfinished or queued request."""
        self._queue.close(CLOSING)
        remaining = {queued for queued, _ in self._active.values()}
        while (queued := self._queue.pop_request()) is not None:
            remaining.add(queued)
        self._queue.deliver_events([(queued, RefusedRequest(503, CLOSING)) for queued in remaining])
