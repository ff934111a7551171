"""Several workers on one run: each has its share of the items, and a file of answers of its own, since SQLite
on a shared disk is for one machine at a time."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

from data_prep.synth.work_folder import ANSWERS
from megatron_sov.endpoints.cache import EndpointCache

PATTERN = "answers-*.sqlite"


@dataclass(frozen=True)
class Share:
    """One worker."""

    rank: int
    """Its number, from 0."""
    num_workers: int
    """Of the run."""

    @property
    def answers(self) -> str:
        """Return the name of its file of answers."""
        return f"answers-{self.rank:04}.sqlite"

    @property
    def prefix(self) -> str:
        """Return what the names of its parts begin with."""
        return f"w{self.rank:04}-"

    @property
    def signals(self) -> tuple[signal.Signals, ...]:
        """Return the signals that it takes itself; at SIGUSR1 the executor puts the job back."""
        return (signal.SIGTERM, signal.SIGINT)

    def holds(self, number: int) -> bool:
        """Return whether an item of this number is its."""
        return number % self.num_workers == self.rank


def merge_answers(output: Path) -> None:
    """Move what earlier workers have left into the run's file of answers."""
    if files := sorted(output.glob(PATTERN)):
        cache = EndpointCache(output / ANSWERS)
        for file in files:
            cache.take_over(file)
        cache.close()
