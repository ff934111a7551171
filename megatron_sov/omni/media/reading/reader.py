"""Reading media through processes that are kept: one that hangs, eats memory or crashes its decoder costs the
medium and nothing else."""

from __future__ import annotations

import dataclasses
import math
import queue
import threading
import weakref
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import numpy as np

from megatron_sov.base.documents import BadRecord
from megatron_sov.omni.media.reading.kinds import MediaLimits, VideoFrames
from megatron_sov.sandbox.readers import KeptReader, ReaderEnded, Wording
from megatron_sov.work.processes.channel import receive_message, send_message


def place_of(root: Path, path: str) -> Path:
    """Return where a medium lies.

    Args:
        root: the folder of media.
        path: as a record names it, relative to the root.

    Raises:
        BadRecord: it leads out of the root, by its parts or by a link, or nothing is there.
    """
    parts = PurePosixPath(path)
    if not path or "\0" in path or parts.is_absolute() or ".." in parts.parts or "\\" in path:
        raise BadRecord("outside", "is no path below --media-root; name it relative to that folder, "
                                   "without ..")
    file = root / parts
    try:
        real = file.resolve(strict=True)
    except (OSError, RuntimeError):
        raise BadRecord("missing", f"is not in {root}; add it, or mend the record") from None
    if not real.is_relative_to(root.resolve()):
        raise BadRecord("outside", "is a link that leads out of --media-root; copy the file there")
    return real


WORDING = Wording("decoder", "decode", "--max-time")
MOST_HEADER_BYTES = 1 << 16
_DTYPES = {"picture": "uint8", "sound": "float32", "video": "uint8"}


@dataclasses.dataclass(frozen=True)
class ReadMedia:
    """A medium as numbers."""

    arrays: list[np.ndarray]
    """Of a picture: one uint8 [3, side, side] for each side; of a sound: float32 [samples]; of a video: uint8
    [frames, 3, side, side]."""
    mime_type: str
    """Type of its content, whatever its name says."""
    width: int = 0
    """Of a picture before it was made square, in pixels."""
    height: int = 0
    """Likewise."""
    duration_s: float = 0.0
    """Length of a sound or video, in seconds."""


class MediaReader:
    """Decodes the media of one folder; several threads may ask at the same time."""

    def __init__(self, root: Path, limits: MediaLimits | None = None, processes: int = 1) -> None:
        """Start nothing yet.

        Args:
            root: folder of the media; nothing outside of it is read.
            limits: of each medium.
            processes: that decode at the same time.
        """
        self.root, self.limits = root.resolve(), limits or MediaLimits()
        self._free: queue.SimpleQueue[_Child | None] = queue.SimpleQueue()
        for _ in range(processes):
            # a place for a process, which is started when a medium wants it
            self._free.put(None)
        self._children: weakref.WeakSet[_Child] = weakref.WeakSet()
        self._lock = threading.Lock()

    def __enter__(self) -> MediaReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            for child in list(self._children):
                child.end()

    def picture(self, path: str, sides: tuple[int, ...], animated: str = "refuse") -> ReadMedia:
        """Return a picture in each of the sides, as `kinds.read_picture`.

        Raises:
            BadRecord: it cannot be had; the reason completes a sentence that begins with its name.
        """
        most = sum(3 * side * side for side in sides)
        return self._read(path, {"kind": "picture", "sides": list(sides), "animated": animated}, most)

    def sound(self, path: str, rate_hz: int) -> ReadMedia:
        """Return a sound as `kinds.read_sound`; raises as `picture` does."""
        most = 4 * (math.ceil(self.limits.duration_s * rate_hz) + rate_hz)
        return self._read(path, {"kind": "sound", "rate_hz": rate_hz}, most)

    def video(self, path: str, sampling: VideoFrames) -> ReadMedia:
        """Return frames of a video as `kinds.read_video`; raises as `picture` does."""
        most = sampling.most_frames * 3 * sampling.side ** 2
        return self._read(path, {"kind": "video", "sampling": dataclasses.asdict(sampling)}, most)

    def _read(self, path: str, asked: dict[str, Any], most_bytes: int) -> ReadMedia:
        file = place_of(self.root, path)
        if not file.is_file():
            raise BadRecord("missing", "is no file; name a picture, a sound or a video")
        if (size_bytes := file.stat().st_size) > self.limits.file_bytes:
            raise BadRecord("size", f"has {size_bytes:,} bytes, at most {self.limits.file_bytes:,} are read; "
                                    "shrink it, or raise --max-file-bytes")
        child = self._free.get()
        try:
            if child is None or child.is_worn:
                if child is not None:
                    child.end()
                child = _Child(self.root, self.limits)
                self._children.add(child)
            try:
                facts, arrays = child.ask({**asked, "file": str(file)}, most_bytes)
            except ReaderEnded as e:
                child.end()
                child = None
                raise BadRecord(e.code, e.reason) from None
        finally:
            # whatever happened: a place that is lost is waited for without end
            self._free.put(child)
        return ReadMedia(arrays, str(facts["mime_type"]), int(facts.get("width", 0)),
                         int(facts.get("height", 0)), float(facts.get("duration_s", 0.0)))


class _Child(KeptReader):
    """One decoding process."""

    def __init__(self, root: Path, limits: MediaLimits) -> None:
        super().__init__("megatron_sov.omni.media.reading.child", str(root),
                         {"limits": dataclasses.asdict(limits)}, limits.time_s, WORDING)

    def ask(self, message: dict[str, Any], most_bytes: int) -> tuple[dict[str, Any], list[np.ndarray]]:
        """Return what a medium was, and its numbers.

        Raises:
            BadRecord: it cannot be decoded; `ReaderEnded`: and the process has gone, or is not to be trusted.
        """
        with self.asking() as channel:
            send_message(channel, message)
            header = receive_message(channel, MOST_HEADER_BYTES)
            if "bad" in header:
                raise BadRecord(str(header["bad"]), str(header["reason"]))
            shapes = [tuple(int(n) for n in shape) for shape, _ in header["arrays"]]
            if any(dtype != _DTYPES[message["kind"]] for _, dtype in header["arrays"]):
                raise ValueError("numbers of another type")
            return dict(header["facts"]), self._arrays(shapes, _DTYPES[message["kind"]], most_bytes)

    def _arrays(self, shapes: list[tuple[int, ...]], dtype: str, most_bytes: int) -> list[np.ndarray]:
        sizes = [math.prod(shape) * np.dtype(dtype).itemsize for shape in shapes]
        # before memory is reserved: the process has read a stranger's bytes and may say anything
        if any(n < 1 for shape in shapes for n in shape) or sum(sizes) > most_bytes:
            raise ValueError(f"{sum(sizes)} bytes of numbers, of at most {most_bytes}")
        found = []
        for shape, size_bytes in zip(shapes, sizes, strict=True):
            data = memoryview(bytearray(size_bytes))
            place = 0
            while place < size_bytes:
                received = self.channel.recv_into(data[place:])
                if not received:
                    raise EOFError
                place += received
            found.append(np.frombuffer(data, dtype).reshape(shape))
        return found
