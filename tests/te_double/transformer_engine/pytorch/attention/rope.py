"""Rotary embeddings for a row of packed documents."""

from __future__ import annotations

import torch


def _rotated(x: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Return (-x2, x1) for each pair of channels."""
    if not interleaved:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((-second, first), dim=-1)
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def _places(cu_seqlens: torch.Tensor, tokens: int, cp_size: int, cp_rank: int) -> torch.Tensor:
    """Return [tokens], each token's position in its document; with context parallelism this process has two
    of 2 * cp_size pieces."""
    bounds = cu_seqlens.long() // cp_size
    place = torch.arange(tokens, device=bounds.device)
    document = torch.bucketize(place, bounds[1:], right=True).clamp(max=len(bounds) - 2)
    place = place - bounds[document]
    if cp_size == 1:
        return place
    length = (bounds[1:] - bounds[:-1])[document]
    half = length // 2
    return torch.where(place < half, place + cp_rank * half,
                       place - half + cp_size * length - (cp_rank + 1) * half)


def apply_rotary_pos_emb(t: torch.Tensor, freqs: torch.Tensor, tensor_format: str = "sbhd",
                         start_positions: torch.Tensor | None = None, interleaved: bool = False,
                         fused: bool = False, cu_seqlens: torch.Tensor | None = None, cp_size: int = 1,
                         cp_rank: int = 0) -> torch.Tensor:
    """Rotate the first channels of each head; positions restart at every packed document.

    Computed in float32, or float64 where the input is, as the fused kernel does.

    Args:
        t: [tokens, batch, heads, channels] (sbhd) or [tokens, heads, channels] (thd).
        freqs: [positions, 1, 1, rotated channels], angles.
        tensor_format: sbhd or thd.
        start_positions: not served.
        interleaved: whether a pair of channels lies together.
        fused: must be set.
        cu_seqlens: [documents + 1] int32, with thd.
        cp_size: context-parallel size.
        cp_rank: this process's place in it.
    """
    if not fused or start_positions is not None or tensor_format not in ("sbhd", "thd"):
        raise NotImplementedError("the double rotates fused, from position 0, sbhd and thd only")
    assert tensor_format != "thd" or cu_seqlens is not None, \
        "cu_seqlens must not be None when tensor_format is 'thd'."
    wide = torch.promote_types(t.dtype, torch.float32)
    freqs = freqs.to(wide)
    if tensor_format == "thd":
        assert cu_seqlens is not None
        angles = freqs[_places(cu_seqlens, len(t), cp_size, cp_rank), 0]
    else:
        angles = freqs[:len(t)]
    turned, passed = t[..., :freqs.shape[-1]].to(wide), t[..., freqs.shape[-1]:]
    turned = turned * angles.cos() + _rotated(turned, interleaved) * angles.sin()
    return torch.cat((turned.to(t.dtype), passed), dim=-1)
