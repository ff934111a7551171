"""Where discrete tokens of pictures and sounds stand among the ids of a vocabulary.

A text's tokens come first; each kind of medium has a block of ids behind them, and token `i` of its codebook
is id `first + i`.
"""

from __future__ import annotations

from dataclasses import dataclass

AUDIO, IMAGE, VIDEO = "audio", "image", "video"
"""Kinds of media; a video has no discrete tokens."""


@dataclass(frozen=True)
class Block:
    """The ids of one codebook."""

    kind: str
    """`AUDIO` or `IMAGE`."""
    first: int
    """Id of its token 0."""
    size: int
    """Tokens of its codebook."""

    @property
    def end(self) -> int:
        """The id behind its last one."""
        return self.first + self.size
