"""Send weights from the trainer (rank 0) to the workers of a server, over a new process group for each
update.

Imports only torch and safetensors, because vLLM workers import this file by name in their own environment.
"""

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
"""Bytes per broadcast; a larger tensor is sent alone."""
PATIENCE_S = 120.0
"""Timeout for forming the group and for each broadcast, after which a silent process counts as dead."""
_ALIGNED = 16
"""Tensor alignment in a bucket, in bytes: the bytes can be viewed as any dtype."""
_POLL_INTERVAL_S = 0.0005
_NCCL_ERROR_HANDLING, _CLEAN_UP_ONLY = "TORCH_NCCL_ASYNC_ERROR_HANDLING", "2"
"""Environment variable, and its value for aborting a failed group without ending the process."""
_ENVIRONMENT_LOCK = threading.Lock()
"""Held while `_NCCL_ERROR_HANDLING` is changed."""


@dataclass(frozen=True)
class Meeting:
    """Rendezvous: what each process needs to join the process group."""

    host: str
    port: int
    size: int
    """Processes in the group, including the trainer."""
    backend: str
    """`nccl` or `gloo`."""
    patience_s: float = PATIENCE_S


class WeightGroup:
    """Process group for a single transfer.

    Tensors travel in buckets of three broadcasts: the sizes of header and bucket, the header as JSON, and the
    bucket. The sizes (0, 0) end the transfer.

    Each bucket takes three broadcasts: the sizes of header and data, the JSON header (name, dtype, shape and
    start of each tensor), and the data. Header size 0 ends the transfer.

    Args:
        meeting: rendezvous.
        rank: rank of this process.
        host: address of this machine that other processes can reach.
        device: device of the buffers; a GPU for NCCL.
        store: store of the trainer at the port of `meeting`.
    """

    def __init__(self, meeting: Meeting, rank: int, host: str, device: torch.device,
                 store: dist.TCPStore | None = None) -> None:
        self._patience_s, self._device = meeting.patience_s, device
        limit = datetime.timedelta(seconds=meeting.patience_s)
        self._store = store or dist.TCPStore(meeting.host, meeting.port, is_master=False,
                                             wait_for_workers=False, timeout=limit)
        self._group: Any
        if meeting.backend == "nccl":
            self._group = _create_nccl_group(self._store, rank, meeting)
        else:
            options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            # By address: environment variables for network interfaces are meant for each side's own groups.
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
            options._timeout = limit
            self._group = dist.ProcessGroupGloo(self._store, rank, meeting.size, options)

    def close(self) -> None:
        """Leave the group, also during a transfer."""
        if self._device.type == "cuda":
            self._group.abort()
        self._group = None

    def send(self, tensors: Iterator[tuple[str, torch.Tensor]], is_over: threading.Event) -> None:
        """Send `tensors` to the other processes; raises RuntimeError once `is_over` is set."""
        bucket: list[tuple[str, torch.Tensor]] = []
        size_bytes = 0
        for name, tensor in tensors:
            if bucket and size_bytes + tensor.nbytes > BUCKET_BYTES:
                self._send_bucket(bucket, is_over)
                bucket, size_bytes = [], 0
            bucket.append((name, tensor))
            size_bytes += tensor.nbytes
        if bucket:
            self._send_bucket(bucket, is_over)
        self._broadcast(torch.zeros(2, dtype=torch.int64), is_over)

    def receive(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the received tensors on the device; tensors in a bucket share memory."""
        while True:
            header_bytes, bucket_bytes = self._broadcast(torch.zeros(2, dtype=torch.int64)).tolist()
            if not header_bytes:
                return
            header, bucket = (self._broadcast(torch.empty(size, dtype=torch.uint8, device=self._device))
                              for size in (header_bytes, bucket_bytes))
            for name, dtype_name, shape, start in json.loads(bytes(header.tolist())):
                dtype = getattr(torch, dtype_name)
                end = start + math.prod(shape) * dtype.itemsize
                yield name, bucket[start:end].view(dtype).view(shape)

    def _send_bucket(self, tensors: Sequence[tuple[str, torch.Tensor]], is_over: threading.Event) -> None:
        entries, size_bytes = [], 0
        for name, tensor in tensors:
            entries.append((name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), size_bytes))
            size_bytes += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        bucket = torch.zeros(size_bytes, dtype=torch.uint8, device=self._device)
        for (_, tensor), (*_, start) in zip(tensors, entries, strict=True):
            bucket[start:start + tensor.nbytes].copy_(tensor.reshape(-1).view(torch.uint8))
        header = torch.frombuffer(bytearray(json.dumps(entries).encode()), dtype=torch.uint8)
        for part in (torch.tensor([len(header), size_bytes]), header, bucket):
            self._broadcast(part, is_over)

    def _broadcast(self, tensor: torch.Tensor, is_over: threading.Event | None = None) -> torch.Tensor:
        """Broadcast from the trainer; return the tensor."""
        tensor = tensor.to(self._device)
        work = self._group.broadcast(tensor, 0)
        ends_s = time.monotonic() + self._patience_s
        while not work.is_completed():
            if is_over is not None and is_over.is_set():
                raise RuntimeError("the transfer was cancelled")
            if time.monotonic() >= ends_s:
                raise TimeoutError(f"a part of the weights was not transferred within {self._patience_s:g} s")
            time.sleep(_POLL_INTERVAL_S)
        # raises the transfer's error, if any
        work.wait()
        return tensor


def _create_nccl_group(store: dist.TCPStore, rank: int, meeting: Meeting) -> Any:
    with _ENVIRONMENT_LOCK:
        # torch reads the variable when it creates the group; by default this process ends when a peer dies.
        before = os.environ.get(_NCCL_ERROR_HANDLING)
        os.environ[_NCCL_ERROR_HANDLING] = _CLEAN_UP_ONLY
        try:
            options = dist.ProcessGroupNCCL.Options()
            # longer than `patience_s`, which must fire first
            options._timeout = datetime.timedelta(seconds=10 * meeting.patience_s)
            return dist.ProcessGroupNCCL(store, rank, meeting.size, options)
        finally:
            if before is None:
                del os.environ[_NCCL_ERROR_HANDLING]
            else:
                os.environ[_NCCL_ERROR_HANDLING] = before


def read_files(files: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) from safetensors files."""
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                yield name, opened.get_tensor(name)


def find_local_address(host: str, port: int) -> str:
    """Return this machine's address for connections from another machine."""
    with socket.create_connection((host, port), PATIENCE_S) as connection:
        return str(connection.getsockname()[0])


def send_files(files: Sequence[str], url: str, num_workers: int,
               receive: Callable[[Mapping[str, Any]], Any], device: str = "cpu",
               patience_s: float = PATIENCE_S) -> None:
    """Send the tensors in `files` to a server's workers; a step blocks at most `patience_s`.

    Args:
        files: safetensors files.
        url: address of the server.
        num_workers: number of worker processes with weights.
        receive: makes the server receive; called with the fields of the `Meeting`, returns when all workers
            are done.
        device: device of the buffers: a GPU of this process, or the CPU.
        patience_s: timeout of each step.

    Raises:
        RuntimeError, OSError: the transfer failed; errors of `receive` are raised too.
    """
    address = urllib.parse.urlsplit(url)
    host = find_local_address(address.hostname or "", address.port or 80)
    store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False,
                          timeout=datetime.timedelta(seconds=patience_s))
    torch_device = torch.device(device)
    meeting = Meeting(host, store.port, 1 + num_workers, "nccl" if torch_device.type == "cuda" else "gloo",
                      patience_s)
    is_over = threading.Event()
    results: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def send_weights() -> None:
        with contextlib.closing(WeightGroup(meeting, 0, host, torch_device, store)) as group:
            group.send(read_files(files), is_over)
            # keep the group: closing the group would break transfers to slower workers
            is_over.wait()

    def run_and_report(work: Callable[[], Any], is_last: bool) -> None:
        try:
            work()
        except BaseException as e:
            results.put(e)
        else:
            if is_last:
                results.put(None)

    # library calls may block forever: run the calls in daemon threads and never join the threads
    for work, is_last in ((send_weights, False), (partial(receive, dataclasses.asdict(meeting)), True)):
        threading.Thread(target=run_and_report, args=(work, is_last), daemon=True).start()
    try:
        if (error := results.get()) is not None:
            raise error
    finally:
        is_over.set()
