"""A planted sample: what a generator starts from, what models answer, and whether it should be kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from data_prep.synth.generator import Item

Replies = Callable[[Mapping[str, Any]], "str | Mapping[str, Any]"]
"""Takes a chat-completions body, gives a text or a message."""


@dataclass(frozen=True)
class Case:
    """One planted sample."""

    item: Item
    replies: Replies
    """The model, for this item alone."""
    good: bool
    """Whether it should be kept."""
    what: str
    """Which fault is planted; the same for all of its kind."""
