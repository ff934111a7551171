"""The periodic activation: BigVGAN's own formulas, later by a few samples, and blind to what comes."""

from __future__ import annotations

import pytest
import torch
from scipy.signal import firwin, kaiser_beta
from torch.nn import functional

from megatron_sov.omni.codecs.bigvgan import DELAY_SAMPLES, TAPS, CausalSnake, Past, SnakeBeta, low_pass


def test_the_filter_is_scipys_window_design() -> None:
    attenuation_db = 2.285 * (TAPS // 2 - 1) * torch.pi * 4 * 0.3 + 7.95
    expected = firwin(TAPS, 0.5, window=("kaiser", kaiser_beta(attenuation_db)))
    assert low_pass(0.25, 0.3, TAPS).numpy() == pytest.approx(expected, abs=1e-7)


def test_snake_is_its_formula() -> None:
    snake = SnakeBeta(2)
    torch.nn.init.constant_(snake.alpha, 0.7)
    torch.nn.init.constant_(snake.beta, -0.4)
    x = torch.linspace(-3, 3, 10).expand(1, 2, -1)
    # NVIDIA/BigVGAN, activations.py, SnakeBeta.forward with alpha_logscale
    alpha, beta = torch.exp(snake.alpha)[None, :, None], torch.exp(snake.beta)[None, :, None]
    expected = x + (1.0 / (beta + 0.000000001)) * torch.pow(torch.sin(x * alpha), 2)
    torch.testing.assert_close(snake(x), expected)


def _activation_of_bigvgan(x: torch.Tensor, snake: SnakeBeta, taps: torch.Tensor) -> torch.Tensor:
    """NVIDIA/BigVGAN, alias_free_activation/torch: UpSample1d, the activation, DownSample1d; 12 taps."""
    channels = x.shape[1]
    filters = taps.expand(channels, 1, -1)
    x = functional.pad(x, (5, 5), mode="replicate")
    x = 2 * functional.conv_transpose1d(x, filters, stride=2, groups=channels)
    x = snake(x[..., 5 * 2 + (12 - 2) // 2:-(5 * 2 + (12 - 2 + 1) // 2)])
    x = functional.pad(x, (12 // 2 - 1, 12 // 2), mode="replicate")
    return functional.conv1d(x, filters, stride=2, groups=channels)


def test_it_is_bigvgans_activation_some_samples_later() -> None:
    layer = CausalSnake(3)
    torch.nn.init.normal_(layer.snake.alpha, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 3, 80, generator=torch.Generator().manual_seed(0))
    theirs = _activation_of_bigvgan(x, layer.snake, layer.taps)
    ours = layer(x, Past())
    assert ours.shape == x.shape
    # at the edges both invent samples; between them nothing differs
    edge = TAPS
    torch.testing.assert_close(ours[..., edge + DELAY_SAMPLES:],
                               theirs[..., edge:-DELAY_SAMPLES], atol=1e-6, rtol=0)


def test_nothing_depends_on_what_comes_later() -> None:
    layer = CausalSnake(1)
    x = torch.randn(1, 1, 40, generator=torch.Generator().manual_seed(0))
    other = x.clone()
    other[..., 25:] += 1
    changed = (layer(x, Past()) != layer(other, Past())).nonzero()[:, 2]
    assert changed.min() == 25
