"""Classes of quantised tensors, for megatron-core to recognise them by; the double makes none."""

from __future__ import annotations

import torch


class QuantizedTensor(torch.Tensor):
    """A tensor in low precision with its scales."""
