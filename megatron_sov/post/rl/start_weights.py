"""The model that a run starts from, in the place of the one that it trains: for as long as a column takes.

A second model would need as much memory again; what is put aside here are the weights alone, and only while
the others are there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from megatron_sov.mcore.checkpoint import load
from megatron_sov.mcore.model.local_shards import local_shards
from megatron_sov.models.adapters import PREFIX
from megatron_sov.train.feed import FeedView

Value = TypeVar("Value")


@torch.no_grad()
def with_weights_of(start: Path, view: FeedView, compute: Callable[[], Value]) -> Value:
    """Return what `compute` gives while the model has a checkpoint's weights; called by all processes
    together, between two steps.

    Args:
        start: the checkpoint.
        view: the run, whose weights and optimizer are afterwards what they were before.
        compute: calls the model, forward only.
    """
    model = view.policy.model
    model.finish_param_gather()
    blocks = list(local_shards(model))
    aside, base = [block.data.clone() for block in blocks], model.adapter_base
    try:
        for block in blocks:
            if block.key.startswith(PREFIX):
                block.data.zero_()  # an adapter that is not in the checkpoint changes nothing then
        load.load_model(start, model)
        return compute()
    finally:
        for block, data in zip(blocks, aside, strict=True):
            block.data.copy_(data)
        model.adapter_base = base
