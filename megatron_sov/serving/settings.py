"""How a model is served."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from megatron_sov.settings import NO_FLAG, Flag

MAX_PORT = 65535


@dataclass(frozen=True)
class ServeSettings:
    """What a server is given."""

    name: Annotated[str, NO_FLAG] = "model"
    """The model's name, which requests say."""
    host: Annotated[str, Flag(value="ADDRESS")] = "127.0.0.1"
    """Address or name that is listened on; others than this machine's own need a key."""
    port: int = 8000
    """Port; 0: any that is free."""
    api_key: Annotated[str, NO_FLAG] = field(default="", repr=False)
    """What requests must bring; empty: nothing, on addresses that this machine alone reaches."""
    max_batch: int = 32
    """Answers that are written at a time, on each process that has sequences of its own."""
    prefill_tokens: int = 8192
    """Tokens of prompts that are read at a time."""
    max_waiting: int = 256
    """Answers that may wait; further requests are turned away."""
    max_length_tokens: Annotated[int | None, Flag("--max-length", "N")] = None
    """Tokens of the longest prompt with its answer (default: as the model takes, up to 8,192)."""
    address_file: Annotated[Path | None, Flag(value="FILE")] = None
    """Address, name and process as JSON: written once the model answers, removed at the end."""
    parent_pid: Annotated[int | None, Flag(value="PID")] = None
    """Process with which the server ends (default: it ends by a signal)."""

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def problems(self) -> list[str]:
        """Return one sentence for each value that has no meaning, by the name of the command's option."""
        rules = [(bool(self.name.strip()) and self.name.isprintable() and len(self.name) <= 200,
                  f"--name {self.name!r}: must be 1 to 200 printable characters"),
                 (bool(self.host), "--host '': must name an address"),
                 (0 <= self.port <= MAX_PORT, f"--port {self.port}: must lie between 0 and {MAX_PORT}"),
                 (self.max_batch >= 1, f"--max-batch {self.max_batch}: must be at least 1"),
                 (self.prefill_tokens >= 1, f"--prefill-tokens {self.prefill_tokens}: must be at least 1"),
                 (self.max_waiting >= 1, f"--max-waiting {self.max_waiting}: must be at least 1"),
                 (self.max_length_tokens is None or self.max_length_tokens >= 2,
                  f"--max-length {self.max_length_tokens}: must be at least 2"),
                 (self.parent_pid is None or self.parent_pid >= 1,
                  f"--parent-pid {self.parent_pid}: must be the number of a process")]
        return [sentence for holds, sentence in rules if not holds]


DEFAULT_LENGTH_TOKENS = 8192
"""Longest prompt with its answer unless told: every slot of the cache has room for it."""
