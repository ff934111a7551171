"""Live import: Hugging Face tensors into the memory of a running model, at any layout.

The inverse of `live_export`, by the same links: what one model exports, another of the same family takes in,
whatever the layouts of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch

from megatron_sov import models
from megatron_sov.convert.whole_model import checked
from megatron_sov.errors import UserError
from megatron_sov.mcore.model.language_model import LanguageModel
from megatron_sov.mcore.model.local_shards import LocalShard, local_shards
from megatron_sov.mcore.parallel.device import local_device
from megatron_sov.models.weights import Link


@torch.no_grad()
def import_weights(model: LanguageModel, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write every tensor of the model, each from the Hugging Face tensors that make it up.

    All processes of the model's world call this, each with all tensors in the same order; beside the model,
    memory holds the tensors that are interleaved in one of the model's (query, key and value).  A model that
    trains has more than these weights, in its optimizer: it is loaded from a checkpoint.

    Args:
        model: this process's part.
        weights: Hugging Face names and tensors, such as `export_weights(other, everywhere=True)`.

    Raises:
        UserError: the model has adapters; or a tensor is missing, unknown, of another shape or comes twice,
            and the model is then part old, part new.
    """
    if model.lora.on:
        raise UserError(f"lora.rank = {model.lora.rank}: tensors under Hugging Face names have an adapter "
                        "inside, and this model would add its own to them; take them into a model without "
                        "(lora.rank=0)")
    links = models.get(model.architecture.family).links(model.architecture)
    link_of = {name: link for link in links for name in link.hf_names}
    shapes = {name: shape for link in links for name, shape in link.hf_shapes().items()}
    shards: dict[tuple[str, int], list[LocalShard]] = {}
    for shard in local_shards(model):
        shards.setdefault(_shelf(shard.key, shard.global_shape, shard.offset), []).append(shard)
    waiting: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}
    for name, tensor in checked(weights, shapes):
        link = link_of[name]
        here = shards.get(_shelf(link.key, link.shape, link.offset), [])
        if rows := link.rows():
            _fill(here, *_place(link, *rows[name]), tensor.detach)
            continue
        parts = waiting.setdefault(link.hf_names, {})
        parts[name] = tensor.to(local_device())
        if len(parts) == len(link.hf_names):
            _fill(here, link.offset, link.extent, partial(link.join, waiting.pop(link.hf_names)))


def _shelf(key: str, shape: tuple[int, ...], offset: tuple[int, ...]) -> tuple[str, int]:
    """Return by what shards are found: the tensor, and of stacked experts, whose shards are one expert's
    each, which one."""
    return key, offset[0] if len(shape) == 3 else 0


def _place(link: Link, first: int, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return offset and extent in the global tensor of some rows of a block."""
    axis = len(link.shape) - len(link.block_shape)
    offset, extent = list(link.offset), list(link.extent)
    offset[axis] += first
    extent[axis] = count
    return tuple(offset), tuple(extent)


def _fill(shards: list[LocalShard], offset: tuple[int, ...], extent: tuple[int, ...],
          numbers: Callable[[], torch.Tensor]) -> None:
    """Copy a region of a global tensor into those of this process's shards that it reaches."""
    region: torch.Tensor | None = None
    for shard in shards:
        starts = [max(a, b) for a, b in zip(shard.offset, offset, strict=True)]
        ends = [min(a + n, b + m)
                for a, n, b, m in zip(shard.offset, shard.shape, offset, extent, strict=True)]
        if any(start >= end for start, end in zip(starts, ends, strict=True)):
            continue
        if region is None:  # an expert that lives elsewhere is not put together
            region = numbers().reshape(extent)
        target, source = (tuple(slice(s - o, e - o) for s, e, o in zip(starts, ends, origin, strict=True))
                          for origin in (shard.offset, offset))
        shard.data.view(shard.shape)[target] = region[source]
