"""The sandbox's server process: forks programs from a template process and supervises them.

A fork inherits all memory of its parent, including freed memory. The server, which sees sources, inputs and
outputs, therefore forks only the template, before the first program. The template receives only the commands
"fork" and "wait"; a program's process reads its source through a pipe.

The server runs with a clean environment and imports only the standard library and this package.
"""

import _sitebuiltins
import atexit
import builtins
import contextlib
import dataclasses
import gc
import importlib.util
import io
import json
import math
import os
import resource
import signal
import socket
import struct
import sys
import threading
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from typing import Any, NoReturn, TextIO

from megatron_sov.sandbox import system_calls as sc
from megatron_sov.sandbox.enclosures import (
    Enclosure, EnclosureUnavailable, LandlockEnclosure, NamespaceEnclosure)
from megatron_sov.sandbox.program import FILE_NAME, Limits, Outcome
from megatron_sov.sandbox.restrictions import set_limit
from megatron_sov.sandbox.supervision import CallerGone, ProgramPipes, SupervisedProgram, supervise_program
from megatron_sov.work.processes.channel import receive_message, send_message

PRELOADED = (
    "abc", "array", "ast", "base64", "bisect", "calendar", "cmath", "collections", "collections.abc",
    "contextlib", "copy", "csv", "dataclasses", "datetime", "decimal", "enum", "fractions", "functools",
    "hashlib", "heapq", "inspect", "io", "itertools", "json", "locale", "logging", "math", "numbers",
    "operator", "os", "pathlib", "pickle", "queue", "random", "re", "shutil", "socket", "statistics",
    "string", "struct", "subprocess", "sys", "tempfile", "textwrap", "threading", "time", "traceback",
    "types", "typing", "unicodedata", "uuid", "warnings", "zlib")
"""Modules to import before forking."""
READY = b"."
"""Message of an enclosed process; any other message is an error."""
STREAMS = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
"""Standard stream's path -> file descriptor."""
_READY_FD, _JOB_FD, _NUM_FILES = 3, 4, 5
_FORKED = struct.Struct("<ii")
"""Process number, errno."""
_ENDED = struct.Struct("<id")
"""Wait status, processor time in seconds."""


def main(channel_fd: int, root: str) -> None:
    """Serve requests until the parent process closes the channel.

    Args:
        channel_fd: socket to the parent process.
        root: folder of this package, which programs must not import.
    """
    for module in PRELOADED:
        importlib.import_module(module)
    sys.path.remove(root)
    # Prepare everything that programs share before forking: a fork copies every page that the program writes,
    # and copying is most of the cost. For the same reason the removed modules are not freed before the end.
    own_modules = {name: sys.modules.pop(name) for name in list(sys.modules)
                   if name.partition(".")[0] == "megatron_sov"}
    prepare_interpreter()
    with socket.socket(fileno=channel_fd) as channel:
        settings = receive_message(channel)
        sys.meta_path.append(PackageFinder(settings["packages"]))
        try:
            enclosure = _create_enclosure(settings, channel)
        except EnclosureUnavailable as e:
            send_message(channel, {"unavailable": str(e)})
            return
        gc.collect()
        gc.freeze()  # garbage collection in a fork would copy all pages
        gc.disable()
        template = Template(enclosure)
        send_message(channel, {"enclosure": enclosure.name})
        try:
            while True:
                outcome = _run_program(enclosure, template, receive_message(channel), channel)
                send_message(channel, dataclasses.asdict(outcome))
        except (EOFError, OSError, CallerGone):
            return
        finally:
            template.close()
            enclosure.close()
            own_modules.clear()


def _create_enclosure(settings: dict[str, Any], channel: socket.socket) -> Enclosure:
    if settings["enclosure"] == "namespaces":
        return NamespaceEnclosure(channel, settings["readable"])
    return LandlockEnclosure(settings["readable"], settings["folder"])


def _run_program(enclosure: Enclosure, template: "Template", request: dict[str, Any],
                 channel: socket.socket) -> Outcome:
    """Run the program in a request of `sandbox.Worker`; a failed fork has the status `infrastructure`."""
    limits = Limits(**request["limits"])
    # each pipe has a server end and a program end
    pipes = [os.pipe() for _ in range(5)]
    (stdin, feed), (stdout_read, stdout), (stderr_read, stderr), (ready_read, ready), (job, job_write) = pipes
    program_ends = (stdin, stdout, stderr, ready, job)
    try:
        folder = enclosure.create_folder()
        pid = template.fork(program_ends)
    except OSError as e:
        for fd in (feed, stdout_read, stderr_read, ready_read, job_write):
            os.close(fd)
        enclosure.delete_folder()
        return Outcome("infrastructure", None, "", "", f"no process could be forked: {e}", 0.0, 0.0)
    finally:
        for fd in program_ends:
            os.close(fd)
    # the output limit would reveal the length of the expected output
    visible_limits = dataclasses.replace(limits, wall_s=1, output_bytes=1)
    with contextlib.suppress(BrokenPipeError), open(job_write, "wb") as job_file:
        job_file.write(json.dumps({**request["job"], "folder": folder,
                                   "limits": dataclasses.asdict(visible_limits)}).encode())
    try:
        return supervise_program(SupervisedProgram(
            pid, ProgramPipes(feed, stdout_read, stderr_read, ready_read), request["stdin"].encode(), limits,
            kill=lambda: enclosure.kill_program(pid), wait=template.wait, totals=enclosure.usage.totals,
            find_excess=lambda: enclosure.find_excess(limits), caller=channel.fileno()))
    finally:
        enclosure.delete_folder()


class PackageFinder:
    """Import finder for `PACKAGES` without listing `site-packages`, which programs cannot read.

    Args:
        folders: package -> folder.
    """

    def __init__(self, folders: Mapping[str, str]) -> None:
        self._folders = folders

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        folder = self._folders.get(name)
        return None if folder is None else importlib.util.spec_from_file_location(
            name, f"{folder}/__init__.py", submodule_search_locations=[folder])


class Template:
    """The process that forks programs, a fork of the server before the first program."""

    def __init__(self, enclosure: Enclosure) -> None:
        self._control, template_end = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            self._control.close()
            try:
                _serve_forks(enclosure, template_end)
            finally:
                os._exit(0)
        template_end.close()
        enclosure.usage.follow_child()

    def fork(self, files: Sequence[int]) -> int:
        """Fork a process that runs `become_program`; return the process number.

        Args:
            files: program ends of the pipes.

        Raises:
            OSError: the fork failed.
            EOFError: the template ended.
        """
        # a byte and five files: all that the template receives about the program
        socket.send_fds(self._control, [b"f"], files)
        pid, error = _FORKED.unpack(self._receive(_FORKED.size))
        if error:
            raise OSError(error, os.strerror(error))
        return int(pid)

    def wait(self) -> tuple[int, float]:
        """Return the wait status and the processor time of the killed program. Raises `EOFError`: the
        template ended."""
        self._control.sendall(b"w")
        status, cpu_s = _ENDED.unpack(self._receive(_ENDED.size))
        return status, cpu_s

    def close(self) -> None:
        self._control.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def _receive(self, num_bytes: int) -> bytes:
        data = self._control.recv(num_bytes, socket.MSG_WAITALL)
        if len(data) < num_bytes:
            raise EOFError("the template of its programs has ended")
        return data


def _serve_forks(enclosure: Enclosure, control: socket.socket) -> None:
    """Fork programs in the template until the server ends."""
    # adopt and reap orphans of programs
    sc.prctl(sc.PR_SET_CHILD_SUBREAPER, 1)
    while True:
        command, files, _, _ = socket.recv_fds(control, 1, _NUM_FILES)
        if not command:
            return
        try:
            pid, error = enclosure.fork_program(), 0
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
            enclosure.kill_program(pid)
            return
        _, status, usage = os.wait4(pid, 0)
        with contextlib.suppress(ChildProcessError):  # orphans
            while True:
                os.waitpid(-1, 0)
        control.sendall(_ENDED.pack(status, usage.ru_utime + usage.ru_stime))


def prepare_interpreter() -> None:
    """Set signals, environment, file mode and streams for programs."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    # fixed environment and hash seed: equal results on all machines, and no keys
    os.environ.clear()
    os.environ.update({"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "USER": "program",
                       "LOGNAME": "program", "PYTHONHASHSEED": "0", "PYTHONINTMAXSTRDIGITS": "0",
                       # numpy's default of a thread per core would exceed the limit of processes
                       "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"})
    os.umask(0o022)
    for name in ("exit", "quit"):  # defined by `site`, which the server does not import
        setattr(builtins, name, _sitebuiltins.Quitter(name, "Ctrl-D (i.e. EOF)"))
    _create_streams()


def _create_streams() -> None:
    """Create `sys.stdin`, `sys.stdout` and `sys.stderr` on temporary pipes, because each stream checks the
    kind of its file."""
    pipe_ends, own_files = os.pipe(), [os.dup(fd) for fd in range(3)]
    for fd in range(3):
        os.dup2(pipe_ends[0] if fd == 0 else pipe_ends[1], fd)
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0)), encoding="utf-8")
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w")), encoding="utf-8")
    sys.stderr = io.TextIOWrapper(io.BufferedWriter(io.FileIO(2, "w")), encoding="utf-8",
                                  errors="backslashreplace", line_buffering=True)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]
    for fd in range(3):
        os.dup2(own_files[fd], fd)
    for fd in (*pipe_ends, *own_files):
        os.close(fd)


# The program's process.


def become_program(enclosure: Enclosure, files: Sequence[int]) -> NoReturn:
    """Enclose this process and run the program; the process exits with the program.

    Args:
        enclosure: enclosure for this process.
        files: pipes for standard input, output and error, for the message `READY` or an error, and for the
            job: a program with folder and limits, in JSON.
    """
    try:
        # a process group, by which all processes of the program can be killed
        os.setsid()
        _move_files(files)
        with open(_JOB_FD, "rb", buffering=0) as job_file:
            job = json.loads(job_file.readall())
        folder, limits = job["folder"], Limits(**job["limits"])
        # `restrict_process` last, because it forbids the steps before
        enclosure.drop_privileges(folder, limits)
        os.chdir(folder)
        for path, text in {**job["files"], FILE_NAME: job["source"]}.items():
            if "/" in path:
                os.makedirs(os.path.dirname(path), exist_ok=True)
            _write_file(path, text.encode())
        os.environ["HOME"] = os.environ["TMPDIR"] = folder
        _set_limits(limits)
        enclosure.restrict_process(folder, limits)
        # the program's time begins here
        os.write(_READY_FD, READY)
        os.close(_READY_FD)
    except BaseException as e:
        with contextlib.suppress(OSError):
            os.write(_READY_FD, f"{type(e).__name__}: {e}".encode(errors="replace")[:1000])
        os._exit(1)
    _execute_source(job["source"], f"{folder}/{FILE_NAME}")


def _move_files(files: Sequence[int]) -> None:
    """Move file descriptors to 0, 1, 2, ... and close all others."""
    high_fds = [os.dup2(fd, 100 + i) for i, fd in enumerate(files)]  # avoid the target numbers
    for i, fd in enumerate(high_fds):
        os.dup2(fd, i, inheritable=i < _READY_FD)
    # the program must not inherit files of the template
    sc.close_files_from(_NUM_FILES)


def _write_file(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        while data:
            data = data[os.write(fd, data):]
    finally:
        os.close(fd)


def _set_limits(limits: Limits) -> None:
    set_limit(resource.RLIMIT_CPU, math.ceil(limits.cpu_s))
    set_limit(resource.RLIMIT_AS, limits.memory_bytes)
    set_limit(resource.RLIMIT_FSIZE, limits.file_bytes)
    set_limit(resource.RLIMIT_NOFILE, limits.files)
    set_limit(resource.RLIMIT_CORE, 0)


def _execute_source(source: str, path: str) -> NoReturn:
    """Execute a source as the main module of this interpreter, like `python program.py`."""
    sys.argv = [os.path.basename(path)]
    sys.path[0:0] = [os.path.dirname(path)]
    # a new module, without the names of this module
    main_module = types.ModuleType("__main__")
    main_module.__dict__.update(__file__=path, __builtins__=builtins)
    sys.modules["__main__"] = main_module
    # print integers of any length; `RLIMIT_CPU` limits the time
    sys.set_int_max_str_digits(0)
    if not os.path.exists("/dev/stdin"):  # a link through /proc, which namespaces hide
        builtins.open = io.open = _open_stream
    gc.enable()
    code = _compute_exit_code(lambda: exec(compile(source, path, "exec", dont_inherit=True),
                                           main_module.__dict__))
    # like an interpreter's exit: wait for non-daemon threads, run exit functions, flush streams
    codes = [code, _compute_exit_code(threading._shutdown),  # type: ignore[attr-defined]
             _compute_exit_code(atexit._run_exitfuncs), _compute_exit_code(lambda: _flush_stream(sys.stdout)),
             _compute_exit_code(lambda: _flush_stream(sys.stderr))]
    os._exit(next((code for code in codes if code), 0))


def _open_stream(file: Any, *arguments: Any, _open: Any = open, **options: Any) -> Any:
    """Open a file like `open`; paths in `STREAMS` are duplicates of open files."""
    stream = STREAMS.get(os.fspath(file)) if isinstance(file, str | os.PathLike) else None
    return _open(file if stream is None else os.dup(stream), *arguments, **options)


def _flush_stream(stream: TextIO) -> None:
    if not stream.closed:
        stream.flush()


def _compute_exit_code(function: Callable[[], object]) -> int:
    """Call a function and return an interpreter's exit code; print an exception like an interpreter."""
    try:
        function()
    except SystemExit as e:
        if e.code is None:
            return 0
        if isinstance(e.code, int):
            code = int.__index__(e.code)  # a subclass may override other methods
            # The kernel truncates exit codes to 8 bits, but 256 must not become 0. CPython turns numbers
            # outside a C long into -1.
            if not -2 ** 63 <= code < 2 ** 63:
                return 255
            return code & 0xFF or (255 if code else 0)
        with contextlib.suppress(BaseException):
            print(e.code, file=sys.stderr)
        return 1
    except BaseException as e:
        with contextlib.suppress(BaseException):
            traceback.print_exception(type(e), e, _remove_own_frames(e.__traceback__))
        return 1
    return 0


def _remove_own_frames(trace: types.TracebackType | None) -> types.TracebackType | None:
    """Remove frames of this module from a traceback: at the beginning, and of `_open_stream`."""
    while trace and trace.tb_frame.f_code.co_filename == _compute_exit_code.__code__.co_filename:
        trace = trace.tb_next
    frame = trace
    while frame and frame.tb_next:
        if frame.tb_next.tb_frame.f_code is _open_stream.__code__:
            frame.tb_next = frame.tb_next.tb_next
        frame = frame.tb_next
    return trace
