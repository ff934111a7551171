"""The watch over a step: where it stands still, every process says where it is, and ends.

Processes wait for one another in every step, so one that hangs stops all, and all notice within
the length of a step.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_sov.base.errors import ExitCode

HANG_FOLDER = "hang"
"""Folder inside a run folder with the stacks of processes that stood still."""
MAX_GRACE_S = 10.0
"""Time that the other processes get to notice too, before the first one ends and breaks their connections."""
OWN_CODE = f"{os.sep}megatron_sov{os.sep}"


class Watchdog:
    """A thread that ends this process when a step takes longer than `timeout_s`; 0: no thread, no watch."""

    def __init__(self, run: Path, rank: int, timeout_s: float,
                 on_hang: Callable[[int, dict[str, list[int]]], None]) -> None:
        """Start watching nothing yet.

        Args:
            on_hang: called on rank 0 with the step and, for each place in the code,
                the ranks that stand there.
        """
        self._folder, self._rank, self._timeout_s, self._on_hang = run / HANG_FOLDER, rank, timeout_s, on_hang
        self._watched: tuple[int, float] | None = None
        self._main_thread = threading.get_ident()
        self._closed = threading.Event()
        if timeout_s:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def begin(self, step: int) -> None:
        """Watch a step (1-based) from now on."""
        self._watched = (step, time.monotonic())
        if self._timeout_s:
            # a hang that holds Python's lock stops this class's thread too; faulthandler's own needs no lock
            limit_s = 2 * self._timeout_s + MAX_GRACE_S
            faulthandler.dump_traceback_later(limit_s, exit=True, file=sys.__stderr__ or sys.stderr)

    def end(self) -> None:
        """Watch nothing until the next step: evaluations, gates and checkpoints may take long."""
        self._watched = None
        if self._timeout_s:
            faulthandler.cancel_dump_traceback_later()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Watch nothing inside, and the same step from its beginning behind it."""
        watched = self._watched
        self.end()
        try:
            yield
        finally:
            if watched is not None:
                self.begin(watched[0])

    def close(self) -> None:
        self.end()
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._timeout_s / 10)):
            watched = self._watched
            if watched is not None and time.monotonic() - watched[1] > self._timeout_s:
                self._give_up(watched[0])

    def _give_up(self, step: int) -> None:
        """Write this process's stacks, wait for the others to do so, and end."""
        try:
            self._folder.mkdir(exist_ok=True)
            file = self._folder / f"step-{step}-rank-{self._rank:05d}.txt"
            with open(file, "w", encoding="utf-8") as f:
                f.write(f"{self._place()}\n\nrank {self._rank} stood still in step {step} for "
                        f"{self._timeout_s:g} s\n\n")
                # faulthandler writes to the descriptor, past Python's buffer
                f.flush()
                faulthandler.dump_traceback(f)
            # the others notice soon, since all wait for one another; each needs time to write its stacks
            # before a connection breaks
            grace_s = min(MAX_GRACE_S, max(1.0, self._timeout_s / 4))
            time.sleep(grace_s)
            if self._rank == 0:
                self._tell(step)
            else:
                # the end of a process breaks the connections of rank 0, which has to tell first
                time.sleep(grace_s)
        finally:
            # not sys.exit: it would only end this thread, and the main one never returns
            os._exit(ExitCode.HANG)

    def _tell(self, step: int) -> None:
        places: dict[str, list[int]] = {}
        for file in sorted(self._folder.glob(f"step-{step}-rank-*.txt")):
            place = file.read_text(encoding="utf-8").partition("\n")[0]
            places.setdefault(place, []).append(int(file.stem.rpartition("-")[2]))
        print(f"error: step {step} made no progress for guards.hang_timeout_s = {self._timeout_s:g}; "
              f"the stacks of all processes are in {self._folder}", file=sys.stderr, flush=True)
        self._on_hang(step, places)

    def _place(self) -> str:
        """Return where in this project's code the main thread stands."""
        frame = sys._current_frames().get(self._main_thread)
        while frame is not None and OWN_CODE not in frame.f_code.co_filename:
            frame = frame.f_back
        return ("outside" if frame is None
                else f"{Path(frame.f_code.co_filename).name}, {frame.f_code.co_name}")
