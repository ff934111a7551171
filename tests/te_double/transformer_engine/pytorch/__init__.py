"""The part of `transformer_engine.pytorch` that megatron-core uses."""

from . import fp8, ops, optimizers  # noqa: F401
from .attention import DotProductAttention  # noqa: F401
from .distributed import CudaRNGStatesTracker, checkpoint  # noqa: F401
from .module import (  # noqa: F401
    Fp8Padding, Fp8Unpadding, GroupedLinear, LayerNorm, LayerNormLinear, Linear, RMSNorm)
from .permutation import (  # noqa: F401
    moe_permute, moe_permute_with_probs, moe_sort_chunks_by_index, moe_sort_chunks_by_index_with_probs,
    moe_unpermute)
from .quantization import autocast, fp8_autocast, fp8_model_init, quantized_model_init  # noqa: F401
from .utils import get_cudnn_version  # noqa: F401
