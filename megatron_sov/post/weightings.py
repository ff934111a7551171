"""What counts the same in the loss of responses: every token, every turn, or every sample.

The mean over turns of each turn's mean loss is ``sum over tokens of (w / W) loss / number of turns``, with w
a token's weight and W the sum of its turn's: so it is a sum over tokens under other weights, of which each
turn's make 1, and stays exact however a batch is split.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from megatron_sov.post.parts.responses import learned
from megatron_sov.train.microbatch import MicroBatch, segments


def counted_per(batch: MicroBatch, unit: Literal["turn", "sample"], dtype: torch.dtype) -> MicroBatch:
    """Return the micro-batch with weights of responses that make 1 in each unit; those of others stay.

    Args:
        batch: on the host or the device; nothing is waited for.
        unit: turn: responses without a token between them that is not learned; sample: those of one
            conversation.
        dtype: of the weights.
    """
    counted, number = learned(batch), segments(batch)
    if unit == "turn":
        goes_on = torch.zeros_like(counted)
        goes_on[1:] = counted[:-1] & (number[1:] == number[:-1])
        number = ((counted & ~goes_on).cumsum(0) - 1).clamp(min=0)
    weights = batch.weights.double()
    totals = weights.new_zeros(len(counted) + 1).index_add_(0, number, weights * counted)
    shared = torch.where(counted, weights / totals[number], weights)
    return dataclasses.replace(batch, weights=shared.to(dtype))
