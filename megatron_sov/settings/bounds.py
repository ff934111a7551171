"""Bounds of settings as types.  Each works alone, and with more of `annotated_types` around it:
`Annotated[NotNegativeInt, Le(MAX_STEPS)]`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt

from megatron_sov.errors import nearest
from megatron_sov.settings.problem import UNSET, Code, Problem, show

Breach = tuple[Code, str, str]
"""Code, rule and way out of a problem; see `Problem`."""

AtLeastOne = Annotated[int, Ge(1)]
NotNegativeInt = Annotated[int, Ge(0)]
NotNegative = Annotated[float, Ge(0), Lt(math.inf)]
AboveZero = Annotated[float, Gt(0), Lt(math.inf)]
Finite = Annotated[float, Gt(-math.inf), Lt(math.inf)]
Share = Annotated[float, Ge(0), Le(1)]
"""A part of a whole, the whole among them."""
Fraction = Annotated[float, Ge(0), Lt(1)]
"""A decay or a rate of dropping: never the whole."""


@dataclass(frozen=True)
class Bound:
    """A bound that no library has a name for."""

    broken: Callable[[Any], Breach | None]
    """Returns what a value of the right type breaks."""
    may_be_secret: bool = False
    """Whether a message leaves out what was given: a URL that holds a key, say."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        """Return the type's schema with this bound behind it; pydantic asks for it."""
        from pydantic_core import PydanticCustomError, core_schema

        def ask(value: Any) -> Any:
            if found := self.broken(value):
                code, rule, way_out = found
                raise PydanticCustomError("asked", "{rule}", {"code": code, "rule": rule, "way_out": way_out,
                                                              "may_be_secret": self.may_be_secret})
            return value

        return core_schema.no_info_after_validator_function(ask, handler(source))


@dataclass(frozen=True)
class Relation:
    """A bound that another field of the same class sets; where that has no value, there is none."""

    other: str
    """The other field."""
    holds: Callable[[Any, Any], bool]
    """Says whether a value goes with the other's."""
    rule: str
    """As the sentence goes on in front of the other's name: "must be at most"."""
    way_out: str = ""
    shows_value: bool = True
    """Whether the other's value is told too."""

    def broken_by(self, settings: Any, name: str) -> Problem | None:
        """Return the problem of the field `name`, where there is one."""
        value, other = getattr(settings, name), getattr(settings, self.other)
        if value is None or self.holds(value, other):
            return None
        return Problem(Code.RULE, name, self.rule, value, self.way_out, other=self.other,
                       other_value=other if self.shows_value else UNSET)


def at_most(other: str) -> Relation:
    """Return the bound of a number that is never above another field's."""
    return Relation(other, lambda value, most: most is None or value <= most, "must be at most")


def below(other: str) -> Relation:
    """Return the bound of a number that stays below another field's."""
    return Relation(other, lambda value, end: end is None or value < end, "must be below")


def multiple_of(other: str) -> Relation:
    """Return the bound of a number, or of each of several, that another field's divides."""
    return Relation(other, lambda value, part: not any(
        one % part for one in (value if isinstance(value, tuple) else (value,))), "must be a multiple of")


def other_than(other: str) -> Relation:
    """Return the bound of a text, where it is given, that another field must not be too."""
    return Relation(other, lambda value, taken: not value or value != taken, "must not be that of",
                    "give each its own")


def only_with(other: str) -> Relation:
    """Return the bound of a setting that does nothing where another field is not set."""
    return Relation(other, lambda value, there: bool(there or not value), "is only for",
                    "add that, or leave this out", shows_value=False)


def not_with(other: str) -> Relation:
    """Return the bound of a setting that has no meaning beside another one."""
    return Relation(other, lambda value, there: not (value and there), "goes without",
                    "leave one of them out", shows_value=False)


def one_of(known: Callable[[], Collection[str]]) -> Bound:
    """Return the bound of a text that is one of those which a table or a file has when it is read."""
    def broken(value: str) -> Breach | None:
        words = sorted(filter(None, known()))
        if value in known():
            return None
        return Code.CHOICE, f"must be one of {', '.join(words)}", nearest(value, words).removeprefix("; ")

    return Bound(broken)


def _repeated(values: Collection[Any]) -> Breach | None:
    twice = [value for value, count in Counter(values).items() if count > 1]
    return (Code.BOUND, f"has {show(twice[0])} twice", "name it once") if twice else None


NotBlank = Annotated[str, Bound(lambda text: None if text.strip() else (Code.BOUND, "must not be empty", ""))]
ONCE = Bound(_repeated)
"""Of a list that has no item twice."""
RISING = Bound(lambda pair: None if pair[0] <= pair[1] else (
    Code.BOUND, "must have the lower number first", ""))
"""Of the two ends of a stretch."""
