"""Progress bars: for training, a bar on a terminal or occasional lines in a log file; for work with equal
parts, a bar on a terminal only."""

import sys
import time
from typing import TYPE_CHECKING, Any, Never, TextIO

from megatron_sov.base.errors import stop_check

if TYPE_CHECKING:
    from tqdm import tqdm

SHOWN_AFTER_S = 2.0
"""Delay in seconds before a bar appears."""
LINE_EVERY_S = 10.0
"""Minimum seconds between lines in a log file, since steps may take milliseconds."""


def create_bar(title: str, total: int, unit: str, visible: bool = True) -> "tqdm[Never]":
    """Create a `tqdm` bar for use in a with statement; `update(n)` advances by n parts.

    Args:
        title: one word for the activity.
        total: number of parts.
        unit: noun for a part; large counts are abbreviated.
        visible: False on ranks that should stay silent.
    """
    stop_check()  # the work begins here: the check of a proposed command line must end before
    # disable=None: tqdm appears on a terminal only
    return _open_bar(total=total, desc=title, unit=unit, unit_scale=True, delay=SHOWN_AFTER_S,
                     disable=None if visible else True)


def _open_bar(**options: Any) -> "tqdm[Never]":
    from tqdm import tqdm  # not at the top: it is slow to import, and `--help` shows no progress

    return tqdm(**options)


class ProgressBar:
    """Shows step, metrics, tokens per second and remaining time.

    Args:
        total_steps: the run's last step.
        first_step: completed steps (0 at the start, more after a resume).
        label: activity, e.g. "pretrain tiny-solar-open".
        stream: output stream; default standard error.
    """

    def __init__(self, total_steps: int, first_step: int, label: str, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._total_steps, self._first_step, self._label = total_steps, first_step, label
        self._start_s = self._last_line_s = time.monotonic()
        self._line = ""
        self._bar: tqdm[Never] | None = None
        if self._stream.isatty():
            self._bar = _open_bar(total=total_steps, initial=first_step, desc=label, unit="step",
                                  dynamic_ncols=True, file=self._stream)

    def update(self, step: int, metrics_text: str, tokens_per_s: float) -> None:
        """Display `step` with `metrics_text` and the total tokens per second."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"{metrics_text}, {tokens_per_s:,.0f} tokens/s", refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now_s = time.monotonic()
        # Average over steps since the start of the process: steps before a resume ran earlier.
        num_steps = step - self._first_step
        step_s = (now_s - self._start_s) / num_steps if num_steps > 0 else 0.0
        remaining_s = step_s * (self._total_steps - step)
        self._line = (f"{self._label}: step {step}/{self._total_steps}, {metrics_text}, {tokens_per_s:,.0f} "
                      f"tokens/s, {_format_interval(remaining_s)} left")
        if now_s - self._last_line_s >= LINE_EVERY_S:
            self._write_line(now_s)

    def close(self) -> None:
        """Leave the last state on the terminal or in the log."""
        if self._bar is not None:
            self._bar.close()
        elif self._line:
            self._write_line(time.monotonic())

    def _write_line(self, now_s: float) -> None:
        # a single write: lines of other ranks must not interleave
        print(f"{self._line}\n", end="", file=self._stream, flush=True)
        self._line, self._last_line_s = "", now_s


def _format_interval(seconds: float) -> str:
    """Format a duration as [H:]MM:SS, like tqdm."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:d}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}"
