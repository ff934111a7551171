"""Plain Python values between processes: for what is small and rare, where a tensor would only
hide what is meant."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return every process's value, by rank, on every process; called by all processes of the group
    (None: all) together."""
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def broadcast_object(value: Any) -> Any:
    """Return rank 0's value on every process; called by all processes together."""
    sent = [value]
    dist.broadcast_object_list(sent, src=0)
    return sent[0]
