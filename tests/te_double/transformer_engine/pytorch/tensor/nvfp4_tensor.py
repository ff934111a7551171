"""E2M1 tensors with a scale per 16 values (NVFP4)."""

from __future__ import annotations

import torch

from . import QuantizedTensor


class NVFP4Tensor(QuantizedTensor):
    """A tensor in fp4 with an fp8 scale per 16 values."""

    def quantize_(self, tensor: torch.Tensor, *, noop_flag: torch.Tensor | None = None) -> QuantizedTensor:
        """Refuse to replace the values: weights in 4 bits are not supported."""
        raise NotImplementedError
