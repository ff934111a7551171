"""The server of a sandbox: a small interpreter that has imported what programs often do, has its template
fork them, and stands beside them.

A fork has all memory of the process that it comes from, and memory that was freed there still holds what it
held. So the server, which sees sources, inputs and outputs, forks nothing: its template does, which hears of
a program no more than "fork" and "wait". What a program is made of comes to it through a pipe of its own.

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
import struct
import sys
from collections.abc import Sequence
from typing import Any

from megatron_sov.sandbox import system_calls as sc
from megatron_sov.sandbox.child import NUM_FILES, be_as_programs, become_program
from megatron_sov.sandbox.enclosures import Enclosure, EnclosureUnavailable, Landlocked, Namespaces
from megatron_sov.sandbox.program import Limits, Outcome
from megatron_sov.sandbox.supervise import Ends, Gone, SupervisedProgram, supervise
from megatron_sov.work.processes.channel import receive, send

PRELOADED = (
    "abc", "array", "ast", "base64", "bisect", "calendar", "cmath", "collections", "collections.abc",
    "contextlib", "copy", "csv", "dataclasses", "datetime", "decimal", "enum", "fractions", "functools",
    "hashlib", "heapq", "inspect", "io", "itertools", "json", "locale", "logging", "math", "numbers",
    "operator", "os", "pathlib", "pickle", "queue", "random", "re", "shutil", "socket", "statistics",
    "string", "struct", "subprocess", "sys", "tempfile", "textwrap", "threading", "time", "traceback",
    "types", "typing", "unicodedata", "uuid", "warnings", "zlib",
)
_FORKED = struct.Struct("<ii")
"""Process, number of the error."""
_ENDED = struct.Struct("<id")
"""Wait status, seconds of processors."""


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
        except EnclosureUnavailable as e:
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
    # stdin, stdout, stderr, ready, job: ours are one end of each, the program's the other
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
        return supervise(SupervisedProgram(
            pid, Ends(feed, stdout_read, stderr_read, ready_read), request["stdin"].encode(), limits,
            kill=lambda: enclosure.kill(pid), wait=template.wait, totals=enclosure.watch.totals,
            overfull=lambda: enclosure.overfull(limits), hangup=channel.fileno()))
    finally:
        enclosure.clean()


class Template:
    """The process that forks programs, and that nothing of any program reaches, as the server has it; to be
    made before the first program comes."""

    def __init__(self, enclosure: Enclosure) -> None:
        self._control, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            self._control.close()
            try:
                _fork_programs(enclosure, theirs)
            finally:
                os._exit(0)
        theirs.close()
        enclosure.watch.follow_child()

    def fork(self, files: Sequence[int]) -> int:
        """Return a new process that becomes the program which it reads.

        Args:
            files: its ends of pipes, as `become_program` takes them.

        Raises:
            OSError: there is none.
            EOFError: the template has ended.
        """
        # one letter and five files: the template hears nothing else of the program
        socket.send_fds(self._control, [b"f"], files)
        pid, error = _FORKED.unpack(self._answer(_FORKED.size))
        if error:
            raise OSError(error, os.strerror(error))
        return int(pid)

    def wait(self) -> tuple[int, float]:
        """Return the wait status of the process that was forked, and its seconds of processors; all that it
        started must have been killed. Raises EOFError where the template has ended."""
        self._control.sendall(b"w")
        status, cpu_s = _ENDED.unpack(self._answer(_ENDED.size))
        return status, cpu_s

    def close(self) -> None:
        self._control.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def _answer(self, size: int) -> bytes:
        data = self._control.recv(size, socket.MSG_WAITALL)
        if len(data) < size:
            raise EOFError("the template of its programs has ended")
        return data


def _fork_programs(enclosure: Enclosure, control: socket.socket) -> None:
    """Fork programs until the server goes."""
    # what a program leaves behind comes to the template, which waits for it: none stays a zombie
    sc.prctl(sc.PR_SET_CHILD_SUBREAPER, 1)
    while True:
        order, files, _, _ = socket.recv_fds(control, 1, NUM_FILES)
        if not order:
            return
        try:
            pid, error = enclosure.fork(), 0
        except OSError as e:
            pid, error = -1, e.errno or -1
        if pid == 0:
            become_program(enclosure, files)
        for fd in files:
            os.close(fd)
        control.sendall(_FORKED.pack(pid, error))
        if error:
            continue
        if not control.recv(1):
            enclosure.kill(pid)
            return
        _, status, used = os.wait4(pid, 0)
        with contextlib.suppress(ChildProcessError):  # what it left behind
            while True:
                os.waitpid(-1, 0)
        control.sendall(_ENDED.pack(status, used.ru_utime + used.ru_stime))
