"""Optimizers, and operations over lists of tensors."""

from .fused_adam import FusedAdam  # noqa: F401
from .fused_sgd import FusedSGD  # noqa: F401
from .multi_tensor import (  # noqa: F401
    MultiTensorApply, multi_tensor_applier, multi_tensor_l2norm, multi_tensor_scale)
