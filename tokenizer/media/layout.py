"""Which ids the tokens of media get: marks, then sounds, then pictures, as in HyperCLOVA X 8B Omni."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Le

from megatron_sov.errors import UserError
from megatron_sov.media.marks import DIGITS, MARKS, entry
from megatron_sov.media.vocabulary import AUDIO, IMAGE, Block
from megatron_sov.settings import Code, Flag, NotNegativeInt, Problem, only_with

FILLER = "<|reserved_media_{}|>"
"""What stands on ids between blocks whose first ids were asked for."""


@dataclass(frozen=True)
class MediaTokens:
    """Tokens of media."""

    audio_tokens: Annotated[NotNegativeInt, Le(10 ** DIGITS[AUDIO])] = 0
    """Entries of the codebook of sounds (HyperCLOVA X 8B Omni: 6561; default: none)."""
    image_tokens: Annotated[NotNegativeInt, Le(10 ** DIGITS[IMAGE])] = 0
    """Entries of the codebook of pictures (HyperCLOVA X 8B Omni: 65536; default: none)."""
    audio_first: Annotated[int | None, Flag(value="ID"), only_with("audio_tokens")] = None
    """Id of the first sound; ids left free before it become reserved tokens (default: the next id)."""
    image_first: Annotated[int | None, Flag(value="ID"), only_with("image_tokens")] = None
    """Id of the first picture, likewise."""

    def problems(self) -> list[Problem]:
        """Return what does not fit together."""
        return [] if self.audio_tokens or self.image_tokens else [
            Problem(Code.RULE, "audio_tokens", "adds nothing, and no --image-tokens do", 0)]


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
    for kind, size, first in ((AUDIO, asked.audio_tokens, asked.audio_first),
                              (IMAGE, asked.image_tokens, asked.image_first)):
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
