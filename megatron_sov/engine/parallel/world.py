"""Processes and their groups: joining them, and knowing one's place in the layout."""

from __future__ import annotations

import datetime
import itertools
import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch.distributed as dist

from megatron_sov.base.errors import UserError
from megatron_sov.engine.parallel import cpu_shims
from megatron_sov.engine.parallel.device import on_gpu, take_gpu
from megatron_sov.engine.parallel.values import broadcast_object, gather_objects
from megatron_sov.model.config import ParallelConfig

_joins = itertools.count()
LOCALHOST = "127.0.0.1"
STORE_PORT = "SOV_STORE_PORT"
"""Environment variable: port of the rendezvous that the launcher of local ranks holds."""
_REDUCTIONS = "reductions"
_PURPOSE = {
    **dict.fromkeys((
        "DATA_PARALLEL_GROUP_WITH_CP", "DATA_PARALLEL_GROUP", "TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP",
        "TENSOR_AND_DATA_PARALLEL_GROUP", "MODEL_PARALLEL_GROUP", "EMBEDDING_GROUP",
        "POSITION_EMBEDDING_GROUP", "EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP",
        "EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP_WITH_EGTP",
        "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP"), _REDUCTIONS),
    **dict.fromkeys((
        "TENSOR_MODEL_PARALLEL_GROUP", "CONTEXT_PARALLEL_GROUP", "TENSOR_AND_CONTEXT_PARALLEL_GROUP"),
        "layers"),
    **dict.fromkeys((
        "EXPERT_MODEL_PARALLEL_GROUP", "EXPERT_TENSOR_PARALLEL_GROUP",
        "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP"), "experts")}
"""What the library's groups serve, by its descriptions; the others serve themselves alone.  Two groups with
the same members are one where they serve the same: a communicator does one thing after the other, so that
experts' messages must not wait behind gradients, nor stages' behind either."""


@dataclass(frozen=True)
class ParallelWorld:
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


def join(parallel: ParallelConfig, needs_bytes: int = 0) -> ParallelWorld:
    """Join the process group that the environment describes (RANK, WORLD_SIZE, ...) and make the layout's
    groups.

    Args:
        parallel: the layout.
        needs_bytes: memory that this process will take of its GPU at least; 0: nobody knows.

    Raises:
        UserError: a rank's GPU cannot be used, is another one's as well, or has too little free memory.
    """
    from megatron.core import tensor_parallel

    pass_over_warnings()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    timeout = datetime.timedelta(seconds=parallel.timeout_s)
    if not dist.is_initialized():
        store = _rendezvous(rank, size, timeout)
        if on_gpu():
            take_gpu(store, rank, size, needs_bytes, timeout)
        # not bound to the device: each group would be split off all processes by all of them, one by one
        dist.init_process_group("nccl" if on_gpu() else "gloo", rank=rank, world_size=size, timeout=timeout,
                                store=store)
    make_groups(parallel)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    cpu_shims.mend()
    return own_place(rank, size)


def pass_over_warnings() -> None:
    """Have warnings of the library not be told that nobody who trains can do something about."""
    # it calls torch by names that newer versions replace
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
    # experts have a tensor parallel size of their own, which is 1 where the model's is not
    warnings.filterwarnings("ignore", message="`sequence_parallel` is set to `True`, but tensor model")


def own_place(rank: int, size: int) -> ParallelWorld:
    """Return this process's place in the groups that it is in."""
    from megatron.core import parallel_state

    return ParallelWorld(
        rank=rank, size=size, dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        first_stage=parallel_state.is_pipeline_first_stage(),
        last_stage=parallel_state.is_pipeline_last_stage(),
    )


def make_groups(parallel: ParallelConfig) -> None:
    """Make the layout's groups among the processes that have met.

    A process takes part in making the groups that it is in, each once, and connects to their members when it
    first sends something; of the others it counts the names.
    """
    from megatron.core import parallel_state

    # the default group has a communicator already
    made: dict[tuple[str, tuple[int, ...]], Any] = {
        (_REDUCTIONS, tuple(range(dist.get_world_size()))): dist.group.WORLD}
    create = parallel_state.create_group

    def share(ranks: Sequence[int], *, group_desc: str = "", backend: Any = None, pg_options: Any = None,
              **asked: Any) -> Any:
        if backend is not None or pg_options is not None:
            return create(ranks, group_desc=group_desc, backend=backend, pg_options=pg_options, **asked)
        # nothing is sent within a group of one
        purpose = _PURPOSE.get(group_desc, group_desc) if len(ranks) > 1 else ""
        key = purpose, tuple(sorted(ranks))
        if key not in made:
            made[key] = create(ranks, group_desc=group_desc, **asked)
        return made[key]

    with mock.patch.object(parallel_state, "create_group", share):
        parallel_state.initialize_model_parallel(
            parallel.tp, parallel.pp, parallel.vpp if parallel.vpp > 1 else None,
            context_parallel_size=parallel.cp, expert_model_parallel_size=parallel.ep,
            expert_tensor_parallel_size=parallel.etp,
            # they would only serve the library's own checkpoints
            create_gloo_process_groups=False,
            distributed_timeout_minutes=max(1, math.ceil(parallel.timeout_s / 60)))


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


def on_main(place: ParallelWorld, action: Callable[[], Any]) -> Any:
    """Do something on rank 0 and return its (plain) result on every rank.

    Raises:
        UserError: it failed there; on every rank, so that none waits for another.
    """
    return _on_one(place.is_main, action)


def on_first(action: Callable[[], Any]) -> Any:
    """Do as `on_main` does where no place is at hand; a process that has joined nobody does it for itself."""
    return _on_one(dist.get_rank() == 0, action) if dist.is_initialized() else action()


def on_each(action: Callable[[int, int], Any]) -> list[Any]:
    """Do something on every process, called with its rank and their number, and return what each gave, by
    rank; a process that has joined nobody is all of them.

    Raises:
        UserError: it failed on one; on every rank, behind the work of all.
    """
    if not dist.is_initialized():
        return [action(0, 1)]
    result, problem = None, None
    try:
        result = action(dist.get_rank(), dist.get_world_size())
    except UserError as e:
        problem = str(e)
    everyones = gather_objects((result, problem))
    if problem := next((told for _, told in everyones if told is not None), None):
        raise UserError(problem)
    return [found for found, _ in everyones]


def _on_one(is_one: bool, action: Callable[[], Any]) -> Any:
    result, problem = None, None
    if is_one:
        try:
            result = action()
        except UserError as e:
            problem = str(e)
    result, problem = broadcast_object((result, problem))
    if problem is not None:
        raise UserError(problem)
    return result
