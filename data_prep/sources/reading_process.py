"""Reading files of others in a process of its own, with limits: one that hangs, eats memory or crashes its
parser costs the document and nothing else.

The process is kept for the next file, and replaced where it was ended.  What it sends is JSON: nothing that a
file could make of it is ever run or unpickled here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.sources.job import Job, job_message
from data_prep.sources.limits import Limits
from data_prep.sources.source import KEPT_CHARS, Broken, Raw
from megatron_sov.documents import BadRecord
from megatron_sov.work.channel import receive, send
from megatron_sov.work.sandbox.readers import KeptReader, Wording

WORDING = Wording("parser", "read", "time_s")
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


class _Process(KeptReader):
    """One reading process."""

    def __init__(self, root: str, limits: Limits) -> None:
        super().__init__("data_prep.sources.enclosed", root, {"memory_bytes": limits.memory_bytes},
                         limits.time_s, WORDING)
        self._root, self._limits = root, limits

    def serves(self, root: str, limits: Limits) -> bool:
        """Return whether it may read files in a folder, within these limits."""
        return (self._limits.memory_bytes, self._limits.time_s) == (limits.memory_bytes, limits.time_s) \
            and Path(root).is_relative_to(self._root)

    def read(self, job: Job, skip: int, last: _Last) -> Iterator[Raw | Broken]:
        """Yield what a piece holds behind its first `skip` items.

        Raises:
            BadRecord: the process was ended, or sends what it should not.
        """
        limits: Limits = job.options
        most_bytes = _MESSAGE_FACTOR * limits.document_bytes + (1 << 20)
        with self.asking() as channel:
            send(channel, {"job": job_message(job), "skip": skip})
            while True:
                self.wait_again()
                message = receive(channel, most_bytes)
                if "end" in message:
                    return
                if "at" in message:
                    last.number, last.place = int(message["at"]), str(message["place"])
                elif "error" in message:
                    raise BadRecord(str(message["error"]), str(message["reason"]))
                else:
                    yield _told(message, limits)


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


_kept: dict[int, _Process] = {}
"""This process's reading process, by its own number: a fork has none yet."""


def _process(root: str, limits: Limits) -> _Process:
    known = _kept.get(os.getpid())
    if known is not None and known.serves(root, limits) and not known.is_worn:
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
