"""The order's batches as objectives get them: the same global batch however many processes share it,
and the state behind it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_sov import recipes
from megatron_sov.config import RunConfig, apply_settings
from megatron_sov.data import order
from megatron_sov.data.ledger import plan
from megatron_sov.data.order import SampleOrder
from megatron_sov.data.token_shards import open_sources
from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron

prepare_megatron()
from megatron_sov.mcore.parallel.world import World  # noqa: E402
from megatron_sov.train.data_batches import DataBatches  # noqa: E402

PHASES = ('data.phases=[{"name": "main", "seq_len": 32}, {"name": "late", "seq_len": '
          '64, "global_batch_size": 16}]')


def config(*settings: str) -> RunConfig:
    return apply_settings(recipes.get("tiny-solar-open"),
                          [PHASES, "train.global_batch_size=8", "train.steps=4", *settings])


def rows_of(packed_data: Any, dp_size: int, micro_batch_size: int) -> list[list[int]]:
    """Return the token rows of all global batches, put together from what each data-parallel rank gets."""
    settings = config(f"train.micro_batch_size={micro_batch_size}")
    sources = open_sources({str(packed_data.text): 1.0}, 368)
    ranks = [DataBatches(settings, sources, World(r, dp_size, r, dp_size, True, True))
             for r in range(dp_size)]
    rows = []
    for size, seq_len, phase in [(8, 32, "main")] * 2 + [(16, 64, "late")] * 2:
        batches = [rank.next() for rank in ranks]
        assert {(b.num_sequences, b.seq_len, b.phase) for b in batches} == {(size, seq_len, phase)}
        for of_one_round in zip(*(b.micro_batches for b in batches), strict=True):
            for m in of_one_round:
                rows += m.inputs.tokens.reshape(-1, seq_len).tolist()
    for rank in ranks:
        rank.close()
    return rows


@pytest.mark.parametrize(("dp_size", "micro_batch_size"), [(1, 2), (2, 1), (2, 4), (4, 2), (8, 1)])
def test_every_split_sees_the_same_rows(packed_data: Any, dp_size: int, micro_batch_size: int) -> None:
    rows = rows_of(packed_data, dp_size, micro_batch_size)
    assert rows == rows_of(packed_data, 1, 1) and len(rows) == 2 * 8 + 2 * 16 and rows[0] != rows[8]


def test_what_a_checkpoint_holds_is_behind_the_last_batch_that_was_given(packed_data: Any) -> None:
    """Two batches more are ready by then; skipped steps count as given."""
    sources, place = open_sources({str(packed_data.text): 1.0}, 368), World(0, 1, 0, 1, True, True)
    settings = config("data.skip_steps=[[2, 2]]", "data.prefetch_steps=2", "train.micro_batch_size=1")
    order = SampleOrder(settings, sources)
    batches = DataBatches(settings, sources, place)
    assert batches.state() == order.state.to_dict()
    for step in range(4):
        order.next_batch()
        assert batches.next_entry().skip == (step == 1)
        if step == 1:
            batches.skip()
        else:
            batches.next()
        assert batches.state() == order.state.to_dict()
        assert batches.consumed_tokens() == {name: cursor.tokens
                                             for name, cursor in order.state.cursors.items()}
        assert batches.epochs == order.epochs()
        resumed = DataBatches(settings, sources, place)
        resumed.next()  # which counts for nothing, nor does what it prepared ahead
        resumed.restore(json.loads(json.dumps(batches.state())))
        assert resumed.state() == batches.state() and resumed.next_entry() == order.ledger.at(step + 1)
        resumed.close()
    batches.close()


def test_a_plan_that_was_made_is_not_made_again(packed_data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sources, place = open_sources({str(packed_data.text): 1.0}, 368), World(0, 1, 0, 1, True, True)
    settings = config("train.micro_batch_size=1")
    planned = plan(settings, sources)
    alone = DataBatches(settings, sources, place)
    monkeypatch.setattr(order, "plan", None)
    batches = DataBatches(settings, sources, place, planned)
    assert batches.ledger.entries == alone.ledger.entries == planned
    batches.next()
    batches.restore(alone.state())
    assert batches.state() == alone.state()
    for one in (batches, alone):
        one.close()
