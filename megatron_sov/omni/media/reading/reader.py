"""Decode untrusted media files in restricted child processes.

A file that hangs, exhausts memory or crashes its decoder becomes a `BadRecord`; later files still decode.
"""

import dataclasses
import math
import queue
import threading
import weakref
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import numpy as np

from megatron_sov.base.documents import BadRecord
from megatron_sov.base.errors import UserError, format_install_command
from megatron_sov.omni.media.reading.limits import MediaLimits, VideoSampling
from megatron_sov.sandbox.reader_process import ReaderEnded, ReaderProcess, ReaderWording
from megatron_sov.work.processes.channel import receive_message, send_message

WORDING = ReaderWording("decoder", "decode", "--max-time")
MAX_HEADER_BYTES = 1 << 16
_DTYPES = {"picture": "uint8", "sound": "float32", "video": "uint8"}


@dataclasses.dataclass(frozen=True)
class DecodedMedia:
    """A decoded picture, sound or video."""

    arrays: list[np.ndarray]
    """Picture: uint8 [3, side, side] per requested side. Sound: float32 [samples]. Video: uint8 [frames, 3,
    side, side]."""
    mime_type: str
    """MIME type by content, independent from the file name."""
    width: int = 0
    """Picture width before resizing, in pixels."""
    height: int = 0
    """Picture height before resizing, in pixels."""
    duration_s: float = 0.0
    """Length of a sound or video, in seconds."""


class MediaReader:
    """Decodes media files below a folder; safe to use from several threads."""

    def __init__(self, root: Path, limits: MediaLimits | None = None, processes: int = 1) -> None:
        """Create a reader; the first file starts a decoding process.

        Args:
            root: media folder; files outside are refused.
            limits: limits per file.
            processes: maximum number of decoding processes.

        Raises:
            UserError: Pillow or soundfile is not installed.
        """
        if missing := [name for name in ("PIL", "soundfile") if find_spec(name) is None]:
            raise UserError(f"pictures and sounds need the package {missing[0]}; "
                            f"{format_install_command('omni')}")
        self.root, self.limits = root.resolve(), limits or MediaLimits()
        self._idle: queue.SimpleQueue[_DecoderProcess | None] = queue.SimpleQueue()
        for _ in range(processes):
            # None: the first request in this slot starts a process.
            self._idle.put(None)
        self._processes: weakref.WeakSet[_DecoderProcess] = weakref.WeakSet()
        self._lock = threading.Lock()

    def __enter__(self) -> "MediaReader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End all decoding processes."""
        with self._lock:
            for process in list(self._processes):
                process.end()

    def read_picture(self, path: str, sides: tuple[int, ...], animated: str = "refuse") -> DecodedMedia:
        """Decode a picture for each side length, see `decoders.read_picture`. Raises `BadRecord`: the file
        cannot be decoded; its reason is a predicate, such as "is truncated", that follows the file's name."""
        max_bytes = sum(3 * side * side for side in sides)
        return self._decode(path, {"kind": "picture", "sides": list(sides), "animated": animated}, max_bytes)

    def read_sound(self, path: str, rate_hz: int) -> DecodedMedia:
        """Decode a sound, see `decoders.read_sound`; raises like `read_picture`."""
        max_bytes = 4 * (math.ceil(self.limits.duration_s * rate_hz) + rate_hz)
        return self._decode(path, {"kind": "sound", "rate_hz": rate_hz}, max_bytes)

    def read_video(self, path: str, sampling: VideoSampling) -> DecodedMedia:
        """Decode sampled frames, see `decoders.read_video`; raises like `read_picture`."""
        max_bytes = sampling.max_frames * 3 * sampling.side ** 2
        return self._decode(path, {"kind": "video", "sampling": dataclasses.asdict(sampling)}, max_bytes)

    def _decode(self, path: str, request: dict[str, Any], max_bytes: int) -> DecodedMedia:
        file = locate_media_file(self.root, path, self.limits.file_bytes)
        process = self._idle.get()
        try:
            if process is None or process.needs_replacement:
                if process is not None:
                    process.end()
                process = _DecoderProcess(self.root, self.limits)
                self._processes.add(process)
            try:
                facts, arrays = process.request_arrays({**request, "file": str(file)}, max_bytes)
            except ReaderEnded as e:
                process.end()
                process = None
                raise BadRecord(e.code, e.reason) from None
        finally:
            # Return the slot after an error, too: other threads would wait forever for it.
            self._idle.put(process)
        return DecodedMedia(arrays, str(facts["mime_type"]), int(facts.get("width", 0)),
                            int(facts.get("height", 0)), float(facts.get("duration_s", 0.0)))


def locate_media_file(root: Path, path: str, max_bytes: int) -> Path:
    """Return a media file's real path. Raises `BadRecord`: as `resolve_media_path`, no file, or too large."""
    file = resolve_media_path(root, path)
    if not file.is_file():
        raise BadRecord("missing", "is not a file; name a picture, a sound or a video")
    if (size_bytes := file.stat().st_size) > max_bytes:
        raise BadRecord("size", f"has {size_bytes:,} bytes, at most {max_bytes:,} are read; shrink it, or "
                                "raise --max-file-bytes")
    return file


def resolve_media_path(root: Path, path: str) -> Path:
    """Return a media file's real path.

    Args:
        root: media folder.
        path: path from a record, relative to `root`.

    Raises:
        BadRecord: the path leaves `root`, directly or through a link, or does not exist.
    """
    parts = PurePosixPath(path)
    if not path or "\0" in path or parts.is_absolute() or ".." in parts.parts or "\\" in path:
        raise BadRecord("outside", "is not a path below --media-root; name it relative to that folder, "
                                   "without ..")
    file = root / parts
    try:
        real_path = file.resolve(strict=True)
    except (OSError, RuntimeError):
        raise BadRecord("missing", f"is not in {root}; add it, or correct the record") from None
    if not real_path.is_relative_to(root.resolve()):
        raise BadRecord("outside", "is a link that leads out of --media-root; copy the file there")
    return real_path


class _DecoderProcess(ReaderProcess):
    """Connection to a process that runs `decoder_process`."""

    def __init__(self, root: Path, limits: MediaLimits) -> None:
        super().__init__("megatron_sov.omni.media.reading.decoder_process", str(root),
                         {"limits": dataclasses.asdict(limits)}, limits.time_s, WORDING)

    def request_arrays(self, request: dict[str, Any],
                       max_bytes: int) -> tuple[dict[str, Any], list[np.ndarray]]:
        """Return the facts about a file and its decoded arrays. Raises `BadRecord`: the file cannot be
        decoded. Raises `ReaderEnded`: the process ended or broke the protocol, and must be replaced."""
        with self.open_exchange() as channel:
            send_message(channel, request)
            header = receive_message(channel, MAX_HEADER_BYTES)
            if "bad" in header:
                raise BadRecord(str(header["bad"]), str(header["reason"]))
            dtype = _DTYPES[request["kind"]]
            if any(array_dtype != dtype for _, array_dtype in header["arrays"]):
                raise ValueError("arrays of another dtype")
            shapes = [tuple(int(n) for n in shape) for shape, _ in header["arrays"]]
            return dict(header["facts"]), self._receive_arrays(shapes, dtype, max_bytes)

    def _receive_arrays(self, shapes: list[tuple[int, ...]], dtype: str, max_bytes: int) -> list[np.ndarray]:
        sizes = [math.prod(shape) * np.dtype(dtype).itemsize for shape in shapes]
        # Check before reserving memory: a hostile file may have taken over the process that sent the shapes.
        if min((n for shape in shapes for n in shape), default=1) < 1 or sum(sizes) > max_bytes:
            raise ValueError(f"{sum(sizes)} bytes of numbers, of at most {max_bytes}")
        arrays = []
        for shape, size_bytes in zip(shapes, sizes, strict=True):
            data = memoryview(bytearray(size_bytes))
            num_received = 0
            while num_received < size_bytes:
                count = self.channel.recv_into(data[num_received:])
                if not count:
                    raise EOFError
                num_received += count
            arrays.append(np.frombuffer(data, dtype).reshape(shape))
        return arrays
