"""STEM: multiple choice, numbers with units, short answers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from megatron_sov.base.settings import Fraction
from megatron_sov.judge.rewards.answers import Quantity, final_answer, normalized, read_quantity, same
from megatron_sov.judge.rewards.reward import Refused, Row, Score, told_short

Kind = Literal["choice", "number", "text"]
_LETTER = re.compile(r"\W*([A-J])\W*", re.ASCII)
_SEVERAL = re.compile(r"\W*[A-J](?:\W+(?:(?:AND|OR)\W+)?[A-J])+\W*", re.ASCII)
_LEADING = re.compile(r"[\s(\[*\"']*(?:option|choice)?\s*[(\[]?([A-J])(?:[)\].:,*]|\s*$|\s+[-–—])",
                      re.IGNORECASE)


@dataclass(frozen=True)
class Stem:
    """1 for a right final answer, 0 for a wrong one or none."""

    CONTROL, cpu_limit_s = "", 10.0

    kind: Literal["auto", "choice", "number", "text"] = "auto"
    """auto: a single letter is a choice, what reads as a number is one, all else is text."""
    relative_tolerance: Fraction = 0.01
    """For numbers."""
    exact_integers: bool = True
    """A whole number without a unit is a count: another whole number is no rounding of it, however near."""
    unit_required: bool = False
    """A number without the answer's unit is wrong; without, it is taken to have that unit."""

    def score(self, row: Row) -> Score:
        """Return whether the response's final answer is the row's `answer`, or one of several in a list."""
        golds = _golds(row)
        response = row.get("response")
        if not isinstance(response, str):
            raise Refused("has no text 'response'")
        found = final_answer(response)
        kind: Kind = self._kind(golds)
        if found is None:
            return Score(0.0, {"kind": kind, "extracted": None})
        right = any(self._right(kind, found, gold, row) for gold in golds)
        return Score(float(right), {"kind": kind, "extracted": found[:200]})

    def _kind(self, golds: list[str]) -> Kind:
        if self.kind != "auto":
            return self.kind
        if all(_LETTER.fullmatch(gold) for gold in golds):
            return "choice"
        return "number" if all(read_quantity(gold) for gold in golds) else "text"

    def _right(self, kind: Kind, found: str, gold: str, row: Row) -> bool:
        if kind == "choice":
            return _choice(found, row) == _letter(gold)
        if kind == "text":
            return normalized(found) == normalized(gold) != ""
        expected, given = read_quantity(gold), _quantity(found)
        if expected is None:
            raise Refused(f"answer = {told_short(gold)} is no number with a known unit")
        if given is None or (self.unit_required and expected.dimension and not given.dimension):
            return False
        if self.exact_integers and expected.dimension is None and expected.is_whole and given.is_whole:
            return expected.plain == given.plain
        return same(expected, given, self.relative_tolerance)


def _golds(row: Row) -> list[str]:
    """Return the answers that are right.

    Raises:
        Refused: there are none, or something else than text.
    """
    answer = row.get("answer")
    given = answer if isinstance(answer, list) else [answer]
    golds = [gold for gold in given if isinstance(gold, str) and gold.strip()]
    if not golds or len(golds) < len(given):
        raise Refused(f"answer = {told_short(answer)} must be text, or a list of texts" if "answer" in row
                      else "has no 'answer'")
    return golds


def _letter(gold: str) -> str:
    match = _LETTER.fullmatch(gold.strip().upper())
    if match is None:
        raise Refused(f"answer = {told_short(gold)} must be a letter from A to J")
    return match[1]


def _choice(found: str, row: Row) -> str | None:
    """Return the letter that a final answer names, or whose choice it is, word for word; None for several."""
    if _SEVERAL.fullmatch(found.upper()):
        return None
    match = _LETTER.fullmatch(found.upper()) or _LEADING.match(found)
    if match:
        return match[1].upper()
    choices = row.get("choices")
    if isinstance(choices, list) and len(choices) <= 10:
        said = normalized(found)
        hits = [i for i, choice in enumerate(choices) if isinstance(choice,
                                                                    str) and normalized(choice) == said]
        if len(hits) == 1:
            return "ABCDEFGHIJ"[hits[0]]
    return None


def _quantity(found: str) -> Quantity | None:
    """Return the quantity of a final answer; of v = 3 m/s what stands behind the last sign of equality, where
    no other number is said to be equal to it."""
    *sides, last = re.split(r"=|≈|\\approx", found)
    given = read_quantity(last)
    others = list(filter(None, map(read_quantity, sides)))
    return given if given is None or all(same(other, given, 0.01) for other in others) else None
