"""Pictures, sounds and videos as numbers, within limits.

A picture becomes [3, side, side] of red, green and blue, a sound one float32 channel at the rate that is
asked for, a video its frames: from an animated picture, or a container (with PyAV)."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from annotated_types import Ge, Le

from megatron_sov.base.documents import BadRecord
from megatron_sov.base.settings import AboveZero, AtLeastOne, Flag

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile


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


PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Those that are decoded: pixels alone, and nothing that is a program."""
_DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N")


@dataclass(frozen=True)
class PictureRequest:
    """How a picture is to be read."""

    sides: tuple[int, ...]
    """Heights and widths in pixels, in each of which it is given."""
    animated: str = "refuse"
    """What becomes of one with several frames: "refuse", or "first" takes the first."""


def read_picture(file: Path, asked: PictureRequest, limits: MediaLimits) -> tuple[list[np.ndarray],
                                                                                  dict[str, Any]]:
    """Return a picture as one uint8 array [3, side, side] for each side asked for, and what it was.

    It is made square by bicubic resampling, as the published tokenizer's processor does; what it was says its
    width and height before, and the type of its content.

    Raises:
        BadRecord: it is none, is too large, is animated, or is cut off.
    """
    with opened(file, limits) as picture:
        # an MPO is a photograph with others of it behind: of two lenses, or smaller
        if (getattr(picture, "is_animated", False) and picture.format != "MPO"
                and asked.animated == "refuse"):
            raise BadRecord("animated", f"is an animated picture of {getattr(picture, 'n_frames', 0)} "
                                        "frames; make "
                                        'it a part of type "video", or take the first frame '
                                        "(--animated first)")
        mime_type = picture.get_format_mimetype() or "image/png"
        rgb = upright(picture)
    arrays = [squared(rgb, side) for side in asked.sides]
    return arrays, {"width": rgb.width, "height": rgb.height, "mime_type": mime_type}


def opened(file: Path, limits: MediaLimits) -> ImageFile:
    """Open a picture, its size checked, nothing decoded.

    Raises:
        BadRecord: it is none, or too large.
    """
    from PIL import Image, UnidentifiedImageError

    Image.MAX_IMAGE_PIXELS = None  # `limits` says it
    try:
        picture = Image.open(file, formats=PICTURE_FORMATS)
    except UnidentifiedImageError:
        raise BadRecord("no_picture", f"is no picture in one of {', '.join(PICTURE_FORMATS)}; "
                                      "convert it, or leave it out") from None
    width, height = picture.size
    if width * height > limits.pixels:
        picture.close()
        raise BadRecord("pixels", f"has {width} x {height} = {width * height:,} pixels, at most "
                                  f"{limits.pixels:,} are read; shrink it, or raise --max-pixels")
    return picture


def upright(picture: Image) -> Image:
    """Return a picture's pixels in red, green and blue, turned as it says, on white where one sees through.

    Raises:
        BadRecord: it is cut off, damaged, or its pixels are no colours.
    """
    from PIL import ImageOps

    try:
        picture.load()
        return _in_colour(ImageOps.exif_transpose(picture))
    except (OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError) as e:
        raise BadRecord("truncated", f"is cut off or damaged ({str(e)[:200]}); fetch it again, or leave it "
                                     "out") from None


def _in_colour(picture: Image) -> Image:
    from PIL import Image

    if picture.mode in _DEEP:
        deep = np.asarray(picture).astype(np.int64)
        if deep.min() < 0 or deep.max() > 65535:
            raise BadRecord("depth", f"has pixels from {deep.min()} to {deep.max()}, which are neither 8 nor "
                                     "16 bits; convert it")
        # the upper byte: Pillow's conversion of wide integers cuts at 255, and leaves a white picture
        return Image.fromarray((deep >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise BadRecord("depth", "has pixels of floating point, whose white nobody knows; convert it")
    if "A" in picture.getbands() or "a" in picture.getbands() or "transparency" in picture.info:
        seen = picture.convert("RGBA")
        white = Image.new("RGBA", seen.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, seen).convert("RGB")
    return picture.convert("RGB")


def squared(rgb: Image, side: int) -> np.ndarray:
    """Return a picture of red, green and blue as uint8 [3, side, side]."""
    from PIL import Image

    small = rgb if rgb.size == (side, side) else rgb.resize((side, side), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(small, np.uint8).transpose(2, 0, 1))


SOUND_FORMATS = {"WAV": "audio/wav", "WAVEX": "audio/wav", "RF64": "audio/wav", "FLAC": "audio/flac",
           "OGG": "audio/ogg", "MP3": "audio/mpeg"}
"""libsndfile's name of a format -> type of its content."""
LEAST_RATE_HZ, MOST_RATE_HZ = 1000, 768_000
MOST_CHANNELS = 64
PEAK = 16.0
"""Samples of floating point lie in -1..1, and a little above it where a sound is loud: far above it they are
numbers of another kind."""
_BLOCK_SAMPLES = 1 << 20
_MOST_CHUNKS = 1000
"""Parts of a WAV file before its sound."""
_UNKNOWN_BYTES = 0xFFFFFFFF
"""Length in the header of a WAV file whose length stands elsewhere, or was not known when it was written."""


def read_sound(file: Path, rate_hz: int, limits: MediaLimits) -> tuple[np.ndarray, dict[str, Any]]:
    """Return a sound as float32 [samples] at `rate_hz`, the mean of its channels, and what it was.

    Raises:
        BadRecord: it is none, is empty, too long, cut off, or has samples that are no numbers.
    """
    import soundfile

    try:
        check_wav_length(file)
        with soundfile.SoundFile(file) as sound:
            if sound.format not in SOUND_FORMATS:
                raise BadRecord("no_sound", f"is a sound of format {sound.format}, read are "
                                            f"{', '.join(SOUND_FORMATS)}; convert it")
            samples = _mono(sound, limits)
            own_hz, mime_type = int(sound.samplerate), SOUND_FORMATS[sound.format]
    except soundfile.LibsndfileError as e:
        raise BadRecord("no_sound", f"is no sound that is read ({str(e).rpartition(': ')[2][:120]}); convert "
                                    "it to WAV, FLAC, OGG or MP3, or leave it out") from None
    if not len(samples):
        raise BadRecord("silence", "is a sound of no length; leave it out")
    if not np.isfinite(samples).all():
        raise BadRecord("numbers", "has samples that are no numbers; mend it, or leave it out")
    if (peak := float(np.abs(samples).max())) > PEAK:
        raise BadRecord("numbers", f"has samples up to {peak:g}, which must lie in -1..1; scale it")
    duration_s = len(samples) / own_hz
    found = resampled(samples, own_hz, rate_hz)
    if not len(found):
        raise BadRecord("silence", f"is a sound of {duration_s:g} s, which is less than a sample; leave it "
                                   "out")
    return found, {"duration_s": duration_s, "mime_type": mime_type}


def check_wav_length(file: Path) -> None:
    """Check that a WAV file holds all bytes that its header states; other files pass.

    libsndfile takes the length of a cut file for the length of its sound.

    Raises:
        BadRecord: its data end before the length in the header.
    """
    if not file.is_file():
        return  # libsndfile names the fault
    with open(file, "rb") as f:
        head = f.read(12)
        if head[:4] not in (b"RIFF", b"RIFX", b"RF64") or head[8:] != b"WAVE":
            return
        endian = ">" if head[:4] == b"RIFX" else "<"
        rf64_data_bytes = None
        for _ in range(_MOST_CHUNKS):
            if len(chunk := f.read(8)) < 8:
                return
            name, (size_bytes,) = chunk[:4], struct.unpack(f"{endian}I", chunk[4:])
            if name == b"ds64" and len(sizes := f.read(16)) == 16:
                rf64_data_bytes = struct.unpack("<QQ", sizes)[1]
                f.seek(size_bytes - 16 + size_bytes % 2, os.SEEK_CUR)
                continue
            if name == b"data":
                break
            f.seek(size_bytes + size_bytes % 2, os.SEEK_CUR)
        else:
            return
        if size_bytes == _UNKNOWN_BYTES:
            # programs that write into a pipe know no length
            size_bytes = 0 if rf64_data_bytes is None else rf64_data_bytes
        found_bytes = file.stat().st_size - f.tell()
    if found_bytes < size_bytes:
        raise BadRecord("truncated", f"is cut off: {found_bytes:,} of {size_bytes:,} bytes of sound are "
                                     "there; fetch it again, or leave it out")


def _mono(sound: Any, limits: MediaLimits) -> np.ndarray:
    """Return the mean of a sound's channels.

    Raises:
        BadRecord: it is too long, or has rates or channels that no sound has.
    """
    if not LEAST_RATE_HZ <= sound.samplerate <= MOST_RATE_HZ or not 0 < sound.channels <= MOST_CHANNELS:
        raise BadRecord("rate", f"has {sound.channels} channels of {sound.samplerate} samples a second, "
                                f"which no sound has (1 to {MOST_CHANNELS}, {LEAST_RATE_HZ:,} to "
                                f"{MOST_RATE_HZ:,}); convert it")
    most = int(limits.duration_s * sound.samplerate)
    if sound.frames > most:
        raise _too_long(sound.frames / sound.samplerate, limits)
    parts, passed = [], 0
    # what a header says of the length need not be true
    while len(block := sound.read(_BLOCK_SAMPLES // sound.channels, dtype="float32", always_2d=True)):
        passed += len(block)
        if passed > most:
            raise _too_long(passed / sound.samplerate, limits)
        parts.append(block.mean(axis=1))
    if passed < sound.frames and sound.format != "MP3":  # whose header says it about
        raise BadRecord("truncated",
                        f"is cut off: {passed:,} of {sound.frames:,} samples are there; fetch it "
                                     "again, or leave it out")
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _too_long(found_s: float, limits: MediaLimits) -> BadRecord:
    return BadRecord("long", f"lasts {found_s:,.0f} s or longer, at most {limits.duration_s:g} s are read; "
                             "cut it, or raise --max-duration")


def resampled(samples: np.ndarray, own_hz: int, rate_hz: int) -> np.ndarray:
    """Return float32 samples at another rate, by scipy's polyphase filter."""
    if own_hz == rate_hz:
        return samples.astype(np.float32, copy=False)
    from scipy.signal import resample_poly

    # in lowest terms: the filter grows with the numbers
    common = math.gcd(own_hz, rate_hz)
    return np.asarray(resample_poly(samples, rate_hz // common, own_hz // common), np.float32)


CONTAINERS = {".mp4": "video/mp4", ".m4v": "video/mp4", ".mov": "video/quicktime", ".webm": "video/webm",
              ".mkv": "video/x-matroska", ".avi": "video/x-msvideo"}
"""Ending -> type of the content."""
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
    if file.suffix.lower() in CONTAINERS:
        frames, duration_s = _of_container(file, sampling, limits)
        mime_type = CONTAINERS[file.suffix.lower()]
    else:
        frames, duration_s, mime_type = _of_animation(file, sampling, limits)
    return [np.stack(frames)], {"duration_s": duration_s, "mime_type": mime_type}


def _refuse_long(duration_s: float, limits: MediaLimits) -> None:
    if duration_s > limits.duration_s:
        raise BadRecord("long", f"lasts {duration_s:,.0f} s, at most {limits.duration_s:g} s are read; cut "
                                "it, or raise --max-duration")


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
                                         "it again, or leave it out") from None
        yield picture


def _shown_s(frame: Image) -> float:
    """Return how long a frame is shown; one that does not say it, as players do."""
    shown_ms = frame.info.get("duration") or 0
    return shown_ms / 1000 if isinstance(shown_ms, (int, float)) and shown_ms > 0 else DEFAULT_FRAME_S


def _of_container(file: Path, sampling: VideoFrames, limits: MediaLimits) -> tuple[list[np.ndarray], float]:
    try:
        import av
    except ImportError:
        raise BadRecord("library", "is a video container, which needs PyAV: `pip install av`") from None
    try:
        with av.open(str(file)) as container:
            stream = container.streams.video[0]
            if not container.duration:
                raise BadRecord("no_video", "does not say how long it is; convert it")
            duration_s = container.duration / 1e6
            _refuse_long(duration_s, limits)
            if stream.width * stream.height > limits.pixels:
                raise BadRecord("pixels", f"has {stream.width} x {stream.height} pixels, at most "
                                          f"{limits.pixels:,} are read; shrink it, or raise --max-pixels")
            waiting, frames = sampling.times(duration_s), list[np.ndarray]()
            for frame in container.decode(stream):
                while len(frames) < len(waiting) and (frame.time or 0.0) >= waiting[len(frames)]:
                    frames.append(squared(frame.to_image(), sampling.side))
                last = frame
            # the length that a container tells may be longer than its frames are
            frames += [squared(last.to_image(), sampling.side)] * (len(waiting) - len(frames))
            return frames, duration_s
    # UnboundLocalError: not one frame came, so there is no last one
    except (av.error.FFmpegError, IndexError, UnboundLocalError) as e:
        raise BadRecord("truncated", f"is no video that is read, cut off or damaged ({str(e)[:200]}); fetch "
                                     "it again, or leave it out") from None
