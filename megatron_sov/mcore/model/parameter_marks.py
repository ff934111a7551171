"""What the library is told of parameters: how their gradients are summed, and who counts them in the norm."""

from __future__ import annotations

from typing import cast

import torch
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)

SINKS = "core_attention.softmax_offset"
"""End of the names of attention's sinks, the library's and ours."""


def mark_parameters(chunk: torch.nn.Module) -> None:
    """Have gradients of routed experts summed over the expert data-parallel group, and every tensor-parallel
    process count its own part of a split weight in the gradient norm.

    Defect of 0.16.1: the library marks experts only for expert parallel sizes above 1, so with ep = 1 and
    etp != tp each tensor-parallel process keeps the gradient of its own tokens.  It takes biases of experts'
    second matrices for those of attention, whose gradients sequence parallelism sums over the tensor-parallel
    group.  What is split it marks only while it initialises weights, which `init.py` does in its place, and
    sinks, which are split by heads, never.  Transformer Engine marks its layers' weights, but since 2.13 not
    those of grouped ones, the experts: the processes of a tensor-parallel group would compute different
    norms, and clip differently.
    """
    for module in chunk.modules():
        split = isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding, RowParallelLinear))
        # a tied head has no weight of its own
        if split and module.weight is not None:
            _mark_split(cast(torch.Tensor, module.weight), int(isinstance(module, RowParallelLinear)))
    for name, parameter in chunk.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = parameter.sequence_parallel = False  # type: ignore[attr-defined]
            _mark_split(parameter, int("linear_fc2" in name))
        elif name.endswith(SINKS):
            _mark_split(parameter, 0)


def _mark_split(parameter: torch.Tensor, axis: int) -> None:
    if not hasattr(parameter, "tensor_model_parallel"):
        set_tensor_model_parallel_attributes(parameter, True, axis, 1)
