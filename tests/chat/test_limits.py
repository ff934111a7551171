"""Bounds around foreign code, and that they are gone behind it."""

from __future__ import annotations

import resource
import threading

import pytest

from megatron_sov.chat.limits import TooLong, bounded


def test_time_and_memory_are_bounded_inside_and_free_outside() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(TooLong), bounded(0.05, 1 << 30):
        while True:
            pass
    with pytest.raises(MemoryError), bounded(5, 16 << 20):
        bytearray(64 << 20)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert len(bytearray(64 << 20)) == 64 << 20


def test_other_threads_go_without() -> None:
    done = []

    def work() -> None:
        with bounded(0.0, 0):
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1]
