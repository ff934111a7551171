"""Child processes: how they end with their parent, what they may take, what they get of the environment, and
how they are talked to.

A child has a socket to this process, for messages of JSON (`processes.channel`): nothing that it sends is
ever unpickled.  It is an interpreter of its own, a fork of a small server (`processes.workers`), or a
command.  No torch here.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from megatron_sov.base.errors import ExitCode

KEPT_VARIABLES = frozenset((
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "PWD", "TMPDIR", "TEMP", "TMP", "TZ", "TERM", "LANG",
    "LANGUAGE", "LD_LIBRARY_PATH", "LD_PRELOAD", "VIRTUAL_ENV", "CONDA_PREFIX",
    "TOKENIZERS_PARALLELISM", "NLTK_DATA", "SSL_CERT_FILE", "SSL_CERT_DIR", "no_proxy", "NO_PROXY",
    "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "TRANSFORMERS_CACHE"))
"""Names of variables that processes keep which judge or run what a model wrote: what they need to run, and no
key of the user's.  What a verifier does not know it cannot give away."""
BEGINNINGS_OF_VARIABLES = ("LC_", "PYTHON", "XDG_", "OMP_", "MKL_", "OPENBLAS_", "KMP_", "CUDA_", "CUBLAS_",
                           "TORCH_", "TRITON_", "COVERAGE_", "COV_CORE_")
"""Beginnings of names."""
VARIABLES_OF_FOREIGN = ("HOME", "LOGNAME", "PATH", "SHELL", "TERM", "USER")
"""Variables of ours that a foreign program gets."""


def variables_for_foreign(more: Iterable[str] = ()) -> dict[str, str]:
    """Return the environment that a foreign program is started with.

    Args:
        more: names that the settings give it besides.
    """
    # what an old shell would run as a function is passed on only where it is asked for by name
    kept = [name for name in VARIABLES_OF_FOREIGN if not os.environ.get(name, "").startswith("()")]
    return {name: os.environ[name] for name in (*kept, *more) if name in os.environ}


def forget_other_variables(more: Iterable[str] = ()) -> None:
    """Remove every variable of this process's environment that is not kept.

    Args:
        more: names that the reward asks for.
    """
    kept = KEPT_VARIABLES.union(more)
    for name in [*os.environ]:
        if name not in kept and not name.startswith(BEGINNINGS_OF_VARIABLES):
            del os.environ[name]


FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals that ask for a stop; the launcher passes them on to its ranks.  SIGUSR1 is what Slurm is asked to
send before the time limit."""
MAX_MEMORY_BYTES = 4 << 30
"""Of address space, for a process that works with what names no `MAX_MEMORY_BYTES` of its own."""
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Ask Linux to kill this process when its parent dies, so that a killed run leaves none behind."""
    be_killed_with_parent()
    # the parent may have died before prctl took effect; then no signal ever comes
    if sys.platform == "linux" and os.getppid() != parent:
        os._exit(ExitCode.CRASH)


def be_killed_with_parent() -> None:
    """Ask Linux for that of a fork whose parent is alive."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def limit_memory(limit_bytes: int = MAX_MEMORY_BYTES) -> None:
    """Let this process ask for no more memory than that, where a limit of the machine's is not lower; 0: no
    limit."""
    hard_bytes = resource.getrlimit(resource.RLIMIT_AS)[1]
    if limit_bytes and (hard_bytes == resource.RLIM_INFINITY or hard_bytes > limit_bytes):
        resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, hard_bytes))


class Child:
    """A process at the other end of a socket, which ends at the latest when nobody has this any more."""

    def __init__(self, channel: socket.socket, kill: Callable[[], None],
                 wait: Callable[[float | None], int | None], patience_s: float = 0.0) -> None:
        """Take it over.

        Args:
            channel: this end.
            kill: ends it.
            wait: returns its exit code, or minus its signal; None: it has not ended in so many seconds.
            patience_s: in which it may end by itself, and remove what it made, when its channel is closed.
        """
        self.channel, self._wait = channel, wait
        # not __del__: it also runs when the interpreter ends, and holds nothing of this object
        self._end = weakref.finalize(self, _end, channel, kill, wait, patience_s, os.getpid())

    def exit_code(self, within_s: float) -> int | None:
        """Return how it has ended, for which it may still need a processor; None: it has not."""
        return self._wait(within_s)

    def end(self) -> None:
        self._end()


def _end(channel: socket.socket, kill: Callable[[], None], wait: Callable[[float | None], int | None],
         patience_s: float, owner: int) -> None:
    channel.close()
    if os.getpid() != owner:  # a fork of the process that started it
        return
    if not patience_s or wait(patience_s) is None:
        with contextlib.suppress(ProcessLookupError):
            kill()
        wait(None)


def start_interpreter(command: Sequence[str], arguments: Sequence[str], variables: Mapping[str, str], *,
                      errors: IO[bytes] | int = subprocess.DEVNULL, patience_s: float = 0.0) -> Child:
    """Start a program with nothing but a socket, whose number is its first argument.

    Args:
        command: an interpreter and what it runs.
        arguments: behind the socket's number.
        variables: of its environment, beside the few that every program needs.
        errors: where it writes what goes wrong.
        patience_s: see `Child`.
    """
    ours, theirs = socket.socketpair()
    # nothing of this process's environment but the libraries' path: keys stay here
    environment = {"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONUTF8": "1", **variables,
                   **{name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}}
    with theirs:
        process = subprocess.Popen(
            [*command, str(theirs.fileno()), *arguments], env=environment, cwd="/",
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, pass_fds=[theirs.fileno()],
            start_new_session=True)
    return Child(ours, process.kill, partial(_waited, process), patience_s)


def _waited(process: subprocess.Popen[bytes], within_s: float | None) -> int | None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(within_s)
    return process.returncode


def start_command(command: Sequence[str], *, stdout: IO[Any] | None = None,
                  stderr: IO[Any] | int | None = None, environment: Mapping[str, str] | None = None,
                  folder: Path | None = None, ends_with_this: bool = False,
                  own_group: bool = False) -> subprocess.Popen[Any]:
    """Start a command that reads nothing.

    Args:
        command: program and arguments.
        stdout: where it writes; None: where this process does.
        stderr: likewise.
        environment: its own; None: this process's.
        folder: where it stands; None: where this process does.
        ends_with_this: it is killed when this process ends.
        own_group: Ctrl-C of a terminal is not for it.

    Raises:
        OSError: it cannot be started.
    """
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env=environment,
                            cwd=folder, start_new_session=own_group,
                            preexec_fn=partial(die_with_parent, os.getpid()) if ends_with_this else None)


def end_commands(commands: Sequence[subprocess.Popen[Any]], wait_s: float) -> None:
    """Ask commands to end, and kill those that have not after that many seconds."""
    # all are asked before any is waited for: they end at the same time
    for command in commands:
        command.terminate()
    deadline_s = time.monotonic() + wait_s
    for command in commands:
        with contextlib.suppress(subprocess.TimeoutExpired):
            command.wait(max(0.0, deadline_s - time.monotonic()))
        if command.poll() is None:
            command.kill()
            command.wait()


def run_command(argv: list[str], go_on_by: str) -> int:
    """Run `python -m ARGV` to its end and return its exit code, or that of a stop where this process was
    asked for one meanwhile: a command that was just ending may end well, and the next one must not begin.

    A signal that asks this process for a stop reaches the command, which saves everything; the command ends
    with this process.

    Args:
        argv: a module and its arguments.
        go_on_by: what a user does to go on after a stop.
    """
    child = start_command([sys.executable, "-m", *argv], ends_with_this=True)
    asked_to_stop = False

    def forward(number: int, frame: Any) -> None:
        nonlocal asked_to_stop
        asked_to_stop = True
        if number != signal.SIGINT:  # which a terminal sends to both
            child.send_signal(number)

    # the command saves and ends; this process only notes that it has to stop, and waits
    previous = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        code = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if asked_to_stop:
        print(f"stopped; {go_on_by}", file=sys.stderr, flush=True)
        return ExitCode.STOPPED
    return code if code >= 0 else 128 - code
