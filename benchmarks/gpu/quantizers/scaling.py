"""Quantization to 8-bit floats with a scale per tensor, per block of 128 columns, or per 32 values."""

import torch

from .formats import LARGEST, exponent_up, round_to


def tensorwise(x: torch.Tensor, form: str) -> torch.Tensor:
    """Quantize with one scale for the whole tensor: Transformer Engine's `Float8CurrentScaling`.

    `compute_scale_from_amax` (common/recipe/recipe_common.cuh): scale = largest of the format / amax in
    float32.
    """
    scale = _scale(x.abs().amax().float(), form, x.dtype)
    return round_to(x.float() * scale, form) * scale.reciprocal()


def blocks(x: torch.Tensor, form: str, rows: int) -> torch.Tensor:
    """Quantize with a power of two per block of `rows` x 128 values; the last blocks may be smaller.

    DeepSeek-V3 (arXiv 2412.19437, section 3.3.2): 1 x 128 for activations and gradients, 128 x 128 for
    weights; Transformer Engine's `Float8BlockScaling` rounds the scales down to powers of two.
    """
    tiles = tiled(x, rows, 128)
    scale = _scale(tiles.abs().amax(dim=(1, 3), keepdim=True).float(), form, x.dtype)
    scale = torch.exp2(torch.frexp(scale)[1].float() - 1)
    return untiled(round_to(tiles.float() * scale, form) * scale.reciprocal(), x.shape)


def mx(x: torch.Tensor, form: str) -> torch.Tensor:
    """Quantize with a power of two per 32 values along the last axis: MXFP8.

    The exponent is rounded up, so that no value lies beyond the format's largest, as Transformer Engine
    does (`float_to_e8m0`, common/util/ptx_arch_spec.cuh); the MX specification, section 6.3, leaves the
    choice open and suggests rounding amax down to a power of two.
    """
    tiles = tiled(x, 1, 32)
    amax = tiles.abs().amax(dim=(1, 3), keepdim=True).float()
    exponent = exponent_up(amax * torch.tensor(1 / LARGEST[form], device=x.device)).float()
    return untiled(round_to(tiles.float() * torch.exp2(-exponent), form) * torch.exp2(exponent), x.shape)


def tiled(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return [m, n] as [m / rows, rows, n / columns, columns], zero-padded to whole tiles."""
    m, n = x.shape
    padded = torch.nn.functional.pad(x, (0, -n % columns, 0, -m % rows))
    return padded.reshape(-(-m // rows), rows, -(-n // columns), columns)


def untiled(tiles: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Undo `tiled`, and remove the padding."""
    whole = tiles.reshape(tiles.shape[0] * tiles.shape[1], -1)
    return whole[:shape[0], :shape[1]]


def _scale(amax: torch.Tensor, form: str, dtype: torch.dtype) -> torch.Tensor:
    # not `number / tensor`, which torch computes as reciprocal times number, rounded twice
    scale = torch.div(amax.new_tensor(LARGEST[form]), amax).clamp(max=torch.finfo(dtype).max)
    return torch.where((amax == 0) | ~amax.isfinite(), 1.0, scale)
