"""CPU time and memory limits for untrusted chat templates and pickles."""

import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class CpuTimeExceeded(Exception):
    """The code exceeded its CPU time."""


@contextmanager
def limit_resources(cpu_s: float, memory_bytes: int) -> Iterator[None]:
    """Limit CPU time and address space growth of the block.

    The kernel enforces both through signals, which only reach the main thread: other threads are unlimited.
    Raises `CpuTimeExceeded`: more than `cpu_s` seconds of CPU time. Raises `MemoryError`: more memory.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # RLIMIT_AS covers the whole address space, so add the current size
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _address_space_bytes() + memory_bytes
    # CPU time instead of wall time: a busy machine must not fail a template
    previous_handler = signal.signal(signal.SIGVTALRM, _raise_timeout)
    # Repeat the signal: exceptions inside `__del__` or garbage collection callbacks are lost.
    signal.setitimer(signal.ITIMER_VIRTUAL, cpu_s, cpu_s)
    if soft == resource.RLIM_INFINITY or limit < soft:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous_handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * PAGE_BYTES


def _raise_timeout(signum: int, frame: FrameType | None) -> None:
    raise CpuTimeExceeded
