"""Stopping in good order: a signal only sets a flag, and all processes leave after the same step."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from megatron_sov.work.processes.children import FORWARDED


class StopFlag:
    """Remembers that this process was asked to stop; `Trainer.sync` tells the others."""

    def __init__(self) -> None:
        self.reason: str | None = None
        """Name of the last signal that asked for it; None: nobody asked this process."""
        for number in FORWARDED:
            signal.signal(number, self._note)

    def __reduce__(self) -> tuple[type[StopFlag], tuple[()]]:  # in a new process it is asked for itself
        return StopFlag, ()

    def _note(self, number: int, frame: FrameType | None) -> None:
        # only noted: a save or a collective from a handler could fall into one that is under way
        self.reason = signal.Signals(number).name


@contextlib.contextmanager
def stoppable() -> Iterator[StopFlag]:
    """Give what remembers signals that ask for a stop, and put back what they did before."""
    before = {number: signal.getsignal(number) for number in FORWARDED}
    try:
        yield StopFlag()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
