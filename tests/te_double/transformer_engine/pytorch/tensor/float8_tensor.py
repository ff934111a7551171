"""Tensors with one scale."""

from . import QuantizedTensor


class Float8Tensor(QuantizedTensor):
    """A tensor in fp8 with one scale."""
