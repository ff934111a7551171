"""Stopping in good order: a signal sets a flag, rank 0 answers it at once, and all processes leave after the
same step."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import FrameType

from megatron_sov.base.figures import format_duration
from megatron_sov.work.processes.children import STOP_SIGNALS

TIMED = 20
"""Last pieces of work of a kind whose times predict that of the next one."""


class StopFlag:
    """Remembers that this process was asked to stop; `Trainer.sync` tells the others."""

    def __init__(self) -> None:
        self.reason: str | None = None
        """Name of the last signal that asked for it; None: nobody asked this process."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def __reduce__(self) -> tuple[type[StopFlag], tuple[()]]:  # in a new process it is asked for itself
        return StopFlag, ()

    def _note(self, number: int, frame: FrameType | None) -> None:
        # only noted: a save or a collective from a handler could fall into one that is under way
        self.reason = signal.Signals(number).name

    @contextlib.contextmanager
    def answered_by(self, answer: Callable[[str], None]) -> Iterator[None]:
        """Call `answer` with the name of the first signal that asks for a stop, from a thread, at once.

        Python runs signal handlers in the main thread between two bytecodes, and a collective may wait for
        minutes; the C handler writes the signal's number to a pipe right away.
        """
        read, write = os.pipe()
        os.set_blocking(write, False)
        before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)

        def wait() -> None:
            while number := os.read(read, 1):
                if number[0] in STOP_SIGNALS:
                    answer(signal.Signals(number[0]).name)
                    return

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            os.close(write)  # ends the thread
            thread.join()
            os.close(read)


@contextlib.contextmanager
def stoppable() -> Iterator[StopFlag]:
    """Give what remembers signals that ask for a stop, and put back what they did before."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield StopFlag()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class CurrentWork:
    """The work that has to end before the run can stop, and how long such work has taken before."""

    def __init__(self) -> None:
        self._name, self._kind, self._began_s = "the start of the run", "start", time.monotonic()
        self._seconds: dict[str, deque[float]] = {}

    def begin(self, kind: str, name: str) -> None:
        """Begin a piece of work and end the one before, unless it has the same name.

        Args:
            kind: pieces of a kind take about as long as each other: "step", "evaluation".
            name: of this piece, "step 7".
        """
        if name == self._name:
            return
        now_s = time.monotonic()
        self._seconds.setdefault(self._kind, deque(maxlen=TIMED)).append(now_s - self._began_s)
        self._name, self._kind, self._began_s = name, kind, now_s

    def text(self) -> str:
        """Return the work under way and the time that it still needs: "step 7 (about 4 min 10 s)"."""
        times_s = sorted(self._seconds.get(self._kind, ()))
        if not times_s:
            return f"{self._name} (the first {self._kind}: its time is not known yet)"
        # The upper quartile: a promise that is kept is better than a median.
        left_s = times_s[3 * len(times_s) // 4] - (time.monotonic() - self._began_s)
        return f"{self._name} (about {format_duration(max(1.0, left_s))})"
