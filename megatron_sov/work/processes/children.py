"""Child processes: environment, memory limit, JSON channel, and termination with the parent.

A child is an interpreter, a fork of the server in `processes.workers`, or a command. Messages are JSON
(`processes.channel`), never pickles. No torch here.
"""

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
from typing import IO, Any

from megatron_sov.base.errors import ExitCode, stop_check

SAFE_VARIABLES = frozenset((
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "PWD", "TMPDIR", "TEMP", "TMP", "TZ", "TERM", "LANG",
    "LANGUAGE", "LD_LIBRARY_PATH", "LD_PRELOAD", "VIRTUAL_ENV", "CONDA_PREFIX",
    "TOKENIZERS_PARALLELISM", "NLTK_DATA", "SSL_CERT_FILE", "SSL_CERT_DIR", "no_proxy", "NO_PROXY",
    "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "TRANSFORMERS_CACHE"))
"""Environment variables kept in processes for untrusted model outputs: no API keys."""
SAFE_VARIABLE_PREFIXES = ("LC_", "PYTHON", "XDG_", "OMP_", "MKL_", "OPENBLAS_", "KMP_", "CUDA_", "CUBLAS_",
                          "TORCH_", "TRITON_", "COVERAGE_", "COV_CORE_")
"""Prefixes of further allowed variables."""
FOREIGN_VARIABLES = ("HOME", "LOGNAME", "PATH", "SHELL", "TERM", "USER")
"""Variables passed to third-party programs."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals with the meaning "save and stop", forwarded to ranks. Slurm sends SIGUSR1 before the time limit."""
MAX_MEMORY_BYTES = 4 << 30
"""Default limit of address space."""
_PR_SET_PDEATHSIG = 1


def foreign_environment(more: Iterable[str] = ()) -> dict[str, str]:
    """Return the environment for a third-party program.

    Args:
        more: further variable names from the settings.
    """
    # skip values that an old shell would execute as functions; names in `more` are passed anyway
    names = [name for name in FOREIGN_VARIABLES if not os.environ.get(name, "").startswith("()")]
    return {name: os.environ[name] for name in (*names, *more) if name in os.environ}


def remove_unsafe_variables(more: Iterable[str] = ()) -> None:
    """Delete variables from `os.environ` except `SAFE_VARIABLES` and `SAFE_VARIABLE_PREFIXES`.

    Args:
        more: further variable names to keep, from the reward.
    """
    allowed = SAFE_VARIABLES.union(more)
    for name in [*os.environ]:
        if name not in allowed and not name.startswith(SAFE_VARIABLE_PREFIXES):
            del os.environ[name]


def die_with_parent(parent: int) -> None:
    """Let Linux kill the process when the parent dies (PR_SET_PDEATHSIG)."""
    set_parent_death_signal()
    # if the parent died before prctl took effect, no signal comes
    if sys.platform == "linux" and os.getppid() != parent:
        os._exit(ExitCode.CRASH)


def set_parent_death_signal() -> None:
    """Call PR_SET_PDEATHSIG in a fork whose parent is known to be alive."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def limit_memory(limit_bytes: int = MAX_MEMORY_BYTES) -> None:
    """Limit the address space (RLIMIT_AS), unless the hard limit is lower; 0 sets no limit."""
    hard_bytes = resource.getrlimit(resource.RLIMIT_AS)[1]
    if limit_bytes and (hard_bytes == resource.RLIM_INFINITY or hard_bytes > limit_bytes):
        resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, hard_bytes))


class Child:
    """A child process connected by a socket; ended when the `Child` is garbage collected."""

    def __init__(self, channel: socket.socket, kill: Callable[[], None],
                 wait: Callable[[float | None], int | None], patience_s: float = 0.0) -> None:
        """Take ownership of a started process.

        Args:
            channel: this end of the socket.
            kill: kills the process.
            wait: waits some seconds and returns the exit code (negative: signal), or None while running.
            patience_s: grace period after closing the channel, in which the process may clean up.
        """
        self.channel, self._wait = channel, wait
        # finalize instead of __del__: it also runs at interpreter exit and references no attribute
        self._end = weakref.finalize(self, _end_child, channel, kill, wait, patience_s, os.getpid())

    def exit_code(self, within_s: float) -> int | None:
        """Return the exit code, or None after `within_s` seconds."""
        return self._wait(within_s)

    def end(self) -> None:
        self._end()


def _end_child(channel: socket.socket, kill: Callable[[], None], wait: Callable[[float | None], int | None],
               patience_s: float, owner: int) -> None:
    channel.close()
    if os.getpid() != owner:  # in a fork of the owner
        return
    if not patience_s or wait(patience_s) is None:
        with contextlib.suppress(ProcessLookupError):
            kill()
        wait(None)


def start_interpreter(command: Sequence[str], arguments: Sequence[str], variables: Mapping[str, str], *,
                      errors: IO[bytes] | int = subprocess.DEVNULL, patience_s: float = 0.0) -> Child:
    """Start an interpreter connected by a socket, whose file descriptor is the first argument.

    Args:
        command: interpreter and script.
        arguments: arguments after the socket number.
        variables: environment, in addition to a minimal one.
        errors: destination of standard error.
        patience_s: see `Child`.
    """
    stop_check()
    ours, theirs = socket.socketpair()
    # inherit only the library path, so that API keys stay in this process
    environment = {"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONUTF8": "1", **variables,
                   **{name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}}
    with theirs:
        process = subprocess.Popen(
            [*command, str(theirs.fileno()), *arguments], env=environment, cwd="/",
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, pass_fds=[theirs.fileno()],
            start_new_session=True)
    return Child(ours, process.kill, partial(_wait_for_exit, process), patience_s)


def _wait_for_exit(process: subprocess.Popen[bytes], within_s: float | None) -> int | None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(within_s)
    return process.returncode


def start_command(command: Sequence[str], *, stdin: int | None = subprocess.DEVNULL,
                  stdout: IO[Any] | None = None, stderr: IO[Any] | int | None = None,
                  environment: Mapping[str, str] | None = None, ends_with_this: bool = False,
                  own_group: bool = False) -> subprocess.Popen[Any]:
    """Start a command.

    Args:
        command: program and arguments.
        stdin: standard input; None: inherited.
        stdout: standard output; None: inherited.
        stderr: standard error; None: inherited.
        environment: environment; None: inherited.
        ends_with_this: kill the command when this process ends.
        own_group: detach from the terminal's Ctrl-C.

    Raises:
        OSError: the command cannot be started.
    """
    stop_check()
    return subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr, env=environment,
                            start_new_session=own_group,
                            preexec_fn=partial(die_with_parent, os.getpid()) if ends_with_this else None)


def end_commands(commands: Sequence[subprocess.Popen[Any]], wait_s: float) -> None:
    """Terminate commands, and kill those still running after `wait_s` seconds."""
    # send all signals first: the commands end in parallel
    for command in commands:
        command.terminate()
    deadline_s = time.monotonic() + wait_s
    for command in commands:
        with contextlib.suppress(subprocess.TimeoutExpired):
            command.wait(max(0.0, deadline_s - time.monotonic()))
        if command.poll() is None:
            command.kill()
            command.wait()


def run_command(argv: list[str], resume_hint: str) -> int:
    """Run `python -m ARGV`; return the exit code, or `ExitCode.STOPPED` after a stop signal.

    Stop signals are forwarded to the command, which saves its state; the command ends with this process.
    After a stop signal return STOPPED even if the command succeeded, so that no further command starts.

    Args:
        argv: module and arguments.
        resume_hint: hint on how to continue after a stop.
    """
    child = start_command([sys.executable, "-m", *argv], ends_with_this=True)
    stop_requested = False

    def forward(number: int, frame: Any) -> None:
        nonlocal stop_requested
        stop_requested = True
        if number != signal.SIGINT:  # a terminal sends SIGINT to both processes
            child.send_signal(number)

    # the command saves and ends; this process only waits
    previous = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
    try:
        code = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if stop_requested:
        print(f"stopped; {resume_hint}", file=sys.stderr, flush=True)
        return ExitCode.STOPPED
    return code if code >= 0 else 128 - code
