"""AdamW on CPUs gives an element the same bits wherever ZeRO-1 cuts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_sov.mcore.optimizer.cpu_adamw import CpuAdamW

NUM_WEIGHTS = 4099


def weights_after(steps: int, cuts: list[int], dtype: torch.dtype, optimizer: Any = CpuAdamW,
                  **settings: Any) -> torch.Tensor:
    """Return all weights after so many updates of the pieces between cuts, in two groups."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(NUM_WEIGHTS, generator=generator).to(dtype) / 50
    pieces = [torch.nn.Parameter(piece.clone()) for piece in weights.tensor_split(cuts)]
    groups = [{"params": part} for part in (pieces[::2], pieces[1::2]) if part]
    made = optimizer(groups, lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, **settings)
    for _ in range(steps):
        gradients = torch.randn(NUM_WEIGHTS, generator=generator).to(dtype) / 1000
        for piece, gradient in zip(pieces, gradients.tensor_split(cuts), strict=True):
            piece.grad = gradient
        made.step()
    return torch.cat([piece.detach() for piece in pieces])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_element_has_the_same_bits_wherever_it_is_cut(dtype: torch.dtype) -> None:
    whole = weights_after(6, [], dtype)
    for cuts in ([1], [7, 40], [2048], list(range(3, NUM_WEIGHTS, 13)), [0, 0, 64]):
        assert torch.equal(weights_after(6, cuts, dtype), whole), cuts
    plain = weights_after(6, [], dtype, torch.optim.AdamW)
    assert torch.allclose(whole, plain, rtol=1e-5 if dtype == torch.float32 else 1e-14, atol=0)
