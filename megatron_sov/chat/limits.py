"""Bounds of time and memory around code that a foreign file brings along, such as a chat template."""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class TemplateTimeout(Exception):
    """The code took more CPU time than it is given."""


@contextmanager
def limit_resources(cpu_s: float, memory_bytes: int) -> Iterator[None]:
    """Run Python code with a bound on its CPU time and on what the process's address space may grow by.

    Both are enforced by the kernel, and for the main thread alone, since only that gets signals;
    in other threads nothing is bounded.

    Raises:
        TooLong: it took more than `cpu_s` seconds of CPU time.
        MemoryError: it asked for more memory.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # the limit is on all of the address space, so what is there already is added to what the code may take
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _address_space_bytes() + memory_bytes
    # time of the processor and not of the clock: a busy machine must not fail a template
    before = signal.signal(signal.SIGVTALRM, _raise_timeout)
    # Again and again: what is raised inside of a `__del__` or a callback of the garbage collector is lost.
    signal.setitimer(signal.ITIMER_VIRTUAL, cpu_s, cpu_s)
    if soft == resource.RLIM_INFINITY or limit < soft:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * PAGE_BYTES


def _raise_timeout(signum: int, frame: FrameType | None) -> None:
    raise TemplateTimeout
