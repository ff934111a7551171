"""What a response's tokens were chosen by, and by which random numbers: both are functions of what was asked,
so that a piece that is written again is the same piece."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megatron_sov.digests import SHA256, Digest

DIGITS = 16
"""Of the hash of settings."""
STREAM_DIGITS = 15
"""60 bits of a hash: streams of all responses of a run differ, and an engine may take them as int64."""


def sampling_digest(settings: Mapping[str, Any]) -> str:
    """Return what stands in a response's key for the settings that its tokens were chosen by.

    Args:
        settings: JSON values: temperature, limits, seed, chat template, environment; and the round, since one
            policy may be asked the same prompt in two rounds.
    """
    return _hash(settings, DIGITS)


def stream_of(round: int, prompt: str, sample: int, attempt: int = 0, turn: int = 0) -> int:
    """Return the number of a response's stream of random numbers, which with the seed decides its samples.

    Args:
        round: that it is written for.
        prompt: its id.
        sample: number in its group.
        attempt: how often it was gone on with.
        turn: of an episode.
    """
    return int(_hash([round, prompt, sample, attempt, turn], STREAM_DIGITS), 16)


def _hash(value: Any, digits: int) -> str:
    digest = Digest(SHA256)
    digest.update(json.dumps(value, sort_keys=True).encode())
    return digest.text().partition(":")[2][:digits]
