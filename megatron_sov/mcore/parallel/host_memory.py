"""Host memory that a GPU copies to and from without waiting: pinned, in few large pieces."""

from __future__ import annotations

import torch

from megatron_sov.mcore.parallel.device import on_gpu

PIECE_BYTES = 1 << 30
_ALIGN_BYTES = 64


class Arena:
    """Host memory in few large pieces: pinned memory is handed out in powers of two."""

    def __init__(self, total_bytes: int) -> None:
        """Prepare for tensors of so many bytes together."""
        self._piece_bytes = min(PIECE_BYTES, total_bytes + _ALIGN_BYTES)
        self._free = torch.empty(0, dtype=torch.uint8)

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return contiguous memory of a tensor's shape and dtype."""
        wanted = -(-num_bytes(tensor) // _ALIGN_BYTES) * _ALIGN_BYTES
        if self._free.numel() < wanted:
            self._free = torch.empty(max(wanted, self._piece_bytes), dtype=torch.uint8, pin_memory=on_gpu())
        taken, self._free = self._free[:wanted], self._free[wanted:]
        return taken[:num_bytes(tensor)].view(tensor.dtype).view(tensor.shape)


def num_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()
