"""An enclosure of the user's own: a command that runs programs in gVisor, bubblewrap, a container."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence

from megatron_sov.work.sandbox.folders import remove
from megatron_sov.work.sandbox.program import Limits, Outcome, Program
from megatron_sov.work.sandbox.supervise import Ends, Subject, supervise
from megatron_sov.work.watch import Watch

PYTHON = ("python3", "{file}")
FILE_NAME = "program.py"


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
                                       "TMPDIR": folder, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"})
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

    watch = Watch(process.pid)
    try:
        return supervise(Subject(process.pid, Ends(feed, out_read, error_read), given, limits, kill=kill,
                                 wait=wait, totals=watch.totals))
    finally:
        process.returncode = 0  # it has been waited for
        watch.close()
