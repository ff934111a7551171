"""What a reference says of documents: of those to train on, by the weights and samples that it was made with."""

from __future__ import annotations

from pathlib import Path

from megatron_sov.data.columns import NeededColumn, refuse_without_columns
from megatron_sov.data.token_shards import Source, open_sources


def opened(pairs: Path) -> list[Source]:
    return open_sources({str(pairs): 1.0}, 10**6, ("preference",))


def test_pairs_that_are_held_out_stay_what_they_are(pairs: Path, tmp_path: Path) -> None:
    from megatron_sov.post.reference import COLUMN, Reference

    [source] = opened(pairs)
    [learned] = Reference(tmp_path, pairs, [source]).sources
    held, found = source.shard("heldout"), learned.shard("heldout")
    assert list(found.lengths) == list(held.lengths)
    assert [found.tokens(d, 0, n).tolist() for d, n in enumerate(found.lengths)] == [
        held.tokens(d, 0, n).tolist() for d, n in enumerate(held.lengths)]
    assert list(learned.shard("train").lengths) == list(source.shard("train").lengths)
    refuse_without_columns([learned], {COLUMN: NeededColumn("")})
