"""The template of a sandbox's programs: a process that forks them, and that nothing of any program reaches.

A fork has all memory of the process that it comes from, and memory that was freed there still holds what it
held. So the server, which sees sources, inputs and outputs, forks nothing: its template does, which hears of
a program no more than "fork" and "wait". What a program is made of comes to it through a pipe of its own.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Sequence

from megatron_sov.work.sandbox import system_calls as sc
from megatron_sov.work.sandbox.child import NUM_FILES, become_program
from megatron_sov.work.sandbox.enclosure import Enclosure

_FORKED = struct.Struct("<ii")
"""Process, number of the error."""
_ENDED = struct.Struct("<id")
"""Wait status, seconds of processors."""


class Template:
    """The server's side of its template; to be made before the first program comes."""

    def __init__(self, enclosure: Enclosure) -> None:
        self._control, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            self._control.close()
            try:
                _serve(enclosure, theirs)
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
        """End it."""
        self._control.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def _answer(self, size: int) -> bytes:
        data = self._control.recv(size, socket.MSG_WAITALL)
        if len(data) < size:
            raise EOFError("the template of its programs has ended")
        return data


def _serve(enclosure: Enclosure, control: socket.socket) -> None:
    """Fork programs until the server goes."""
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
