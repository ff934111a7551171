"""Shards of a round: a document per trained response, read from the rollout store by several processes.

A shard consists of complete pieces in the store, so that the files do not depend on the number of processes.
Columns with a number per response are stored once per document (`PER_DOCUMENT`), and generated tokens as a
bit per token (`WRITTEN`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from megatron_sov.base.artifacts import FileRecord, fsync_path, translate_disk_errors
from megatron_sov.base.documents.shard_files import (
    COUNTS, PER_DOCUMENT, ROUTES, WRITTEN, IndexedWriter, RouteShape, pack_flags)
from megatron_sov.base.errors import UserError
from megatron_sov.rollouts.rows import NOT_WRITTEN
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.rollouts.tables import RULES, are_rows_sound, read_keys, read_routes
from megatron_sov.train.data.rounds import ADVANTAGE, BEHAVIOUR, ROUNDS_SOURCE

SHARD_TOKENS = 1 << 22
"""Response tokens per shard, rounded up to complete pieces."""
DTYPE = "int32"


@dataclass(frozen=True)
class RoundPiece:
    """Training documents from a piece in the store, which are read together."""

    parts: tuple[str, ...]
    """Part names with the responses."""
    places: np.ndarray
    """[documents, 2] int32: index in `parts`, and row in the part."""
    numbers: Mapping[str, np.ndarray]
    """Column -> [documents] float32."""
    num_tokens: int
    """Response tokens, without prompts."""


@dataclass(frozen=True)
class RoundShard:
    """A shard of a round, written by a single process."""

    prefix: str
    """Path in the round's folder, without suffix."""
    pieces: tuple[RoundPiece, ...]


def split_into_shards(pieces: Iterable[RoundPiece]) -> list[RoundShard]:
    """Group pieces into shards of about `SHARD_TOKENS`, in order; [an empty shard] without pieces."""
    groups: list[list[RoundPiece]] = [[]]
    for piece in pieces:
        if sum(grouped.num_tokens for grouped in groups[-1]) >= SHARD_TOKENS:
            groups.append([])
        groups[-1].append(piece)
    return [RoundShard(f"{ROUNDS_SOURCE}/train-{i:05d}", tuple(group)) for i, group in enumerate(groups)]


@dataclass(frozen=True)
class WrittenShard:
    """A shard's counts and files, for the manifest."""

    counts: Mapping[str, int]
    files: Mapping[str, FileRecord]
    """Path in the round's folder -> digest and size."""


@dataclass(frozen=True)
class ShardWriter:
    """Reads responses from `store` and writes shards."""

    store: RolloutStore
    temperature: float
    """Required sampling temperature."""
    seq_len: int
    """Tokens per training row, the limit for a document."""
    routes: RouteShape | None
    """Shape of replayed expert routes; None: no replay."""
    bytes_of_token: np.ndarray
    """[vocabulary]: text bytes per token."""
    numbers: tuple[str, ...] = (ADVANTAGE,)
    """Columns with a number per document."""

    @property
    def sidecars(self) -> list[str]:
        """Column file suffixes."""
        return [*self._column_dtypes, WRITTEN]

    @property
    def _column_dtypes(self) -> dict[str, str]:
        """Suffix -> dtype for the column files that `IndexedWriter` writes."""
        dtypes = {BEHAVIOUR: "float32"} | {name + PER_DOCUMENT: "float32" for name in self.numbers}
        if self.routes is not None:
            dtypes[ROUTES] = self.routes.dtype
        return dtypes

    def write(self, folder: Path, shard: RoundShard) -> WrittenShard:
        """Write a shard into the round's `folder`, and sync the files to disk. Raises `UserError`: a response
        is longer than a row or has another temperature, lacks routes or has routes of another model, or the
        store or the disk is damaged."""
        prefix = folder / shard.prefix
        counts, written = dict.fromkeys(COUNTS, 0), [np.zeros(0, bool)]
        with translate_disk_errors(folder):
            with IndexedWriter(prefix, DTYPE, self._column_dtypes) as writer:
                for piece in shard.pieces:
                    lengths, columns, flags = self._read_documents(piece)
                    writer.write(lengths, columns)
                    written.append(flags)
                    text_bytes = int(self.bytes_of_token[columns["bin"]].sum())
                    added = dict(zip(COUNTS, (len(lengths), len(flags), text_bytes), strict=True))
                    counts = {name: counts[name] + added[name] for name in COUNTS}
            pack_flags(np.concatenate(written)).tofile(f"{prefix}.{WRITTEN}")
            files = {}
            for ending in ("bin", "idx", *self.sidecars):
                file = Path(f"{prefix}.{ending}")
                fsync_path(file)
                files[f"{shard.prefix}.{ending}"] = FileRecord.of(file)
        return WrittenShard(counts, files)

    def _read_documents(self, piece: RoundPiece) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
        """Read a piece's lengths, columns, and [tokens] bool: whether a policy generated the token."""
        fields = (*RULES, ROUTES) if self.routes is not None else RULES
        tables = [self._read_part(name, fields) for name in piece.parts]
        starts = np.cumsum([0, *(table.num_rows for table in tables)])
        index = starts[piece.places[:, 0]] + piece.places[:, 1]
        joined = pa.concat_tables(tables)
        table = joined.drop_columns([ROUTES] if self.routes is not None else []).take(index)
        prompts, prompt_lengths = _flatten_arrays(table, "prompt_tokens")
        tokens, token_lengths = _flatten_arrays(table, "tokens")
        lengths = prompt_lengths + token_lengths
        self._check_responses(table, lengths)
        # [tokens of all documents]: False in prompts, True in responses.
        is_response = np.repeat(np.tile([False, True], len(lengths)),
                                np.stack([prompt_lengths, token_lengths], 1).reshape(-1))
        ids, logprobs = np.empty(len(is_response), np.int32), np.zeros(len(is_response), np.float32)
        ids[~is_response], ids[is_response] = prompts, tokens
        logprobs[is_response] = _flatten_arrays(table, "logprobs")[0]
        # Tokens of prompts and tool results are not labels.
        written = np.zeros(len(is_response), bool)
        written[is_response] = _flatten_arrays(table, "versions")[0] != NOT_WRITTEN
        columns = {"bin": ids, BEHAVIOUR: logprobs,
                   **{name + PER_DOCUMENT: piece.numbers[name] for name in self.numbers}}
        if self.routes is not None:
            routes = read_routes(joined)
            columns[ROUTES] = _join_routes(self.routes, table, [routes[i] for i in index.tolist()], lengths)
        return lengths.astype(np.int32), columns, written

    def _read_part(self, name: str, fields: Sequence[str]) -> pa.Table:
        table = self.store.read_columns(self.store.part(name), fields)
        checked = table.drop_columns([column for column in table.column_names if column.startswith("route")])
        if not are_rows_sound(checked, self.store.vocab_size):
            raise UserError(f"{self.store.part_path(name)}: has a row that breaks a rule, without a recorded "
                            "problem; delete the part, and it is generated again")
        return table

    def _check_responses(self, table: pa.Table, lengths: np.ndarray) -> None:
        """Raise `UserError` if a response has another temperature or is longer than a row."""
        temperatures = table["temperature"].to_numpy()
        for i in np.flatnonzero(temperatures != self.temperature)[:1].tolist():
            raise UserError(f"{_describe_row(table, i)} was generated at temperature {temperatures[i]:g}, "
                            f"and rollout.temperature = {self.temperature:g}: its log-probabilities would be "
                            "compared with those of another distribution; set the temperature of the store's "
                            "responses, or pass another --store")
        for i in np.flatnonzero(lengths > self.seq_len)[:1].tolist():
            raise UserError(f"{_describe_row(table, i)} has {lengths[i]} tokens with its prompt, and a row "
                            f"data.phases.0.seq_len = {self.seq_len}; a response is never cut: make rows "
                            "longer")


def _join_routes(shape: RouteShape, table: pa.Table, routes_of_row: Sequence[np.ndarray | None],
                 lengths: np.ndarray) -> np.ndarray:
    """Join all documents' expert routes, [tokens, layers, K]; absent for the last token of a document."""
    joined = shape.build_unrecorded(int(lengths.sum()))
    for i, (routes, end) in enumerate(zip(routes_of_row, np.cumsum(lengths).tolist(), strict=True)):
        if routes is None:
            raise UserError(f"{_describe_row(table, i)} has no routes, and policy.router_replay replays "
                            "them; generate with an engine that returns routes, or leave the setting out")
        if problem := shape.problem(routes):
            raise UserError(f"{_describe_row(table, i)} {problem}; another model generated it")
        if len(routes) != lengths[i] - 1:
            raise UserError(f"{_describe_row(table, i)} has routes of {len(routes)} tokens, must have "
                            f"{lengths[i] - 1}; the store did not write it")
        joined[end - lengths[i]:end - 1] = routes
    return joined


def _flatten_arrays(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the values in a column of lists, flattened, and the list lengths."""
    column = table[name].combine_chunks()
    return column.flatten().to_numpy(), column.value_lengths().to_numpy().astype(np.int64)


def _describe_row(table: pa.Table, row: int) -> str:
    [key] = read_keys(table.slice(row, 1))
    return f"round {table['round'][row].as_py()}: sample {key.sample} of prompt {key.prompt}"
