"""Reading files of others in a process of its own, with limits: one that hangs, eats memory or crashes its
parser costs the document and nothing else.

The process is kept for the next file, and replaced where it was ended.  What it sends is JSON: nothing that a
file could make of it is ever run or unpickled here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.sources.job import Job, job_message
from data_prep.sources.limits import Limits
from data_prep.sources.source import KEPT_CHARS, Broken, Raw
from megatron_sov.documents import BadRecord
from megatron_sov.rewards.sandbox.channel import receive, send
from megatron_sov.rewards.sandbox.reading import module_path, start_reader

START_LIMIT_S = 120.0
CLOCK_FACTOR = 10.0
"""Times on the clock for the processor time that a document may take: processes share a machine."""
END_LIMIT_S = 120.0
"""For the kernel to say how a process has ended."""
FILES_EACH = 2000
"""Files that one process reads: what parsers leak stays small."""
_MESSAGE_FACTOR = 8
"""Bytes of JSON for a byte of text: a control character becomes six."""


def read_apart(job: Job) -> Iterator[Raw | Broken]:
    """Yield what a piece holds, in order.

    Where the process is ended for taking too much, that document is told as `Broken` and reading goes on
    behind it.
    """
    skip = 0
    while True:
        process = _process(str(job.root), job.options)
        last = _Last()
        finished = False
        try:
            yield from process.read(job, skip, last)
            finished = True
            return
        except BadRecord as e:
            yield job.broken(e, last.place)
            if last.number is None:  # it ended between two of them, and would again
                return
            skip = last.number + 1
        finally:
            if not finished:  # ended, or nobody wants the rest
                _forget(process)


class _Last:
    """How far a process has come."""

    number: int | None = None
    place = ""


class _Process:
    """One reading process."""

    def __init__(self, root: str, limits: Limits) -> None:
        self._root, self._memory_bytes, self.num_files = root, limits.memory_bytes, 0
        self._process, self._channel = start_reader("data_prep.sources.enclosed")
        self._end = weakref.finalize(self, _end, self._process, self._channel, os.getpid())
        self._channel.settimeout(START_LIMIT_S)
        send(self._channel, {"readable": [root, *module_path()], "memory_bytes": limits.memory_bytes})

    def serves(self, root: str, limits: Limits) -> bool:
        """Return whether it may read files in a folder, within these limits."""
        return self._memory_bytes == limits.memory_bytes and Path(root).is_relative_to(self._root)

    def read(self, job: Job, skip: int, last: _Last) -> Iterator[Raw | Broken]:
        """Yield what a piece holds behind its first `skip` items.

        Raises:
            BadRecord: the process was ended, or sends what it should not.
        """
        self.num_files += 1
        limits: Limits = job.options
        most_bytes = _MESSAGE_FACTOR * limits.document_bytes + (1 << 20)
        try:
            self._channel.settimeout(START_LIMIT_S if self.num_files == 1 else None)
            send(self._channel, {"job": job_message(job), "skip": skip})
            while True:
                self._channel.settimeout(START_LIMIT_S + CLOCK_FACTOR * limits.time_s)
                message = receive(self._channel, most_bytes)
                if "end" in message:
                    return
                if "at" in message:
                    last.number, last.place = int(message["at"]), str(message["place"])
                elif "error" in message:
                    raise BadRecord(str(message["error"]), str(message["reason"]))
                else:
                    yield _told(message, limits)
        except TimeoutError:
            raise BadRecord("time", f"took longer than {CLOCK_FACTOR * limits.time_s:g} s to read; raise "
                                    "time_s, or leave it out") from None
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise BadRecord("parser", f"made its parser send what is no answer ({e}); leave it out") from None
        except (EOFError, OSError):
            raise self._ended(limits) from None

    def _ended(self, limits: Limits) -> BadRecord:
        """Return why the process has gone."""
        try:
            code = self._process.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            code = 0
        if code == -signal.SIGPROF:
            return BadRecord("time", f"took more than {limits.time_s:g} s of processor time to read; raise "
                                     "time_s, or leave it out")
        said = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return BadRecord("crash", f"ended its parser ({said}); leave it out")

    def end(self) -> None:
        """End the process."""
        self._end()


def _told(message: dict[str, Any], limits: Limits) -> Raw | Broken:
    """Return what a message says.

    Raises:
        KeyError, TypeError, ValueError: it says nothing.
    """
    if "broken" in message:
        told = message["broken"]
        return Broken(str(told["file"]), str(told["place"]), str(told["code"]), str(told["reason"]),
                      str(told["content"])[:KEPT_CHARS], told["is_left_out"] is True)
    text, place, columns = message["text"], message["place"], message["columns"]
    if not (isinstance(text, str) and isinstance(place, str) and isinstance(columns, dict)):
        raise TypeError("a document without text, place or columns")
    if len(text.encode()) > limits.document_bytes:
        raise ValueError("a document above the limit")
    return Raw(text, place, columns)


def _end(process: subprocess.Popen[bytes], channel: socket.socket, owner: int) -> None:
    channel.close()
    if os.getpid() == owner:  # not in a fork of the process that started it
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()


_kept: dict[int, _Process] = {}
"""This process's reading process, by its own number: a fork has none yet."""


def _process(root: str, limits: Limits) -> _Process:
    known = _kept.get(os.getpid())
    if known is not None and known.serves(root, limits) and known.num_files < FILES_EACH:
        return known
    if known is not None:
        known.end()
    _kept.clear()
    _kept[os.getpid()] = _Process(root, limits)
    return _kept[os.getpid()]


def _forget(process: _Process) -> None:
    process.end()
    if _kept.get(os.getpid()) is process:
        del _kept[os.getpid()]
