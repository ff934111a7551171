"""Reference quantizers against all codes of their formats, and against Transformer Engine's Python
references."""

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "gpu"))
from quantizers.formats import LARGEST, round_to, round_to_e2m1
from quantizers.nvfp4 import nvfp4, rotated
from quantizers.products import product, quantized
from quantizers.scaling import blocks, mx, tensorwise

BITS = {"e4m3": (4, 3, 7), "e5m2": (5, 2, 15), "e2m1": (2, 1, 1)}
"""Format -> bits of exponent and mantissa, bias of the exponent."""


def positive_codes(form: str) -> np.ndarray:
    """Return the value of every code without sign, decoded by the formula of the formats' papers."""
    exponent_bits, mantissa_bits, bias = BITS[form]
    code = np.arange(2 ** (exponent_bits + mantissa_bits))
    exponent, mantissa = code >> mantissa_bits, (code & (2 ** mantissa_bits - 1)) / 2.0 ** mantissa_bits
    values = np.where(exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent - bias))
    return values[values <= LARGEST[form]]  # codes above are infinity and NaN


@pytest.mark.each("form", BITS)
def test_every_16_bit_number_rounds_to_the_nearest_code(form: str) -> None:
    every = torch.arange(-2**15, 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    every = every[every.isfinite()]
    result = (round_to_e2m1(every) if form == "e2m1" else round_to(every, form)).numpy()
    codes, wanted = positive_codes(form), np.abs(every.numpy().astype(np.float64))
    above = np.searchsorted(codes, wanted).clip(1, len(codes) - 1)
    up, down = codes[above] - wanted, wanted - codes[above - 1]
    # of two equally near codes the even one, whose last bit is 0
    nearest = np.where((up < down) | ((up == down) & (above % 2 == 0)), codes[above], codes[above - 1])
    assert np.array_equal(np.abs(result), nearest)
    assert np.array_equal(np.signbit(result), np.signbit(every.numpy()))


def test_stochastic_rounding_is_right_on_average() -> None:
    noise = (torch.arange(1000) + 0.5) / 1000
    for value in (0.1, -0.3, 0.75, 1.9, 2.5, -3.2, 5.9, 6.0, 9.0):
        result = round_to_e2m1(torch.full((1000,), value), noise)
        assert len(result.unique()) <= 2
        assert float(result.mean()) == pytest.approx(max(-6, min(6, value)), abs=2e-3)


def sample(rows: int, columns: int) -> torch.Tensor:
    """Return bf16 numbers between 2^-8 and 128,000 by size, made of integers."""
    i = torch.arange(rows * columns, dtype=torch.int64)
    i = (i * 2654435761 + 12345) % 2**31
    i = (i ^ (i >> 13)) * 1103515245 % 2**31
    values = ((i % 2001) - 1000).float() * torch.exp2((i // 2001 % 16).float() - 8)
    return values.reshape(rows, columns).bfloat16()


GOLDENS = {
    ("tensorwise", "e4m3"): "17c56adf352c154d", ("tensorwise", "e5m2"): "51b19d8cd5d7347e",
    ("1 x 128", "e4m3"): "de59c51f229d58a3", ("1 x 128", "e5m2"): "59e863409b06e03a",
    ("128 x 128", "e4m3"): "1226eca65c048cb1",
    ("nvfp4 1 x 16", ""): "df21190ac6ac33fb", ("nvfp4 16 x 16", ""): "c9c3b0e803ea807f"}
"""SHA-256 of what Transformer Engine's own references in Python make of `sample(160, 288)`, as float32:
`scale_from_amax_tensor`, `BlockwiseQuantizerReference` (both tests/pytorch/references) and
`NVFP4QuantizerRef` (pytorch/custom_recipes/reference_nvfp4.py) at commit d0067d0da, version 2.20.0.dev0."""


@pytest.mark.each(("way", "form"), GOLDENS)
def test_the_same_bits_as_transformer_engines_references(way: str, form: str) -> None:
    x = sample(160, 288)
    made = {"tensorwise": lambda: tensorwise(x, form), "1 x 128": lambda: blocks(x, form, 1),
            "128 x 128": lambda: blocks(x, form, 128), "nvfp4 1 x 16": lambda: nvfp4(x),
            "nvfp4 16 x 16": lambda: nvfp4(x, rows=16)}[way]()
    bits = (made + 0.0).contiguous().numpy().tobytes()  # + 0: one zero
    assert hashlib.sha256(bits).hexdigest()[:16] == GOLDENS[way, form]


@pytest.mark.parametrize("form", ["e4m3", "e5m2"])
def test_mx_block_by_block(form: str) -> None:
    x = sample(6, 80)  # the last block of a row is half one
    codes = positive_codes(form)
    for row, found in zip(x.double().numpy(), mx(x, form).double().numpy(), strict=True):
        for start in range(0, 80, 32):
            block, got = row[start:start + 32], found[start:start + 32]
            unit = 2.0 ** np.ceil(np.log2(np.abs(block).max() / LARGEST[form]))
            scaled = np.abs(got / unit)
            assert np.isin(scaled, codes).all() and scaled.max() > LARGEST[form] / 4
            nearest = np.abs(codes[None] - np.abs(block / unit)[:, None]).min(1)
            assert np.array_equal(np.abs(scaled - np.abs(block / unit)), nearest)


def test_a_rotation_spreads_an_outlier_and_keeps_products() -> None:
    a, b = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
    a[:, 5] = 40
    assert torch.allclose(rotated(a) @ rotated(b).t(), a @ b.t(), atol=1e-4)
    assert rotated(a).abs().max() < 0.4 * a.abs().max()


LARGEST_ERROR = {"tensorwise": 0.05, "blockwise": 0.05, "mxfp8": 0.05, "nvfp4": 0.25}


@pytest.mark.each("recipe", LARGEST_ERROR)
@pytest.mark.each("kind", ["fprop", "dgrad", "wgrad"])
def test_quantized_products_are_close_to_exact_products(recipe: str, kind: str) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(48, 160).bfloat16(), torch.randn(160, 32).bfloat16()
    exact, found = a.double() @ b.double(), product(a, b, kind, recipe).double()
    error = float((found - exact).norm() / exact.norm())
    assert 0.005 < error < LARGEST_ERROR[recipe]


def test_gradients_alone_are_e5m2_under_hybrid() -> None:
    x = torch.linspace(1, 2, 64).bfloat16().reshape(2, 32)
    coarse, fine = ({float(v) for v in quantized(x, role, "dgrad", "mxfp8", "hybrid").flatten()}
                    for role in ("gradient", "weight"))
    assert (len(coarse), len(fine)) == (5, 9)  # 4 and 8 steps from 1 to 2
