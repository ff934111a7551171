"""Processes and their groups: starting local ranks, joining them, and knowing one's place in the layout."""

from __future__ import annotations

import datetime
import gc
import itertools
import json
import math
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from megatron_sov.config import ParallelConfig
from megatron_sov.errors import ExitCode, SilentCorruption, UserError
from megatron_sov.mcore.parallel import cpu_shims, library_defects, own_gpu
from megatron_sov.mcore.parallel.device import on_gpu
from megatron_sov.mcore.parallel.object_collectives import broadcast_object
from megatron_sov.runs.launch_environment import (
    HANDED,
    is_first,
    num_ranks,
    repeats,
    results,
    under_launcher,
)
from megatron_sov.runs.parent_death import FORWARDED, die_with_parent

FINAL = (ExitCode.OK, ExitCode.USER_ERROR, ExitCode.STOPPED)
"""Exit codes of ranks after which a restart would change nothing: done, a user's mistake,
stopped in good order."""
_joins = itertools.count()
LOCALHOST = "127.0.0.1"
STORE_PORT = "SOV_STORE_PORT"
"""Environment variable: port of the rendezvous that the launcher of local ranks holds."""


@dataclass(frozen=True)
class World:
    """This process's place in the layout."""

    rank: int
    """Rank among all processes."""
    size: int
    """Number of processes."""
    dp_rank: int
    """Rank among the processes that read different data."""
    dp_size: int
    """Data parallel size."""
    first_stage: bool
    """Whether this process holds the first pipeline stage (embedding)."""
    last_stage: bool
    """Whether this process holds the last pipeline stage (output head, loss)."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's events and manifests."""
        return self.rank == 0


def join(parallel: ParallelConfig, needs_bytes: int = 0) -> World:
    """Join the process group that the environment describes (RANK, WORLD_SIZE, ...) and make the layout's
    groups.

    Args:
        parallel: the layout.
        needs_bytes: memory that this process will take of its GPU at least; 0: nobody knows.

    Raises:
        UserError: a rank's GPU cannot be used, is another one's as well, or has too little free memory.
    """
    from megatron.core import parallel_state, tensor_parallel

    # the library calls torch by names that newer versions replace; nobody who trains can mend that
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    timeout = datetime.timedelta(seconds=parallel.timeout_s)
    if not dist.is_initialized():
        store, device = _rendezvous(rank, size, timeout), None
        if on_gpu():
            device = own_gpu.take(store, rank, size, needs_bytes, timeout)
        dist.init_process_group("nccl" if device else "gloo", rank=rank, world_size=size, timeout=timeout,
                                store=store, device_id=device)
    parallel_state.initialize_model_parallel(
        parallel.tp, parallel.pp, parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp, expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.etp,
        # they would only serve the library's own checkpoints; making thousands takes minutes
        create_gloo_process_groups=False,
        distributed_timeout_minutes=max(1, math.ceil(parallel.timeout_s / 60)))
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    library_defects.mend()
    return World(
        rank=rank, size=size, dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        first_stage=parallel_state.is_pipeline_first_stage(),
        last_stage=parallel_state.is_pipeline_last_stage(),
    )


def _rendezvous(rank: int, size: int, timeout: datetime.timedelta) -> dist.Store:
    """Return the store in which the processes meet, under a name that no other start of them has used."""
    environment = os.environ
    if STORE_PORT in environment:
        host, port, name = LOCALHOST, environment[STORE_PORT], ""
    # torchrun keeps one store through all its restarts
    elif environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        host, port, name = (environment["MASTER_ADDR"], environment["MASTER_PORT"],
                            environment["TORCHELASTIC_RESTART_COUNT"])
    else:
        store, *_ = next(dist.rendezvous("env://", rank, size, timeout=timeout))
        # rank 0's store outlives its groups where anything still holds it, and a process may join again
        return dist.PrefixStore(f"env/{next(_joins)}", store)
    return dist.PrefixStore(f"{name}/{next(_joins)}", dist.TCPStore(host, int(port), is_master=False))


def leave() -> None:
    """Dissolve the groups; a process can join another layout afterwards."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def on_main(place: World, action: Callable[[], Any]) -> Any:
    """Do something on rank 0 and return its (plain) result on every rank.

    Raises:
        UserError: it failed there; on every rank, so that none waits for another.
    """
    result, problem = None, None
    if place.is_main:
        try:
            result = action()
        except UserError as e:
            problem = str(e)
    result, problem = broadcast_object((result, problem))
    if problem is not None:
        raise UserError(problem)
    return result


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
           restarts: Restarts | None = None, hand: Callable[[], dict[str, Any]] = dict) -> int:
    """Run `main` in every process of the run and return the command's exit code.

    Under torchrun or Slurm (RANK is set) this process is one rank.  Otherwise `nproc` ranks are started here.
    On CPUs they are forked from this process after the heavy imports, so they share memory and start at once.
    On GPUs they are new processes that run this command again, for CUDA works in no fork of a process that
    has asked for it; a rank's first `launch` is the one that it was started for.  SIGTERM, SIGINT and SIGUSR1
    reach every rank, which finish their step and save together; a rank that fails ends the others.

    Args:
        main: runs one rank; its integer return value is the exit code.
        nproc: local processes.
        num_threads: CPU threads of each rank; 0: cores / local ranks, or as torchrun or Slurm has set them.
        restarts: how local ranks are started again when one of them fails for another reason than a user's
            mistake.
        hand: returns what new processes find in `handed()`, plain JSON values; asked before each start.

    Returns:
        0, or 2 where a rank met a user's mistake, or the first nonzero exit code of any rank.
    """
    if repeats():
        torch.set_num_threads(num_threads or _threads(int(os.environ["LOCAL_WORLD_SIZE"])))
        _begin_handed_work(main)
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
        given = {HANDED: json.dumps(hand() | {"results": results()})} if on_gpu() else {}
        outcome = _round(main, count, given)
        if outcome.code == ExitCode.INTERRUPTED:
            raise KeyboardInterrupt
        if restarts is None or outcome.asked_to_stop or outcome.code in FINAL:
            return outcome.code
        now = restarts.progress()
        failures, reached = 1 if now != reached else failures + 1, now
        if failures > restarts.limit:
            restarts.give_up(outcome.code, outcome.cause)
            return outcome.code
        restarts.note(outcome.code, outcome.cause)


def apart(work: Callable[[], Any]) -> int:
    """Do a piece of work that needs neither ranks nor a GPU in a process of its own, and return its exit
    code: threads that torch starts there would be missing in ranks that are forked from this process.

    Under torchrun or Slurm this process does it itself; a rank that `repeats` leaves it to its launcher.
    """
    if repeats():
        return 0
    cpu_shims.prepare_megatron()
    return _rank_code(work) if under_launcher() else _round(work, 1, {}).code


def _threads(count: int) -> int:
    """Return the CPU threads of each of `count` local ranks."""
    return max(1, (os.cpu_count() or 1) // count)


@dataclass
class _Outcome:
    """How a round of local ranks ended."""

    code: int = 0
    """Exit code of the first rank that failed; that of a mistake goes before others."""
    cause: str = ""
    """Which rank failed first, and how."""
    asked_to_stop: bool = False
    """Whether the launcher was asked to stop while they ran."""


def _round(main: Callable[[], Any], count: int, handed: dict[str, str]) -> _Outcome:
    """Start `count` ranks and wait for their end.

    Args:
        main: what they do.
        count: their number.
        handed: environment that makes them new processes; empty: they are forked.
    """
    gc.freeze()  # or the collector would touch, and so copy, what ranks share
    door = socket.create_server((LOCALHOST, 0), backlog=count)
    port = door.getsockname()[1]
    environment = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), STORE_PORT: str(port), **handed}
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # until `_wait` can pass them on
    children = [_fork(main, environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, door)
                for rank in range(count)]
    # Held by the launcher, in memory: it survives any rank, and a full disk cannot stall it.  Its thread
    # begins after the last fork: a rank forked while that thread holds a lock of the C library would wait for
    # the lock for ever.
    store = dist.TCPStore(LOCALHOST, port, is_master=True, wait_for_workers=False,
                          master_listen_fd=door.detach())
    outcome = _wait(children)
    del store  # not before
    return outcome


def _fork(main: Callable[[], Any], environment: dict[str, str], door: socket.socket) -> int:
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
        if HANDED in environment:  # it stays bound to its parent, and signals wait until its work begins
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        return main()

    _end_with(begin)


def _begin_handed_work(main: Callable[[], Any]) -> NoReturn:
    """Do what a rank that `repeats` was started for, as a forked rank would, and end this process."""
    del os.environ[HANDED]
    cpu_shims.prepare_megatron()

    def begin() -> Any:
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
        return int(main() or 0)
    except (UserError, SilentCorruption) as e:
        if _fails_first():
            # one write, whole also beside other ranks' lines
            print(f"error: {e}\n", end="", file=sys.stderr, flush=True)
        return ExitCode.USER_ERROR if isinstance(e, UserError) else ExitCode.CORRUPTION
    except (MemoryError, RuntimeError) as e:
        if not is_out_of_memory(e):
            raise
        if _fails_first():
            said = (str(e).strip() or "Python says no more").splitlines()[0]
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

    def forward(number: int, frame: Any) -> None:
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
        if killed and outcome.code != ExitCode.USER_ERROR:  # beside a mistake it is a rank that lost its peer
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
