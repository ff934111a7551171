"""YAML files of mixtures: every mistake is told, with the line that it stands on."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_sov.errors import UserError, list_problems, nearest
from megatron_sov.settings import Place, read_located, read_text


class YamlFile:
    """What a file holds, and the mistakes that were found in it."""

    def __init__(self, file: Path) -> None:
        """Read a file.

        Raises:
            UserError: it cannot be read, or is no YAML that is taken.
        """
        self.file = file
        self._found = read_located(read_text(file))
        self.value: Any = self._found.value
        self.problems = [(p.line, f"{file}:{p.line}: {p.sentence}") for p in self._found.problems]
        """Line and sentence of each mistake."""
        self.raise_problems()

    def wrong(self, place: Place, rule: str) -> None:
        """Note a mistake.

        Args:
            place: where it is; what is missing has the line of what should hold it.
            rule: what it should be, and what to do.
        """
        value: Any = self.value
        if place in self._found.lines:
            for key in place:
                value = value[key]
        else:
            value = None
        shown = "" if value is None or isinstance(value, (dict, list)) else f" = {str(value)[:80]!r}"
        line = self._found.line(place)
        self.problems.append((line, f"{self.file}:{line}: {'.'.join(map(str, place)) or 'the file'}{shown}: "
                                    f"{rule}"))

    def check_keys(self, place: Place, found: Any, allowed: Iterable[str]) -> dict[str, Any]:
        """Return a mapping, with a mistake noted for each key that it may not have; {} of what is none."""
        if not isinstance(found, dict):
            self.wrong(place, f"must hold {', '.join(allowed)}")
            return {}
        for key in found:
            if key not in allowed:
                self.wrong((*place, key), f"is no key here (there are: {', '.join(allowed)})"
                                               f"{nearest(key, allowed) or '; leave it out'}")
        return found

    def number(self, place: Place, value: Any, low: float, high: float = float("inf"), *,
               whole: bool = False) -> float:
        """Return a number; `low`, and a mistake noted, for what is none or lies outside of its bounds."""
        try:
            number = float("nan") if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = float("nan")
        if not (math.isfinite(number) and low <= number <= high) or (whole and number != int(number)):
            bounds = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
            self.wrong(place, f"must be a {'whole ' if whole else ''}number, {bounds}")
            return low
        return number

    def raise_problems(self) -> None:
        """Raise `UserError` with all mistakes, if there are any."""
        if self.problems:
            in_order = [sentence for _, sentence in sorted(self.problems, key=lambda problem: problem[0])]
            raise UserError(list_problems(str(self.file), in_order))
