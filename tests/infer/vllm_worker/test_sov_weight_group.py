"""The process group over which a trainer sends policy weights to vLLM workers."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_sov.infer.engines.server_process import WORKER_FOLDER
from megatron_sov.infer.vllm_worker import sov_weight_group
from megatron_sov.infer.vllm_worker.sov_weight_group import (
    Meeting, WeightGroup, find_local_address, send_files)

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
    found = [subprocess.Popen([sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              text=True, env=environment, cwd="/") for _ in range(2)]
    yield found
    for worker in found:
        worker.kill()
        worker.communicate()


@pytest.fixture(autouse=True)
def _a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sov_weight_group, "BUCKET_BYTES", 64)
    monkeypatch.setattr(sov_weight_group, "find_local_address", lambda host, port: host)


def save_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], name: str = "0") -> str:
    save_file(dict(tensors), folder / name)
    return str(folder / name)


def call(workers: list[subprocess.Popen[str]], meeting: Mapping[str, Any]) -> None:
    for rank, worker in enumerate(workers, 1):
        assert worker.stdin is not None
        worker.stdin.write(json.dumps([rank, meeting]) + "\n")
        worker.stdin.flush()


def pair() -> tuple[WeightGroup, WeightGroup]:
    """Return a trainer and a worker, both in this process."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting, cpu, found = Meeting("127.0.0.1", store.port, 2, "gloo", 60), torch.device("cpu"), []
    trainer = threading.Thread(target=lambda: found.append(WeightGroup(meeting, 0, "127.0.0.1", cpu, store)))
    trainer.start()
    worker = WeightGroup(meeting, 1, "127.0.0.1", cpu)
    trainer.join()
    return found.pop(), worker


def read_line(worker: subprocess.Popen[str]) -> str:
    assert worker.stdout is not None
    return worker.stdout.readline().strip()


@pytest.mark.deep
def test_each_update_uses_a_new_group_until_a_worker_dies(workers: list[subprocess.Popen[str]],
                                                          tmp_path: Path) -> None:
    first, second = dict(list(TENSORS.items())[:3]), dict(list(TENSORS.items())[3:])
    before = threading.active_count()
    for sent in ([save_tensors(tmp_path, first), save_tensors(tmp_path, second, "1")],
                 [save_tensors(tmp_path, first, "2")]):
        found: list[dict[str, Any]] = []

        def receive(meeting: Mapping[str, Any], found: list[dict[str, Any]] = found) -> None:
            call(workers, meeting)
            assert [read_line(worker) for worker in workers] == ["begun", "begun"]
            found.extend(json.loads(read_line(worker)) for worker in workers)

        send_files(sent, URL, 2, receive)
        expected = {name: [str(t.dtype), list(t.shape), t.flatten().float().tolist()]
                    for name, t in (TENSORS if len(sent) == 2 else first).items()}
        assert found == [expected, expected]
        # the thread ends and releases its files
        wait_until(lambda: threading.active_count() <= before)


    # the tensors exceed the socket buffers
    large = {"a": torch.ones(1), "stop": torch.ones(1), **{f"w{i}": torch.ones(1 << 20) for i in range(12)}}
    never, began_s = threading.Event(), []

    def receive_no_more(meeting: Mapping[str, Any]) -> None:
        # the server itself does not say that a worker of its has died
        call(workers, meeting)
        assert [read_line(worker) for worker in workers] == ["begun", "begun"]
        workers[1].kill()
        began_s.append(time.monotonic())
        never.wait()

    with pytest.raises(RuntimeError, match="peer"):
        send_files([save_tensors(tmp_path, large)], URL, 2, receive_no_more)
    assert time.monotonic() - began_s[0] < 60
    never.set()


def test_stalled_worker_blocks_at_most_patience() -> None:
    trainer, worker = pair()
    for patience_s, is_over, said in ((0.2, False, "was not transferred within 0.2 s"),
                                      (60, True, "transfer was cancelled")):
        trainer._patience_s, over = patience_s, threading.Event()
        if is_over:
            over.set()
        with pytest.raises((TimeoutError, RuntimeError), match=said):
            trainer.send(iter(TENSORS.items()), over)
    worker.close()
    trainer.close()


def test_server_error_ends_the_transfer(tmp_path: Path) -> None:
    def receive(meeting: Mapping[str, Any]) -> None:
        raise ValueError("the engine is dead")

    before = threading.active_count()
    with pytest.raises(ValueError, match="the engine is dead"):
        send_files([save_tensors(tmp_path, TENSORS)], URL, 1, receive, patience_s=1)
    wait_until(lambda: threading.active_count() <= before)


def test_worker_gets_an_error_when_the_trainer_leaves() -> None:
    trainer, worker = pair()
    trainer.close()
    del trainer
    with pytest.raises(RuntimeError, match="peer"):
        list(worker.receive())


def test_local_address_is_the_address_seen_by_the_peer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as there:
        assert find_local_address("localhost", there.getsockname()[1]) == "127.0.0.1"


def wait_until(holds: Callable[[], bool]) -> None:
    ends_s = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < ends_s
        time.sleep(0.01)
