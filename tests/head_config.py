"""The fields of a model config that an output head reads."""

from types import SimpleNamespace
from typing import Any


def head_config(sequence_parallel: bool = False) -> Any:
    """Return it, for a head whose logits have no factor."""
    return SimpleNamespace(sequence_parallel=sequence_parallel, logits_multiplier=1.0)
