"""Limits and settings for decoding media. Importing this module loads no decoder."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le

from megatron_sov.base.settings import AboveZero, AtLeastOne, Flag


@dataclass(frozen=True)
class MediaLimits:
    """Limits per media file and for the decoding process."""

    file_bytes: Annotated[int, Ge(1000), Flag("--max-file-bytes")] = 256 << 20
    """Largest media file, in bytes."""
    pixels: Annotated[AtLeastOne, Flag("--max-pixels")] = 64_000_000
    """Largest width x height, in pixels."""
    duration_s: Annotated[AboveZero, Flag("--max-duration", "S")] = 1800.0
    """Longest sound or video, in seconds."""
    time_s: Annotated[float, Ge(0.1), Le(86_400), Flag("--max-time", "S")] = 60.0
    """Processor time per file, in seconds; the limit by the clock is ten times longer."""
    memory_bytes: Annotated[int, Ge(1 << 30), Flag("--max-memory-bytes")] = 4 << 30
    """Address space for the decoding process, interpreter included."""


@dataclass(frozen=True)
class PictureRequest:
    """Settings for decoding a picture."""

    sides: tuple[int, ...]
    """Side lengths for the square output pictures, in pixels."""
    animated: str = "refuse"
    """Treatment for pictures with several frames: "refuse", or "first" for the first frame."""


@dataclass(frozen=True)
class VideoSampling:
    """Settings for sampling frames from a video."""

    side: int
    """Output height and width, in pixels."""
    frames_per_s: float = 1.0
    """Frames per second."""
    max_frames: int = 64
    """Most frames per video; longer videos are sampled at a lower rate."""

    def compute_times(self, duration_s: float) -> list[float]:
        """Split the video into equal parts and return the midpoints, in seconds."""
        count = max(1, min(self.max_frames, round(duration_s * self.frames_per_s)))
        return [(i + 0.5) * duration_s / count for i in range(count)]
