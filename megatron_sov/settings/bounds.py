"""Bounds of settings as types.  Each works alone, and with more of `annotated_types` around it:
`Annotated[NotNegativeInt, Le(MAX_STEPS)]`."""

from __future__ import annotations

import math
from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt

AtLeastOne = Annotated[int, Ge(1)]
NotNegativeInt = Annotated[int, Ge(0)]
NotNegative = Annotated[float, Ge(0), Lt(math.inf)]
AboveZero = Annotated[float, Gt(0), Lt(math.inf)]
Finite = Annotated[float, Gt(-math.inf), Lt(math.inf)]
Share = Annotated[float, Ge(0), Le(1)]
"""A part of a whole, the whole among them."""
Fraction = Annotated[float, Ge(0), Lt(1)]
"""A decay or a rate of dropping: never the whole."""
