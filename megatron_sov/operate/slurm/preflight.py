"""The look at every node before a start: `python -m megatron_sov.operate.slurm.preflight FOLDER`,
one process for each rank.

Each rank writes FOLDER/rank-N.json, first with what it finds alone and then again with what all ranks find
together, so that a rank which dies or hangs on the way is known by what it did not write.  `sick_nodes`
judges the reports.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from megatron_sov.base.artifacts import atomic_write, to_json
from megatron_sov.base.errors import told_in_a_line
from megatron_sov.base.settings import AboveZero, Flag, add_options, read_options
from megatron_sov.runs.gpu_driver import illness, visible_gpus
from megatron_sov.runs.launch_environment import own_gpu_index

if TYPE_CHECKING:
    import torch

REPEATS = 5
ALLREDUCE_BYTES = {"cuda": 64 << 20, "cpu": 4 << 20}
MATMUL_SIZE = {"cuda": 8192, "cpu": 512}


@dataclass
class Report:
    """What one rank found."""

    node: str
    rank: int
    num_gpus: int = 0
    """GPUs that torch sees on the node: all of them, or this rank's alone."""
    gpu_uuid: str = ""
    """Which one is this rank's."""
    gpu_used_bytes: int = 0
    """Memory on it that was in use before this look began."""
    gpu_illness: str = ""
    """What its driver says is wrong with it: memory errors, heat, lack of power."""
    transformer_engine_error: str = ""
    """What it raised on import; empty: it imports, or nobody asked."""
    free_disk_bytes: int = 0
    """Free space on the scratch folder's disk."""
    disk_error: str = ""
    """Why a file could not be written there; empty: it could."""
    matmul_s: float = 0.0
    """Shortest of some matrix products, of the product alone."""
    matmul_tflops: float = 0.0
    checksum: float = 0.0
    """Sum of the product of two matrices of small whole numbers: the same on every rank."""
    clock_skew_s: float | None = None
    """Clock against the median of all ranks, right after a barrier."""
    allreduce_s: float | None = None
    """Seconds of the second all-reduce; None: it did not come to that."""
    error: str = ""
    """What was raised on the way."""


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
            report.transformer_engine_error = told_in_a_line(e)
    device = torch.device("cuda", own_gpu_index(report.num_gpus)) if report.num_gpus else torch.device("cpu")
    size, dtype = MATMUL_SIZE[device.type], torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-1, 2, (size, size), generator=generator).to(device, dtype) for _ in range(2))
    times = []
    for _ in range(REPEATS):
        product, took_s = timed_product(a, b)
        report.checksum = float(product.double().sum())
        times.append(took_s)
    report.matmul_s = min(times)
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
    seen = visible_gpus()
    if len(seen) == report.num_gpus:  # else nobody can tell which one it is
        gpu = seen[own_gpu_index(report.num_gpus)]
        report.gpu_uuid, report.gpu_used_bytes = gpu.uuid, gpu.used_bytes
        report.gpu_illness = illness(gpu.uuid)


def look_together(report: Report, timeout_s: float) -> None:
    """Fill in what takes all ranks: clocks, an all-reduce and its sum."""
    import torch
    import torch.distributed as dist

    kind = "cuda" if report.num_gpus else "cpu"
    device = torch.device("cuda", own_gpu_index(report.num_gpus)) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo",
                            timeout=datetime.timedelta(seconds=timeout_s),
                            device_id=device if kind == "cuda" else None)
    values = torch.ones(ALLREDUCE_BYTES[kind] // 4, device=device)
    dist.all_reduce(values)
    clocks = torch.zeros(dist.get_world_size(), dtype=torch.float64, device=device)
    dist.barrier()
    clocks[dist.get_rank()] = time.time()
    dist.all_reduce(clocks)
    report.clock_skew_s = float(clocks[dist.get_rank()] - clocks.median())
    values.fill_(1.0)
    start = time.perf_counter()
    dist.all_reduce(values)
    wrong = int((values != dist.get_world_size()).sum())  # waits for the device
    report.allreduce_s = time.perf_counter() - start
    if wrong:
        report.error = f"an all-reduce of ones over {dist.get_world_size()} ranks gave {wrong} wrong sums"
    dist.destroy_process_group()


def sick_nodes(folder: Path, nodes: list[str], limits: dict[str, Any]) -> dict[str, str]:
    """Return node -> why it is not fit, from the reports of its ranks; under "all nodes" what
    cannot be laid to one.

    Args:
        folder: where the reports lie.
        nodes: the nodes that were looked at.
        limits: fields of `PreflightConfig`, `num_gpus` and `ranks_per_node`.
    """
    reports = [Report(**json.loads(file.read_text(encoding="utf-8")))
               for file in sorted(folder.glob("rank-*.json"))]
    sick: dict[str, str] = {}
    written = Counter(r.node for r in reports)
    for node in nodes:
        if written[node] < limits["ranks_per_node"]:
            sick[node] = f"{written[node]} of {limits['ranks_per_node']} ranks came to look at it"
    if not reports:
        return {"all nodes": "no rank came to look at its node (see the pre-flight logs)"}
    usual_s = statistics.median(r.matmul_s for r in reports)
    usual_checksum = Counter(r.checksum for r in reports).most_common(1)[0][0]
    own = {node: {r.gpu_uuid for r in reports if r.node == node and r.gpu_uuid} for node in written}
    for r in reports:
        problem = _problem(r, limits, usual_s, usual_checksum, max(r.num_gpus, len(own[r.node])))
        if problem:
            sick.setdefault(r.node, f"rank {r.rank}: {problem}")
    if not sick and any(r.allreduce_s is None for r in reports):
        errors = Counter(r.error for r in reports if r.error).most_common(1)
        sick["all nodes"] = f"the all-reduce did not end ({errors[0][0] if errors else 'it hung'})"
    return sick


def _problem(r: Report, limits: dict[str, Any], usual_s: float, usual_checksum: float, num_gpus: int) -> str:
    """Return what is wrong with a rank's figures, or an empty string.

    Args:
        r: what it found.
        limits: as `sick_nodes` takes them.
        usual_s: the median of all ranks' products.
        usual_checksum: the sum of most of them.
        num_gpus: GPUs of its node, which its ranks see together.
    """
    skew_s, allreduce_s = r.clock_skew_s or 0.0, r.allreduce_s or 0.0
    rules = [
        (num_gpus >= limits["num_gpus"], f"{num_gpus} GPUs, {limits['num_gpus']} wanted"),
        (r.gpu_used_bytes <= limits["max_gpu_used_bytes"],
         f"{r.gpu_used_bytes / 1e9:.1f} GB of its GPU's memory were in use before the start, at most "
         f"{limits['max_gpu_used_bytes'] / 1e9:.1f} GB wanted"),
        (not r.gpu_illness, f"its GPU has {r.gpu_illness}"),
        (not r.transformer_engine_error,
         f"Transformer Engine does not import ({r.transformer_engine_error})"),
        (not r.disk_error, f"disk cannot be written ({r.disk_error})"),
        (r.disk_error or r.free_disk_bytes >= limits["min_free_disk_bytes"],
         f"{r.free_disk_bytes / 1e9:.1f} GB of disk free, {limits['min_free_disk_bytes'] / 1e9:.1f} "
         "GB wanted"),
        (r.checksum == usual_checksum,
         f"a matrix product sums to {r.checksum:g}, on the others to {usual_checksum:g}"),
        (r.matmul_s <= limits["max_matmul_ratio"] * usual_s,
         f"a matrix product takes {r.matmul_s * 1e3:.2f} ms, the others' median is {usual_s * 1e3:.2f} ms"),
        (r.matmul_tflops >= limits["min_matmul_tflops"],
         f"a matrix product runs at {r.matmul_tflops:.2f} TFLOP/s, {limits['min_matmul_tflops']:g} wanted"),
        (abs(skew_s) <= limits["max_clock_skew_s"], f"its clock is {skew_s:+.1f} s off the others"),
        (allreduce_s <= limits["max_allreduce_s"],
         f"the all-reduce took {allreduce_s:.2f} s, at most {limits['max_allreduce_s']:g} s wanted"),
    ]
    return next((sentence for holds, sentence in rules if not holds), "")


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
            report.error = report.error or told_in_a_line(e)
        atomic_write(file, to_json(asdict(report)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
