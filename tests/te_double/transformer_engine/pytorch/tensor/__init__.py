"""Classes of quantised tensors."""

from ..quantized_tensor import QuantizedTensor  # noqa: F401
