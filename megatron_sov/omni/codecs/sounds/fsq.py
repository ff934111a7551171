"""A tokenizer of speech that is small enough to be trained: log-mel frames, a stack of convolutions down to
tokens, finite scalar quantisation (https://arxiv.org/abs/2309.15505), and convolutions back to frames.

A token is a corner of a small grid: each of a few numbers is rounded to one of a few levels, so that there is
no codebook to learn and none of it can die.  3^8 = 6,561 are the levels of CosyVoice 2's tokenizer.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le, Len, MultipleOf
from torch import nn
from vector_quantize_pytorch import FSQ

from megatron_sov.base.settings import Bound, Breach, ProblemCode

FLOOR = 1e-5
"""Smallest power of a mel band; silence lies here."""
_GRIFFIN_LIM_STEPS = 32
FRAMES_PER_TOKEN = 4
_DILATIONS = (1, 3, 9)
_MEAN, _SCALE = -5.0, 4.0  # of log-mel frames of speech, roughly


# Sound as log-mel frames, and back by Griffin and Lim's search for phases (IEEE TASSP 32, 1984).


class LogMel(nn.Module):
    """Log-mel frames of sounds at one rate.

    Args:
        sample_rate_hz: of the sounds.
        hop_samples: samples from frame to frame.
        num_mels: bands.
    """

    filters: torch.Tensor
    window: torch.Tensor

    def __init__(self, sample_rate_hz: int, hop_samples: int, num_mels: int) -> None:
        super().__init__()
        from transformers.audio_utils import mel_filter_bank

        self.hop_samples = hop_samples
        self.window_samples = 4 * hop_samples
        with warnings.catch_warnings(), torch.device("cpu"):
            warnings.simplefilter("ignore")  # of bands that no frequency falls into, where there are many
            filters = mel_filter_bank(self.window_samples // 2 + 1, num_mels, 0.0, sample_rate_hz / 2,
                                      sample_rate_hz, norm="slaney", mel_scale="slaney")
            transposed = torch.from_numpy(filters).float().T.contiguous()
            self.register_buffer("filters", transposed, persistent=False)
            self.register_buffer("window", torch.hann_window(self.window_samples), persistent=False)

    def forward(self, sounds: torch.Tensor) -> torch.Tensor:
        """Return [n, mels, samples / hop] frames, natural logarithms, of [n, samples] sounds."""
        power = self._spectra(sounds).abs()[..., :-1] ** 2
        return (self.filters @ power).clamp_min(FLOOR).log()

    def _spectra(self, sounds: torch.Tensor) -> torch.Tensor:
        return torch.stft(sounds, self.window_samples, self.hop_samples, window=self.window, center=True,
                          pad_mode="constant", return_complex=True)

    def sound(self, frames: torch.Tensor) -> torch.Tensor:
        """Return the sounds [n, frames * hop] in -1..1 of [n, mels, frames] log-mel frames; phases begin at
        zero, so that it is a function of them."""
        power = torch.linalg.pinv(self.filters) @ frames.exp()
        size = F.pad(power.clamp_min(0).sqrt(), (0, 1), mode="replicate")
        length = frames.shape[-1] * self.hop_samples
        spectrum = size.to(torch.complex64)
        for _ in range(_GRIFFIN_LIM_STEPS):
            again = self._spectra(self._back(spectrum, length))
            spectrum = size * again / again.abs().clamp_min(1e-8)
        return self._back(spectrum, length).clamp(-1, 1)

    def _back(self, spectrum: torch.Tensor, length: int) -> torch.Tensor:
        return torch.istft(spectrum, self.window_samples, self.hop_samples, window=self.window, length=length)


def _too_many(levels: tuple[int, ...]) -> Breach | None:
    return None if math.prod(levels) <= 1 << 20 else (
        ProblemCode.BOUND, f"must have a product of at most {1 << 20:,}", "")


@dataclass(frozen=True)
class FSQSettings:
    """Sizes of the networks."""

    sample_rate_hz: Annotated[int, Ge(1000), Le(192000)] = 16_000
    """Of what it hears."""
    samples_per_token: Annotated[int, Ge(64), Le(48_000), MultipleOf(FRAMES_PER_TOKEN)] = 640
    """640 at 16 kHz are 25 tokens a second; a multiple of 4."""
    num_mels: Annotated[int, Ge(4), Le(512)] = 80
    """Bands of a frame; a token has four frames."""
    width: Annotated[int, Ge(1), Le(16384)] = 384
    """Of the convolutions."""
    num_blocks: Annotated[int, Ge(1), Le(100)] = 6
    """Of the encoder, and of the decoder."""
    levels: Annotated[tuple[Annotated[int, Ge(3), Le(1024)], ...], Len(1, 16), Bound(_too_many)] = (3,) * 8
    """Of each of the quantised numbers; their product is the size of the codebook."""
    max_piece_s: Annotated[float, Ge(0.5), Le(600)] = 30.0
    """A longer sound is cut into pieces of this length."""


class FSQTokenizer(nn.Module):
    """Speech as ids; an `interface.AudioTokenizer` with a decoder of its own."""

    Settings = FSQSettings

    def __init__(self, settings: FSQSettings) -> None:
        super().__init__()
        self.settings = settings
        self.sample_rate_hz, self.samples_per_token = settings.sample_rate_hz, settings.samples_per_token
        self.codebook_size, self.max_piece_s = math.prod(settings.levels), settings.max_piece_s
        self.width = self.code_width = len(settings.levels)
        self.frames = LogMel(settings.sample_rate_hz, settings.samples_per_token // FRAMES_PER_TOKEN,
                             settings.num_mels)
        width = settings.width
        self.encoder = nn.Sequential(
            nn.Conv1d(settings.num_mels, width, 3, padding=1), nn.GELU(),
            nn.Conv1d(width, width, 4, stride=2, padding=1), nn.GELU(),
            nn.Conv1d(width, width, 4, stride=2, padding=1),
            *(FsqBlock(width, _DILATIONS[i % len(_DILATIONS)]) for i in range(settings.num_blocks)))
        self.to_code = nn.Linear(width, self.code_width)
        self.quantiser = self.make_quantiser()
        self.from_code = nn.Linear(self.code_width, width)
        self.decoder = nn.Sequential(
            *(FsqBlock(width, _DILATIONS[i % len(_DILATIONS)]) for i in range(settings.num_blocks)),
            nn.ConvTranspose1d(width, width, 4, stride=2, padding=1), nn.GELU(),
            nn.ConvTranspose1d(width, width, 4, stride=2, padding=1), FsqBlock(width, 1), nn.GELU(),
            nn.Conv1d(width, settings.num_mels, 3, padding=1))

    def make_quantiser(self) -> Any:
        """Return what finds codes; a baseline may put another one here."""
        return LevelQuantiser(self.settings.levels)

    def _vectors(self, frames: torch.Tensor) -> torch.Tensor:
        """Return the numbers [n, tokens, code_width] before they are rounded."""
        vectors: torch.Tensor = self.to_code(self.encoder((frames - _MEAN) / _SCALE).transpose(1, 2))
        return vectors

    def forward(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return reconstructed frames, ids and the quantiser's loss of [n, mels, 4 * tokens] frames."""
        codes, ids, loss = self.quantiser(self._vectors(frames))
        return self._frames_of(codes), ids, loss

    def encode(self, sound: torch.Tensor) -> torch.Tensor:
        """Return [t] int64 ids of [s] samples; the last token's silence is filled up."""
        tokens = int(self.max_piece_s * self.sample_rate_hz / self.samples_per_token)
        piece = max(1, tokens) * self.samples_per_token
        with torch.no_grad():
            ids = [self._piece(part) for part in sound.split(piece)] if len(sound) else []
        return torch.cat(ids) if ids else torch.zeros(0, dtype=torch.int64)

    def _piece(self, sound: torch.Tensor) -> torch.Tensor:
        filled = F.pad(sound, (0, -len(sound) % self.samples_per_token))
        ids: torch.Tensor = self.quantiser.nearest(self._vectors(self.frames(filled[None])))[0]
        return ids

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return [t, width] float32 embeddings of ids: the rounded numbers, in -1..1."""
        with torch.no_grad():
            codes: torch.Tensor = self.quantiser.embed(ids)
        return codes

    def reconstruct(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the sound [t * samples_per_token] in -1..1 that the plain decoder and Griffin and Lim's
        search for phases make of ids."""
        with torch.no_grad():
            return self.frames.sound(self._frames_of(self.embed(ids)[None]))[0]

    def _frames_of(self, codes: torch.Tensor) -> torch.Tensor:
        frames: torch.Tensor = self.decoder(self.from_code(codes).transpose(1, 2))
        return frames * _SCALE + _MEAN


class LevelQuantiser(nn.Module):
    """vector-quantize-pytorch's FSQ, as the networks here ask a quantiser."""

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        with torch.device("cpu"):  # it reads its tables while it is made, and has no weights
            self.grid = FSQ(list(levels))

    def forward(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return rounded numbers, ids and no loss; gradients pass straight through the rounding."""
        codes, ids = self.grid(numbers)
        return codes, ids.long(), numbers.new_zeros(())

    def nearest(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the ids [n, t] of [n, t, levels] numbers."""
        ids: torch.Tensor = self.grid(numbers)[1].long()
        return ids

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rounded numbers [..., levels] of ids."""
        codes: torch.Tensor = self.grid.implicit_codebook[ids]
        return codes


class FsqBlock(nn.Module):
    """A residual block of two convolutions over time."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.wide = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
        self.back = nn.Conv1d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [n, width, t] of the same."""
        out: torch.Tensor = x + self.back(F.gelu(self.wide(self.norm(x))))
        return out
