"""Log-probabilities of packed documents by a model that all processes run together, or by transformers."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from megatron_sov.base.artifacts import create_file, translate_disk_errors
from megatron_sov.base.documents.shard_files import RouteShape
from megatron_sov.base.sealed import seal_file
from megatron_sov.checkpoint import load
from megatron_sov.engine.decode.forward_only import ForwardModel
from megatron_sov.engine.model.local_shards import list_local_shards
from megatron_sov.engine.parallel import collectives
from megatron_sov.engine.parallel.world import ParallelWorld, run_on_each_rank, run_on_main
from megatron_sov.eval.heldout_loss import compute_row_losses
from megatron_sov.model.families.adapters import PREFIX
from megatron_sov.train.data.order import OrderedSample
from megatron_sov.train.data.rows import build_row, compute_micro_batch_rows, join_rows
from megatron_sov.train.data.streams import PackedSegment, Row, pack_best_fit
from megatron_sov.train.data.token_shards import Documents
from megatron_sov.train.feed import FeedView
from megatron_sov.train.objectives.microbatch import build_micro_batch

MICRO_BATCHES = 8
"""Micro-batches per process and model call."""


class RunningLogprobs(Protocol):
    """A model that all processes run together: `LoadedModel`, `GateView` or `FeedView`."""

    @property
    def policy(self) -> ForwardModel:
        ...

    @property
    def world(self) -> ParallelWorld:
        ...


def score_documents(model: RunningLogprobs, documents: Documents, chosen: range, seq_len: int,
                    rows_per_batch: int) -> np.ndarray:
    """Return log p(token | previous tokens), [document tokens] float32, on every process; 0 for the
    first token in a document and for tokens beyond `seq_len`.

    Args:
        model: the model; all processes call `score_documents` together.
        documents: documents of a split.
        chosen: indices of the scored documents.
        seq_len: tokens of a row, the longest sample.
        rows_per_batch: maximum rows per micro-batch.
    """
    numbers = np.zeros(_compute_starts(documents, chosen)[-1], np.float32)

    def score_rows(rows: list[Row]) -> Iterator[np.ndarray]:
        filled, size = _pad_rows(model.world, rows, rows_per_batch)
        values = torch.zeros(len(filled) // size, size * seq_len, dtype=torch.float64)
        # Processes leave zeros for the micro-batches of other processes, and the sum joins the values.
        local = _compute_local_logprobs(model, documents, filled, size, seq_len=seq_len)
        if local:
            values[model.world.dp_rank::model.world.dp_size] = torch.stack(local).double().cpu()
        summed = collectives.broadcast_from_last_stage(collectives.all_reduce_dp(values))
        yield from summed.float().numpy().reshape(len(filled), seq_len)

    _score_packed_rows(documents, chosen, seq_len, rows_per_batch * model.world.dp_size * MICRO_BATCHES,
                       score_rows=score_rows, write=partial(_store_numbers, numbers))
    return numbers


def write_logprobs(model: RunningLogprobs, documents: Documents, file: Path, identity: str, *, seq_len: int,
                   rows_per_batch: int, num_skipped: int = 0, temperature: float = 1.0,
                   routes: RouteShape | None = None) -> None:
    """Write log p(label) for documents to a sealed float32 file, a number per token. Processes write local
    rows in place, and no process holds the whole column.

    Args:
        model: the model; all processes call `write_logprobs` together.
        documents: documents of a split.
        file: the file.
        identity: text that the checksum covers.
        seq_len: tokens of a row, the longest sample.
        rows_per_batch: maximum rows per micro-batch.
        num_skipped: number of first documents that get NaN.
        temperature: divisor of logits before the softmax.
        routes: shape of the expert routes of documents, which are replayed; None: no replay.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    world = model.world
    chosen = range(num_skipped, len(documents.lengths))
    first_number = int(_compute_starts(documents, range(num_skipped))[-1])
    is_writer = world.last_stage and collectives.is_first_of_row()
    problems: list[OSError] = []  # raised after all rows: other processes are in a collective

    def score_rows(rows: list[Row]) -> Iterator[np.ndarray | None]:
        filled, size = _pad_rows(world, rows, rows_per_batch)
        local = iter(_compute_local_logprobs(model, documents, filled, size, seq_len=seq_len,
                                             temperature=temperature, routes=routes))
        for i in range(len(filled) // size):
            if is_writer and i % world.dp_size == world.dp_rank:
                yield from next(local).float().cpu().numpy().reshape(size, seq_len)
            else:
                yield from [None] * size

    def write_numbers(opened: int, first: int, numbers: np.ndarray) -> None:
        try:
            # pwrite instead of a memory map: two machines would overwrite pages of one another.
            os.pwrite(opened, np.ascontiguousarray(numbers, "<f4").data, 4 * (first_number + first))
        except OSError as e:
            problems.append(e)

    def finish_file(opened: int, rank: int, size: int) -> None:
        with translate_disk_errors(file):
            if problems:
                raise problems[0]
            os.fsync(opened)

    with contextlib.ExitStack() as building:
        temporary = run_on_main(world, partial(_create_file, building, file, first_number,
                                               int(_compute_starts(documents, chosen)[-1])))
        opened = os.open(temporary, os.O_WRONLY)
        try:
            _score_packed_rows(documents, chosen, seq_len, rows_per_batch * world.dp_size * MICRO_BATCHES,
                               score_rows=score_rows, write=partial(write_numbers, opened))
            run_on_each_rank(partial(finish_file, opened))
        finally:
            os.close(opened)
        run_on_main(world, partial(_seal_numbers, building, temporary, identity))


def _create_file(building: contextlib.ExitStack, file: Path, num_nan: int, num_zeros: int) -> Path:
    """Create a temporary file with `num_nan` NaN and `num_zeros` zeros, which `building` renames to `file` on
    exit; return the temporary path."""
    temporary, block = building.enter_context(create_file(file)), np.full(1 << 20, np.nan, "<f4")
    with translate_disk_errors(file), open(temporary, "wb") as f:
        for first in range(0, num_nan, len(block)):
            f.write(block[:num_nan - first].data)
        f.truncate(4 * (num_nan + num_zeros))
    return temporary


def _seal_numbers(building: contextlib.ExitStack, temporary: Path, identity: str) -> None:
    seal_file(temporary, identity)
    building.close()


def score_documents_by_hf(model: Any, documents: Documents, chosen: range, seq_len: int) -> np.ndarray:
    """Compute the log-probabilities of `score_documents` by a transformers model."""
    numbers = np.zeros(_compute_starts(documents, chosen)[-1], np.float32)

    def score_rows(rows: list[Row]) -> Iterator[np.ndarray]:
        for row in rows:
            yield -compute_row_losses(model, build_row(OrderedSample(0, row), documents, seq_len))

    _score_packed_rows(documents, chosen, seq_len, 1, score_rows=score_rows,
                       write=partial(_store_numbers, numbers))
    return numbers


def _store_numbers(numbers: np.ndarray, first: int, values: np.ndarray) -> None:
    numbers[first:first + len(values)] = values


def _compute_starts(documents: Documents, chosen: range) -> np.ndarray:
    """Return the offsets for the joined `chosen` documents, [documents + 1] int64."""
    lengths = np.asarray(documents.lengths[np.asarray(chosen, np.int64)])
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _score_packed_rows(documents: Documents, chosen: range, seq_len: int, rows_per_call: int, *,
                       score_rows: Callable[[list[Row]], Iterable[np.ndarray | None]],
                       write: Callable[[int, np.ndarray], None]) -> None:
    """Pack documents into rows, score the rows, and pass (offset, numbers) per document to `write`."""
    starts = _compute_starts(documents, chosen)
    lengths = np.diff(starts)
    # Documents with a single token have no label.
    rows = pack_best_fit([PackedSegment(document, 0, min(length, seq_len))
                          for document, length in zip(chosen, lengths.tolist(), strict=True) if length > 1],
                         seq_len)
    for begin in range(0, len(rows), rows_per_call):
        batch = rows[begin:begin + rows_per_call]
        for row, scores in zip(batch, score_rows(batch), strict=False):
            if scores is None:
                continue  # a row on another process
            offset = 0
            for document, start, count in row:
                index = document - chosen.start
                # A document that continues after the row has one more label: the first token outside.
                labels = min(count, int(lengths[index]) - start - 1)
                # log p of a label is stored at the token of the label, one position later.
                write(int(starts[index]) + start + 1, scores[offset:offset + labels])
                offset += count


def _pad_rows(world: ParallelWorld, rows: list[Row], rows_per_batch: int) -> tuple[list[Row], int]:
    """Append empty rows until processes, which may share experts, have equally many micro-batches; return the
    rows, and the rows per micro-batch."""
    size = compute_micro_batch_rows(len(rows), rows_per_batch, world.dp_size)
    return [*rows, *[()] * (-len(rows) % (size * world.dp_size))], size


def _compute_local_logprobs(model: RunningLogprobs, documents: Documents, rows: list[Row], size: int, *,
                            seq_len: int, temperature: float = 1.0, routes: RouteShape | None = None
                            ) -> list[torch.Tensor]:
    """Return log p(label) for every dp_size-th micro-batch from dp_rank on; [] except on the last stage."""
    local_batches = []
    for first in range(model.world.dp_rank * size, len(rows), model.world.dp_size * size):
        filled = [build_row(OrderedSample(0, row), documents, seq_len, routes=routes)
                  for row in rows[first:first + size]]
        local_batches.append(build_micro_batch(join_rows(filled)))
    return model.policy.map(
        local_batches, lambda hidden, head, batch: head.logprobs(hidden[0], batch.labels, temperature))


@torch.no_grad()
def run_with_weights(start: Path, view: FeedView, compute: Callable[[], None]) -> None:
    """Call `compute` while the model has a checkpoint's weights; called by all processes between two steps.

    A second model would double the memory; `run_with_weights` holds only a copy of the weights meanwhile.

    Args:
        start: the checkpoint.
        view: the run, whose weights are restored afterwards.
        compute: runs forward passes of the model.
    """
    model = view.policy.model
    # The copy must hold the newest weights, and no pending gather may overwrite the loaded weights.
    model.finish_param_gather()
    blocks = list(list_local_shards(model))
    saved, base = [block.data.clone() for block in blocks], model.adapter_base
    try:
        for block in blocks:
            if block.key.startswith(PREFIX):
                block.data.zero_()  # an adapter outside the checkpoint must not change the model
        load.load_model(start, model)
        compute()
    finally:
        for block, data in zip(blocks, saved, strict=True):
            # After a failure too, because the optimizer state belongs to the saved weights.
            block.data.copy_(data)
        model.requantize_weights()
        model.adapter_base = base
