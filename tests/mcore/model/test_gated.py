"""The gate of a feed-forward block against the library's own line, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_values_and_gradients_are_autograds(dtype: torch.dtype, weighted: bool) -> None:
    from megatron_sov.mcore.parallel.cpu_shims import prepare_without_gpu

    prepare_without_gpu()
    from megatron_sov.mcore.model.gated import _gated, _weighted

    generator = torch.Generator().manual_seed(3)
    values, bias = (torch.randn(shape, generator=generator).to(dtype).requires_grad_()
                    for shape in ((21, 38), (38,)))
    weights = torch.rand(21, 1, generator=generator).requires_grad_()
    upstream = torch.randn(21, 19, generator=generator).to(dtype)
    inputs = (values, bias, weights) if weighted else (values, bias)

    gate, up = (values + bias).chunk(2, dim=-1)
    expected = silu(gate) * (up + 0.0)
    found = _weighted(values, bias, weights) if weighted else _gated(values, bias)
    if weighted:
        expected = (expected * weights).to(dtype)
    assert torch.equal(found, expected) and found.dtype == dtype
    for ours, autograds in zip(torch.autograd.grad(found, inputs, upstream),
                               torch.autograd.grad(expected, inputs, upstream), strict=True):
        assert torch.equal(ours, autograds)
