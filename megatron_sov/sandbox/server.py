"""The server of a sandbox: a small interpreter that has imported what programs often do, has its template
fork them, and stands beside them; and what a fork does on its way to being the program.

A fork has all memory of the process that it comes from, and memory that was freed there still holds what it
held. So the server, which sees sources, inputs and outputs, forks nothing: its template does, which hears of
a program no more than "fork" and "wait". What a program is made of comes to it through a pipe of its own.

It is started with a clean environment and imports nothing but the standard library and this room.
"""

from __future__ import annotations

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
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from typing import Any, NoReturn, TextIO

from megatron_sov.sandbox import system_calls as sc
from megatron_sov.sandbox.enclosures import Enclosure, EnclosureUnavailable, Landlocked, Namespaces
from megatron_sov.sandbox.program import Limits, Outcome
from megatron_sov.sandbox.restrictions import limit
from megatron_sov.sandbox.supervise import Ends, Gone, SupervisedProgram, supervise
from megatron_sov.work.processes.channel import receive_message, send_message

READY = b"."
"""What is told before the program begins; anything else is why it cannot."""
SOURCE_NAME = "program"
STREAMS = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
"""Paths of the standard streams -> their files."""
_TOLD, _JOB, NUM_FILES = 3, 4, 5


def be_as_programs() -> None:
    """Set, in the server, what its forks have from it: signals, environment, mode of new files, streams."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    # a fixed environment and hash seed: a program gives the same on every machine, and sees no key
    os.environ.clear()
    os.environ.update({"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "USER": "program",
                       "LOGNAME": "program", "PYTHONHASHSEED": "0", "PYTHONINTMAXSTRDIGITS": "0",
                       # numpy would start a thread per core, more than a program may have
                       "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"})
    os.umask(0o022)
    for name in ("exit", "quit"):  # of `site`, which the server leaves out, and programs have
        setattr(builtins, name, _sitebuiltins.Quitter(name, "Ctrl-D (i.e. EOF)"))
    _take_streams()


def _take_streams() -> None:
    """Make the three streams; each looks at its file once, which therefore is a pipe meanwhile."""
    ends, own = os.pipe(), [os.dup(fd) for fd in range(3)]
    for fd in range(3):
        os.dup2(ends[0] if fd == 0 else ends[1], fd)
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0)), encoding="utf-8")
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w")), encoding="utf-8")
    sys.stderr = io.TextIOWrapper(io.BufferedWriter(io.FileIO(2, "w")), encoding="utf-8",
                                  errors="backslashreplace", line_buffering=True)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]
    for fd in range(3):
        os.dup2(own[fd], fd)
    for fd in (*ends, *own):
        os.close(fd)


def become_program(enclosure: Enclosure, ends: Sequence[int]) -> NoReturn:
    """Enclose this process and be the program; never returns.

    Args:
        enclosure: where.
        ends: its standard input, output and error, where to tell that all is ready, and where to read what
            to be: the worker's job, with its folder and limits.
    """
    try:
        # a group of its own, by which all of its processes can be killed at once
        os.setsid()
        _take_files(ends)
        with open(_JOB, "rb", buffering=0) as given:
            request = json.loads(given.readall())
        folder, limits = request["folder"], Limits(**request["limits"])
        # enter first: making the folder needs privileges; lock last: it forbids what the steps before need
        enclosure.enter(folder, limits)
        os.chdir(folder)
        name = SOURCE_NAME + (".py" if request["command"] is None else "")
        for path, text in {**request["files"], name: request["source"]}.items():
            if "/" in path:
                os.makedirs(os.path.dirname(path), exist_ok=True)
            _write(path, text.encode())
        os.environ["HOME"] = os.environ["TMPDIR"] = folder
        _limit(limits)
        enclosure.lock(folder, limits)
        # from here on the clock of the program runs
        os.write(_TOLD, READY)
        os.close(_TOLD)
    except BaseException as e:
        with contextlib.suppress(OSError):
            os.write(_TOLD, f"{type(e).__name__}: {e}".encode(errors="replace")[:1000])
        os._exit(1)
    if request["command"] is None:
        _run_python(request["source"], f"{folder}/{name}", request["arguments"])
    _run_command([part.replace("{file}", name) for part in request["command"]] + request["arguments"])


def _take_files(ends: Sequence[int]) -> None:
    """Have these files as 0, 1, 2, ... and no others."""
    high = [os.dup2(fd, 100 + i) for i, fd in enumerate(ends)]  # none of them lies where another goes
    for i, fd in enumerate(high):
        os.dup2(fd, i, inheritable=i < _TOLD)
    # no file of the template is left open for the program
    sc.close_above(NUM_FILES)


def _write(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        while data:
            data = data[os.write(fd, data):]
    finally:
        os.close(fd)


def _limit(limits: Limits) -> None:
    limit(resource.RLIMIT_CPU, math.ceil(limits.cpu_s))
    limit(resource.RLIMIT_AS, limits.memory_bytes)
    limit(resource.RLIMIT_FSIZE, limits.file_bytes)
    limit(resource.RLIMIT_NOFILE, limits.files)
    limit(resource.RLIMIT_CORE, 0)


def _run_command(command: list[str]) -> NoReturn:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as e:
        os.write(2, f"{command[0]}: {e.strerror}\n".encode())
    os._exit(127)


def _run_python(source: str, path: str, arguments: list[str]) -> NoReturn:
    """Run a source as the main module of this interpreter, as `python program.py` would."""
    sys.argv = [os.path.basename(path), *arguments]
    sys.path[0:0] = [os.path.dirname(path)]
    # a fresh module: the program sees no name of ours
    main = types.ModuleType("__main__")
    main.__dict__.update(__file__=path, __builtins__=builtins)
    sys.modules["__main__"] = main
    # large results are printed whole: the time of a processor is limited anyway
    sys.set_int_max_str_digits(0)
    if not os.path.exists("/dev/stdin"):  # it leads through /proc, which namespaces hide
        builtins.open = io.open = _open
    gc.enable()
    code = _guarded(lambda: exec(compile(source, path, "exec", dont_inherit=True), main.__dict__))
    # non-daemon threads are waited for, then exit functions run, as at an interpreter's own end
    ends = [code, _guarded(threading._shutdown), _guarded(atexit._run_exitfuncs),  # type: ignore[attr-defined]
            _guarded(lambda: _flush(sys.stdout)), _guarded(lambda: _flush(sys.stderr))]
    os._exit(next((code for code in ends if code), 0))


def _open(file: Any, *given: Any, _open: Any = open, **named: Any) -> Any:
    """As `open`, to which the paths of the standard streams are open files."""
    stream = STREAMS.get(os.fspath(file)) if isinstance(file, str | os.PathLike) else None
    return _open(file if stream is None else os.dup(stream), *given, **named)


def _flush(stream: TextIO) -> None:
    if not stream.closed:
        stream.flush()


def _guarded(run: Any) -> int:
    """Return the exit code that a call ends with, its error shown as an interpreter would."""
    try:
        run()
    except SystemExit as e:
        if e.code is None:
            return 0
        if isinstance(e.code, int):
            code = int.__index__(e.code)  # of a class of its own, this alone is a number
            # the kernel keeps 8 bits, and 256 is no success; what no C has is -1, as for CPython
            return (code & 0xFF if -2 ** 63 <= code < 2 ** 63 else 0) or (255 if code else 0)
        with contextlib.suppress(BaseException):
            print(e.code, file=sys.stderr)
        return 1
    except BaseException as e:
        with contextlib.suppress(BaseException):
            trace = before = e.__traceback__
            # our own frames are taken out of the trace, at its begin and where `open` is replaced
            while trace and trace.tb_frame.f_code.co_filename in (__file__, _guarded.__code__.co_filename):
                trace = before = trace.tb_next
            while before and before.tb_next:
                if before.tb_next.tb_frame.f_code is _open.__code__:
                    before.tb_next = before.tb_next.tb_next
                before = before.tb_next
            traceback.print_exception(type(e), e, trace)
        return 1
    return 0


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


class PackageFinder:
    """Finds packages by their folders, without listing the folders around them, which programs may not read.

    Args:
        folders: name -> folder of a package.
    """

    def __init__(self, folders: Mapping[str, str]) -> None:
        self._folders = folders

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return where a package lies; None: it is no package of these."""
        folder = self._folders.get(name)
        return None if folder is None else importlib.util.spec_from_file_location(
            name, f"{folder}/__init__.py", submodule_search_locations=[folder])


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
        order = receive_message(channel)
        sys.meta_path.append(PackageFinder(order["packages"]))
        try:
            enclosure = _enclosure(order, channel)
        except EnclosureUnavailable as e:
            send_message(channel, {"unavailable": str(e)})
            return
        gc.collect()
        gc.freeze()  # the collector of a child would copy every page that it looks at
        gc.disable()
        template = Template(enclosure)
        send_message(channel, {"enclosure": enclosure.name})
        try:
            while True:
                send_message(channel, dataclasses.asdict(_run(enclosure, template, receive_message(channel),
                                                              channel)))
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
