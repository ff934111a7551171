"""What all codecs do, whoever made them.

Each is opened from a local folder; nothing is downloaded.  All are deterministic on one device, given a
generator where they draw.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch


class ImageTokenizer(Protocol):
    """Pictures as a fixed number of ids."""

    side_pixels: int
    """Height and width of what it reads."""
    grid: int
    """Tokens of a row and of a column: a picture has grid * grid of them, row by row."""
    codebook_size: int
    """Ids are below it."""
    width: int
    """Of its embeddings."""

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return [n, grid * grid] int64 ids of [n, 3, side, side] float32 pictures in 0..1."""
        ...

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return [n, grid * grid, width] float32 embeddings of ids, which a decoder begins with."""
        ...


class AudioTokenizer(Protocol):
    """Speech as ids at a fixed rate."""

    sample_rate_hz: int
    """Of what it hears: one channel, float32 in -1..1."""
    samples_per_token: int
    """A sound of s samples has ceil(s / samples_per_token) tokens."""
    codebook_size: int
    """Ids are below it."""
    max_piece_s: float
    """A longer sound is cut into pieces of this length."""

    def encode(self, sound: torch.Tensor) -> torch.Tensor:
        """Return [t] int64 ids of [s] samples; the last token's silence is filled up."""
        ...

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return [t, width] float32 embeddings of ids."""
        ...


class ImageDecoder(Protocol):
    """Pictures from the ids of one image tokenizer."""

    side_pixels: int
    """Height and width of what it draws."""

    def decode(self, ids: torch.Tensor, *, steps: int, seed: int) -> torch.Tensor:
        """Return [n, 3, side, side] float32 pictures in 0..1 of [n, tokens] ids; a function of the seed."""
        ...


class Vocoder(Protocol):
    """Speech from the ids of one audio tokenizer."""

    sample_rate_hz: int
    """Of what it says."""
    speakers: tuple[str, ...]
    """Names of the voices that it was trained with."""

    def decode(self, ids: torch.Tensor, speaker: str) -> torch.Tensor:
        """Return [samples] float32 in -1..1 of [t] ids."""
        ...

    def stream(self, ids: Iterable[torch.Tensor], speaker: str) -> Iterator[torch.Tensor]:
        """Yield one sound for each piece of ids that has some, as soon as it is there (perhaps no sample
        yet), and what is left at the end; together they are what `decode` returns."""
        ...
