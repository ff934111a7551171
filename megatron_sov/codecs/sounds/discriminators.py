"""Judges that a vocoder learns to deceive: of the samples at several periods, and of spectra at several
resolutions.

The shapes are BigVGAN's multi-period and multi-resolution discriminators (NVIDIA/BigVGAN, discriminators.py),
with their widths as a setting; the losses are its least-squares ones (loss.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

PERIODS = (2, 3, 5, 7, 11)
"""Samples that lie side by side for each judge of the samples."""
RESOLUTIONS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))
"""Samples of each transform, between two of its frames, and of its window."""
FEATURE_WEIGHT = 2.0
"""Of the distance between what the judges see in real and in made sound."""
_SLOPE = 0.1


class Verdict(NamedTuple):
    """What one judge says of a batch of sound."""

    score: torch.Tensor
    """Above all 1 for real, 0 for made."""
    features: list[torch.Tensor]
    """What its layers saw."""


class PeriodJudge(nn.Module):
    """Convolutions over every `period`-th sample."""

    def __init__(self, period: int, width: int) -> None:
        super().__init__()
        self.period = period
        widths = [1, width, 4 * width, 16 * width, 32 * width]
        self.layers = nn.ModuleList(
            [*(weight_norm(nn.Conv2d(a, b, (5, 1), (3, 1), padding=(2, 0)))
               for a, b in pairwise(widths)),
             weight_norm(nn.Conv2d(widths[-1], widths[-1], (5, 1), padding=(2, 0)))])
        self.last = weight_norm(nn.Conv2d(widths[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, sound: torch.Tensor) -> Verdict:
        """Judge [n, t] samples."""
        missing = -sound.shape[-1] % self.period
        padded = functional.pad(sound[:, None], (0, missing), mode="reflect")
        return _through(padded.unflatten(-1, (-1, self.period)), self.layers, self.last)


class SpectrumJudge(nn.Module):
    """Convolutions over the magnitudes of a spectrum."""

    def __init__(self, resolution: tuple[int, int, int], width: int) -> None:
        super().__init__()
        self.transform, self.hop, self.window = resolution
        strides = ((1, 1), (1, 2), (1, 2), (1, 2))
        self.layers = nn.ModuleList(
            [*(weight_norm(nn.Conv2d(width if i else 1, width, (3, 9), stride, padding=(1, 4)))
               for i, stride in enumerate(strides)),
             weight_norm(nn.Conv2d(width, width, (3, 3), padding=(1, 1)))])
        self.last = weight_norm(nn.Conv2d(width, 1, (3, 3), padding=(1, 1)))

    def forward(self, sound: torch.Tensor) -> Verdict:
        """Judge [n, t] samples."""
        side = (self.transform - self.hop) // 2
        padded = functional.pad(sound[:, None], (side, side), mode="reflect").squeeze(1)
        spectrum = torch.stft(padded, self.transform, self.hop, self.window, center=False,
                              window=torch.ones(self.window, device=sound.device), return_complex=True)
        return _through(spectrum.abs()[:, None], self.layers, self.last)


class Judges(nn.Module):
    """All of them."""

    def __init__(self, width: int, periods: Sequence[int],
                 resolutions: Sequence[tuple[int, int, int]]) -> None:
        super().__init__()
        self.judges = nn.ModuleList([*(PeriodJudge(period, width) for period in periods),
                                     *(SpectrumJudge(resolution, width) for resolution in resolutions)])

    def forward(self, sound: torch.Tensor) -> list[Verdict]:
        """Return each one's verdict of [n, t] samples."""
        return [judge(sound) for judge in self.judges]


def judges_loss(real: list[Verdict], made: list[Verdict]) -> torch.Tensor:
    """Return how far the judges are from saying 1 of real sound and 0 of made sound."""
    return torch.stack([((1 - r.score)**2).mean() + (m.score**2).mean()
                        for r, m in zip(real, made, strict=True)]).sum()


def deceiving_loss(real: list[Verdict], made: list[Verdict]) -> torch.Tensor:
    """Return how far made sound is from a score of 1, and from what the judges see in real sound."""
    scores = torch.stack([((1 - m.score)**2).mean() for m in made]).sum()
    distances = torch.stack([(a.detach() - b).abs().mean() for r, m in zip(real, made, strict=True)
                             for a, b in zip(r.features, m.features, strict=True)]).sum()
    return scores + FEATURE_WEIGHT * distances


def _through(seen: torch.Tensor, layers: nn.ModuleList, last: nn.Module) -> Verdict:
    features = []
    for layer in layers:
        seen = functional.leaky_relu(layer(seen), _SLOPE)
        features.append(seen)
    score = last(seen)
    return Verdict(score.flatten(1), [*features, score])
