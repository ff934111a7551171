"""The sandbox of this process, which whoever runs programs of a model shares."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from megatron_sov.work.sandbox.sandbox import Sandbox

SANDBOXES: dict[tuple[str, tuple[str, ...], int], Sandbox] = {}
"""Enclosure, command and workers -> sandbox."""
_MAKING = threading.Lock()


def shared_sandbox(enclosure: str = "auto", command: Sequence[str] = (), workers: int = 1) -> Sandbox:
    """Return the sandbox of this process with these settings; it lives as long as the process.

    Raises:
        UserError: a setting breaks a rule, or the machine gives no enclosure.
    """
    key = (enclosure, tuple(command), workers)
    with _MAKING:  # two threads would start two, one of which nobody ends
        if key not in SANDBOXES:
            SANDBOXES[key] = Sandbox(enclosure=enclosure, command=command, workers=workers)
        return SANDBOXES[key]
