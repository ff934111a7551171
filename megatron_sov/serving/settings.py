"""How a model is served."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le, MaxLen, MinLen

from megatron_sov.settings import AtLeastOne, Code, Problem, check, name_options

MAX_PORT = 65535


@dataclass(frozen=True)
class ServeSettings:
    """What a server is given."""

    name: Annotated[str, MinLen(1), MaxLen(200)]
    """The model's name, which requests say."""
    host: Annotated[str, MinLen(1)] = "127.0.0.1"
    """Address or name that is listened on."""
    port: Annotated[int, Ge(0), Le(MAX_PORT)] = 8000
    """Port; 0: any that is free."""
    api_key: str = field(default="", repr=False)
    """What requests must bring; empty: nothing, on addresses that this machine alone reaches."""
    max_batch: AtLeastOne = 32
    """Answers that are written at a time, on each process that has sequences of its own."""
    prefill_tokens: AtLeastOne = 8192
    """Tokens of prompts that are read at a time."""
    max_waiting: AtLeastOne = 256
    """Answers that may wait; further requests are turned away."""
    max_length_tokens: Annotated[int, Ge(2)] | None = None
    """Longest prompt with its answer; None: as the model takes, up to `DEFAULT_LENGTH_TOKENS`."""
    address_file: Path | None = None
    """Written once the model answers, removed at the end."""
    parent_pid: AtLeastOne | None = None
    """Process with which the server ends; None: it ends by a signal."""

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def problems(self) -> list[Problem]:
        """Return every value that has no meaning, by the name of the command's option."""
        p = name_options(check(self), max_length_tokens="--max-length")
        if self.name and not (self.name.strip() and self.name.isprintable()):
            p.append(Problem(Code.RULE, "--name", "must be printable characters", self.name))
        if self.host and not (self.is_local or self.api_key):
            p.append(Problem(
                Code.RULE, "--host", "cannot be: others than this machine reach it, and would need no key",
                self.host, "name an environment variable that holds one with --api-key-env, or take "
                "127.0.0.1"))
        return p


DEFAULT_LENGTH_TOKENS = 8192
"""Longest prompt with its answer unless told: every slot of the cache has room for it."""
