"""The process that reads files of others: what it gives itself for limits, and what it sends."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import socket
import sys
from collections.abc import Iterator

from data_prep.curate.sources.formats import load_reader_class
from data_prep.curate.sources.reader import ReadingJob, SourceItem, parse_job_message
from data_prep.curate.sources.source import BrokenRecord, RawDocument
from megatron_sov.base.documents import BadRecord
from megatron_sov.base.errors import UserError, format_error
from megatron_sov.sandbox.restrictions import enclose_reader
from megatron_sov.work.processes.channel import receive_message, send_message

MAX_ERROR_CHARS = 300
MAX_DEPTH = 2000
"""Of Python's own calls: parsers that recurse meet it before the C stack's end."""


def main(fd: int) -> None:
    """Read what is asked for over a socket until the other side has gone."""
    channel = socket.socket(fileno=fd)
    try:
        order = receive_message(channel)
        # Limits before the first byte of a stranger's file is read; none can be taken back.
        sys.setrecursionlimit(MAX_DEPTH)
        enclose_reader(order["readable"], order["memory_bytes"])
        while True:
            asked = receive_message(channel)
            reader = load_reader_class(asked["job"]["piece"]["format"])
            _read(channel, reader.iter_items(job := parse_job_message(asked["job"], reader.Options)), job,
                  asked["skip"])
    except (EOFError, _ReaderGone):
        os._exit(0)


class _ReaderGone(Exception):
    """The other side has gone."""


def _tell(channel: socket.socket, message: dict[str, object]) -> None:
    try:
        send_message(channel, message)
    except OSError as e:
        raise _ReaderGone from e


def _read(channel: socket.socket, items: Iterator[SourceItem], job: ReadingJob, skip: int) -> None:
    for number in itertools.count():
        # The clock starts again for each item, also for finding where it begins.
        _allow_s(job.options.time_s)
        try:
            item = next(items)
        except StopIteration:
            break
        except Exception as e:
            _send_error(channel, job, e, job.name)
            break
        # Items that another process has read, or has died of.
        if number < skip:
            continue
        _allow_s(job.options.time_s)
        # Said before it is read: if this process dies, the other side knows at what.
        _tell(channel, {"at": number, "place": item.place})
        try:
            for found in item.read():
                _send_found(channel, found, job)
                _allow_s(job.options.time_s)
        # It is an `Exception` too, and must not be sent as one.
        except _ReaderGone:
            raise
        except Exception as e:
            _send_error(channel, job, e, item.place)
    signal.setitimer(signal.ITIMER_PROF, 0)
    _tell(channel, {"end": True})


def _allow_s(seconds: float) -> None:
    """Let the kernel end this process when it has taken that much processor time from now on."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


def _send_found(channel: socket.socket, found: RawDocument | BrokenRecord, job: ReadingJob) -> None:
    if isinstance(found, BrokenRecord):
        _tell(channel, {"broken": dataclasses.asdict(found)})
        return
    try:
        # Checked here, where too much only ends this process.
        size_bytes = len(found.text.encode())
    except UnicodeEncodeError:
        raise BadRecord("utf8", "holds half of a surrogate pair, which is no character") from None
    if size_bytes > job.options.document_bytes:
        raise BadRecord("too_long", f"holds more than document_bytes = {job.options.document_bytes:,} bytes "
                                    "of text; cut it, or raise the limit")
    if not found.text.strip():
        raise BadRecord("empty", "holds no text")
    _tell(channel, {"text": found.text, "place": found.place, "columns": dict(found.columns)})


def _send_error(channel: socket.socket, job: ReadingJob, error: Exception, place: str) -> None:
    if isinstance(error, MemoryError):
        # what is left of it is not trusted to be enough: another process goes on
        _tell(channel, {"error": "memory", "reason": f"takes more memory to read than memory_bytes = "
                                                    f"{job.options.memory_bytes:,}; leave it out"})
        os._exit(0)
    if isinstance(error, RecursionError):
        error = BadRecord("nested", "is nested too deep to be read; leave it out")
    if not isinstance(error, BadRecord):
        said = str(error) if isinstance(error, UserError) else format_error(error)
        error = BadRecord("broken", f"cannot be read ({said[:MAX_ERROR_CHARS]}); mend it, or leave it out")
    _tell(channel, {"broken": dataclasses.asdict(job.broken(error, place))})
