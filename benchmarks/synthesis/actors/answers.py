"""A scripted model that solves some problems more often than others, for `answers`.  There is nothing to
plant: a measurement has no bad samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from synthesis.actors import solutions
from synthesis.cases import Case

SETTINGS: dict[str, Any] = {}


def reply(request: Mapping[str, Any]) -> str | Mapping[str, Any]:
    """Return a solution that is right in four of five draws, less often for larger numbers."""
    return solutions.answer(request, lambda working, right, way: solutions.boxed(
        working, right + (way > (3 if right < 100 else 1))))


def cases() -> list[Case]:
    """Return no case."""
    return []


def arguments(folder: Path) -> list[str]:
    """Write problems and return the command's words."""
    return solutions.arguments(folder)
