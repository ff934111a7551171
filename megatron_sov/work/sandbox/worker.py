"""A process's side of a sandbox's server: starting it, asking it, replacing it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from megatron_sov.work.sandbox.channel import receive, send
from megatron_sov.work.sandbox.enclosure import Unavailable
from megatron_sov.work.sandbox.folders import remove
from megatron_sov.work.sandbox.namespaces import identity_maps
from megatron_sov.work.sandbox.program import Limits, Outcome, Program
from megatron_sov.work.sandbox.supervise import MAX_STARVED_S, START_LIMIT_S

_ROOT = str(Path(__file__).parents[3])
# last, for where it is installed other packages lie beside it
_CODE = ("import sys; sys.path = sys.path[1:] + [sys.argv[2]]; "
         "from megatron_sov.work.sandbox.server import main; main(int(sys.argv[1]), sys.argv[2])")
_ANSWER_LIMIT_S = 600.0
"""For the server, beyond the program's own limits."""


class Worker:
    """One server, which runs one program at a time.

    Args:
        enclosure: `namespaces` or `landlock`.
        readable: folders that programs may read beyond the usual ones.
    """

    def __init__(self, enclosure: str, readable: list[str]) -> None:
        self._order: dict[str, Any] = {"enclosure": enclosure, "readable": readable, "folder": ""}
        self._channel: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server, unless it runs.

        Raises:
            Unavailable: it cannot enclose programs on this machine.
        """
        if self._channel is not None:
            return
        if self._order["enclosure"] == "landlock":  # namespaces have theirs in memory
            self._order["folder"] = tempfile.mkdtemp(prefix="sandbox-")
        ours, theirs = socket.socketpair()
        ours.settimeout(START_LIMIT_S)
        self._channel = ours
        with theirs, tempfile.TemporaryFile() as errors:
            # the hash seed is fixed, so that a program prints its sets in one order wherever it runs
            environment = {"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "PYTHONUTF8": "1",
                           **{name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}}
            python = getattr(sys, "_base_executable", None) or sys.executable
            self._process = subprocess.Popen(
                [python, "-s", "-S", "-c", _CODE, str(theirs.fileno()), _ROOT], env=environment, cwd="/",
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
                pass_fds=[theirs.fileno()], start_new_session=True)
            theirs.close()
            try:
                self._begin(ours)
            except (EOFError, OSError) as e:
                self.stop()
                errors.seek(0)
                said = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
                raise Unavailable(f"its server did not start ({said or e or 'it ended'})") from None
            except Unavailable:
                self.stop()
                raise

    def _begin(self, channel: socket.socket) -> None:
        send(channel, self._order)
        while True:
            told = receive(channel)
            if "enclosure" in told:
                return
            if "unavailable" in told:
                raise Unavailable(told["unavailable"])
            send(channel, {"error": _map_users(told["map"])})

    def run(self, program: Program, limits: Limits, command: tuple[str, ...] | None) -> Outcome:
        """Return what becomes of a program; a server that fails is replaced for the next one.

        Args:
            program: one without a problem.
            limits: what it may take.
            command: what runs its file; None: the server's own interpreter.
        """
        try:
            self.start()
            return self._ask({
                "job": {"source": program.source, "files": dict(program.files),
                        "arguments": list(program.arguments), "command": command and list(command)},
                "stdin": program.stdin, "limits": dataclasses.asdict(limits)}, limits)
        except (EOFError, OSError, Unavailable) as e:
            self.stop()
            return Outcome("infrastructure", None, "", "",
                           f"the sandbox's server failed ({e or 'it ended'})", 0.0, 0.0)

    def _ask(self, request: dict[str, Any], limits: Limits) -> Outcome:
        assert self._channel is not None
        self._channel.settimeout(START_LIMIT_S + limits.wall_s + MAX_STARVED_S + _ANSWER_LIMIT_S)
        send(self._channel, request)
        return Outcome(**receive(self._channel))

    def stop(self) -> None:
        """End the server with all that it runs."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None:
            try:
                self._process.wait(5)  # it ends by itself, and removes what it made
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        folder = self._order["folder"]
        if folder and os.path.isdir(folder):  # the server has been killed, or never began
            with contextlib.suppress(OSError):
                remove(folder)


def _map_users(pid: int) -> str:
    """Write the user and group maps of a server's namespace; returns why that failed."""
    error = ""
    for setgroups, users, groups in identity_maps(os.geteuid(), os.getegid()):
        try:
            for name, text in (("uid_map", users), ("setgroups", setgroups), ("gid_map", groups)):
                with contextlib.suppress(FileNotFoundError):
                    Path(f"/proc/{pid}/{name}").write_text(text)
            return ""
        except OSError as e:
            error = f"{e.strerror}: {e.filename}"
    return error
