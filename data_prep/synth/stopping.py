"""Stopping in good order: what is under way comes to the disk, nothing new is asked."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from types import FrameType

from megatron_sov.errors import StopRequested
from megatron_sov.work.children import FORWARDED


class Stop:
    """Remembers that a run was asked to stop, and why; from any thread."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.reason = ""
        """Why; empty: nobody asked."""

    def __bool__(self) -> bool:
        return self._event.is_set()

    def on_signals(self, numbers: Sequence[signal.Signals] = FORWARDED) -> None:
        """Stop at the signals that ask for it; the same one again ends the process as it would by itself."""
        for number in numbers:
            signal.signal(number, self._note)

    def off_signals(self) -> None:
        """Let signals end the process as they would by themselves."""
        for number in FORWARDED:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def ask(self, reason: str) -> None:
        """Ask the run to stop; the first reason stays."""
        if not self._event.is_set():
            self.reason = reason
            self._event.set()

    def check(self) -> None:
        """Raise `StopRequested` where the run was asked to stop."""
        if self._event.is_set():
            raise StopRequested(self.reason)

    def sleep(self, seconds: float) -> None:
        """Wait; raises `StopRequested` as soon as the run is asked to stop."""
        self._event.wait(seconds)
        self.check()

    def _note(self, number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        self.ask(f"{signal.Signals(number).name} came; the same command goes on")
