"""Launches local ranks: start, signal forwarding, restart after faults, exit codes."""

import contextlib
import gc
import io
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import cloudpickle
import numpy as np
import torch
import torch.distributed as dist

from megatron_sov.base.errors import ExitCode, SilentCorruption, UserError, first_error_line, to_exit_code
from megatron_sov.base.plugins.loading import execute_files, list_executed_files
from megatron_sov.base.settings import count_cores
from megatron_sov.engine.parallel.device import on_gpu
from megatron_sov.engine.parallel.world import LOCALHOST, STORE_PORT
from megatron_sov.model.families import supported as models
from megatron_sov.runs.launch_environment import has_launcher, is_first_rank, num_ranks
from megatron_sov.work.processes.children import STOP_SIGNALS, die_with_parent

FINAL_CODES = (ExitCode.OK, ExitCode.USER_ERROR, ExitCode.STOPPED)
"""Exit codes without restart: complete, user error, stopped with everything saved."""
SAME_INTERRUPT_S = 0.5
"""Two SIGINT within this interval count as a single Ctrl-C."""
_NEW_PROCESS = f"""import sys
sys.path[:] = sys.argv[2:]
from {__name__} import be_rank
be_rank(int(sys.argv[1]))"""


def launch_ranks(main: Callable[[], Any], nproc: int | None, num_threads: int = 0,
                 restarts: "RestartPolicy | None" = None) -> int:
    """Run `main` in every process and return the command's exit code.

    Under torchrun or Slurm (RANK is set) this process is one rank. Otherwise it starts `nproc` local ranks.
    On CPUs these are forks after the heavy imports, which share memory and start at once. On GPUs they are
    new processes that read `main` from a plan file, because a forked process cannot use CUDA. SIGTERM, SIGINT
    and SIGUSR1 are forwarded to every rank; ranks finish their step and save together. A second SIGINT kills
    all ranks. A failing rank ends the others.

    Args:
        main: runs one rank; its integer result is the exit code.
        nproc: number of local ranks.
        num_threads: CPU threads per rank. 0: OMP_NUM_THREADS (set by torchrun and our Slurm scripts), else
            cores / local ranks.
        restarts: restart policy for faults other than user errors. None: no restarts.

    Returns:
        0, or 2 if any rank met a user error, or the first nonzero exit code of a rank.

    Raises:
        KeyboardInterrupt: after a second SIGINT, or after one before the ranks handled signals.
    """
    if has_launcher():
        if num_threads:
            torch.set_num_threads(num_threads)
        return _run_rank(lambda: main)
    count = num_ranks(nproc)
    torch.set_num_threads(num_threads or _count_threads(count))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    failures, last_progress = 0, restarts.progress() if restarts else None
    while True:
        outcome = _run_round(main, count, new_processes=on_gpu())
        if outcome.code == ExitCode.INTERRUPTED:
            raise KeyboardInterrupt
        if restarts is None or outcome.stop_requested or outcome.code in FINAL_CODES:
            return outcome.code
        progress = restarts.progress()
        # progress resets the count of failures; a run that fails at the same place gives up
        failures, last_progress = 1 if progress != last_progress else failures + 1, progress
        if failures > restarts.limit:
            restarts.give_up(outcome.code, outcome.cause)
            return outcome.code
        restarts.note(outcome.code, outcome.cause)


@dataclass(frozen=True)
class RestartPolicy:
    """Restart policy for local ranks after a fault, for `launch_ranks`."""

    limit: int
    """Maximum consecutive restarts without progress."""
    progress: Callable[[], Any]
    """Returns a value that changes when the run progresses."""
    note: Callable[[int, str], None]
    """Called before each restart with exit code and cause."""
    give_up: Callable[[int, str], None]
    """Called instead of `note` after too many restarts."""


def run_in_fork(work: Callable[[], Any]) -> int:
    """Run `work` in a forked process, without ranks or GPU, and return its exit code. A fork, because threads
    that torch starts in this process would be missing in ranks that are forked later.

    Under torchrun or Slurm this process runs it itself."""
    def run() -> None:
        work()  # its result is no exit code

    return _run_rank(lambda: run) if has_launcher() else _run_round(run, 1, new_processes=False).code


def _count_threads(count: int) -> int:
    """Return the CPU threads per rank: OMP_NUM_THREADS if valid, else cores / ranks."""
    setting = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # first nesting level
    if setting.isdecimal() and len(setting) <= 4 and int(setting):  # as OpenMP ignores other values
        return int(setting)
    return max(1, count_cores() // count)


@dataclass
class _Outcome:
    """How a round with local ranks ended."""

    code: int = 0
    """The first failing rank's exit code; a user error takes precedence."""
    cause: str = ""
    """First failing rank and its end."""
    stop_requested: bool = False
    """Whether the launcher received a signal to stop."""
    was_killed: bool = False
    """Whether a second SIGINT made the launcher kill the ranks."""


def _run_round(main: Callable[[], Any], count: int, *, new_processes: bool) -> _Outcome:
    """Start `count` ranks and wait for their end.

    Args:
        main: runs one rank.
        count: number of ranks.
        new_processes: start new processes instead of forks.
    """
    gc.freeze()  # otherwise garbage collection would touch, and copy, shared pages
    launcher = os.getpid()
    listener = socket.create_server((LOCALHOST, 0), backlog=count)
    port = listener.getsockname()[1]
    environment = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), STORE_PORT: str(port)}
    children: list[int] = []
    plan_file = write_plan_file(main, torch.get_num_threads()) if new_processes else contextlib.nullcontext()
    with plan_file as plan:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # until `_wait_for_ranks` forwards them
        sys.stdout.flush()
        sys.stderr.flush()
        for rank in range(count):
            child = os.fork()
            if child == 0:
                own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                _run_and_exit(partial(_prepare_fork, main, launcher, listener, own, plan))
            children.append(child)
    # The launcher holds the store in memory: it survives every rank and does not depend on disk space. Its
    # thread starts after the last fork: a rank forked while the thread holds a lock of the C library would
    # wait forever.
    store = dist.TCPStore(LOCALHOST, port, is_master=True, wait_for_workers=False,
                          master_listen_fd=listener.detach())
    outcome = _wait_for_ranks(children)
    del store  # keep it alive until all ranks have ended
    return outcome


def _prepare_fork(main: Callable[[], Any], launcher: int, listener: socket.socket,
                  environment: dict[str, str], plan: int | None) -> Callable[[], Any]:
    """Turn a forked process into a rank, and return the rank's work. With a plan file, replace the process by
    a new process instead, see `be_rank`."""
    die_with_parent(launcher)
    listener.close()  # belongs to the launcher
    os.environ.update(environment)
    if plan is not None:  # the new process stays bound to its parent; signals wait until work begins
        _become_new_process(plan)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    return main


def _become_new_process(plan: int) -> NoReturn:
    """Replace this forked process by a new interpreter that runs the plan."""
    os.set_inheritable(plan, True)
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    # -P: do not import modules from the working directory, unless the launcher's sys.path contains it
    os.execv(sys.executable, [sys.executable, *flags, "-P", "-c", _NEW_PROCESS, str(plan), *sys.path])


def be_rank(plan: int) -> NoReturn:
    """Run the work from `read_plan` as a rank, and exit.

    Args:
        plan: descriptor of the plan file.
    """
    def prepare() -> Callable[[], Any]:
        main = read_plan(plan)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return main

    _run_and_exit(prepare)


def _run_and_exit(prepare: Callable[[], Callable[[], Any]]) -> NoReturn:
    """Run the rank whose work `prepare` returns, and exit with the rank's `ExitCode`."""
    code: int = ExitCode.CRASH
    try:
        code = _run_rank(prepare)
    except KeyboardInterrupt:  # before the rank handled signals
        code = ExitCode.INTERRUPTED
    except BaseException:
        if not dist.is_initialized() or _fails_first():
            traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run_rank(prepare: Callable[[], Callable[[], Any]]) -> int:
    """Run the work that `prepare` returns, and return its exit code; the first failing rank prints why."""
    try:
        main = prepare()
        return to_exit_code(main())
    except (UserError, SilentCorruption) as e:
        if _fails_first():
            # a single write: lines from other ranks cannot interleave
            print(f"error: {e}\n", end="", file=sys.stderr, flush=True)
        return ExitCode.USER_ERROR if isinstance(e, UserError) else ExitCode.CORRUPTION
    except (MemoryError, RuntimeError) as e:
        if not is_out_of_memory(e):
            raise
        if _fails_first():
            reason = first_error_line(e)
            print(f"error: rank {os.environ['RANK']} is out of memory ({reason}); lower "
                  "train.micro_batch_size, set train.recompute=true, or split the model over more processes "
                  "(parallel.*); `megatron-sov plan` tells what a layout needs\n", end="", file=sys.stderr,
                  flush=True)
        return ExitCode.CRASH


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that host or GPU memory was exhausted."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _fails_first() -> bool:
    """Return whether this rank failed first; the others only lose connections or repeat the error."""
    if not dist.is_initialized():
        return is_first_rank()
    try:
        return bool(dist.distributed_c10d._get_default_store().add("failed_ranks", 1) == 1)
    except RuntimeError:  # the rank that held the store is gone
        return True


def _wait_for_ranks(children: list[int]) -> _Outcome:
    """Wait for all ranks and forward signals; 10 s after the first failure, kill the others."""
    alive, deadline, killed, outcome = set(children), float("inf"), "", _Outcome()
    interrupted_s = float("inf")

    def forward(number: int, frame: Any) -> None:
        nonlocal interrupted_s
        if number == signal.SIGINT:
            # a wrapper may forward a Ctrl-C that the terminal has sent to both processes
            if time.monotonic() - interrupted_s > SAME_INTERRUPT_S:
                outcome.was_killed = True
                _send_signal(list(alive), signal.SIGKILL)  # checkpoints are atomic
                return
            interrupted_s = min(interrupted_s, time.monotonic())
        outcome.stop_requested = True
        _send_signal(list(alive), number)

    previous = {s: signal.signal(s, forward) for s in STOP_SIGNALS}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        while alive:
            child, status = os.waitpid(-1, os.WNOHANG)
            if child == 0:
                if time.monotonic() > deadline:
                    _send_signal(list(alive), signal.SIGKILL)
                time.sleep(0.02)
                continue
            if child in alive:
                alive.discard(child)
                ended = os.waitstatus_to_exitcode(status)
                # a user error takes precedence over ranks that lose their peer
                if ended == ExitCode.USER_ERROR or (ended != 0 and outcome.code == 0):
                    how = f"ended with exit code {ended}"
                    if ended < 0:
                        how = killed = f"was ended by {signal.Signals(-ended).name}"
                    outcome.cause = f"rank {children.index(child)} {how}"
                    outcome.code = ended if ended > 0 else 128 - ended
                    deadline = time.monotonic() + 10
        if outcome.was_killed:
            outcome.code = ExitCode.INTERRUPTED
        # after a user error, ranks die because a peer is gone
        elif killed and outcome.code != ExitCode.USER_ERROR:
            print(f"error: {outcome.cause}; if nobody sent it, look for a lack of memory\n", end="",
                  file=sys.stderr, flush=True)
        return outcome
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _send_signal(children: list[int], number: int) -> None:
    for child in children:
        try:
            os.kill(child, number)
        except ProcessLookupError:
            continue


@contextlib.contextmanager
def write_plan_file(work: Callable[[], Any], num_threads: int) -> Iterator[int]:
    """Yield the descriptor for a file from which new processes read work.

    The file has no name and is open only in the launcher and the ranks, so no foreign process can have
    written the pickle.

    Args:
        work: runs one rank. The pickle contains its references; modules by name, users' files by path and
            hash.
        num_threads: CPU threads per rank.
    """
    with tempfile.TemporaryFile() as file:
        # first the part that makes the pickle importable
        pickle.dump((num_threads, list_executed_files(), models.FAMILY_PLUGINS.named()), file)
        _Pickler(file).dump(work)
        file.flush()
        yield file.fileno()


class _Pickler(cloudpickle.Pickler):
    """Pickler that refuses memory-mapped arrays, which every rank would copy into memory."""

    def reducer_override(self, obj: Any) -> Any:
        base = obj
        while isinstance(base, (np.ndarray, memoryview)):
            base = base.base if isinstance(base, np.ndarray) else base.obj
        if isinstance(base, mmap.mmap):
            raise TypeError("an array is a map of a file: what holds it must say, in __reduce__, "
                            "how it is opened again")
        return super().reducer_override(obj)


def read_plan(descriptor: int) -> Callable[[], Any]:
    """Read the work from a plan file and prepare this process for it. Raises `UserError`: a user's file
    raises an error or has changed."""
    # all ranks share the file offset: use pread
    file = io.BytesIO(os.pread(descriptor, os.fstat(descriptor).st_size, 0))
    os.close(descriptor)
    num_threads, files, families = pickle.load(file)  # noqa: S301
    torch.set_num_threads(num_threads)
    execute_files(files)
    for reference in families:
        models.FAMILY_PLUGINS.load(reference)
    work: Callable[[], Any] = pickle.load(file)  # noqa: S301
    return work
