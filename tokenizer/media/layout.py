"""Which ids the tokens of media get: marks, then sounds, then pictures, as in HyperCLOVA X 8B Omni."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from megatron_sov.errors import UserError
from megatron_sov.media.marks import DIGITS, MARKS, entry
from megatron_sov.media.vocabulary import AUDIO, IMAGE, Block

FILLER = "<|reserved_media_{}|>"
"""What stands on ids between blocks whose first ids were asked for."""


@dataclass(frozen=True)
class MediaTokens:
    """What was asked for."""

    audio_size: int
    """Codebook entries of sounds; 0: none."""
    image_size: int
    """Codebook entries of pictures; 0: none."""
    audio_first: int | None = None
    """Id of the first one; None: behind all others."""
    image_first: int | None = None
    """Likewise."""

    def problems(self) -> list[str]:
        """Return one sentence for each value that breaks a rule."""
        p = [f"--{kind}-tokens {size}: must lie in 0..{10 ** DIGITS[kind]}"
             for kind, size in ((AUDIO, self.audio_size), (IMAGE, self.image_size))
             if not 0 <= size <= 10 ** DIGITS[kind]]
        p += [f"--{kind}-first {first}: needs --{kind}-tokens"
              for kind, first, size in ((AUDIO, self.audio_first, self.audio_size),
                                        (IMAGE, self.image_first, self.image_size))
              if first is not None and not size]
        if not (self.audio_size or self.image_size):
            p.append("--audio-tokens 0, --image-tokens 0: one of them must be positive")
        return p


def laid_out(asked: MediaTokens, known: Collection[str], num_ids: int) -> tuple[list[str], list[Block]]:
    """Return the tokens to add behind `num_ids` ids, in order, and the blocks that they make: marks end where
    the first block begins.

    Args:
        asked: sizes and first ids.
        known: tokens that are there; marks among them stay where they are.
        num_ids: ids that are taken.

    Raises:
        UserError: there are codebook entries already, or an id that was asked for is taken.
    """
    if taken := next((entry(kind, 0) for kind in (AUDIO, IMAGE) if entry(kind, 0) in known), None):
        raise UserError(f"{taken} is a token already: this tokenizer has tokens of media; take the one "
                        "that it was made of")
    words = [mark for mark in MARKS if mark not in known]
    blocks: list[Block] = []
    num_fillers = 0
    for kind, size, first in ((AUDIO, asked.audio_size, asked.audio_first),
                              (IMAGE, asked.image_size, asked.image_first)):
        free = num_ids + len(words)
        if not size:
            continue
        if first is not None and not free <= first <= free + (1 << 20):
            raise UserError(f"--{kind}-first {first}: the ids up to {free - 1} are taken, and no more than "
                            f"{1 << 20} may be left free; take {free} or a little more")
        gap = (first or free) - free
        fillers = [FILLER.format(num_fillers + i) for i in range(gap)]
        # marks stand right before the first block, where recipes look for placeholders
        words = [*words, *fillers] if blocks else [*fillers, *words]
        num_fillers += gap
        blocks.append(Block(kind, num_ids + len(words), size))
        words += [entry(kind, i) for i in range(size)]
    return words, blocks
