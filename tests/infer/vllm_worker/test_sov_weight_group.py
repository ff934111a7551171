"""The process group over which a trainer sends policy weights to vLLM workers."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_sov.infer.engines.server_process import WORKER_FOLDER
from megatron_sov.infer.vllm_worker import sov_weight_group
from megatron_sov.infer.vllm_worker.sov_weight_group import (
    Meeting, WeightGroup, find_local_address, send_files)
from tests.waiting import wait_until

WORKER = """
import contextlib, json, sys
import torch
from sov_weight_group import Meeting, WeightGroup, find_local_address
for line in sys.stdin:
    rank, told = json.loads(line)
    meeting, found = Meeting(**told), {}
    with contextlib.closing(WeightGroup(meeting, rank, find_local_address(meeting.host, meeting.port),
                                        torch.device("cpu"))) as group:
        for name, tensor in group.receive():
            if not found:
                print("begun", flush=True)
            found[name] = [str(tensor.dtype), list(tensor.shape), tensor.flatten().float().tolist()]
            if name == "stop":
                sys.stdin.readline()
        print(json.dumps(found), flush=True)
"""
URL = "http://127.0.0.1:1"
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(2.5, dtype=torch.bfloat16),
           "c": torch.arange(5, dtype=torch.int8), "d": torch.empty(0, 4),
           "larger than a bucket": torch.arange(40.0, dtype=torch.float64)}


@pytest.fixture
def workers() -> Iterator[list[subprocess.Popen[str]]]:
    """Start two processes as vLLM does, with only the worker's folder on their path."""
    environment = {**os.environ, "PYTHONPATH": str(WORKER_FOLDER), "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen([sys.executable, "-c", WORKER], stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE,
                                  text=True, env=environment, cwd="/") for _ in range(2)]
    yield processes
    for worker in processes:
        worker.kill()
        worker.communicate()


@pytest.fixture(autouse=True)
def _use_local_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sov_weight_group, "BUCKET_BYTES", 64)
    monkeypatch.setattr(sov_weight_group, "find_local_address", lambda host, port: host)


def save_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], name: str = "0") -> str:
    save_file(dict(tensors), folder / name)
    return str(folder / name)


def start_receiving(workers: list[subprocess.Popen[str]], meeting: Mapping[str, Any]) -> None:
    for rank, worker in enumerate(workers, 1):
        assert worker.stdin is not None
        worker.stdin.write(json.dumps([rank, meeting]) + "\n")
        worker.stdin.flush()


def build_group_pair() -> tuple[WeightGroup, WeightGroup]:
    """Return the groups of a trainer and of a worker, both in this process."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting, cpu, groups = Meeting("127.0.0.1", store.port, 2, "gloo", 60), torch.device("cpu"), []
    trainer = threading.Thread(target=lambda: groups.append(WeightGroup(meeting, 0, "127.0.0.1", cpu, store)))
    trainer.start()
    worker = WeightGroup(meeting, 1, "127.0.0.1", cpu)
    trainer.join()
    return groups.pop(), worker


def read_line(worker: subprocess.Popen[str]) -> str:
    assert worker.stdout is not None
    return worker.stdout.readline().strip()


@pytest.mark.deep
def test_each_update_uses_a_new_group_until_a_worker_dies(workers: list[subprocess.Popen[str]],
                                                          tmp_path: Path) -> None:
    first_tensors, second_tensors = dict(list(TENSORS.items())[:3]), dict(list(TENSORS.items())[3:])
    num_threads = threading.active_count()
    for files in ([save_tensors(tmp_path, first_tensors), save_tensors(tmp_path, second_tensors, "1")],
                 [save_tensors(tmp_path, first_tensors, "2")]):
        received: list[dict[str, Any]] = []

        def receive(meeting: Mapping[str, Any], received: list[dict[str, Any]] = received) -> None:
            start_receiving(workers, meeting)
            assert [read_line(worker) for worker in workers] == ["begun", "begun"]
            received.extend(json.loads(read_line(worker)) for worker in workers)

        send_files(files, URL, 2, receive)
        expected = {name: [str(t.dtype), list(t.shape), t.flatten().float().tolist()]
                    for name, t in (TENSORS if len(files) == 2 else first_tensors).items()}
        assert received == [expected, expected]
        # The sending thread ends.
        wait_until(lambda: threading.active_count() <= num_threads)

    # These tensors are larger than the socket buffers: the trainer still sends when the worker dies.
    many_tensors = {"a": torch.ones(1), "stop": torch.ones(1),
                    **{f"w{i}": torch.ones(1 << 20) for i in range(12)}}
    forever, began_s = threading.Event(), []

    def receive_no_more(meeting: Mapping[str, Any]) -> None:
        # A vLLM server does not report that one of its workers has died.
        start_receiving(workers, meeting)
        assert [read_line(worker) for worker in workers] == ["begun", "begun"]
        workers[1].kill()
        began_s.append(time.monotonic())
        forever.wait()

    with pytest.raises(RuntimeError, match="peer"):
        send_files([save_tensors(tmp_path, many_tensors)], URL, 2, receive_no_more)
    assert time.monotonic() - began_s[0] < 60
    forever.set()


def test_stalled_worker_blocks_at_most_patience() -> None:
    trainer, worker = build_group_pair()
    for patience_s, is_cancelled, message in ((0.2, False, "was not transferred within 0.2 s"),
                                              (60, True, "transfer was cancelled")):
        trainer._patience_s, cancelled = patience_s, threading.Event()
        if is_cancelled:
            cancelled.set()
        with pytest.raises((TimeoutError, RuntimeError), match=message):
            trainer.send(iter(TENSORS.items()), cancelled)
    worker.close()
    trainer.close()


def test_server_error_ends_the_transfer(tmp_path: Path) -> None:
    def receive(meeting: Mapping[str, Any]) -> None:
        raise ValueError("the engine is dead")

    num_threads = threading.active_count()
    with pytest.raises(ValueError, match="the engine is dead"):
        send_files([save_tensors(tmp_path, TENSORS)], URL, 1, receive, patience_s=1)
    wait_until(lambda: threading.active_count() <= num_threads)


def test_worker_gets_an_error_when_the_trainer_leaves() -> None:
    trainer, worker = build_group_pair()
    trainer.close()
    del trainer
    with pytest.raises(RuntimeError, match="peer"):
        list(worker.receive())


def test_local_address_is_the_address_seen_by_the_peer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert find_local_address("localhost", server.getsockname()[1]) == "127.0.0.1"
