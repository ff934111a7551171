"""Live export: the tensors of a model that is training, under their Hugging Face names, over any layout.

The same links as in files: what a rollout engine is given equals, bit for bit, what `to_hf` writes of a
checkpoint of the moment.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_sov import models
from megatron_sov.convert.adapted_weights import merged
from megatron_sov.convert.sources import check_exact
from megatron_sov.convert.values import KEEP, check_dtype_name, exported_dtype
from megatron_sov.mcore.checkpoint.gather import Gatherer, in_order
from megatron_sov.mcore.model.language_model import LanguageModel
from megatron_sov.mcore.model.local_shards import local_shards
from megatron_sov.models.adapters import adapted_modules, places
from megatron_sov.models.weights import Link


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
            float64); router biases are float32 always.
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
    gatherer = Gatherer(local_shards(model), everywhere=everywhere)
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
                target = exported_dtype(dtype, link.fp32, whole.dtype)
                for name, tensor in _split(link, whole):
                    yield name, (merged(tensor, changing[name], held, model.lora)
                                 if name in changing else tensor).to(target)
            held.clear()
    finally:
        tensors.close()


def _split(link: Link, whole: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the Hugging Face tensors of one block of a whole tensor."""
    block = whole[tuple(slice(o, o + n) for o, n in zip(link.offset, link.extent, strict=True))].reshape(
        link.block_shape)
    yield from link.split(block).items()
