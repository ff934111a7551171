"""The distance of two sounds follows what is heard, not the samples."""

from __future__ import annotations

import torch

from megatron_sov.omni.codecs.training.decoders import (
    Judges, SpectralLoss, deceiving_loss, judges_loss, mel_filters)


def _tone(frequency_hz: float, phase: float = 0.0) -> torch.Tensor:
    return torch.sin(2 * torch.pi * frequency_hz * torch.arange(4000) / 8000 + phase)[None] / 2


def test_a_shifted_tone_is_near_and_another_tone_is_far() -> None:
    distance = SpectralLoss(8000, (64, 256), num_mels=20)
    tone = _tone(440)
    assert distance(tone, tone) == 0
    shifted, third, octave = (distance(other, tone) for other in (_tone(440, 1.5), _tone(554), _tone(880)))
    assert shifted < third / 3 < octave / 3
    # as samples, the shifted one is the farthest of all that are as loud
    assert (_tone(440, 1.5) - tone).norm() > tone.norm()


def test_silence_has_a_slope() -> None:
    made = torch.zeros(1, 1000, requires_grad=True)
    SpectralLoss(8000, (64,), num_mels=8)(made, _tone(440)[:, :1000]).backward()
    assert made.grad is not None and made.grad.isfinite().all()


def test_mels_cover_the_spectrum() -> None:
    filters = mel_filters(8000, 256, 20)
    assert filters.shape == (20, 129) and (filters >= 0).all() and (filters[:, 1:-1].sum(0) > 0).all()


def test_judges_begin_undecided_and_their_losses_are_least_squares() -> None:
    torch.manual_seed(0)
    judges = Judges(2, periods=(2, 3), resolutions=((64, 16, 32),))
    real, made = judges(_tone(440)), judges(_tone(880))
    assert len(real) == 3 and all(len(verdict.features) == 6 for verdict in real)
    by_hand = sum(((1 - r.score)**2).mean() + (m.score**2).mean() for r, m in zip(real, made, strict=True))
    torch.testing.assert_close(judges_loss(real, made), by_hand)
    # made sound that looks as real sound does is judged by its score alone
    scores = sum(((1 - r.score)**2).mean() for r in real)
    torch.testing.assert_close(deceiving_loss(real, real), scores)
    assert deceiving_loss(real, made) > scores
