"""Orderly stops: a signal sets a flag that the main loop reads between two steps of its work."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from megatron_sov.work.processes.children import STOP_SIGNALS


class StopFlag:
    """Records a signal that asks this process to stop; `Checkpointer.sync` shares it with the other ranks."""

    def __init__(self) -> None:
        self.reason: str | None = None
        """Name of the last stop signal; None: this process received none."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def __reduce__(self) -> "tuple[type[StopFlag], tuple[()]]":
        """Pickle a flag without its reason: a new process has received no signal."""
        return StopFlag, ()

    def _note(self, number: int, frame: FrameType | None) -> None:
        # no save or collective here: Python may run the handler in the middle of another save or collective
        self.reason = signal.Signals(number).name

    @contextlib.contextmanager
    def answer_first_signal(self, answer: Callable[[str], None]) -> Iterator[None]:
        """Call `answer` at once, from a thread, with the name of the first stop signal.

        Python runs signal handlers in the main thread between two bytecodes, and a collective may wait for
        minutes; the C handler writes the signal's number to a pipe right away.
        """
        read, write = os.pipe()
        os.set_blocking(write, False)
        previous = signal.set_wakeup_fd(write, warn_on_full_buffer=False)

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
            signal.set_wakeup_fd(previous)
            os.close(write)  # ends the thread
            thread.join()
            os.close(read)


@contextlib.contextmanager
def catch_stop_signals() -> Iterator[StopFlag]:
    """Yield a flag for stop signals and restore the previous handlers at the end."""
    previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield StopFlag()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
