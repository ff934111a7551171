"""Tensors with a scale per 16 values."""

from . import QuantizedTensor


class NVFP4Tensor(QuantizedTensor):
    """A tensor in fp4 with an fp8 scale per 16 values."""
