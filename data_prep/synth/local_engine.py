"""A model of this machine: `megatron-sov serve` as a child that lives no longer than the run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.synth.stopping import Stop
from megatron_sov.errors import UserError, download
from megatron_sov.work.commands import end_commands, start_command

KEY_ENV = "SOV_SERVE_KEY"
"""Of the server's environment alone: no other process of the run needs the key."""
STOP_S = 30.0
"""For the answers that it still gives; then it is killed."""
_LOOK_S = 0.05
_WHOLE_BYTES = 1 << 24
_ENDS_BYTES = 1 << 20
"""Of larger files, begin and end stand for what lies between."""


@dataclass(frozen=True)
class Served:
    """A model that is being served."""

    url: str
    """Up to `/v1`."""
    model: str
    """As it is called there."""
    key: str = field(repr=False)
    """That it wants."""


@contextlib.contextmanager
def serving(folder: Path, program: list[str], stop: Stop) -> Iterator[Served]:
    """Serve a model while the context is open.

    Args:
        folder: a checkpoint, or a Hugging Face folder.
        program: what is started; [] stands for `megatron-sov serve`.
        stop: of the run.

    Raises:
        UserError: it does not start; its own sentence says why.
        StopRequested: the run was asked to stop before it answered.
    """
    key = secrets.token_urlsafe(32)
    with tempfile.TemporaryDirectory(prefix="sov-synth-") as work:
        address, log = Path(work) / "address.json", Path(work) / "serve.log"
        command = [*(program or [sys.executable, "-m", "megatron_sov", "serve"]), str(folder), "--port", "0",
                   "--name", folder.resolve().name, "--address-file", str(address),
                   "--api-key-env", KEY_ENV, "--parent-pid", str(os.getpid())]
        with open(log, "wb") as out:
            # a group of its own: Ctrl-C is for the run, which lets it answer what is under way
            child = start_command(command, environment=os.environ | {KEY_ENV: key}, stdout=out, stderr=out,
                                  own_group=True)
        try:
            yield Served(*_answering(child, address, log, folder, stop), key)
        finally:
            end_commands([child], STOP_S)


def _answering(child: subprocess.Popen[bytes], address: Path, log: Path, folder: Path, stop: Stop
               ) -> tuple[str, str]:
    """Return where it answers, when it does, and what the model is called there."""
    began_s = time.monotonic()
    told = False
    while not address.exists():
        if child.poll() is not None:
            said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            words = said[-1].removeprefix("error: ") if said else f"it ended with {child.returncode}"
            raise UserError(f"--engine {folder}: `megatron-sov serve` did not start: {words}")
        if not told and time.monotonic() - began_s > 10:
            print(f"{folder}: being loaded", flush=True)
            told = True
        stop.sleep(_LOOK_S)
    said = json.loads(address.read_text(encoding="utf-8"))
    return said["url"], said["model"]


def identity_of(folder: Path, option: str = "--engine") -> str:
    """Return a hash that stands for a model's files: small ones whole, of large ones size, begin and end.

    Args:
        folder: of the model.
        option: that names it, for sentences.

    Raises:
        UserError: there is no such folder, or nothing in it.
    """
    if not folder.is_dir():
        raise UserError(f"{option} {folder}: is neither an address (http://...) nor a folder of a model"
                        f"{download(folder)}")
    digest = hashlib.sha256()
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if not files:
        raise UserError(f"{option} {folder}: is empty; pass a checkpoint or a Hugging Face folder")
    for file in files:
        size_bytes = file.stat().st_size
        digest.update(f"{file.relative_to(folder)}\0{size_bytes}\0".encode())
        with open(file, "rb") as f:
            if size_bytes <= _WHOLE_BYTES:
                digest.update(f.read())
            else:
                digest.update(f.read(_ENDS_BYTES))
                f.seek(-_ENDS_BYTES, os.SEEK_END)
                digest.update(f.read())
    return digest.hexdigest()
