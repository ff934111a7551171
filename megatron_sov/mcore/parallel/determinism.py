"""The same bits in every run: what has to be settled in a process before CUDA and NCCL start."""

from __future__ import annotations

import os

import torch

from megatron_sov.errors import UserError

VARIABLES = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NCCL_ALGO": ("Ring", "Tree", "CollnetDirect", "CollnetChain", "^NVLS"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
}
"""Environment variable -> values under which results repeat; the first is set where the
environment says nothing.

Sources: cuBLAS' section on reproducibility; the list that Megatron-LM accepts for `--deterministic-mode`
(in-switch reductions, NVLS, add up in no fixed order); Transformer Engine's variable for fused attention.
"""


def switch_on() -> None:
    """Have torch, cuBLAS, cuDNN, NCCL and Transformer Engine choose algorithms that give the
    same bits each time.

    An operation that has no such algorithm raises instead of running.  The model's part is the library's
    `deterministic_mode`, which `model/specs.py` sets.

    Raises:
        UserError: the environment asks for something else.
    """
    for name, allowed in VARIABLES.items():
        value = os.environ.setdefault(name, allowed[0])
        if value not in allowed:
            raise UserError(f"train.deterministic = True: the environment has {name}={value}, "
                            f"with which results do not repeat; unset it or use {' or '.join(allowed)}")
    if torch.cuda.is_initialized():
        raise RuntimeError("CUDA has started before determinism.switch_on()")
    torch.use_deterministic_algorithms(True)
    # it would fill all empty memory, of every activation; what is read before it is written is a defect
    # elsewhere
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
