"""A model that is loaded on its processes and answers until it is asked to stop."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence

import psutil

from megatron_sov.base.artifacts import write_output
from megatron_sov.base.errors import UserError
from megatron_sov.infer.engines.live import continue_live
from megatron_sov.infer.engines.load import Loaded, run_forward_model
from megatron_sov.infer.engines.target import Target
from megatron_sov.runs.launch_environment import is_first
from megatron_sov.serve.bodies import BodyReader
from megatron_sov.serve.http_server import HttpServer
from megatron_sov.serve.scheduler import Clerk, RequestQueue
from megatron_sov.serve.settings import DEFAULT_LENGTH_TOKENS, ServeSettings
from megatron_sov.train.stopping import StopFlag
from megatron_sov.work.progress.locks import has_ended, identity

LOOKS_S = 1.0
"""How often it is looked whether the parent lives."""


def serve(target: Target, settings: ServeSettings, layout: Sequence[str], nproc: int | None) -> None:
    """Serve a model until a signal asks for the end, or its parent has ended.

    Args:
        target: the model.
        settings: where and for whom.
        layout: `key=value` changes of layout and precision.
        nproc: local processes.

    Raises:
        UserError: the model, its tokenizer or the address cannot be used.
        SystemExit: a process failed, after it has said why.
    """
    parent = Parent(settings.parent_pid)
    longest = _longest(target, settings)
    reader = BodyReader(target, longest)
    flag = StopFlag()
    if settings.address_file is not None and is_first():
        settings.address_file.unlink(missing_ok=True)  # of a server that was killed

    def on_ranks(loaded: Loaded) -> None:
        if not loaded.world.is_main:
            continue_live(loaded.policy, settings.batching, longest, None)
            return
        desk = RequestQueue(settings.max_waiting)
        clerk = Clerk(desk, reader, lambda: flag.reason, parent.has_ended)
        with _door(HttpServer(settings, desk, reader, time.time(), longest), settings):
            continue_live(loaded.policy, settings.batching, longest, clerk)

    run_forward_model(target, layout, nproc, on_ranks)


@contextlib.contextmanager
def _door(server: HttpServer, settings: ServeSettings) -> Iterator[None]:
    """Keep the server open, with its address in the file that is wanted."""
    server.start()
    try:
        file = settings.address_file
        if file is not None:
            write_output(file, json.dumps({"url": server.url, "model": settings.name, "pid": os.getpid()})
                         + "\n")
        print(f"{settings.name} answers at {server.url}; Ctrl-C or SIGTERM ends it", file=sys.stderr,
              flush=True)
        try:
            yield
        finally:
            if file is not None:
                file.unlink(missing_ok=True)
    finally:
        server.stop()


def _longest(target: Target, settings: ServeSettings) -> int:
    """Return the tokens of the longest prompt with its answer."""
    if settings.max_length_tokens is None:
        return int(min(target.max_tokens, DEFAULT_LENGTH_TOKENS))
    if settings.max_length_tokens > target.max_tokens:
        raise UserError(f"--max-length {settings.max_length_tokens}: the model ends at {target.max_tokens}; "
                        "choose less")
    return settings.max_length_tokens


class Parent:
    """The process with which this one ends."""

    def __init__(self, pid: int | None) -> None:
        """Take its number; None: there is none.

        Raises:
            UserError: there is no such process.
        """
        self._record: dict[str, object] | None = None
        self._next_s = 0.0
        if pid is None:
            return
        try:
            self._record = identity() | {"pid": pid, "started_s": psutil.Process(pid).create_time()}
        except psutil.Error:
            raise UserError(f"--parent-pid {pid}: there is no such process; start the server from one that "
                            "lives") from None

    def has_ended(self) -> bool:
        """Return whether it has ended, as was seen at most `LOOKS_S` ago."""
        if self._record is None or time.monotonic() < self._next_s:
            return False
        self._next_s = time.monotonic() + LOOKS_S
        return has_ended(self._record) is True
