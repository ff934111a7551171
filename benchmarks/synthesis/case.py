"""A planted case: an item, a model that answers for it, and whether something of it is to be kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from data_prep.synth.generator import Item

Replies = Callable[[Mapping[str, Any]], "str | Mapping[str, Any]"]
"""A model as a function of a chat-completions body."""


@dataclass(frozen=True)
class Case:
    """One case; it counts as kept when a sample passes all its checks."""

    item: Item
    """What the generator is given."""
    replies: Replies
    """The model that writes and judges."""
    good: bool
    """Whether it is to be kept."""
    what: str
    """What is planted, in a few words; the same for all cases of a kind."""
