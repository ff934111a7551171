"""The fixture `serving`, which runs `megatron-sov serve` in a process of its own."""

import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import wait_until

LIMIT_S = 600


@dataclass
class Served:
    """A server that accepts requests."""

    url: str
    """Address, up to `/v1`."""
    model: str
    """Name of the model."""
    pid: int
    """Process id of the first rank."""
    thread: threading.Thread
    """Thread that waits for the end of the command."""
    ended: list[Any] = field(default_factory=list)
    """Result of the command, after it has ended."""


@pytest.fixture(scope="session")
def serving(run_command: Any, tmp_path_factory: pytest.TempPathFactory
            ) -> Callable[..., AbstractContextManager[Served]]:
    """A function `(target, *options)` that returns a context with a running `Served`, which then ends."""

    @contextlib.contextmanager
    def serve(target: Path, *options: str) -> Iterator[Served]:
        file = tmp_path_factory.mktemp("served") / "address.json"
        ended: list[Any] = []
        # the last --port counts: a port in the options, copied from docs/, may be in use
        argv = ["serve", str(target), *options, "--port", "0", "--address-file", str(file)]
        thread = threading.Thread(target=lambda: ended.append(run_command(*argv)))
        thread.start()
        wait_until(lambda: ended or file.exists())
        assert not ended, ended[0].stderr
        server = Served(**json.loads(file.read_text()), thread=thread, ended=ended)
        try:
            yield server
        finally:
            if not ended:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(server.pid, signal.SIGTERM)
            thread.join(LIMIT_S)
        assert (ended[0].returncode, file.exists()) == (0, False), ended[0].stderr
        assert "Traceback" not in ended[0].stderr, ended[0].stderr

    return serve
