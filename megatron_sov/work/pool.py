"""Work in several processes, with the results in the order of the input."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from megatron_sov.errors import ExitCode, UserError

if TYPE_CHECKING:
    from concurrent.futures import Future

Item = TypeVar("Item")
Result = TypeVar("Result")
_work: Callable[[Any], Any]
"""What this worker process does with each item."""
WAITING_PER_WORKER = 4
"""Items that are handed out, so that no worker waits for the next one."""
LOST = "a worker process was ended from outside (for want of memory?)"


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
        from concurrent.futures import ProcessPoolExecutor

        # Fresh processes: forking one that runs a library's threads could deadlock.
        self._pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker,
                                         (build, arguments))

    def submit(self, item: Item) -> Future[Result]:
        """Have an item worked on.

        Raises:
            BrokenProcessPool: a worker was ended from outside; the result raises it as well.
        """
        with _without_interrupts():
            return self._pool.submit(_do, item)

    def end(self) -> None:
        """Wait for what is under way, and end the processes."""
        self._pool.shutdown(cancel_futures=True)

    def kill(self) -> None:
        """End the processes at once."""
        for process in multiprocessing.active_children():
            process.terminate()
        self.end()


def in_processes(build: Callable[..., Callable[[Item], Result]], arguments: tuple[Any, ...],
                 items: Iterable[Item], workers: int) -> Generator[Result, None, None]:
    """Yield the result of each item, in order; items are taken as they are needed.  This process does all
    where there is one worker, or one item.

    Args:
        build: see `WorkerPool`.
        arguments: plain values.
        items: what to work on.
        workers: processes.

    Raises:
        UserError: as the work does; or a worker was ended from outside.
    """
    left = iter(items)
    first = list(islice(left, workers))
    if len(first) <= 1:
        yield from map(build(*arguments), chain(first, left))
        return
    from concurrent.futures.process import BrokenProcessPool

    pool = WorkerPool(build, arguments, len(first))
    under_way: deque[Future[Result]] = deque()
    try:
        for item in chain(first, left):
            under_way.append(pool.submit(item))
            while under_way and (under_way[0].done() or len(under_way) >= WAITING_PER_WORKER * workers):
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool:
        raise UserError(f"{LOST}; run the same command again, with fewer --workers: what is done is kept"
                        ) from None
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
