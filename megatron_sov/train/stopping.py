"""Stopping in good order: signals set a flag, and all processes agree on the step after which they save and leave."""

from __future__ import annotations

import signal
from types import FrameType

import torch

from megatron_sov.mcore.checkpoint.save import Saver
from megatron_sov.mcore.parallel import collectives

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SIGUSR1 is what Slurm is asked to send before the time limit."""


class StopFlag:
    """Remembers a signal; `agreed` tells all processes whether any of them got one."""

    def __init__(self) -> None:
        self.reason: str | None = None
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name

    def agreed(self, saver: Saver) -> bool:
        """Return whether any process was asked to stop; called by every process after every step.

        How far the outstanding checkpoint is travels in the same all-reduce.

        Raises:
            UserError: the outstanding checkpoint failed.
        """
        asked, *progress = collectives.all_reduce_world(
            torch.tensor([float(self.reason is not None), *saver.progress()], dtype=torch.float64)).tolist()
        saver.advance(progress)
        return asked > 0
