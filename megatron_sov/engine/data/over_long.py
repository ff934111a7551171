"""Conversations (and pairs of them) that are longer than a sample, counted before a run begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_sov.base.errors import UserError
from megatron_sov.engine.data.ledger import LedgerEntry
from megatron_sov.engine.data.lengths import ChainedLengths, Lengths
from megatron_sov.engine.data.rounds import RoundDocuments
from megatron_sov.engine.data.token_shards import Source


@dataclass(frozen=True)
class OverLong:
    """What is too long of one source, at the shortest sample that it is read at."""

    source: str
    """Name."""
    seq_len: int
    """Tokens of that sample."""
    count: int
    """Units (a conversation, or a pair) that do not fit, of one pass over the source."""
    total: int
    """Units in all."""
    longest_tokens: int
    """Of the longest unit."""


def over_long(sources: Sequence[Source], entries: Sequence[LedgerEntry]) -> list[OverLong]:
    """Return what does not fit of each source whose documents stay whole; sources that fit are left out.

    Args:
        sources: what is read.
        entries: the ledger.
    """
    found = []
    for source in sources:
        # what a round holds is seen when it is opened
        stays_whole = source.is_chat and not isinstance(source.made, RoundDocuments)
        lengths = [e.seq_len for e in entries if stays_whole and e.weights.get(source.name)]
        if lengths:
            tokens = _unit_tokens(source.shard("train").lengths, source.group)
            too_long = int((tokens > min(lengths)).sum())
            if too_long:
                found.append(OverLong(source.name, min(lengths), too_long, len(tokens), int(tokens.max())))
    return found


def refuse(found: Sequence[OverLong]) -> None:
    """Refuse data of which something does not fit, for `data.over_long=refuse`.

    Raises:
        UserError: there is such data.
    """
    if found:
        told = "; ".join(f"source {f.source!r}: {f.count:,} of {f.total:,} are longer than a sample of "
                         f"{f.seq_len} tokens, the longest has {f.longest_tokens}" for f in found)
        raise UserError(f"data.over_long = refuse, and {told}; make samples longer "
                        f"(seq_len={max(f.longest_tokens for f in found)}), or set data.over_long to drop or "
                        "cut")


def refuse_halves(found: Sequence[OverLong]) -> None:
    """Refuse pairs of which not one fits: cut to half a sample each, most would be the same text twice, and
    a run would learn nothing without a word.

    Args:
        found: what is too long of sources of pairs.

    Raises:
        UserError: there are such pairs.
    """
    for f in found:
        if f.count == f.total:
            raise UserError(f"source {f.source!r}: each of its {f.total:,} pairs is longer than a sample of "
                            f"{f.seq_len} tokens, and cut they may not differ any more; make samples longer "
                            f"(seq_len={f.longest_tokens} fits all)")


def _unit_tokens(lengths: Lengths, group: int) -> np.ndarray:
    """Return [units] int64: the tokens of each; a unit never lies in two shards."""
    parts = lengths.parts if isinstance(lengths, ChainedLengths) else [np.asarray(lengths)]
    return np.concatenate([np.zeros(0, np.int64), *(
        part[:len(part) // group * group].reshape(-1, group).sum(axis=1, dtype=np.int64) for part in parts)])
