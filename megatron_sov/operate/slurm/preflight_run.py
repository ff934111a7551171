"""Test a node with torch before a training start: GPUs, disk, a matrix product and messages."""

import datetime
import importlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_sov.base.errors import format_error
from megatron_sov.operate.slurm.node_report import NodeReport
from megatron_sov.runs.gpu_driver import find_gpu_fault, list_visible_gpus
from megatron_sov.runs.launch_environment import local_gpu_index

REPEATS = 5
ALLREDUCE_BYTES = {"cuda": 64 << 20, "cpu": 4 << 20}
NUM_TURNS = 4
"""Exchanges of each rank with other nodes, at least."""
MATMUL_SIZE = {"cuda": 8192, "cpu": 512}


def inspect_node(report: NodeReport, scratch: Path, transformer_engine: bool = False) -> None:
    """Add GPUs, disk, matrix product and the `transformer_engine` import to `report`."""
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


def inspect_communication(report: NodeReport, timeout_s: float, group_size: int = 1) -> None:
    """Add `clock_skew_s`, an all-reduce's time and result, and the times of exchanges to `report`."""
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
    if group_size > 1:
        first = dist.get_rank() // group_size * group_size
        ranks = range(first, min(first + group_size, dist.get_world_size()))
        report.alltoall_s = time_alltoall(values, ranks)
    report.exchange_s = time_exchanges(values, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    dist.destroy_process_group()


def time_alltoall(values: torch.Tensor, ranks: range) -> float:
    """Return the seconds of the fastest of `REPEATS` all-to-alls of `values` in `ranks`, the rank's group."""
    group = dist.new_group([*ranks], use_local_synchronization=True)
    sent = values[:len(values) // len(ranks) * len(ranks)]
    received = torch.empty_like(sent)
    return min(_time_message(values.device, lambda: dist.all_to_all_single(received, sent, group=group))
               for _ in range(REPEATS))


def time_exchanges(values: torch.Tensor, node_ranks: int) -> float:
    """Return the seconds of an exchange of `values` with the fastest of at least `NUM_TURNS` partners.

    Partners have the same local index on other nodes, so a slow node is slow with each of its partners, and
    another node is fast with most of its partners. On one node, all its ranks are partners.
    """
    if dist.get_world_size() == node_ranks:
        node_ranks = 1
    num_nodes = dist.get_world_size() // node_ranks
    node, index = divmod(dist.get_rank(), node_ranks)
    received, times = torch.empty_like(values), []
    for turn in range(0, num_nodes, max(1, num_nodes // NUM_TURNS)):
        partner = (turn - node) % num_nodes

        def exchange(rank: int = partner * node_ranks + index) -> None:
            sends = dist.P2POp(dist.isend, values, rank), dist.P2POp(dist.irecv, received, rank)
            for work in dist.batch_isend_irecv([*sends]):
                work.wait()

        # the first exchange sets up the connection
        pair_times = [_time_message(values.device, exchange if partner != node else lambda: None)
                      for _ in range(2)]
        if partner != node:
            times.append(min(pair_times))
    return min(times, default=0.0)


def _time_message(device: torch.device, send: Callable[[], object]) -> float:
    """Return the seconds of `send` after a barrier over all ranks."""
    dist.barrier()
    start = time.perf_counter()
    send()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
