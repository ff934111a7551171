"""Batches of language modelling: the same global batch however many processes share it."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_sov import recipes
from megatron_sov.config import apply_settings
from megatron_sov.data.order import SampleOrder
from megatron_sov.data.shards import open_sources
from megatron_sov.mcore.cpu import open_door

open_door()
from megatron_sov.mcore.world import World  # noqa: E402
from megatron_sov.train.lm import DataBatches  # noqa: E402


def rows_of(packed_data: Any, dp_size: int, micro_batch_size: int) -> list[list[int]]:
    """Return the token rows of two global batches, put together from what each data-parallel rank gets."""
    config = apply_settings(recipes.get("tiny-solar-open"), [
        'data.phases=[{"name": "main", "seq_len": 32}]', "train.global_batch_size=8",
        f"train.micro_batch_size={micro_batch_size}"])
    sources = open_sources({str(packed_data.text): 1.0}, 368)
    places = [World(r, dp_size, r, dp_size, True, True) for r in range(dp_size)]
    ranks = [DataBatches(config, SampleOrder(config, sources), place) for place in places]
    rows = []
    for step in range(2):
        batches = [rank.batch(step) for rank in ranks]
        assert {(b.num_sequences, b.seq_len, b.phase) for b in batches} == {(8, 32, "main")}
        for of_one_round in zip(*(b.micro_batches for b in batches), strict=True):
            for m in of_one_round:
                rows += m.inputs.tokens.reshape(-1, 32).tolist()
    return rows


@pytest.mark.parametrize(("dp_size", "micro_batch_size"), [(1, 2), (2, 1), (2, 4), (4, 2), (8, 1)])
def test_every_split_sees_the_same_rows(packed_data: Any, dp_size: int, micro_batch_size: int) -> None:
    rows = rows_of(packed_data, dp_size, micro_batch_size)
    assert rows == rows_of(packed_data, 1, 1) and len(rows) == 16 and rows[0] != rows[8]
