"""The files of a round: of each response that is trained a document, read from the store and written shard by
shard, by several processes at once.

A shard is whole pieces of the store, whoever writes it, so its files are the same at any number of processes.
What a response has one number of stands once (`OF_DOCUMENTS`), and what its policy wrote is a bit a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from megatron_sov.base.artifacts import FileRecord, disk_errors, fsync_path
from megatron_sov.base.documents.shard_files import (
    OF_DOCUMENTS, ROUTES, WRITTEN, IndexedWriter, RouteShape, bits)
from megatron_sov.base.errors import UserError
from megatron_sov.rollouts.rows import NOT_WRITTEN
from megatron_sov.rollouts.store import RULES, RolloutStore, all_sound, keys_of, routes_of
from megatron_sov.train.data.described import COUNTS
from megatron_sov.train.data.rounds import ADVANTAGE, BEHAVIOUR, SOURCE

SHARD_TOKENS = 1 << 22
"""A shard ends behind the piece that brings it to so many tokens of responses."""
DTYPE = "int32"


@dataclass(frozen=True)
class RoundPiece:
    """Documents that are read together: of a piece of the store."""

    parts: tuple[str, ...]
    """Names of the parts that its responses stand in."""
    places: np.ndarray
    """[documents, 2] int32: index in `parts`, and row in that part; in the order of documents."""
    numbers: Mapping[str, np.ndarray]
    """Column -> [documents] float32."""
    num_tokens: int
    """Of its responses, prompts not counted."""


@dataclass(frozen=True)
class RoundShard:
    """Files that one process writes."""

    prefix: str
    """Their path in the round, without endings."""
    pieces: tuple[RoundPiece, ...]


def shards_of(pieces: Iterable[RoundPiece]) -> list[RoundShard]:
    """Return pieces in shards, in order; without any piece an empty shard."""
    groups: list[list[RoundPiece]] = [[]]
    for piece in pieces:
        if sum(other.num_tokens for other in groups[-1]) >= SHARD_TOKENS:
            groups.append([])
        groups[-1].append(piece)
    return [RoundShard(f"{SOURCE}/train-{i:05d}", tuple(group)) for i, group in enumerate(groups)]


@dataclass(frozen=True)
class WrittenShard:
    """What stands in the manifest of a shard."""

    counts: Mapping[str, int]
    """`COUNTS`."""
    files: Mapping[str, FileRecord]
    """Path in the round -> digest and size."""


@dataclass(frozen=True)
class ShardWriter:
    """What documents of a round are made from."""

    store: RolloutStore
    temperature: float
    """That responses must have been drawn at."""
    seq_len: int
    """Tokens of a row, into which each document must fit."""
    routes: RouteShape | None
    """Of routes that are replayed; None: none are."""
    bytes_of_token: np.ndarray
    """[vocabulary]: bytes of the text of each token."""
    numbers: tuple[str, ...] = (ADVANTAGE,)
    """Those of each piece."""

    @property
    def sidecars(self) -> list[str]:
        """Endings of the files beside tokens."""
        return [*self._dtypes, WRITTEN]

    @property
    def _dtypes(self) -> dict[str, str]:
        """What `IndexedWriter` writes beside tokens."""
        return ({BEHAVIOUR: "float32"} | {name + OF_DOCUMENTS: "float32" for name in self.numbers}
                | ({} if self.routes is None else {ROUTES: self.routes.dtype}))

    def write(self, folder: Path, shard: RoundShard) -> WrittenShard:
        """Write a shard, and bring it to the disk.

        Args:
            folder: of the round.
            shard: which.

        Raises:
            UserError: a response is longer than a row or of another temperature, has no routes or those of
                another model, or the store or the disk is damaged.
        """
        prefix = folder / shard.prefix
        counts, written = dict.fromkeys(COUNTS, 0), [np.zeros(0, bool)]
        with disk_errors(folder):
            with IndexedWriter(prefix, DTYPE, self._dtypes) as writer:
                for piece in shard.pieces:
                    lengths, columns, flags = self._documents(piece)
                    writer.write(lengths, columns)
                    written.append(flags)
                    added = len(lengths), len(flags), int(self.bytes_of_token[columns["bin"]].sum())
                    counts = {name: counts[name] + more for name, more in zip(COUNTS, added, strict=True)}
            bits(np.concatenate(written)).tofile(f"{prefix}.{WRITTEN}")
            files = {}
            for ending in ("bin", "idx", *self.sidecars):
                file = Path(f"{prefix}.{ending}")
                fsync_path(file)
                files[f"{shard.prefix}.{ending}"] = FileRecord.of(file)
        return WrittenShard(counts, files)

    def _documents(self, piece: RoundPiece) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
        """Return the lengths of a piece's documents, their columns, and whether a policy wrote each token."""
        fields = (*RULES, ROUTES) if self.routes is not None else RULES
        tables = [self._table(name, fields) for name in piece.parts]
        starts = np.cumsum([0, *(table.num_rows for table in tables)])
        index = starts[piece.places[:, 0]] + piece.places[:, 1]
        whole = pa.concat_tables(tables)
        table = whole.drop_columns([ROUTES] if self.routes is not None else []).take(index)
        prompts, prompt_lengths = _flat(table, "prompt_tokens")
        tokens, token_lengths = _flat(table, "tokens")
        lengths = prompt_lengths + token_lengths
        self._refuse(table, lengths)
        # which places of the documents, one after the other, are behind their prompts
        behind = np.repeat(np.tile([False, True], len(lengths)),
                           np.stack([prompt_lengths, token_lengths], 1).reshape(-1))
        ids, logprobs = np.empty(len(behind), np.int32), np.zeros(len(behind), np.float32)
        ids[~behind], ids[behind] = prompts, tokens
        logprobs[behind] = _flat(table, "logprobs")[0]
        # Tokens of tools and prompts are in the document, and are no labels.
        written = np.zeros(len(behind), bool)
        written[behind] = _flat(table, "versions")[0] != NOT_WRITTEN
        columns = {"bin": ids, BEHAVIOUR: logprobs,
                   **{name + OF_DOCUMENTS: piece.numbers[name] for name in self.numbers}}
        if self.routes is not None:
            there = routes_of(whole)
            columns[ROUTES] = self._joined(self.routes, table, [there[i] for i in index.tolist()], lengths)
        return lengths.astype(np.int32), columns, written

    def _table(self, name: str, fields: Sequence[str]) -> pa.Table:
        table = self.store.table_of(self.store.part(name), fields)
        sound = table.drop_columns([column for column in table.column_names if column.startswith("route")])
        if not all_sound(sound, self.store.vocab_size):
            raise UserError(f"{self.store.part_path(name)}: has a row that breaks a rule and does not say "
                            "so; the store did not write it: delete it, and it is written again")
        return table

    def _refuse(self, table: pa.Table, lengths: np.ndarray) -> None:
        """Raise `UserError` where a response may not be trained."""
        found = table["temperature"].to_numpy()
        for i in np.flatnonzero(found != self.temperature)[:1].tolist():
            raise UserError(f"{_where(table, i)} was written at temperature {found[i]:g}, and "
                            f"rollout.temperature = {self.temperature:g}: its log-probabilities would be "
                            "compared with those of another distribution; set it to what they were written "
                            "with, or pass another --store")
        for i in np.flatnonzero(lengths > self.seq_len)[:1].tolist():
            raise UserError(f"{_where(table, i)} has {lengths[i]} tokens with its prompt, and a row "
                            f"data.phases.0.seq_len = {self.seq_len}; a response is never cut: make rows "
                            "longer")

    def _joined(self, shape: RouteShape, table: pa.Table, found: Sequence[np.ndarray | None],
                lengths: np.ndarray) -> np.ndarray:
        """Return the routes of all tokens of documents; none is recorded of the last ones."""
        joined = shape.absent(int(lengths.sum()))
        for i, (routes, end) in enumerate(zip(found, np.cumsum(lengths).tolist(), strict=True)):
            if routes is None:
                raise UserError(f"{_where(table, i)} has no routes, and policy.router_replay replays them; "
                                "write responses with an engine that tells them, or leave the setting out")
            if problem := shape.problem(routes):
                raise UserError(f"{_where(table, i)} {problem}; it was written by another model")
            if len(routes) != lengths[i] - 1:
                raise UserError(f"{_where(table, i)} has routes of {len(routes)} tokens, must have "
                                f"{lengths[i] - 1}; the store did not write it")
            joined[end - lengths[i]:end - 1] = routes
        return joined


def _flat(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of all rows of a column of lists, and how many each row has."""
    column = table[name].combine_chunks()
    return column.flatten().to_numpy(), column.value_lengths().to_numpy().astype(np.int64)


def _where(table: pa.Table, row: int) -> str:
    [key] = keys_of(table.slice(row, 1))
    return f"round {table['round'][row].as_py()}: sample {key.sample} of prompt {key.prompt}"
