"""How the vocoder learns: to sound like the speech whose tokens it reads, to the ear and to judges.

The distance is of spectra at several resolutions (`sounds/spectral_loss.py`); judges
(`sounds/discriminators.py`) add what makes BigVGAN's speech crisp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from annotated_types import Ge, Le, Len, MultipleOf
from torch import nn

from megatron_sov.codecs.sounds.bigvgan import UnitBigVGAN
from megatron_sov.codecs.sounds.bigvgan_settings import UnitBigVGANSettings
from megatron_sov.codecs.sounds.discriminators import (
    PERIODS,
    RESOLUTIONS,
    Judges,
    deceiving_loss,
    judges_loss,
)
from megatron_sov.codecs.sounds.spectral_loss import HOPS_PER_WINDOW, SpectralLoss
from megatron_sov.codecs.training.draws import batch_rows, generator
from megatron_sov.codecs.training.schedule import Schedule
from megatron_sov.settings import Bound, Breach, Code

LOOK_SOUNDS = 64
"""Held-out sounds that are looked at."""
MAX_WINDOWS = 16
MAX_GRAD_NORM = 500.0
"""Longer gradients are shortened; BigVGAN-v2's."""


def _no_resolution(resolution: tuple[int, int, int]) -> Breach | None:
    transform, hop, window = resolution
    return None if 1 <= hop <= window <= transform <= 1 << 20 else (
        Code.BOUND, "must be transform, hop and window, none of them larger than the first", "")


@dataclass(frozen=True)
class VocoderLearning(Schedule):
    """How a vocoder learns.  Windows, weight and widths of the judges are BigVGAN-v2's
    (configs/bigvgan_v2_24khz_100band_256x.json, loss.py); the rest is ours."""

    steps: Annotated[int, Ge(1), Le(100_000_000)] = 1_000_000
    """Optimizer steps."""
    batch_size: Annotated[int, Ge(1), Le(1_000_000)] = 32
    """Segments of a step."""
    learning_rate: Annotated[float, Ge(0), Le(10)] = 1e-4
    """Of AdamW, at its highest; the judges' too."""
    segment_tokens: Annotated[int, Ge(1), Le(10000)] = 32
    """Tokens of a segment; a shorter sound is taken whole."""
    windows: Annotated[tuple[Annotated[int, Ge(16), Le(1 << 20), MultipleOf(HOPS_PER_WINDOW)], ...],
                       Len(1, MAX_WINDOWS)] = (32, 64, 128, 256, 512, 1024, 2048)
    """Samples of the windows of the spectra."""
    num_mels: Annotated[int, Ge(4), Le(4096)] = 320
    """Bands of the largest window's mel spectrum."""
    quiet: Annotated[float, Ge(1e-09), Le(1)] = 1e-5
    """Magnitudes well below it count as silence."""
    judges_from_step: Annotated[int, Ge(0), Le(100000000)] = 1
    """Step from which the judges are asked; 0: never, there are none."""
    judges_width: Annotated[int, Ge(1), Le(1024)] = 32
    """Of their first layers."""
    judges_periods: tuple[Annotated[int, Ge(1), Le(1000)], ...] = PERIODS
    """Samples that lie side by side for each judge of samples."""
    judges_resolutions: tuple[Annotated[tuple[int, int, int], Bound(_no_resolution)], ...] = RESOLUTIONS
    """Transform, hop and window, in samples, for each judge of spectra."""
    spectral_weight: Annotated[float, Ge(1e-06), Le(1000000.0)] = 15.0
    """Of the spectra's distance beside the judges."""


@dataclass(frozen=True)
class VocoderTraining:
    """Settings of `codec train vocoder`."""

    model: UnitBigVGANSettings = field(default_factory=UnitBigVGANSettings)
    """Sizes; speakers and tokens are those of the media and of the tokenizer."""
    learning: VocoderLearning = field(default_factory=VocoderLearning)
    """How it learns."""


@dataclass(frozen=True)
class Spoken:
    """One sound to learn from."""

    ids: torch.Tensor
    """[t] tokens."""
    sound: torch.Tensor
    """[samples] float32 in -1..1 at the vocoder's rate."""
    speaker: int
    """Row of the vocoder's table."""


class VocoderTask:
    """A vocoder, judges where they are asked for, and sounds with their tokens."""

    def __init__(self, vocoder: UnitBigVGAN, learning: VocoderLearning, sounds: Sequence[Spoken],
                 heldout: Sequence[Spoken]) -> None:
        """Args:
            vocoder: what learns.
            learning: how it learns.
            sounds: to learn from.
            heldout: not to learn from.
        """
        self.vocoder, self.learning, self.sounds, self.heldout = vocoder, learning, sounds, heldout
        self.networks = nn.ModuleDict({"vocoder": vocoder})
        device = vocoder.voices.weight.device
        self.distance = SpectralLoss(vocoder.sample_rate_hz, learning.windows, learning.num_mels,
                                     learning.quiet).to(device)
        self.judges: Judges | None = None
        if learning.judges_from_step:
            self.judges = Judges(learning.judges_width, learning.judges_periods,
                                 learning.judges_resolutions).to(device)
            self.networks["judges"] = self.judges
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            name: torch.optim.AdamW(network.parameters(), learning.learning_rate, betas=(0.8, 0.99),
                                    weight_decay=0.0) for name, network in self.networks.items()}

    def learn(self, step: int) -> dict[str, float]:
        """Take an optimizer step of the judges, if they are asked, and one of the vocoder.

        Returns `loss`, `spectral`, `grad_norm`, and with judges `judges` and `deceiving`.
        """
        s = self.learning
        for optimizer in self.optimizers.values():
            s.set_rate(optimizer, step)
        rows = batch_rows(len(self.sounds), s.batch_size, s.seed, step).tolist()
        real, made = self._heard([self.sounds[row] for row in rows], generator(s.seed, step, "segments"))
        spectral = self.distance(made, real)
        if self.judges is None or step < s.judges_from_step:
            norm = self._step("vocoder", spectral)
            return {"loss": spectral.item(), "spectral": spectral.item(), "grad_norm": norm}
        judged = judges_loss(self.judges(real), self.judges(made.detach()))
        self._step("judges", judged)
        self.judges.requires_grad_(False)
        deceiving = deceiving_loss(self.judges(real), self.judges(made))
        loss = s.spectral_weight * spectral + deceiving
        norm = self._step("vocoder", loss)
        self.judges.requires_grad_(True)
        return {"loss": loss.item(), "spectral": spectral.item(), "grad_norm": norm, "judges": judged.item(),
                "deceiving": deceiving.item()}

    @torch.no_grad()
    def look(self) -> dict[str, float]:
        """Return `spectral` on the begins of held-out sounds."""
        if not self.heldout:
            return {}
        rows = range(min(len(self.heldout), LOOK_SOUNDS))
        real, made = self._heard([self.heldout[row] for row in rows], None)
        return {"spectral": self.distance(made, real).item()}

    def codec(self) -> UnitBigVGAN:
        """Return the vocoder."""
        return self.vocoder

    def _step(self, name: str, loss: torch.Tensor) -> float:
        optimizer = self.optimizers[name]
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.networks[name].parameters(), MAX_GRAD_NORM)
        optimizer.step()
        return norm.item()

    def _heard(self, sounds: Sequence[Spoken],
               draws: torch.Generator | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return real and made sound [n, samples] of a segment of each; silence behind short ones in both.

        Args:
            sounds: one a row.
            draws: where segments begin; None: at the begin.
        """
        sizes, length = self.vocoder.settings, self.learning.segment_tokens
        samples, ahead = sizes.samples_per_token, sizes.lookahead_tokens
        ids = torch.full((len(sounds), length + ahead), self.vocoder.behind_end)
        real = torch.zeros(len(sounds), length * samples)
        there = torch.zeros(len(sounds), length)
        for row, spoken in enumerate(sounds):
            last = max(len(spoken.ids) - length, 0)
            first = 0 if draws is None else int(torch.randint(last + 1, (), generator=draws))
            tokens = spoken.ids[first:first + length + ahead]
            num_tokens = min(len(tokens), length)
            piece = spoken.sound[first * samples:(first + num_tokens) * samples]
            ids[row, :len(tokens)], real[row, :len(piece)], there[row, :num_tokens] = tokens, piece, 1.0
        device = self.vocoder.voices.weight.device
        voices = self.vocoder.voices(torch.tensor([spoken.speaker for spoken in sounds], device=device))
        made = self.vocoder(ids.to(device), voices)
        return real.to(device), made * there.repeat_interleave(samples, 1).to(device)
