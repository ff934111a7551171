"""Kimi Delta Attention (arXiv 2510.26692) as a layer's attention, for packed rows at every layout, and with a
constant-size state for generation.

Heads are split over the tensor-parallel group. Under context parallelism an all-to-all gives each process all
tokens of its share of these heads, since the state passes through all tokens, and a second one returns the
outputs (as Megatron-Core's `mamba_context_parallel.py`)."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm, TERowParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default
from torch.nn.functional import linear, rms_norm, silu, softplus

from megatron_sov.engine.model.attention import PackedDocuments
from megatron_sov.engine.model.cache_rows import CacheGroup, CacheSize, PackedSpans
from megatron_sov.engine.model.delta_rule import (
    apply_delta_rule, apply_delta_rule_by_token, apply_fused_delta_rule, apply_short_convolution,
    chunk_documents, convolve_windows, normalize_l2)
from megatron_sov.engine.parallel import context
from megatron_sov.model.config import LinearAttentionConfig

SPLIT_AXES = {"A_log": 0, "dt_bias": 0, "conv1d.weight": 0}
"""Name -> axis for parameters split by heads, without projections."""


class LinearAttention(MegatronModule):
    """Kimi Delta Attention: each key channel of the state decays at its own rate.

    The decay rates and output gates come from two low-rank projections, which are replicated. Rows of
    `in_proj` are ordered by heads: query, key, value and learning rate of each head
    (`LinearAttentionConfig.projected`), so the weight can be split between any two heads."""

    def __init__(self, config: Any, layer_number: int, projections: tuple[Any, Any, Any],
                 sizes: LinearAttentionConfig, pg_collection: Any, cp_comm_type: str | None = None,
                 name: str | None = None) -> None:
        """Create this process's part of the layer.

        Args:
            config: Megatron-Core's `TransformerConfig`.
            layer_number: number of the layer, from 1.
            projections: classes of the input, output and low-rank up projections.
            sizes: sizes of the whole layer.
            pg_collection: Megatron-Core's process groups.
            cp_comm_type: unused.
        """
        super().__init__(config)
        self.layer_number, self.sizes, self._group = layer_number, sizes, pg_collection.tp
        self.heads = sizes.num_key_heads // self._group.size()
        """Local heads."""
        self.in_proj = self._build_projection(projections[0], config.hidden_size,
                                              sizes.num_key_heads * sum(sizes.projected), "fc1")
        dtype = config.params_dtype
        self.conv1d = WeightModule((self.heads * sizes.convolved_channels, 1, sizes.conv_taps), dtype)
        self.dt_bias, self.A_log = (torch.nn.Parameter(torch.empty(size, dtype=dtype))
                                    for size in (self.heads * sizes.key_head_dim, self.heads))
        self.out_norm = WeightModule((sizes.value_head_dim,), dtype)
        self.out_proj = build_module(
            projections[1], sizes.num_value_heads * sizes.value_head_dim, config.hidden_size,
            config=config, bias=False, is_expert=False, tp_group=self._group,
            init_method=config.output_layer_init_method, input_is_parallel=True, skip_bias_add=True,
            tp_comm_buffer_name="fc2")
        for parameter in (self.conv1d.weight, self.dt_bias, self.A_log):
            set_tensor_model_parallel_attributes(parameter, True, 0, 1)
        self.gates_down_proj = ReplicatedLinear(config.hidden_size, 2 * sizes.gate_rank, config)
        self.decay_up_proj, self.output_up_proj = (
            self._build_projection(projections[2], sizes.gate_rank, sizes.num_key_heads * width, "fc1")
            for width in (sizes.key_head_dim, sizes.value_head_dim))
        self.state_cache: RecurrentCache | None = None
        """`RecurrentCache` for generated sequences. None: the layer reads packed documents."""

    def _build_projection(self, kind: Any, inputs: int, outputs: int, buffer: str) -> Any:
        """Create a linear layer whose outputs are split by heads."""
        return build_module(kind, inputs, outputs, config=self.config, bias=False, is_expert=False,
                            tp_group=self._group, init_method=self.config.init_method, gather_output=False,
                            skip_bias_add=False, tp_comm_buffer_name=buffer)

    def forward(self, hidden_states: torch.Tensor, attention_mask: None = None,
                packed_seq_params: PackedDocuments | PackedSpans | None = None,
                **_: Any) -> tuple[torch.Tensor, None]:
        """Compute attention and the output projection.

        Args:
            hidden_states: [tokens / sequence-parallel size, 1, hidden].
            packed_seq_params: documents of the row, or spans of cached sequences.

        Returns:
            [tokens / sequence-parallel size, 1, hidden], and None for the bias.
        """
        assert packed_seq_params is not None, "LinearAttention needs packed documents or spans"
        convolved, gate, gates = self._project(hidden_states)
        if self.state_cache is not None:
            output_heads = self.state_cache.read(convolved, gates, packed_seq_params)
        else:
            output_heads = self._attend_documents(torch.cat([convolved, gates], -1), packed_seq_params)
        # each process normalizes its own heads: sum the weight's gradient over the group
        weight = self.out_norm()
        if self._group.size() > 1:
            weight = tensor_parallel.copy_to_tensor_model_parallel_region(weight, self._group)
        output_heads = rms_norm(output_heads, weight.shape, weight.to(output_heads.dtype),
                                self.config.layernorm_epsilon)
        gate = gate.unflatten(-1, (-1, self.sizes.value_head_dim)).to(output_heads.dtype)
        output_heads = output_heads * gate.sigmoid()
        output: tuple[torch.Tensor, None] = self.out_proj(
            output_heads.flatten(1).to(hidden_states.dtype)[:, None])
        return output

    def _project(self, hidden: torch.Tensor) -> Sequence[torch.Tensor]:
        """Project [tokens / sequence-parallel size, 1, hidden] to convolution inputs, output gates, and
        rate and decay inputs, [tokens, heads, channels] each."""
        narrow = self.gates_down_proj(hidden)[0].chunk(2, -1)
        projections = ((self.decay_up_proj, narrow[0]), (self.output_up_proj, narrow[1]),
                       (self.in_proj, hidden))
        decay, gate, projected = (module(inputs)[0].squeeze(1).unflatten(-1, (self.heads, -1))
                                  for module, inputs in projections)
        convolved, rate = projected.split([self.sizes.convolved_channels, 1], -1)
        return convolved, gate, torch.cat([rate, decay], -1)

    def _compute_gates(self, gates: torch.Tensor, heads: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Map gate inputs [..., heads, channels], in the dtype of the state, to decays [..., heads, 1, key
        channels] and learning rates [..., heads, 1]."""
        rate, step = gates.split([1, self.sizes.key_head_dim], -1)
        # [heads, values per head] each
        log_decay, bias = (parameter.to(gates.dtype).unflatten(0, (self.heads, -1))[heads]
                           for parameter in (self.A_log, self.dt_bias))
        return (-log_decay.exp() * softplus(step + bias))[..., None, :], rate.sigmoid()

    def _attend_documents(self, inputs: torch.Tensor, packed: PackedDocuments) -> torch.Tensor:
        """Map [tokens, heads, channels] to [tokens, heads, 1, value channels] for packed documents."""
        is_split = context.get_cp_size() > 1
        if is_split:
            inputs = context.exchange_tokens(inputs)
        elif packed.shared is not None:
            inputs = inputs.index_select(0, packed.shared.source)
        convolved = inputs[..., :self.sizes.convolved_channels]
        gates = inputs[..., self.sizes.convolved_channels:]
        local_heads = context.get_local_heads(inputs.shape[1]) if is_split else slice(None)
        wide = self.get_convolution_weight(local_heads)
        mixed = apply_short_convolution(convolved.flatten(1).to(wide.dtype), wide, packed.chunks.positions)
        parts = self.prepare_delta_inputs(mixed.unflatten(-1, convolved.shape[1:]), gates, local_heads)
        if self.config.delta_kernels:
            output_heads = apply_fused_delta_rule(*parts, chunks=packed.chunks,
                                                  dtype=self.config.params_dtype)
        else:
            output_heads = apply_delta_rule(*parts, chunks=packed.chunks)[0]
        if is_split:
            output_heads = context.exchange_heads(output_heads.flatten(2))
            output_heads = output_heads.unflatten(-1, (-1, self.sizes.value_head_dim))
        return output_heads

    def get_convolution_weight(self, heads: slice = slice(None)) -> torch.Tensor:
        """Return the convolution weight [channels, taps] for `heads`, in float32 or wider."""
        weight = self.conv1d().unflatten(0, (self.heads, -1))[heads]
        return weight.flatten(0, 1).squeeze(1).to(torch.promote_types(weight.dtype, torch.float32))

    def prepare_delta_inputs(self, mixed: torch.Tensor, gates: torch.Tensor,
                             heads: slice = slice(None)) -> list[torch.Tensor]:
        """Return query, key, value, decay and learning rate for the delta rule.

        Args:
            mixed: [..., heads, channels] output of the convolution.
            gates: [..., heads, channels] rate and decay inputs.
            heads: local heads contained in the tensors.
        """
        width = self.sizes.key_head_dim
        query, key, value = silu(mixed).split([width, width, self.sizes.value_head_dim], -1)
        decay, rate = self._compute_gates(gates.to(mixed.dtype), heads)
        if self.sizes.negative_eigenvalues:
            rate = 2 * rate
        return [normalize_l2(query) * width ** -0.5, normalize_l2(key), value[..., None, :], decay, rate]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (),
                           metadata: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the parameter shards; except for the norm, parameters are split by heads."""
        group = (metadata or {}).get("dp_cp_group")
        declared: dict[str, Any] = {}
        parameters: dict[str, torch.Tensor] = {name: getattr(self, name) for name in ("A_log", "dt_bias")}
        for name, module in self.named_children():
            if isinstance(module, WeightModule | ReplicatedLinear):
                parameters[f"{name}.weight"] = module.weight
            else:
                declared |= sharded_state_dict_default(module, f"{prefix}{name}.", sharded_offsets, metadata,
                                                       tp_group=self._group)
        return declared | make_sharded_tensors_for_checkpoint(
            parameters, prefix, SPLIT_AXES, sharded_offsets, tp_group=self._group, dp_cp_group=group)


class RecurrentCache:
    """A layer's cache for generation: recurrent state and the last convolution inputs per slot."""

    def __init__(self, size: CacheSize, layer: LinearAttention) -> None:
        self._size, self._layer = size, layer
        self._past = [0] * size.slots  # per slot: tokens that have entered the state
        self._state: torch.Tensor | None = None
        self._inputs: torch.Tensor | None = None

    def read(self, convolved: torch.Tensor, gates: torch.Tensor, spans: PackedSpans) -> torch.Tensor:
        """Process new tokens: two tensors [tokens, heads, channels] -> [tokens, heads, 1, value channels],
        zeros at padding."""
        sizes, wide = self._layer.sizes, self._layer.get_convolution_weight()
        if self._state is None:
            heads, slots = self._layer.heads, self._size.slots
            self._state = wide.new_zeros(slots, heads, 1, sizes.key_head_dim, sizes.value_head_dim)
            self._inputs = wide.new_zeros(slots, wide.shape[1] - 1, len(wide))
        outputs = wide.new_zeros(len(convolved), self._layer.heads, 1, sizes.value_head_dim)
        for group in spans.groups:
            rows = slice(group.start, group.start + len(group.past) * group.length)
            shape = (len(group.past), group.length)
            outputs[rows] = self._read_spans(group,
                                             convolved[rows].flatten(1).to(wide.dtype).unflatten(0, shape),
                                             gates[rows].unflatten(0, shape), wide).flatten(0, 1)
        return outputs

    def _read_spans(self, group: CacheGroup, convolved: torch.Tensor, gates: torch.Tensor,
                    wide: torch.Tensor) -> torch.Tensor:
        """Process a span per sequence: [sequences, tokens, ...]."""
        assert self._state is not None and self._inputs is not None
        slots, length = slice(group.slot, group.slot + len(group.past)), group.length
        for slot, past in enumerate(group.past, start=group.slot):
            if past == 0:  # a new sequence: clear the slot
                self._state[slot], self._inputs[slot], self._past[slot] = 0, 0, 0
        if self._past[slots] != group.past:
            raise RuntimeError(f"slots from {group.slot} on have read {self._past[slots]} tokens and resume "
                               f"at {group.past}: the state has no earlier tokens")
        inputs = torch.cat([self._inputs[slots], convolved], 1)
        mixed = convolve_windows(inputs, wide).unflatten(-1, (self._layer.heads, -1))
        query, key, value, decay, rate = self._layer.prepare_delta_inputs(mixed, gates)
        row = (query, key, value, decay, rate)
        if length == 1:
            outputs, self._state[slots] = apply_delta_rule_by_token(*row, self._state[slots])
        else:
            count = len(group.past)
            chunks = chunk_documents([(i * length, i * length, (i + 1) * length) for i in range(count)],
                                     wide.device)
            outputs, self._state[slots] = apply_delta_rule(*(t.flatten(0, 1) for t in row), chunks=chunks,
                                                           state=self._state[slots])
            outputs = outputs.unflatten(0, (count, length))
        self._inputs[slots] = inputs[:, length:]
        self._past[slots] = [past + length for past in group.past]
        return outputs

    def copy(self, source: int, targets: Sequence[int]) -> None:
        for cache in (self._state, self._inputs):
            if cache is not None:
                cache[list(targets)] = cache[source].clone()  # source and targets share memory
        for target in targets:
            self._past[target] = self._past[source]


class WeightModule(torch.nn.Module):
    """Module with a single parameter `weight`, for example `conv1d.weight` and `out_norm.weight`."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(*shape, dtype=dtype))

    def forward(self) -> torch.Tensor:
        """Return the weight. Overlapped parameter gathers finish in a forward pre-hook, so callers must call
        the module for each use."""
        return self.weight


class ReplicatedLinear(torch.nn.Module):
    """Linear layer with a replicated weight, applied to the local tokens."""

    def __init__(self, inputs: int, outputs: int, config: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype))
        # the gradient covers local tokens; Megatron-Core sums over processes as for a norm
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the product, and None for the bias."""
        return linear(hidden, self.weight), None


def set_linear_attention(config: Any, spec: Any, sizes: LinearAttentionConfig, te: bool) -> None:
    """Set `LinearAttention` in a layer spec. The input norm stays separate also with Transformer Engine: two
    projections read its output."""
    layer = spec.submodules
    projections: tuple[Any, Any, Any] = (tensor_parallel.ColumnParallelLinear,
                                         tensor_parallel.RowParallelLinear,
                                         tensor_parallel.ColumnParallelLinear)
    if te:
        projections = (TEColumnParallelLinear, TERowParallelLinear, TEColumnParallelLinear)
        layer.input_layernorm = TENorm
    layer.self_attention = ModuleSpec(module=LinearAttention,
                                      params={"projections": projections, "sizes": sizes})
    # checkpoint names as in other layers: Megatron-Core's map for latent attention lacks them
    names = layer.sharded_state_dict_keys_map
    names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    names.pop("input_layernorm.", None)
