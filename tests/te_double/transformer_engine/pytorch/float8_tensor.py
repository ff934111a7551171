"""Previous module of `Float8Tensor`, which megatron-core still imports."""

from .tensor.float8_tensor import Float8Tensor  # noqa: F401
