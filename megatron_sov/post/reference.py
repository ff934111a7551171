"""Log-probabilities for packed documents by a reference model, computed once before the first training step.

The reference is the initial model, or another checkpoint that computes the numbers before the run starts; no
second model stays in memory. RUN/reference contains the log-probabilities in parts of `PART_DOCUMENTS`
documents: a killed job continues at the next part, and a resumed run reads the existing parts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch

from megatron_sov.base.artifacts import (
    create_file, format_json, manifest_sha256, translate_disk_errors, write_atomically)
from megatron_sov.base.documents.shard_files import RouteShape
from megatron_sov.base.errors import UserError, warn
from megatron_sov.base.sealed import find_seal_damage, seal_file, write_sealed
from megatron_sov.checkpoint import load
from megatron_sov.engine.decode.forward_only import ForwardModel
from megatron_sov.engine.model.local_shards import list_local_shards
from megatron_sov.engine.model.logprobs import Head
from megatron_sov.engine.parallel import collectives
from megatron_sov.engine.parallel.world import ParallelWorld, run_on_each_rank, run_on_main
from megatron_sov.eval.heldout_loss import compute_row_losses
from megatron_sov.infer.engines.load import run_forward_model
from megatron_sov.infer.engines.target import Target
from megatron_sov.model.config import RunConfig, layout_settings
from megatron_sov.model.families.adapters import PREFIX
from megatron_sov.model.modality import get_banks
from megatron_sov.runs.checkpoints import hash_checkpoint_files
from megatron_sov.runs.folder import REFERENCE
from megatron_sov.train.data.order import OrderedSample
from megatron_sov.train.data.rows import build_row, compute_micro_batch_rows, join_rows
from megatron_sov.train.data.sources import Source
from megatron_sov.train.data.streams import PackedSegment, Row, pack_best_fit
from megatron_sov.train.data.token_shards import Documents, DocumentView
from megatron_sov.train.feed import FeedView
from megatron_sov.train.guards.gate import GateView
from megatron_sov.train.objectives.microbatch import MicroBatch, build_micro_batch
from megatron_sov.work.progress.progress_bar import create_bar

MICRO_BATCHES = 8
"""Micro-batches per process and model call."""
IDENTITY = "reference.json"
"""File in RUN/reference with digests of the reference and the data, and the sample length."""
COLUMN = "reference_logprobs"
"""Column: log p(label) by the reference."""
PART_DOCUMENTS = 4096
"""Documents per part, a file."""


class RunningLogprobs(Protocol):
    """A model that all processes run together: `LoadedModel`, `GateView` or `FeedView`."""

    @property
    def policy(self) -> ForwardModel:
        ...

    @property
    def world(self) -> ParallelWorld:
        ...


class Reference:
    """Computes a run's column `COLUMN` before the first step."""

    def __init__(self, run: Path, start: Path, sources: Sequence[Source], max_tokens: int,
                 heldout: Mapping[str, range] = MappingProxyType({})) -> None:
        """Describe the sources, without computing log-probabilities.

        Args:
            run: folder of the run.
            start: checkpoint of the reference.
            sources: preferences.
            max_tokens: length of the longest sample; later tokens of a document get no log-probability.
            heldout: source -> indices of the first held-out documents, which the run measures.
        """
        self._folder, self._max_tokens = run / REFERENCE, max_tokens
        self._identity: dict[str, Any] = {
            "reference_sha256": hash_checkpoint_files(start), "max_tokens": max_tokens,
            "data_sha256": {s.name: manifest_sha256(s.artifact) for s in sources if s.artifact is not None}}
        self._parts = {s.name: ReferenceFiles(self._folder, s.name, s.open_split("train")) for s in sources}
        self.sources = tuple(dataclasses.replace(
            s, train_documents=ReferencedDocuments(self._parts[s.name])) for s in sources)
        """Sources with the column `COLUMN`; `score_heldout` computes the values."""
        self._heldout = {s.name: ReferenceFiles(self._folder, f"{s.name}.heldout", s.open_split("heldout"),
                                                len(heldout[s.name]))
                         for s in sources if heldout.get(s.name)}
        # Held-out documents are computed and checked like training documents.
        self._parts |= {f"{name}.heldout": parts for name, parts in self._heldout.items()}

    def heldout_logprobs(self, source: Source) -> np.ndarray | None:
        """Return log p for the tokens of a source's measured held-out documents, float32; None without
        held-out documents."""
        parts = self._heldout.get(source.name)
        return None if parts is None else parts.numbers()

    def score_heldout(self, view: GateView) -> None:
        """Compute missing parts by the trained model, whose weights must equal the reference; called by all
        processes. Raises `UserError`: RUN/reference belongs to another reference, or the disk is full."""
        begin_s = time.monotonic()
        parts, num_tokens = self._compute_missing(view, view.config.train.micro_batch_size)
        view.events.write("reference", parts=parts, tokens=num_tokens,
                          seconds=time.monotonic() - begin_s, **self._identity)

    def score_in_processes(self, checkpoint: Path, config: RunConfig, nproc: int | None) -> None:
        """Compute missing parts by `checkpoint`, on processes that end before the run begins.

        Args:
            checkpoint: the reference.
            config: settings of the run; the reference uses the same layout and precision.
            nproc: local processes.

        Raises:
            UserError: RUN/reference belongs to another reference, a document is too long for `checkpoint`, or
                the disk is full.
        """
        if self._read_identity() == self._identity and not self._find_missing():
            return
        target = Target(checkpoint, False)
        self._refuse_too_long(target)
        run_forward_model(target, layout_settings(config), nproc,
                          lambda loaded: self._compute_missing(loaded, config.train.micro_batch_size))

    def _refuse_too_long(self, target: Target) -> None:
        for name, parts in self._parts.items():
            lengths = parts.documents.lengths
            longest = min(int(np.asarray(lengths[np.arange(len(lengths))]).max(initial=0)), self._max_tokens)
            if longest > target.max_tokens:
                raise UserError(f"--reference {target.path}: reads at most {target.max_tokens} tokens, and "
                                f"source {name!r} has samples of {longest}; name another model, or make "
                                "samples shorter (data.phases)")

    def _find_missing(self) -> list[tuple[str, int]]:
        """Return (source, part) of missing and damaged parts, and warn about damaged parts."""
        missing: list[tuple[str, int]] = []
        for name, parts in self._parts.items():
            for part in range(len(parts)):
                if damage := parts.damage(part):
                    missing.append((name, part))
                    if parts.file(part).exists():
                        warn(f"{damage}; it is computed again")
        return missing

    def _compute_missing(self, model: RunningLogprobs, rows_per_batch: int) -> tuple[int, int]:
        """Compute and write the missing parts; return part and token counts."""
        # IDENTITY is written before the first part, because the checksum of a part covers IDENTITY.
        run_on_main(model.world, self._open_files)
        # Rank 0 decides: processes with different lists would wait in a collective forever.
        missing, num_tokens = run_on_main(model.world, self._find_missing), 0
        with create_bar("reference", len(missing), "part", model.world.is_main) as bar:
            for name, part in missing:
                parts = self._parts[name]
                numbers = score_documents(model, parts.documents, parts.find_range(part), self._max_tokens,
                                          rows_per_batch)
                run_on_main(model.world, partial(write_sealed, parts.file(part), numbers.tobytes(),
                                                 parts.identify(part)))
                num_tokens += len(numbers)
                bar.update(1)
        return len(missing), num_tokens

    def check_unchanged(self) -> None:
        """Check that a resumed run, whose weights differ from the reference by now, has every part. Raises
        `UserError`: the data changed, samples became longer, or a part is missing or damaged."""
        file, identity = self._folder / IDENTITY, self._read_identity()
        data, max_tokens = identity.get("data_sha256", {}), identity.get("max_tokens", 0)
        changed = [name for name, sha256 in self._identity["data_sha256"].items() if data.get(name) != sha256]
        if changed:
            raise UserError(f"{file}: holds no log-probabilities of source {changed[0]!r} as it is now; "
                            "resume with the earlier data, or start a new --run --from the last checkpoint")
        if max_tokens < self._identity["max_tokens"]:
            raise UserError(f"{file}: its log-probabilities reach to token {max_tokens} of a document, and "
                            f"samples have {self._identity['max_tokens']} (data.phases); resume with samples "
                            "of at most that length, or start a new --run --from the last checkpoint")
        for parts in self._parts.values():
            for part in range(len(parts)):
                if damage := parts.damage(part):
                    raise UserError(f"{damage}; the run no longer has the weights that computed it: "
                                    "start a new --run --from the last checkpoint")

    def _open_files(self) -> None:
        file = self._folder / IDENTITY
        if file.is_file():
            if self._read_identity() != self._identity:
                raise UserError(f"{file}: belongs to another reference, other data or other lengths of "
                                "samples; delete the folder, and its files are computed again")
            return
        with translate_disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, format_json(self._identity))

    def _read_identity(self) -> dict[str, Any]:
        file = self._folder / IDENTITY
        try:
            return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
        except (ValueError, TypeError) as e:
            raise UserError(f"{file}: is damaged ({e}); delete the folder") from None


class ReferenceFiles:
    """Log-probabilities for the documents in a split: float32 files with log p per token as a label, 0 for
    the first token in a document."""

    def __init__(self, folder: Path, name: str, documents: Documents,
                 num_documents: int | None = None) -> None:
        """Prepare, without reading a file.

        Args:
            folder: RUN/reference.
            name: name of source and split, the prefix of the files.
            documents: documents of the split.
            num_documents: number of scored documents, the first ones; None: all.
        """
        self._folder, self._name, self.documents = folder, name, documents
        self._num_documents = len(documents.lengths) if num_documents is None else num_documents
        self._open = lru_cache(maxsize=64)(self._open_part)
        self._verified: set[int] = set()

    def __reduce__(self) -> tuple[Any, ...]:  # another process maps the files again
        return ReferenceFiles, (self._folder, self._name, self.documents, self._num_documents)

    def __len__(self) -> int:
        return -(-self._num_documents // PART_DOCUMENTS)

    def file(self, part: int) -> Path:
        return self._folder / f"{self._name}.{part:06d}.f32"

    def find_range(self, part: int) -> range:
        return range(part * PART_DOCUMENTS, min((part + 1) * PART_DOCUMENTS, self._num_documents))

    def starts(self, part: int) -> np.ndarray:
        """Return document offsets in a part, [documents + 1] int64."""
        lengths = self.documents.lengths[np.asarray(self.find_range(part))]
        return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    def column(self, document: int, start: int, count: int) -> np.ndarray:
        """Return log p for `count` tokens in a document from `start`, float32. Raises `UserError`: the file
        is missing or damaged."""
        part, index = divmod(document, PART_DOCUMENTS)
        starts, numbers = self._open(part)
        logprobs: np.ndarray = numbers[starts[index] + start:starts[index] + start + count]
        return logprobs

    def numbers(self) -> np.ndarray:
        """Return log p for all documents' tokens, joined; errors as in `column`."""
        return np.concatenate([self._open(part)[1] for part in range(len(self))])

    def damage(self, part: int) -> str | None:
        """Return the problem if a part's file is missing or damaged, otherwise None."""
        return find_seal_damage(self.file(part), self.identify(part))

    def identify(self, part: int) -> str:
        """Return the text that a part's checksum covers: the content of `IDENTITY` and the file name."""
        file = self._folder / IDENTITY
        identity = file.read_text(encoding="utf-8") if file.is_file() else ""
        return f"{identity}{self.file(part).name}"

    def _open_part(self, part: int) -> tuple[np.ndarray, np.ndarray]:
        starts = self.starts(part)
        # Verified once per process, because the checksum reads the whole file.
        if part not in self._verified and (damage := self.damage(part)):
            raise UserError(f"{damage}; start the run again in another folder")
        self._verified.add(part)
        count = int(starts[-1])
        if not count:
            return starts, np.zeros(0, np.float32)
        return starts, np.memmap(self.file(part), np.float32, "r", shape=(count,))


class ReferencedDocuments(DocumentView):
    """Documents in a split, with the column `COLUMN`."""

    def __init__(self, parts: ReferenceFiles) -> None:
        self._documents, self._parts = parts.documents, parts
        self.lengths, self.is_plain = parts.documents.lengths, parts.documents.is_plain
        self.columns = (*parts.documents.columns, COLUMN)
        self.banks = get_banks(parts.documents)

    def __reduce__(self) -> tuple[Any, ...]:
        return ReferencedDocuments, (self._parts,)

    def locate(self, document: int) -> tuple[Documents, int, int]:
        return self._documents, document, 0

    def column(self, name: str, document: int, start: int, count: int) -> np.ndarray:
        if name == COLUMN:
            return self._parts.column(document, start, count)
        return super().column(name, document, start, count)


def score_documents(model: RunningLogprobs, documents: Documents, chosen: range, seq_len: int,
                    rows_per_batch: int, temperature: float = 1.0,
                    routes: RouteShape | None = None) -> np.ndarray:
    """Return log p(token | previous tokens), [document tokens] float32, on every process; 0 for the
    first token in a document and for tokens beyond `seq_len`.

    Args:
        model: the model; all processes call `score_documents` together.
        documents: documents of a split.
        chosen: indices of the scored documents.
        seq_len: tokens of a row, the longest sample.
        rows_per_batch: maximum rows per micro-batch.
        temperature: divisor of logits before the softmax.
        routes: shape of the expert routes of documents, which are replayed; None: no replay.
    """
    numbers = np.zeros(_compute_starts(documents, chosen)[-1], np.float32)

    def score_rows(rows: list[Row]) -> Iterator[np.ndarray]:
        filled, size = _pad_rows(model.world, rows, rows_per_batch)
        values = torch.zeros(len(filled) // size, size * seq_len, dtype=torch.float64)
        # Processes leave zeros for the micro-batches of other processes, and the sum joins the values.
        local = _compute_local_logprobs(model, documents, filled, size, seq_len=seq_len,
                                        temperature=temperature, routes=routes)
        if local:
            values[model.world.dp_rank::model.world.dp_size] = torch.stack(local).double().cpu()
        summed = collectives.broadcast_from_last_stage(collectives.all_reduce_dp(values))
        yield from summed.float().numpy().reshape(len(filled), seq_len)

    _place_numbers(documents, chosen, seq_len, rows_per_batch * model.world.dp_size * MICRO_BATCHES,
                   score_rows=score_rows, put=partial(_write_numbers, numbers))
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
    writes = world.last_stage and collectives.is_first_of_row()
    problems: list[OSError] = []  # raised after all rows: other processes are in a collective

    def score_rows(rows: list[Row]) -> Iterator[np.ndarray | None]:
        filled, size = _pad_rows(world, rows, rows_per_batch)
        local = iter(_compute_local_logprobs(model, documents, filled, size, seq_len=seq_len,
                                             temperature=temperature, routes=routes))
        for i in range(len(filled) // size):
            if writes and i % world.dp_size == world.dp_rank:
                yield from next(local).float().cpu().numpy().reshape(size, seq_len)
            else:
                yield from [None] * size

    def put(opened: int, first: int, numbers: np.ndarray) -> None:
        try:
            # pwrite instead of a memory map: two machines would overwrite pages of one another.
            os.pwrite(opened, np.ascontiguousarray(numbers, "<f4").data, 4 * (first_number + first))
        except OSError as e:
            problems.append(e)

    def end(opened: int, rank: int, size: int) -> None:
        with translate_disk_errors(file):
            for problem in problems[:1]:
                raise problem
            os.fsync(opened)

    with contextlib.ExitStack() as building:
        temporary = run_on_main(world, partial(_create_file, building, file, first_number,
                                               int(_compute_starts(documents, chosen)[-1])))
        opened = os.open(temporary, os.O_WRONLY)
        try:
            _place_numbers(documents, chosen, seq_len, rows_per_batch * world.dp_size * MICRO_BATCHES,
                           score_rows=score_rows, put=partial(put, opened))
            run_on_each_rank(partial(end, opened))
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

    _place_numbers(documents, chosen, seq_len, 1, score_rows=score_rows, put=partial(_write_numbers, numbers))
    return numbers


def _write_numbers(numbers: np.ndarray, first: int, values: np.ndarray) -> None:
    numbers[first:first + len(values)] = values


def _compute_starts(documents: Documents, chosen: range) -> np.ndarray:
    """Return the offsets for the joined `chosen` documents, [documents + 1] int64."""
    lengths = np.asarray(documents.lengths[np.asarray(chosen, np.int64)])
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _place_numbers(documents: Documents, chosen: range, seq_len: int, rows_per_call: int, *,
                   score_rows: Callable[[list[Row]], Iterable[np.ndarray | None]],
                   put: Callable[[int, np.ndarray], None]) -> None:
    """Pack documents into rows, score the rows, and pass (offset, numbers) per document to `put`."""
    starts = _compute_starts(documents, chosen)
    lengths = np.diff(starts)
    # Documents with a single token have no label.
    rows = pack_best_fit([PackedSegment(d, 0, min(n, seq_len))
                          for d, n in zip(chosen, lengths.tolist(), strict=True) if n > 1], seq_len)
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
                put(int(starts[index]) + start + 1, scores[offset:offset + labels])
                offset += count


def _pad_rows(world: ParallelWorld, rows: list[Row], rows_per_batch: int) -> tuple[list[Row], int]:
    """Append empty rows until processes, which may share experts, have equally many micro-batches; return the
    rows, and the rows per micro-batch."""
    size = compute_micro_batch_rows(len(rows), rows_per_batch, world.dp_size)
    return [*rows, *[()] * (-len(rows) % (size * world.dp_size))], size


def _compute_local_logprobs(model: RunningLogprobs, documents: Documents, rows: list[Row], size: int, *,
                            seq_len: int, temperature: float, routes: RouteShape | None
                            ) -> list[torch.Tensor]:
    """Return log p(label) for micro-batches dp_rank, dp_rank + dp_size, ... on the last pipeline stage, []
    on other stages."""
    local_batches = []
    for first in range(model.world.dp_rank * size, len(rows), model.world.dp_size * size):
        filled = [build_row(OrderedSample(0, row), documents, seq_len, routes=routes)
                  for row in rows[first:first + size]]
        local_batches.append(build_micro_batch(join_rows(filled)))
    return model.policy.map(local_batches, partial(_compute_logprobs, temperature))


def _compute_logprobs(temperature: float, hidden: list[torch.Tensor], head: Head, batch: MicroBatch
                      ) -> torch.Tensor:
    return head.logprobs(hidden[0], batch.labels, temperature)


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
