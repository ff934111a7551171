"""Weights over a group of processes, made anew for each time: the trainer's is 0, and a server's workers are
the others.

Torch alone is imported: vLLM's workers have this file by its name, in an environment of their own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import math
import os
import queue
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open

BUCKET_BYTES = 1 << 28
"""Of tensors that are sent at a time; a larger one goes alone."""
PATIENCE_S = 120.0
"""For all to come, and for each step of a bucket: whoever does not take it by then counts as dead."""
_ALIGNED = 16
"""Bytes that a tensor begins at a multiple of, so that it can be seen as its own type."""
_LOOK_S = 0.0005
_WHEN_IT_FAILS, _CLEAN_UP_ONLY = "TORCH_NCCL_ASYNC_ERROR_HANDLING", "2"
_CHANGING_ENVIRONMENT = threading.Lock()


@dataclass(frozen=True)
class Meeting:
    """Where a group meets."""

    host: str
    port: int
    size: int
    """Processes, the trainer's among them."""
    backend: str
    """nccl or gloo."""
    patience_s: float = PATIENCE_S


class WeightGroup:
    """A group, as one of its processes sees it."""

    def __init__(self, meeting: Meeting, rank: int, host: str, device: torch.device,
                 store: dist.TCPStore | None = None) -> None:
        """Meet the others.

        Args:
            meeting: where.
            rank: of this process.
            host: address of this machine that the others reach.
            device: of the buffers, a GPU under NCCL.
            store: of the trainer, whose port the meeting has.
        """
        self._patience_s, self._device = meeting.patience_s, device
        limit = datetime.timedelta(seconds=meeting.patience_s)
        self._store = store or dist.TCPStore(meeting.host, meeting.port, is_master=False,
                                             wait_for_workers=False, timeout=limit)
        self._group: Any
        if meeting.backend == "nccl":
            self._group = _nccl_group(self._store, rank, meeting)
        else:
            options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            # by name: an environment's choice of a network is for the groups of each side alone
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
            options._timeout = limit
            self._group = dist.ProcessGroupGloo(self._store, rank, meeting.size, options)

    def close(self) -> None:
        """Leave, whether or not something is under way."""
        if self._device.type == "cuda":
            self._group.abort()
        self._group = None

    def send(self, tensors: Iterator[tuple[str, torch.Tensor]], is_over: threading.Event) -> None:
        """Give all of them to the others; ends with an error once `is_over`."""
        held: list[tuple[str, torch.Tensor]] = []
        size_bytes = 0
        for name, tensor in tensors:
            if held and size_bytes + tensor.nbytes > BUCKET_BYTES:
                self._send_bucket(held, is_over)
                held, size_bytes = [], 0
            held.append((name, tensor))
            size_bytes += tensor.nbytes
        if held:
            self._send_bucket(held, is_over)
        self._broadcast(torch.zeros(2, dtype=torch.int64), is_over)

    def receive(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Give what is sent, on the device; each bucket lives for as long as one of its tensors does."""
        while True:
            num_told, num_bytes = self._broadcast(torch.zeros(2, dtype=torch.int64)).tolist()
            if not num_told:
                return
            told, bucket = (self._broadcast(torch.empty(size, dtype=torch.uint8, device=self._device))
                            for size in (num_told, num_bytes))
            for name, kind, shape, start in json.loads(bytes(told.tolist())):
                dtype = getattr(torch, kind)
                end = start + math.prod(shape) * dtype.itemsize
                yield name, bucket[start:end].view(dtype).view(shape)

    def _send_bucket(self, held: Sequence[tuple[str, torch.Tensor]], is_over: threading.Event) -> None:
        told, size_bytes = [], 0
        for name, tensor in held:
            told.append((name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), size_bytes))
            size_bytes += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        bucket = torch.zeros(size_bytes, dtype=torch.uint8, device=self._device)
        for (_, tensor), (*_, start) in zip(held, told, strict=True):
            bucket[start:start + tensor.nbytes].copy_(tensor.reshape(-1).view(torch.uint8))
        header = torch.frombuffer(bytearray(json.dumps(told).encode()), dtype=torch.uint8)
        for part in (torch.tensor([len(header), size_bytes]), header, bucket):
            self._broadcast(part, is_over)

    def _broadcast(self, tensor: torch.Tensor, is_over: threading.Event | None = None) -> torch.Tensor:
        """Return what the trainer has in it."""
        tensor = tensor.to(self._device)
        work = self._group.broadcast(tensor, 0)
        ends_s = time.monotonic() + self._patience_s
        while not work.is_completed():
            if is_over is not None and is_over.is_set():
                raise RuntimeError("nobody waits for the weights any more")
            if time.monotonic() >= ends_s:
                raise TimeoutError(f"a part of the weights has not moved for {self._patience_s:g} s")
            time.sleep(_LOOK_S)
        # what went wrong comes with it
        work.wait()
        return tensor


def _nccl_group(store: dist.TCPStore, rank: int, meeting: Meeting) -> Any:
    with _CHANGING_ENVIRONMENT:
        # read while a group is made: by default it ends its whole process when another one has died
        before = os.environ.get(_WHEN_IT_FAILS)
        os.environ[_WHEN_IT_FAILS] = _CLEAN_UP_ONLY
        try:
            options = dist.ProcessGroupNCCL.Options()
            # of its own watch, which is not to come before whoever waits here
            options._timeout = datetime.timedelta(seconds=10 * meeting.patience_s)
            return dist.ProcessGroupNCCL(store, rank, meeting.size, options)
        finally:
            if before is None:
                del os.environ[_WHEN_IT_FAILS]
            else:
                os.environ[_WHEN_IT_FAILS] = before


def read_files(files: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Give all tensors of safetensors files."""
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                yield name, opened.get_tensor(name)


def own_host(host: str, port: int) -> str:
    """Return the address of this machine that another one sees."""
    with socket.create_connection((host, port), PATIENCE_S) as there:
        return str(there.getsockname()[0])


def send_files(files: Sequence[str], url: str, num_workers: int,
               receive: Callable[[Mapping[str, Any]], Any], device: str = "cpu",
               patience_s: float = PATIENCE_S) -> None:
    """Send the tensors of files to the workers of one server.

    Neither a worker that has died nor one that stands still holds this up for longer than `patience_s`.

    Args:
        files: safetensors.
        url: of the server.
        num_workers: its processes that hold weights.
        receive: has the server receive; is told the meeting, and returns once all workers have all.
        device: that the weights go through, a GPU of this process or the CPU.
        patience_s: for each step.

    Raises:
        RuntimeError, OSError: the weights do not arrive; so does whatever `receive` raises.
    """
    where = urllib.parse.urlsplit(url)
    host = own_host(where.hostname or "", where.port or 80)
    store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False,
                          timeout=datetime.timedelta(seconds=patience_s))
    through = torch.device(device)
    meeting = Meeting(host, store.port, 1 + num_workers, "nccl" if through.type == "cuda" else "gloo",
                      patience_s)
    is_over = threading.Event()
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def send() -> None:
        with contextlib.closing(WeightGroup(meeting, 0, host, through, store)) as group:
            group.send(read_files(files), is_over)
            # a group that goes takes away what a worker still reads
            is_over.wait()

    def begin(work: Callable[[], Any], is_last: bool) -> None:
        try:
            work()
        except BaseException as e:
            ended.put(e)
        else:
            if is_last:
                ended.put(None)

    # both may stand still for as long as libraries like, in threads that nobody waits for
    for work, is_last in ((send, False), (partial(receive, dataclasses.asdict(meeting)), True)):
        threading.Thread(target=begin, args=(work, is_last), daemon=True).start()
    try:
        if (error := ended.get()) is not None:
            raise error
    finally:
        is_over.set()
