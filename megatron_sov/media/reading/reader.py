"""Reading media through processes that are kept: one that hangs, eats memory or crashes its decoder costs the
medium and nothing else."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import queue
import signal
import socket
import subprocess
import threading
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megatron_sov.documents import BadRecord
from megatron_sov.media.reading.limits import MediaLimits
from megatron_sov.media.reading.places import place_of
from megatron_sov.media.reading.videos import VideoFrames
from megatron_sov.rewards.sandbox.channel import receive, send
from megatron_sov.rewards.sandbox.reading import module_path, start_reader

START_LIMIT_S = 120.0
CLOCK_FACTOR = 10.0
"""Times on the clock for the processor time that a medium may take: processes share a machine."""
END_LIMIT_S = 120.0
MEDIA_EACH = 2000
"""Media that one process decodes: what decoders leak stays small."""
MOST_HEADER_BYTES = 1 << 16
_DTYPES = {"picture": "uint8", "sound": "float32", "video": "uint8"}


@dataclasses.dataclass(frozen=True)
class Read:
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
            self._free.put(None)
        self._children: weakref.WeakSet[_Child] = weakref.WeakSet()
        self._lock = threading.Lock()

    def __enter__(self) -> MediaReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        with self._lock:
            for child in list(self._children):
                child.end()

    def picture(self, path: str, sides: tuple[int, ...], animated: str = "refuse") -> Read:
        """Return a picture in each of the sides, as `pictures.read_picture`.

        Raises:
            BadRecord: it cannot be had; the reason completes a sentence that begins with its name.
        """
        most = sum(3 * side * side for side in sides)
        return self._read(path, {"kind": "picture", "sides": list(sides), "animated": animated}, most)

    def sound(self, path: str, rate_hz: int) -> Read:
        """Return a sound as `sounds.read_sound`; raises as `picture` does."""
        most = 4 * (math.ceil(self.limits.duration_s * rate_hz) + rate_hz)
        return self._read(path, {"kind": "sound", "rate_hz": rate_hz}, most)

    def video(self, path: str, sampling: VideoFrames) -> Read:
        """Return frames of a video as `videos.read_video`; raises as `picture` does."""
        most = sampling.most_frames * 3 * sampling.side ** 2
        return self._read(path, {"kind": "video", "sampling": dataclasses.asdict(sampling)}, most)

    def _read(self, path: str, asked: dict[str, Any], most_bytes: int) -> Read:
        file = place_of(self.root, path)
        if asked["kind"] != "video" and not file.is_file():
            raise BadRecord("missing", "is no file; name a picture or a sound")
        if file.is_file() and (size_bytes := file.stat().st_size) > self.limits.file_bytes:
            raise BadRecord("size", f"has {size_bytes:,} bytes, at most {self.limits.file_bytes:,} are "
                                    "read; shrink "
                                    "it, or raise --max-file-bytes")
        child = self._free.get()
        try:
            if child is None or child.num_media >= MEDIA_EACH:
                if child is not None:
                    child.end()
                child = _Child(self.root, self.limits)
                self._children.add(child)
            try:
                facts, arrays = child.ask({**asked, "file": str(file)}, most_bytes)
            except _Ended as e:
                child.end()
                child = None
                raise BadRecord(e.code, e.reason) from None
        finally:
            self._free.put(child)
        return Read(arrays, str(facts["mime_type"]), int(facts.get("width", 0)), int(facts.get("height", 0)),
                    float(facts.get("duration_s", 0.0)))


class _Ended(BadRecord):
    """The process is not to be asked again."""


class _Child:
    """One decoding process."""

    def __init__(self, root: Path, limits: MediaLimits) -> None:
        self._limits, self.num_media = limits, 0
        self._process, self._channel = start_reader("megatron_sov.media.reading.child")
        self._end = weakref.finalize(self, _end, self._process, self._channel, os.getpid())
        self._channel.settimeout(START_LIMIT_S)
        send(self._channel, {"readable": [str(root), *module_path()], "limits": dataclasses.asdict(limits)})

    def ask(self, message: dict[str, Any], most_bytes: int) -> tuple[dict[str, Any], list[np.ndarray]]:
        """Return what a medium was, and its numbers.

        Raises:
            BadRecord: it cannot be decoded; `_Ended`: and the process has gone, or is not to be trusted.
        """
        self.num_media += 1
        try:
            self._channel.settimeout(START_LIMIT_S + CLOCK_FACTOR * self._limits.time_s)
            send(self._channel, message)
            header = receive(self._channel, MOST_HEADER_BYTES)
            if "bad" in header:
                raise BadRecord(str(header["bad"]), str(header["reason"]))
            shapes = [tuple(int(n) for n in shape) for shape, _ in header["arrays"]]
            if any(dtype != _DTYPES[message["kind"]] for _, dtype in header["arrays"]):
                raise ValueError("numbers of another type")
            return dict(header["facts"]), self._arrays(shapes, _DTYPES[message["kind"]], most_bytes)
        except TimeoutError:
            raise _Ended("time", f"took longer than {CLOCK_FACTOR * self._limits.time_s:g} s to decode; "
                                 "raise "
                                 "--max-time, or leave it out") from None
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise _Ended("decoder", f"made its decoder send what is no answer ({e}); leave it out") from None
        except (EOFError, OSError):
            raise self._gone() from None

    def _arrays(self, shapes: list[tuple[int, ...]], dtype: str, most_bytes: int) -> list[np.ndarray]:
        sizes = [math.prod(shape) * np.dtype(dtype).itemsize for shape in shapes]
        if any(n < 1 for shape in shapes for n in shape) or sum(sizes) > most_bytes:
            raise ValueError(f"{sum(sizes)} bytes of numbers, of at most {most_bytes}")
        found = []
        for shape, size_bytes in zip(shapes, sizes, strict=True):
            data = memoryview(bytearray(size_bytes))
            place = 0
            while place < size_bytes:
                received = self._channel.recv_into(data[place:])
                if not received:
                    raise EOFError
                place += received
            found.append(np.frombuffer(data, dtype).reshape(shape))
        return found

    def _gone(self) -> _Ended:
        """Return why the process has gone."""
        try:
            code = self._process.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            code = 0
        if code == -signal.SIGPROF:
            return _Ended("time", f"took more than {self._limits.time_s:g} s of processor time to decode; "
                                  "raise "
                                  "--max-time, or leave it out")
        said = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return _Ended("crash", f"ended its decoder ({said}); leave it out")

    def end(self) -> None:
        """End the process."""
        self._end()


def _end(process: subprocess.Popen[bytes], channel: socket.socket, owner: int) -> None:
    channel.close()
    if os.getpid() == owner:  # not in a fork of the process that started it
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
