"""The look at every node before a start: `python -m megatron_sov.operate.slurm.preflight FOLDER`,
one process for each rank.

Each rank writes FOLDER/rank-N.json, first with what it finds alone and then again with what all ranks find
together, so that a rank which dies or hangs on the way is known by what it did not write.  `sick_nodes` of
attempts.py judges the reports.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from megatron_sov.base.artifacts import format_json, write_atomically
from megatron_sov.base.errors import format_error
from megatron_sov.base.settings import AboveZero, Flag, add_options, read_options
from megatron_sov.operate.slurm.node_report import Report
from megatron_sov.runs.gpu_driver import find_gpu_fault, list_visible_gpus
from megatron_sov.runs.launch_environment import local_gpu_index

if TYPE_CHECKING:
    import torch


REPEATS = 5
ALLREDUCE_BYTES = {"cuda": 64 << 20, "cpu": 4 << 20}
MATMUL_SIZE = {"cuda": 8192, "cpu": 512}


def look_alone(report: Report, scratch: Path, transformer_engine: bool = False) -> None:
    """Fill in what a rank can see alone: GPUs, disk, arithmetic, and whether Transformer Engine imports."""
    import torch

    report.num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if report.num_gpus:
        _look_at_gpu(report)
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=scratch) as f:
            f.write(b"x" * (1 << 20))
            # down to the disk: a full or broken one often fails only here
            f.flush()
            os.fsync(f.fileno())
        status = os.statvfs(scratch)
        report.free_disk_bytes = status.f_bavail * status.f_frsize
    except OSError as e:
        report.disk_error = f"{scratch}: {e.strerror}"
    if transformer_engine:
        try:
            importlib.import_module("transformer_engine.pytorch")
        except Exception as e:  # it fails in many ways: missing libraries, wrong CUDA
            report.transformer_engine_error = format_error(e)
    device = torch.device("cpu")
    if report.num_gpus:
        device = torch.device("cuda", local_gpu_index(report.num_gpus))
    size, dtype = MATMUL_SIZE[device.type], torch.bfloat16 if device.type == "cuda" else torch.float32
    # small whole numbers: their sums are exact, so all healthy ranks get the same checksum
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-1, 2, (size, size), generator=generator).to(device, dtype) for _ in range(2))
    times = []
    # the fastest counts: the first one loads kernels
    for _ in range(REPEATS):
        product, took_s = timed_product(a, b)
        report.checksum = float(product.double().sum())
        times.append(took_s)
    report.matmul_s = min(times)
    # 2 n^3 operations
    report.matmul_tflops = 2 * size**3 / report.matmul_s / 1e12


def timed_product(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return a matrix product and the seconds that it alone took, on GPUs by their own clock: what follows
    there, and the way to it, takes as long as the product itself."""
    import torch

    if a.device.type != "cuda":
        start = time.perf_counter()
        product = a @ b
        return product, time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    product = a @ b
    end.record()
    end.synchronize()
    return product, begin.elapsed_time(end) / 1e3


def _look_at_gpu(report: Report) -> None:
    """Fill in what the driver says of this rank's GPU, before anything of ours is on it."""
    seen = list_visible_gpus()
    if len(seen) == report.num_gpus:  # else nobody can tell which one it is
        gpu = seen[local_gpu_index(report.num_gpus)]
        report.gpu_uuid, report.gpu_used_bytes = gpu.uuid, gpu.used_bytes
        report.gpu_illness = find_gpu_fault(gpu.uuid)


def look_together(report: Report, timeout_s: float) -> None:
    """Fill in what takes all ranks: clocks, an all-reduce and its sum."""
    import torch
    import torch.distributed as dist

    kind = "cuda" if report.num_gpus else "cpu"
    device = torch.device("cuda", local_gpu_index(report.num_gpus)) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo",
                            timeout=datetime.timedelta(seconds=timeout_s),
                            device_id=device if kind == "cuda" else None)
    values = torch.ones(ALLREDUCE_BYTES[kind] // 4, device=device)
    # not timed: the first one sets up the connections
    dist.all_reduce(values)
    clocks = torch.zeros(dist.get_world_size(), dtype=torch.float64, device=device)
    dist.barrier()
    # right behind the barrier; the sum of vectors with one entry each is all clocks
    clocks[dist.get_rank()] = time.time()
    dist.all_reduce(clocks)
    report.clock_skew_s = float(clocks[dist.get_rank()] - clocks.median())
    # ones again, since the first all-reduce left its sums in place
    values.fill_(1.0)
    start = time.perf_counter()
    dist.all_reduce(values)
    wrong = int((values != dist.get_world_size()).sum())  # waits for the device
    report.allreduce_s = time.perf_counter() - start
    if wrong:
        report.error = f"an all-reduce of ones over {dist.get_world_size()} ranks gave {wrong} wrong sums"
    dist.destroy_process_group()


@dataclass(frozen=True, kw_only=True)
class PreflightOptions:
    """Look at the node of this rank, before a start."""

    folder: Annotated[Path, Flag("FOLDER")]
    """Where the reports go."""
    scratch: Path = field(default_factory=lambda: Path(tempfile.gettempdir()))
    """Folder of the node that a file is written into."""
    timeout_s: AboveZero = 120.0
    """How long the ranks wait for one another."""
    transformer_engine: bool = False
    """Look whether Transformer Engine can be imported too."""


def main(argv: list[str] | None = None) -> int:
    """Look at this rank's node; returns 0 whatever was found."""
    parser = argparse.ArgumentParser(prog="python -m megatron_sov.operate.slurm.preflight")
    add_options(parser, PreflightOptions)
    args = read_options(PreflightOptions, parser.parse_args(argv))
    report = Report(os.environ.get("SLURMD_NODENAME", platform.node()), int(os.environ["RANK"]))
    file = args.folder / f"rank-{report.rank}.json"
    for look in (lambda: look_alone(report, args.scratch, args.transformer_engine),
                 lambda: look_together(report, args.timeout_s)):
        try:
            look()
        except Exception as e:  # whatever a sick node raises is what is to be reported
            report.error = report.error or format_error(e)
        # after each look: a rank that hangs in the second one has left what the first one found
        write_atomically(file, format_json(asdict(report)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
