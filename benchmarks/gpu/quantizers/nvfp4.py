"""NVFP4: E2M1 values, a scale in E4M3 per 16 of them, a float32 scale per tensor ("Pretraining Large Language
Models with NVFP4", arXiv 2509.25149, sections 3 and 4, and Transformer Engine's `NVFP4BlockScaling`)."""

import torch

from .formats import LARGEST, round_to, round_to_e2m1
from .scaling import tiled, untiled

SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
"""Random signs of the Hadamard transform, drawn once (`get_wgrad_sign_vector` of Transformer Engine)."""


def nvfp4(x: torch.Tensor, rows: int = 1, noise: torch.Tensor | None = None) -> torch.Tensor:
    """Return the values of [m, n] in NVFP4.

    Args:
        x: tensor to quantize. The scale of a block is an E4M3 number times the scale of the tensor, which
            maps the largest magnitude of the tensor to 448 x 6.
        rows: 1: blocks of 1 x 16 along the last axis; 16: blocks of 16 x 16, for weights.
        noise: uniform in [0, 1), shape of `x`: stochastic rounding, for gradients; None: to nearest.
    """
    tiles = tiled(x, rows, 16).float()
    block_amax = tiles.abs().amax(dim=(1, 3), keepdim=True)
    finite = torch.finfo(torch.float32).max
    largest = tiles.new_tensor(LARGEST["e4m3"] * LARGEST["e2m1"])
    whole = torch.div(largest, x.abs().amax().float()).clamp(max=finite)
    whole = torch.where(whole == 0, 1.0, whole)
    block = round_to(block_amax * (whole * torch.tensor(1 / LARGEST["e2m1"], device=x.device)), "e4m3")
    unit = block * (1 / whole)
    encoded = tiles * (1 / unit).clamp(max=finite)
    randomly = None if noise is None else tiled(noise, rows, 16)
    return untiled(round_to_e2m1(encoded, randomly) * unit, x.shape)


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Multiply each 16 values along the last axis of `x` [m, n] by a Hadamard matrix with random signs.

    The matrix is orthogonal: rotating both operands along the summed axis leaves the product unchanged and
    spreads outliers. The result has the dtype of `x`, as in the unfused path of Transformer Engine.
    """
    matrix = torch.ones(1, 1)
    while len(matrix) < len(SIGNS):  # Sylvester's construction
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    matrix = torch.tensor(SIGNS, dtype=torch.float32)[:, None] * matrix / len(SIGNS) ** 0.5
    pieces = x.reshape(-1, len(SIGNS)).float() @ matrix.to(x.device)
    return pieces.reshape(x.shape).to(x.dtype)
