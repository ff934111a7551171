"""Rotary frequencies in float64: the library's are computed in float32, whatever the dtype of the model."""

from __future__ import annotations

import math
from typing import Any

import torch

from megatron_sov.config import ModelConfig


def frequencies(model: ModelConfig) -> torch.Tensor:
    """Return the angle per position of each pair of channels, [head_dim / 2] float64.

    RoPE (Su et al., arXiv 2104.09864, sec. 3.2.2) and, where the model has it, YaRN's "NTK-by-parts" (Peng et
    al., arXiv 2309.00071, eq. 17-22), its ramp's ends rounded outwards to whole channels as
    transformers does.
    """
    dim = model.head_dim
    base = model.rope_theta
    plain = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if model.yarn is None:
        return plain
    yarn = model.yarn

    def channel(rotations: float) -> float:
        """Channel pair that turns `rotations` times over the original context."""
        return (dim * math.log(yarn.original_max_position_tokens / (rotations * 2 * math.pi))
                / (2 * math.log(base)))

    low, high = max(math.floor(channel(yarn.beta_fast)), 0), min(math.ceil(channel(yarn.beta_slow)), dim - 1)
    interpolated = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return plain * (1 - interpolated) + plain / yarn.factor * interpolated


def widen(embedding: Any, model: ModelConfig) -> None:
    """Have the library's rotary embedding give float64 angles."""
    exact = frequencies(model).to(embedding.inv_freq.device)
    embedding.inv_freq = exact
    if model.yarn is not None:
        # it mixes these two by float32 shares that add up to exactly 1, so both being the
        # mixture gives the mixture
        embedding.inv_freq_extra = embedding.inv_freq_inter = exact
    embedding.forward.cache_clear()
