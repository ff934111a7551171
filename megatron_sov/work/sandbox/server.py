"""The server of a sandbox: a small interpreter that has imported what programs often do, has its template
fork them, and stands beside them.

It is started with a clean environment and imports nothing but the standard library and this room.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import json
import os
import socket
import sys
from typing import Any

from megatron_sov.work.sandbox.channel import receive, send
from megatron_sov.work.sandbox.child import be_as_programs
from megatron_sov.work.sandbox.enclosure import Enclosure, Unavailable
from megatron_sov.work.sandbox.landlocked import Landlocked
from megatron_sov.work.sandbox.namespaces import Namespaces
from megatron_sov.work.sandbox.program import Limits, Outcome
from megatron_sov.work.sandbox.supervise import Ends, Gone, Subject, supervise
from megatron_sov.work.sandbox.template import Template

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
        gc.collect()
        gc.freeze()  # the collector of a child would copy every page that it looks at
        gc.disable()
        template = Template(enclosure)
        send(channel, {"enclosure": enclosure.name})
        try:
            while True:
                send(channel, dataclasses.asdict(_run(enclosure, template, receive(channel), channel)))
        except (EOFError, OSError, Gone):
            return
        finally:
            template.close()
            enclosure.close()
            own_modules.clear()


def _enclosure(order: dict[str, Any], channel: socket.socket) -> Enclosure:
    if order["enclosure"] == "namespaces":
        return Namespaces(channel, order["readable"])
    return Landlocked(order["readable"], order["folder"])


def _run(enclosure: Enclosure, template: Template, request: dict[str, Any],
         channel: socket.socket) -> Outcome:
    """Return what becomes of a program; what fails here is not its fault.

    Args:
        enclosure: where it runs.
        template: what forks its process.
        request: as the worker sends it.
        channel: to whoever waits for the outcome.
    """
    limits = Limits(**request["limits"])
    pipes = [os.pipe() for _ in range(5)]
    (stdin, feed), (stdout_read, stdout), (stderr_read, stderr), (ready_read, ready), (job, give) = pipes
    theirs = (stdin, stdout, stderr, ready, job)
    try:
        folder = enclosure.prepare()
        pid = template.fork(theirs)
    except OSError as e:
        for fd in (feed, stdout_read, stderr_read, ready_read, give):
            os.close(fd)
        enclosure.clean()
        return Outcome("infrastructure", None, "", "", f"no process could be forked: {e}", 0.0, 0.0)
    finally:
        for fd in theirs:
            os.close(fd)
    # how long its output may be would tell it how long the expected one is
    its_limits = dataclasses.replace(limits, wall_s=1, output_bytes=1)
    with contextlib.suppress(BrokenPipeError), open(give, "wb") as given:
        given.write(json.dumps({**request["job"], "folder": folder,
                                "limits": dataclasses.asdict(its_limits)}).encode())
    try:
        return supervise(Subject(
            pid, Ends(feed, stdout_read, stderr_read, ready_read), request["stdin"].encode(), limits,
            kill=lambda: enclosure.kill(pid), wait=template.wait, totals=enclosure.watch.totals,
            overfull=lambda: enclosure.overfull(limits), hangup=channel.fileno()))
    finally:
        enclosure.clean()
