"""What a run of layers has beside the library's modules, at any layout: low-rank adapters, and encoders of
pictures and sounds.

Both hold parameters that the library's checkpoints do not know; `local_shards` asks for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch.utils.checkpoint import checkpoint

from megatron_sov.engine.parallel import context
from megatron_sov.engine.parallel.device import to_device
from megatron_sov.model.config import LoraConfig, ModelConfig
from megatron_sov.model.families.adapters import MAGNITUDE, A, Adapted, B, adapted_modules
from megatron_sov.model.modality import ENCODERS, EncoderInput, EncoderInputs, modality, select_placeholders

# Low-rank adapters of a frozen model's linear layers, at any layout: W x + alpha / rank B A x (LoRA,
# arXiv 2106.09685), or that with rows of trained length (DoRA, arXiv 2402.09353).
#
# A column-parallel layer (query, key and value; gate and up) has its B cut by rows and all of A on every
# process, a row-parallel one A cut by columns and all of B, and a layer that every process has whole (which
# makes narrow vectors) all of both.  What travels between processes is [tokens, rank].
#
# Of a factor that every process has, each computes a part of the gradient: that of its own tokens under
# sequence parallelism, which the library sums as it does a norm's; that of its own rows inside an expert that
# is cut, and of the head, where `copy_to_tensor_model_parallel_region` on the factor itself sums it.
# Elsewhere all compute the same one.

COLUMN = ("linear_qkv", "linear_q_proj", "_up_proj", "linear_fc1", "output_layer", "word_embeddings",
          "self_attention.in_proj")
"""Layers that are cut by rows of their weight."""
WHOLE = "_down_proj"
"""Those that are not cut: of narrow vectors. All others are cut by columns."""

OUTPUT_HEAD = "output_layer"


class Factors(torch.nn.Module):
    """This process's part of A, B and (DoRA) the rows' lengths of one adapted module, or one expert of it."""

    def __init__(self, of: Adapted, lora: LoraConfig, config: Any, expert: int | None,
                 rows: int | None) -> None:
        super().__init__()
        self.of, self.expert, self.column = of, expert, is_column(of)
        row, size = is_row(of), self.group().size()
        self._rows = rows or of.out_features // (size if self.column else 1)
        columns = of.in_features // (size if row else 1)
        dtype = config.params_dtype
        # zeros: until it is initialised or loaded, 0 B A must be 0, which it is not where memory holds NaN
        self.A = torch.nn.Parameter(torch.zeros(lora.rank, columns, dtype=dtype))
        # zeros: nothing else ever writes the rows of a head that belong to no token
        self.B = torch.nn.Parameter(torch.zeros(self._rows, lora.rank, dtype=dtype))
        self.magnitude = torch.nn.Parameter(torch.ones(self._rows, dtype=dtype)) if lora.dora else None
        # the factors of a cut expert, and of a head, sum their gradients themselves
        self.sums_itself = expert is not None or of.linear == OUTPUT_HEAD
        for parameter, split in ((self.A, row), (self.B, self.column),
                                 (self.magnitude, self.column)):
            if parameter is not None:
                self._mark(parameter, split, int(parameter is self.A), config.sequence_parallel)

    def group(self) -> Any:
        """Return the processes that share the layer."""
        return (parallel_state.get_tensor_model_parallel_group() if self.expert is None
                else parallel_state.get_expert_tensor_parallel_group())

    def _mark(self, parameter: torch.nn.Parameter, split: bool, axis: int, sequence_parallel: bool) -> None:
        """Tell the library how the gradient is summed, and who counts it in the norm."""
        if self.expert is not None:
            # of what all processes of an expert hold, the first one's counts; the library would take the
            # first of the attention's tensor-parallel group, which is another one
            set_tensor_model_parallel_attributes(parameter, True, axis, 1)
            parameter.shared = not split and self.group().rank() > 0  # type: ignore[attr-defined]
            parameter.allreduce = False  # type: ignore[attr-defined]
        elif split:
            set_tensor_model_parallel_attributes(parameter, True, axis, 1)
        else:
            parameter.sequence_parallel = (  # type: ignore[attr-defined]
                sequence_parallel and not self.sums_itself)

    def used(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B as the forward pass uses them, with gradients that are summed where they must be."""
        if not self.sums_itself or self.group().size() == 1:
            return self.A, self.B
        copied = tensor_parallel.copy_to_tensor_model_parallel_region
        return ((copied(self.A, self.group()), self.B) if self.column
                else (self.A, copied(self.B, self.group())))

    def blocks(self) -> Iterator[tuple[str, torch.Tensor, tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
        """Yield this process's blocks of the global tensors: name, memory, global shape, place in it, and
        place among the processes that hold the same (as `local_shards.LocalShard`)."""
        of, place = self.of, self.group().rank()
        halves = (of.halves,) if of.halves > 1 else ()
        views = {A: (self.A, -1, is_row(of)),
                 B: (self.B.view(*halves, self._rows // of.halves, -1), -2, self.column)}
        if self.magnitude is not None:
            views[MAGNITUDE] = (self.magnitude, -1, self.column)
        rank = self.A.shape[0]
        shapes = of.shapes(LoraConfig(rank=rank, dora=self.magnitude is not None))
        for name, (view, axis, split) in views.items():
            shape = shapes[of.key(name)]
            offset = [self.expert or 0, *(0,) * (len(shape) - 1)]
            if split:
                offset[axis] = place * view.shape[axis]
                if offset[axis] >= shape[axis]:  # of a head rows may stand behind all tokens
                    continue
                view = view.narrow(axis, 0, min(view.shape[axis], shape[axis] - offset[axis]))
            yield (of.key(name), view.detach(), shape, tuple(offset),
                   (0, 0 if split else place, self._replica()))

    def _replica(self) -> int:
        return int(parallel_state.get_data_parallel_rank(with_context_parallel=True) if self.expert is None
                   else parallel_state.get_expert_data_parallel_rank())


class LinearAdapter(torch.nn.Module):
    """The adapters of one of the library's linear layers: of query, key and value, say, or of one expert's
    gate and up projection."""

    def __init__(self, modules: Sequence[Adapted], lora: LoraConfig, config: Any, expert: int | None = None,
                 rows: int | None = None) -> None:
        """Make the factors; their values are set by `load.initialise`.

        Args:
            modules: what of the layer is adapted.
            lora: rank, scale and kind.
            config: the library's TransformerConfig.
            expert: number of the expert that the layer belongs to; None: it is no routed expert's.
            rows: of a head, this process's rows with those that belong to no token.
        """
        super().__init__()
        first = modules[0]
        self.scale, self._dora, self._column = lora.alpha / lora.rank, lora.dora, is_column(first)
        self._row = is_row(first)
        self._scattered = config.sequence_parallel and expert is None
        factors = [Factors(of, lora, config, expert, rows) for of in modules]
        self._group = factors[0].group()
        self.factors: Any = torch.nn.ModuleList(factors)
        self._rows, self._axis, self._lengths = self._layout(first)

    @property
    def _parts(self) -> list[Any]:
        """Return the factors by their place in the layer's output; None: not adapted."""
        parts: list[Any] = [None] * len(self._lengths)
        for factors in self.factors:
            parts[factors.of.part] = factors
        return parts

    def _layout(self, first: Adapted) -> tuple[list[int], int, list[int]]:
        """Return this process's rows of the fused weight as axes, the axis along which the adapted modules
        follow one another, and their extents there (`families.weights.Layout`)."""
        cut = self._group.size() if self._column else 1
        if first.num_experts:
            return [first.out_features // cut], 0, [first.out_features // cut]
        layout = first.link.layout
        rows, lengths = list(layout.view[:layout.merged]), list(layout.lengths)
        axis = layout.axis
        if len(rows) == 1:
            rows, lengths = [rows[0] // cut], [lengths[0] // cut]
        else:
            rows[1 if axis == 0 else 0] //= cut  # the heads' groups, or the width
        return rows, axis, lengths

    def _joined(self, parts: Sequence[torch.Tensor | None], missing: torch.Tensor) -> torch.Tensor:
        """Return [..., rows of the fused weight] of the modules' parts, [..., their rows] each.

        Args:
            parts: by their place; None: taken from `missing`.
            missing: [..., rows of the fused weight] or broadcast to it.
        """
        if len(parts) == 1:
            assert parts[0] is not None
            return parts[0]
        lead = next(part for part in parts if part is not None).shape[:-1]
        whole = missing.expand(*lead, math.prod(self._rows)).unflatten(-1, self._rows)
        pieces, start = [], 0
        for part, length in zip(parts, self._lengths, strict=True):
            axis, own = len(lead) + self._axis, [*self._rows[:self._axis], length,
                                                 *self._rows[self._axis + 1:]]
            pieces.append(whole.narrow(axis, start, length) if part is None
                          else part.unflatten(-1, own))
            start += length
        return torch.cat(pieces, len(lead) + self._axis).flatten(len(lead))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return what is added to the layer's output, for its input as this process has it."""
        used = [factors.used() for factors in self.factors]
        low = torch.nn.functional.linear(inputs, torch.cat([a for a, _ in used]))
        lows = self._shared(low).chunk(len(used), -1)
        outputs: list[torch.Tensor | None] = [None] * len(self._lengths)
        for factors, (_, b), own in zip(self.factors, used, lows, strict=True):
            outputs[factors.of.part] = torch.nn.functional.linear(own, b)
        return self._joined(outputs, inputs.new_zeros(1)) * self.scale

    def _shared(self, low: torch.Tensor) -> torch.Tensor:
        """Return A x [tokens, rank] as this process needs it: of all tokens before a B that is cut by rows,
        and summed over the columns of an A that is cut."""
        if self.factors[0].sums_itself or self._group.size() == 1 or not (self._column or self._row):
            return low  # an expert's tokens and sums are exchanged where they are sent
        if self._column:
            return (tensor_parallel.gather_from_sequence_parallel_region(low, group=self._group)
                    if self._scattered
                    else tensor_parallel.copy_to_tensor_model_parallel_region(low, self._group))
        return (tensor_parallel.reduce_scatter_to_sequence_parallel_region(low, self._group)
                if self._scattered
                else tensor_parallel.reduce_from_tensor_model_parallel_region(low, self._group))

    @torch.no_grad()
    def _update(self) -> torch.Tensor:
        """Return this process's block of alpha / rank B A, shaped as the layer's weight."""
        width = self.factors[0].A.shape[1]
        columns: list[torch.Tensor | None] = [None] * len(self._lengths)
        for factors in self.factors:
            columns[factors.of.part] = (factors.B @ factors.A).T
        return self._joined(columns, self.factors[0].A.new_zeros(width, 1)).T * self.scale

    @torch.no_grad()
    def row_lengths(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the length of each row of W + alpha / rank B A, of this process's rows: summed in float32 at
        least, and rounded to the weight's dtype, in which it is trained."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        lengths = torch.linalg.vector_norm(weight + self._update(), dim=1, dtype=wide)
        if self._row and self._group.size() > 1:
            squares = lengths.square()
            torch.distributed.all_reduce(squares, group=self._group)
            lengths = squares.sqrt()
        return lengths.to(weight.dtype)

    @torch.no_grad()
    def set_magnitudes(self, weight: torch.Tensor) -> None:
        """Set the trained lengths (DoRA) to those of the frozen weight's rows, as they are when B is 0."""
        lengths = self.row_lengths(weight)
        whole = lengths.unflatten(0, self._rows)
        start = 0
        for factors, length in zip(self._parts, self._lengths, strict=True):
            if factors is not None:
                own = whole.narrow(self._axis, start, length)
                factors.magnitude.copy_(own.flatten())
            start += length

    def applied(self, weight: torch.Tensor, inputs: torch.Tensor, output: torch.Tensor,
                bias: torch.Tensor | None) -> torch.Tensor:
        """Return the adapted layer's output.

        Args:
            weight: the layer's.
            inputs: as they meet the weight.
            output: what the frozen layer gives.
            bias: what of it was added to that output; None: nothing.
        """
        if not self._dora:
            return output + self(inputs)
        plain = output if bias is None else output - bias
        scaled = (plain + self(inputs)) * self._stretch(weight)
        return scaled if bias is None else scaled + bias

    def _stretch(self, weight: torch.Tensor) -> torch.Tensor:
        """Return how much longer each row has become (DoRA)."""
        # the length of a row is a number, not differentiated (DoRA, section 4.3; so does PEFT)
        lengths = self.row_lengths(weight)
        return self._joined([None if f is None else f.magnitude for f in self._parts], lengths) / lengths

    @torch.no_grad()
    def inside(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight that the adapted layer has."""
        adapted = weight + self._update()
        return adapted * self._stretch(weight)[:, None] if self._dora else adapted

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """Return W + alpha / rank B A of a layer that is cut by rows, differentiable by A and B on every
        process."""
        (factors,) = self.factors
        a, b = factors.used()
        return torch.addmm(weight, b, a, alpha=self.scale)  # one matrix of that size, and not three


def is_column(of: Adapted) -> bool:
    """Return whether the layer is cut by rows of its weight."""
    return of.linear.endswith(COLUMN)


def is_row(of: Adapted) -> bool:
    """Return whether the layer is cut by columns of its weight."""
    return not of.linear.endswith((*COLUMN, WHOLE))


def adapted_weight(linear: Any) -> torch.Tensor:
    """Return a linear layer's weight, of an adapted one with the adapter inside; not differentiable."""
    weight: torch.Tensor = linear.weight
    for hook in linear._forward_hooks.values():
        if isinstance(adapter := getattr(hook, "adapter", None), LinearAdapter):
            weight = adapter.inside(weight)
    return weight


_EMBEDDING = "embedding.word_embeddings"


# A low-rank adapter of the token embedding, at any layout: row t of E becomes that of E + alpha / rank B A.
# B has a row per token id and is cut as the embedding is; all of A is on every process. What travels
# between processes is [tokens, rank]. A's gradient is, as a norm's, that of the process's own tokens under
# sequence parallelism, and else the same on all of them.


class EmbeddingAdapter(torch.nn.Module):
    """The adapter of a chunk's embedding."""

    def __init__(self, of: Adapted, lora: LoraConfig, config: Any, rows: int) -> None:
        """Make the factors; their values are set by `load.initialise`.

        Args:
            of: the embedding.
            lora: rank and scale.
            config: the library's TransformerConfig.
            rows: this process's rows with those that belong to no token.
        """
        super().__init__()
        self.scale = lora.alpha / lora.rank
        self.factors = Factors(of, lora, config, None, rows)

    def forward(self, tokens: torch.Tensor, embedding: Any) -> torch.Tensor:
        """Return what is added to the output of the library's embedding of tokens [1, n] (or more rows)."""
        b, group = self.factors.B, embedding.tp_group
        places = tokens - embedding.vocab_start_index
        elsewhere = (places < 0) | (places >= len(b))
        places = places.masked_fill(elsewhere, 0)
        low = b[places] if embedding.deterministic_mode else torch.nn.functional.embedding(places, b)
        low = low.masked_fill(elsewhere[..., None], 0)
        if embedding.reduce_scatter_embeddings:
            low = tensor_parallel.reduce_scatter_to_sequence_parallel_region(
                low.transpose(0, 1).contiguous(), group=group)
        elif group.size() > 1:
            low = tensor_parallel.reduce_from_tensor_model_parallel_region(low, group)
        return low @ self.factors.A * self.scale


def behind_embedding(adapter: EmbeddingAdapter) -> Callable[..., torch.Tensor]:
    """Return the hook that adds an adapter's output to an embedding's."""
    def hook(module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return output + adapter(inputs[0], module)

    return hook


class Adapters(torch.nn.Module):
    """All adapters of a chunk, which is their owner; the layers know them by hooks alone."""

    def __init__(self, chunk: Any, model: ModelConfig, lora: LoraConfig) -> None:
        """Make adapters of what a chunk holds of the model, and hang them behind its layers."""
        super().__init__()
        self.linears = torch.nn.ModuleList()
        self.head: LinearAdapter | None = None
        """Of the output head, whose weight losses take."""
        self.embedding: EmbeddingAdapter | None = None
        by_linear: dict[str, list[Adapted]] = {}
        for of in adapted_modules(model, lora):
            by_linear.setdefault(of.linear, []).append(of)
        for layer in chunk.decoder.layers:
            prefix = f"decoder.layers.{layer.layer_number - 1}."
            for linear, modules in by_linear.items():
                if linear.startswith(prefix):
                    self._hang(layer, linear.removeprefix(prefix), modules, lora, chunk.config)
        if _EMBEDDING in by_linear and chunk.pre_process:
            words = chunk.embedding.word_embeddings
            self.embedding = EmbeddingAdapter(by_linear[_EMBEDDING][0], lora, chunk.config, len(words.weight))
            words.register_forward_hook(behind_embedding(self.embedding))
        if OUTPUT_HEAD in by_linear and chunk.post_process:
            self.head = LinearAdapter(by_linear[OUTPUT_HEAD], lora, chunk.config,
                                      rows=len(chunk.output_layer.weight))

    def _hang(self, layer: Any, path: str, modules: list[Adapted], lora: LoraConfig, config: Any) -> None:
        """Have adapters follow one of a layer's linears, or each expert's."""
        def made(expert: int | None = None) -> LinearAdapter:
            adapter = LinearAdapter(modules, lora, config, expert)
            self.linears.append(adapter)
            return adapter

        if not modules[0].num_experts:
            layer.get_submodule(path).register_forward_hook(_behind(made()))
            return
        experts, linear = layer.mlp.experts, path.rpartition(".")[2]
        count = experts.num_local_experts
        first = parallel_state.get_expert_model_parallel_rank() * count
        adapters = [made(first + i) for i in range(count)]
        if hasattr(experts, "local_experts"):
            for expert, adapter in zip(experts.local_experts, adapters, strict=True):
                expert.get_submodule(linear).register_forward_hook(_behind(adapter))
        else:
            experts.get_submodule(linear).register_forward_hook(_behind_grouped(adapters))

    def factors(self) -> Iterator[Factors]:
        yield from (module for module in self.modules() if isinstance(module, Factors))

    def set_magnitudes(self, chunk: Any) -> None:
        """Set the trained lengths (DoRA) of this owner's adapters to those of the frozen rows."""
        for module in chunk.modules():
            for hook in module._forward_hooks.values():
                if isinstance(adapter := getattr(hook, "adapter", None), LinearAdapter):
                    adapter.set_magnitudes(module.weight)

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Return nothing: `local_shards` asks the factors themselves."""
        return {}


def _behind(adapter: LinearAdapter) -> Callable[..., Any]:
    """Return the hook that puts an adapter's output in the place of a linear's."""
    def hook(module: Any, inputs: tuple[Any, ...], outputs: tuple[Any, Any]) -> tuple[Any, Any]:
        output, skipped_bias = outputs
        bias = getattr(module, "bias", None)
        has_bias = bias is not None and bias.numel() > 0 and skipped_bias is None
        adapted = adapter.applied(module.weight, _normed(module, inputs[0]), output,
                                  bias if has_bias else None)
        return adapted, skipped_bias

    hook.adapter = adapter  # type: ignore[attr-defined]
    return hook


def _normed(module: Any, inputs: torch.Tensor) -> torch.Tensor:
    """Return what a linear multiplies its weight with: Transformer Engine has the norm before it inside."""
    weight = getattr(module, "layer_norm_weight", None)
    if weight is None:
        return inputs
    return torch.nn.functional.rms_norm(inputs, weight.shape, weight, module.eps)


def _behind_grouped(adapters: list[LinearAdapter]) -> Callable[..., Any]:
    """Return the hook of Transformer Engine's linear of all experts, whose tokens follow one another."""
    def hook(_: Any, inputs: tuple[Any, ...], outputs: tuple[Any, Any]) -> tuple[Any, Any]:
        tokens, counts = inputs[:2]
        output, skipped_bias = outputs
        added = [adapter(part) for adapter, part in zip(adapters, tokens.split(list(counts)), strict=True)]
        return output + torch.cat(added), skipped_bias

    return hook


# Encoders of pictures and sounds in a model, at any layout: their features take the place of
# placeholders' embeddings.
#
# The first pipeline stage holds them, whole on every process. Each process computes the features of
# the records that its own part of a row needs: its pieces under context parallelism, its stretch of
# them under sequence parallelism. A gradient is then a sum over these processes, which the library
# makes as it does for norms; without sequence parallelism all processes of a tensor-parallel group
# compute the same one.

Block = tuple[str, torch.Tensor, tuple[int, ...], tuple[int, ...], tuple[int, ...]]


class MediaEncoders(torch.nn.Module):
    """The encoders of a model, which its first chunk owns."""

    def __init__(self, model: ModelConfig, config: Any) -> None:
        """Make them; their values are set by `load.initialise` or loaded.

        Args:
            model: the architecture.
            config: the library's TransformerConfig.
        """
        super().__init__()
        make = modality().encoder
        self.vision = make(model.vision, model.hidden_size) if model.vision is not None else None
        self.audio = make(model.audio, model.hidden_size) if model.audio is not None else None
        # families that scale embeddings scale what stands over them as well
        self._factor = float(model.embedding_multiplier)
        self._recomputed = config.recompute_granularity == "full"
        self._sequence_parallel = config.sequence_parallel
        self.overlapped = False
        """Whether gradients or weights are sent while there is computation."""
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, embedded: torch.Tensor, row_tokens: int, inputs: EncoderInputs | None,
                *, cut_for_context: bool = True) -> torch.Tensor:
        """Return embeddings [local tokens, 1, hidden] with features over those of placeholders.

        Args:
            embedded: those of this process's part of a row.
            row_tokens: tokens of the whole row.
            inputs: what the row has for encoders; None: nothing.
            cut_for_context: whether the row is cut over the context-parallel group.
        """
        places = _places(row_tokens, self._sequence_parallel, cut_for_context) if inputs else None
        for kind, name in ENCODERS.items():
            encoder, part = getattr(self, name), (inputs or {}).get(kind)
            here = None
            if part is not None and places is not None:
                at = places[part.places]
                here = select_placeholders(part, at >= 0, at[at >= 0])
            if here is not None and len(here.places):
                if encoder is None:
                    raise ValueError(f"a row has {kind}, and the model has no model.{name}")
                embedded = self._over(embedded, encoder, here)
            elif encoder is not None and self.overlapped and encoder.trains and torch.is_grad_enabled():
                # the library waits for every parameter's gradient, and sends them as they come: which must be
                # the same order on all processes, whatever their rows hold
                nothing = torch.zeros(0, dtype=torch.int64, device=embedded.device)
                embedded = embedded.index_copy(0, nothing, self._features(encoder, None)[nothing][:, None])
        return embedded

    def _over(self, embedded: torch.Tensor, encoder: Any, here: EncoderInput) -> torch.Tensor:
        records, numbers, places = (to_device(torch.from_numpy(values), embedded.device)
                                    for values in (np.stack(here.records), here.features, here.places))
        over = self._features(encoder, records)[numbers] * self._factor
        return embedded.index_copy(0, places, over[:, None].to(embedded.dtype))

    def _features(self, encoder: Any, records: torch.Tensor | None) -> torch.Tensor:
        if self._recomputed and torch.is_grad_enabled():
            features: torch.Tensor = checkpoint(encoder, records, use_reentrant=False)
        else:
            features = encoder(records)
        return features.flatten(0, 1)

    def blocks(self) -> list[Block]:
        """Return the blocks of this process, which are whole tensors: name, memory, global shape, place in
        it, and place among the processes that hold the same (as `local_shards.LocalShard`)."""
        replica = (0, int(parallel_state.get_tensor_model_parallel_rank()),
                   int(parallel_state.get_data_parallel_rank(with_context_parallel=True)))
        return [(name, p.detach(), tuple(p.shape), (0,) * p.dim(), replica)
                for name, p in self.named_parameters()]

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Return nothing: `local_shards` asks for `blocks`."""
        return {}


def _places(row_tokens: int, sequence_parallel: bool, cut_for_context: bool) -> np.ndarray:
    """Return [row tokens] int64: which local token each token of a row is, -1 for another process's."""
    if cut_for_context:
        mine = context.row_index(row_tokens, sequence_parallel, torch.device("cpu")).numpy()
    else:
        mine = np.arange(row_tokens)
        if sequence_parallel:
            size = parallel_state.get_tensor_model_parallel_world_size()
            mine = mine.reshape(size, -1)[parallel_state.get_tensor_model_parallel_rank()]
    places = np.full(row_tokens, -1, np.int64)
    places[mine] = np.arange(len(mine))
    return places
