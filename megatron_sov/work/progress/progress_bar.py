"""Progress bars: of a training loop (a bar on a terminal, an occasional plain line in a log file), and of
work of many equal parts (on a terminal alone: a log file would fill with it).
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Never, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

BEGINS_AFTER_S = 2.0
"""What takes a moment only shows none."""


def work_bar(title: str, total: int, unit: str, shows: bool = True) -> tqdm[Never]:
    """Return a bar, to be used as a context; `update(n)` says that n more parts are done.

    Args:
        title: what is going on, one word.
        total: parts.
        unit: what a part is; large numbers are shortened.
        shows: False on processes that leave it to another one.
    """
    from tqdm import tqdm

    # disable=None: tqdm shows itself on a terminal and nowhere else
    return tqdm(total=total, desc=title, unit=unit, unit_scale=True, delay=BEGINS_AFTER_S,
                disable=None if shows else True)


LINE_EVERY_S = 10.0
"""Seconds between plain lines at least; a log file is read by people, and steps may take milliseconds."""


class ProgressBar:
    """Shows step, what it gave, tokens per second and the time that is left.

    Args:
        total_steps: the run's last step.
        first_step: steps that are done already (0 at the start, more after a resume).
        label: what is going on, e.g. "pretrain tiny-solar-open".
        stream: where to write; standard error by default.
    """

    def __init__(self, total_steps: int, first_step: int, label: str, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._total_steps, self._first_step, self._label = total_steps, first_step, label
        self._start_s = self._last_line_s = time.monotonic()
        self._line = ""
        self._bar: tqdm[Never] | None = None
        if self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total_steps, initial=first_step, desc=label, unit="step",
                             dynamic_ncols=True, file=self._stream)

    def update(self, step: int, told: str, tokens_per_s: float) -> None:
        """Show that `step` is done; `told` says what it gave, `tokens_per_s` counts all processes."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"{told}, {tokens_per_s:,.0f} tokens/s", refresh=False)
            self._bar.update(step - self._bar.n)
            return
        from tqdm import tqdm

        now_s = time.monotonic()
        # A step's time is the mean over this process's own steps: those before a resume ran at another time.
        done = step - self._first_step
        left_s = (now_s - self._start_s) / done * (self._total_steps - step) if done > 0 else 0.0
        self._line = (f"{self._label}: step {step}/{self._total_steps}, {told}, {tokens_per_s:,.0f} "
                      f"tokens/s, {tqdm.format_interval(left_s)} left")
        if now_s - self._last_line_s >= LINE_EVERY_S:
            self._write_line(now_s)

    def close(self) -> None:
        """Leave the last state on the screen or in the log."""
        if self._bar is not None:
            self._bar.close()
        elif self._line:
            self._write_line(time.monotonic())

    def _write_line(self, now_s: float) -> None:
        # one write: other ranks' lines must not come in between
        print(f"{self._line}\n", end="", file=self._stream, flush=True)
        self._line, self._last_line_s = "", now_s
