"""Serve a local model with `megatron-sov serve` in a child process, protected by a private API key."""

import contextlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_sov.base.errors import UserError
from megatron_sov.work.processes.children import end_commands, start_command

KEY_ENV = "SOV_SERVE_KEY"
"""Environment variable of the server process only; no other process needs the key."""
STOP_S = 30.0
"""Seconds for finishing answers before the server is killed."""
_POLL_S, _ANNOUNCE_AFTER_S = 0.05, 10.0


@dataclass(frozen=True)
class LocalServer:
    url: str
    """Address up to `/v1`."""
    model: str
    key: str = field(repr=False)


@contextlib.contextmanager
def serve_model(folder: Path, problem: str, *, options: Sequence[str] = (),
                sleep: Callable[[float], object] = time.sleep, program: Sequence[str] = ()
                ) -> Iterator[LocalServer]:
    """Serve a checkpoint or Hugging Face folder during the context, in a child process.

    Args:
        folder: the model.
        problem: beginning of the error message if the child does not start.
        options: further command-line arguments.
        sleep: waits; may raise to abort.
        program: command to run in place of `megatron-sov serve`.

    Raises:
        UserError: the server does not start; contains the last line in its log.
    """
    # Other users of this machine must not use the server. Pass the key in the environment: command lines are
    # public.
    key = secrets.token_urlsafe(32)
    with tempfile.TemporaryDirectory(prefix="sov-serve-") as work:
        address, log = Path(work) / "address.json", Path(work) / "serve.log"
        command = [*(program or [sys.executable, "-m", "megatron_sov", "serve"]), str(folder),
                   "--port", "0", "--address-file", str(address), "--api-key-env", KEY_ENV,
                   "--parent-pid", str(os.getpid()), *options]
        with open(log, "wb") as out:
            # own process group: on Ctrl-C the run lets the server finish running answers
            child = start_command(command, environment=os.environ | {KEY_ENV: key}, stdout=out, stderr=out,
                                  own_group=True)
        try:
            yield LocalServer(*_wait_until_ready(child, address, log, problem, sleep), key)
        finally:
            end_commands([child], STOP_S)


def _wait_until_ready(child: subprocess.Popen[bytes], address: Path, log: Path, problem: str,
                      sleep: Callable[[float], object]) -> tuple[str, str]:
    """Wait until the child has written its address file; return URL and model name."""
    began_s, is_announced = time.monotonic(), False
    while not address.exists():
        if child.poll() is not None:
            # the last line in the log is the child's error message
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            message = lines[-1].removeprefix("error: ") if lines else f"it ended with {child.returncode}"
            raise UserError(f"{problem}{message}")
        if not is_announced and time.monotonic() - began_s > _ANNOUNCE_AFTER_S:
            print("the model is still being loaded", file=sys.stderr, flush=True)
            is_announced = True
        sleep(_POLL_S)
    content = json.loads(address.read_text(encoding="utf-8"))
    return content["url"], content["model"]
