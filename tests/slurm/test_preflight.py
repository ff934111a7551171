"""The look at every node: what makes a node sick, and one real look by two ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.slurm.cluster import PreflightConfig
from megatron_sov.slurm.preflight import Report, sick_nodes

LIMITS = {**asdict(PreflightConfig()), "num_gpus": 8, "ranks_per_node": 1}
SOUND = Report("n1", 0, num_gpus=8, free_disk_bytes=10**12, matmul_s=0.002, matmul_tflops=600.0,
               checksum=17.0, clock_skew_s=0.01, allreduce_s=0.1)


def judge(folder: Path, *reports: Report, limits: dict[str, Any] = LIMITS) -> dict[str, str]:
    for i, report in enumerate(reports):
        (folder / f"rank-{i}.json").write_text(json.dumps(asdict(replace(report, rank=i))))
    return sick_nodes(folder, ["n1", "n2", "n3"], limits)


OTHERS = (SOUND, replace(SOUND, node="n3"))


def test_sound_nodes_pass(tmp_path: Path) -> None:
    assert judge(tmp_path, *OTHERS, replace(SOUND, node="n2")) == {}


@pytest.mark.parametrize(("changed", "why"), [
    ({"num_gpus": 7}, "7 GPUs, 8 wanted"),
    ({"disk_error": "/raid: Read-only file system", "free_disk_bytes": 0},
     "disk cannot be written (/raid: Read-only file system)"),
    ({"free_disk_bytes": 10**9}, "1.0 GB of disk free, 10.0 GB wanted"),
    ({"checksum": 18.0}, "a matrix product sums to 18, on the others to 17"),
    ({"matmul_s": 0.004}, "a matrix product takes 4.00 ms, the others' median is 2.00 ms"),
    ({"clock_skew_s": -30.0}, "its clock is -30.0 s off the others"),
    ({"allreduce_s": 11.0}, "the all-reduce took 11.00 s, at most 10 s wanted"),
])
def test_a_sick_node_is_named_with_the_figure(tmp_path: Path, changed: dict[str, Any], why: str) -> None:
    assert judge(tmp_path, *OTHERS, replace(SOUND, node="n2", **changed)) == {"n2": f"rank 2: {why}"}


def test_a_slow_product_counts_against_a_fixed_limit_too(tmp_path: Path) -> None:
    sick = judge(tmp_path, *OTHERS, replace(SOUND, node="n2"), limits={**LIMITS, "min_matmul_tflops": 700})
    assert set(sick) == {"n1", "n2", "n3"}


def test_a_rank_that_never_came_is_laid_to_its_node(tmp_path: Path) -> None:
    hung = [replace(r, allreduce_s=None, error="timeout") for r in OTHERS]
    assert judge(tmp_path, *hung) == {"n2": "0 of 1 ranks came to look at it"}


def test_an_all_reduce_that_fails_without_a_culprit_is_laid_to_none(tmp_path: Path) -> None:
    hung = [replace(r, allreduce_s=None, error="timeout") for r in (*OTHERS, replace(SOUND, node="n2"))]
    assert judge(tmp_path, *hung) == {"all nodes": "the all-reduce did not end (timeout)"}
    assert set(sick_nodes(tmp_path / "none", ["n1"], LIMITS)) == {"all nodes"}


def test_two_ranks_look_at_this_machine(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    read_only = Path("/proc/scratch")  # nothing can be written there, not even by root
    processes = [subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "megatron_sov.slurm.preflight", str(tmp_path), "--scratch",
         str(scratch)],
        env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT":
             port, "SLURMD_NODENAME": f"n{rank + 1}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
        for rank, scratch in enumerate((tmp_path / "new", read_only))]
    assert [p.wait(120) for p in processes] == [0, 0]
    limits = {**LIMITS, "num_gpus": 0, "min_free_disk_bytes": 1, "max_matmul_ratio": 1000}
    sick = sick_nodes(tmp_path, ["n1", "n2"], limits)
    assert set(sick) == {"n2"} and "disk cannot be written (/proc/scratch" in sick["n2"]
    report = Report(**json.loads((tmp_path / "rank-0.json").read_text()))
    assert report.matmul_tflops > 0 and report.allreduce_s is not None and report.clock_skew_s is not None
    assert report.error == "" and report.free_disk_bytes > 0
