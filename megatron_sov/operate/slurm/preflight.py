"""Tests every node before a training start: `python -m megatron_sov.operate.slurm.preflight FOLDER`, one
process per rank.

Each rank writes FOLDER/rank-N.json twice: after the tests of its own node, and after the tests with all
ranks. Missing fields reveal a rank that died or hung. `attempts.find_sick_nodes` judges the reports.
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
from megatron_sov.operate.slurm.node_report import NodeReport
from megatron_sov.runs.gpu_driver import find_gpu_fault, list_visible_gpus
from megatron_sov.runs.launch_environment import local_gpu_index

if TYPE_CHECKING:
    import torch

REPEATS = 5
ALLREDUCE_BYTES = {"cuda": 64 << 20, "cpu": 4 << 20}
MATMUL_SIZE = {"cuda": 8192, "cpu": 512}


def inspect_node(report: NodeReport, scratch: Path, transformer_engine: bool = False) -> None:
    """Add GPUs, disk, matrix product and the `transformer_engine` import to `report`."""
    import torch

    report.num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if report.num_gpus:
        _inspect_gpu(report)
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=scratch) as f:
            f.write(b"x" * (1 << 20))
            # a full or broken disk often fails only in fsync
            f.flush()
            os.fsync(f.fileno())
        status = os.statvfs(scratch)
        report.free_disk_bytes = status.f_bavail * status.f_frsize
    except OSError as e:
        report.disk_error = f"{scratch}: {e.strerror}"
    if transformer_engine:
        try:
            importlib.import_module("transformer_engine.pytorch")
        except Exception as e:  # the import raises many types: missing libraries, wrong CUDA
            report.transformer_engine_error = format_error(e)
    device = torch.device("cpu")
    if report.num_gpus:
        device = torch.device("cuda", local_gpu_index(report.num_gpus))
    size = MATMUL_SIZE[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    # sums of small integers are exact, so all healthy ranks compute the same checksum
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-1, 2, (size, size), generator=generator).to(device, dtype) for _ in range(2))
    times = []
    # the minimum counts: the first product loads kernels
    for _ in range(REPEATS):
        product, product_s = time_product(a, b)
        report.checksum = float(product.double().sum())
        times.append(product_s)
    report.matmul_s = min(times)
    # 2 n^3 operations
    report.matmul_tflops = 2 * size**3 / report.matmul_s / 1e12


def time_product(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return a matrix product and its seconds; on a GPU, CUDA events exclude launch and transfer."""
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


def _inspect_gpu(report: NodeReport) -> None:
    """Add the driver's data on this rank's GPU, before this process allocates memory there."""
    gpus = list_visible_gpus()
    if len(gpus) == report.num_gpus:  # otherwise the index does not identify this rank's GPU
        gpu = gpus[local_gpu_index(report.num_gpus)]
        report.gpu_uuid, report.gpu_used_bytes = gpu.uuid, gpu.used_bytes
        report.gpu_illness = find_gpu_fault(gpu.uuid)


def inspect_communication(report: NodeReport, timeout_s: float) -> None:
    """Add `clock_skew_s`, and an all-reduce's time and result, to `report`."""
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
    # not timed: the first all-reduce sets up the connections
    dist.all_reduce(values)
    clocks = torch.zeros(dist.get_world_size(), dtype=torch.float64, device=device)
    dist.barrier()
    # right after the barrier: each rank fills one entry, and the sum contains every clock
    clocks[dist.get_rank()] = time.time()
    dist.all_reduce(clocks)
    report.clock_skew_s = float(clocks[dist.get_rank()] - clocks.median())
    # the first all-reduce replaced the ones by sums
    values.fill_(1.0)
    start = time.perf_counter()
    dist.all_reduce(values)
    num_wrong = int((values != dist.get_world_size()).sum())  # waits for the device
    report.allreduce_s = time.perf_counter() - start
    if num_wrong:
        report.error = f"an all-reduce of ones over {dist.get_world_size()} ranks gave {num_wrong} wrong sums"
    dist.destroy_process_group()


@dataclass(frozen=True, kw_only=True)
class PreflightOptions:
    """Test this rank's node before a training start."""

    folder: Annotated[Path, Flag("FOLDER")]
    """Folder for the reports."""
    scratch: Path = field(default_factory=lambda: Path(tempfile.gettempdir()))
    """Folder on the node for a test file."""
    timeout_s: AboveZero = 120.0
    """Timeout for collectives."""
    transformer_engine: bool = False
    """Import Transformer Engine too."""


def main(argv: list[str] | None = None) -> int:
    """Test this rank's node and write its report; return 0 even if the node is sick."""
    parser = argparse.ArgumentParser(prog="python -m megatron_sov.operate.slurm.preflight")
    add_options(parser, PreflightOptions)
    args = read_options(PreflightOptions, parser.parse_args(argv))
    report = NodeReport(os.environ.get("SLURMD_NODENAME", platform.node()), int(os.environ["RANK"]))
    file = args.folder / f"rank-{report.rank}.json"
    for inspect in (lambda: inspect_node(report, args.scratch, args.transformer_engine),
                    lambda: inspect_communication(report, args.timeout_s)):
        try:
            inspect()
        except Exception as e:  # a sick node can raise any type; the report carries the error
            report.error = report.error or format_error(e)
        # after each inspection: a hang in the second keeps the results of the first
        write_atomically(file, format_json(asdict(report)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
