"""A video as frames: a folder of pictures, an animated picture, or a container where PyAV is installed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_sov.base.documents import BadRecord
from megatron_sov.omni.media.reading.limits import MediaLimits
from megatron_sov.omni.media.reading.pictures import PICTURE_SUFFIXES, opened, squared, upright

if TYPE_CHECKING:
    from PIL.Image import Image

CONTAINERS = {".mp4": "video/mp4", ".m4v": "video/mp4", ".mov": "video/quicktime", ".webm": "video/webm",
              ".mkv": "video/x-matroska", ".avi": "video/x-msvideo"}
"""Ending -> type of the content."""
FOLDER_TYPE = "video/x-frames"
MOST_FRAMES_IN = 100_000
DEFAULT_FRAME_S = 0.1
"""Of an animated picture that does not say how long a frame is shown."""


@dataclass(frozen=True)
class VideoFrames:
    """Which frames are taken."""

    side: int
    """Height and width that they are given."""
    frames_per_s: float = 1.0
    """Frames of a second."""
    most_frames: int = 64
    """Of a video; of a longer one fewer frames of a second are taken."""
    folder_frames_per_s: float = 1.0
    """How many pictures of a folder are a second."""

    def times(self, duration_s: float) -> list[float]:
        """Return when frames are taken: in the middle of equal parts of the video."""
        number = max(1, min(self.most_frames, round(duration_s * self.frames_per_s)))
        return [(i + 0.5) * duration_s / number for i in range(number)]


def read_video(file: Path, sampling: VideoFrames,
               limits: MediaLimits) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Return the frames of a video, uint8 [frames, 3, side, side], and what it was.

    Raises:
        BadRecord: it is none, too long, or cut off.
    """
    if file.is_dir():
        frames, duration_s, mime_type = _of_folder(file, sampling, limits)
    elif file.suffix.lower() in CONTAINERS:
        frames, duration_s = _of_container(file, sampling, limits)
        mime_type = CONTAINERS[file.suffix.lower()]
    else:
        frames, duration_s, mime_type = _of_animation(file, sampling, limits)
    return [np.stack(frames)], {"duration_s": duration_s, "mime_type": mime_type}


def _refuse_long(duration_s: float, limits: MediaLimits) -> None:
    if duration_s > limits.duration_s:
        raise BadRecord("long", f"lasts {duration_s:,.0f} s, at most {limits.duration_s:g} s are read; cut "
                                "it, or "
                                "raise --max-duration")


def _of_folder(folder: Path, sampling: VideoFrames,
               limits: MediaLimits) -> tuple[list[np.ndarray], float, str]:
    # frame-2 before frame-10
    files = sorted((f for f in folder.iterdir() if f.suffix.lower() in PICTURE_SUFFIXES), key=lambda f: [
        int(part) if part.isdigit() else part for part in re.split(r"(\d+)", f.name)])
    if not files:
        raise BadRecord("no_video", f"is a folder without pictures ({', '.join(PICTURE_SUFFIXES)}); name a video")
    if len(files) > MOST_FRAMES_IN:
        raise BadRecord("long", f"is a folder of {len(files):,} pictures, at most {MOST_FRAMES_IN:,} are "
                                "read; "
                                "divide it")
    if link := next((f for f in files if f.is_symlink()), None):
        raise BadRecord("outside", f"has the link {link.name}; copy the picture there")
    duration_s = len(files) / sampling.folder_frames_per_s
    _refuse_long(duration_s, limits)
    frames = []
    for time_s in sampling.times(duration_s):
        number = min(int(time_s * sampling.folder_frames_per_s), len(files) - 1)
        with opened(files[number], limits) as picture:
            frames.append(squared(upright(picture), sampling.side))
    return frames, duration_s, FOLDER_TYPE


def _of_animation(file: Path, sampling: VideoFrames,
                  limits: MediaLimits) -> tuple[list[np.ndarray], float, str]:
    """Read twice: how long each frame is shown is known when all are passed."""
    with opened(file, limits) as picture:
        mime_type = picture.get_format_mimetype() or "image/gif"
        shown_s = [_shown_s(frame) for frame in _frames(picture, limits)]
    ends = np.cumsum(shown_s)
    _refuse_long(float(ends[-1]), limits)
    times = sampling.times(float(ends[-1]))
    wanted = np.minimum(np.searchsorted(ends, times, side="right"), len(ends) - 1).tolist()
    kept: dict[int, np.ndarray] = {}
    with opened(file, limits) as picture:
        for number, frame in enumerate(_frames(picture, limits)):
            if number in wanted:
                kept[number] = squared(upright(frame.copy()), sampling.side)
    return [kept[number] for number in wanted], float(ends[-1]), mime_type


def _frames(picture: Image, limits: MediaLimits) -> Iterator[Image]:
    """Yield the frames of an animated picture, each in the place of the one before."""
    most = min(MOST_FRAMES_IN, int(limits.duration_s * 1000) + 1)
    for number in range(getattr(picture, "n_frames", 1)):
        if number >= most:
            raise BadRecord("long", f"has more than {most:,} frames; cut it")
        try:
            picture.seek(number)
            picture.load()
        except (OSError, EOFError, ValueError, SyntaxError) as e:
            raise BadRecord("truncated", f"is cut off or damaged at frame {number} ({str(e)[:200]}); fetch "
                                         "it "
                                         "again, or leave it out") from None
        yield picture


def _shown_s(frame: Image) -> float:
    """Return how long a frame is shown; one that does not say it, as players do."""
    shown_ms = frame.info.get("duration") or 0
    return shown_ms / 1000 if isinstance(shown_ms, (int, float)) and shown_ms > 0 else DEFAULT_FRAME_S


def _of_container(file: Path, sampling: VideoFrames, limits: MediaLimits) -> tuple[list[np.ndarray], float]:
    try:
        import av
    except ImportError:
        raise BadRecord("library", "is a video container, which needs PyAV: `pip install av`; or give a "
                                   "folder of "
                                   "its frames") from None
    try:
        with av.open(str(file)) as container:
            stream = container.streams.video[0]
            if not container.duration:
                raise BadRecord("no_video", "does not say how long it is; convert it")
            duration_s = container.duration / 1e6
            _refuse_long(duration_s, limits)
            if stream.width * stream.height > limits.pixels:
                raise BadRecord("pixels", f"has {stream.width} x {stream.height} pixels, at most "
                                          f"{limits.pixels:,} "
                                          "are read; shrink it, or raise --max-pixels")
            waiting, frames = sampling.times(duration_s), list[np.ndarray]()
            for frame in container.decode(stream):
                while len(frames) < len(waiting) and (frame.time or 0.0) >= waiting[len(frames)]:
                    frames.append(squared(frame.to_image(), sampling.side))
                last = frame
            frames += [squared(last.to_image(), sampling.side)] * (len(waiting) - len(frames))
            return frames, duration_s
    except (av.error.FFmpegError, IndexError, UnboundLocalError) as e:
        raise BadRecord("truncated", f"is no video that is read, cut off or damaged ({str(e)[:200]}); "
                                     "fetch it "
                                     "again, or leave it out") from None
