"""Work in several processes, with the results in the order of the input, or in threads as results come."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import chain, islice
from types import FrameType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from megatron_sov.base.errors import ExitCode, StopRequested, UserError
from megatron_sov.work.processes.children import FORWARDED

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor

Work = TypeVar("Work")
Item = TypeVar("Item")
Result = TypeVar("Result")
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
        # nohup ignores signals on purpose; that stays
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
        # the second one ends the process: somebody does not want to wait
        signal.signal(number, signal.SIG_DFL)
        name = signal.Signals(number).name
        # Not by print: the signal may have come in the middle of one.
        with contextlib.suppress(OSError):
            os.write(2, f"\nstopping after the work under way, which is saved; {name} again: leave now, the "
                        "same command goes on from what is saved\n".encode())
        self.ask(f"{name} came; the same command goes on")


def in_threads(do: Callable[[Work], Result], items: Iterable[Work], threads: int,
               stop: StopSignal | None = None) -> Generator[Result, None, None]:
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
    under_way: set[Future[Result]] = set()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                under_way.add(pool.submit(do, item))
                # bounded, since items may come from a stream that is longer than memory
                if len(under_way) >= AHEAD * threads:
                    yield from _yield_finished(under_way, stop)
            while under_way:
                yield from _yield_finished(under_way, stop)
        except BaseException as e:
            stop.ask(str(e))  # what waits for an answer gets it, and asks no more
            for future in under_way:
                future.cancel()
            wait(under_way)
            # who closed the generator takes no more; else results that are paid for are still given
            if not isinstance(e, GeneratorExit):
                for future in under_way:
                    if not future.cancelled() and future.exception() is None:
                        yield future.result()
            raise


def _yield_finished(under_way: set[Future[Result]], stop: StopSignal) -> Iterator[Result]:
    done, _ = wait(under_way, _LOOK_S, FIRST_COMPLETED)
    stop.check()
    for future in done:
        under_way.discard(future)
        yield future.result()


_work: Callable[[Any], Any]
"""What this worker process does with each item."""
WAITING_PER_WORKER = 4
"""Items that are handed out, so that no worker waits for the next one."""
LOST = "a worker process was ended from outside (for want of memory?)"


class WorkerLost(UserError):
    """A worker was ended from outside."""


class WorkerPool(Generic[Item, Result]):
    """Processes that work on items; each is started when there is an item for it."""

    def __init__(self, build: Callable[..., Callable[[Item], Result]], arguments: tuple[Any, ...],
                 workers: int) -> None:
        """Start nothing yet.

        Args:
            build: a function of a module; called once in each process with `arguments`,
                it returns what is called with each item.
            arguments: plain values.
            workers: processes.
        """
        self._build, self._arguments, self._workers = build, arguments, workers
        self._pool: ProcessPoolExecutor | None = None
        self._here: Callable[[Item], Result] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        """Wait for what is under way, or end the processes at once behind an error."""
        if failure is not None:
            # an error ends the work now; results under way are of no use
            for process in multiprocessing.active_children():
                process.terminate()
        self.end()

    def end(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def each(self, items: Iterable[Item]) -> Iterator[Result]:
        """Yield the result of each item, in order; items are taken as they are needed.  This process does
        all where there is one worker, or one item for the first time.

        Raises:
            WorkerLost: a worker was ended from outside.
        """
        # one item or one worker: starting processes would cost more than the work
        left = iter(items)
        first = list(islice(left, self._workers)) if self._pool is None else []
        if self._pool is None and len(first) <= 1:
            self._here = self._here or self._build(*self._arguments)
            yield from map(self._here, chain(first, left))
            return
        from concurrent.futures import ProcessPoolExecutor
        from concurrent.futures.process import BrokenProcessPool

        # Fresh processes: forking one that runs a library's threads could deadlock.
        self._pool = self._pool or ProcessPoolExecutor(
            self._workers, multiprocessing.get_context("spawn"), _start_worker,
            (self._build, self._arguments))
        under_way: deque[Future[Result]] = deque()
        try:
            for item in chain(first, left):
                # a pool starts its processes in submit, and they inherit the mask of signals
                with _without_interrupts():
                    under_way.append(self._pool.submit(_do, item))
                # in the order of the input: a slow item holds back later results, and their number is bounded
                while under_way and (under_way[0].done()
                                     or len(under_way) >= WAITING_PER_WORKER * self._workers):
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        except BrokenProcessPool:
            raise WorkerLost(f"{LOST}; run the same command again, with fewer --workers: what is done is kept"
                             ) from None


def in_processes(build: Callable[..., Callable[[Item], Result]], arguments: tuple[Any, ...],
                 items: Iterable[Item], workers: int) -> Generator[Result, None, None]:
    """Yield the result of each item, in order; arguments and errors as of `WorkerPool`."""
    pool = WorkerPool(build, arguments, workers)
    try:
        yield from pool.each(items)
    finally:
        pool.end()


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Let processes that are started here never see Ctrl-C, which goes to all of a terminal's: this process
    alone takes it, and ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(build: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
    global _work
    # one thread per process; the processes are the parallelism
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _work = build(*arguments)


def _end_with_parent() -> None:
    """End this process when the one that started it is gone: a killed command must not leave workers
    that wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(ExitCode.CRASH)


def _do(item: Any) -> Any:
    return _work(item)
