"""How a model is served."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le, MinLen

from megatron_sov.base.settings import NO_FLAG, AtLeastOne, Flag
from megatron_sov.infer.request import Batching

MAX_PORT = 65535


@dataclass(frozen=True)
class ServedBatching(Batching):
    """What bounds memory."""

    batch_size: Annotated[AtLeastOne, Flag("--max-batch")] = 32
    """Answers that are written at a time, on each process that has sequences of its own."""


@dataclass(frozen=True)
class ServeSettings:
    """What a server is given."""

    name: Annotated[str, NO_FLAG] = "model"
    """The model's name, which requests say."""
    host: Annotated[str, MinLen(1), Flag(value="ADDRESS")] = "127.0.0.1"
    """Address or name that is listened on; others than this machine's own need a key."""
    port: Annotated[int, Ge(0), Le(MAX_PORT)] = 8000
    """Port; 0: any that is free."""
    api_key: Annotated[str, NO_FLAG] = field(default="", repr=False)
    """What requests must bring; empty: nothing, on addresses that this machine alone reaches."""
    batching: ServedBatching = field(default_factory=ServedBatching)
    max_waiting: AtLeastOne = 256
    """Answers that may wait; further requests are turned away."""
    max_length_tokens: Annotated[Annotated[int, Ge(2)] | None, Flag("--max-length")] = None
    """Tokens of the longest prompt with its answer (default: as the model takes, up to 8,192)."""
    address_file: Annotated[Path | None, Flag(value="FILE")] = None
    """Address, name and process as JSON: written once the model answers, removed at the end."""
    parent_pid: Annotated[AtLeastOne | None, Flag(value="PID")] = None
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


DEFAULT_LENGTH_TOKENS = 8192
"""Longest prompt with its answer unless told: every slot of the cache has room for it."""
