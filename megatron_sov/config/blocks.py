"""Blocks of ids: where the discrete tokens of a medium stand in a vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class IdBlock:
    """The ids of one codebook: token `i` of it is id `first + i`."""

    __pydantic_config__ = {"extra": "forbid"}
    first: int
    """Id of its token 0."""
    size: int
    """Tokens of the codebook."""

    @property
    def end(self) -> int:
        """The id behind its last one."""
        return self.first + self.size


def block_problems(vocab_size: int, **blocks: IdBlock | None) -> list[str]:
    """Return one sentence for each block that does not lie in the vocabulary, and for two that overlap.

    Args:
        vocab_size: ids of the model.
        blocks: field of `model` -> its block; None: it has none.
    """
    p, found = [], {name: block for name, block in blocks.items() if block is not None}
    for name, block in found.items():
        if block.first < 0 or block.size < 1 or block.end > vocab_size:
            p.append(f"model.{name} = {block.first} + {block.size} must lie within model.vocab_size = "
                     f"{vocab_size} and have at least one id")
    ordered = sorted(found.items(), key=lambda item: item[1].first)
    for (one, first), (other, second) in pairwise(ordered):
        if first.end > second.first:
            p.append(f"model.{one} reaches up to {first.end} and model.{other} begins at {second.first}; "
                     "blocks must not overlap")
    return p
