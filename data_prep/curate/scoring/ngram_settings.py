"""Settings for hashed n-grams, without numba, so that `--help` stays fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le

from megatron_sov.base.settings import Bound, ProblemCode, Violation


def _check_power_of_two(number: int) -> Violation | None:
    if number.bit_count() == 1:
        return None
    return ProblemCode.BOUND, "must be a power of two", f"e.g. {1 << 18}"


@dataclass(frozen=True)
class NgramSettings:
    """Settings for `Ngrams`."""

    num_buckets: Annotated[int, Ge(1 << 8), Le(1 << 26), Bound(_check_power_of_two)] = 1 << 18
    """Hash buckets for n-grams; a power of two."""
    max_ngram: Annotated[int, Ge(1), Le(5)] = 2
    """Units in the longest n-gram."""
    max_chars: Annotated[int, Ge(1), Le(1 << 24)] = 20_000
    """Characters to read from the start of a text."""
