"""The blocks of global tensors that live in this process: what initial weights,
checkpoints and exports go through.

A block is a view of a live parameter or buffer with its place in the global tensor, whose name and shape are
the same at every layout.  Writing into the view changes the model.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, replace

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

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


def local_shards(model: LanguageModel) -> list[LocalShard]:
    """Return the blocks of this process's part of the model, ordered by name and place; called by all
    processes together."""
    model.finish_param_gather()
    blocks = []
    for chunk in model.chunks:
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
    """Finds the parameter that a block is a view of."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self._parameters = sorted(parameters, key=_address)
        self._starts = [_address(p) for p in self._parameters]

    def find(self, block: LocalShard) -> torch.nn.Parameter | None:
        """Return the parameter whose memory holds the block, or None for a buffer."""
        storage, offset = address = _address(block.data)
        i = bisect.bisect_right(self._starts, address) - 1
        if i < 0:
            return None
        found, (held_in, start) = self._parameters[i], self._starts[i]
        within = held_in == storage and offset < start + found.numel() * found.element_size()
        return found if within else None
