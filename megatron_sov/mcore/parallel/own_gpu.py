"""The GPU of this process: which one it is, that no other rank has it, and that there is room on it.

What is wrong with one rank's GPU is told by all of them, over the rendezvous, before NCCL begins: there a
rank that has left would only be waited for.
"""

from __future__ import annotations

import datetime
import os

import torch
import torch.distributed as dist

from megatron_sov.clusters.chips import Gpu
from megatron_sov.errors import UserError, first_line
from megatron_sov.obs.units import GIB
from megatron_sov.runs.launch_environment import own_gpu_index


def kind() -> Gpu:
    """Return what this process's GPU is."""
    found = torch.cuda.get_device_properties(own_gpu_index(torch.cuda.device_count()))
    return Gpu(found.name, found.total_memory)


def take(store: dist.Store, rank: int, size: int, needs_bytes: int,
         timeout: datetime.timedelta) -> torch.device:
    """Make this process's GPU the current one; called by every rank.

    Args:
        store: the rendezvous.
        rank: of this process.
        size: number of ranks.
        needs_bytes: memory that it will take at least; 0: nobody knows.
        timeout: how long to wait for the other ranks.

    Raises:
        UserError: a GPU cannot be used, is another rank's as well, or has too little free memory; on every
            rank.
    """
    device, uuid, problem = torch.device("cuda", own_gpu_index(torch.cuda.device_count())), "", ""
    try:
        torch.cuda.set_device(device)
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    except RuntimeError as e:  # CUDA's own: held by another process alone, fallen off the bus
        problem = f"cannot be used ({first_line(e)}); `nvidia-smi` shows who has it and how it is"
    else:
        if free_bytes < needs_bytes:
            problem = (f"has {free_bytes / GIB:.1f} of {total_bytes / GIB:.1f} GiB free, and the run takes "
                       f"{needs_bytes / GIB:.1f}; end the other processes on it (`nvidia-smi` names them), "
                       "or choose other GPUs by CUDA_VISIBLE_DEVICES")
    agree(store, rank, size, uuid, problem, timeout)
    return device


def agree(store: dist.Store, rank: int, size: int, uuid: str, problem: str,
          timeout: datetime.timedelta) -> None:
    """Raise `UserError` on every rank where something is wrong with the GPU of one, or two have the same.

    Args:
        store: the rendezvous.
        rank: of this process.
        size: number of ranks.
        uuid: of its GPU.
        problem: what is wrong with that; empty: nothing.
        timeout: how long to wait for the other ranks.
    """
    if uuid and store.add(f"gpu/{uuid}", 1) > 1:
        place = f"LOCAL_RANK = {os.environ.get('LOCAL_RANK', '0')}"
        problem = problem or (f"({uuid}) is another rank's as well: {place} of {torch.cuda.device_count()} "
                              "visible GPUs; start one process for each GPU, and let each see all of its "
                              "node or its own")
    if problem:
        store.set("gpu/problem", f"rank {rank}: its GPU {problem}")
    if store.add("gpu/ranks", 1) == size:
        store.set("gpu/all", "seen")
    store.wait(["gpu/all"], timeout)
    if store.check(["gpu/problem"]):
        raise UserError(store.get("gpu/problem").decode())
