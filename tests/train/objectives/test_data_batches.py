"""Batches of the sample order for objectives: the same global batch for any number of processes, and the
saved position."""

import json
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from megatron_sov import recipes
from megatron_sov.engine.parallel import collectives
from megatron_sov.engine.parallel.world import ParallelWorld
from megatron_sov.model.config import apply_settings
from megatron_sov.post.sft import SupervisedFineTuning
from megatron_sov.train.data.order import SampleOrder
from megatron_sov.train.data.rows import PackedRow
from megatron_sov.train.data.sources import open_sources
from megatron_sov.train.objectives import microbatch
from megatron_sov.train.objectives.data_batches import DataBatches
from megatron_sov.train.objectives.data_objective import LanguageModelling
from megatron_sov.train.objectives.microbatch import build_micro_batch, shift_labels
from megatron_sov.train.objectives.objective import GlobalBatch

PHASES = ('data.phases=[{"name": "main", "seq_len": 32}, {"name": "late", "seq_len": '
          '64, "global_batch_size": 16}]')


def test_checkpoint_position_follows_the_last_returned_batch(packed_data: Any) -> None:
    """Prefetched batches do not count; skipped steps do."""
    sources, world = open_sources({str(packed_data.text): 1.0}, 368), ParallelWorld(0, 1, 0, 1, True, True)
    settings = apply_settings(recipes.get("tiny-solar-open"), [
        PHASES, "train.global_batch_size=8", "train.steps=4", "data.skip_steps=[[2, 2]]",
        "data.prefetch_steps=2", "train.micro_batch_size=1"])
    order, threads = SampleOrder(settings, sources), set(threading.enumerate())
    batches = DataBatches(settings, sources, world)
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
        assert batches.epochs == order.count_epochs()
        resumed = DataBatches(settings, sources, world)
        resumed.next()  # `restore` must undo this step and drop prefetched batches
        resumed.restore(json.loads(json.dumps(batches.state())))
        assert resumed.state() == batches.state() and resumed.next_entry() == order.ledger.get_entry(step + 1)
        resumed.close()
    batches.close()
    assert set(threading.enumerate()) <= threads, "nothing prefetches after close"


# Rows on the device, and the targets of multi-token prediction.


def build_row(lengths: list[int]) -> PackedRow:
    """Return a row of documents with distinct labels; a document's last token has none."""
    num_tokens = sum(lengths)
    ends = np.cumsum(lengths) - 1
    labels = np.arange(100, 100 + num_tokens)
    weights = np.linspace(0.5, 1.5, num_tokens).astype(np.float32)
    labels[ends], weights[ends] = 0, 0
    return PackedRow(tokens=np.arange(num_tokens), labels=labels, weights=weights,
                     positions=np.concatenate([np.arange(k) for k in lengths]),
                     types=(np.arange(num_tokens) % 3).astype(np.uint8),
                     sources=np.zeros(num_tokens, np.int64), padding=np.zeros(num_tokens, bool),
                     bounds=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
                     columns={"score": np.linspace(-3, 3, num_tokens, dtype=np.float32),
                              "advantage": -np.arange(num_tokens, dtype=np.float32)})


@pytest.mark.parametrize("depth", [1, 2])
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_shifted_targets_stay_inside_their_document(depth: int, lengths: list[int]) -> None:
    row = build_row(lengths)
    shifted = shift_labels(build_micro_batch(row), depth)
    document = np.repeat(np.arange(len(lengths)), lengths)
    for t in range(len(row.tokens)):
        source = t + depth
        is_inside = source < len(row.tokens) and document[source] == document[t]
        for shifted_values, values in (
                (shifted.labels, row.labels), (shifted.weights, row.weights), (shifted.types, row.types),
                (shifted.columns["score"], row.columns["score"])):
            assert shifted_values[t] == (values[source] if is_inside else 0)


def test_a_row_arrives_as_it_was() -> None:
    row = build_row([3, 1, 4])
    batch = build_micro_batch(row)
    assert batch.inputs.cu_seqlens.tolist() == [0, 3, 4, 8] and batch.inputs.max_document_tokens == 4
    for name in ("tokens", "positions", "padding"):
        assert getattr(batch.inputs, name).tolist() == getattr(row, name).tolist()
    for name in ("labels", "weights", "types", "sources"):
        assert getattr(batch, name).tolist() == getattr(row, name).tolist()
    assert ({name: column.tolist() for name, column in batch.columns.items()}
            == {name: column.tolist() for name, column in row.columns.items()})


@pytest.mark.parametrize("objective_class", [LanguageModelling, SupervisedFineTuning])
def test_a_row_is_sent_in_one_piece_and_counted_where_it_was(objective_class: Any,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are meta tensors: reading their values fails here, where on a GPU it would synchronize."""
    monkeypatch.setattr(collectives, "all_reduce_dp", lambda values: values)
    objective = objective_class(SimpleNamespace(config=recipes.get("tiny-k-exaone"),
                                                batches=SimpleNamespace(num_sources=1)))
    rows = [build_row([3, 1, 4]), build_row([9])]
    expected = objective.prepare(GlobalBatch(tuple(map(build_micro_batch, rows)), 8, 2, "main"))

    transfers = []
    monkeypatch.setattr(microbatch, "get_local_device", lambda: torch.device("meta"))
    monkeypatch.setattr(microbatch, "to_device",
                        lambda values, device: transfers.append(values) or values.to(device))
    micro_batches = tuple(map(build_micro_batch, rows))
    assert len(transfers) == len(rows)
    assert micro_batches[0].labels.is_meta and micro_batches[0].inputs.tokens.is_meta
    assert micro_batches[0].inputs.host_bounds == [0, 3, 4, 8]
    for name in ("labels", "weights", "types", "sources"):
        on_device, on_host = getattr(micro_batches[0], name), getattr(micro_batches[0].host, name)
        assert (on_device.dtype, on_device.shape) == (on_host.dtype, on_host.shape)
    result = objective.prepare(GlobalBatch(micro_batches, 8, 2, "main"))
    assert (result.targets, result.num_tokens) == (expected.targets, expected.num_tokens)
