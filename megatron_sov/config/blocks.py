"""Blocks of ids: where the discrete tokens of a medium stand in a vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sov.settings import AtLeastOne, NotNegativeInt


@dataclass(frozen=True)
class IdBlock:
    """The ids of one codebook: token `i` of it is id `first + i`."""

    first: NotNegativeInt
    """Id of its token 0."""
    size: AtLeastOne
    """Tokens of the codebook."""

    @property
    def end(self) -> int:
        """The id behind its last one."""
        return self.first + self.size
