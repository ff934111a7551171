"""The vocoder: speech from an audio tokenizer's ids (Unit-BigVGAN, causal).

Its shape is that of the authors' serving code (OmniServe, decoder/audio/codec): a token's embedding and a
speaker's vector side by side, then upsamplings, each followed by blocks with periodic activations whose mean
goes on.  Activations are late instead of looking ahead (`CausalSnake`), so streaming is exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from megatron_sov.base.errors import UserError
from megatron_sov.omni.codecs.decoder_settings import UnitBigVGANSettings

# Layers of a sound that never look ahead, and what they remember between two pieces of it.
#
# A sound is [n, channels, t].  Each layer puts in front of a piece what it needs of the pieces before, so a
# sound in pieces comes out as the sound in one piece does.

START_GAIN = 0.3
"""Of a convolution at the start: how much of what goes in comes out.  BigVGAN's weights begin with a
deviation of 0.01, about this in its widest layers; narrow ones would be silent for hundreds of steps.
Ours."""


class Past:
    """What the layers still need of what they have seen; a new one is the begin of a sound."""

    def __init__(self) -> None:
        self._tails: dict[nn.Module, torch.Tensor] = {}

    def before(self, layer: nn.Module, piece: torch.Tensor, length: int, repeats: bool) -> torch.Tensor:
        """Return a piece with the `length` samples before it, and remember its own last ones.

        Args:
            layer: who remembers.
            piece: [n, channels, t], t at least 1.
            length: samples, 0 or more.
            repeats: what is before the begin of a sound: its first sample again and again, or silence.
        """
        if length == 0:
            return piece
        tail = self._tails.get(layer)
        if tail is None:
            first = piece[..., :1] if repeats else torch.zeros_like(piece[..., :1])
            tail = first.expand(-1, -1, length)
        joined = torch.cat([tail, piece], 2)
        self._tails[layer] = joined[..., -length:]
        return joined


class CausalConv(nn.Module):
    """A convolution over the present and the past; silence is before the begin."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        convolution = nn.Conv1d(channels_in, channels_out, kernel, dilation=dilation)
        nn.init.normal_(convolution.weight, std=START_GAIN / (channels_in * kernel)**0.5)
        self.convolution = weight_norm(convolution)
        self.num_before = (kernel - 1) * dilation

    def forward(self, piece: torch.Tensor, past: Past) -> torch.Tensor:
        """Return [n, channels_out, t] of [n, channels_in, t]."""
        out: torch.Tensor = self.convolution(past.before(self, piece, self.num_before, repeats=False))
        return out


class CausalUpsampling(nn.Module):
    """A transposed convolution over the present and one sample before it: `rate` samples out of each.

    Kernel 2 * rate, as in every published BigVGAN; the cut at both ends is the authors' (OmniServe,
    `CausalConvTranspose1d`).
    """

    def __init__(self, channels_in: int, channels_out: int, rate: int) -> None:
        super().__init__()
        convolution = nn.ConvTranspose1d(channels_in, channels_out, 2 * rate, stride=rate)
        # each sample out meets two of the kernel's taps
        nn.init.normal_(convolution.weight, std=START_GAIN / (channels_in * 2)**0.5)
        self.convolution = weight_norm(convolution)
        self.rate = rate

    def forward(self, piece: torch.Tensor, past: Past) -> torch.Tensor:
        """Return [n, channels_out, t * rate] of [n, channels_in, t]."""
        spread: torch.Tensor = self.convolution(past.before(self, piece, 1, repeats=True))
        return spread[..., self.rate:-self.rate]


RATIO = 2
"""Of the rate between the filters over the rate outside."""
TAPS = 12
"""Of each filter."""
DELAY_SAMPLES = 5
"""By which the output comes later than BigVGAN's: half of what both filters look ahead there."""
_ABOVE_ZERO = 1e-9
OUTER_KERNEL = 7
"""Of the first and the last convolution."""
MOST_NAMED = 20
"""Speakers that a message tells."""


# The periodic activation of BigVGAN (arXiv 2206.04658): Snake at twice the rate, between low-pass filters.
# The filters and formulas are those of NVIDIA/BigVGAN (activations.py, alias_free_activation/torch). There,
# and in the authors' serving code, each activation looks ahead; here the same filters are late by
# `DELAY_SAMPLES` instead, so that nothing depends on what comes later and a stream is exactly the whole.


def low_pass(cutoff: float, half_width: float, num_taps: int) -> torch.Tensor:
    """Return [num_taps] of a sinc under a Kaiser window, whose sum is 1 (BigVGAN's `kaiser_sinc_filter1d`).

    Args:
        cutoff: in cycles per sample, up to 0.5.
        half_width: of the band in which it falls off, likewise.
        num_taps: an even number.
    """
    # Kaiser's design rules: attenuation of the stop band in dB, and the window's beta for it
    attenuation = 2.285 * (num_taps // 2 - 1) * math.pi * 4 * half_width + 7.95
    if attenuation > 50:
        beta = 0.1102 * (attenuation - 8.7)
    elif attenuation >= 21:
        beta = 0.5842 * (attenuation - 21)**0.4 + 0.07886 * (attenuation - 21)
    else:
        beta = 0.0
    time = torch.arange(num_taps) - (num_taps - 1) / 2
    taps = torch.kaiser_window(num_taps, beta=beta, periodic=False) * torch.sinc(2 * cutoff * time)
    return taps / taps.sum()


class SnakeBeta(nn.Module):
    """x + sin(a x)^2 / b with a = exp(`alpha`), b = exp(`beta`) of each channel, both 1 at the start."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the activation of [n, channels, t]."""
        return x + torch.sin(x * self.alpha.exp()[:, None])**2 / (self.beta.exp()[:, None] + _ABOVE_ZERO)


class CausalSnake(nn.Module):
    """SnakeBeta at twice the rate, between two low-pass filters over the present and the past."""

    taps: torch.Tensor
    """[TAPS], of both filters."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.snake = SnakeBeta(channels)
        self.register_buffer("taps", low_pass(0.5 / RATIO, 0.6 / RATIO, TAPS), persistent=False)

    def forward(self, piece: torch.Tensor, past: Past) -> torch.Tensor:
        """Return [n, channels, t] of a piece of that shape."""
        channels, length = piece.shape[1:]
        taps = self.taps.expand(channels, 1, -1)
        num_before = TAPS // RATIO - 1
        joined = past.before(self, piece, num_before, repeats=True)
        # zeros between the samples take away half of the level: the factor gives it back
        spread = RATIO * functional.conv_transpose1d(joined, taps, stride=RATIO, groups=channels)
        first = num_before * RATIO
        bent = self.snake(spread[..., first:first + length * RATIO])
        # a second past in one layer: the inner module stands for it
        joined = past.before(self.snake, bent, TAPS - RATIO, repeats=True)
        return functional.conv1d(joined, taps, stride=RATIO, groups=channels)


class BigVganBlock(nn.Module):
    """Residual layers of two convolutions behind activations, the first of them dilated (`AMPBlock1`)."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.wide = nn.ModuleList(CausalConv(channels, channels, kernel, d) for d in dilations)
        self.narrow = nn.ModuleList(CausalConv(channels, channels, kernel) for _ in dilations)
        self.before_wide = nn.ModuleList(CausalSnake(channels) for _ in dilations)
        self.before_narrow = nn.ModuleList(CausalSnake(channels) for _ in dilations)

    def forward(self, piece: torch.Tensor, past: Past) -> torch.Tensor:
        """Return [n, channels, t] of a piece of that shape."""
        layers = zip(self.before_wide, self.wide, self.before_narrow, self.narrow, strict=True)
        for first_snake, wide, second_snake, narrow in layers:
            inner = wide(first_snake(piece, past), past)
            piece = piece + narrow(second_snake(inner, past), past)
        return piece


class UpsamplingLevel(nn.Module):
    """An upsampling, which halves the channels, and blocks of several kernels side by side."""

    def __init__(self, channels: int, rate: int, kernels: tuple[int, ...],
                 dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.upsampling = CausalUpsampling(channels, channels // 2, rate)
        self.blocks = nn.ModuleList(BigVganBlock(channels // 2, kernel, dilations) for kernel in kernels)

    def forward(self, piece: torch.Tensor, past: Past) -> torch.Tensor:
        """Return [n, channels / 2, t * rate] of [n, channels, t]."""
        piece = self.upsampling(piece, past)
        return torch.stack([block(piece, past) for block in self.blocks]).mean(0)


class UnitBigVGAN(nn.Module):
    """Ids of speech and a speaker -> sound."""

    Settings = UnitBigVGANSettings

    def __init__(self, settings: UnitBigVGANSettings) -> None:
        super().__init__()
        self.settings = settings
        s = settings
        # the last row is what comes behind the end of a sound
        self.units = nn.Embedding(s.codebook_size + 1, s.unit_width)
        self.voices = nn.Embedding(len(s.speakers), s.speaker_width)
        self.first = CausalConv(s.unit_width + s.speaker_width, s.channels, OUTER_KERNEL)
        self.levels = nn.ModuleList(UpsamplingLevel(s.channels // 2**i, rate, s.kernels, s.dilations)
                                    for i, rate in enumerate(s.rates))
        width = s.channels // 2**len(s.rates)
        self.last_snake = CausalSnake(width)
        self.last = CausalConv(width, 1, OUTER_KERNEL)

    @property
    def sample_rate_hz(self) -> int:
        return self.settings.sample_rate_hz

    @property
    def speakers(self) -> tuple[str, ...]:
        return self.settings.speakers

    def forward(self, ids: torch.Tensor, voices: torch.Tensor) -> torch.Tensor:
        """Return [n, t * samples_per_token] samples in -1..1 of t tokens.

        Args:
            ids: [n, t + lookahead_tokens] tokens; `behind_end` where there are no more.
            voices: [n, speaker_width] speakers' vectors.
        """
        return self._piece(ids, voices, Past())[:, self.settings.lookahead_tokens * self._samples_per_token:]

    @property
    def behind_end(self) -> int:
        """The id of what comes behind the end of a sound."""
        return self.settings.codebook_size

    @property
    def _samples_per_token(self) -> int:
        return self.settings.samples_per_token

    def _piece(self, ids: torch.Tensor, voices: torch.Tensor, past: Past) -> torch.Tensor:
        """Return what [n, t] tokens add to sounds: late by the lookahead."""
        # embeddings begin with a deviation of 1 a number: this makes a vector of about length 1
        unit = self.units(ids).transpose(1, 2) * self.settings.unit_width**-0.5
        piece = self.first(torch.cat([unit, voices[:, :, None].expand(-1, -1, ids.shape[1])], 1), past)
        for level in self.levels:
            piece = level(piece, past)
        return torch.tanh(self.last(self.last_snake(piece, past), past)).squeeze(1)

    def voice_of(self, speaker: str) -> torch.Tensor:
        """Return [speaker_width], the vector of a speaker in the table.

        Raises:
            UserError: the name is none of them.
        """
        if speaker not in self.speakers:
            more = ", ..." if len(self.speakers) > MOST_NAMED else ""
            raise UserError(f"speaker '{speaker}': this vocoder knows "
                            f"{', '.join(self.speakers[:MOST_NAMED])}{more}")
        return self.voices.weight[self.speakers.index(speaker)]

    @torch.no_grad()
    def decode(self, ids: torch.Tensor, speaker: str | torch.Tensor) -> torch.Tensor:
        """Return [t * samples_per_token] float32 samples in -1..1 of [t] ids; no ids, no sound.

        Args:
            ids: tokens of one sound.
            speaker: a name of the table, or the vector of somebody else (an ECAPA-TDNN's, [speaker_width]).

        Raises:
            UserError: an unknown speaker, a vector of another width, an id outside of the codebook.
        """
        # with an empty tensor: torch joins no empty list
        return torch.cat([*self.stream([ids], speaker), torch.zeros(0, device=ids.device)])

    @torch.no_grad()
    def stream(self, ids: Iterable[torch.Tensor], speaker: str | torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the sound of each piece of ids as soon as it is there, and what is late at the end; all of it
        is what `decode` returns.

        Raises:
            UserError: as `decode`.
        """
        voice = self.voice_of(speaker) if isinstance(speaker, str) else speaker
        width = self.settings.speaker_width
        if voice.shape != (width,):
            raise UserError(f"a speaker's vector has {width} numbers for this vocoder, and here are "
                            f"{tuple(voice.shape)}; take the encoder that it was trained with")
        past, weight = Past(), self.voices.weight
        voice = voice.to(weight.device, weight.dtype)[None]
        ahead = self.settings.lookahead_tokens
        late, num_tokens = ahead * self._samples_per_token, 0
        for piece in ids:
            if len(piece):
                self._check(piece)
                num_tokens += len(piece)
                sound = self._piece(piece[None].to(weight.device), voice, past)[0].float()
                yield sound[late:]
                late = max(late - len(sound), 0)
        if ahead and num_tokens:
            end = torch.full((1, ahead), self.behind_end, device=weight.device)
            yield self._piece(end, voice, past)[0, late:].float()

    def _check(self, ids: torch.Tensor) -> None:
        size = self.settings.codebook_size
        outside = ids[(ids < 0) | (ids >= size)]
        if len(outside):
            raise UserError(f"audio token {int(outside[0])} is outside of the vocoder's codebook "
                            f"(0 to {size - 1}); take the vocoder of this tokenizer")
