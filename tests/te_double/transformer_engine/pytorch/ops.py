"""Names of fusible operations, which megatron-core uses in two annotations."""

from __future__ import annotations

import torch


class FusibleOperation(torch.nn.Module):
    """One operation."""


class Sequential(torch.nn.Module):
    """A chain of operations; never instantiated."""

    def __init__(self, *args: torch.nn.Module) -> None:
        raise NotImplementedError("the double has no fusible operations (use_transformer_engine_op_fuser)")
