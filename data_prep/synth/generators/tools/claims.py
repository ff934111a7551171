"""Whether what a model says rests on what it was told: its numbers and its codes stand in a turn of the user,
in a result or in the rules, or come of two such numbers.

This sees an id that nobody gave and a price that nobody named.  It does not see a wrong word; the end state
and a judge are for that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

SMALL = 10
"""Whole numbers up to this count things; nobody needs to have said them."""
MAX_NUMBERS = 400
"""Numbers whose sums, differences and products are looked at."""
_NUMBER = re.compile(r"(?<![\d.])\d+(?:\.\d+)?")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_CODE = re.compile(r"(?<![A-Za-z0-9_])[A-Za-z][A-Za-z_]*-?\d+(?![A-Za-z0-9_])")


def unfounded(said: Iterable[str], told: Iterable[str]) -> list[str]:
    """Return the numbers and codes that rest on nothing.

    Args:
        said: by the model.
        told: to the model.
    """
    heard, spoken = "\n".join(told), "\n".join(said)
    codes = {code.casefold() for code in _CODE.findall(heard)}
    found = [code for code in dict.fromkeys(_CODE.findall(spoken)) if code.casefold() not in codes]
    known = _numbers(heard)
    open_ = [number for number in _numbers(_CODE.sub(" ", spoken))
             if number not in known and not (number <= SMALL and number.is_integer())]
    made = _made_of(known) if open_ else set()
    return [*found, *(f"{number:g}" for number in open_ if round(number, 4) not in made)]


def _numbers(text: str) -> dict[float, None]:
    return dict.fromkeys(float(number) for number in _NUMBER.findall(_THOUSANDS.sub("", text))
                         if len(number) < 16)


def _made_of(known: Iterable[float]) -> set[float]:
    few = list(known)[:MAX_NUMBERS]
    return {round(value, 4) for i, a in enumerate(few) for b in few[i:]
            for value in (a + b, abs(a - b), a * b)}
