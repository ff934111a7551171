"""What reading a medium may take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le

from megatron_sov.base.settings import AboveZero, AtLeastOne, Flag


@dataclass(frozen=True)
class MediaLimits:
    """Limits of each medium, and of the process that decodes it."""

    file_bytes: Annotated[int, Ge(1000), Flag("--max-file-bytes")] = 256 << 20
    """Size of a medium's file."""
    pixels: Annotated[AtLeastOne, Flag("--max-pixels")] = 64_000_000
    """Width x height of a picture."""
    duration_s: Annotated[AboveZero, Flag("--max-duration", "S")] = 1800.0
    """Length of a sound or video, in seconds."""
    time_s: Annotated[float, Ge(0.1), Le(86_400), Flag("--max-time", "S")] = 60.0
    """Processor time to decode a medium, in seconds; ten times of it on the clock."""
    memory_bytes: Annotated[int, Ge(1 << 30), Flag("--max-memory-bytes")] = 4 << 30
    """Address space of the process that decodes, which takes a part of it for itself."""
