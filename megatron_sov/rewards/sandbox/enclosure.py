"""What an enclosure does for the server that forks programs into it."""

from __future__ import annotations

from typing import Protocol

from megatron_sov.rewards.sandbox.program import Limits
from megatron_sov.rewards.sandbox.watch import Watch


class Unavailable(Exception):
    """This machine cannot give an enclosure; why, in a few words."""


class Enclosure(Protocol):
    """Made in the server's process, used for one program at a time."""

    name: str
    watch: Watch
    """Of the processes below the server."""

    def fork(self, limits: Limits) -> int:
        """As os.fork()."""
        ...

    def enter(self, limits: Limits) -> str:
        """In the child: make a private folder, return it, give up all privileges."""
        ...

    def lock(self, limits: Limits) -> None:
        """In the child: restrict what it may do, for good."""
        ...

    def kill(self, pid: int) -> None:
        """End all processes of the program whose first process that is."""
        ...

    def clean(self) -> None:
        """Wait for what is left of a program, and remove its folder."""
        ...

    def close(self) -> None:
        """Remove what it made for all programs."""
        ...

    def overfull(self, limits: Limits) -> str:
        """Return why a program's files are too large; empty: they are not."""
        ...
