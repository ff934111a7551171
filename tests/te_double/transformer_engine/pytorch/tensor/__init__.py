"""Classes of quantized tensors."""

from ..quantized_tensor import QuantizedTensor  # noqa: F401
