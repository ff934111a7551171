"""Defects of megatron-core 0.16.1 that a model without Transformer Engine meets on any device, mended in
place.

Each is one function whose docstring names it, and which leaves a mended library alone.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any


@functools.cache
def mend() -> None:
    """Mend the library in this process; called before a model is built."""
    _router_gemm_name()
    _norms_under_sequence_parallelism()
    _biases_of_experts()
    _latent_attention_alone()


def _router_gemm_name() -> None:
    """`te_general_gemm` is bound only when Transformer Engine imports,
    and read unconditionally."""
    import megatron.core.transformer.moe.moe_utils as moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _latent_attention_alone() -> None:
    """Latent attention takes Transformer Engine to be there where its stand-ins are, and asks whether a layer
    is an instance of one, which is no class."""
    import megatron.core.transformer.multi_latent_attention as latent

    if not isinstance(latent.TELinear, type):
        latent.HAVE_TE = False


def _norms_under_sequence_parallelism() -> None:
    """WrappedTorchNorm refuses sequence parallelism because torch's norms do not mark their weight for the
    gradient sum over the tensor-parallel group; the mark is all that is missing."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    original = WrappedTorchNorm.__new__
    if "sequence_parallel" not in inspect.getsource(original):
        return

    def marked(cls: Any, config: Any, hidden_size: int, eps: float = 1e-5, *args: Any, **kwargs: Any) -> Any:
        wanted, config.sequence_parallel = config.sequence_parallel, False
        try:
            norm = original(cls, config, hidden_size, eps, *args, **kwargs)
        finally:
            config.sequence_parallel = wanted
        for parameter in norm.parameters():
            parameter.sequence_parallel = wanted
        return norm

    WrappedTorchNorm.__new__ = staticmethod(marked)


def _biases_of_experts() -> None:
    """MLP adds an expert's bias in place to what RowParallelLinear returns, which autograd refuses for what
    came as it was out of the reduction over a tensor-parallel group of one; biases of experts are allowed in
    such groups alone, and the linear layer skips its reduction where it is told that others see to it."""
    from megatron.core.tensor_parallel.layers import RowParallelLinear

    original = RowParallelLinear.__init__

    @functools.wraps(original)
    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.is_expert and self.bias is not None:
            self.explicit_expert_comm = True

    RowParallelLinear.__init__ = made
