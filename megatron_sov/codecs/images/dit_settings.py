"""Sizes of the picture decoder (`dit.py`)."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sov.codecs.images.vae import VAESettings
from megatron_sov.codecs.sizes import outside

NUM_AXES = 3
"""Of a place in a picture, as Flux counts them: a stream's number (always 0 here), row, column."""


@dataclass(frozen=True)
class DiTSettings:
    """The defaults are those of the authors' serving code (OmniServe, decoder/vision/track_b/pipeline.py)."""

    side_pixels: int = 768
    """Height and width of a square picture; one of another shape has as many pixels."""
    size_multiple_pixels: int = 16
    """Heights and widths of other shapes are rounded down to a multiple of it."""
    grid: int = 27
    """Tokens of a row and of a column of the picture's tokenizer."""
    codebook_size: int = 65536
    """Tokens of the tokenizer."""
    token_width: int = 1536
    """Of the tokenizer's embeddings."""
    vae: VAESettings | None = VAESettings()
    """The autoencoder whose latents are denoised; None: pixels themselves are."""
    patch: int = 1
    """Latents (or pixels) of a side of one place in the sequence."""
    width: int = 1920
    """Of the hidden states."""
    num_heads: int = 24
    """Of attention."""
    num_layers: int = 35
    """Single-stream blocks."""
    mlp_ratio: float = 4.0
    """Width of a block's feed-forward part over `width`."""
    rope_axes: tuple[int, int, int] = (8, 36, 36)
    """Dimensions of a head that turn with each axis of a place."""
    rope_theta: int = 10_000
    """Base of the rotations."""
    shift: float = 1.0
    """Of the noise levels towards more noise (diffusers' scheduler); ours, no source gives it."""
    steps: int = 30
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

    def problems(self) -> list[str]:
        """Return one sentence for each setting that is not well."""
        found = outside(self, side_pixels=(1, 8192), size_multiple_pixels=(1, 8192), grid=(1, 256),
                        codebook_size=(1, 1 << 20), token_width=(1, 16_384), patch=(1, 256),
                        width=(1, 65_536), num_heads=(1, 1024), num_layers=(1, 1000), mlp_ratio=(0.1, 100),
                        rope_axes=(2, 65_536), rope_theta=(1, 1e9), shift=(1e-3, 1000), steps=(1, 10_000))
        found += [] if self.vae is None else [f"vae.{problem}" for problem in self.vae.problems()]
        if found:
            return found
        place = self.latent_pixels * self.patch
        for name in ("side_pixels", "size_multiple_pixels"):
            if getattr(self, name) % place:
                found.append(f"{name} = {getattr(self, name)} must be a multiple of a place's {place} pixels "
                             f"(the autoencoder's {self.latent_pixels} * patch)")
        if self.side_pixels % self.size_multiple_pixels:
            found.append(f"side_pixels = {self.side_pixels} must be a multiple of size_multiple_pixels = "
                         f"{self.size_multiple_pixels}")
        if self.width % self.num_heads:
            found.append(f"width = {self.width} must be a multiple of num_heads = {self.num_heads}")
        elif sum(self.rope_axes) != self.width // self.num_heads:
            found.append(f"rope_axes = {list(self.rope_axes)} must add up to a head's dimensions, "
                         f"width / num_heads = {self.width // self.num_heads}")
        if len(self.rope_axes) != NUM_AXES or any(n % 2 for n in self.rope_axes):
            found.append(f"rope_axes = {list(self.rope_axes)} must be {NUM_AXES} even numbers")
        return found
