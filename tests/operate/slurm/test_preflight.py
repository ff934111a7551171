"""The preflight check of nodes before a job: criteria of sick nodes, and a real check by two ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sov.operate.slurm import preflight_run
from megatron_sov.operate.slurm.attempts import find_sick_nodes
from megatron_sov.operate.slurm.node_report import NodeReport
from megatron_sov.operate.slurm.preflight_run import time_product
from megatron_sov.runs.gpu_driver import VisibleGpu
from megatron_sov.work.clusters.cluster import PreflightConfig

LIMITS = {**asdict(PreflightConfig()), "num_gpus": 8, "ranks_per_node": 1}
SOUND = NodeReport("n1", 0, num_gpus=8, free_disk_bytes=10**12, matmul_s=0.002, matmul_tflops=600.0,
                   checksum=17.0, clock_skew_s=0.01, allreduce_s=0.1)


def find_sick(folder: Path, *reports: NodeReport, limits: dict[str, Any] = LIMITS) -> dict[str, str]:
    """Write the reports as those of ranks 0, 1, ... on n1 to n3; return sick node -> reason."""
    for i, report in enumerate(reports):
        (folder / f"rank-{i}.json").write_text(json.dumps(asdict(replace(report, rank=i))))
    return find_sick_nodes(folder, ["n1", "n2", "n3"], limits)


OTHERS = (SOUND, replace(SOUND, node="n3"))


def test_sound_nodes_pass(tmp_path: Path) -> None:
    assert find_sick(tmp_path, *OTHERS, replace(SOUND, node="n2")) == {}


@pytest.mark.each(("changed", "message"), [
    ({"num_gpus": 7}, "7 GPUs, 8 wanted"),
    ({"disk_error": "/raid: Read-only file system", "free_disk_bytes": 0},
     "disk cannot be written (/raid: Read-only file system)"),
    ({"free_disk_bytes": 10**9}, "1.0 GB of disk free, 10.0 GB wanted"),
    ({"checksum": 18.0}, "a matrix product sums to 18, on the others to 17"),
    ({"matmul_s": 0.004}, "a matrix product takes 4.00 ms, the others' median is 2.00 ms"),
    ({"gpu_used_bytes": 9 * 10**9},
     "9.0 GB of its GPU's memory were in use before the start, at most 2.0 GB wanted"),
    ({"gpu_illness": "3 uncorrected memory errors (ECC)"}, "its GPU has 3 uncorrected memory errors (ECC)"),
    ({"transformer_engine_error": "OSError: libcublas.so.13: cannot open"},
     "Transformer Engine does not import (OSError: libcublas.so.13: cannot open)"),
    ({"clock_skew_s": -30.0}, "its clock is -30.0 s off the others"),
    ({"allreduce_s": 11.0}, "the all-reduce took 11.00 s, at most 10 s wanted"),
])
def test_a_sick_node_is_named_with_the_figure(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    assert find_sick(tmp_path, *OTHERS, replace(SOUND, node="n2", **changed)) == {"n2": f"rank 2: {message}"}


def test_single_gpu_ranks_see_all_gpus_of_the_node_together(tmp_path: Path) -> None:
    ranks = [replace(SOUND, node=node, num_gpus=1, gpu_uuid=f"{node}-{i}")
             for node, count in (("n1", 8), ("n2", 7), ("n3", 8)) for i in range(count)]
    sick = find_sick(tmp_path, *ranks)
    assert set(sick) == {"n2"} and sick["n2"].endswith(": 7 GPUs, 8 wanted")


def test_a_product_on_a_gpu_is_timed_by_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Doubles of CUDA events record the order of calls: only the product is between the two events."""
    calls: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            calls.append("mark")

        def synchronize(self) -> None:
            calls.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 0.65  # milliseconds

    class GpuMatrix:
        device = SimpleNamespace(type="cuda")

        def __matmul__(self, other: GpuMatrix) -> str:
            calls.append("product")
            return "product"

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert time_product(GpuMatrix(), GpuMatrix()) == ("product", pytest.approx(0.65e-3))
    assert calls == ["mark", "product", "mark", "wait"]


def test_a_rank_reports_its_driver_and_transformer_engine(tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight_run, "list_visible_gpus", lambda: [VisibleGpu(0, "a", "H100", 79 << 30, 0),
                                                            VisibleGpu(1, "b", "H100", 79 << 30, 5 << 30)])
    monkeypatch.setattr(preflight_run, "find_gpu_fault", lambda uuid: f"cold in {uuid}")
    monkeypatch.setenv("LOCAL_RANK", "1")
    report = NodeReport("n1", 1, num_gpus=2)
    preflight_run._inspect_gpu(report)
    assert (report.gpu_uuid, report.gpu_used_bytes, report.gpu_illness) == ("b", 5 << 30, "cold in b")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "transformer_engine.py").write_text("raise OSError('libcublas.so.13: cannot open\\nmore')")
    monkeypatch.setattr(preflight_run, "MATMUL_SIZE", {"cpu": 8})
    report = NodeReport("n1", 0)
    preflight_run.inspect_node(report, tmp_path / "scratch", transformer_engine=True)
    assert report.transformer_engine_error == "OSError: libcublas.so.13: cannot open"
    assert report.matmul_tflops > 0


def test_a_slow_product_counts_against_a_fixed_limit_too(tmp_path: Path) -> None:
    limits = {**LIMITS, "min_matmul_tflops": 700}
    sick = find_sick(tmp_path, *OTHERS, replace(SOUND, node="n2"), limits=limits)
    assert set(sick) == {"n1", "n2", "n3"}


def test_a_rank_that_never_came_is_laid_to_its_node(tmp_path: Path) -> None:
    hung = [replace(r, allreduce_s=None, error="timeout") for r in OTHERS]
    assert find_sick(tmp_path, *hung) == {"n2": "0 of 1 ranks came to look at it"}


def test_an_all_reduce_failure_without_a_culprit_blames_no_node(tmp_path: Path) -> None:
    hung = [replace(r, allreduce_s=None, error="timeout") for r in (*OTHERS, replace(SOUND, node="n2"))]
    assert find_sick(tmp_path, *hung) == {"all nodes": "the all-reduce did not end (timeout)"}
    assert set(find_sick_nodes(tmp_path / "none", ["n1"], LIMITS)) == {"all nodes"}


def test_two_ranks_look_at_this_machine(tmp_path: Path, warm_python: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    read_only = Path("/proc/scratch")  # a folder in which not even root can write
    processes = [subprocess.Popen(
        [warm_python, "-m", "megatron_sov.operate.slurm.preflight", str(tmp_path), "--scratch", str(scratch),
         "--timeout-s", "600"],
        env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT":
             port, "SLURMD_NODENAME": f"n{rank + 1}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
        for rank, scratch in enumerate((tmp_path / "new", read_only))]
    assert [p.wait(600) for p in processes] == [0, 0]
    limits = {**LIMITS, "num_gpus": 0, "min_free_disk_bytes": 1, "max_matmul_ratio": 1000}
    sick = find_sick_nodes(tmp_path, ["n1", "n2"], limits)
    assert set(sick) == {"n2"} and "disk cannot be written (/proc/scratch" in sick["n2"]
    report = NodeReport(**json.loads((tmp_path / "rank-0.json").read_text()))
    assert report.matmul_tflops > 0 and report.allreduce_s is not None and report.clock_skew_s is not None
    assert report.error == "" and report.free_disk_bytes > 0
