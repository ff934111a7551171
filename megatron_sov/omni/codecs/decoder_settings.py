"""Settings of the decoders of pictures and sounds, apart from their networks: `--help` needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le, Len

from megatron_sov.base.settings import ONCE, ProblemCode, SettingsProblem, multiple_of

MAX_BLOCKS = 8


Width = Annotated[int, Ge(1), Le(65_536)]


@dataclass(frozen=True)
class VAESettings:
    """The defaults are Flux's autoencoder, which the authors' latents (16 channels, an eighth of the side)
    fit; names are those of diffusers' config."""

    latent_channels: Annotated[int, Ge(1), Le(1024)] = 16
    """Of a latent."""
    block_out_channels: Annotated[
        tuple[Width, ...], Len(1, MAX_BLOCKS), multiple_of("norm_num_groups")] = (128, 256, 512, 512)
    """Of each block; every one but the last halves the picture's sides."""
    layers_per_block: Annotated[int, Ge(1), Le(100)] = 2
    """Residual layers of a block."""
    norm_num_groups: Annotated[int, Ge(1), Le(65536)] = 32
    """Groups of its norms."""
    scaling_factor: Annotated[float, Ge(1e-06), Le(1000000.0)] = 0.3611
    """What latents are multiplied with, so that they spread as the noise does."""
    shift_factor: Annotated[float, Ge(-1000000.0), Le(1000000.0)] = 0.1159
    """What is taken off them before."""
    use_quant_conv: bool = False
    """A convolution of size 1 behind the encoder."""
    use_post_quant_conv: bool = False
    """A convolution of size 1 before the decoder."""

    @property
    def pixels(self) -> int:
        """Pixels of a side of one latent."""
        return 2**(len(self.block_out_channels) - 1)


# Sizes of the picture decoder (`dit.py`).

NUM_AXES = 3
"""Of a place in a picture, as Flux counts them: a stream's number (always 0 here), row, column."""


HeadPart = Annotated[int, Ge(2), Le(65_536)]


@dataclass(frozen=True)
class DiTSettings:
    """The defaults are those of the authors' serving code (OmniServe, decoder/vision/track_b/pipeline.py)."""

    side_pixels: Annotated[int, Ge(1), Le(8192), multiple_of("size_multiple_pixels")] = 768
    """Height and width of a square picture; one of another shape has as many pixels."""
    size_multiple_pixels: Annotated[int, Ge(1), Le(8192)] = 16
    """Heights and widths of other shapes are rounded down to a multiple of it."""
    grid: Annotated[int, Ge(1), Le(256)] = 27
    """Tokens of a row and of a column of the picture's tokenizer."""
    codebook_size: Annotated[int, Ge(1), Le(1 << 20)] = 65536
    """Tokens of the tokenizer."""
    token_width: Annotated[int, Ge(1), Le(16384)] = 1536
    """Of the tokenizer's embeddings."""
    vae: VAESettings | None = VAESettings()
    """The autoencoder whose latents are denoised; None: pixels themselves are."""
    patch: Annotated[int, Ge(1), Le(256)] = 1
    """Latents (or pixels) of a side of one place in the sequence."""
    width: Annotated[int, Ge(1), Le(65536), multiple_of("num_heads")] = 1920
    """Of the hidden states."""
    num_heads: Annotated[int, Ge(1), Le(1024)] = 24
    """Of attention."""
    num_layers: Annotated[int, Ge(1), Le(1000)] = 35
    """Single-stream blocks."""
    mlp_ratio: Annotated[float, Ge(0.1), Le(100)] = 4.0
    """Width of a block's feed-forward part over `width`."""
    rope_axes: tuple[HeadPart, HeadPart, HeadPart] = (8, 36, 36)
    """Dimensions of a head that turn with each axis of a place."""
    rope_theta: Annotated[int, Ge(1), Le(1_000_000_000)] = 10_000
    """Base of the rotations."""
    shift: Annotated[float, Ge(0.001), Le(1000)] = 1.0
    """Of the noise levels towards more noise (diffusers' scheduler); ours, no source gives it."""
    steps: Annotated[int, Ge(1), Le(10000)] = 30
    """Steps of sampling where none are asked for: what the authors serve with (their page's pictures
    took 50)."""

    @property
    def channels(self) -> int:
        """Of what is denoised."""
        return 3 if self.vae is None else self.vae.latent_channels

    @property
    def latent_pixels(self) -> int:
        """Pixels of a side of what is denoised at one point."""
        return 1 if self.vae is None else self.vae.pixels

    @property
    def patch_channels(self) -> int:
        """Numbers at one place of the sequence."""
        return self.channels * self.patch**2

    def size_of(self, width_part: int = 1, height_part: int = 1) -> tuple[int, int]:
        """Return (height, width) in pixels of a picture of a ratio, with the area of a square one.

        The authors' rule (decoder/vision/track_b/serve.py): sides are rounded down to a multiple.
        """
        ratio, area, unit = height_part / width_part, self.side_pixels**2, self.size_multiple_pixels
        return int((area * ratio)**0.5 // unit) * unit, int((area / ratio)**0.5 // unit) * unit

    def problems(self) -> list[SettingsProblem]:
        found = []
        place = self.latent_pixels * self.patch
        for name in ("side_pixels", "size_multiple_pixels"):
            if getattr(self, name) % place:
                found.append(SettingsProblem(ProblemCode.RULE, name,
                                             f"must be a multiple of a place's {place} pixels (the "
                                             f"autoencoder's {self.latent_pixels} * patch)",
                                             getattr(self, name)))
        if self.width % self.num_heads == 0 and sum(self.rope_axes) != self.width // self.num_heads:
            found.append(SettingsProblem(ProblemCode.RULE, "rope_axes",
                                         "must add up to a head's dimensions, width / "
                                         f"num_heads = {self.width // self.num_heads}", self.rope_axes))
        if any(n % 2 for n in self.rope_axes):
            found.append(SettingsProblem(ProblemCode.RULE, "rope_axes", "must be even numbers",
                                         self.rope_axes))
        return found


# Sizes of the vocoder (`bigvgan.py`).

MAX_LAYERS, MAX_SPEAKERS = 16, 100_000


Layers = Annotated[tuple[Annotated[int, Ge(1), Le(1000)], ...], Len(1, MAX_LAYERS)]


@dataclass(frozen=True)
class UnitBigVGANSettings:
    """The rates of sound and tokens, the speakers' names and the kernels are the authors' (OmniServe,
    decoder/audio) or those of BigVGAN's base model at 24 kHz; widths that neither gives are ours."""

    sample_rate_hz: Annotated[int, Ge(1), Le(192000)] = 24_000
    """Of what it says."""
    tokens_per_s: Annotated[int, Ge(1), Le(1000)] = 25
    """Of what it reads."""
    codebook_size: Annotated[int, Ge(1), Le(1 << 20)] = 6_562
    """Tokens of the tokenizer: 6,561, and one more that the authors' server lets pass."""
    speakers: Annotated[tuple[str, ...], Len(1, MAX_SPEAKERS), ONCE] = ("fkms", "mhwj")
    """Names of the voices in the table: a woman's and a man's."""
    unit_width: Annotated[int, Ge(1), Le(16384)] = 512
    """Of a token's embedding; ours."""
    speaker_width: Annotated[int, Ge(1), Le(16384)] = 256
    """Of a speaker's vector: what the authors' ECAPA-TDNN puts out."""
    channels: Annotated[int, Ge(1), Le(65536)] = 512
    """Before the first upsampling; each one halves them."""
    rates: Layers = (8, 6, 5, 4)
    """Of the upsamplings; their product is `sample_rate_hz / tokens_per_s`; ours."""
    kernels: Layers = (3, 7, 11)
    """Of the blocks side by side behind each upsampling."""
    dilations: Layers = (1, 3, 5)
    """Of the layers of each block."""
    lookahead_tokens: Annotated[int, Ge(0), Le(100)] = 0
    """Tokens that are known before the sound of one is made: speech sounds after what follows, and layers are
    late.  A stream is later by as many tokens."""

    @property
    def samples_per_token(self) -> int:
        """Samples that a token becomes."""
        return math.prod(self.rates)

    def problems(self) -> list[SettingsProblem]:
        found = []
        if self.samples_per_token * self.tokens_per_s != self.sample_rate_hz:
            found.append(SettingsProblem(
                ProblemCode.RULE, "rates", f"make {self.samples_per_token} samples of a token, and "
                f"{self.sample_rate_hz} Hz at {self.tokens_per_s} tokens/s need "
                f"{self.sample_rate_hz / self.tokens_per_s:g}", self.rates))
        if self.channels % 2**len(self.rates):
            found.append(SettingsProblem(ProblemCode.RULE, "channels",
                                         f"must be a multiple of {2**len(self.rates)}: each "
                                         f"of the {len(self.rates)} rates halves them", self.channels))
        return found
