"""A stream of tensors that must be a whole model: each once, of its shape, none missing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

from megatron_sov.base.errors import UserError
from megatron_sov.engine.convert.sources import check_exact

WHERE = "the weights to take in"


class Shaped(Protocol):
    """A tensor, or what is sent of one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        ...


_Tensor = TypeVar("_Tensor", bound=Shaped)


def checked(weights: Iterable[tuple[str, _Tensor]], shapes: Mapping[str, tuple[int, ...]],
            ignored: Sequence[str] = ()) -> Iterator[tuple[str, _Tensor]]:
    """Yield the tensors that a model has, in the order in which they come.

    Args:
        weights: names and tensors, or what is sent of them.
        shapes: the model's.
        ignored: regular expressions for names that it may be given and does without.

    Raises:
        UserError: at a tensor that is unknown, of another shape or comes twice; after the last one where
            some are missing.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, tensor in weights:
        if name not in shapes and any(re.search(pattern, name) for pattern in ignored):
            continue
        if name in found:
            raise UserError(f"{WHERE}: {name} comes twice; give each tensor once")
        found[name] = tuple(tensor.shape)
        if shapes.get(name) != found[name]:
            check_exact(WHERE, {name: found[name]}, {n: s for n, s in shapes.items() if n == name},
                        "take a model of the same family and sizes")
        yield name, tensor
    check_exact(WHERE, found, dict(shapes), "give every tensor of the model")
