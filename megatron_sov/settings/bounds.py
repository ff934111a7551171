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
from megatron_sov.settings.problem import Code, show

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

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        """Return the type's schema with this bound behind it; pydantic asks for it."""
        from pydantic_core import PydanticCustomError, core_schema

        def ask(value: Any) -> Any:
            if found := self.broken(value):
                code, rule, way_out = found
                raise PydanticCustomError("asked", "{rule}", {"code": code, "rule": rule, "way_out": way_out})
            return value

        return core_schema.no_info_after_validator_function(ask, handler(source))


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
