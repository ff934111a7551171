"""What is wrong with the description of a world, gathered so that all of it can be told at once."""

from __future__ import annotations

MAX_PROBLEMS = 40
"""Told of one world; more of them say no more."""


class Problems:
    """Sentences, each with the place that it is about."""

    def __init__(self) -> None:
        """Nothing is wrong yet."""
        self.told: list[str] = []

    def add(self, where: str, what: str) -> None:
        """Note one, unless there are `MAX_PROBLEMS`."""
        if len(self.told) < MAX_PROBLEMS:
            self.told.append(f"{where}: {what}")


def shown(value: object) -> str:
    """Return a value as a sentence may hold it."""
    return repr(str(value)[:60])
