"""A model of this machine as an endpoint: `megatron-sov serve` as a child, with a key of its own."""

from __future__ import annotations

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
"""Of the server's environment alone: no other process of the run needs the key."""
STOP_S = 30.0
"""For the answers that it still gives; then it is killed."""
_LOOK_S, _SILENCE_S = 0.05, 10.0


@dataclass(frozen=True)
class LocalServer:
    """A server that answers."""

    url: str
    """Up to `/v1`."""
    model: str
    """As it is called there."""
    key: str = field(repr=False)
    """That it wants."""


@contextlib.contextmanager
def serving(folder: Path, problem: str, *, options: Sequence[str] = (),
            sleep: Callable[[float], object] = time.sleep, program: Sequence[str] = ()
            ) -> Iterator[LocalServer]:
    """Serve a checkpoint or Hugging Face folder while the context is open, by a child that ends with this
    process: `megatron-sov serve`, or another program.

    Args:
        folder: of the model.
        problem: what a sentence begins with that says why the child did not start.
        options: further words of the command line.
        sleep: waits; may raise to end all waiting.
        program: started in the place of `megatron-sov serve`.

    Raises:
        UserError: it does not start; its own sentence says why.
    """
    # No other user of this machine may use the server. The key goes by the environment: a command line can be
    # read by all.
    key = secrets.token_urlsafe(32)
    with tempfile.TemporaryDirectory(prefix="sov-serve-") as work:
        address, log = Path(work) / "address.json", Path(work) / "serve.log"
        command = [*(program or [sys.executable, "-m", "megatron_sov", "serve"]), str(folder),
                   "--port", "0", "--address-file", str(address), "--api-key-env", KEY_ENV,
                   "--parent-pid", str(os.getpid()), *options]
        with open(log, "wb") as out:
            # a group of its own: Ctrl-C is for the run, which lets it answer what is under way
            child = start_command(command, environment=os.environ | {KEY_ENV: key}, stdout=out, stderr=out,
                                  own_group=True)
        try:
            yield LocalServer(*_answering(child, address, log, problem, sleep), key)
        finally:
            end_commands([child], STOP_S)


def _answering(child: subprocess.Popen[bytes], address: Path, log: Path, problem: str,
               sleep: Callable[[float], object]) -> tuple[str, str]:
    """Return where the child answers, when it does, and what the model is called there."""
    began_s, is_announced = time.monotonic(), False
    while not address.exists():
        if child.poll() is not None:
            # the last line of its log is its own sentence on what is wrong
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            words = lines[-1].removeprefix("error: ") if lines else f"it ended with {child.returncode}"
            raise UserError(f"{problem}{words}")
        if not is_announced and time.monotonic() - began_s > _SILENCE_S:
            print("the model is still being loaded", file=sys.stderr, flush=True)
            is_announced = True
        sleep(_LOOK_S)
    content = json.loads(address.read_text(encoding="utf-8"))
    return content["url"], content["model"]
