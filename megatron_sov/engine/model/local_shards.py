"""Blocks of global tensors on this process: access for initialization, checkpoints and exports.

A block is a view of a live parameter or buffer with its offset in a global tensor, whose name and shape are
equal at every layout. Writing to the view changes the model. For FP8 weights the blocks are views of the
initial values or masters, and `LanguageModel.requantize_weights` quantizes the weights."""

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megatron_sov.engine.model import quantized_weights
from megatron_sov.engine.model.language_model import VOCABULARY_WEIGHTS, LanguageModel, count_token_rows


@dataclass(frozen=True)
class LocalShard:
    """A contiguous block of a global tensor, in this process's memory."""

    key: str
    """Global tensor's name."""
    data: torch.Tensor
    """View of live memory; it may lack leading axes of size 1, which `shape` adds."""
    global_shape: tuple[int, ...]
    """Global tensor's shape."""
    offset: tuple[int, ...]
    """First element's index in the global tensor."""
    replica: tuple[int, ...]
    """Rank among processes with an equal block, as (pipeline, tensor parallel, data parallel)."""

    @property
    def owned(self) -> bool:
        """Whether this process writes the block (replica 0 does)."""
        return not any(self.replica)

    @property
    def shape(self) -> tuple[int, ...]:
        return (1,) * (len(self.global_shape) - self.data.dim()) + tuple(self.data.shape)


def list_local_shards(model: LanguageModel, *, rounded: bool = False) -> list[LocalShard]:
    """Return the local blocks, sorted by name and offset. Collective.

    Args:
        rounded: replace float32 masters by copies in the model's dtype, as checkpoints and exports store
            weights.
    """
    blocks = list_declared_blocks(model)
    if not model.fp8_placeholders:
        return blocks
    lookup = ParameterLookup(model)
    shards = [shard for block in blocks
              for shard in _iter_value_blocks(model, block, lookup.find_parameter(block), rounded)]
    return sorted(shards, key=lambda b: (b.key, b.offset))


def _iter_value_blocks(model: LanguageModel, block: LocalShard, parameter: torch.nn.Parameter | None,
                       rounded: bool) -> Iterator[LocalShard]:
    """Yield the block, or for an FP8 weight the blocks with initial values or masters."""
    if id(parameter) not in model.fp8_placeholders:
        yield block
    elif model.iter_masters is None:
        yield replace(block, data=quantized_weights.view_initial_values(parameter, block.data))
    else:
        for master in model.iter_masters(block, parameter):
            yield replace(master, data=master.data.to(block.data.dtype)) if rounded else master


def list_declared_blocks(model: LanguageModel) -> list[LocalShard]:
    """Return the blocks that the model declares; for FP8 weights, blocks are parts of meta tensors."""
    model.finish_param_gather()
    blocks = []
    for chunk in model.chunks:
        with quantized_weights.use_placeholders(chunk, model.fp8_placeholders):
            declared = chunk.sharded_state_dict(metadata={})
        apply_factories(declared)  # separates fused gate and up weights: each half is sharded
        blocks += [
            LocalShard(t.key, t.data, tuple(t.global_shape), tuple(t.global_offset), tuple(t.replica_id))
            for t in nested_values(declared) if isinstance(t, ShardedTensor)]
        if chunk.encoders is not None:
            blocks += [LocalShard(*block) for block in chunk.encoders.blocks()]
        if chunk.adapters is not None:
            blocks += [LocalShard(*block) for factors in chunk.adapters.factors()
                       for block in factors.blocks()]
    # vocabulary padding depends on tensor parallelism; checkpoints must not depend on the layout
    blocks = [_remove_padding_rows(b, model.vocab_size) if b.key in VOCABULARY_WEIGHTS else b for b in blocks]
    # Megatron-Core's order of declaration differs between layouts
    return sorted((b for b in blocks if b.data.numel()), key=lambda b: (b.key, b.offset))


def _remove_padding_rows(block: LocalShard, vocab_size: int) -> LocalShard:
    """Remove the padding rows of an embedding or head block; their number depends on the layout."""
    rows = count_token_rows(block.data, vocab_size)
    return replace(block, data=block.data[:rows], global_shape=(vocab_size, *block.global_shape[1:]))


def _get_address(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the storage and byte offset of a tensor's first element; meta tensors have no data pointer."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset()) * tensor.element_size()


class ParameterLookup:
    """Finds the parameter whose memory a block views."""

    def __init__(self, model: LanguageModel) -> None:
        placed = sorted(((_get_address(model.fp8_placeholders.get(id(p), p)), p) for p in model.parameters()),
                        key=lambda item: item[0])
        self._parameters, self._starts = [p for _, p in placed], [start for start, _ in placed]

    def find_parameter(self, block: LocalShard) -> torch.nn.Parameter | None:
        """Return the parameter that contains the block's memory, or None for a buffer."""
        storage, offset = address = _get_address(block.data)
        i = bisect.bisect_right(self._starts, address) - 1
        if i < 0:
            return None
        parameter, (parameter_storage, start) = self._parameters[i], self._starts[i]
        end = start + parameter.numel() * parameter.element_size()
        contains_block = parameter_storage == storage and offset < end
        return parameter if contains_block else None
