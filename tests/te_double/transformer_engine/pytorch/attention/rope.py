"""Rotary embeddings for a row of packed documents."""

from __future__ import annotations

import torch


def _rotate_half(x: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Return (-x2, x1) for each pair of channels."""
    if not interleaved:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((-second, first), dim=-1)
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def _compute_positions(cu_seqlens: torch.Tensor, tokens: int, cp_size: int, cp_rank: int) -> torch.Tensor:
    """Return the position of each local token in its document, [tokens]. With context parallelism this
    process has two of the 2 * cp_size chunks of each document: number cp_rank from either end."""
    bounds = cu_seqlens.long() // cp_size
    index = torch.arange(tokens, device=bounds.device)
    document = torch.bucketize(index, bounds[1:], right=True).clamp(max=len(bounds) - 2)
    index = index - bounds[document]
    if cp_size == 1:
        return index
    length = (bounds[1:] - bounds[:-1])[document]
    half = length // 2
    return torch.where(index < half, index + cp_rank * half,
                       index - half + cp_size * length - (cp_rank + 1) * half)


def apply_rotary_pos_emb(t: torch.Tensor, freqs: torch.Tensor, tensor_format: str = "sbhd",
                         start_positions: torch.Tensor | None = None, interleaved: bool = False,
                         fused: bool = False, cu_seqlens: torch.Tensor | None = None, cp_size: int = 1,
                         cp_rank: int = 0) -> torch.Tensor:
    """Rotate the first channels of each head; positions restart at every packed document.

    Computed in float32 like the fused kernel, or in float64 for float64 inputs.

    Args:
        t: [tokens, batch, heads, channels] (sbhd) or [tokens, heads, channels] (thd).
        freqs: angles, [positions, 1, 1, rotated channels].
        tensor_format: sbhd or thd.
        start_positions: not supported.
        interleaved: whether the two channels of a pair are adjacent.
        fused: must be set.
        cu_seqlens: bounds of the documents, [documents + 1] int32; required with thd.
        cp_size, cp_rank: size of the context-parallel group, and rank in it.
    """
    if not fused or start_positions is not None or tensor_format not in ("sbhd", "thd"):
        raise NotImplementedError("the double rotates fused, from position 0, sbhd and thd only")
    assert tensor_format != "thd" or cu_seqlens is not None, \
        "cu_seqlens must not be None when tensor_format is 'thd'."
    wide = torch.promote_types(t.dtype, torch.float32)
    freqs = freqs.to(wide)
    if tensor_format == "thd":
        assert cu_seqlens is not None
        angles = freqs[_compute_positions(cu_seqlens, len(t), cp_size, cp_rank), 0]
    else:
        angles = freqs[:len(t)]
    rotated, passed = t[..., :freqs.shape[-1]].to(wide), t[..., freqs.shape[-1]:]
    rotated = rotated * angles.cos() + _rotate_half(rotated, interleaved) * angles.sin()
    return torch.cat((rotated.to(t.dtype), passed), dim=-1)
