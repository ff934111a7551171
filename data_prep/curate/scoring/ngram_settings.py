"""Settings of n-grams, apart from what turns texts into them: a command's help needs no compiler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le

from megatron_sov.base.settings import Bound, ProblemCode, Violation


def _no_power_of_two(number: int) -> Violation | None:
    return None if number.bit_count() == 1 else (ProblemCode.BOUND, "must be a power of two",
                                                 f"e.g. {1 << 18}")


@dataclass(frozen=True)
class NgramSettings:
    """Which n-grams are looked at."""

    num_buckets: Annotated[int, Ge(1 << 8), Le(1 << 26), Bound(_no_power_of_two)] = 1 << 18
    """Buckets that n-grams are hashed to; a power of two."""
    max_ngram: Annotated[int, Ge(1), Le(5)] = 2
    """Units of the longest n-gram."""
    max_chars: Annotated[int, Ge(1), Le(1 << 24)] = 20_000
    """Characters of a text that are read, from its beginning."""
