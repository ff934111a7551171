"""Columns that an objective needs of its data, and the refusal of data without them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_sov.base.errors import UserError
from megatron_sov.engine.data.token_shards import Source


@dataclass(frozen=True)
class NeededColumn:
    """A column that an objective reads."""

    made_by: str
    """What to type to get data with it, for the refusal of data without."""
    formats: tuple[str, ...] = ()
    """Formats whose documents must have it (those of others that have none count as 0); (): of all."""


def refuse_without_columns(sources: Sequence[Source], needed: Mapping[str, NeededColumn]) -> None:
    """Refuse data without what its objective reads.

    Args:
        sources: what is read.
        needed: column -> what is asked of it.

    Raises:
        UserError: a source does not have a column.
    """
    for name, column in needed.items():
        for source in sources:
            held = source.columns if source.made is None else source.made.columns
            if name not in held and (not column.formats or source.format in column.formats):
                raise UserError(
                    f"{source.artifact or 'a source made on the fly'}: source {source.name!r} has no column "
                    f"{name!r} ({', '.join(held) or 'it has none'}), and the objective reads it; "
                    f"{column.made_by} makes it")
