"""Runs `megatron-sov serve`: serves a model over HTTP until a signal or the end of the parent process."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator

import psutil

from megatron_sov.base.artifacts import write_output
from megatron_sov.base.errors import UserError
from megatron_sov.commands.models.serve import ServeRequest
from megatron_sov.infer.engines.live_generation import generate_live
from megatron_sov.infer.engines.load import LoadedModel, run_forward_model
from megatron_sov.infer.engines.target import Target, find_target
from megatron_sov.infer.engines.transformers_engine import check_cache_support, load_configured_hf
from megatron_sov.runs.launch_environment import is_first_rank
from megatron_sov.serve.bodies import RequestEncoder
from megatron_sov.serve.http_server import HttpServer
from megatron_sov.serve.scheduler import BatchScheduler, RequestQueue
from megatron_sov.serve.settings import DEFAULT_LENGTH_TOKENS, ServeSettings
from megatron_sov.serve.transformers_batching import run_transformers_batching
from megatron_sov.work.processes.stop_signals import StopFlag
from megatron_sov.work.progress.locks import has_ended, process_identity

POLL_S = 1.0
"""Interval between checks of the parent process."""


def serve_target(request: ServeRequest) -> None:
    """Serve checkpoints with our decoder, Hugging Face folders with transformers' continuous batching. Raises
    `UserError`: an unusable model, tokenizer or address. Raises `SystemExit`: another rank failed and printed
    the reason."""
    target, settings = find_target(request.target), request.settings
    parent = ParentProcess(settings.parent_pid)
    max_length = _choose_max_length(target, settings)
    encoder = RequestEncoder(target, max_length)
    flag = StopFlag()
    if settings.address_file is not None and is_first_rank():
        settings.address_file.unlink(missing_ok=True)  # left by a killed server

    @contextlib.contextmanager
    def open_scheduler() -> Iterator[BatchScheduler]:
        queue = RequestQueue(settings.max_waiting)
        with _run_http_server(HttpServer(settings, queue, encoder, time.time(), max_length), settings):
            yield BatchScheduler(queue, encoder, lambda: flag.reason, parent.has_ended)

    def run_rank(loaded: LoadedModel) -> None:
        """Generate on every rank; only the main rank has an HTTP server."""
        if not loaded.world.is_main:
            # the first rank receives the requests and shares them
            generate_live(loaded.policy, settings.batching, max_length, source=None)
            return
        with open_scheduler() as scheduler:
            generate_live(loaded.policy, settings.batching, max_length, scheduler)

    if not target.is_hf:
        run_forward_model(target, request.changes, request.nproc, run_rank)
        return
    model = load_configured_hf(target.path, request.changes)
    check_cache_support(model.config, "serve a checkpoint from `megatron-sov convert from-hf`")
    with open_scheduler() as scheduler:
        run_transformers_batching(model, settings.batching, max_length, scheduler)


@contextlib.contextmanager
def _run_http_server(server: HttpServer, settings: ServeSettings) -> Iterator[None]:
    """Run the server during the block, and write its address file."""
    server.start()
    try:
        file = settings.address_file
        if file is not None:
            address = {"url": server.url, "model": settings.name, "pid": os.getpid()}
            write_output(file, json.dumps(address) + "\n")
        print(f"{settings.name} answers at {server.url}; Ctrl-C or SIGTERM "
              f"ends it\n  chat page  {server.url.removesuffix('v1')}", file=sys.stderr, flush=True)
        try:
            yield
        finally:
            if file is not None:
                # before the server stops: readers must not find an address that no server answers
                file.unlink(missing_ok=True)
    finally:
        server.stop()


def _choose_max_length(target: Target, settings: ServeSettings) -> int:
    """Return the maximum length of a prompt with its answer, in tokens."""
    if settings.max_length_tokens is None:
        return int(min(target.max_tokens, DEFAULT_LENGTH_TOKENS))
    if settings.max_length_tokens > target.max_tokens:
        raise UserError(f"--max-length {settings.max_length_tokens}: the model ends at {target.max_tokens}; "
                        "choose less")
    return settings.max_length_tokens


class ParentProcess:
    """The process from `--parent-pid`: when it ends, the server stops."""

    def __init__(self, pid: int | None) -> None:
        """Record a process's start time; None for no parent. Raises `UserError`: no such process."""
        self._record: dict[str, object] | None = None
        self._next_poll_s = 0.0
        if pid is None:
            return
        try:
            # the parent is on this host and in this process table; its start time distinguishes it from a
            # later process with the same pid
            self._record = process_identity() | {"pid": pid, "started_s": psutil.Process(pid).create_time()}
        except psutil.Error:
            raise UserError(f"--parent-pid {pid}: there is no such process; start the server from a running "
                            "process") from None

    def has_ended(self) -> bool:
        """Return whether the process has ended, checked every `POLL_S`."""
        # the scheduler calls this before each forward pass
        if self._record is None or time.monotonic() < self._next_poll_s:
            return False
        self._next_poll_s = time.monotonic() + POLL_S
        return has_ended(self._record) is True  # None (unknown) must not stop the server
