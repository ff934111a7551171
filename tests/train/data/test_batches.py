"""Batches of ranks: together they contain the samples of `SampleOrder`, however many steps are prefetched."""

import dataclasses
import json
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from megatron_sov import recipes
from megatron_sov.model.config import DataConfig, PhaseConfig, RunConfig, TrainConfig
from megatron_sov.train.data import streams
from megatron_sov.train.data.order import OrderState, SampleOrder
from megatron_sov.train.data.rows import BatchStream, RankBatch, build_row
from megatron_sov.train.data.sources import Source

STEPS = 12
MakeSource = Callable[..., Source]


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "WINDOW_DOCUMENTS", 9)


@pytest.fixture
def sources(make_source: MakeSource) -> list[Source]:
    return [make_source("web", [3, 17, 5, 9, 40, 2, 8, 11, 6, 21] * 2, 0.7),
            make_source("chat", [6, 12, 30, 4] * 4, 0.3, is_chat=True)]


def build_config(prefetch_steps: int = 2, skip_steps: tuple[tuple[int, int], ...] = (),
                 micro_batch_size: int = 2) -> RunConfig:
    phases = (PhaseConfig("short", seq_len=16), PhaseConfig("long", seq_len=24, global_batch_size=8))
    return dataclasses.replace(
        recipes.get("tiny-solar-open"),
        data=DataConfig(phases=phases, prefetch_steps=prefetch_steps, skip_steps=skip_steps),
        train=TrainConfig(steps=STEPS, global_batch_size=16, micro_batch_size=micro_batch_size,
                          ramp_from_batch_size=8, ramp_increment=8, ramp_steps=3))


def read_batches(config: RunConfig, sources: list[Source], rank: int = 0, size: int = 1,
                 state: dict[str, Any] | None = None, count: int = STEPS) -> list[RankBatch]:
    order = SampleOrder(config, sources,
                        OrderState.from_dict(json.loads(json.dumps(state))) if state else None)
    stream = BatchStream(config, order, rank, size, STEPS, ("score",))
    read = [stream.next() for _ in range(count)]
    stream.close()
    return read


def to_comparable(batch: RankBatch) -> Any:
    """Return the contents of a batch as values that `==` compares."""
    rows = []
    for row in batch.rows:
        fields = vars(row) | dict(row.columns) | {"columns": list(row.columns)}
        rows.append({name: value.tolist() if isinstance(value, np.ndarray) else value
                     for name, value in fields.items()})
    return batch.entry, rows, batch.order_state, batch.epochs


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_ranks_together_have_each_sample_once_in_order(sources: list[Source], size: int,
                                                       micro_batch_size: int) -> None:
    settings = build_config(micro_batch_size=micro_batch_size)
    per_rank = [read_batches(settings, sources, rank, size) for rank in range(size)]
    order = SampleOrder(settings, sources)
    for step in range(STEPS):
        entry, samples = order.next_batch()
        expected = [build_row(s, sources[s.source].open_split("train"), entry.seq_len).tokens
                    for s in samples]
        micro_batches = [row for round_ in zip(*(ranks[step].rows for ranks in per_rank), strict=True)
                         for row in round_]
        assert {len(row.tokens) for row in micro_batches} == {micro_batch_size * entry.seq_len}
        assert np.array_equal(np.concatenate([row.tokens for row in micro_batches]), np.concatenate(expected))
        assert all(ranks[step].order_state == order.state.to_dict() for ranks in per_rank)


@pytest.mark.parametrize("last_step", range(1, STEPS))
def test_a_checkpoint_after_any_step_resumes_at_any_size(sources: list[Source], last_step: int) -> None:
    """The saved position is after the returned batch, not after prefetched ones."""
    uninterrupted = read_batches(build_config(), sources, rank=1, size=2)
    state = read_batches(build_config(3), sources, count=last_step)[-1].order_state
    assert [to_comparable(b)
            for b in read_batches(build_config(), sources, 1, 2, state, STEPS - last_step)] == [
                to_comparable(b) for b in uninterrupted[last_step:]]


def test_skipped_steps_are_drawn_and_not_read(sources: list[Source]) -> None:
    """Other steps have the same samples as without skips."""
    with_skips = read_batches(build_config(skip_steps=((2, 3), (9, 9))), sources)
    without_skips = read_batches(build_config(), sources)
    skipped_steps = [step for step, batch in enumerate(with_skips, 1) if batch.entry.skip]
    assert skipped_steps == [2, 3, 9]
    for step, (batch, expected) in enumerate(zip(with_skips, without_skips, strict=True), 1):
        assert to_comparable(batch)[1] == ([] if step in skipped_steps else to_comparable(expected)[1])
        assert batch.order_state["cursors"] == expected.order_state["cursors"]


def test_an_error_of_the_prefetching_thread_is_raised_by_next(make_source: MakeSource) -> None:
    broken_source = make_source("web", [3, 17])
    broken_source.open_split("train").lengths[:] = 40  # type: ignore[index]  # longer than what the documents hold
    object.__setattr__(broken_source.train_documents, "tokens", lambda *_: 1 / 0)
    threads = threading.active_count()
    stream = BatchStream(build_config(), SampleOrder(build_config(), [broken_source]), 0, 1, STEPS)
    with pytest.raises(ZeroDivisionError):
        stream.next()
    stream.close()
    assert threading.active_count() == threads
