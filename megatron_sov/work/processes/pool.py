"""Process pools with results in input order, thread pools with results on completion, and stop signals."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from types import FrameType
from typing import Any, Generic, Self, TypeVar

from megatron_sov.base.errors import ExitCode, StopRequested, UserError
from megatron_sov.work.processes.children import STOP_SIGNALS

Work = TypeVar("Work")
Item = TypeVar("Item")
Result = TypeVar("Result")
QUEUED_PER_THREAD = 2
"""Queued items per thread; small to limit read-ahead."""
_POLL_S = 0.5
"""Interval between checks for a stop request."""
WAITING_PER_WORKER = 4
"""Queued items per worker; enough to keep workers busy."""
LOST_WORKER = "a worker process was ended from outside (for want of memory?)"


class StopSignal:
    """Thread-safe stop request with a reason."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.reason = ""
        """Reason of the request; empty without request."""

    @contextlib.contextmanager
    def stop_on_signals(self) -> Iterator[None]:
        """Request a stop on `STOP_SIGNALS` during the block; a repeated signal ends the process."""
        handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        # keep signals ignored that nohup ignores
        handlers = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}
        for number in handlers:
            signal.signal(number, self._handle_signal)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def ask(self, reason: str) -> None:
        """Request a stop; the first reason is kept."""
        if not self._event.is_set():
            self.reason = reason
            self._event.set()

    def check(self) -> None:
        """Raise `StopRequested` after a request."""
        if self._event.is_set():
            raise StopRequested(self.reason)

    def sleep(self, seconds: float) -> None:
        """Sleep; raise `StopRequested` as soon as a stop is requested."""
        self._event.wait(seconds)
        self.check()

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        # a second signal ends the process immediately
        signal.signal(number, signal.SIG_DFL)
        name = signal.Signals(number).name
        # not print: the signal may have interrupted a print
        with contextlib.suppress(OSError):
            os.write(2, f"\nstopping after the running work is saved; send {name} again to exit now. The "
                        "same command resumes from the saved work\n".encode())
        self.ask(f"received {name}; the same command resumes")


def map_in_threads(do: Callable[[Work], Result], items: Iterable[Work], threads: int,
                   stop: StopSignal | None = None) -> Generator[Result, None, None]:
    """Apply `do` to items in threads; yield results on completion.

    After the first failure or a stop request no item starts, running items finish and are yielded, then the
    exception is raised.

    Args:
        do: function for an item, called in any thread.
        items: consumed as threads become free.
        threads: number of threads.
        stop: stop request to observe, and to set on failure.

    Raises:
        StopRequested: a stop was requested.
        Exception: the first failed item's exception.
    """
    stop = stop or StopSignal()
    pending: set[Future[Result]] = set()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                pending.add(pool.submit(do, item))
                # bound the queue: items may come from a long stream
                if len(pending) >= QUEUED_PER_THREAD * threads:
                    yield from _yield_finished(pending, stop)
            while pending:
                yield from _yield_finished(pending, stop)
        except BaseException as e:
            stop.ask(str(e))  # running items finish and start no further requests
            for future in pending:
                future.cancel()
            wait(pending)
            # yield finished results, which may have cost money, unless the consumer closed the generator
            if not isinstance(e, GeneratorExit):
                for future in pending:
                    if not future.cancelled() and future.exception() is None:
                        yield future.result()
            raise


def _yield_finished(pending: set[Future[Result]], stop: StopSignal) -> Iterator[Result]:
    finished, _ = wait(pending, _POLL_S, FIRST_COMPLETED)
    stop.check()
    for future in finished:
        pending.discard(future)
        yield future.result()


_work: Callable[[Any], Any]
"""Function applied to items in the worker process, returned by `build`."""


class WorkerLost(UserError):
    """A worker was killed from outside."""


class WorkerPool(Generic[Item, Result]):
    """Processes that apply a function to items; started on demand."""

    def __init__(self, build: Callable[..., Callable[[Item], Result]], arguments: tuple[Any, ...],
                 workers: int) -> None:
        """Configure the pool without starting processes.

        Args:
            build: module-level function; called once per process with `arguments`, returns the function for
                items.
            arguments: picklable values.
            workers: number of processes.
        """
        self._build, self._arguments, self._workers = build, arguments, workers
        self._pool: ProcessPoolExecutor | None = None
        self._here: Callable[[Item], Result] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        """Wait for running items, or end the processes immediately after an exception."""
        if failure is not None:
            # results of running items are useless after an error
            for process in multiprocessing.active_children():
                process.terminate()
        self.end()

    def end(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def each(self, items: Iterable[Item]) -> Iterator[Result]:
        """Yield the result for each item in order; items are consumed as needed.

        With a single worker or a single item, this process does the work. Raises `WorkerLost`: a worker was
        killed from outside.
        """
        # for one item or worker, starting processes would cost more than the work
        remaining = iter(items)
        first = list(islice(remaining, self._workers)) if self._pool is None else []
        if self._pool is None and len(first) <= 1:
            self._here = self._here or self._build(*self._arguments)
            yield from map(self._here, chain(first, remaining))
            return
        # spawn: forking a process with library threads could deadlock
        self._pool = self._pool or ProcessPoolExecutor(
            self._workers, multiprocessing.get_context("spawn"), _start_worker,
            (self._build, self._arguments))
        pending: deque[Future[Result]] = deque()
        try:
            for item in chain(first, remaining):
                # a pool starts its processes in submit; they inherit the signal mask
                with _block_interrupts():
                    pending.append(self._pool.submit(_apply_work, item))
                # in input order: a slow item delays later results, so bound their number
                while pending and (pending[0].done() or len(pending) >= WAITING_PER_WORKER * self._workers):
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise WorkerLost(f"{LOST_WORKER}; run the same command again with fewer --workers: finished work "
                             "is kept") from None


def map_in_processes(build: Callable[..., Callable[[Item], Result]], arguments: tuple[Any, ...],
                     items: Iterable[Item], workers: int) -> Generator[Result, None, None]:
    """Yield the result for each item in order; see `WorkerPool`."""
    pool = WorkerPool(build, arguments, workers)
    try:
        yield from pool.each(items)
    finally:
        pool.end()


@contextlib.contextmanager
def _block_interrupts() -> Iterator[None]:
    """Block SIGINT in workers started during the block: on Ctrl-C the main process ends the workers."""
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)


def _start_worker(build: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
    global _work
    # one thread per process; parallelism comes from the processes
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _work = build(*arguments)


def _end_with_parent() -> None:
    """End the worker process when the parent process has died."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(ExitCode.CRASH)


def _apply_work(item: Any) -> Any:
    return _work(item)
