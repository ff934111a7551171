"""Draws that follow from names alone: an item gets the same in every run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")


def draws_of(*names: object) -> Random:
    """Return a stream of draws, such as those for an item's id and an attempt's number."""
    return Random(json.dumps(names))


def share_of(*names: object) -> float:
    """Return a number from 0 up to 1, evenly spread over names."""
    return draws_of(*names).random()


def choose(choices: Sequence[T], *names: object) -> T:
    """Return one of some choices, each as often as the others over many names."""
    return draws_of(*names).choice(choices)
