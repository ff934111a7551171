"""Settings of `megatron-sov serve`."""

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le, MinLen

from megatron_sov.base.settings import NO_FLAG, AtLeastOne, Flag
from megatron_sov.infer.request import Batching

MAX_PORT = 65535
DEFAULT_LENGTH_TOKENS = 8192
"""Default for `max_length_tokens`: each slot in the cache reserves as many tokens."""


@dataclass(frozen=True)
class ServedBatching(Batching):
    """Limits on memory."""

    batch_size: Annotated[AtLeastOne, Flag("--max-batch")] = 32
    """Answers generated at once, per data-parallel rank."""


@dataclass(frozen=True)
class ServeSettings:
    """Address, key and limits of a server."""

    name: Annotated[str, NO_FLAG] = "model"
    """Model name in requests."""
    host: Annotated[str, MinLen(1), Flag(value="ADDRESS")] = "127.0.0.1"
    """Address or name to listen on; addresses outside this machine need a key."""
    port: Annotated[int, Ge(0), Le(MAX_PORT)] = 8000
    """Port; 0 for a free port."""
    api_key: Annotated[str, NO_FLAG] = field(default="", repr=False)
    """Key for requests; empty only on addresses of this machine."""
    batching: ServedBatching = field(default_factory=ServedBatching)
    max_waiting: AtLeastOne = 256
    """Answers that may wait; the server refuses further requests."""
    max_length_tokens: Annotated[Annotated[int, Ge(2)] | None, Flag("--max-length")] = None
    """Longest prompt with its answer, in tokens (default: the model's context, up to 8,192)."""
    address_file: Annotated[Path | None, Flag(value="FILE")] = None
    """JSON file with address, name and process; written when the model is ready, deleted at the end."""
    parent_pid: Annotated[AtLeastOne | None, Flag(value="PID")] = None
    """Process whose end also ends the server (default: only a signal ends it)."""

    @property
    def is_local(self) -> bool:
        """Whether `host` is only reachable from this machine."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
