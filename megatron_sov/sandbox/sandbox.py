"""Run model-written programs in server processes of the sandbox, or by the user's own enclosing command."""

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
from megatron_sov.sandbox.enclosures import EnclosureUnavailable, build_id_maps
from megatron_sov.sandbox.folders import remove_folder
from megatron_sov.sandbox.program import FILE_NAME, Limits, Outcome, Program
from megatron_sov.sandbox.restrictions import is_shared_folder
from megatron_sov.sandbox.supervision import (
    MAX_STARVED_S, START_LIMIT_S, ProgramPipes, SupervisedProgram, supervise_program)
from megatron_sov.work.processes.channel import receive_message, send_message
from megatron_sov.work.processes.children import Child, start_interpreter
from megatron_sov.work.processes.process_tree import ProcessTreeUsage

ENCLOSURES = ("namespaces", "landlock")
"""Enclosures by the kernel, the strongest first."""
PACKAGES = ("numpy",)
"""Packages that programs may import besides the standard library."""
DEFAULT_LIMITS = Limits()
_ROOT = str(Path(__file__).parents[2])
# The root comes last in the path, because `site-packages` may shadow the standard library.
_CODE = ("import sys; sys.path = sys.path[1:] + [sys.argv[2]]; "
         "from megatron_sov.sandbox.server import main; main(int(sys.argv[1]), sys.argv[2])")
_END_LIMIT_S = 5.0
_REPLY_LIMIT_S = 600.0
"""Time for the server's reply beyond the program's limits."""
SANDBOXES: "dict[tuple[str, tuple[str, ...], int], Sandbox]" = {}
"""(enclosure, command, workers) -> shared sandbox."""
_SANDBOXES_LOCK = threading.Lock()


class Sandbox:
    """Runs programs; threads may share a sandbox.

    Use it as a context manager, because the server processes must be ended.

    Args:
        limits: default limits.
        enclosure: `namespaces`, `landlock`, or `auto` for the strongest on this machine.
        workers: programs at a time.
        command: enclosing command instead, e.g. of gVisor, bubblewrap or Apptainer; `{folder}` is replaced
            by the program's folder.

    Raises:
        UserError: a setting breaks a rule, or the machine cannot enclose programs.
    """

    enclosure: str
    """`namespaces`, `landlock` or `command`."""

    def __init__(self, limits: Limits = DEFAULT_LIMITS, *, enclosure: str = "auto", workers: int = 1,
                 command: Sequence[str] = ()) -> None:
        problems = limits.problems() + _find_problems(enclosure, workers, command)
        if problems:
            raise UserError(format_problems("sandbox", problems))
        self._limits, self._command = limits, tuple(command)
        self._idle_workers: queue.SimpleQueue[Worker | None] = queue.SimpleQueue()
        """Idle workers; None entries in place of workers if `command` is set."""
        self._is_closed = False
        self._workers: list[Worker] = []
        if command:
            self.enclosure = "command"
        else:
            self.enclosure = self._create_workers(enclosure, workers)
        idle: Sequence[Worker | None] = self._workers or [None] * workers
        for worker in idle:
            self._idle_workers.put(worker)

    def _create_workers(self, enclosure: str, count: int) -> str:
        """Create workers and start the first, to test the machine; return the enclosure's name."""
        packages = find_packages()
        # only the packages' own folders: other installed packages stay hidden
        readable = list(packages.values())
        readable += [libraries for folder in packages.values()
                     if os.path.isdir(libraries := f"{folder}.libs")]
        reasons = []
        # test by starting: whether namespaces work depends on the kernel, its settings and the container
        for name in ENCLOSURES if enclosure == "auto" else (enclosure,):
            workers = [Worker(name, sorted(readable), packages) for _ in range(count)]
            try:
                workers[0].start()
                _check_environment(workers[0], packages)
            except EnclosureUnavailable as e:
                reasons.append(f"{name}: {e}")
                continue
            self._workers = workers
            return name
        raise UserError(format_problems("sandbox: this machine cannot enclose a program", reasons,
                                        "allow one of them, or set `command` to one that encloses programs"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the server processes, after running programs."""
        self._is_closed = True
        for worker in self._workers:
            worker.stop()

    def run(self, program: Program, limits: Limits | None = None) -> Outcome:
        """Run a program and return the outcome.

        Args:
            program: the program.
            limits: limits instead of the sandbox's.

        Raises:
            UserError: a limit breaks a rule.
        """
        if limits is not None and (problems := limits.problems()):
            raise UserError(format_problems("limits", problems))
        if self._is_closed:
            raise RuntimeError("this sandbox has been closed")
        if reason := program.find_problem():
            return Outcome("refused", None, stdout="", stderr="", reason=reason, wall_s=0.0, cpu_s=0.0)
        # waits for an idle worker
        worker = self._idle_workers.get()
        try:
            if worker is None:
                return run_by_command(self._command, program, limits or self._limits)
            return worker.run(program, limits or self._limits)
        finally:
            self._idle_workers.put(worker)


def _check_environment(worker: "Worker", packages: Mapping[str, str]) -> None:
    """Raise `EnclosureUnavailable` if a program cannot read the standard library or `packages`."""
    files = [os.__file__, *[f"{folder}/__init__.py" for folder in packages.values()]]
    outcome = worker.run(Program(f"for file in {files!r}:\n    open(file).close()"), DEFAULT_LIMITS)
    if outcome.status != "ok":
        worker.stop()
        raise EnclosureUnavailable(
            f"programs cannot read the Python environment ({outcome.reason}); let all users read its folders "
            "(chmod -R a+rX), or install it in another folder")


def _find_problems(enclosure: str, workers: int, command: Sequence[str]) -> list[str]:
    problems = []
    if enclosure not in ("auto", "command", *ENCLOSURES):
        problems.append(f"enclosure = {enclosure!r} must be auto, command or one of {', '.join(ENCLOSURES)}")
    if workers < 1:
        problems.append(f"workers = {workers} must be at least 1")
    if command and enclosure not in ("auto", "command"):
        problems.append(f"enclosure = {enclosure!r} with a command of your own: set one of them")
    if not command and is_shared_folder(sys.base_prefix):
        problems.append(f"{sys.base_prefix}: the Python installation lies in a folder of all users, and "
                        "programs would read their files; install it in a subfolder")
    if enclosure == "command" and not command:
        problems.append("enclosure = 'command' needs `command`")
    if command and shutil.which(command[0], path=os.environ.get("PATH", os.defpath)) is None:
        problems.append(f"command: {command[0]!r} is not installed, or not on the PATH")
    return problems


def find_packages() -> dict[str, str]:
    """Return package -> folder for the installed `PACKAGES`, with symbolic links resolved, because programs
    cannot follow a link to a virtual environment."""
    specs = {name: importlib.util.find_spec(name) for name in PACKAGES}
    return {name: os.path.realpath(os.path.dirname(spec.origin))
            for name, spec in specs.items() if spec and spec.origin}


def shared_sandbox(enclosure: str = "auto", command: Sequence[str] = (), workers: int = 1) -> Sandbox:
    """Return the process-wide `Sandbox` with the given settings, which ends with the process. Raises
    `UserError`: a setting breaks a rule, or the machine cannot enclose programs."""
    key = (enclosure, tuple(command), workers)
    with _SANDBOXES_LOCK:  # without the lock, one of two concurrent sandboxes would never be closed
        if key not in SANDBOXES:
            SANDBOXES[key] = Sandbox(enclosure=enclosure, command=command, workers=workers)
        return SANDBOXES[key]


def detect_enclosure() -> str:
    """Return the strongest enclosure in `ENCLOSURES` on this machine. Raises `UserError`: the machine cannot
    enclose programs; the message has the reasons."""
    with Sandbox() as sandbox:
        return sandbox.enclosure


class Worker:
    """Connection to a server process, which runs one program at a time.

    Args:
        enclosure: `namespaces` or `landlock`.
        readable: readable folders besides the system's and the interpreter's.
        packages: importable package -> folder.
    """

    def __init__(self, enclosure: str, readable: list[str], packages: Mapping[str, str]) -> None:
        self._settings: dict[str, Any] = {"enclosure": enclosure, "readable": readable, "folder": "",
                                          "packages": dict(packages)}
        self._child: Child | None = None

    def start(self) -> None:
        """Start the server process unless it is running. Raises `EnclosureUnavailable`: the machine cannot
        provide the enclosure."""
        if self._child is not None:
            return
        if self._settings["enclosure"] == "landlock":
            self._settings["folder"] = tempfile.mkdtemp(prefix="sandbox-")
        # the base interpreter, not the virtual environment's link: fewer folders must be readable
        python = getattr(sys, "_base_executable", None) or sys.executable
        with tempfile.TemporaryFile() as errors:
            # a fixed hash seed, so that programs print sets in equal order everywhere
            self._child = start_interpreter([python, "-s", "-S", "-c", _CODE], [_ROOT],
                                            {"PYTHONHASHSEED": "0"}, errors=errors, patience_s=_END_LIMIT_S)
            self._child.channel.settimeout(START_LIMIT_S)
            try:
                self._wait_for_start(self._child.channel)
            except (EOFError, OSError) as e:
                self.stop()
                errors.seek(0)
                last_line = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
                raise EnclosureUnavailable(f"its server did not start ({last_line or e or 'it ended'})"
                                           ) from None
            except EnclosureUnavailable:
                self.stop()
                raise

    def _wait_for_start(self, channel: socket.socket) -> None:
        send_message(channel, self._settings)
        while True:
            message = receive_message(channel)
            if "enclosure" in message:
                return
            if "unavailable" in message:
                raise EnclosureUnavailable(message["unavailable"])
            send_message(channel, {"error": _write_id_maps(message["map"])})

    def run(self, program: Program, limits: Limits) -> Outcome:
        """Run a program and return the outcome; a failed server is replaced before the next program.

        Args:
            program: valid program.
            limits: limits for the program.
        """
        try:
            self.start()
            assert self._child is not None
            channel = self._child.channel
            # longer than every time limit in the server: afterwards the server hangs
            channel.settimeout(START_LIMIT_S + limits.wall_s + MAX_STARVED_S + _REPLY_LIMIT_S)
            send_message(channel, {"job": {"source": program.source, "files": dict(program.files)},
                                   "stdin": program.stdin, "limits": dataclasses.asdict(limits)})
            return Outcome(**receive_message(channel))
        except (EOFError, OSError, EnclosureUnavailable) as e:
            self.stop()
            return Outcome("infrastructure", None, stdout="", stderr="",
                           reason=f"the sandbox's server failed ({e or 'it ended'})", wall_s=0.0, cpu_s=0.0)

    def stop(self) -> None:
        """End the server and its program."""
        if self._child is not None:
            self._child.end()  # first closes the channel: the server removes its folders
            self._child = None
        folder = self._settings["folder"]
        if folder and os.path.isdir(folder):  # the server was killed, or failed at the start
            with contextlib.suppress(OSError):
                remove_folder(folder)


def _write_id_maps(pid: int) -> str:
    """Write the user and group maps of a server's namespace; return the error, "" for success."""
    error = ""
    # some machines forbid the preferred map
    for setgroups, users, groups in build_id_maps(os.geteuid(), os.getegid()):
        try:
            for name, text in (("uid_map", users), ("setgroups", setgroups), ("gid_map", groups)):
                with contextlib.suppress(FileNotFoundError):
                    Path(f"/proc/{pid}/{name}").write_text(text)
            return ""
        except OSError as e:
            error = f"{e.strerror}: {e.filename}"
    return error


def run_by_command(command: Sequence[str], program: Program, limits: Limits) -> Outcome:
    """Run a program by an enclosing command.

    Args:
        command: enclosing command; `{folder}` is replaced by the program's folder.
        program: valid program.
        limits: limits of time and output, and of memory for all processes of the command. The command itself
            must limit processes and files.
    """
    folder = tempfile.mkdtemp(prefix="program-")
    try:
        for path, text in {**program.files, FILE_NAME: program.source}.items():
            os.makedirs(os.path.dirname(f"{folder}/{path}"), exist_ok=True)
            with open(f"{folder}/{path}", "w", encoding="utf-8", newline="") as f:
                f.write(text)
        parts = [part.replace("{folder}", folder) for part in command]
        return _supervise_command([*parts, "python3", FILE_NAME], folder, program.stdin.encode(), limits)
    except OSError as e:
        return Outcome("infrastructure", None, "", "", f"{command[0]}: {e.strerror or e}", 0.0, 0.0)
    finally:
        with contextlib.suppress(OSError):  # a container may leave files of another user
            remove_folder(folder)


def _supervise_command(argv: list[str], folder: str, stdin: bytes, limits: Limits) -> Outcome:
    (stdin_read, feed), (stdout_read, stdout), (stderr_read, stderr) = (os.pipe() for _ in range(3))
    try:
        process = subprocess.Popen(argv, stdin=stdin_read, stdout=stdout, stderr=stderr, cwd=folder,
                                   start_new_session=True, env={
                                       "PATH": os.environ.get("PATH", os.defpath), "HOME": folder,
                                       "TMPDIR": folder, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0",
                                       "PYTHONINTMAXSTRDIGITS": "0"})
    except OSError:
        for fd in (feed, stdout_read, stderr_read):
            os.close(fd)
        raise
    finally:
        for fd in (stdin_read, stdout, stderr):
            os.close(fd)

    def kill_group() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def wait_for_process() -> tuple[int, float]:
        _, status, usage = os.wait4(process.pid, 0)
        return status, usage.ru_utime + usage.ru_stime

    tree = ProcessTreeUsage(process.pid)
    try:
        return supervise_program(SupervisedProgram(
            process.pid, ProgramPipes(feed, stdout_read, stderr_read), stdin, limits, kill=kill_group,
            wait=wait_for_process, totals=tree.totals))
    finally:
        process.returncode = 0  # already waited for
        tree.close()
