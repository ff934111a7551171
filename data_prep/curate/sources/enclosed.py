"""The process that reads untrusted files: it limits itself, then sends records as JSON over a socket."""

import dataclasses
import itertools
import os
import signal
import socket
import sys
from collections.abc import Iterator

from data_prep.curate.sources.formats import load_reader_class
from data_prep.curate.sources.reader import ReadingJob, SourceItem, check_text
from data_prep.curate.sources.source import BrokenRecord, RawDocument
from megatron_sov.base.documents import BadRecord
from megatron_sov.base.errors import UserError, format_error
from megatron_sov.sandbox.restrictions import enclose_reader
from megatron_sov.work.processes.channel import receive_message, send_message

MAX_ERROR_CHARS = 300
MAX_DEPTH = 2000
"""Python's recursion limit; recursive parsers reach it before the C stack overflows."""


def main(fd: int) -> None:
    """Serve reading jobs over a socket until the parent closes it."""
    channel = socket.socket(fileno=fd)
    try:
        limits = receive_message(channel)
        # Limits before the first untrusted byte; the process cannot lift them.
        sys.setrecursionlimit(MAX_DEPTH)
        enclose_reader(limits["readable"], limits["memory_bytes"])
        while True:
            request = receive_message(channel)
            reader = load_reader_class(request["job"]["piece"]["format"])
            job = ReadingJob.from_message(request["job"], reader.Options)
            _send_items(channel, reader.iter_items(job), job, request["skip"])
    except (EOFError, _ParentGone):
        os._exit(0)


class _ParentGone(Exception):
    """The parent closed the socket."""


def _send(channel: socket.socket, message: dict[str, object]) -> None:
    try:
        send_message(channel, message)
    except OSError as e:
        raise _ParentGone from e


def _send_items(channel: socket.socket, items: Iterator[SourceItem], job: ReadingJob, skip: int) -> None:
    """Send the records of all items after the first `skip`, then an end message."""
    for number in itertools.count():
        # The time limit starts again for finding an item, for the item itself, and after each of its records.
        _start_timer(job.options.time_s)
        try:
            item = next(items)
        except StopIteration:
            break
        except Exception as e:
            _send_error(channel, job, e, job.name)
            break
        # An earlier process sent these items, or ended at the last item.
        if number < skip:
            continue
        _start_timer(job.options.time_s)
        # Sent before reading: if this process dies, the parent knows the item.
        _send(channel, {"at": number, "place": item.place})
        try:
            for record in item.read():
                _send_record(channel, record, job)
                _start_timer(job.options.time_s)
        # Also an `Exception`, but not an error of the record.
        except _ParentGone:
            raise
        except Exception as e:
            _send_error(channel, job, e, item.place)
    _start_timer(0)
    _send(channel, {"end": True})


def _start_timer(seconds: float) -> None:
    """Restart the timer: the kernel kills this process after `seconds` of processor time; 0: no limit."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


def _send_record(channel: socket.socket, record: RawDocument | BrokenRecord, job: ReadingJob) -> None:
    if isinstance(record, BrokenRecord):
        _send(channel, {"broken": dataclasses.asdict(record)})
        return
    # Checked here, so that an oversized text ends only this process.
    check_text(record.text, job.options.document_bytes)
    _send(channel, {"text": record.text, "place": record.place, "columns": dict(record.columns)})


def _send_error(channel: socket.socket, job: ReadingJob, error: Exception, place: str) -> None:
    if isinstance(error, MemoryError):
        # This process may have too little memory left to go on; the parent continues with a new one.
        _send(channel, {"error": "memory", "reason": f"takes more memory to read than memory_bytes = "
                                                     f"{job.options.memory_bytes:,}; leave it out"})
        os._exit(0)
    if isinstance(error, RecursionError):
        error = BadRecord("nested", "is nested too deep to be read; leave it out")
    if not isinstance(error, BadRecord):
        message = str(error) if isinstance(error, UserError) else format_error(error)
        error = BadRecord("broken", f"cannot be read ({message[:MAX_ERROR_CHARS]}); mend it, or leave it out")
    _send(channel, {"broken": dataclasses.asdict(job.build_broken(error, place))})
