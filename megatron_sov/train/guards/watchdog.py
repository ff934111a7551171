"""The watchdog: if a step makes no progress, every process writes its stacks and exits.

Processes wait for each other in every step, so a process that hangs stops all of them, and all notice it
within the time of one step.
"""

import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_sov.base.errors import ExitCode

HANG_FOLDER = "hang"
"""Run subfolder for the stacks of hanging processes."""
MAX_GRACE_S = 10.0
"""Longest wait for other processes to notice the hang, before the first exit breaks their connections."""
MIN_STEPS, NUM_STEPS = 20, 100
"""Fewest steps for a median of step times, and most: the newest."""
MEDIAN_RATIO, MIN_LIMIT_S = 10, 60.0
"""A step may take this many times the median, and at least this long."""
PACKAGE_PATH = f"{os.sep}megatron_sov{os.sep}"


class Watchdog:
    """A thread that ends this process if a step takes longer than `timeout_s`, or after `MIN_STEPS` steps
    longer than `MEDIAN_RATIO` times the median step. `timeout_s` = 0: no thread."""

    def __init__(self, run: Path, rank: int, timeout_s: float,
                 on_hang: Callable[[int, dict[str, list[int]]], None]) -> None:
        """Start the thread, which waits for `begin`.

        Rank 0 calls `on_hang(step, places)`, with code location -> ranks that hang there.
        """
        self._folder, self._rank, self._timeout_s, self._on_hang = run / HANG_FOLDER, rank, timeout_s, on_hang
        self._watched: tuple[int, float] | None = None
        self._durations_s: deque[float] = deque(maxlen=NUM_STEPS)
        self._limit_s = timeout_s
        self._main_thread = threading.get_ident()
        self._closed = threading.Event()
        if timeout_s:
            threading.Thread(target=self._watch_steps, name="watchdog", daemon=True).start()

    def begin(self, step: int) -> None:
        """Watch `step` (from 1) from now on."""
        if len(self._durations_s) >= MIN_STEPS:
            expected_s = MEDIAN_RATIO * statistics.median(self._durations_s)
            self._limit_s = min(self._timeout_s, max(MIN_LIMIT_S, expected_s))
        self._watched = (step, time.monotonic())
        if self._timeout_s:
            # a hang in code that holds the GIL stops this thread, too; faulthandler's thread needs no GIL
            limit_s = 2 * self._limit_s + MAX_GRACE_S
            faulthandler.dump_traceback_later(limit_s, exit=True, file=sys.__stderr__ or sys.stderr)

    def end(self) -> None:
        """Watch no step until `begin`, because evaluations, gates and checkpoints may take long."""
        if self._watched is not None:
            self._durations_s.append(time.monotonic() - self._watched[1])
        self._watched = None
        if self._timeout_s:
            faulthandler.cancel_dump_traceback_later()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Watch no step inside the context; afterwards, the time of the current step restarts at 0."""
        watched, self._watched = self._watched, None  # the time until now is not a step's
        self.end()
        try:
            yield
        finally:
            if watched is not None:
                self.begin(watched[0])

    def close(self) -> None:
        self.end()
        self._closed.set()

    def _watch_steps(self) -> None:
        while not self._closed.wait(min(1.0, self._timeout_s / 10)):
            watched = self._watched
            if watched is not None and time.monotonic() - watched[1] > self._limit_s:
                self._exit_on_hang(watched[0])

    def _exit_on_hang(self, step: int) -> None:
        """Write this process's stacks, wait until other processes have written stacks, and exit."""
        try:
            self._write_stacks(step)
            # every process hangs by now and needs time to write its stacks before a connection breaks
            grace_s = min(MAX_GRACE_S, max(1.0, self._limit_s / 4))
            time.sleep(grace_s)
            if self._rank == 0:
                self._report_hang(step)
            else:
                # the exit of a process breaks the connections of rank 0, which has to report first
                time.sleep(grace_s)
        finally:
            # not sys.exit: it would only end this thread, and the main thread never returns
            os._exit(ExitCode.HANG)

    def _write_stacks(self, step: int) -> None:
        self._folder.mkdir(exist_ok=True)
        file = self._folder / f"step-{step}-rank-{self._rank:05d}.txt"
        with open(file, "w", encoding="utf-8") as f:
            f.write(f"{self._find_place()}\n\nrank {self._rank} stood still in step {step} for "
                    f"{self._limit_s:g} s\n\n")
            # faulthandler writes to the descriptor, past Python's buffer
            f.flush()
            faulthandler.dump_traceback(f)

    def _report_hang(self, step: int) -> None:
        places: dict[str, list[int]] = {}
        for file in sorted(self._folder.glob(f"step-{step}-rank-*.txt")):
            place = file.read_text(encoding="utf-8").partition("\n")[0]
            places.setdefault(place, []).append(int(file.stem.rpartition("-")[2]))
        bound = f"guards.hang_timeout_s = {self._timeout_s:g}"
        if self._limit_s < self._timeout_s:
            bound = f"{self._limit_s:g} s, {MEDIAN_RATIO} times the median step"
        print(f"error: step {step} made no progress for {bound}; "
              f"the stacks of all processes are in {self._folder}", file=sys.stderr, flush=True)
        self._on_hang(step, places)

    def _find_place(self) -> str:
        """Return the `megatron_sov` file and function in which the main thread hangs."""
        frame = sys._current_frames().get(self._main_thread)
        while frame is not None and PACKAGE_PATH not in frame.f_code.co_filename:
            frame = frame.f_back
        if frame is None:
            return "outside"
        return f"{Path(frame.f_code.co_filename).name}, {frame.f_code.co_name}"
