"""Figures of how tokens spread over experts; the trainer raises alarms by them, and the report shows them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.float64]
"""Tokens (or shares of tokens) of each expert, shape [layers, experts]; every layer has some."""


def max_violation(load: Counts) -> npt.NDArray[np.float64]:
    """Return MaxVio of each layer (arXiv 2408.15664): the load of the busiest expert over the fair load,
    less 1; 0 is balance."""
    return np.asarray(load.max(axis=1) / load.mean(axis=1) - 1)


def load_entropy(load: Counts) -> npt.NDArray[np.float64]:
    """Return each layer's entropy of the load over ``ln(experts)``: 1 is an even load,
    0 all tokens at one expert."""
    if load.shape[1] < 2:
        return np.ones(len(load))
    share = load / load.sum(axis=1, keepdims=True)
    logs = np.log(share, out=np.zeros_like(share), where=share > 0)
    return np.asarray(-(share * logs).sum(axis=1) / np.log(load.shape[1]))


def num_dead(load: Counts) -> npt.NDArray[np.int64]:
    """Return the experts of each layer that got no token."""
    return np.asarray((load == 0).sum(axis=1), dtype=np.int64)
