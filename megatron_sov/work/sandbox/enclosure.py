"""What an enclosure does for the server that forks programs into it."""

from __future__ import annotations

from typing import Protocol

from megatron_sov.work.sandbox.program import Limits
from megatron_sov.work.watch import Watch


class Unavailable(Exception):
    """This machine cannot give an enclosure; why, in a few words."""


class Enclosure(Protocol):
    """Made in the server's process, which its template is a fork of; used for one program at a time."""

    name: str
    watch: Watch
    """Of the processes below the template."""

    def prepare(self) -> str:
        """In the server: return the folder that a program will have."""
        ...

    def fork(self) -> int:
        """In the template: as os.fork()."""
        ...

    def enter(self, folder: str, limits: Limits) -> None:
        """In the program's process: see to it that it has that folder, give up all privileges."""
        ...

    def lock(self, folder: str, limits: Limits) -> None:
        """In the program's process: restrict what it may do, for good."""
        ...

    def kill(self, pid: int) -> None:
        """End all processes of the program whose first process that is."""
        ...

    def clean(self) -> None:
        """Remove a program's folder."""
        ...

    def close(self) -> None:
        """Remove what it made for all programs."""
        ...

    def overfull(self, limits: Limits) -> str:
        """Return why a program's files are too large; empty: they are not."""
        ...
