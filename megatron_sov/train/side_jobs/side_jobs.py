"""What goes on beside training on rank 0: exports, and the evaluation of each of them; and behind it, the
mean of its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron_sov.config import RunConfig
from megatron_sov.obs.warning import warn
from megatron_sov.train.side_jobs.average import make_average
from megatron_sov.train.side_jobs.evaluations import Evaluations
from megatron_sov.train.side_jobs.exports import Exports


class SideJobs:
    """Exports and evaluations of one run; nothing here holds the run up."""

    def __init__(self, run: Path, config: RunConfig, record: Callable[..., None]) -> None:
        """Find what an earlier process of the run left; starts nothing.

        Args:
            run: the run's folder.
            config: its settings.
            record: writes an event: `record(name, **fields)`.
        """
        self._average = partial(make_average, run, config.train, record)
        self._evaluations = Evaluations(run, config, record)
        self._exports = Exports(run, config.train, record,
                                lambda step: _without_harm(lambda: self._evaluations.offer(step)))

    def offer(self, step: int, checkpoint: Path, last: bool) -> None:
        """Export a complete checkpoint, if it is one of those asked for,
        and have the export judged; returns at once."""
        self._exports.offer(step, checkpoint, last)

    def poll(self) -> None:
        """Take note of what has ended, and begin what is next; returns at once."""
        self._exports.poll()
        _without_harm(self._evaluations.poll)

    def wait(self) -> None:
        """Finish everything; for the end of a run, when nothing is held up any more."""
        self._average()
        self._exports.wait()
        self._evaluations.wait()

    def close(self) -> None:
        """End what is running; it goes on when the run is resumed."""
        self._exports.close()
        self._evaluations.close()


def _without_harm(action: Callable[[], None]) -> None:
    """Do something that a file system may refuse, which is no reason to end a run."""
    try:
        action()
    except OSError as e:
        warn(f"evaluations beside training cannot be followed ({e})")
