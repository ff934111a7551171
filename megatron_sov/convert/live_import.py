"""Live import: Hugging Face tensors into the memory of a running model, at any layout.

The inverse of `live_export`, by the same links: what one model exports, another of the same family takes in,
whatever the layouts of the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_sov.base.errors import UserError
from megatron_sov.checkpoint.gather import Gatherer, in_order
from megatron_sov.convert.dtypes import KEEP, check_dtype_name, exported_dtype
from megatron_sov.convert.peft import merge_adapter, merged_dtype
from megatron_sov.convert.sources import check_exact, check_whole_model
from megatron_sov.engine.model.language_model import LanguageModel
from megatron_sov.engine.model.local_shards import LocalShard, local_shards
from megatron_sov.engine.parallel.device import local_device
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.adapters import adapted_modules, places
from megatron_sov.model.families.weights import Link

# Live export: the tensors of a model that is training, under their Hugging Face names, over any layout.
#
# The same links as in files: what a rollout engine is given equals, bit for bit, what `to_hf` writes of a
# checkpoint of the moment.

def export_weights(model: LanguageModel, dtype: str = KEEP, *,
                   everywhere: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (Hugging Face name, tensor) for every tensor of the model, in the order of the weight map.

    All processes of the model's world call this and go through the iterator to its end, at the same moment of
    training.  One tensor, or one layer's stacked experts, is gathered at a time: rank 0 holds that, and one
    process's share of it.  A consumer that stops early must close the iterator (leaving the function does),
    which lets the other processes finish.

    Args:
        model: this process's part.
        dtype: "float32", "bfloat16", "float16", "float64", or "keep" for the model's own (float32 for one of
            float64 or with an adapter, see `peft.merged_dtype`); router biases are float32 always.
        everywhere: every process receives every tensor, for engines that live on the trainer's own processes;
            else rank 0 does, and the others take part and yield nothing.

    Yields:
        Names and tensors on the model's device, in memory of their own: training may go on while they are
        used.  Experts of one layer share memory; a consumer that keeps one keeps all of them.

    Raises:
        UserError: on every process; the model is not what its family's weight map says,
            or `dtype` does not exist.
    """
    check_dtype_name(dtype)
    links = models.get(model.architecture.family).links(model.architecture)
    by_key: dict[str, list[Link]] = {}
    for link in links:
        by_key.setdefault(link.key, []).append(link)
    adapters: dict[str, dict[str, tuple[int, ...]]] = {}
    for of in adapted_modules(model.architecture, model.lora):
        adapters[of.link.key] = adapters.get(of.link.key, {}) | of.shapes(model.lora)
    gatherer = Gatherer(local_shards(model, rounded=True), everywhere=everywhere)
    expected = {link.key: link.shape for link in links}
    for shapes in adapters.values():
        expected |= shapes
    check_exact("the running model", gatherer.shapes(), expected, "mend its family's weight map")
    # what changes a tensor comes just before it
    tensors = in_order(gatherer, [k for key in by_key for k in (*adapters.get(key, ()), key)])
    changing = places(model.architecture, model.lora)
    held: dict[str, torch.Tensor] = {}
    try:
        for key, whole in tensors:
            if whole is None:
                continue
            if key not in by_key:
                held[key] = whole
                continue
            for link in by_key[key]:
                own = merged_dtype(whole.dtype) if model.lora.on else whole.dtype
                target = exported_dtype(dtype, link.fp32, own)
                for name, tensor in _split(link, whole):
                    yield name, (merge_adapter(tensor, changing[name], held, model.lora)
                                 if name in changing else tensor).to(target)
            held.clear()
    finally:
        tensors.close()


def _split(link: Link, whole: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the Hugging Face tensors of one block of a whole tensor."""
    block = whole[tuple(slice(o, o + n) for o, n in zip(link.offset, link.extent, strict=True))].reshape(
        link.block_shape)
    yield from link.split(block).items()


@dataclass(frozen=True)
class _Region:
    """Where a part of a block lies in this process's memory."""

    target: torch.Tensor
    """View of the live memory."""
    source: tuple[slice, ...]
    """The same part of the block, whose axes are as many as the global tensor's."""


class LiveImport:
    """The way of Hugging Face tensors into one model, found once.

    All processes of the model's world make and use it together, each with all tensors in the same order.  A
    model that trains has more than these weights, in its optimizer: it is loaded from a checkpoint.
    """

    @torch.no_grad()
    def __init__(self, model: LanguageModel) -> None:
        """Find where every tensor goes.

        Args:
            model: this process's part, whose parameters stay where they are.

        Raises:
            UserError: the model has adapters.
        """
        if model.lora.on:
            raise UserError(f"lora.rank = {model.lora.rank}: tensors under Hugging Face names have an "
                            "adapter inside, and this model would add its own to them; take them into a "
                            "model without (lora.rank=0)")
        links = models.get(model.architecture.family).links(model.architecture)
        self._model = model
        self._link_of = {name: link for link in links for name in link.hf_names}
        self._shapes = {name: shape for link in links for name, shape in link.hf_shapes().items()}
        shards: dict[tuple[str, int], list[LocalShard]] = {}
        for shard in local_shards(model):
            shards.setdefault(_shelf(shard.key, shard.offset), []).append(shard)
        self._extents: dict[str, tuple[int, ...]] = {}
        """Of tensors that are rows of their block."""
        self._regions: dict[str, list[_Region]] = {}
        """Of each tensor, or, where those of a block are interleaved, of the block by its first one."""
        for link in links:
            here = [shard for shelf in _shelves(link) for shard in shards.get(shelf, ())]
            for name, (first, count) in link.rows().items():
                offset, self._extents[name] = _place(link, first, count)
                self._regions[name] = _regions(here, offset, self._extents[name])
            if not link.rows():
                self._regions[link.hf_names[0]] = _regions(here, link.offset, link.extent)

    @torch.no_grad()
    def whole(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Write every tensor of the model.  Beside it, memory holds the tensors that are interleaved in one
        of the model's (query, key and value).

        Args:
            weights: Hugging Face names and tensors, such as `export_weights(other, everywhere=True)`.

        Raises:
            UserError: a tensor is missing, unknown, of another shape or comes twice; the model is then part
                old, part new.
        """
        self._model.finish_param_gather()
        waiting: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}
        for name, tensor in check_whole_model(weights, self._shapes):
            if name in self._extents:
                _copy(self._regions[name], tensor.detach(), self._extents[name])
                continue
            link = self._link_of[name]
            parts = waiting.setdefault(link.hf_names, {})
            parts[name] = tensor.to(local_device())
            if len(parts) == len(link.hf_names):
                parts = waiting.pop(link.hf_names)
                if regions := self._regions[link.hf_names[0]]:  # else it lives elsewhere
                    _copy(regions, link.join(parts), link.extent)


def import_weights(model: LanguageModel, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write every tensor of a model once, see `LiveImport`."""
    LiveImport(model).whole(weights)


def _shelf(key: str, offset: tuple[int, ...]) -> tuple[str, int]:
    """Return by what shards are found: the tensor, and of stacked experts, whose shards are one expert's
    each, which one."""
    return key, offset[0] if ".experts.experts." in key else 0


def _shelves(link: Link) -> list[tuple[str, int]]:
    """Return where the shards of a block are found: of stacked experts one place for each."""
    if ".experts.experts." not in link.key:
        return [(link.key, 0)]
    return [(link.key, link.offset[0] + expert) for expert in range(link.extent[0])]


def _place(link: Link, first: int, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return offset and extent in the global tensor of some rows of a block."""
    axis = len(link.shape) - len(link.block_shape)
    offset, extent = list(link.offset), list(link.extent)
    offset[axis] += first
    extent[axis] = count
    return tuple(offset), tuple(extent)


def _regions(shards: list[LocalShard], offset: tuple[int, ...], extent: tuple[int, ...]) -> list[_Region]:
    """Return where parts of a region of a global tensor lie in this process's shards."""
    found = []
    for shard in shards:
        starts = [max(a, b) for a, b in zip(shard.offset, offset, strict=True)]
        ends = [min(a + n, b + m)
                for a, n, b, m in zip(shard.offset, shard.shape, offset, extent, strict=True)]
        if any(start >= end for start, end in zip(starts, ends, strict=True)):
            continue
        target = _slices(starts, ends, shard.offset)
        found.append(_Region(shard.data.view(shard.shape)[target], _slices(starts, ends, offset)))
    return found


def _slices(starts: Sequence[int], ends: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(s - o, e - o) for s, e, o in zip(starts, ends, origin, strict=True))


def _copy(regions: list[_Region], block: torch.Tensor, extent: tuple[int, ...]) -> None:
    if regions:
        block = block.reshape(extent)
    for region in regions:
        region.target.copy_(block[region.source])
