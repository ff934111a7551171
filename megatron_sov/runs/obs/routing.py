"""MoE expert load statistics for the trainer's alarms and for reports."""

import numpy as np
import numpy.typing as npt

ExpertLoads = npt.NDArray[np.float64]
"""Tokens or token shares per expert, shape [layers, experts]."""


def max_violation(load: ExpertLoads) -> npt.NDArray[np.float64]:
    """Return MaxVio per layer (arXiv 2408.15664): maximum expert load / mean load - 1; 0 means balance."""
    return np.asarray(load.max(axis=1) / load.mean(axis=1) - 1)


def load_entropy(load: ExpertLoads) -> npt.NDArray[np.float64]:
    """Return the load entropy per layer over ``ln(experts)``: 1 for uniform load, 0 for one expert."""
    if load.shape[1] < 2:
        return np.ones(len(load))
    share = load / load.sum(axis=1, keepdims=True)
    logs = np.log(share, out=np.zeros_like(share), where=share > 0)
    return np.asarray(-(share * logs).sum(axis=1) / np.log(load.shape[1]))


def compute_process_load(load: ExpertLoads, ep: int) -> float:
    """Return the mean over layers of the busiest expert-parallel process's tokens, relative to the mean."""
    tokens = load.reshape(len(load), ep, -1).sum(axis=2)
    return float((tokens / tokens.mean(axis=1, keepdims=True)).mean(axis=0).max())


def count_dead_experts(load: ExpertLoads) -> npt.NDArray[np.int64]:
    return np.asarray((load == 0).sum(axis=1), dtype=np.int64)
