"""Which rows are a matrix, and the orthogonal update, beside torch's own Newton-Schulz and a singular
value decomposition."""

from __future__ import annotations

import math
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz

from megatron_sov.mcore.optimizer.newton_schulz import Matrix, orthogonalise, parts, update_scale

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
CONFIG = SimpleNamespace(num_attention_heads=4, num_query_groups=2, kv_channels=3, gated_linear_unit=True)


def test_a_fused_qkv_is_three_matrices_with_interleaved_rows() -> None:
    found = parts(Matrix("decoder.layers.0.self_attention.linear_qkv.weight", (), 24, 5), CONFIG)
    # two groups of: two query heads, a key head, a value head, three rows each
    assert [rows.tolist() for rows in found] == [[0, 1, 2, 3, 4, 5, 12, 13, 14, 15, 16, 17],
                                                 [6, 7, 8, 18, 19, 20], [9, 10, 11, 21, 22, 23]]


def test_gate_and_up_are_two_matrices_and_others_one() -> None:
    expert = Matrix("decoder.layers.2.mlp.experts.experts.linear_fc1.weight", (3,), 6, 5)
    assert [rows.tolist() for rows in parts(expert, CONFIG)] == [[0, 1, 2], [3, 4, 5]]
    plain = SimpleNamespace(**{**vars(CONFIG), "gated_linear_unit": False})
    assert [rows.tolist() for rows in parts(expert, plain)] == [list(range(6))]
    assert ([rows.tolist() for rows in parts(Matrix("decoder.layers.2.mlp.router.weight", (), 4, 9), CONFIG)]
            == [[0, 1, 2, 3]])


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16)])
def test_the_update_is_torchs_bit_for_bit(shape: tuple[int, int]) -> None:
    update = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    low = update.bfloat16()
    assert orthogonalise(low, 5, COEFFICIENTS).equal(
        _zeropower_via_newtonschulz(update, COEFFICIENTS, 5, 1e-7))
    # torch's algorithm without its rounding
    with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone):
        assert orthogonalise(update, 5, COEFFICIENTS).equal(
            _zeropower_via_newtonschulz(update, COEFFICIENTS, 5, 1e-7))


def test_singular_values_go_to_about_one_and_singular_vectors_stay() -> None:
    update = torch.randn(10, 30, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    u, _, v = torch.linalg.svd(update, full_matrices=False)
    turned = u.T @ orthogonalise(update, 5, COEFFICIENTS) @ v.T
    assert (turned - turned.diag().diag()).abs().max() < 1e-12
    assert turned.diag().min() > 0.6 and turned.diag().max() < 1.3
    # the cubic 1.5 x - 0.5 x^3 converges to U V^T itself
    assert (orthogonalise(update, 40, (1.5, -0.5, 0.0)) - u @ v).abs().max() < 1e-12


def test_scales_are_those_of_the_papers() -> None:
    orthogonal = torch.linalg.qr(torch.randn(200, 50, dtype=torch.float64)).Q
    assert ((update_scale("match_rms_adamw", 200, 50) * orthogonal).square().mean().sqrt()
            == pytest.approx(0.2))
    assert update_scale("original", 200, 50) == update_scale("spectral", 200, 50) == 2.0
    assert update_scale("original", 50, 200) == 1.0 and update_scale("spectral", 50, 200) == math.sqrt(0.25)
