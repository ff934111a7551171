"""Local ranks: starting them, passing signals on, starting them again after a fault, and how they end."""

from __future__ import annotations

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
from typing import Any, NoReturn

import cloudpickle
import numpy as np
import torch
import torch.distributed as dist

from megatron_sov.base.errors import ExitCode, SilentCorruption, UserError, first_line, to_exit_code
from megatron_sov.base.plugins.loading import files_that_ran, run_files
from megatron_sov.base.settings import num_cores
from megatron_sov.engine.parallel import cpu_shims
from megatron_sov.engine.parallel.device import on_gpu
from megatron_sov.engine.parallel.world import LOCALHOST, STORE_PORT
from megatron_sov.model.families import supported as models
from megatron_sov.runs.launch_environment import is_first, num_ranks, under_launcher
from megatron_sov.work.processes.children import FORWARDED, die_with_parent

# What a rank that is a new process is to do: its launcher writes it into a file, and the rank reads it.
#
# The file has no name and is open in the launcher and its ranks alone: nobody else can have written what is
# unpickled here.

@contextlib.contextmanager
def plan_file(work: Callable[[], Any], num_threads: int) -> Iterator[int]:
    """Give a file, by its descriptor, from which any number of new processes can read their work.

    Args:
        work: runs one rank, with all that it refers to; of the modules that it needs the names alone are
            written, and of users' own files their paths and hashes.
        num_threads: CPU threads of each rank.
    """
    with tempfile.TemporaryFile() as file:
        # what the rest is found by goes first
        pickle.dump((num_threads, files_that_ran(), models.OWN.named()), file)
        _Pickler(file).dump(work)
        file.flush()
        yield file.fileno()


class _Pickler(cloudpickle.Pickler):
    """Refuses an array that is a map of a file, of which each rank would hold a copy in memory."""

    def reducer_override(self, obj: Any) -> Any:
        held = obj
        while isinstance(held, (np.ndarray, memoryview)):
            held = held.base if isinstance(held, np.ndarray) else held.obj
        if isinstance(held, mmap.mmap):
            raise TypeError("an array is a map of a file: what holds it must say, in __reduce__, "
                            "how it is opened again")
        return super().reducer_override(obj)


def read_plan(descriptor: int) -> Callable[[], Any]:
    """Return the work of a plan, and prepare this process for it.

    Raises:
        UserError: a user's file fails, or is not what it was.
    """
    # all ranks share the place in the file, so none may move it
    file = io.BytesIO(os.pread(descriptor, os.fstat(descriptor).st_size, 0))
    os.close(descriptor)
    num_threads, files, families = pickle.load(file)  # noqa: S301
    torch.set_num_threads(num_threads)
    cpu_shims.prepare_megatron()
    run_files(files)
    for reference in families:
        models.OWN.load(reference)
    work: Callable[[], Any] = pickle.load(file)  # noqa: S301
    return work


FINAL = (ExitCode.OK, ExitCode.USER_ERROR, ExitCode.STOPPED)
"""Exit codes of ranks after which a restart would change nothing: done, a user's mistake,
stopped in good order."""
SAME_INTERRUPT_S = 0.5
"""Two SIGINT within so many seconds are one Ctrl-C."""
_NEW_PROCESS = f"""import sys
sys.path[:] = sys.argv[2:]
from {__name__} import be_rank
be_rank(int(sys.argv[1]))"""


@dataclass(frozen=True)
class Restarts:
    """Whether the launcher of local ranks starts them again after a fault."""

    limit: int
    """How often, without progress in between."""
    progress: Callable[[], Any]
    """Returns something that changes when the run has got on."""
    note: Callable[[int, str], None]
    """Called before each restart with the exit code and what failed."""
    give_up: Callable[[int, str], None]
    """Called in place of `note` when there were too many."""


def launch(main: Callable[[], Any], nproc: int | None, num_threads: int = 0,
           restarts: Restarts | None = None) -> int:
    """Run `main` in every process of the run and return the command's exit code.

    Under torchrun or Slurm (RANK is set) this process is one rank.  Otherwise `nproc` ranks are started here.
    On CPUs they are forked from this process after the heavy imports, so they share memory and start at once.
    On GPUs they are new processes that read `main` from a file (`rank_plan`), for CUDA works in no fork of a
    process that has asked for it.  SIGTERM, SIGINT and SIGUSR1 reach every rank, which finish their step and
    save together; a second SIGINT kills all ranks; a rank that fails ends the others.

    Args:
        main: runs one rank; its integer return value is the exit code.
        nproc: local processes.
        num_threads: CPU threads of each rank; 0: as OMP_NUM_THREADS says, which torchrun and our Slurm
            scripts set, else cores / local ranks.
        restarts: how local ranks are started again when one of them fails for another reason than a user's
            mistake.

    Returns:
        0, or 2 where a rank met a user's mistake, or the first nonzero exit code of any rank.

    Raises:
        KeyboardInterrupt: of a second SIGINT, or of one before a rank could remember it.
    """
    cpu_shims.prepare_megatron()
    if under_launcher():
        if num_threads:
            torch.set_num_threads(num_threads)
        return _rank_code(main)
    count = num_ranks(nproc)
    torch.set_num_threads(num_threads or _threads(count))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    failures, reached = 0, restarts.progress() if restarts else None
    while True:
        outcome = _round(main, count, new_processes=on_gpu())
        if outcome.code == ExitCode.INTERRUPTED:
            raise KeyboardInterrupt
        if restarts is None or outcome.asked_to_stop or outcome.code in FINAL:
            return outcome.code
        now = restarts.progress()
        # a run that got further has earned its attempts again; one that dies at the same place gives up
        failures, reached = 1 if now != reached else failures + 1, now
        if failures > restarts.limit:
            restarts.give_up(outcome.code, outcome.cause)
            return outcome.code
        restarts.note(outcome.code, outcome.cause)


def apart(work: Callable[[], Any]) -> int:
    """Do a piece of work that needs neither ranks nor a GPU in a process of its own, and return its exit
    code: threads that torch starts there would be missing in ranks that are forked from this process.

    Under torchrun or Slurm this process does it itself.
    """
    cpu_shims.prepare_megatron()
    return _rank_code(work) if under_launcher() else _round(work, 1, new_processes=False).code


def _threads(count: int) -> int:
    """Return the CPU threads of each of `count` local ranks, for which nobody has named a number but perhaps
    the environment."""
    said = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # of nested levels, the first
    if said.isdecimal() and len(said) <= 4 and int(said):  # anything else the library passes over too
        return int(said)
    return max(1, num_cores() // count)


@dataclass
class _Outcome:
    """How a round of local ranks ended."""

    code: int = 0
    """Exit code of the first rank that failed; that of a mistake goes before others."""
    cause: str = ""
    """Which rank failed first, and how."""
    asked_to_stop: bool = False
    """Whether the launcher was asked to stop while they ran."""
    leaves_now: bool = False
    """Whether a second SIGINT had the launcher kill them."""


def _round(main: Callable[[], Any], count: int, *, new_processes: bool) -> _Outcome:
    """Start `count` ranks and wait for their end.

    Args:
        main: what they do.
        count: their number.
        new_processes: whether they are new processes in place of forks.
    """
    gc.freeze()  # or the collector would touch, and so copy, what ranks share
    door = socket.create_server((LOCALHOST, 0), backlog=count)
    port = door.getsockname()[1]
    environment = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), STORE_PORT: str(port)}
    with plan_file(main, torch.get_num_threads()) if new_processes else contextlib.nullcontext() as plan:
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # until `_wait` can pass them on
        children = [_fork(main, environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, door, plan)
                    for rank in range(count)]
    # Held by the launcher, in memory: it survives any rank, and a full disk cannot stall it.  Its thread
    # begins after the last fork: a rank forked while that thread holds a lock of the C library would wait for
    # the lock for ever.
    store = dist.TCPStore(LOCALHOST, port, is_master=True, wait_for_workers=False,
                          master_listen_fd=door.detach())
    outcome = _wait(children)
    del store  # not before
    return outcome


def _fork(main: Callable[[], Any], environment: dict[str, str], door: socket.socket,
          plan: int | None) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    child = os.fork()
    if child:
        return child

    def begin() -> Any:
        die_with_parent(parent)
        door.close()  # the launcher's
        os.environ.update(environment)
        if plan is not None:  # it stays bound to its parent, and signals wait until its work begins
            _become_new_process(plan)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        return main()

    _end_with(begin)


def _become_new_process(plan: int) -> NoReturn:
    """Replace this process, a fork of the launcher, by a new one that does what a plan says."""
    os.set_inheritable(plan, True)
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    # -P: files of the folder that it is started in are no modules, unless they were so for the launcher
    os.execv(sys.executable, [sys.executable, *flags, "-P", "-c", _NEW_PROCESS, str(plan), *sys.path])


def be_rank(plan: int) -> NoReturn:
    """Do what stands in a plan, as a forked rank would, and end this process.

    Args:
        plan: descriptor of its file.
    """
    def begin() -> Any:
        main = read_plan(plan)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        return main()

    _end_with(begin)


def _end_with(main: Callable[[], Any]) -> NoReturn:
    """Do a rank's work and end this process with its exit code."""
    code: int = ExitCode.CRASH
    try:
        code = _rank_code(main)
    except KeyboardInterrupt:  # before it could be taken as a wish to stop in good order
        code = ExitCode.INTERRUPTED
    except BaseException:
        if not dist.is_initialized() or _fails_first():
            traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _rank_code(main: Callable[[], Any]) -> int:
    try:
        return to_exit_code(main() or 0)
    except (UserError, SilentCorruption) as e:
        if _fails_first():
            # one write, whole also beside other ranks' lines
            print(f"error: {e}\n", end="", file=sys.stderr, flush=True)
        return ExitCode.USER_ERROR if isinstance(e, UserError) else ExitCode.CORRUPTION
    except (MemoryError, RuntimeError) as e:
        if not is_out_of_memory(e):
            raise
        if _fails_first():
            said = first_line(e)
            print(f"error: rank {os.environ['RANK']} is out of memory ({said}); lower "
                  "train.micro_batch_size, set train.recompute=true, or split the model over more processes "
                  "(parallel.*); `megatron-sov plan` tells what a layout needs\n", end="", file=sys.stderr,
                  flush=True)
        return ExitCode.CRASH


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that no memory was left, of the host or of a GPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _fails_first() -> bool:
    """Return whether this rank is the first of its run to fail; the others only lose their
    connections or say the same."""
    if not dist.is_initialized():
        return is_first()
    try:
        return bool(dist.distributed_c10d._get_default_store().add("failed_ranks", 1) == 1)
    except RuntimeError:  # the store went with the rank that held it
        return True


def _wait(children: list[int]) -> _Outcome:
    """Wait for all ranks, passing signals on; after a rank failed the others get 10 s
    before they are killed."""
    alive, deadline, killed, outcome = set(children), float("inf"), "", _Outcome()
    interrupted_s = float("inf")

    def forward(number: int, frame: Any) -> None:
        nonlocal interrupted_s
        if number == signal.SIGINT:
            # What wraps this process may pass a Ctrl-C on that the terminal has sent to both.
            if time.monotonic() - interrupted_s > SAME_INTERRUPT_S:
                outcome.leaves_now = True
                _send(list(alive), signal.SIGKILL)  # a checkpoint appears whole or not at all
                return
            interrupted_s = min(interrupted_s, time.monotonic())
        outcome.asked_to_stop = True
        _send(list(alive), number)

    previous = {s: signal.signal(s, forward) for s in FORWARDED}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    try:
        while alive:
            child, status = os.waitpid(-1, os.WNOHANG)
            if child == 0:
                if time.monotonic() > deadline:
                    _send(list(alive), signal.SIGKILL)
                time.sleep(0.02)
                continue
            if child in alive:
                alive.discard(child)
                ended = os.waitstatus_to_exitcode(status)
                # a mistake's code counts, not that of ranks which lose their peer
                if ended == ExitCode.USER_ERROR or (ended != 0 and outcome.code == 0):
                    how = f"ended with exit code {ended}"
                    if ended < 0:
                        how = killed = f"was ended by {signal.Signals(-ended).name}"
                    outcome.cause = f"rank {children.index(child)} {how}"
                    outcome.code = ended if ended > 0 else 128 - ended
                    deadline = time.monotonic() + 10
        if outcome.leaves_now:
            outcome.code = ExitCode.INTERRUPTED
        # After a user's mistake a killed rank is one that lost its peer.
        elif killed and outcome.code != ExitCode.USER_ERROR:
            print(f"error: {outcome.cause}; if nobody sent it, look for a lack of memory\n", end="",
                  file=sys.stderr, flush=True)
        return outcome
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _send(children: list[int], number: int) -> None:
    for child in children:
        try:
            os.kill(child, number)
        except ProcessLookupError:
            continue
