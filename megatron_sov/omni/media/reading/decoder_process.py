"""Decoding process: reads requests from a socket and replies with arrays."""

import os
import signal
import socket
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sov.base.documents import BadRecord
from megatron_sov.base.errors import format_error
from megatron_sov.omni.media.reading.decoders import read_picture, read_sound, read_video
from megatron_sov.omni.media.reading.limits import MediaLimits, PictureRequest, VideoSampling
from megatron_sov.sandbox.restrictions import enclose_reader
from megatron_sov.work.processes.channel import receive_message, send_message

MAX_ERROR_CHARS = 300


def main(fd: int) -> None:
    """Serve decoding requests on socket `fd` until the parent process closes it."""
    channel = socket.socket(fileno=fd)
    try:
        settings = receive_message(channel)
        limits = MediaLimits(**settings["limits"])
        # Before the first file: a compromised decoder must neither write files nor use the network.
        enclose_reader(settings["readable"], limits.memory_bytes)
        while True:
            request = receive_message(channel)
            # The timer counts processor time, because a slow disk must not fail a file. The signal ends the
            # process.
            signal.setitimer(signal.ITIMER_PROF, limits.time_s)
            header, arrays = _decode_file(request, limits)
            signal.setitimer(signal.ITIMER_PROF, 0)
            send_message(channel, header)
            for array in arrays:
                channel.sendall(array.data.cast("B"))
    except (EOFError, OSError):
        os._exit(0)


def _decode_file(request: dict[str, Any], limits: MediaLimits) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Decode a file; return the reply's header, which describes the arrays or the error, and the arrays."""
    file = Path(request["file"])
    try:
        if request["kind"] == "picture":
            arrays, facts = read_picture(file, PictureRequest(tuple(request["sides"]), request["animated"]),
                                         limits)
        elif request["kind"] == "sound":
            samples, facts = read_sound(file, request["rate_hz"], limits)
            arrays = [samples]
        else:
            arrays, facts = read_video(file, VideoSampling(**request["sampling"]), limits)
    except BadRecord as e:
        return {"bad": e.code, "reason": e.reason}, []
    except MemoryError:
        return {"bad": "memory", "reason": f"takes more memory to decode than {limits.memory_bytes:,} bytes; "
                                           "leave it out"}, []
    except Exception as e:
        return {"bad": "broken", "reason": f"cannot be decoded ({format_error(e)[:MAX_ERROR_CHARS]}); repair "
                                           "it, or leave it out"}, []
    arrays = [np.ascontiguousarray(array) for array in arrays]
    return {"facts": facts, "arrays": [[list(a.shape), a.dtype.name] for a in arrays]}, arrays
