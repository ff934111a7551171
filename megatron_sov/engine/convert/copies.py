"""Tensors that stand twice in a Hugging Face folder: a prediction layer behind the trunk has embedding and
head once more, under names of its own.  A checkpoint holds each once."""

from __future__ import annotations

import torch

from megatron_sov.base.errors import UserError
from megatron_sov.engine.convert.sources import HfWeights, Weights
from megatron_sov.model import families as models


def copies_of(weights: Weights) -> dict[str, str]:
    """Return name -> the tensor that it equals, of all that are written a second time."""
    return models.get(weights.model.family).copies_in(weights.model)


def differing_copies(folder: HfWeights) -> list[str]:
    """Return those that a folder has and that differ, in one bit or in the dtype, from what they are a copy
    of; two tensors are in memory at a time."""
    return [name for name, other in folder.copies.items() if not _same_bits(folder.read(name),
                                                                           folder.read(other))]


def check_copies(folder: HfWeights) -> None:
    """Raise `UserError` where a copy differs: a model that has one embedding and one head cannot hold it."""
    if differing := differing_copies(folder):
        name = differing[0]
        raise UserError(f"{folder.path}: {name} differs from {folder.copies[name]}, and a prediction layer "
                        "has no embedding or head of its own here; save the model with one of each")


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.contiguous().view(torch.uint8),
                                                    other.contiguous().view(torch.uint8))
