"""Log-probabilities of the tokens of whole documents at any layout; and those of a reference, computed once
by the forward pass of training, before its first step.

The reference is the model as it starts, or another one that is asked before: it is never a second model in
memory.  What it says of each document stays in RUN/reference in parts of `PART_DOCUMENTS` documents: a job
that is killed goes on at the next part, and one that is continued later finds all of them.
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

from megatron_sov.base.artifacts import atomic_write, disk_errors, manifest_sha256, new_file, to_json
from megatron_sov.base.documents.shard_files import RouteShape
from megatron_sov.base.errors import UserError, warn
from megatron_sov.base.sealed import seal_damage, seal_file, write_sealed
from megatron_sov.engine.decode.forward_only import ForwardModel
from megatron_sov.engine.model.logprobs import Head
from megatron_sov.engine.parallel import collectives
from megatron_sov.engine.parallel.world import ParallelWorld, on_each, on_main
from megatron_sov.eval.heldout import row_losses
from megatron_sov.infer.engines.load import run_forward_model
from megatron_sov.infer.engines.target import Target
from megatron_sov.model.config import RunConfig, layout_settings
from megatron_sov.model.modality import EncoderInputs, get_banks, get_encoder_inputs
from megatron_sov.runs.checkpoints import hash_checkpoint_files
from megatron_sov.runs.folder import REFERENCE
from megatron_sov.train.data.order import OrderedSample
from megatron_sov.train.data.rows import join_rows, rows_per_micro_batch, sample_row
from megatron_sov.train.data.streams import PackedSegment, Row, best_fit
from megatron_sov.train.data.token_shards import Documents, Source
from megatron_sov.train.objectives.microbatch import MicroBatch, from_row
from megatron_sov.train.stages.gate import GateView
from megatron_sov.work.progress.progress_bar import create_bar

MICRO_BATCHES = 8
"""Those of a process that are passed through the model at a time."""


class RunningLogprobs(Protocol):
    """A model that runs on all processes together."""

    @property
    def policy(self) -> ForwardModel:
        ...

    @property
    def world(self) -> ParallelWorld:
        ...


def document_logprobs(model: RunningLogprobs, documents: Documents, chosen: range, seq_len: int,
                      rows_per_batch: int, temperature: float = 1.0,
                      routes: RouteShape | None = None) -> np.ndarray:
    """Return [tokens of the documents] float32, document after document, on every process.

    Each is log p(token | those before it); 0 for first tokens and for what lies beyond the longest sample.

    Args:
        model: what is asked; called by all of its processes together.
        documents: those of a split.
        chosen: which of them.
        seq_len: tokens of a row, the longest sample.
        rows_per_batch: rows of a micro-batch at most.
        temperature: what logits are divided by before the softmax.
        routes: shape of the documents' routes, which are replayed; None: each token goes where it goes.
    """
    numbers = np.zeros(_starts(documents, chosen)[-1], np.float32)

    def of_rows(rows: list[Row]) -> Iterator[np.ndarray]:
        filled, size = _filled(model.world, rows, rows_per_batch)
        values = torch.zeros(len(filled) // size, size * seq_len, dtype=torch.float64)
        # Each process fills its own micro-batches and leaves zeros for the others, so the sum is everybody's.
        if found := _own_logprobs(model, documents, filled, size, seq_len, temperature, routes):
            values[model.world.dp_rank::model.world.dp_size] = torch.stack(found).double().cpu()
        summed = collectives.broadcast_from_last_stage(collectives.all_reduce_dp(values))
        yield from summed.float().numpy().reshape(len(filled), seq_len)

    _place_numbers(documents, chosen, seq_len, rows_per_batch * model.world.dp_size * MICRO_BATCHES, of_rows,
                   partial(_put, numbers))
    return numbers


def write_logprobs(model: RunningLogprobs, documents: Documents, passed: int, seq_len: int,
                   rows_per_batch: int, file: Path, of: str, temperature: float = 1.0,
                   routes: RouteShape | None = None) -> None:
    """Write what `document_logprobs` returns as a sealed file, NaN for each token of the first `passed`
    documents.  Each process writes the numbers of its own rows in place: nobody holds those of all.

    Args:
        model: what is asked; called by all of its processes together.
        documents: those of a split.
        passed: documents that are not asked.
        seq_len: tokens of a row, the longest sample.
        rows_per_batch: rows of a micro-batch at most.
        file: of float32, a number for each token.
        of: what its checksum is bound to.
        temperature: what logits are divided by before the softmax.
        routes: shape of the documents' routes, which are replayed; None: each token goes where it goes.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    world = model.world
    chosen = range(passed, len(documents.lengths))
    unasked = int(_starts(documents, range(passed))[-1])
    writes = world.last_stage and collectives.is_first_of_row()
    # an error waits until all are done: the others would wait in a collective for whoever ended before
    problems: list[OSError] = []

    def of_rows(rows: list[Row]) -> Iterator[np.ndarray | None]:
        filled, size = _filled(world, rows, rows_per_batch)
        found = iter(_own_logprobs(model, documents, filled, size, seq_len, temperature, routes))
        for i in range(len(filled) // size):
            own = writes and i % world.dp_size == world.dp_rank
            yield from next(found).float().cpu().numpy().reshape(size, seq_len) if own else [None] * size

    def put(opened: int, first: int, numbers: np.ndarray) -> None:
        try:
            # A message to the disk and no map of it: of a page that two machines write to, each would send
            # the whole.
            os.pwrite(opened, np.ascontiguousarray(numbers, "<f4").data, 4 * (unasked + first))
        except OSError as e:
            problems.append(e)

    def end(opened: int, rank: int, size: int) -> None:
        with disk_errors(file):
            for problem in problems[:1]:
                raise problem
            os.fsync(opened)

    with contextlib.ExitStack() as building:
        temporary = on_main(world, partial(_make_numbers, building, file, unasked,
                                           int(_starts(documents, chosen)[-1])))
        opened = os.open(temporary, os.O_WRONLY)
        try:
            _place_numbers(documents, chosen, seq_len, rows_per_batch * world.dp_size * MICRO_BATCHES,
                           of_rows, partial(put, opened))
            on_each(partial(end, opened))
        finally:
            os.close(opened)
        on_main(world, partial(_seal_numbers, building, temporary, of))


def _make_numbers(building: contextlib.ExitStack, file: Path, unasked: int, asked: int) -> Path:
    """Make a file of `unasked` NaN and as many zeros as are asked, which gets its name at the end of
    `building`; returns what it is called until then."""
    temporary, block = building.enter_context(new_file(file)), np.full(1 << 20, np.nan, "<f4")
    with disk_errors(file), open(temporary, "wb") as f:
        for first in range(0, unasked, len(block)):
            f.write(block[:unasked - first].data)
        f.truncate(4 * (unasked + asked))
    return temporary


def _seal_numbers(building: contextlib.ExitStack, temporary: Path, of: str) -> None:
    seal_file(temporary, of)
    building.close()


def document_logprobs_hf(model: Any, documents: Documents, chosen: range, seq_len: int) -> np.ndarray:
    """Return what `document_logprobs` gives, of transformers' model."""
    numbers = np.zeros(_starts(documents, chosen)[-1], np.float32)
    _place_numbers(documents, chosen, seq_len, 1, lambda rows: (
        -row_losses(model, sample_row(OrderedSample(0, row), documents, seq_len)) for row in rows),
        partial(_put, numbers))
    return numbers


def _put(numbers: np.ndarray, first: int, found: np.ndarray) -> None:
    numbers[first:first + len(found)] = found


def _starts(documents: Documents, chosen: range) -> np.ndarray:
    """Return [documents + 1] int64: where each of the chosen documents begins behind the first, and the
    end."""
    lengths = np.asarray(documents.lengths[np.asarray(chosen, np.int64)])
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _place_numbers(documents: Documents, chosen: range, seq_len: int, at_a_time: int,
                   of_rows: Callable[[list[Row]], Iterable[np.ndarray | None]],
                   put: Callable[[int, np.ndarray], None]) -> None:
    """Give the numbers of documents from those of the rows that they are put into.

    Args:
        documents: those of a split.
        chosen: which of them.
        seq_len: tokens of a row.
        at_a_time: rows that `of_rows` is asked for at most.
        of_rows: rows -> of at least as many [seq_len] log p(label) of each place, None of one that is
            another process's.
        put: is given numbers, and where they begin.
    """
    starts = _starts(documents, chosen)
    lengths = np.diff(starts)
    # A document of one token has no label.
    rows = best_fit([PackedSegment(d, 0, min(n, seq_len))
                     for d, n in zip(chosen, lengths.tolist(), strict=True) if n > 1], seq_len)
    for begin in range(0, len(rows), at_a_time):
        there = rows[begin:begin + at_a_time]
        for row, found in zip(there, of_rows(there), strict=False):
            at = 0
            for document, start, count in row if found is not None else ():
                place = document - chosen.start
                # a document that goes on behind the row has one label more: the token outside of it
                labels = min(count, int(lengths[place]) - start - 1)
                # A label's number is stored at the token that it is: one place on.
                assert found is not None, "a row of another process"
                put(int(starts[place]) + start + 1, found[at:at + labels])
                at += count


def _filled(world: ParallelWorld, rows: list[Row], rows_per_batch: int) -> tuple[list[Row], int]:
    """Return rows with empty ones behind them, and rows of a micro-batch: every process passes as many, since
    they may share experts."""
    size = rows_per_micro_batch(len(rows), rows_per_batch, world.dp_size)
    return [*rows, *[()] * (-len(rows) % (size * world.dp_size))], size


def _own_logprobs(model: RunningLogprobs, documents: Documents, rows: list[Row], size: int, seq_len: int,
                  temperature: float, routes: RouteShape | None) -> list[torch.Tensor]:
    """Return log p(label) of each place of this process's micro-batches, every `dp_size`-th one, on the last
    stage; elsewhere nothing."""
    groups = [rows[i:i + size] for i in range(0, len(rows), size)]
    own = [from_row(join_rows([sample_row(OrderedSample(0, row), documents, seq_len, routes=routes)
                               for row in group]))
           for group in groups[model.world.dp_rank::model.world.dp_size]]
    return model.policy.map(own, partial(_logprobs, temperature))


def _logprobs(temperature: float, hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> torch.Tensor:
    return head.logprobs(hidden[0], batch.labels, temperature)


IDENTITY = "reference.json"
COLUMN = "reference_logprobs"
"""Column of labels: log p(label) of the reference."""
PART_DOCUMENTS = 4096
"""Documents of a part."""


class ReferenceParts:
    """What the reference says of the documents of one split of a source: files of float32, document after
    document, a number for each token (that of the token as a label; 0 for the first)."""

    def __init__(self, folder: Path, name: str, documents: Documents,
                 num_documents: int | None = None) -> None:
        """Take what is there, or will be.

        Args:
            folder: RUN/reference.
            name: of source and split, and so of the files.
            documents: the split's documents.
            num_documents: first documents that have numbers; None: all.
        """
        self._folder, self._name, self.documents = folder, name, documents
        self._num_documents = len(documents.lengths) if num_documents is None else num_documents
        self._open = lru_cache(maxsize=64)(self._part)
        self._verified: set[int] = set()

    def __reduce__(self) -> tuple[Any, ...]:  # in another process its files are mapped again
        return ReferenceParts, (self._folder, self._name, self.documents, self._num_documents)

    def __len__(self) -> int:
        return -(-self._num_documents // PART_DOCUMENTS)

    def file(self, part: int) -> Path:
        return self._folder / f"{self._name}.{part:06d}.f32"

    def range_of(self, part: int) -> range:
        return range(part * PART_DOCUMENTS, min((part + 1) * PART_DOCUMENTS, self._num_documents))

    def starts(self, part: int) -> np.ndarray:
        """Return [documents + 1] int64: where each document of a part begins, and its end, in numbers."""
        lengths = self.documents.lengths[np.asarray(self.range_of(part))]
        return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    def column(self, document: int, start: int, count: int) -> np.ndarray:
        """Return the numbers of a document's tokens from `start`, float32.

        Raises:
            UserError: they are not there, or of another size.
        """
        part, place = divmod(document, PART_DOCUMENTS)
        starts, numbers = self._open(part)
        found: np.ndarray = numbers[starts[place] + start:starts[place] + start + count]
        return found

    def numbers(self) -> np.ndarray:
        """Return the numbers of all documents, one after another; errors as of `column`."""
        return np.concatenate([self._open(part)[1] for part in range(len(self))])

    def damage(self, part: int) -> str | None:
        """Return one sentence where a part's file is missing or is not what was written, else None."""
        return seal_damage(self.file(part), self.of(part))

    def of(self, part: int) -> str:
        """Return what the checksum of a part's file is bound to: the folder's reference, data and lengths."""
        file = self._folder / IDENTITY
        identity = file.read_text(encoding="utf-8") if file.is_file() else ""
        return f"{identity}{self.file(part).name}"

    def _part(self, part: int) -> tuple[np.ndarray, np.ndarray]:
        starts = self.starts(part)
        # Once in each process: the checksum reads the whole file.
        if part not in self._verified and (damage := self.damage(part)):
            raise UserError(f"{damage}; start the run anew in another folder")
        self._verified.add(part)
        count = int(starts[-1])
        return starts, (np.memmap(self.file(part), np.float32, "r", shape=(count,)) if count
                        else np.zeros(0, np.float32))


class WithReference:
    """Documents of a split with the reference's column beside their own."""

    def __init__(self, parts: ReferenceParts) -> None:
        self._documents, self._parts = parts.documents, parts
        self.lengths, self.is_plain = parts.documents.lengths, parts.documents.is_plain
        self.columns = (*parts.documents.columns, COLUMN)
        self.banks = get_banks(parts.documents)

    def __reduce__(self) -> tuple[Any, ...]:
        return WithReference, (self._parts,)

    def tokens(self, document: int, start: int, count: int) -> np.ndarray:
        return self._documents.tokens(document, start, count)

    def loss_weights(self, document: int, start: int, count: int) -> np.ndarray:
        return self._documents.loss_weights(document, start, count)

    def types(self, document: int, start: int, count: int) -> np.ndarray:
        return self._documents.types(document, start, count)

    def column(self, name: str, document: int, start: int, count: int) -> np.ndarray:
        if name == COLUMN:
            return self._parts.column(document, start, count)
        return self._documents.column(name, document, start, count)

    def routes(self, document: int, start: int, count: int) -> np.ndarray:
        return self._documents.routes(document, start, count)

    def encoder_inputs(self, document: int, start: int, count: int) -> EncoderInputs:
        return get_encoder_inputs(self._documents, document, start, count)


class Reference:
    """The reference's part of a run: the columns that its objective reads, made before the first step."""

    def __init__(self, run: Path, start: Path, sources: Sequence[Source], max_tokens: int,
                 heldout: Mapping[str, range] = MappingProxyType({})) -> None:
        """Take what the run learns from.

        Args:
            run: its folder.
            start: the reference, a checkpoint: that which it starts from, or another one.
            sources: preferences.
            max_tokens: of the longest sample; what lies behind them in a document has no number.
            heldout: source -> its first held-out documents, which the run is measured by.
        """
        self._folder, self._max_tokens = run / REFERENCE, max_tokens
        self._identity: dict[str, Any] = {
            "reference_sha256": hash_checkpoint_files(start), "max_tokens": max_tokens,
            "data_sha256": {s.name: manifest_sha256(s.artifact) for s in sources if s.artifact is not None}}
        self._parts = {s.name: ReferenceParts(self._folder, s.name, s.shard("train")) for s in sources}
        self.sources = tuple(dataclasses.replace(
            s, made=WithReference(self._parts[s.name])) for s in sources)
        """The same with the column; its numbers are there once `make` has run."""
        self._heldout = {s.name: ReferenceParts(self._folder, f"{s.name}.heldout", s.shard("heldout"),
                                                len(heldout[s.name]))
                         for s in sources if heldout.get(s.name)}
        # Their numbers are made, found again and refused as those of the samples are.
        self._parts |= {f"{name}.heldout": parts for name, parts in self._heldout.items()}

    def heldout_logprobs(self, source: Source) -> np.ndarray | None:
        """Return the reference's log-probabilities of a source's measured held-out documents, float32; None:
        none are measured.

        Raises:
            UserError: their file is missing or damaged.
        """
        parts = self._heldout.get(source.name)
        return None if parts is None else parts.numbers()

    def make(self, view: GateView) -> None:
        """Compute what is not there yet; called by all processes together, with the reference's weights in
        the model.

        Raises:
            UserError: the folder holds another reference, or the disk is full.
        """
        begin_s = time.monotonic()
        parts, num_tokens = self._fill(view, view.config.train.micro_batch_size)
        view.events.write("reference", parts=parts, tokens=num_tokens,
                          seconds=time.monotonic() - begin_s, **self._identity)

    def make_apart(self, checkpoint: Path, config: RunConfig, nproc: int | None) -> None:
        """Compute what is not there yet by a model that is not the one that will be trained, on processes
        that end before the run begins.

        Args:
            checkpoint: the reference.
            config: of the run, whose layout and precision are the reference's.
            nproc: local processes.

        Raises:
            UserError: the folder holds another reference, a document is too long for it, or the disk is full.
        """
        # Before any process starts and loads a model.
        if self._read_identity() == self._identity and not self._missing():
            return
        target = Target(checkpoint, False)
        self._refuse_too_long(target)
        run_forward_model(target, layout_settings(config), nproc,
                          lambda loaded: self._fill(loaded, config.train.micro_batch_size))

    def _refuse_too_long(self, target: Target) -> None:
        for name, parts in self._parts.items():
            lengths = parts.documents.lengths
            longest = min(int(np.asarray(lengths[np.arange(len(lengths))]).max(initial=0)), self._max_tokens)
            if longest > target.max_tokens:
                raise UserError(f"--reference {target.path}: reads {target.max_tokens} tokens at most, and "
                                f"source {name!r} has samples of {longest}; name another model, or make "
                                "samples shorter (data.phases)")

    def _missing(self) -> list[tuple[str, int]]:
        """Return the parts that are not there, and those that are damaged, of which it warns."""
        damages = {(name, part): damage for name, parts in self._parts.items() for part in range(len(parts))
                   if (damage := parts.damage(part))}
        for (name, part), damage in damages.items():
            if self._parts[name].file(part).exists():
                warn(f"{damage}; it is computed anew")
        return list(damages)

    def _fill(self, model: RunningLogprobs, rows_per_batch: int) -> tuple[int, int]:
        # The identity is written before the first part, whose checksum includes it.
        on_main(model.world, self._open)
        # One list for all: whoever saw another one would leave the others in a collective.
        todo, num_tokens = on_main(model.world, self._missing), 0
        with create_bar("reference", len(todo), "part", model.world.is_main) as bar:
            for name, part in todo:
                parts = self._parts[name]
                numbers = document_logprobs(model, parts.documents, parts.range_of(part), self._max_tokens,
                                            rows_per_batch)
                on_main(model.world, partial(write_sealed, parts.file(part), numbers.tobytes(),
                                             parts.of(part)))
                num_tokens += len(numbers)
                bar.update(1)
        return len(todo), num_tokens

    def refuse_changed(self) -> None:
        """Refuse to go on with a run, whose model is its reference no more, where the numbers that are there
        are not all that it needs.

        Raises:
            UserError: other data, longer samples, or no numbers.
        """
        file, held = self._folder / IDENTITY, self._read_identity()
        data, max_tokens = held.get("data_sha256", {}), held.get("max_tokens", 0)
        # The weights of the reference are the run's no more, so nothing can be computed again.
        other = [name for name, sha256 in self._identity["data_sha256"].items() if data.get(name) != sha256]
        if other:
            raise UserError(f"{file}: holds no log-probabilities of source {other[0]!r} as it is now; resume "
                            "with the data of before, or start a new --run --from the last checkpoint")
        if max_tokens < self._identity["max_tokens"]:
            raise UserError(f"{file}: its log-probabilities reach to token {max_tokens} of a document, and "
                            f"samples have {self._identity['max_tokens']} (data.phases); resume with samples "
                            "that are no longer, or start a new --run --from the last checkpoint")
        for parts in self._parts.values():
            for part in range(len(parts)):
                if damage := parts.damage(part):
                    raise UserError(f"{damage}; the model that it was computed by is the run's no more: "
                                    "start a new --run --from the last checkpoint")

    def _open(self) -> None:
        file = self._folder / IDENTITY
        if file.is_file():
            if self._read_identity() != self._identity:
                raise UserError(f"{file}: log-probabilities of another reference, of other data or for other "
                                "lengths of samples lie there; delete the folder, and they are computed anew")
            return
        with disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        atomic_write(file, to_json(self._identity))

    def _read_identity(self) -> dict[str, Any]:
        file = self._folder / IDENTITY
        try:
            return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
        except (ValueError, TypeError) as e:
            raise UserError(f"{file}: is damaged ({e}); delete the folder") from None
