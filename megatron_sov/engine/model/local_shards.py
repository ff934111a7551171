"""The blocks of global tensors that live in this process: what initial weights,
checkpoints and exports go through.

A block is a view of a live parameter or buffer with its place in the global tensor, whose name and shape are
the same at every layout.  Writing into the view changes the model; of weights in 8 bits the blocks are views
of what they are made of, and `LanguageModel.finish_writing` makes them.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megatron_sov.engine.model import quantized_weights
from megatron_sov.engine.model.language_model import VOCABULARY_WEIGHTS, LanguageModel, valid_rows


@dataclass(frozen=True)
class LocalShard:
    """A contiguous part of a global tensor, held by this process."""

    key: str
    """Name of the global tensor."""
    data: torch.Tensor
    """View of the live memory, shaped as the last axes of the block."""
    global_shape: tuple[int, ...]
    """Shape of the global tensor."""
    offset: tuple[int, ...]
    """First index of the block in it."""
    replica: tuple[int, ...]
    """Place among all processes that hold the same block: pipeline, tensor parallel, data parallel."""

    @property
    def owned(self) -> bool:
        """Whether this process, of all that hold the same block, is the one that writes it."""
        return not any(self.replica)

    @property
    def shape(self) -> tuple[int, ...]:
        return (1,) * (len(self.global_shape) - self.data.dim()) + tuple(self.data.shape)


def local_shards(model: LanguageModel, *, rounded: bool = False) -> list[LocalShard]:
    """Return the blocks of this process's part of the model, ordered by name and place; called by all
    processes together.

    Args:
        rounded: of weights that have masters in their place, copies in the model's dtype: what checkpoints
            and exports hold.
    """
    blocks = declared_blocks(model)
    if not model.stand_ins:
        return blocks
    lookup = ParameterLookup(model)
    found = [at_home for block in blocks for at_home in _at_home(model, block, lookup.find(block), rounded)]
    return sorted(found, key=lambda b: (b.key, b.offset))


def _at_home(model: LanguageModel, block: LocalShard, parameter: torch.nn.Parameter | None,
             rounded: bool) -> Iterator[LocalShard]:
    """Yield a block, or in its place the blocks that hold its numbers."""
    if id(parameter) not in model.stand_ins:
        yield block
    elif model.masters is None:
        yield replace(block, data=quantized_weights.kept_view(parameter, block.data))
    else:
        for master in model.masters(block, parameter):
            yield replace(master, data=master.data.to(block.data.dtype)) if rounded else master


def declared_blocks(model: LanguageModel) -> list[LocalShard]:
    """Return the blocks as the model declares them: of weights in 8 bits they are parts of stand-ins."""
    model.finish_param_gather()
    blocks = []
    for chunk in model.chunks:
        with quantized_weights.replaced(chunk, model.stand_ins):
            declared = chunk.sharded_state_dict(metadata={})
        apply_factories(declared)  # splits fused gate-and-up matrices, which are cut along each half
        blocks += [
            LocalShard(t.key, t.data, tuple(t.global_shape), tuple(t.global_offset), tuple(t.replica_id))
            for t in nested_values(declared) if isinstance(t, ShardedTensor)]
        if chunk.encoders is not None:
            blocks += [LocalShard(*block) for block in chunk.encoders.blocks()]
        if chunk.adapters is not None:
            blocks += [LocalShard(*block) for factors in chunk.adapters.factors()
                       for block in factors.blocks()]
    # last: a vocabulary's padding depends on tensor parallelism, and a checkpoint on no layout
    blocks = [_without_padding(b, model.vocab_size) if b.key in VOCABULARY_WEIGHTS else b for b in blocks]
    # by name and place: the order in which the library declares them differs between layouts
    return sorted((b for b in blocks if b.data.numel()), key=lambda b: (b.key, b.offset))


def _without_padding(block: LocalShard, vocab_size: int) -> LocalShard:
    """Return the part of an embedding's or head's block that belongs to token ids; how many rows follow
    depends on the layout."""
    rows = valid_rows(block.data, vocab_size)
    return replace(block, data=block.data[:rows], global_shape=(vocab_size, *block.global_shape[1:]))


def _address(tensor: torch.Tensor) -> tuple[int, int]:
    """Return where a tensor's first element is: its storage, and the bytes before it there.  Meta tensors
    have that too, and no address."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset()) * tensor.element_size()


class ParameterLookup:
    """Finds the parameter that a declared block is a view of."""

    def __init__(self, model: LanguageModel) -> None:
        placed = sorted(((_address(model.stand_ins.get(id(p), p)), p) for p in model.parameters()),
                        key=lambda one: one[0])
        self._parameters, self._starts = [p for _, p in placed], [start for start, _ in placed]

    def find(self, block: LocalShard) -> torch.nn.Parameter | None:
        """Return the parameter whose memory holds the block, or None for a buffer."""
        storage, offset = address = _address(block.data)
        i = bisect.bisect_right(self._starts, address) - 1
        if i < 0:
            return None
        found, (held_in, start) = self._parameters[i], self._starts[i]
        within = held_in == storage and offset < start + found.numel() * found.element_size()
        return found if within else None
