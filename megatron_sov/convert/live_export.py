"""Live export: the tensors of a model that is training, under their Hugging Face names, over any layout.

The same links as in files: what a rollout engine is given equals, bit for bit, what `to_hf` writes of a
checkpoint of the moment.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_sov import models
from megatron_sov.convert.sources import check_exact
from megatron_sov.convert.values import KEEP, check_dtype_name, exported_dtype
from megatron_sov.mcore.checkpoint.gather import Gatherer, in_order
from megatron_sov.mcore.model.language_model import LanguageModel
from megatron_sov.mcore.model.local_shards import local_shards
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
    gatherer = Gatherer(local_shards(model), everywhere=everywhere)
    check_exact("the running model", gatherer.shapes(), {link.key: link.shape for link in links},
                "mend its family's weight map")
    tensors = in_order(gatherer, list(by_key))
    try:
        for key, whole in tensors:
            if whole is not None:
                for link in by_key[key]:
                    yield from _split(link, whole, dtype)
    finally:
        tensors.close()


def _split(link: Link, whole: torch.Tensor, dtype: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the Hugging Face tensors of one block of a whole tensor."""
    block = whole[tuple(slice(o, o + n) for o, n in zip(link.offset, link.extent, strict=True))].reshape(
        link.block_shape)
    target = exported_dtype(dtype, link.fp32, whole.dtype)
    for name, tensor in link.split(block).items():
        yield name, tensor.to(target)
