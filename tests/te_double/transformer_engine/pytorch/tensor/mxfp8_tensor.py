"""Tensors with a scale per 32 values."""

from . import QuantizedTensor


class MXFP8Tensor(QuantizedTensor):
    """A tensor in fp8 with a power of two per 32 values."""
