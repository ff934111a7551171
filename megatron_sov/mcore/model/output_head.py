"""The output head beside fused accumulation of weight gradients.

With it, the library's own `ColumnParallelLinear` demands APEX, whatever Transformer Engine can: the output
head is one, also in a model of Transformer Engine's modules.  Losses take the head's weight and never call
its module, so its own configuration may say no.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear


class OutputHead(ColumnParallelLinear):
    """A head whose weight gradient comes from the losses."""

    def __init__(self, *args: Any, config: Any, **settings: Any) -> None:
        # not dataclasses.replace: the library's checks refuse the per-layer lists that are set behind them
        own = copy.copy(config)
        own.gradient_accumulation_fusion = False
        super().__init__(*args, config=own, **settings)


@contextlib.contextmanager
def without_fusion() -> Iterator[None]:
    """Have the library make the output head, which it looks up in its package, without the fusion."""
    tensor_parallel.ColumnParallelLinear = OutputHead
    try:
        yield
    finally:
        tensor_parallel.ColumnParallelLinear = ColumnParallelLinear
