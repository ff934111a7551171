"""Linear attention as the attention of a layer: Kimi Delta Attention (arXiv 2510.26692), for rows of packed
documents at every layout, and with a state of constant size where sequences are generated.

Heads are cut over the tensor-parallel group.  Where a row is cut over processes, each gets the whole row of
its share of these heads by an all-to-all, and sends what it found back (as Megatron-Core's
`mamba_context_parallel.py` does), since a state passes through all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default
from torch.nn.functional import linear, rms_norm, silu, softplus

from megatron_sov.engine.model.attention import PackedDocuments
from megatron_sov.engine.model.cache_rows import CacheGroup, CacheSize, PackedSpans
from megatron_sov.engine.model.delta_rule import (
    by_kernels, by_token, chunk_documents, convolved_windows, in_chunks, normalised, short_convolution)
from megatron_sov.engine.parallel import context
from megatron_sov.model.config import LinearAttentionConfig

SPLIT = {"A_log": 0, "dt_bias": 0, "conv1d.weight": 0}
"""Parameters beside the projections that are cut by heads -> the axis."""


class Weight(torch.nn.Module):
    """A parameter under a name of its own: `conv1d.weight`, `out_norm.weight`."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(*shape, dtype=dtype))

    def forward(self) -> torch.Tensor:
        """Return it.  Weights that are gathered behind other work are waited for when their module is
        called, so that it is called for each use."""
        return self.weight


class WholeLinear(torch.nn.Module):
    """A projection that every tensor-parallel process has whole, and applies to the tokens that it has."""

    def __init__(self, inputs: int, outputs: int, config: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype))
        # what each process finds for its own tokens is summed, as of a norm
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the product, and no bias."""
        return linear(hidden, self.weight), None


class LinearAttention(MegatronModule):
    """Kimi Delta Attention: each channel of a state's keys forgets at a rate of its own; these rates, and the
    gates of the output, are made of two narrow vectors, which every process makes whole.

    Rows of `in_proj` stand by heads: query, key, value and learning rate
    (`LinearAttentionConfig.projected`), so that they can be cut between any two.
    """

    def __init__(self, config: Any, layer_number: int, projections: tuple[Any, Any, Any],
                 sizes: LinearAttentionConfig, pg_collection: Any, cp_comm_type: str | None = None,
                 name: str | None = None) -> None:
        """Make this process's part.

        Args:
            config: the library's TransformerConfig.
            layer_number: number of the layer, from 1.
            projections: classes of the input's, the output's, and those behind a narrow vector.
            sizes: of the whole layer.
            pg_collection: the library's groups.
            cp_comm_type: of other attention.
        """
        super().__init__(config)
        self.layer_number, self.sizes, self._group = layer_number, sizes, pg_collection.tp
        self.heads = sizes.num_key_heads // self._group.size()
        """Heads of this process."""
        self.in_proj = self._by_heads(projections[0], config.hidden_size,
                                      sizes.num_key_heads * sum(sizes.projected), "fc1")
        dtype = config.params_dtype
        self.conv1d = Weight((self.heads * sizes.convolved, 1, sizes.conv_taps), dtype)
        self.dt_bias, self.A_log = (torch.nn.Parameter(torch.empty(size, dtype=dtype))
                                    for size in (self.heads * sizes.key_head_dim, self.heads))
        self.out_norm = Weight((sizes.value_head_dim,), dtype)
        self.out_proj = build_module(
            projections[1], sizes.num_value_heads * sizes.value_head_dim, config.hidden_size,
            config=config, bias=False, is_expert=False, tp_group=self._group,
            init_method=config.output_layer_init_method, input_is_parallel=True, skip_bias_add=True,
            tp_comm_buffer_name="fc2")
        for parameter in (self.conv1d.weight, self.dt_bias, self.A_log):
            set_tensor_model_parallel_attributes(parameter, True, 0, 1)
        self.gates_down_proj = WholeLinear(config.hidden_size, 2 * sizes.gate_rank, config)
        self.decay_up_proj, self.output_up_proj = (
            self._by_heads(projections[2], sizes.gate_rank, sizes.num_key_heads * width, "fc1")
            for width in (sizes.key_head_dim, sizes.value_head_dim))
        self.kept: KeptState | None = None
        """What sequences that are generated have left behind; None: rows of documents are read."""

    def _by_heads(self, kind: Any, inputs: int, outputs: int, buffer: str) -> Any:
        """Return a projection whose outputs are cut by heads."""
        return build_module(kind, inputs, outputs, config=self.config, bias=False, is_expert=False,
                            tp_group=self._group, init_method=self.config.init_method, gather_output=False,
                            skip_bias_add=False, tp_comm_buffer_name=buffer)

    def forward(self, hidden_states: torch.Tensor, attention_mask: None = None,
                packed_seq_params: PackedDocuments | PackedSpans | None = None,
                **_: Any) -> tuple[torch.Tensor, None]:
        """Attend.

        Args:
            hidden_states: [tokens / sequence-parallel size, 1, hidden].
            packed_seq_params: the row's documents, or the spans of sequences that `kept` holds.

        Returns:
            [tokens / sequence-parallel size, 1, hidden], and no bias.
        """
        assert packed_seq_params is not None, "micro-batches are rows of packed documents"
        convolved, gate, gates = self.projected(hidden_states)
        if self.kept is not None:
            found = self.kept.read(convolved, gates, packed_seq_params)
        else:
            found = self._of_documents(torch.cat([convolved, gates], -1), packed_seq_params)
        # each process normalises its own heads, so of this weight each finds a part of the gradient
        weight = self.out_norm()
        if self._group.size() > 1:
            weight = tensor_parallel.copy_to_tensor_model_parallel_region(weight, self._group)
        found = rms_norm(found, weight.shape, weight.to(found.dtype), self.config.layernorm_epsilon)
        gate = gate.unflatten(-1, (-1, self.sizes.value_head_dim)).to(found.dtype)
        found = found * gate.sigmoid()
        output: tuple[torch.Tensor, None] = self.out_proj(found.flatten(1).to(hidden_states.dtype)[:, None])
        return output

    def projected(self, hidden: torch.Tensor) -> Sequence[torch.Tensor]:
        """[tokens / sequence-parallel size, 1, hidden] -> what is convolved, gates of the output, and what
        says rates and decays, [tokens, heads, channels] each."""
        narrow = self.gates_down_proj(hidden)[0].chunk(2, -1)
        decay, gate, found = (module(inputs)[0].squeeze(1).unflatten(-1, (self.heads, -1)) for module, inputs
                              in ((self.decay_up_proj, narrow[0]), (self.output_up_proj, narrow[1]),
                                  (self.in_proj, hidden)))
        convolved, rate = found.split([self.sizes.convolved, 1], -1)
        return convolved, gate, torch.cat([rate, decay], -1)

    def gates(self, gates: torch.Tensor, heads: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """[..., heads, channels], in the precision of the state -> decays [..., heads, 1, key channels] and
        rates [..., heads, 1] of these heads."""
        rate, step = gates.split([1, self.sizes.key_head_dim], -1)
        log, bias = (self._of_heads(p, heads, gates.dtype) for p in (self.A_log, self.dt_bias))
        return (-log.exp() * softplus(step + bias))[..., None, :], rate.sigmoid()

    def _of_documents(self, inputs: torch.Tensor, packed: PackedDocuments) -> torch.Tensor:
        """[tokens, heads, channels] -> [tokens, heads, 1, value channels]."""
        cut = context.size() > 1
        if cut:
            inputs = context.exchange_tokens(inputs)
        elif packed.shared is not None:
            inputs = inputs.index_select(0, packed.shared.source)
        convolved = inputs[..., :self.sizes.convolved]
        gates = inputs[..., self.sizes.convolved:]
        mine = context.share(inputs.shape[1]) if cut else slice(None)
        wide = self.convolution(mine)
        mixed = short_convolution(convolved.flatten(1).to(wide.dtype), wide, packed.chunks.positions)
        parts = self.parts(mixed.unflatten(-1, convolved.shape[1:]), gates, mine)
        if self.config.delta_kernels:
            found = by_kernels(*parts, chunks=packed.chunks, dtype=self.config.params_dtype)
        else:
            found = in_chunks(*parts, chunks=packed.chunks)[0]
        if cut:
            found = context.exchange_heads(found.flatten(2)).unflatten(-1, (-1, self.sizes.value_head_dim))
        return found

    def convolution(self, heads: slice = slice(None)) -> torch.Tensor:
        """Return the taps [channels, taps] of some heads, in the precision of the state."""
        weight = self.conv1d().unflatten(0, (self.heads, -1))[heads]
        return weight.flatten(0, 1).squeeze(1).to(torch.promote_types(weight.dtype, torch.float32))

    def parts(self, mixed: torch.Tensor, gates: torch.Tensor,
              heads: slice = slice(None)) -> list[torch.Tensor]:
        """Return query, key, value, decay and learning rate as the delta rule takes them.

        Args:
            mixed: [..., heads, channels] behind the convolution.
            gates: [..., heads, channels].
            heads: which of this process's heads these are.
        """
        width = self.sizes.key_head_dim
        query, key, value = silu(mixed).split([width, width, self.sizes.value_head_dim], -1)
        decay, rate = self.gates(gates.to(mixed.dtype), heads)
        if self.sizes.negative_eigenvalues:
            rate = 2 * rate
        return [normalised(query) * width ** -0.5, normalised(key), value[..., None, :], decay, rate]

    def _of_heads(self, parameter: torch.Tensor, heads: slice, dtype: torch.dtype) -> torch.Tensor:
        """Return the numbers of some heads, [heads, of each]."""
        return parameter.to(dtype).unflatten(0, (self.heads, -1))[heads]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (),
                           metadata: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the parameters, all but the norm cut by heads."""
        group = (metadata or {}).get("dp_cp_group")
        declared: dict[str, Any] = {}
        own: dict[str, torch.Tensor] = {name: getattr(self, name) for name in ("A_log", "dt_bias")}
        for name, module in self.named_children():
            if isinstance(module, Weight | WholeLinear):
                own[f"{name}.weight"] = module.weight
            else:
                declared |= sharded_state_dict_default(module, f"{prefix}{name}.", sharded_offsets, metadata,
                                                       tp_group=self._group)
        return declared | make_sharded_tensors_for_checkpoint(
            own, prefix, SPLIT, sharded_offsets, tp_group=self._group, dp_cp_group=group)


class KeptState:
    """What a layer keeps of sequences that are generated: the state of each, and the last inputs of its
    convolution, however long it is.

    Of a step that may be taken back (`CacheSize.step_tokens`) only the first token enters the state at once;
    the inputs of the others are kept beside it, and enter with the next step as far as they stand.
    """

    def __init__(self, size: CacheSize, layer: LinearAttention) -> None:
        self._size, self._layer = size, layer
        self._open = size.step_tokens - 1  # tokens that may be taken back
        self._past = [0] * size.slots  # tokens that the state has met
        self._state: torch.Tensor | None = None
        self._inputs: torch.Tensor | None = None
        self._gates: torch.Tensor | None = None

    def read(self, convolved: torch.Tensor, gates: torch.Tensor, spans: PackedSpans) -> torch.Tensor:
        """Read new tokens: [tokens, heads, channels] twice -> [tokens, heads, 1, value channels], zeros at
        padding."""
        sizes, wide = self._layer.sizes, self._layer.convolution()
        if self._state is None:
            heads, slots = self._layer.heads, self._size.slots
            self._state = wide.new_zeros(slots, heads, 1, sizes.key_head_dim, sizes.value_head_dim)
            self._inputs = wide.new_zeros(slots, wide.shape[1] - 1 + self._open, len(wide))
            self._gates = gates.new_zeros(slots, self._open, *gates.shape[1:])
        found = wide.new_zeros(len(convolved), self._layer.heads, 1, sizes.value_head_dim)
        for group in spans.groups:
            here = slice(group.start, group.start + len(group.past) * group.length)
            shape = (len(group.past), group.length)
            found[here] = self._read(group, convolved[here].flatten(1).to(wide.dtype).unflatten(0, shape),
                                     gates[here].unflatten(0, shape), wide).flatten(0, 1)
        return found

    def _read(self, group: CacheGroup, convolved: torch.Tensor, gates: torch.Tensor,
              wide: torch.Tensor) -> torch.Tensor:
        """Read a span of each of some sequences: [sequences, tokens, ...]."""
        assert self._state is not None and self._inputs is not None and self._gates is not None
        slots, length = slice(group.slot, group.slot + len(group.past)), group.length
        self._begin(group)
        stands = torch.tensor([past - self._past[group.slot + i] for i, past in enumerate(group.past)],
                              device=wide.device)
        if ((stands < 0) | (stands > self._open)).any():
            raise RuntimeError(f"slots from {group.slot} on have met {self._past[slots]} tokens and are read "
                               f"from {group.past} on: a state takes back at most {self._open}")
        # what stands of the open tokens moves next to the new ones; the others become tokens that change
        # nothing, before all
        inputs = torch.cat([_moved(self._inputs[slots], self._open - stands), convolved], 1)
        gates = torch.cat([_moved(self._gates[slots], self._open - stands), gates], 1)
        mixed = convolved_windows(inputs, wide).unflatten(-1, (self._layer.heads, -1))
        query, key, value, decay, rate = self._layer.parts(mixed, gates)
        silent = (torch.arange(mixed.shape[1], device=wide.device) < (self._open - stands)[:, None])
        rate = rate.masked_fill(silent[..., None, None], 0)
        decay = decay.masked_fill(silent[..., None, None, None], 0)
        row = (query, key, value, decay, rate)
        if length <= self._size.step_tokens:
            outputs, states = by_token(*row, self._state[slots])
            entered = 1
            self._state[slots] = states[self._open]
        else:
            count, tokens = mixed.shape[:2]
            chunks = chunk_documents([(i * tokens, i * tokens, (i + 1) * tokens) for i in range(count)],
                                     wide.device)
            outputs, self._state[slots] = in_chunks(*(t.flatten(0, 1) for t in row), chunks=chunks,
                                                    state=self._state[slots])
            outputs, entered = outputs.unflatten(0, (count, tokens)), length
        for kept, new in ((self._inputs, inputs), (self._gates, gates)):
            tail = new[:, self._open + entered:]
            kept[slots, :tail.shape[1]] = tail
        for i, past in enumerate(group.past):
            self._past[group.slot + i] = past + entered
        return outputs[:, self._open:]

    def _begin(self, group: CacheGroup) -> None:
        """Forget what was in slots whose sequences begin."""
        assert self._state is not None and self._inputs is not None
        for slot in (group.slot + i for i, past in enumerate(group.past) if not past):
            self._state[slot], self._inputs[slot], self._past[slot] = 0, 0, 0

    def copy(self, source: int, targets: Sequence[int]) -> None:
        """Have slots hold what another one does."""
        for kept in (self._state, self._inputs, self._gates):
            if kept is not None:
                kept[list(targets)] = kept[source].clone()  # they share memory
        for target in targets:
            self._past[target] = self._past[source]


def _moved(values: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Return each sequence's values some places further on, zeros before them: [sequences, places, ...],
    [sequences]."""
    source = torch.arange(values.shape[1], device=values.device) - by[:, None]
    at = source.clamp(min=0).reshape(*source.shape, *[1] * (values.dim() - 2)).expand_as(values)
    kept = (source >= 0).reshape(*source.shape, *[1] * (values.dim() - 2))
    return values.gather(1, at) * kept


def attend_linearly(config: Any, spec: Any, sizes: LinearAttentionConfig, te: bool) -> None:
    """Have a layer attend linearly.  The norm before it, whose output has two projections, stands by itself
    with Transformer Engine, too."""
    layer = spec.submodules
    projections: tuple[Any, Any, Any] = (tensor_parallel.ColumnParallelLinear,
                                         tensor_parallel.RowParallelLinear,
                                         tensor_parallel.ColumnParallelLinear)
    if te:
        from megatron.core.extensions.transformer_engine import (
            TEColumnParallelLinear, TENorm, TERowParallelLinear)

        projections = (TEColumnParallelLinear, TERowParallelLinear, TEColumnParallelLinear)
        layer.input_layernorm = TENorm
    layer.self_attention = ModuleSpec(module=LinearAttention,
                                      params={"projections": projections, "sizes": sizes})
    # as layers with other attention name them: the library has none of these under latent attention
    names = layer.sharded_state_dict_keys_map
    names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    names.pop("input_layernorm.", None)
