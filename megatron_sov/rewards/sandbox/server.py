"""The server of a sandbox: a small interpreter that has imported what programs often do, and forks them.

It is started with a clean environment and imports nothing but the standard library and this room.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import os
import socket
import sys
from typing import Any

from megatron_sov.rewards.sandbox.channel import receive, receive_apart, send
from megatron_sov.rewards.sandbox.child import be_as_programs, become_program
from megatron_sov.rewards.sandbox.enclosure import Enclosure, Unavailable
from megatron_sov.rewards.sandbox.landlocked import Landlocked
from megatron_sov.rewards.sandbox.namespaces import Namespaces
from megatron_sov.rewards.sandbox.program import Limits, Outcome
from megatron_sov.rewards.sandbox.supervise import Ends, Gone, Subject, supervise

PRELOADED = (
    "abc", "array", "ast", "base64", "bisect", "calendar", "cmath", "collections", "collections.abc",
    "contextlib", "copy", "csv", "dataclasses", "datetime", "decimal", "enum", "fractions", "functools",
    "hashlib", "heapq", "inspect", "io", "itertools", "json", "locale", "logging", "math", "numbers",
    "operator", "os", "pathlib", "pickle", "queue", "random", "re", "shutil", "socket", "statistics",
    "string", "struct", "subprocess", "sys", "tempfile", "textwrap", "threading", "time", "traceback",
    "types", "typing", "unicodedata", "uuid", "warnings", "zlib",
)


def main(channel_fd: int, root: str) -> None:
    """Serve until the other side goes.

    Args:
        channel_fd: a socket to the process that starts this one.
        root: the folder of this package, which programs do not import from.
    """
    for module in PRELOADED:
        importlib.import_module(module)
    sys.path.remove(root)
    # all that is alike for programs is done here, once: of what a fork writes, counts of references too, it
    # gets copies, page by page, and these are most of what it costs. So nothing is freed there either
    own_modules = {name: sys.modules.pop(name) for name in list(sys.modules)
                   if name.partition(".")[0] == "megatron_sov"}
    be_as_programs()
    with socket.socket(fileno=channel_fd) as channel:
        order = receive(channel)
        try:
            enclosure = _enclosure(order, channel)
        except Unavailable as e:
            send(channel, {"unavailable": str(e)})
            return
        send(channel, {"enclosure": enclosure.name})
        gc.collect()
        gc.freeze()  # the collector of a child would copy every page that it looks at
        gc.disable()
        try:
            while True:
                request = receive(channel)
                given = receive_apart(channel)
                send(channel, dataclasses.asdict(_run(enclosure, request, given, channel)))
        except (EOFError, OSError, Gone):
            return
        finally:
            enclosure.close()
            own_modules.clear()


def _enclosure(order: dict[str, Any], channel: socket.socket) -> Enclosure:
    if order["enclosure"] == "namespaces":
        return Namespaces(channel, order["readable"])
    return Landlocked(order["readable"], order["folder"])


def _run(enclosure: Enclosure, request: dict[str, Any], given: memoryview, channel: socket.socket) -> Outcome:
    """Return what becomes of a program; what fails here is not its fault.

    Args:
        enclosure: where it runs.
        request: the program, which it may find in its memory.
        given: for its standard input, which it only reads: what it forks before that never sees it.
        channel: to whoever waits for the outcome.
    """
    limits = Limits(**request["limits"])
    pipes = [os.pipe() for _ in range(4)]
    (stdin, feed), (stdout_read, stdout), (stderr_read, stderr), (ready_read, ready) = pipes
    try:
        pid = enclosure.fork(limits)
    except OSError as e:
        for read, write in pipes:
            os.close(read)
            os.close(write)
        enclosure.clean()
        return Outcome("infrastructure", None, "", "", f"no process could be forked: {e}", 0.0, 0.0)
    if pid == 0:
        become_program(enclosure, request, limits, (stdin, stdout, stderr, ready))
    for fd in (stdin, stdout, stderr, ready):
        os.close(fd)
    try:
        return supervise(Subject(
            pid, Ends(feed, stdout_read, stderr_read, ready_read), given, limits,
            kill=lambda: enclosure.kill(pid), totals=enclosure.watch.totals,
            overfull=lambda: enclosure.overfull(limits), hangup=channel.fileno()))
    finally:
        enclosure.clean()
