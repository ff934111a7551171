"""`FusedSGD`, which megatron-core imports together with `FusedAdam`."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import required


class FusedSGD(torch.optim.Optimizer):
    """SGD; never instantiated."""

    def __init__(self, params: Any, lr: Any = required, momentum: float = 0.0, dampening: float = 0.0,
                 weight_decay: float = 0.0, nesterov: bool = False, *, wd_after_momentum: bool = False,
                 materialize_master_grads: bool = True, set_grad_none: bool | None = None) -> None:
        raise NotImplementedError("the double has no SGD")
