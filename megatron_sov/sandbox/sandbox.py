"""The sandbox: programs of a model run where they can do no harm, by servers of it, or by a command of the
user's own (gVisor, bubblewrap, a container)."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from megatron_sov.base.errors import UserError, format_problems
from megatron_sov.sandbox.enclosures import EnclosureUnavailable, identity_maps, remove
from megatron_sov.sandbox.program import Limits, Outcome, Program
from megatron_sov.sandbox.restrictions import folders_of
from megatron_sov.sandbox.supervise import MAX_STARVED_S, START_LIMIT_S, Ends, SupervisedProgram, supervise
from megatron_sov.work.processes.channel import receive_message, send_message
from megatron_sov.work.processes.children import Child, start_interpreter
from megatron_sov.work.processes.process_tree import ProcessTreeUsage

ENCLOSURES = ("namespaces", "landlock")
"""What the kernel may give, the stronger one first."""
LANGUAGES: Mapping[str, tuple[str, ...]] = {"bash": ("bash", "{file}")}
"""Beside python; those whose command is installed."""
PACKAGES = ("numpy",)
"""Packages of this environment that programs may import, beside the standard library."""
DEFAULT_LIMITS = Limits()
_ROOT = str(Path(__file__).parents[2])
# last, for where it is installed other packages lie beside it
_CODE = ("import sys; sys.path = sys.path[1:] + [sys.argv[2]]; "
         "from megatron_sov.sandbox.server import main; main(int(sys.argv[1]), sys.argv[2])")
_END_LIMIT_S = 5.0
_ANSWER_LIMIT_S = 600.0
"""For the server, beyond the program's own limits."""
PYTHON = ("python3", "{file}")
FILE_NAME = "program.py"
SANDBOXES: dict[tuple[str, tuple[str, ...], int], Sandbox] = {}
"""Those that are shared: enclosure, command and workers -> sandbox."""
_MAKING = threading.Lock()


class Sandbox:
    """Runs programs; a context, since its servers have to end. Threads may share one.

    Args:
        limits: for programs that have none of their own.
        enclosure: `namespaces`, `landlock`, or `auto`: the first of them that this machine gives.
        workers: programs that run at a time.
        command: an own command instead, which programs are run by: gVisor, bubblewrap, Apptainer.
        languages: language -> command that runs a program in it; `{file}` stands for the program.

    Raises:
        UserError: a setting breaks a rule, or the machine gives no enclosure.
    """

    enclosure: str
    """`namespaces`, `landlock` or `command`."""

    def __init__(self, limits: Limits = DEFAULT_LIMITS, *, enclosure: str = "auto", workers: int = 1,
                 command: Sequence[str] = (), languages: Mapping[str, Sequence[str]] = {}) -> None:
        problems = limits.problems() + _problems(enclosure, workers, command)
        if problems:
            raise UserError(format_problems("sandbox", problems))
        self._limits, self._command = limits, tuple(command)
        known = {**LANGUAGES, **{name: tuple(parts) for name, parts in languages.items()}}
        self._languages = {name: parts for name, parts in known.items() if command or shutil.which(parts[0])}
        self._free: queue.SimpleQueue[Worker | None] = queue.SimpleQueue()
        self._num_workers, self._closed = workers, False
        self._workers: list[Worker] = []
        if command:
            self.enclosure = "command"
            for _ in range(workers):
                self._free.put(None)
        else:
            self._start(enclosure)

    def _start(self, wanted: str) -> None:
        """Start the first worker, which shows what the machine gives; the others start with their work."""
        packages = find_packages()
        # the folders of these packages alone: all else that is installed beside them stays hidden
        readable = sorted({*(folder for parts in self._languages.values()
                             for folder in folders_of(shutil.which(parts[0]) or parts[0])),
                           *(folder for folder in packages.values()),
                           *(libraries for folder in packages.values()
                             if os.path.isdir(libraries := f"{folder}.libs"))})
        reasons = []
        # tried and not asked: whether a kernel allows namespaces depends on its settings and on containers
        for name in ENCLOSURES if wanted == "auto" else (wanted,):
            first = Worker(name, readable, packages)
            try:
                first.start()
            except EnclosureUnavailable as e:
                reasons.append(f"{name}: {e}")
                continue
            self.enclosure = name
            self._workers = [first, *(Worker(name, readable, packages) for _ in range(self._num_workers - 1))]
            for worker in self._workers:
                self._free.put(worker)
            return
        raise UserError(format_problems("sandbox: this machine cannot enclose a program", reasons,
                                      "allow one of them, or set `command` to one that encloses programs"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End all servers, behind the programs that they run."""
        self._closed = True
        for worker in self._workers:
            worker.stop()

    def run(self, program: Program, limits: Limits | None = None) -> Outcome:
        """Return what becomes of a program.

        Args:
            program: what to run.
            limits: for this program, instead of the sandbox's.

        Raises:
            UserError: a limit breaks a rule.
        """
        if limits is not None and (problems := limits.problems()):
            raise UserError(format_problems("limits", problems))
        if self._closed:
            raise RuntimeError("this sandbox has been closed")
        reason = program.problem() or self._language_problem(program.language)
        if reason:
            return Outcome("refused", None, "", "", reason, 0.0, 0.0)
        # a queue as a semaphore: who finds no free worker waits here
        worker = self._free.get()
        try:
            command = self._languages.get(program.language)
            if worker is None:
                return run_in_command(self._command, command or PYTHON, program, limits or self._limits)
            return worker.run(program, limits or self._limits, command)
        finally:
            self._free.put(worker)

    def _language_problem(self, language: str) -> str:
        if language == "python" or language in self._languages:
            return ""
        return (f"language = {language!r}: there is no command for it here; there are "
                f"{', '.join(['python', *self._languages])}")


def find_packages() -> dict[str, str]:
    """Return name -> folder of those of `PACKAGES` that this environment has, without links on the way: an
    environment may be reached by one, which programs do not see."""
    specs = {name: importlib.util.find_spec(name) for name in PACKAGES}
    return {name: os.path.realpath(os.path.dirname(spec.origin))
            for name, spec in specs.items() if spec and spec.origin}


def machine_enclosure() -> str:
    """Return which enclosure this machine gives to the user that asks.

    Raises:
        UserError: none; with the reasons.
    """
    with Sandbox() as sandbox:
        return sandbox.enclosure


def _problems(enclosure: str, workers: int, command: Sequence[str]) -> list[str]:
    p = []
    if enclosure not in ("auto", "command", *ENCLOSURES):
        p.append(f"enclosure = {enclosure!r} must be auto, command or one of {', '.join(ENCLOSURES)}")
    if workers < 1:
        p.append(f"workers = {workers} must be at least 1")
    if command and enclosure not in ("auto", "command"):
        p.append(f"enclosure = {enclosure!r} with a command of your own: set one of them")
    if enclosure == "command" and not command:
        p.append("enclosure = 'command' needs `command`")
    if command and shutil.which(command[0], path=os.environ.get("PATH", os.defpath)) is None:
        p.append(f"command: {command[0]!r} is not installed, or not on the PATH")
    return p


def shared_sandbox(enclosure: str = "auto", command: Sequence[str] = (), workers: int = 1) -> Sandbox:
    """Return the sandbox of this process with these settings; it lives as long as the process.

    Raises:
        UserError: a setting breaks a rule, or the machine gives no enclosure.
    """
    key = (enclosure, tuple(command), workers)
    with _MAKING:  # two threads would start two, one of which nobody ends
        if key not in SANDBOXES:
            SANDBOXES[key] = Sandbox(enclosure=enclosure, command=command, workers=workers)
        return SANDBOXES[key]


class Worker:
    """One server, which runs one program at a time.

    Args:
        enclosure: `namespaces` or `landlock`.
        readable: folders that programs may read beyond the usual ones.
        packages: name -> folder of packages that programs may import.
    """

    def __init__(self, enclosure: str, readable: list[str], packages: Mapping[str, str]) -> None:
        self._order: dict[str, Any] = {"enclosure": enclosure, "readable": readable, "folder": "",
                                       "packages": dict(packages)}
        self._child: Child | None = None

    def start(self) -> None:
        """Start the server, unless it runs.

        Raises:
            Unavailable: it cannot enclose programs on this machine.
        """
        if self._child is not None:
            return
        if self._order["enclosure"] == "landlock":  # namespaces have theirs in memory
            self._order["folder"] = tempfile.mkdtemp(prefix="sandbox-")
        # the interpreter itself and not a virtual environment's link: fewer folders have to be readable
        python = getattr(sys, "_base_executable", None) or sys.executable
        with tempfile.TemporaryFile() as errors:
            # the hash seed is fixed, so that a program prints its sets in one order wherever it runs
            self._child = start_interpreter([python, "-s", "-S", "-c", _CODE], [_ROOT],
                                            {"PYTHONHASHSEED": "0"}, errors=errors, patience_s=_END_LIMIT_S)
            self._child.channel.settimeout(START_LIMIT_S)
            try:
                self._begin(self._child.channel)
            except (EOFError, OSError) as e:
                self.stop()
                errors.seek(0)
                said = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
                raise EnclosureUnavailable(f"its server did not start ({said or e or 'it ended'})") from None
            except EnclosureUnavailable:
                self.stop()
                raise

    def _begin(self, channel: socket.socket) -> None:
        send_message(channel, self._order)
        while True:
            told = receive_message(channel)
            if "enclosure" in told:
                return
            if "unavailable" in told:
                raise EnclosureUnavailable(told["unavailable"])
            send_message(channel, {"error": _map_users(told["map"])})

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
        except (EOFError, OSError, EnclosureUnavailable) as e:
            self.stop()
            return Outcome("infrastructure", None, "", "",
                           f"the sandbox's server failed ({e or 'it ended'})", 0.0, 0.0)

    def _ask(self, request: dict[str, Any], limits: Limits) -> Outcome:
        assert self._child is not None
        channel = self._child.channel
        # longer than anything the server itself waits for: passing it means that the server hangs
        channel.settimeout(START_LIMIT_S + limits.wall_s + MAX_STARVED_S + _ANSWER_LIMIT_S)
        send_message(channel, request)
        return Outcome(**receive_message(channel))

    def stop(self) -> None:
        """End the server with all that it runs."""
        if self._child is not None:
            self._child.end()  # by itself, so that it removes what it made
            self._child = None
        folder = self._order["folder"]
        if folder and os.path.isdir(folder):  # the server has been killed, or never began
            with contextlib.suppress(OSError):
                remove(folder)


def _map_users(pid: int) -> str:
    """Write the user and group maps of a server's namespace; returns why that failed."""
    error = ""
    # the better map first; a machine may forbid it
    for setgroups, users, groups in identity_maps(os.geteuid(), os.getegid()):
        try:
            for name, text in (("uid_map", users), ("setgroups", setgroups), ("gid_map", groups)):
                with contextlib.suppress(FileNotFoundError):
                    Path(f"/proc/{pid}/{name}").write_text(text)
            return ""
        except OSError as e:
            error = f"{e.strerror}: {e.filename}"
    return error


def run_in_command(wrapper: Sequence[str], interpreter: Sequence[str], program: Program,
                   limits: Limits) -> Outcome:
    """Return what becomes of a program; limits of processes and files are the command's to keep.

    Args:
        wrapper: the command; `{folder}` stands for the program's folder.
        interpreter: what it has to run; `{file}` stands for the program.
        program: one without a problem.
        limits: of time, output, and memory of all processes below the command.
    """
    folder = tempfile.mkdtemp(prefix="program-")
    try:
        for path, text in {**program.files, FILE_NAME: program.source}.items():
            os.makedirs(os.path.dirname(f"{folder}/{path}"), exist_ok=True)
            with open(f"{folder}/{path}", "w", encoding="utf-8", newline="") as f:
                f.write(text)
        parts = [part.replace("{folder}", folder) for part in wrapper]
        parts += [part.replace("{file}", FILE_NAME) for part in interpreter]
        return _supervised([*parts, *program.arguments], folder, program.stdin.encode(), limits)
    except OSError as e:
        return Outcome("infrastructure", None, "", "", f"{wrapper[0]}: {e.strerror or e}", 0.0, 0.0)
    finally:
        with contextlib.suppress(OSError):  # a container may leave files of another user
            remove(folder)


def _supervised(parts: list[str], folder: str, given: bytes, limits: Limits) -> Outcome:
    (stdin, feed), (out_read, out), (error_read, error) = (os.pipe() for _ in range(3))
    try:
        process = subprocess.Popen(parts, stdin=stdin, stdout=out, stderr=error, cwd=folder,
                                   start_new_session=True, env={
                                       "PATH": os.environ.get("PATH", os.defpath), "HOME": folder,
                                       "TMPDIR": folder, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0",
                                       "PYTHONINTMAXSTRDIGITS": "0"})
    except OSError:
        for fd in (feed, out_read, error_read):
            os.close(fd)
        raise
    finally:
        for fd in (stdin, out, error):
            os.close(fd)

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def wait() -> tuple[int, float]:
        _, status, used = os.wait4(process.pid, 0)
        return status, used.ru_utime + used.ru_stime

    watch = ProcessTreeUsage(process.pid)
    try:
        return supervise(SupervisedProgram(process.pid, Ends(feed, out_read, error_read), given, limits,
                                           kill=kill, wait=wait, totals=watch.totals))
    finally:
        process.returncode = 0  # it has been waited for
        watch.close()
