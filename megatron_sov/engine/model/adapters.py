"""Low-rank adapters on a `Chunk`'s linear layers, output head and token embedding, at any layout.

Megatron-Core's checkpoints do not contain the adapters' parameters; `local_shards` adds the blocks."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

from megatron_sov.model.config import LoraConfig, ModelConfig
from megatron_sov.model.families.adapters import MAGNITUDE, A, AdaptedModule, B, find_adapted_modules

# Low-rank adapters at any layout: W x + alpha / rank B A x (LoRA, arXiv 2106.09685), optionally with trained
# row lengths (DoRA, arXiv 2402.09353).
#
# Column-parallel layers (QKV, gate and up) split B by rows and replicate A; row-parallel layers split A by
# columns and replicate B; replicated layers (narrow latent projections) replicate both. Messages between
# processes have shape [tokens, rank].
#
# Each process computes a partial gradient of a replicated factor in two cases: under sequence parallelism
# (its own tokens), where Megatron-Core sums the gradient as it does for norms; and in split experts and the
# head (its own rows), where `copy_to_tensor_model_parallel_region` on the factor sums it. In all other cases
# every process computes the full gradient.

COLUMN_PARALLEL = ("linear_qkv", "linear_q_proj", "_up_proj", "linear_fc1", "output_layer", "word_embeddings",
                   "self_attention.in_proj")
"""Suffixes of layers whose weight is split by rows."""
REPLICATED = "_down_proj"
"""Suffix for replicated layers (narrow latent projections). The remaining layers are split by columns."""
OUTPUT_HEAD = "output_layer"
_EMBEDDING = "embedding.word_embeddings"


class Adapters(torch.nn.Module):
    """A `Chunk`'s adapters. Adapted layers reference adapters only through forward hooks."""

    def __init__(self, chunk: Any, model: ModelConfig, lora: LoraConfig) -> None:
        """Create adapters for a chunk's modules and register the forward hooks."""
        super().__init__()
        self.linears = torch.nn.ModuleList()
        self.head: LinearAdapter | None = None
        """Adapter for the output head, whose weight the losses use."""
        self.embedding: EmbeddingAdapter | None = None
        by_linear: dict[str, list[AdaptedModule]] = {}
        for module in find_adapted_modules(model, lora):
            by_linear.setdefault(module.linear, []).append(module)
        for layer in chunk.decoder.layers:
            prefix = f"decoder.layers.{layer.layer_number - 1}."
            for linear, modules in by_linear.items():
                if linear.startswith(prefix):
                    self._attach_adapters(layer, linear.removeprefix(prefix), modules, lora, chunk.config)
        if _EMBEDDING in by_linear and chunk.pre_process:
            words = chunk.embedding.word_embeddings
            self.embedding = EmbeddingAdapter(by_linear[_EMBEDDING][0], lora, chunk.config, len(words.weight))
            words.register_forward_hook(build_embedding_hook(self.embedding))
        if OUTPUT_HEAD in by_linear and chunk.post_process:
            self.head = LinearAdapter(by_linear[OUTPUT_HEAD], lora, chunk.config,
                                      rows=len(chunk.output_layer.weight))

    def _attach_adapters(self, layer: Any, path: str, modules: list[AdaptedModule], lora: LoraConfig,
                         config: Any) -> None:
        """Attach adapters to a linear layer, or to the same linear layer in each local expert."""
        def create_adapter(expert: int | None = None) -> LinearAdapter:
            adapter = LinearAdapter(modules, lora, config, expert)
            self.linears.append(adapter)
            return adapter

        if not modules[0].num_experts:
            layer.get_submodule(path).register_forward_hook(_build_linear_hook(create_adapter()))
            return
        experts, linear = layer.mlp.experts, path.rpartition(".")[2]
        count = experts.num_local_experts
        first = parallel_state.get_expert_model_parallel_rank() * count
        adapters = [create_adapter(first + i) for i in range(count)]
        if hasattr(experts, "local_experts"):
            for expert, adapter in zip(experts.local_experts, adapters, strict=True):
                expert.get_submodule(linear).register_forward_hook(_build_linear_hook(adapter))
        else:
            experts.get_submodule(linear).register_forward_hook(_build_grouped_hook(adapters))

    def factors(self) -> "Iterator[AdapterFactors]":
        yield from (module for module in self.modules() if isinstance(module, AdapterFactors))

    def set_magnitudes(self, chunk: Any) -> None:
        """Initialize trained row lengths (DoRA) from the frozen weights."""
        for module in chunk.modules():
            for hook in module._forward_hooks.values():
                if isinstance(adapter := getattr(hook, "adapter", None), LinearAdapter):
                    adapter.set_magnitudes(module.weight)

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Return nothing: `local_shards` reads the blocks from the factors."""
        return {}


class LinearAdapter(torch.nn.Module):
    """The adapters of a fused linear layer, for example QKV, or an expert's gate and up."""

    def __init__(self, modules: Sequence[AdaptedModule], lora: LoraConfig, config: Any,
                 expert: int | None = None, rows: int | None = None) -> None:
        """Create the factors; `initial_weights.initialize_weights` sets their values.

        Args:
            modules: the adapted modules inside the layer.
            lora: rank, scale and kind.
            config: Megatron-Core's `TransformerConfig`.
            expert: index of the routed expert. None: not a routed expert.
            rows: local rows of the head, padding included.
        """
        super().__init__()
        first = modules[0]
        self.scale, self._dora, self._column = lora.alpha / lora.rank, lora.dora, is_column_parallel(first)
        self._row = is_row_parallel(first)
        self._scattered = config.sequence_parallel and expert is None
        factors = [AdapterFactors(module, lora, config, expert, rows) for module in modules]
        self._group = factors[0].group()
        self.factors: Any = torch.nn.ModuleList(factors)
        self._rows, self._axis, self._lengths = self._split_layout(first)

    @property
    def _parts(self) -> list[Any]:
        """Factors by position in the layer's output; None where the module has no adapter."""
        parts: list[Any] = [None] * len(self._lengths)
        for factors in self.factors:
            parts[factors.target.part] = factors
        return parts

    def _split_layout(self, first: AdaptedModule) -> tuple[list[int], int, list[int]]:
        """Return the fused weight's local rows as axes, the axis that concatenates modules, and the modules'
        extents on that axis (`families.weights.Layout`)."""
        cut = self._group.size() if self._column else 1
        if first.num_experts:
            return [first.out_features // cut], 0, [first.out_features // cut]
        layout = first.link.layout
        rows, lengths = list(layout.view[:layout.merged]), list(layout.lengths)
        axis = layout.axis
        if len(rows) == 1:
            rows, lengths = [rows[0] // cut], [lengths[0] // cut]
        else:
            rows[1 if axis == 0 else 0] //= cut  # query groups, or the width
        return rows, axis, lengths

    def _concatenate_parts(self, parts: Sequence[torch.Tensor | None], missing: torch.Tensor) -> torch.Tensor:
        """Concatenate per-module outputs [..., module rows] to the fused layout [..., fused rows].

        Args:
            parts: outputs by position; None takes the slice of `missing`.
            missing: [..., fused rows], or broadcastable to it.
        """
        if len(parts) == 1:
            assert parts[0] is not None
            return parts[0]
        lead = next(part for part in parts if part is not None).shape[:-1]
        expanded = missing.expand(*lead, math.prod(self._rows)).unflatten(-1, self._rows)
        pieces, start = [], 0
        for part, length in zip(parts, self._lengths, strict=True):
            axis, shape = len(lead) + self._axis, [*self._rows[:self._axis], length,
                                                   *self._rows[self._axis + 1:]]
            pieces.append(expanded.narrow(axis, start, length) if part is None else part.unflatten(-1, shape))
            start += length
        return torch.cat(pieces, len(lead) + self._axis).flatten(len(lead))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the adapter's addition to the layer's output, for the layer's local input."""
        used = [factors.get_forward_factors() for factors in self.factors]
        low = torch.nn.functional.linear(inputs, torch.cat([a for a, _ in used]))
        lows = self._reduce_or_gather(low).chunk(len(used), -1)
        outputs: list[torch.Tensor | None] = [None] * len(self._lengths)
        for factors, (_, b), part in zip(self.factors, used, lows, strict=True):
            outputs[factors.target.part] = torch.nn.functional.linear(part, b)
        return self._concatenate_parts(outputs, inputs.new_zeros(1)) * self.scale

    def _reduce_or_gather(self, low: torch.Tensor) -> torch.Tensor:
        """Gather A x [tokens, rank] before a B split by rows, or reduce it after an A split by columns."""
        if self.factors[0].sums_itself or self._group.size() == 1 or not (self._column or self._row):
            return low  # the expert layer itself dispatches tokens and reduces outputs
        if self._column and self._scattered:
            return tensor_parallel.gather_from_sequence_parallel_region(low, group=self._group)
        if self._column:
            return tensor_parallel.copy_to_tensor_model_parallel_region(low, self._group)
        if self._scattered:
            return tensor_parallel.reduce_scatter_to_sequence_parallel_region(low, self._group)
        return tensor_parallel.reduce_from_tensor_model_parallel_region(low, self._group)

    @torch.no_grad()
    def _compute_update(self) -> torch.Tensor:
        """Return the local block of alpha / rank B A, shaped like the layer's weight."""
        width = self.factors[0].A.shape[1]
        columns: list[torch.Tensor | None] = [None] * len(self._lengths)
        for factors in self.factors:
            columns[factors.target.part] = (factors.B @ factors.A).T
        return self._concatenate_parts(columns, self.factors[0].A.new_zeros(width, 1)).T * self.scale

    @torch.no_grad()
    def compute_row_lengths(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the L2 norm per local row of W + alpha / rank B A, computed in float32 or wider and rounded
        to the weight's dtype."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        lengths = torch.linalg.vector_norm(weight + self._compute_update(), dim=1, dtype=wide)
        if self._row and self._group.size() > 1:
            squares = lengths.square()
            torch.distributed.all_reduce(squares, group=self._group)
            lengths = squares.sqrt()
        return lengths.to(weight.dtype)

    @torch.no_grad()
    def set_magnitudes(self, weight: torch.Tensor) -> None:
        """Initialize the trained row lengths (DoRA) from the frozen weight; valid while B is 0."""
        lengths = self.compute_row_lengths(weight)
        by_part = lengths.unflatten(0, self._rows)
        start = 0
        for factors, length in zip(self._parts, self._lengths, strict=True):
            if factors is not None:
                part_lengths = by_part.narrow(self._axis, start, length)
                factors.magnitude.copy_(part_lengths.flatten())
            start += length

    def adapt_output(self, weight: torch.Tensor, inputs: torch.Tensor, output: torch.Tensor,
                     bias: torch.Tensor | None) -> torch.Tensor:
        """Return the adapted layer's output.

        Args:
            weight: the frozen weight.
            inputs: inputs after any fused norm.
            output: output of the frozen layer.
            bias: bias included in `output`. None: no bias.
        """
        if not self._dora:
            return output + self(inputs)
        plain = output if bias is None else output - bias
        scaled = (plain + self(inputs)) * self._compute_row_scale(weight)
        return scaled if bias is None else scaled + bias

    def _compute_row_scale(self, weight: torch.Tensor) -> torch.Tensor:
        """Return trained / current row lengths (DoRA), [rows]."""
        # the current length is a constant for the gradient (DoRA, section 4.3; PEFT does the same)
        lengths = self.compute_row_lengths(weight)
        return self._concatenate_parts([None if f is None else f.magnitude for f in self._parts],
                                       lengths) / lengths

    @torch.no_grad()
    def compute_effective_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the adapted layer's effective weight, without gradient."""
        adapted = weight + self._compute_update()
        return adapted * self._compute_row_scale(weight)[:, None] if self._dora else adapted

    def merge_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Return W + alpha / rank B A of a row-split layer, differentiable in A and B on every process."""
        (factors,) = self.factors
        a, b = factors.get_forward_factors()
        return torch.addmm(weight, b, a, alpha=self.scale)  # allocates one matrix instead of three


# A low-rank adapter of the token embedding, at any layout: row t of E becomes row t of E + alpha / rank B A.
# B has one row per token id and is split like the embedding; A is replicated. Messages between processes
# have shape [tokens, rank]. Under sequence parallelism the gradient of A covers the local tokens, as for a
# norm; otherwise all processes compute the full gradient.


class EmbeddingAdapter(torch.nn.Module):
    """The token embedding's adapter (`LoraConfig`)."""

    def __init__(self, target: AdaptedModule, lora: LoraConfig, config: Any, rows: int) -> None:
        """Create the factors; `initial_weights.initialize_weights` sets their values.

        Args:
            target: the embedding module.
            lora: rank and scale.
            config: Megatron-Core's `TransformerConfig`.
            rows: local embedding rows, padding included.
        """
        super().__init__()
        self.scale = lora.alpha / lora.rank
        self.factors = AdapterFactors(target, lora, config, None, rows)

    def forward(self, tokens: torch.Tensor, embedding: Any) -> torch.Tensor:
        """Return the adapter's addition to token embeddings, for ids [rows, n]."""
        b, group = self.factors.B, embedding.tp_group
        rows = tokens - embedding.vocab_start_index
        not_local = (rows < 0) | (rows >= len(b))
        rows = rows.masked_fill(not_local, 0)
        low = b[rows] if embedding.deterministic_mode else torch.nn.functional.embedding(rows, b)
        low = low.masked_fill(not_local[..., None], 0)
        if embedding.reduce_scatter_embeddings:
            low = tensor_parallel.reduce_scatter_to_sequence_parallel_region(
                low.transpose(0, 1).contiguous(), group=group)
        elif group.size() > 1:
            low = tensor_parallel.reduce_from_tensor_model_parallel_region(low, group)
        return low @ self.factors.A * self.scale


class AdapterFactors(torch.nn.Module):
    """The local parts of `A`, `B` and (DoRA) `magnitude` for an adapted module or an adapted expert."""

    def __init__(self, target: AdaptedModule, lora: LoraConfig, config: Any, expert: int | None,
                 rows: int | None) -> None:
        super().__init__()
        self.target, self.expert, self.column = target, expert, is_column_parallel(target)
        row, size = is_row_parallel(target), self.group().size()
        self._rows = rows or target.out_features // (size if self.column else 1)
        columns = target.in_features // (size if row else 1)
        dtype = config.params_dtype
        # zeros, not empty memory: until initialization 0 * B A must be 0, and NaN would remain NaN
        self.A = torch.nn.Parameter(torch.zeros(lora.rank, columns, dtype=dtype))
        # zeros: nothing writes the padding rows of the head
        self.B = torch.nn.Parameter(torch.zeros(self._rows, lora.rank, dtype=dtype))
        self.magnitude = torch.nn.Parameter(torch.ones(self._rows, dtype=dtype)) if lora.dora else None
        # the factors of a split expert and of the head sum their own gradients
        self.sums_itself = expert is not None or target.linear == OUTPUT_HEAD
        for parameter, split in ((self.A, row), (self.B, self.column), (self.magnitude, self.column)):
            if parameter is not None:
                self._mark_parameter(parameter, split, int(parameter is self.A), config.sequence_parallel)

    def group(self) -> Any:
        """Return the process group that splits the layer."""
        if self.expert is None:
            return parallel_state.get_tensor_model_parallel_group()
        return parallel_state.get_expert_tensor_parallel_group()

    def _mark_parameter(self, parameter: torch.nn.Parameter, split: bool, axis: int,
                        sequence_parallel: bool) -> None:
        """Set the attributes that control gradient reduction and the gradient norm."""
        if self.expert is not None:
            # the first process of the expert's group counts replicated factors; Megatron-Core would take the
            # first process of the attention's tensor-parallel group, a different group
            set_tensor_model_parallel_attributes(parameter, True, axis, 1)
            parameter.shared = not split and self.group().rank() > 0  # type: ignore[attr-defined]
            parameter.allreduce = False  # type: ignore[attr-defined]
        elif split:
            set_tensor_model_parallel_attributes(parameter, True, axis, 1)
        else:
            parameter.sequence_parallel = (  # type: ignore[attr-defined]
                sequence_parallel and not self.sums_itself)

    def get_forward_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B for the forward pass; the backward pass sums their gradients over the group."""
        if not self.sums_itself or self.group().size() == 1:
            return self.A, self.B
        copy_to_group = tensor_parallel.copy_to_tensor_model_parallel_region
        if self.column:
            return copy_to_group(self.A, self.group()), self.B
        return self.A, copy_to_group(self.B, self.group())

    def blocks(self) -> Iterator[tuple[str, torch.Tensor, tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
        """Yield a `LocalShard`'s fields per factor: name, data, global shape, offset, replica."""
        target, group_rank = self.target, self.group().rank()
        halves = (target.halves,) if target.halves > 1 else ()
        views = {A: (self.A, -1, is_row_parallel(target)),
                 B: (self.B.view(*halves, self._rows // target.halves, -1), -2, self.column)}
        if self.magnitude is not None:
            views[MAGNITUDE] = (self.magnitude, -1, self.column)
        rank = self.A.shape[0]
        shapes = target.shapes(LoraConfig(rank=rank, dora=self.magnitude is not None))
        for name, (view, axis, split) in views.items():
            shape = shapes[target.key(name)]
            offset = [self.expert or 0, *(0,) * (len(shape) - 1)]
            if split:
                offset[axis] = group_rank * view.shape[axis]
                if offset[axis] >= shape[axis]:  # padding rows of the head
                    continue
                view = view.narrow(axis, 0, min(view.shape[axis], shape[axis] - offset[axis]))
            yield (target.key(name), view.detach(), shape, tuple(offset),
                   (0, 0 if split else group_rank, self._get_replica()))

    def _get_replica(self) -> int:
        if self.expert is None:
            return int(parallel_state.get_data_parallel_rank(with_context_parallel=True))
        return int(parallel_state.get_expert_data_parallel_rank())


def is_column_parallel(target: AdaptedModule) -> bool:
    """Return whether the weight is split by rows (column-parallel layer)."""
    return target.linear.endswith(COLUMN_PARALLEL)


def is_row_parallel(target: AdaptedModule) -> bool:
    """Return whether the weight is split by columns (row-parallel layer)."""
    return not target.linear.endswith((*COLUMN_PARALLEL, REPLICATED))


def get_effective_weight(linear: Any) -> torch.Tensor:
    """Return a linear layer's weight with merged `LinearAdapter`, without gradient."""
    weight: torch.Tensor = linear.weight
    for hook in linear._forward_hooks.values():
        if isinstance(adapter := getattr(hook, "adapter", None), LinearAdapter):
            weight = adapter.compute_effective_weight(weight)
    return weight


def build_embedding_hook(adapter: EmbeddingAdapter) -> Callable[..., torch.Tensor]:
    """Return the forward hook that adds `EmbeddingAdapter.forward` to the embedding."""
    return lambda module, inputs, output: output + adapter(inputs[0], module)


def _build_linear_hook(adapter: LinearAdapter) -> Callable[..., Any]:
    """Return the forward hook that replaces a linear layer's output by `LinearAdapter.adapt_output`."""
    def replace_output(module: Any, inputs: tuple[Any, ...], outputs: tuple[Any, Any]) -> tuple[Any, Any]:
        output, skipped_bias = outputs
        bias = getattr(module, "bias", None)
        has_bias = bias is not None and bias.numel() > 0 and skipped_bias is None
        adapted = adapter.adapt_output(module.weight, _apply_fused_norm(module, inputs[0]), output,
                                       bias if has_bias else None)
        return adapted, skipped_bias

    replace_output.adapter = adapter  # type: ignore[attr-defined]
    return replace_output


def _apply_fused_norm(module: Any, inputs: torch.Tensor) -> torch.Tensor:
    """Return the input of the matrix product: Transformer Engine fuses the norm into the linear layer."""
    weight = getattr(module, "layer_norm_weight", None)
    if weight is None:
        return inputs
    return torch.nn.functional.rms_norm(inputs, weight.shape, weight, module.eps)


def _build_grouped_hook(adapters: list[LinearAdapter]) -> Callable[..., Any]:
    """Return the hook of a grouped linear layer; its input has the tokens of all local experts in order."""
    def add_adapter_outputs(_: Any, inputs: tuple[Any, ...], outputs: tuple[Any, Any]) -> tuple[Any, Any]:
        tokens, counts = inputs[:2]
        output, skipped_bias = outputs
        added = [adapter(part) for adapter, part in zip(adapters, tokens.split(list(counts)), strict=True)]
        return output + torch.cat(added), skipped_bias

    return add_adapter_outputs
