"""Python's garbage collection at the same steps on all processes.

Left to itself, each process collects when its own counters say so, and among hundreds there is one that does
so in nearly every step; all others wait for it in the next collective.
"""

from __future__ import annotations

import gc


class Garbage:
    """Collects every so many steps; 0: leaves it to Python."""

    def __init__(self, every_steps: int) -> None:
        """Keep what lives by now out of every later collection."""
        self._every_steps = every_steps
        if every_steps:
            gc.collect()
            gc.freeze()
            gc.disable()

    def after_step(self, step: int) -> None:
        """Collect, if `step` (1-based) is one to collect after."""
        if self._every_steps and step % self._every_steps == 0:
            gc.collect()

    def close(self) -> None:
        """Leave it to Python again."""
        if self._every_steps:
            gc.enable()
            gc.unfreeze()
