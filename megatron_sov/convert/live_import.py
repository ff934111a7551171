"""Export and import a running model's weights under Hugging Face names, at any layout.

Exports equal the files of `to_hf` bit for bit. Imports are the inverse, with the same links.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch

from megatron_sov.base.errors import UserError
from megatron_sov.checkpoint.gather import TensorGatherer, iter_gathered
from megatron_sov.convert.dtypes import KEEP, check_dtype_name, choose_export_dtype
from megatron_sov.convert.peft import get_merged_dtype, merge_adapter
from megatron_sov.convert.sources import check_shapes, check_whole_model
from megatron_sov.engine.model.language_model import LanguageModel
from megatron_sov.engine.model.local_shards import LocalShard, list_local_shards
from megatron_sov.engine.parallel.device import get_local_device
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.adapters import find_adapted_modules, find_adapter_places
from megatron_sov.model.families.weights import Link


def export_weights(model: LanguageModel, dtype: str = KEEP, *,
                   everywhere: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (Hugging Face name, tensor) for a model, in weight map order (collective).

    All processes must iterate to the end at the same training step. One tensor, or the stacked experts of one
    layer, is gathered at a time. A caller that stops early must close the generator, which lets other
    processes finish.

    Args:
        model: local part of the model.
        dtype: "float32", "bfloat16", "float16", "float64" or "keep" (float32 for float64 models, and
            `peft.get_merged_dtype` with an adapter); router biases are always float32.
        everywhere: yield tensors on every process, for engines in the trainer's processes; otherwise on rank
            0.

    Yields:
        Names and tensors in new memory on the model's device; training may continue while they are used.
        Experts of a layer share memory.

    Raises:
        UserError: on every process: the model does not match the weight map of its family, or `dtype` is
            unknown.
    """
    check_dtype_name(dtype)
    links = models.get_family(model.architecture.family).links(model.architecture)
    by_key: dict[str, list[Link]] = {}
    for link in links:
        by_key.setdefault(link.key, []).append(link)
    adapters: dict[str, dict[str, tuple[int, ...]]] = {}
    for module in find_adapted_modules(model.architecture, model.lora):
        adapters[module.link.key] = adapters.get(module.link.key, {}) | module.shapes(model.lora)
    gatherer = TensorGatherer(list_local_shards(model, rounded=True), everywhere=everywhere)
    expected = {link.key: link.shape for link in links}
    for shapes in adapters.values():
        expected |= shapes
    check_shapes("the running model", gatherer.get_shapes(), expected, "correct the weight map of its family")
    # adapter factors come directly before the weight that the factors change
    tensors = iter_gathered(gatherer, [k for key in by_key for k in (*adapters.get(key, ()), key)])
    adapted_places = find_adapter_places(model.architecture, model.lora)
    factors: dict[str, torch.Tensor] = {}
    try:
        for key, whole in tensors:
            if whole is None:
                continue
            if key not in by_key:
                factors[key] = whole
                continue
            for link in by_key[key]:
                model_dtype = get_merged_dtype(whole.dtype) if model.lora.on else whole.dtype
                target = choose_export_dtype(dtype, link.fp32, model_dtype)
                place = tuple(slice(o, o + n) for o, n in zip(link.offset, link.extent, strict=True))
                for name, tensor in link.split(whole[place]).items():
                    yield name, (merge_adapter(tensor, adapted_places[name], factors, model.lora)
                                 if name in adapted_places else tensor).to(target)
            factors.clear()
    finally:
        tensors.close()


_Region = tuple[torch.Tensor, tuple[slice, ...]]
"""Overlap between a block and a local shard: view into the shard, and slices into the block."""


class LiveImport:
    """Copies Hugging Face tensors into a model's existing parameter memory (collective).

    Every process passes all tensors in the same order. Only weights are imported, no optimizer state.

    Args:
        model: local part of the model.

    Raises:
        UserError: the model has adapters.
    """

    @torch.no_grad()
    def __init__(self, model: LanguageModel) -> None:
        if model.lora.on:
            raise UserError(f"lora.rank = {model.lora.rank}: imported weights are merged with their adapter, "
                            "and this model would apply its own in addition; import into a model without "
                            "adapter (lora.rank=0)")
        links = models.get_family(model.architecture.family).links(model.architecture)
        self._model = model
        self._links_by_name = {name: link for link in links for name in link.hf_names}
        self._shapes = {name: shape for link in links for name, shape in link.hf_shapes().items()}
        shards: dict[tuple[str, int], list[LocalShard]] = {}
        for shard in list_local_shards(model):
            shards.setdefault(_get_group(shard.key, shard.offset), []).append(shard)
        self._extents: dict[str, tuple[int, ...]] = {}
        """Hugging Face name -> extent in the global tensor, for tensors with consecutive rows."""
        self._regions: dict[str, list[_Region]] = {}
        """Hugging Face name -> local regions. Interleaved tensors (query, key, value) share the entry of the
        first name in their block."""
        for link in links:
            local = shards.get(_get_group(link.key, link.offset), [])
            for name, (first, count) in link.rows().items():
                offset, self._extents[name] = _locate_rows(link, first, count)
                self._regions[name] = _find_regions(local, offset, self._extents[name])
            if not link.rows():
                self._regions[link.hf_names[0]] = _find_regions(local, link.offset, link.extent)

    @torch.no_grad()
    def import_all(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Import (Hugging Face name, tensor) pairs, e.g. from `export_weights(other, everywhere=True)`;
        interleaved tensors are buffered until the block is complete. Raises `UserError`: a tensor is missing,
        unknown, repeated or has a wrong shape; the model is then partly updated."""
        self._model.finish_param_gather()
        pending: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}
        for name, tensor in check_whole_model(weights, self._shapes):
            if name in self._extents:
                _copy_block(self._regions[name], tensor.detach(), self._extents[name])
                continue
            link = self._links_by_name[name]
            parts = pending.setdefault(link.hf_names, {})
            parts[name] = tensor.to(get_local_device())
            if len(parts) == len(link.hf_names):
                parts = pending.pop(link.hf_names)
                if regions := self._regions[link.hf_names[0]]:  # empty without a local shard
                    _copy_block(regions, link.join(parts), link.extent)


def import_weights(model: LanguageModel, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Import every model tensor once, see `LiveImport`."""
    LiveImport(model).import_all(weights)


def _get_group(key: str, offset: tuple[int, ...]) -> tuple[str, int]:
    """Return a shard's lookup group: the key and, for stacked experts, the expert index."""
    return key, offset[0] if ".experts.experts." in key else 0


def _locate_rows(link: Link, first: int, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return offset and extent in the global tensor for `count` rows in a block."""
    axis = len(link.shape) - len(link.block_shape)
    offset, extent = list(link.offset), list(link.extent)
    offset[axis] += first
    extent[axis] = count
    return tuple(offset), tuple(extent)


def _find_regions(shards: list[LocalShard], offset: tuple[int, ...],
                  extent: tuple[int, ...]) -> list[_Region]:
    """Return the overlaps between a global region and the local shards."""
    regions = []
    for shard in shards:
        starts = [max(pair) for pair in zip(shard.offset, offset, strict=True)]
        ends = [min(shard_first + shard_size, first + size) for shard_first, shard_size, first, size
                in zip(shard.offset, shard.shape, offset, extent, strict=True)]
        if any(start >= end for start, end in zip(starts, ends, strict=True)):
            continue
        target = shard.data.view(shard.shape)[_to_slices(starts, ends, shard.offset)]
        regions.append((target, _to_slices(starts, ends, offset)))
    return regions


def _to_slices(starts: Sequence[int], ends: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(low - zero, high - zero) for low, high, zero in zip(starts, ends, origin, strict=True))


def _copy_block(regions: list[_Region], block: torch.Tensor, extent: tuple[int, ...]) -> None:
    block = block.reshape(extent)
    for target, place in regions:
        target.copy_(block[place])
