"""What reading a medium may take."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class MediaLimits:
    """Limits of each medium, and of the process that decodes it."""

    file_bytes: int = 256 << 20
    """Size of a file."""
    pixels: int = 64_000_000
    """Width x height of a picture."""
    duration_s: float = 1800.0
    """Length of a sound or a video."""
    time_s: float = 60.0
    """Processor time of one medium; ten times of it on the clock."""
    memory_bytes: int = 4 << 30
    """Address space of the process that decodes."""

    def problems(self) -> list[str]:
        """Return one sentence for each rule that is broken."""
        p = [f"--max-{name} {getattr(self, field)}: must be at least {least:,}"
             for name, field, least in (("file-bytes", "file_bytes", 1000), ("pixels", "pixels", 1))
             if getattr(self, field) < least]
        if not 0 < self.duration_s < math.inf:
            p.append(f"--max-duration {self.duration_s}: must be a positive number of seconds")
        if not 0.1 <= self.time_s <= 86_400:
            p.append(f"--max-time {self.time_s}: must be 0.1 to 86,400 seconds of processor time")
        if self.memory_bytes < 1 << 30:
            p.append(f"--max-memory-bytes {self.memory_bytes}: must be at least {1 << 30}, which decoders "
                     "take "
                     "themselves")
        return p
