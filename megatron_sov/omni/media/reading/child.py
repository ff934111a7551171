"""The process that decodes media of others: it is asked over a socket, and answers with numbers."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sov.base.documents import BadRecord
from megatron_sov.base.errors import format_error
from megatron_sov.omni.media.reading.kinds import (
    MediaLimits, PictureRequest, VideoFrames, read_picture, read_sound, read_video)
from megatron_sov.sandbox.restrictions import enclose_reader
from megatron_sov.work.processes.channel import receive_message, send_message

MAX_ERROR_CHARS = 300


def main(fd: int) -> None:
    """Answer until the other side has gone."""
    channel = socket.socket(fileno=fd)
    try:
        order = receive_message(channel)
        limits = MediaLimits(**order["limits"])
        # before the first medium: a decoder that it deceives can neither write nor reach a network
        enclose_reader(order["readable"], limits.memory_bytes)
        while True:
            asked = receive_message(channel)
            # processor time, since a slow disk is no fault of the medium; the signal ends this process
            signal.setitimer(signal.ITIMER_PROF, limits.time_s)
            header, arrays = _answer(asked, limits)
            signal.setitimer(signal.ITIMER_PROF, 0)
            send_message(channel, header)
            for array in arrays:
                channel.sendall(array.data.cast("B"))
    except (EOFError, OSError):
        os._exit(0)


def _answer(asked: dict[str, Any], limits: MediaLimits) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Return what is sent: what the medium was, and its numbers; or why there are none."""
    file = Path(asked["file"])
    try:
        if asked["kind"] == "picture":
            arrays, facts = read_picture(file, PictureRequest(tuple(asked["sides"]), asked["animated"]),
                                         limits)
        elif asked["kind"] == "sound":
            samples, facts = read_sound(file, asked["rate_hz"], limits)
            arrays = [samples]
        else:
            arrays, facts = read_video(file, VideoFrames(**asked["sampling"]), limits)
    except BadRecord as e:
        return {"bad": e.code, "reason": e.reason}, []
    except MemoryError:
        return {"bad": "memory", "reason": f"takes more memory to decode than {limits.memory_bytes:,} bytes; "
                                           "leave it out"}, []
    except Exception as e:
        return {"bad": "broken", "reason": f"cannot be decoded ({format_error(e)[:MAX_ERROR_CHARS]}); mend "
                                           "it, or leave it out"}, []
    arrays = [np.ascontiguousarray(array) for array in arrays]
    return {"facts": facts, "arrays": [[list(a.shape), a.dtype.name] for a in arrays]}, arrays
