"""Bounds that the settings of several generators have, as types."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Le

Temperature = Annotated[float, Ge(0), Le(2)]
"""Of a model that writes."""
Grade = Annotated[float, Ge(0), Le(10)]
"""Least grade of a judge; 0: none is asked."""
