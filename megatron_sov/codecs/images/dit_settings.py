"""Sizes of the picture decoder (`dit.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le

from megatron_sov.codecs.images.vae import VAESettings
from megatron_sov.settings import Code, Problem, multiple_of

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

    def problems(self) -> list[Problem]:
        """Return what does not fit together."""
        found = []
        place = self.latent_pixels * self.patch
        for name in ("side_pixels", "size_multiple_pixels"):
            if getattr(self, name) % place:
                found.append(Problem(Code.RULE, name, f"must be a multiple of a place's {place} pixels (the "
                                     f"autoencoder's {self.latent_pixels} * patch)", getattr(self, name)))
        if self.width % self.num_heads == 0 and sum(self.rope_axes) != self.width // self.num_heads:
            found.append(Problem(Code.RULE, "rope_axes", "must add up to a head's dimensions, width / "
                                 f"num_heads = {self.width // self.num_heads}", self.rope_axes))
        if any(n % 2 for n in self.rope_axes):
            found.append(Problem(Code.RULE, "rope_axes", "must be even numbers", self.rope_axes))
        return found
