"""Random draws seeded by names, equal in every run."""

import json
from collections.abc import Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")


def create_random(*names: object) -> Random:
    """Create a random stream seeded by names, such as item id and attempt."""
    return Random(json.dumps(names))


def draw_share(*names: object) -> float:
    """Draw a number from [0, 1)."""
    return create_random(*names).random()


def draw_choice(choices: Sequence[T], *names: object) -> T:
    return create_random(*names).choice(choices)
