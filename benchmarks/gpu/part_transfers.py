"""Times of work around training: snapshots to host memory, collectives with one rank, and start-up."""

import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from setting import Failed, Figures, Setting

from megatron_sov.checkpoint.host_snapshot import HostSnapshot
from megatron_sov.engine.model.local_shards import LocalShard

TIMES = 3
"""Measured copies of a snapshot."""


def synchronize(setting: Setting) -> None:
    """Wait for the device."""
    if not setting.dry:
        torch.cuda.synchronize()


def measure_snapshots(setting: Setting) -> dict[str, Any]:
    """Return GB/s of the copy to host memory that blocks training at a checkpoint: first and later copies."""
    size = (1 << 24) if setting.dry else (1 << 32)
    blocks = torch.empty(4, size // 16, dtype=torch.float32, device=setting.device).normal_()
    shards = [LocalShard(f"weight{i}", block, (len(block),), (0,), replica=(0, 0, 0))
              for i, block in enumerate(blocks)]
    snapshot, seconds = HostSnapshot(), []
    for _ in range(TIMES):
        synchronize(setting)
        start = time.monotonic()
        snapshot.copy_blocks({"model": shards})
        synchronize(setting)
        seconds.append(time.monotonic() - start)
    return {"bytes": size, "first GB/s": size / seconds[0] / 1e9, "then GB/s": size / min(seconds[1:]) / 1e9}


def measure_collectives(setting: Setting) -> dict[str, Any]:
    """Return microseconds of an all-reduce over one rank, for a small and a large tensor.

    Raises:
        Failed: a sum over one rank differs from its input.
    """
    dist.init_process_group("gloo" if setting.dry else "nccl", store=dist.HashStore(), rank=0, world_size=1)
    figures = {}
    for numel in (1 << 10, 1 << (18 if setting.dry else 28)):
        tensor = torch.ones(numel, device=setting.device)
        for turn in range(5):
            if turn == 2:  # the first two are not timed
                synchronize(setting)
                begin_s = time.monotonic()
            dist.all_reduce(tensor)
        synchronize(setting)
        figures[f"all_reduce {numel * 4} bytes, us"] = 1e6 * (time.monotonic() - begin_s) / 3
        if not bool((tensor == 1).all()):
            raise Failed("an all-reduce over one rank has changed its tensor")
    dist.destroy_process_group()
    return figures


def measure_starts(setting: Setting) -> dict[str, Any]:
    """Return the seconds of a tiny run of two steps, and of a run that resumes after the first."""
    from part_losses import SMALL, build_training_command, copy_run_at, plan_packing

    run, seconds = setting.work / "start", {}
    # no commands if the part `losses` has already packed the data
    for problem in setting.run_commands(plan_packing(setting)[1], on_gpu=False):
        if problem:
            raise Failed(problem)
    settings = (*SMALL * setting.dry, "train.checkpoint_every_steps=1")
    for name in ("a start and two steps, s", "a restart and one step, s"):
        begin_s = time.monotonic()
        command = build_training_command(setting, "tiny-solar-open", run, 2, *settings,
                                         resume="restart" in name)
        setting.run_command(*command)
        seconds[name] = time.monotonic() - begin_s
        if "two" in name:
            run = copy_run_at(run, 1, setting.work / "restart")
    return seconds


def measure(setting: Setting) -> Figures:
    """Yield all figures."""
    yield "python", sys.version.split()[0]
    for measured in (measure_snapshots, measure_collectives, measure_starts):
        yield from measured(setting).items()
    if setting.dry:
        yield "not in a dry run", ["NCCL: gloo sums in its place", "commands run without the double"]
