"""Where discrete tokens of pictures and sounds stand among the ids of a vocabulary.

A text's tokens come first; each kind of medium has a block of ids behind them, and token `i` of its codebook
is id `first + i`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron_sov.base.errors import UserError

MEDIA = "media"
"""Field of a tokenizer's manifest: kind -> first id and size of its block."""
AUDIO, IMAGE, VIDEO = "audio", "image", "video"
"""Kinds of media; a video has no discrete tokens."""


@dataclass(frozen=True)
class VocabularyBlock:
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


def described(blocks: Iterable[VocabularyBlock]) -> dict[str, dict[str, int]]:
    """Return what a tokenizer's manifest says of its blocks."""
    return {block.kind: {"first": block.first, "size": block.size} for block in blocks}


def read_blocks(record: Any, where: str) -> dict[str, VocabularyBlock]:
    """Return kind -> block, as `described` wrote them; nothing where there is no record.

    Raises:
        UserError: it is no such record; `where` names it.
    """
    try:
        return {kind: VocabularyBlock(kind, int(record[kind]["first"]), int(record[kind]["size"]))
                for kind in (AUDIO, IMAGE) if kind in (record or {})}
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f"{where}: {MEDIA} = {str(record)[:200]} cannot be read ({e}); make the tokenizer "
                        "again with `sov-tokenizer media`") from None
