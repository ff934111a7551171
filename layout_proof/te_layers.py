"""Megatron-Core's own layers for Transformer Engine's, with equal parameters, names and shards."""

import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from layout_proof import cpu_shims

cpu_shims.prepare_without_gpu()
from megatron.core.extensions import transformer_engine_spec_provider  # noqa: E402
from megatron.core.models.common.embeddings import rope_utils  # noqa: E402
from megatron.core.models.gpt import gpt_layer_specs  # noqa: E402
from megatron.core.tensor_parallel import (  # noqa: E402
    ColumnParallelLinear, RowParallelLinear, gather_from_sequence_parallel_region)
from megatron.core.transformer.dot_product_attention import DotProductAttention  # noqa: E402
from megatron.core.transformer.moe import moe_utils  # noqa: E402
from megatron.core.transformer.torch_norm import WrappedTorchNorm  # noqa: E402
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint  # noqa: E402


class DuplicatedLinear(torch.nn.Linear):
    """`TELinear` with `parallel_mode="duplicated"`: equal weights on the tensor-parallel ranks."""

    def __init__(self, input_size: int, output_size: int, *, parallel_mode: str | None, config: Any,
                 init_method: Callable[[torch.Tensor], Any], bias: bool, **_: Any) -> None:
        super().__init__(input_size, output_size, bias, dtype=config.params_dtype)
        init_method(self.weight)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return super().forward(states), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        state = self.state_dict(keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {}, sharded_offsets)


class NormColumnLinear(ColumnParallelLinear):
    """`TELayerNormColumnParallelLinear`: a norm with the parameters `layer_norm_*`, then a product."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        norm = WrappedTorchNorm(config, input_size, config.layernorm_epsilon)
        norm.to(config.params_dtype)
        for name, parameter in norm.named_parameters():
            self.register_parameter(f"layer_norm_{name}", parameter)
        self._norm = [norm]  # in a list: its parameters are registered once

    def forward(self, input_: torch.Tensor, *args: Any, **options: Any) -> Any:
        [norm] = self._norm
        return super().forward(norm(input_), *args, **options)


class PlainAttention(DotProductAttention):
    """`TEDotProductAttention`: Megatron-Core's attention; under context parallelism on gathered rows."""

    def __init__(self, config: Any, *args: Any, pg_collection: Any = None, k_channels: Any = None,
                 v_channels: Any = None, num_splits: Any = None, **options: Any) -> None:
        with mock.patch.object(config, "context_parallel_size", 1):
            super().__init__(config, *args, pg_collection=pg_collection, **options)
        self.cp_group: Any = getattr(self.pg_collection, "cp", None)
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
                *args: Any, **options: Any) -> Any:
        options.pop("num_splits", None)
        if self.config.context_parallel_size == 1:
            return super().forward(query, key, value, attention_mask, *args, **options)
        rows = [_gather_rows(part, self.cp_group) for part in (query, key, value)]
        context = super().forward(*rows, None, *args, **options)
        chunks, rank = context.chunk(2 * self.cp_group.size()), self.cp_group.rank()
        return torch.cat([chunks[rank], chunks[-1 - rank]])


def _gather_rows(part: torch.Tensor, group: Any) -> torch.Tensor:
    """Gather [tokens / cp, ...] to [tokens, ...]; rank r has chunks r and 2 cp - 1 - r of a row."""
    chunks = gather_from_sequence_parallel_region(part, group=group).chunk(2 * group.size())
    return torch.cat([*chunks[::2], *chunks[:0:-2]])


LAYERS: dict[str, Any] = {
    "TENorm": WrappedTorchNorm, "TELinear": DuplicatedLinear, "TEColumnParallelLinear": ColumnParallelLinear,
    "TERowParallelLinear": RowParallelLinear, "TELayerNormColumnParallelLinear": NormColumnLinear,
    "TEDotProductAttention": PlainAttention}
"""Name in Megatron-Core -> plain layer."""


def replace_te_layers() -> None:
    """Replace the layers in this process, before `hybrid_layer_specs` is imported, which builds specs."""
    provider: Any = transformer_engine_spec_provider.TESpecProvider
    provider.layer_norm = lambda self, *args, **options: WrappedTorchNorm
    vars(gpt_layer_specs)["TESpecProvider"] = provider
    for utils in (rope_utils, moe_utils):
        # configs check that kernels exist, and `shrink_model` switches them off
        vars(utils).update({name: object() for name in vars(utils) if name.startswith("fused_")})
    for module in [module for name, module in sys.modules.items() if name.startswith("megatron.core")]:
        for name, layer in LAYERS.items():
            if name in vars(module):
                setattr(module, name, layer)

