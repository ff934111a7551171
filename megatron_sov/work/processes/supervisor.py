"""Run a command and end the command with all descendants when the calling process ends.

A keeper process between the two adopts orphaned descendants (PR_SET_CHILD_SUBREAPER, prctl(2)), so neither
process groups, sessions nor daemons escape. The keeper is a separate program because a fork of a trainer
would retain the trainer's memory.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from megatron_sov.base.errors import stop_check
from megatron_sov.work.processes.children import start_command

NOT_STARTED = 127
"""Exit code for a missing program, as in a shell."""
_PR_SET_CHILD_SUBREAPER = 36
_ROOT = str(Path(__file__).parents[3])
# isolated, because the command's environment may name other modules in PYTHONPATH
_KEEPER = ("-I", "-S", "-c", "import sys; sys.path.append(sys.argv[1]); "
           f"from {__name__} import main; main()", _ROOT)
_LIBRARY_PATH = "LD_LIBRARY_PATH"
_RETRY_S = 0.005
_POLL_MS = 20


class SupervisedCommand:
    """A running command with descendants; ended when the `SupervisedCommand` is garbage collected."""

    stdin: IO[bytes]
    stdout: IO[bytes]
    """Pipes to the command, if `output` is None."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str],
                 output: IO[Any] | None) -> None:
        """Start the command.

        Args:
            command: program and arguments.
            environment: its environment.
            output: file for standard output and error; None: pipes, with standard error inherited.
        """
        stop_check()
        read_end, write_end = os.pipe()  # the keeper ends the command when this pipe closes
        self._wanted = os.fdopen(write_end, "wb", buffering=0)
        try:
            has_pipes = output is None
            # this Python may need a library path that a third-party program must not have
            library_path = os.environ.get(_LIBRARY_PATH, "")
            self._keeper = subprocess.Popen(
                [sys.executable, *_KEEPER, str(read_end), environment.get(_LIBRARY_PATH, ""), *command],
                stdin=subprocess.PIPE if has_pipes else subprocess.DEVNULL,
                stdout=subprocess.PIPE if has_pipes else output,
                stderr=None if has_pipes else subprocess.STDOUT, pass_fds=[read_end],
                start_new_session=True, env={**environment, _LIBRARY_PATH: library_path})
        finally:
            os.close(read_end)
        if self._keeper.stdin is not None and self._keeper.stdout is not None:
            self.stdin, self.stdout = self._keeper.stdin, self._keeper.stdout

    @property
    def is_alive(self) -> bool:
        return self._keeper.poll() is None

    def end(self, patience_s: float = 0.0) -> None:
        """End all processes; SIGTERM first, SIGKILL after `patience_s` seconds."""
        if patience_s and self.is_alive:
            self._keeper.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._keeper.wait(patience_s)
        # write before closing: a fork of this process may hold the pipe open
        with contextlib.suppress(OSError, ValueError):
            self._wanted.write(b"\0")
        self._wanted.close()
        self._keeper.wait()
        for pipe in (self._keeper.stdin, self._keeper.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # unread input
                    pipe.close()


def kill_descendants() -> None:
    """Kill all descendants; PR_SET_CHILD_SUBREAPER turns orphans into children."""
    while children := _list_children():
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        time.sleep(_RETRY_S)


def _list_children() -> list[int]:
    """Reap ended children and return the living ones."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return [*map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())]


def _supervise_command(until: int, command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command until the exit or a message on `until`, then kill all descendants.

    Args:
        until: read end of a pipe that the owner writes to or closes.
        command: program and arguments.
        environment: its environment.

    Returns: the command's exit code.
    """
    os.set_inheritable(until, False)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    is_terminating = False

    def ask(number: int, frame: Any) -> None:
        nonlocal is_terminating
        is_terminating = True
        leader.terminate()

    try:
        leader = start_command(command, stdin=None, environment=environment, ends_with_this=True)
    except OSError as e:
        print(f"{command[0]}: {e.strerror}", file=sys.stderr)
        return NOT_STARTED
    signal.signal(signal.SIGTERM, ask)
    watched = select.poll()
    for fd in (until, os.pidfd_open(leader.pid)):
        watched.register(fd, select.POLLIN)
    watched.poll()
    code = leader.poll()
    if is_terminating and code is not None:
        # let children remove their shared memory
        watched = select.poll()
        watched.register(until, select.POLLIN)
        while _list_children() and not watched.poll(_POLL_MS):
            pass
    kill_descendants()
    if code is None:
        return 128 + signal.SIGKILL
    return code if code >= 0 else 128 - code  # a shell's code for a command that a signal ended


def main() -> None:
    """Run the keeper: arguments are the root folder, the pipe, and the command after its library path."""
    _, _, until, library_path, *command = sys.argv
    environment = {name: value for name, value in os.environ.items() if name != _LIBRARY_PATH}
    if library_path:
        environment[_LIBRARY_PATH] = library_path
    sys.exit(_supervise_command(int(until), command, environment))
