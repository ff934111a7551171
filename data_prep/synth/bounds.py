"""Bounds that the settings of several generators have, as types."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Le

from megatron_sov.settings import AtLeastOne, NotNegative, one_of

Temperature = Annotated[float, Ge(0), Le(2)]
"""Of a model that writes."""
Grade = Annotated[float, Ge(0), Le(10)]
"""Least grade of a judge; 0: none is asked."""
Threads = Annotated[AtLeastOne, Le(4096)]
"""Each is a thread of this process."""
Timeout = Annotated[NotNegative, Ge(0.1)]
"""Seconds of an attempt."""
MaxTokensField = Literal["max_tokens", "max_completion_tokens", "none"]
"""max_completion_tokens: what OpenAI's reasoning models take; none: for what refuses both."""


def _identified() -> frozenset[str]:
    from data_prep.quality.identify import KNOWN

    return KNOWN


Identified = Annotated[str, one_of(_identified)]
"""Language that texts are told to be in, as an ISO 639-1 code."""
Kappa = Annotated[float, Ge(-1), Le(1)]
"""Agreement beyond chance."""
PairWeight = Annotated[float, Ge(0), Le(100)]
