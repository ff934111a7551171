"""Decode pictures, sounds and videos into arrays, within `MediaLimits`. Runs in the decoding process."""

import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from megatron_sov.base.documents import BadRecord
from megatron_sov.omni.media.reading.limits import MediaLimits, PictureRequest, VideoSampling

PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Pillow formats to decode: pixels only. Formats that embed programs, such as EPS, are excluded."""
_16_BIT_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
SOUND_FORMATS = {"WAV": "audio/wav", "WAVEX": "audio/wav", "RF64": "audio/wav", "FLAC": "audio/flac",
                 "OGG": "audio/ogg", "MP3": "audio/mpeg"}
"""libsndfile format -> MIME type."""
MIN_RATE_HZ, MAX_RATE_HZ = 1000, 768_000
MAX_CHANNELS = 64
MAX_PEAK = 16.0
"""Largest float sample: loud recordings slightly exceed 1, and larger samples are in another unit."""
_BLOCK_SAMPLES = 1 << 20
_MAX_WAV_CHUNKS = 1000
_UNKNOWN_BYTES = 0xFFFFFFFF
"""Data length in a WAV header if the `ds64` chunk has the length, or if the writer did not know it."""
CONTAINERS = {".mp4": "video/mp4", ".m4v": "video/mp4", ".mov": "video/quicktime", ".webm": "video/webm",
              ".mkv": "video/x-matroska", ".avi": "video/x-msvideo"}
"""File suffix -> MIME type."""
MAX_ANIMATION_FRAMES = 100_000
DEFAULT_FRAME_S = 0.1
"""Display time for animation frames without a duration, in seconds."""


def read_picture(file: Path, request: PictureRequest,
                 limits: MediaLimits) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Decode a picture.

    Bicubic resampling makes the picture square, as in the published tokenizer's image processor.

    Returns:
        One uint8 array [3, side, side] (RGB) for each side in `request`; and `width` and `height` before
        resampling in pixels, and `mime_type`.

    Raises:
        BadRecord: the file is not a picture, too large, animated or truncated.
    """
    with open_picture(file, limits) as picture:
        # An MPO file is a photograph followed by stereo views or previews.
        is_animation = getattr(picture, "is_animated", False) and picture.format != "MPO"
        if is_animation and request.animated == "refuse":
            raise BadRecord("animated", f"is an animated picture of {getattr(picture, 'n_frames', 0)} "
                                        'frames; declare it as type "video", or take the first frame '
                                        "(--animated first)")
        mime_type = picture.get_format_mimetype() or "image/png"
        rgb = to_upright_rgb(picture)
    arrays = [resize_square(rgb, side) for side in request.sides]
    return arrays, {"width": rgb.width, "height": rgb.height, "mime_type": mime_type}


def open_picture(file: Path, limits: MediaLimits) -> ImageFile:
    """Open a picture and check its size, without decoding pixels. Raises `BadRecord`: the file is not a
    picture, or too large."""
    Image.MAX_IMAGE_PIXELS = None  # `limits.pixels` replaces Pillow's own limit
    try:
        picture = Image.open(file, formats=PICTURE_FORMATS)
    except UnidentifiedImageError:
        raise BadRecord("no_picture", f"is not a picture in one of {', '.join(PICTURE_FORMATS)}; "
                                      "convert it, or leave it out") from None
    width, height = picture.size
    if width * height > limits.pixels:
        picture.close()
        raise BadRecord("pixels", f"has {width} x {height} = {width * height:,} pixels, at most "
                                  f"{limits.pixels:,} are read; shrink it, or raise --max-pixels")
    return picture


def to_upright_rgb(picture: Image.Image) -> Image.Image:
    """Decode a picture to RGB, rotated as its EXIF data say, with transparency on white. Raises `BadRecord`:
    the picture is truncated or damaged, or its pixels cannot be converted to RGB."""
    try:
        picture.load()
        return _to_rgb(ImageOps.exif_transpose(picture))
    except (OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError) as e:
        raise BadRecord("truncated", f"is cut off or damaged ({str(e)[:200]}); fetch it again, or leave it "
                                     "out") from None


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode in _16_BIT_MODES:
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise BadRecord("depth", f"has pixels from {values.min()} to {values.max()}, which are neither 8 "
                                     "nor 16 bits; convert it")
        # Take the upper byte: Pillow's own conversion clips at 255, which turns the picture white.
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise BadRecord("depth", "has floating-point pixels of unknown range; convert it")
    if {"A", "a"} & {*picture.getbands()} or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return picture.convert("RGB")


def resize_square(rgb: Image.Image, side: int) -> np.ndarray:
    """Return an RGB picture as uint8 [3, side, side]."""
    resized = rgb if rgb.size == (side, side) else rgb.resize((side, side), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(resized, np.uint8).transpose(2, 0, 1))


def read_sound(file: Path, rate_hz: int, limits: MediaLimits) -> tuple[np.ndarray, dict[str, Any]]:
    """Decode a sound.

    Returns:
        float32 [samples] at `rate_hz`, the mean of all channels; and `duration_s` and `mime_type`.

    Raises:
        BadRecord: the file is not a sound, empty, too long or truncated, or has non-finite samples.
    """
    try:
        check_wav_length(file)
        with soundfile.SoundFile(file) as sound:
            if sound.format not in SOUND_FORMATS:
                raise BadRecord("no_sound", f"is a sound of format {sound.format}, read are "
                                            f"{', '.join(SOUND_FORMATS)}; convert it")
            samples = _read_mono(sound, limits)
            file_rate_hz, mime_type = int(sound.samplerate), SOUND_FORMATS[sound.format]
    except soundfile.LibsndfileError as e:
        raise BadRecord("no_sound", f"is not a readable sound ({str(e).rpartition(': ')[2][:120]}); convert "
                                    "it to WAV, FLAC, OGG or MP3, or leave it out") from None
    if not len(samples):
        raise BadRecord("silence", "is a sound of no length; leave it out")
    if not np.isfinite(samples).all():
        raise BadRecord("numbers", "has samples that are not finite; convert it again, or leave it out")
    if (peak := float(np.abs(samples).max())) > MAX_PEAK:
        raise BadRecord("numbers", f"has samples up to {peak:g}, which must be in -1..1; scale it")
    duration_s = len(samples) / file_rate_hz
    resampled = resample(samples, file_rate_hz, rate_hz)
    if not len(resampled):
        raise BadRecord("silence", f"is a sound of {duration_s:g} s, which is less than a sample; leave it "
                                   "out")
    return resampled, {"duration_s": duration_s, "mime_type": mime_type}


def check_wav_length(file: Path) -> None:
    """Check that a WAV file holds all bytes that its header states; ignore other formats.

    libsndfile accepts a truncated file as a shorter sound. Raises `BadRecord`: the data are shorter than the
    length in the header.
    """
    if not file.is_file():
        return  # libsndfile reports the error
    with open(file, "rb") as f:
        head = f.read(12)
        if head[:4] not in (b"RIFF", b"RIFX", b"RF64") or head[8:] != b"WAVE":
            return
        endian = ">" if head[:4] == b"RIFX" else "<"
        rf64_data_bytes = None
        for _ in range(_MAX_WAV_CHUNKS):
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
            # Programs that write to a pipe cannot know the length.
            size_bytes = 0 if rf64_data_bytes is None else rf64_data_bytes
        data_bytes = file.stat().st_size - f.tell()
    if data_bytes < size_bytes:
        raise BadRecord("truncated", f"is cut off: {data_bytes:,} of {size_bytes:,} bytes of sound are "
                                     "there; fetch it again, or leave it out")


def _read_mono(sound: Any, limits: MediaLimits) -> np.ndarray:
    """Return the mean over channels, float32 [samples] at the file's own rate. Raises `BadRecord`: the sound
    is too long or truncated, or its rate or channel count is implausible."""
    if not MIN_RATE_HZ <= sound.samplerate <= MAX_RATE_HZ or not 0 < sound.channels <= MAX_CHANNELS:
        raise BadRecord("rate", f"has {sound.channels} channels of {sound.samplerate} samples a second, "
                                f"which must be 1 to {MAX_CHANNELS}, and {MIN_RATE_HZ:,} to "
                                f"{MAX_RATE_HZ:,}; convert it")
    max_samples = int(limits.duration_s * sound.samplerate)
    num_samples, blocks = sound.frames, list[np.ndarray]()
    num_read = 0
    # The header may understate the length, so the samples are counted too.
    while num_samples <= max_samples and len(block := sound.read(
            _BLOCK_SAMPLES // sound.channels, dtype="float32", always_2d=True)):
        num_read += len(block)
        num_samples = max(num_samples, num_read)
        blocks.append(block.mean(axis=1))
    if num_samples > max_samples:
        raise BadRecord("long", f"lasts {num_samples / sound.samplerate:,.0f} s or longer, at most "
                                f"{limits.duration_s:g} s are read; cut it, or raise --max-duration")
    # MP3 headers state the length only roughly.
    if num_read < sound.frames and sound.format != "MP3":
        raise BadRecord("truncated", f"is cut off: {num_read:,} of {sound.frames:,} samples are there; fetch "
                                     "it again, or leave it out")
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32)


def resample(samples: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """Resample float32 [samples] with scipy's polyphase filter."""
    if from_hz == to_hz:
        return samples.astype(np.float32, copy=False)
    from scipy.signal import resample_poly  # slow to import, and not needed for pictures

    # In lowest terms, because the filter's length grows with both numbers.
    common = math.gcd(from_hz, to_hz)
    return np.asarray(resample_poly(samples, to_hz // common, from_hz // common), np.float32)


def read_video(file: Path, sampling: VideoSampling,
               limits: MediaLimits) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Decode sampled frames from an animated picture or, with PyAV, a video container.

    Returns:
        A single array, uint8 [frames, 3, side, side]; and `duration_s` and `mime_type`.

    Raises:
        BadRecord: the file is not a video, too long or truncated.
    """
    if file.suffix.lower() in CONTAINERS:
        frames, duration_s = _read_container(file, sampling, limits)
        mime_type = CONTAINERS[file.suffix.lower()]
    else:
        frames, duration_s, mime_type = _read_animation(file, sampling, limits)
    return [np.stack(frames)], {"duration_s": duration_s, "mime_type": mime_type}


def _check_duration(duration_s: float, limits: MediaLimits) -> None:
    if duration_s > limits.duration_s:
        raise BadRecord("long", f"lasts {duration_s:,.0f} s, at most {limits.duration_s:g} s are read; cut "
                                "it, or raise --max-duration")


def _read_animation(file: Path, sampling: VideoSampling,
                    limits: MediaLimits) -> tuple[list[np.ndarray], float, str]:
    """Decode an animation in two passes: the first adds up the display times, the second takes frames."""
    with open_picture(file, limits) as picture:
        mime_type = picture.get_format_mimetype() or "image/gif"
        frame_ends_s = np.cumsum([_read_frame_duration(frame) for frame in _iter_frames(picture, limits)])
    duration_s = float(frame_ends_s[-1])
    _check_duration(duration_s, limits)
    numbers = np.searchsorted(frame_ends_s, sampling.compute_times(duration_s), side="right")
    numbers = np.minimum(numbers, len(frame_ends_s) - 1).tolist()
    decoded: dict[int, np.ndarray] = {}
    with open_picture(file, limits) as picture:
        for number, frame in enumerate(_iter_frames(picture, limits)):
            if number in numbers:
                decoded[number] = resize_square(to_upright_rgb(frame.copy()), sampling.side)
    return [decoded[number] for number in numbers], duration_s, mime_type


def _iter_frames(picture: Image.Image, limits: MediaLimits) -> Iterator[Image.Image]:
    """Yield `picture` after decoding each frame in turn into that object."""
    max_frames = min(MAX_ANIMATION_FRAMES, int(limits.duration_s * 1000) + 1)
    for number in range(getattr(picture, "n_frames", 1)):
        if number >= max_frames:
            raise BadRecord("long", f"has more than {max_frames:,} frames; cut it")
        try:
            picture.seek(number)
            picture.load()
        except (OSError, EOFError, ValueError, SyntaxError) as e:
            raise BadRecord("truncated", f"is cut off or damaged at frame {number} ({str(e)[:200]}); fetch "
                                         "it again, or leave it out") from None
        yield picture


def _read_frame_duration(frame: Image.Image) -> float:
    """Return a frame's display time in seconds; `DEFAULT_FRAME_S` if the file states none."""
    duration_ms = frame.info.get("duration") or 0
    is_valid = isinstance(duration_ms, (int, float)) and duration_ms > 0
    return duration_ms / 1000 if is_valid else DEFAULT_FRAME_S


def _read_container(file: Path, sampling: VideoSampling,
                    limits: MediaLimits) -> tuple[list[np.ndarray], float]:
    try:
        import av  # optional package
    except ImportError:
        raise BadRecord("library", "is a video container, which needs PyAV: `pip install av`") from None
    try:
        with av.open(str(file)) as container:
            stream = container.streams.video[0]
            if not container.duration:
                raise BadRecord("no_video", "states no duration; convert it")
            duration_s = container.duration / 1e6
            _check_duration(duration_s, limits)
            if stream.width * stream.height > limits.pixels:
                raise BadRecord("pixels", f"has {stream.width} x {stream.height} pixels, at most "
                                          f"{limits.pixels:,} are read; shrink it, or raise --max-pixels")
            times_s, frames = sampling.compute_times(duration_s), list[np.ndarray]()
            for frame in container.decode(stream):
                while len(frames) < len(times_s) and (frame.time or 0.0) >= times_s[len(frames)]:
                    frames.append(resize_square(frame.to_image(), sampling.side))
                last = frame
            # The container may state a longer duration than its frames have.
            frames += [resize_square(last.to_image(), sampling.side)] * (len(times_s) - len(frames))
            return frames, duration_s
    # UnboundLocalError: the stream had no frame, so `last` is not set.
    except (av.error.FFmpegError, IndexError, UnboundLocalError) as e:
        raise BadRecord("truncated", f"is not a readable video, cut off or damaged ({str(e)[:200]}); fetch "
                                     "it again, or leave it out") from None
