"""Items done by threads of this process, which mostly wait for others, such as an endpoint; and how they are
stopped in good order: what is under way comes to the disk, nothing new is begun."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import FrameType
from typing import TypeVar

from megatron_sov.base.errors import StopRequested
from megatron_sov.work.processes.children import FORWARDED

Work = TypeVar("Work")
ThreadResult = TypeVar("Result")
AHEAD = 2
"""Items that wait for a thread, for each thread: little is read before it is needed."""
_LOOK_S = 0.5
"""Between two looks at whether a stop was asked for."""


class StopSignal:
    """Remembers that work was asked to stop, and why; from any thread."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.reason = ""
        """Why; empty: nobody asked."""

    @contextlib.contextmanager
    def at_signals(self) -> Iterator[None]:
        """Stop at signals that ask for it and are not ignored, as long as this is open; the same one again
        ends the process as it would by itself."""
        before = {number: signal.getsignal(number) for number in FORWARDED}
        before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
        for number in before:
            signal.signal(number, self._note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def ask(self, reason: str) -> None:
        """Ask for a stop; the first reason stays."""
        if not self._event.is_set():
            self.reason = reason
            self._event.set()

    def check(self) -> None:
        """Raise `StopRequested` where a stop was asked for."""
        if self._event.is_set():
            raise StopRequested(self.reason)

    def sleep(self, seconds: float) -> None:
        """Wait; raises `StopRequested` as soon as a stop is asked for."""
        self._event.wait(seconds)
        self.check()

    def _note(self, number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        self.ask(f"{signal.Signals(number).name} came; the same command goes on")


def in_threads(do: Callable[[Work], ThreadResult], items: Iterable[Work], threads: int,
               stop: StopSignal | None = None
               ) -> Generator[ThreadResult, None, None]:
    """Yield what comes of items as they are done.

    The first that fails ends it, as a stop does: none is begun any more, what is under way is waited for and
    yielded as well, and then that is raised.

    Args:
        do: does one item, in any thread.
        items: are taken as threads get free.
        threads: items at a time.
        stop: may be asked to stop, and is asked where an item fails.

    Raises:
        StopRequested: a stop was asked for.
        Exception: of the first item that failed.
    """
    stop = stop or StopSignal()
    under_way: set[Future[ThreadResult]] = set()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                under_way.add(pool.submit(do, item))
                if len(under_way) >= AHEAD * threads:
                    yield from _done(under_way, stop)
            while under_way:
                yield from _done(under_way, stop)
        except BaseException as e:
            stop.ask(str(e))  # what waits for an answer gets it, and asks no more
            for future in under_way:
                future.cancel()
            wait(under_way)
            if not isinstance(e, GeneratorExit):
                for future in under_way:
                    if not future.cancelled() and future.exception() is None:
                        yield future.result()
            raise


def _done(under_way: set[Future[ThreadResult]], stop: StopSignal) -> Iterator[ThreadResult]:
    """Yield what has come of some, which are under way no longer."""
    done, _ = wait(under_way, _LOOK_S, FIRST_COMPLETED)
    stop.check()
    for future in done:
        under_way.discard(future)
        yield future.result()
