"""What a forked process does on its way to being the program."""

from __future__ import annotations

import _sitebuiltins
import atexit
import builtins
import contextlib
import gc
import io
import json
import math
import os
import resource
import signal
import sys
import threading
import traceback
import types
from collections.abc import Sequence
from typing import Any, NoReturn, TextIO

from megatron_sov.sandbox import system_calls as sc
from megatron_sov.sandbox.enclosures import Enclosure
from megatron_sov.sandbox.program import Limits
from megatron_sov.sandbox.restrictions import limit

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
                       "LOGNAME": "program", "PYTHONHASHSEED": "0"})
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
