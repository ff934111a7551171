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
                   checksum=17.0, clock_skew_s=0.01, allreduce_s=0.1, exchange_s=0.001)


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
    ({"exchange_s": 0.004},
     "an exchange with its fastest partner takes 4.00 ms, the others' median is 1.00 ms"),
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
    gpus = [VisibleGpu(0, "a", "H100", 79 << 30, 0), VisibleGpu(1, "b", "H100", 79 << 30, 5 << 30)]
    monkeypatch.setattr(preflight_run, "list_visible_gpus", lambda: gpus)
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


def test_failed_messages_without_a_culprit_blames_no_node(tmp_path: Path) -> None:
    hung = [replace(r, allreduce_s=None, error="timeout") for r in (*OTHERS, replace(SOUND, node="n2"))]
    assert find_sick(tmp_path, *hung) == {"all nodes": "messages between the ranks failed (timeout)"}
    wrong = [replace(r, error="3 wrong sums") for r in (*OTHERS, replace(SOUND, node="n2"))]
    assert find_sick(tmp_path, *wrong) == {"all nodes": "messages between the ranks failed (3 wrong sums)"}
    assert set(find_sick_nodes(tmp_path / "none", ["n1"], LIMITS)) == {"all nodes"}


SLOW_SENDS = """import sys, time
import torch.distributed as dist
send = dist.batch_isend_irecv
dist.batch_isend_irecv = lambda messages: (time.sleep(1), send(messages))[1]
from megatron_sov.operate.slurm.preflight import main
main(sys.argv[1:])
"""
"""Preflight of a rank whose exchanges take a second longer."""


def run_preflight(python: str, folder: Path, commands: list[list[str]]) -> None:
    """Run a rank of a node of its own per command, which are python's arguments before the preflight's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT":
                   port, "LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    processes = [subprocess.Popen([python, *command[:2], str(folder), "--timeout-s", "600", *command[2:]],
                                  env={**environment, "RANK": str(rank), "SLURMD_NODENAME": f"n{rank + 1}"})
                 for rank, command in enumerate(commands)]
    assert [p.wait(600) for p in processes] == [0] * len(commands)


def test_the_node_with_slow_exchanges_is_named(tmp_path: Path, warm_python: str) -> None:
    """Of four nodes in groups of two, both members of a group see its slow all-to-all; exchanges with other
    nodes tell them apart."""
    sound, slow = ["-m", "megatron_sov.operate.slurm.preflight"], ["-c", SLOW_SENDS]
    run_preflight(warm_python, tmp_path, [[*words, "--group-size", "2"]
                                          for words in (sound, sound, slow, sound)])
    reports = [NodeReport(**json.loads((tmp_path / f"rank-{rank}.json").read_text())) for rank in range(4)]
    assert all(r.error == "" and r.alltoall_s > 0 for r in reports)
    usual_s = max(r.exchange_s for r in reports if r.rank != 2)
    assert usual_s < 1 < reports[2].exchange_s
    limits = {**LIMITS, "num_gpus": 0, "min_free_disk_bytes": 1, "max_matmul_ratio": 1000,
              "max_exchange_ratio": 1 / usual_s}
    sick = find_sick_nodes(tmp_path, ["n1", "n2", "n3", "n4"], limits)
    assert set(sick) == {"n3"} and "rank 2: an exchange with its fastest partner takes" in sick["n3"]


def test_two_ranks_look_at_this_machine(tmp_path: Path, warm_python: str) -> None:
    read_only = Path("/proc/scratch")  # a folder in which not even root can write
    run_preflight(warm_python, tmp_path, [
        ["-m", "megatron_sov.operate.slurm.preflight", "--scratch", str(scratch)]
        for scratch in (tmp_path / "new", read_only)])
    limits = {**LIMITS, "num_gpus": 0, "min_free_disk_bytes": 1, "max_matmul_ratio": 1000}
    sick = find_sick_nodes(tmp_path, ["n1", "n2"], limits)
    assert set(sick) == {"n2"} and "disk cannot be written (/proc/scratch" in sick["n2"]
    report = NodeReport(**json.loads((tmp_path / "rank-0.json").read_text()))
    assert report.matmul_tflops > 0 and report.allreduce_s is not None and report.clock_skew_s is not None
    assert report.error == "" and report.free_disk_bytes > 0
