"""Process groups: `join_world` joins the run's processes, `ParallelWorld` holds a process's ranks."""

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
from megatron.core import parallel_state, tensor_parallel

from layout_proof import library_patches
from megatron_sov.base.errors import UserError
from megatron_sov.engine.parallel.device import on_gpu
from megatron_sov.engine.parallel.gpu_setup import select_gpu
from megatron_sov.engine.parallel.values import broadcast_object, gather_objects
from megatron_sov.model.config import ParallelConfig

_joins = itertools.count()
"""Counts this process's calls of `join_world`: each gets a store prefix of its own."""
LOCALHOST = "127.0.0.1"
STORE_PORT = "SOV_STORE_PORT"
"""Environment variable with the local launcher's rendezvous store port."""
_REDUCTIONS = "reductions"
_GROUP_PURPOSES = {
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
"""Megatron-Core's `group_desc` -> purpose; a group that is not listed has a purpose of its own.

Groups with the same members and purpose share a communicator. A communicator executes messages in order, so
expert messages must not queue after gradient reductions, nor pipeline messages after either."""


@dataclass(frozen=True)
class ParallelWorld:
    """This process's ranks and sizes in the layout."""

    rank: int
    """Global rank."""
    size: int
    dp_rank: int
    dp_size: int
    first_stage: bool
    """Whether this process holds the first pipeline stage (embedding)."""
    last_stage: bool
    """Whether this process holds the last pipeline stage (output head, loss)."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes events and manifests."""
        return self.rank == 0


def join_world(parallel: ParallelConfig, needs_bytes: int = 0) -> ParallelWorld:
    """Join the process group of the environment (RANK, WORLD_SIZE, ...) and create the layout's groups.

    Args:
        parallel: the layout.
        needs_bytes: GPU memory that this process needs at least; 0: unknown.

    Raises:
        UserError: a rank's GPU cannot be used, is shared with another rank, or lacks free memory.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    timeout = datetime.timedelta(seconds=parallel.timeout_s)
    if not dist.is_initialized():
        store = _create_rendezvous(rank, size, timeout)
        if on_gpu():
            select_gpu(store, rank, size, needs_bytes, timeout)
        # without `device_id`: with it, all processes would have to split off every group, one after
        # another
        dist.init_process_group("nccl" if on_gpu() else "gloo", rank=rank, world_size=size, timeout=timeout,
                                store=store)
    return form_groups(parallel)(rank, size)


def form_groups(parallel: ParallelConfig) -> Callable[[int, int], ParallelWorld]:
    """Return a function of (rank, number of ranks) that creates the layout's groups and the random states,
    and patches Megatron-Core's defects."""
    def join(rank: int, size: int) -> ParallelWorld:
        suppress_library_warnings()
        create_groups(parallel)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        library_patches.patch_defects()
        return ParallelWorld(
            rank=rank, size=size, dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=parallel_state.get_data_parallel_world_size(),
            first_stage=parallel_state.is_pipeline_first_stage(),
            last_stage=parallel_state.is_pipeline_last_stage())

    return join


def suppress_library_warnings() -> None:
    """Suppress library warnings that a user cannot act on."""
    # Megatron-Core uses deprecated torch names
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
    # experts have their own tensor-parallel size, which may be 1
    warnings.filterwarnings("ignore", message="`sequence_parallel` is set to `True`, but tensor model")


def create_groups(parallel: ParallelConfig) -> None:
    """Create the layout's process groups by `initialize_model_parallel`. Collective.

    A process creates only its own groups, each once, and connects to members at the first message."""
    # the default group already has a communicator
    groups: dict[tuple[str, tuple[int, ...]], Any] = {
        (_REDUCTIONS, tuple(range(dist.get_world_size()))): dist.group.WORLD}
    create = parallel_state.create_group

    def create_shared(ranks: Sequence[int], *, group_desc: str = "", backend: Any = None,
                      pg_options: Any = None, **options: Any) -> Any:
        if backend is not None or pg_options is not None:
            return create(ranks, group_desc=group_desc, backend=backend, pg_options=pg_options, **options)
        # groups of one process send nothing, so they are shared for all purposes
        purpose = _GROUP_PURPOSES.get(group_desc, group_desc) if len(ranks) > 1 else ""
        key = purpose, tuple(sorted(ranks))
        if key not in groups:
            groups[key] = create(ranks, group_desc=group_desc, **options)
        return groups[key]

    with mock.patch.object(parallel_state, "create_group", create_shared):
        parallel_state.initialize_model_parallel(
            parallel.tp, parallel.pp, parallel.vpp if parallel.vpp > 1 else None,
            context_parallel_size=parallel.cp, expert_model_parallel_size=parallel.ep,
            expert_tensor_parallel_size=parallel.etp,
            # gloo groups are needed only for Megatron-Core's own checkpoints
            create_gloo_process_groups=False,
            distributed_timeout_minutes=max(1, math.ceil(parallel.timeout_s / 60)))


def _create_rendezvous(rank: int, size: int, timeout: datetime.timedelta) -> dist.Store:
    """Return the rendezvous store with a prefix unique to this start."""
    environment = os.environ
    if STORE_PORT in environment:
        host, port, name = LOCALHOST, environment[STORE_PORT], ""
    # torchrun keeps one store across restarts, so the restart's number is in the prefix
    elif environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        host, port, name = (environment["MASTER_ADDR"], environment["MASTER_PORT"],
                            environment["TORCHELASTIC_RESTART_COUNT"])
    else:
        store, *_ = next(dist.rendezvous("env://", rank, size, timeout=timeout))
        # numbered, because rank 0's store may outlive its groups, and a process may join again
        return dist.PrefixStore(f"env/{next(_joins)}", store)
    return dist.PrefixStore(f"{name}/{next(_joins)}", dist.TCPStore(host, int(port), is_master=False))


def leave_world() -> None:
    """Destroy all groups; the process can join another layout afterwards."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def run_on_main(place: ParallelWorld, action: Callable[[], Any]) -> Any:
    """Call `action` on rank 0 and return its plain result on every rank. Raises `UserError`: on every rank,
    if `action` raises it, so that no rank waits for rank 0."""
    return _run_on_one(place.is_main, action)


def run_on_first(action: Callable[[], Any]) -> Any:
    """Call `action` on rank 0 as `run_on_main`; a process without process group calls it itself."""
    return _run_on_one(dist.get_rank() == 0, action) if dist.is_initialized() else action()


def run_on_each_rank(action: Callable[[int, int], Any]) -> list[Any]:
    """Call `action(rank, size)` on every process and return all results by rank. A process without process
    group counts as the only one. Raises `UserError`: on every rank after all have finished, if `action`
    raises it on any."""
    if not dist.is_initialized():
        return [action(0, 1)]
    result, problem = None, None
    try:
        result = action(dist.get_rank(), dist.get_world_size())
    except UserError as e:
        problem = str(e)
    outcomes = gather_objects((result, problem))
    if problem := next((rank_problem for _, rank_problem in outcomes if rank_problem is not None), None):
        raise UserError(problem)
    return [rank_result for rank_result, _ in outcomes]


def _run_on_one(is_main: bool, action: Callable[[], Any]) -> Any:
    """Call `action` if `is_main`, and return its result or raise its `UserError` on every rank."""
    result, problem = None, None
    if is_main:
        try:
            result = action()
        except UserError as e:
            problem = str(e)
    result, problem = broadcast_object((result, problem))
    if problem is not None:
        raise UserError(problem)
    return result
