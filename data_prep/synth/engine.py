"""Items through a generator, several at a time: each is code that asks, waits, and goes on."""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, TypeVar

from data_prep.synth.asking import JUDGE_MAX_TOKENS, Asking, Door, Drawn
from data_prep.synth.generator import Generator, Item, NoReply, NoUsableReply, Role, Sample, writable
from data_prep.synth.journal import Finished, Journal
from data_prep.synth.stopping import Stop
from data_prep.synth.templates import Prompt
from megatron_sov.endpoints.answers import BadAnswer, NeverAnswered, Unavailable
from megatron_sov.endpoints.endpoint import Endpoint
from megatron_sov.errors import StopRequested, UserError, told_in_a_line

T = TypeVar("T")
_LOOK_S = 0.5
"""Between two looks at signals and at the time."""
AHEAD = 2
"""Items that wait for a thread, for each thread: little is read before it is needed."""


class EndpointDoor:
    """One model behind an endpoint, asked so many times at once as the run has threads.

    Args:
        endpoint: where.
        model: as it is called there.
        slots: of the run.
        stop: of the run: no request begins when it has been asked to stop.
        patience_s: how long an endpoint may answer nobody.
    """

    def __init__(self, endpoint: Endpoint, model: str, slots: threading.Semaphore, stop: Stop,
                 patience_s: float) -> None:
        self._endpoint, self._model, self._slots, self._stop = endpoint, model, slots, stop
        self._patience_s = patience_s

    @property
    def model(self) -> str:
        """Return the model's name."""
        return self._model

    def key(self, payload: Mapping[str, Any]) -> str:
        """Return the hash of a request."""
        return self._endpoint.key(payload)

    def ask(self, payload: Mapping[str, Any], read: Callable[[Any], T]) -> T:
        """Return what `read` makes of the answer; raises as `Endpoint.ask` does, and `Unavailable` where the
        endpoint has long answered nobody."""
        with self._slots:
            self._stop.check()
            began_s = time.monotonic()
            try:
                return self._endpoint.ask(payload, read)
            except NeverAnswered:
                raise
            except (BadAnswer, TimeoutError) as e:
                silent_s = time.monotonic() - max(began_s, self._endpoint.answered_s)
                if silent_s >= self._patience_s and not isinstance(e, Unavailable):
                    raise Unavailable(f"{e}; it has answered nobody for {silent_s:.0f} s") from None
                raise


@dataclass
class Tally:
    """How far a run is."""

    num_items: int = 0
    """Done, those of earlier commands too."""
    num_passed: int = 0
    """Samples that pass their own checks."""
    num_failed: int = 0
    """Samples that do not."""
    num_unusable: int = 0
    """Items whose answers were of no use."""
    num_unanswered: int = 0
    """Items that got no answer, or met a defect, and are tried again by the next command."""
    why: str = ""
    """Of the last of them."""
    defects: list[str] = field(default_factory=list)
    """Items that ended in an error of the program, with it."""


class Engine:
    """Makes items.

    Args:
        generator: what is made.
        prompts: its templates.
        doors: role -> model.
        threads: items at a time.
        stop: of the run.
        judge_max_tokens: of a judge's answer.
    """

    def __init__(self, generator: Generator, prompts: Mapping[str, Prompt], doors: Mapping[Role, Door],
                 threads: int, stop: Stop, judge_max_tokens: int = JUDGE_MAX_TOKENS) -> None:
        self._judge_max_tokens = judge_max_tokens
        self._generator, self._prompts, self._doors = generator, prompts, doors
        self._threads, self._stop = threads, stop

    def run(self, items: Iterable[tuple[int, Item]], journal: Journal, tally: Tally,
            told: Callable[[], object]) -> None:
        """Make items, and publish what is done whatever ends this.

        Args:
            items: with their numbers, in order.
            journal: takes what is done.
            tally: is counted up.
            told: is called when a part has been published.

        Raises:
            UserError: no request can succeed.
            StopRequested: the run was asked to stop, or its budget is used up.
        """
        waiting = iter(items)
        under_way: dict[Future[Finished], Item] = {}
        with ThreadPoolExecutor(self._threads) as makers, ThreadPoolExecutor(self._threads) as drawers:
            try:
                while True:
                    while len(under_way) < AHEAD * self._threads and (one := next(waiting, None)) is not None:
                        under_way[makers.submit(self._made, *one, drawers)] = one[1]
                    if not under_way:
                        break
                    self._collect(under_way, journal, tally)
                    if journal.is_due():
                        journal.publish()
                        told()
            except BaseException as e:
                self._stop.ask(str(e))  # what waits for an answer gets it, and asks no more
                raise
            finally:
                for future in under_way:
                    future.cancel()
                self._gather(under_way, journal, tally)
                journal.publish()

    def _collect(self, under_way: dict[Future[Finished], Item], journal: Journal, tally: Tally) -> None:
        """Take what has been done."""
        done, _ = wait(under_way, _LOOK_S, FIRST_COMPLETED)
        self._stop.check()
        for future in done:
            _take(future, under_way.pop(future), journal, tally)

    def _gather(self, under_way: dict[Future[Finished], Item], journal: Journal, tally: Tally) -> None:
        """Wait for what is under way when the run ends early: what it comes to is kept as well."""
        wait(under_way)
        for future, item in under_way.items():
            if not future.cancelled():
                with contextlib.suppress(StopRequested, UserError):
                    _take(future, item, journal, tally)

    def _made(self, number: int, item: Item, drawers: ThreadPoolExecutor) -> Finished:
        """Return one item when it is done."""
        def over(draw: Callable[[int], Drawn], draws: Iterable[int]) -> Iterator[Drawn]:
            numbers = list(draws)
            return map(draw, numbers) if len(numbers) == 1 else _all(drawers, draw, numbers)

        self._stop.check()
        ask = Asking(item.id, self._prompts, self._doors, over, self._judge_max_tokens)
        samples: tuple[Sample, ...] = ()
        unusable = ""
        try:
            try:
                samples = tuple(map(writable, self._generator.make(item, ask)))
            except NoUsableReply as e:
                unusable = str(e)
            if ask.failure is not None:  # which the generator went on without
                raise ask.failure
        except Unavailable as e:
            raise StopRequested(f"{e}; nothing is lost, and the same command goes on") from None
        return Finished(number, item, samples, tuple(ask.asked), unusable)


def _all(pool: ThreadPoolExecutor, draw: Callable[[int], Drawn], numbers: list[int]) -> Iterator[Drawn]:
    """Return all draws; where one fails the others are waited for first, so that nothing asks unheard."""
    futures = [pool.submit(draw, number) for number in numbers]
    wait(futures)
    return iter([future.result() for future in futures])


def _take(future: Future[Finished], item: Item, journal: Journal, tally: Tally) -> None:
    """Note what became of an item."""
    try:
        finished = future.result()
        journal.add(finished)
    except (StopRequested, UserError):
        raise
    except NoReply as e:
        tally.num_unanswered += 1
        tally.why = f"{item.id}: {e}"
        return
    except Exception as e:
        # one odd item does not take down what others have cost; the command says so, and ends with 1
        if not tally.defects:
            traceback.print_exception(e)
        tally.defects.append(f"{item.id}: {told_in_a_line(e)}")
        return
    tally.num_items += 1
    tally.num_unusable += bool(finished.unusable)
    num_passed = sum(not sample.reason for sample in finished.samples)
    tally.num_passed += num_passed
    tally.num_failed += len(finished.samples) - num_passed

