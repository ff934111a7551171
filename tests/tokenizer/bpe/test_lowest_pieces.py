"""A sample of a group, gathered from its units before the group's size is known."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tokenizer.bpe.lowest_pieces import LowestPieces
from tokenizer.mixture import NUM_BUCKETS, Excerpt, Sizes, share_of

LIMIT_BYTES = 1000


def sizes_of(pieces: list[Excerpt]) -> Sizes:
    row = np.zeros(NUM_BUCKETS, np.int64)
    for piece in pieces:
        row[piece.bucket] += len(piece.raw)
    return Sizes(len(pieces), int(row.sum()), row)


@pytest.mark.parametrize("num_buckets", [3, 40, NUM_BUCKETS])
def test_units_keep_every_piece_that_a_sample_of_their_group_may_hold(num_buckets: int) -> None:
    drawn = random.Random(num_buckets)
    units = [[Excerpt(b"x" * drawn.randrange(1, 300), drawn.randrange(num_buckets)) for _ in range(200)]
             for _ in range(3)]
    together = LowestPieces(LIMIT_BYTES)
    for unit in units:
        kept = LowestPieces(LIMIT_BYTES)
        for piece in unit:
            kept.add(piece)
        for piece in kept.found():
            together.add(piece)
    pieces = [piece for unit in units for piece in unit]
    sizes = sizes_of(pieces)
    share = share_of(sizes, LIMIT_BYTES / sizes.num_bytes)
    wanted = [piece for piece in pieces if share.times(piece.bucket)]
    assert wanted and sorted(p.raw for p in together.found() if share.times(p.bucket)) == sorted(
        p.raw for p in wanted)


def test_no_more_than_a_bucket_above_the_limit_is_held() -> None:
    kept = LowestPieces(LIMIT_BYTES)
    for number in range(5000):
        kept.add(Excerpt(b"x" * 100, number * 7919 % NUM_BUCKETS))
    assert sum(len(piece.raw) for piece in kept.found()) == LIMIT_BYTES + 100
