"""Assemble units into shards per source and split, in input order."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data_prep.shards.heldout import HeldoutRule
from data_prep.shards.token_artifact import HELDOUT, SPLITS, get_sidecars
from data_prep.shards.units import SEQUENCES_PER_DOCUMENT, StoredUnit, Unit, UnitRecord, open_unit
from megatron_sov.base.documents.shard_files import FEATURES, NO_FEATURE, IndexedWriter
from megatron_sov.chat.encode import TYPE_PROMPT, TYPE_RESPONSE
from megatron_sov.chat.marks import KIND_NONE

if TYPE_CHECKING:
    from data_prep.media.packing import SourceBanks

BLOCK_TOKENS = 1 << 22
"""Tokens in memory at a time."""
MAX_BAD_CHARS = 300
"""Characters of a bad record's content in `quarantine.jsonl`."""


@dataclass
class EncodedSource:
    """A source with complete units."""

    name: str
    kind: str
    """A kind in `documents.KINDS`."""
    path: Path
    units: list[tuple[Unit, UnitRecord]] = field(default_factory=list)
    """Units with records, in input order."""
    dropped: dict[int, NDArray[np.int64]] = field(default_factory=dict)
    """Unit index -> int64 [n] indices of dropped sequences (`find_repeated_documents`)."""
    num_shared_ids: int = 0
    """Documents whose id also occurs in another file with another text."""
    columns: tuple[str, ...] = ()
    banks: SourceBanks | None = None
    """Banks with the documents' media; None: text only."""
    buckets: list[str] = field(default_factory=lambda: [""])
    """Buckets, each of which becomes a source; [""]: no buckets."""
    largest: dict[str, int] = field(default_factory=dict)
    """Bucket -> largest document hash."""

    def get_bucket_name(self, bucket: str) -> str:
        return f"{self.name}-{bucket}" if bucket else self.name

    @property
    def group(self) -> int:
        """Sequences per document."""
        return SEQUENCES_PER_DOCUMENT[self.kind]


def survey_source(source: EncodedSource, work: Path, dtype: str, rule: HeldoutRule) -> int:
    """Mark repeated documents as dropped, and add the source, or each bucket, to the held-out rule.

    Returns:
        The number of remaining documents.
    """
    units = [open_unit(work, record.key, dtype) for _, record in source.units]
    # a row per document: both sides of a preference have equal hashes and ids
    sequences = [unit.sequences[::source.group] for unit in units]
    counts = np.array([len(s) for s in sequences])
    no_documents = np.zeros(0, np.uint64)
    ids = np.concatenate([no_documents, *(s["id"] for s in sequences)])
    hashes = np.concatenate([no_documents, *(s["hash"] for s in sequences)])
    repeated = find_repeated_documents(ids, _number_files(source, sequences), hashes)
    unique_ids = ids[(ids != 0) & ~repeated]
    source.num_shared_ids = len(unique_ids) - len(np.unique(unique_ids))
    unit_numbers = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum(counts) - counts
    for unit in np.unique(unit_numbers[repeated]).tolist():
        documents = np.flatnonzero(repeated & (unit_numbers == unit)) - starts[unit]
        source.dropped[unit] = (documents[:, None] * source.group + np.arange(source.group)).reshape(-1)
    # the held-out rule sees the source without repeated documents
    hashes = hashes[~repeated]
    if len(hashes):
        buckets = np.concatenate([unit.read_buckets()[::source.group] for unit in units])[~repeated]
        source.buckets = np.unique(buckets).tolist()
        for bucket in source.buckets:
            bucket_hashes = hashes[buckets == bucket]
            rule.add_source(int(bucket_hashes.min()), int(bucket_hashes.max()))
            source.largest[bucket] = int(bucket_hashes.max())
    return len(hashes)


def _number_files(source: EncodedSource, sequences: list[NDArray[np.void]]) -> NDArray[np.int64]:
    """Return int64 [documents] file numbers."""
    numbers: dict[Path, int] = {}
    parts = [np.zeros(0, np.int64)]
    for (spans, _), rows in zip(source.units, sequences, strict=True):
        span_numbers = [numbers.setdefault(span.file, len(numbers)) for span in spans]
        parts.append(np.array(span_numbers, np.int64)[rows["span"]])
    return np.concatenate(parts)


def find_repeated_documents(ids: NDArray[np.uint64], files: NDArray[np.int64], hashes: NDArray[np.uint64]
                            ) -> NDArray[np.bool_]:
    """Return bool [documents]: whether an earlier document has the same id and the same file or text.

    An equal id alone proves nothing: dumps from several wikis number their documents alike.

    Args:
        ids: uint64 [documents], hash of the id; 0: no id.
        files: int64 [documents], file number.
        hashes: uint64 [documents], hash of the text.
    """
    repeated = np.zeros(len(ids), bool)
    if not ids.any():
        return repeated
    for other in (files, hashes):
        order = np.lexsort((other, ids))  # stable: equal documents stay in input order
        same = (ids[order][1:] == ids[order][:-1]) & (other[order][1:] == other[order][:-1])
        repeated[order[1:]] |= same & (ids[order][1:] != 0)
    return repeated


def write_shards(source: EncodedSource, work: Path, artifact: Path, dtype: str, rule: HeldoutRule,
                 shard_tokens: int) -> dict[str, dict[str, Any]]:
    """Write a source's shards; return bucket -> split -> manifest record."""
    sidecars = get_sidecars(source.kind, source.columns, source.banks is not None)
    has_extra = source.kind == "prompt"
    with ExitStack() as stack:
        # with every writer open, a unit is read only once
        writers = {(bucket, split): stack.enter_context(ShardedWriter(
            artifact, f"{source.get_bucket_name(bucket)}/{split}", dtype, sidecars, has_extra, source.group,
            shard_tokens, source.banks)) for bucket in source.buckets for split in SPLITS}
        for number, (_, record) in enumerate(source.units):
            unit = open_unit(work, record.key, dtype)
            is_heldout = rule.is_heldout(unit.sequences["hash"])
            is_written = np.ones(len(is_heldout), bool)
            is_written[source.dropped.get(number, np.zeros(0, np.int64))] = False
            buckets = unit.read_buckets()
            extra = stack.enter_context(open(unit.folder / "extra", "rb")) if has_extra else None
            for block, tokens in iter_blocks(unit.sequences["tokens"], source.group, BLOCK_TOKENS):
                # read extra lines along with blocks, including dropped documents
                lines = list(islice(extra, block.stop - block.start)) if extra else []
                for (bucket, split), writer in writers.items():
                    chosen = is_written & (is_heldout == (split == HELDOUT)) & (buckets == bucket)
                    _write_block(writer, unit, block, tokens, chosen[block], lines, source)
    return {bucket: {split: writers[bucket, split].to_record() for split in SPLITS}
            for bucket in source.buckets}


def iter_blocks(lengths: NDArray[np.integer[Any]], group: int, block_tokens: int
                ) -> Iterator[tuple[slice, slice]]:
    """Yield slices of sequences and of their tokens, about `block_tokens` each, in whole groups."""
    ends = np.cumsum(lengths, dtype=np.int64)
    start = first_token = 0
    while start < len(ends):
        stop = max(start + 1, int(np.searchsorted(ends, first_token + block_tokens, side="right")))
        stop = min(len(ends), -(-stop // group) * group)
        yield slice(start, stop), slice(first_token, int(ends[stop - 1]))
        start, first_token = stop, int(ends[stop - 1])


def _write_block(writer: ShardedWriter, unit: StoredUnit, block: slice, tokens: slice,
                 chosen: NDArray[np.bool_], lines: list[bytes], source: EncodedSource) -> None:
    if not chosen.any():
        return
    lengths = unit.sequences["tokens"][block]
    mask = np.repeat(chosen, lengths)
    columns: dict[str, NDArray[np.generic]] = {"bin": unit.tokens[tokens][mask]}
    if unit.kinds is not None:
        kinds = unit.kinds[tokens][mask]
        is_learned = kinds != KIND_NONE
        columns["type"] = np.where(is_learned, TYPE_RESPONSE, TYPE_PROMPT).astype(np.uint8)
        columns["loss"] = is_learned.astype(np.float32)
        if source.kind == "chat":
            columns["kind"] = kinds
    if unit.media is not None:
        columns[FEATURES] = unit.media[tokens][mask]
        # texts learn everything except feature placeholders
        columns.setdefault("loss", (columns[FEATURES] == NO_FEATURE).astype(np.float32))
    for i, name in enumerate(source.columns):
        columns[name] = np.repeat(unit.columns[block, i][chosen], lengths[chosen])
    extra = [line for line, keep in zip(lines, chosen, strict=True) if keep] if lines else []
    writer.write(lengths[chosen].astype(np.int32), unit.sequences["bytes"][block][chosen].astype(np.int64),
                 columns, extra)


def write_quarantine(source: EncodedSource, work: Path, dtype: str, file: IO[str]) -> dict[str, int]:
    """Append a source's bad records to `quarantine.jsonl` in input order; return code -> records."""
    counts: Counter[str] = Counter()
    for row in iter_bad_records(source, work, dtype):
        counts[row["code"]] += 1
        file.write(json.dumps({"source": source.name, **row}, ensure_ascii=False) + "\n")
    return dict(counts)


def iter_bad_records(source: EncodedSource, work: Path, dtype: str) -> Iterator[dict[str, Any]]:
    """Yield file, line (or row), code, reason and shortened content for bad records and repeated ids."""
    previous_lines: Counter[Path] = Counter()
    for number, (spans, record) in enumerate(source.units):
        first_lines = []
        # a span counts lines from its start: add the lines in earlier spans of the file
        for span, num_lines in zip(spans, record.num_lines, strict=True):
            first_lines.append(previous_lines[span.file])
            previous_lines[span.file] += num_lines
        if not record.num_bad and number not in source.dropped:
            continue
        unit = open_unit(work, record.key, dtype)
        rows = [(row["span"], row["line"], row["code"], row["reason"], row["content"])
                for row in unit.iter_bad_rows()]
        for i in source.dropped.get(number, np.zeros(0, np.int64))[:: source.group].tolist():
            sequence = unit.sequences[i]
            rows.append((int(sequence["span"]), int(sequence["line"]), "duplicate_id",
                         "has the id of an earlier record in its file, or id and text of one in another "
                         "file; give it its own id, or remove it", ""))
        for span_number, line, code, reason, content in sorted(rows, key=lambda r: (r[0], r[1] or math.inf)):
            yield {"file": str(spans[span_number].file),
                   "line": first_lines[span_number] + line if line else None,
                   "code": code, "reason": reason, "content": content[:MAX_BAD_CHARS]}


@dataclass
class ShardRecord:
    """A shard's record in the manifest."""

    prefix: str
    """Path inside the artifact, without file ending."""
    num_documents: int = 0
    """Sequences; a preference has two."""
    num_tokens: int = 0
    num_bytes: int = 0
    """UTF-8 bytes of text."""


class ShardedWriter:
    """Writes a split as one or more shards, beginning a new shard before a document that exceeds
    `shard_tokens`; an empty split has an empty shard."""

    def __init__(self, artifact: Path, name: str, dtype: str, sidecars: Mapping[str, str], has_extra: bool,
                 group: int, shard_tokens: int, banks: SourceBanks | None = None) -> None:
        """Begin the first shard.

        Args:
            artifact: folder of the artifact.
            name: source and split, e.g. "english/train"; shards append a number.
            dtype: dtype for ids.
            sidecars: file ending -> dtype.
            has_extra: write `.extra.jsonl`, a line per document.
            group: sequences per document.
            shard_tokens: token limit per shard; a longer document gets its own shard.
            banks: the source's banks; None: text only.
        """
        self._artifact, self._name, self._dtype, self._sidecars = artifact, name, dtype, sidecars
        self._has_extra, self._group, self._shard_tokens = has_extra, group, shard_tokens
        self._source_banks = banks
        self.shards: list[ShardRecord] = []
        self._begin_shard()

    def __enter__(self) -> ShardedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._end_shard(kind, error, trace)

    def _begin_shard(self) -> None:
        self.shards.append(ShardRecord(f"{self._name}-{len(self.shards):05d}"))
        prefix = self._artifact / self.shards[-1].prefix
        self._writer = IndexedWriter(prefix, self._dtype, self._sidecars)
        self._banks = self._source_banks.open_shard(prefix) if self._source_banks else None
        self._lines: IO[bytes] | None = None
        if self._has_extra:
            self._lines = open(f"{prefix}.extra.jsonl", "wb")  # noqa: SIM115  (closed in _end_shard)

    def _end_shard(self, kind: type[BaseException] | None = None, error: BaseException | None = None,
                   trace: TracebackType | None = None) -> None:
        self._writer.__exit__(kind, error, trace)
        if self._lines is not None:
            self._lines.close()
        if self._banks is not None:
            self._banks.close()

    def write(self, lengths_tokens: NDArray[np.int32], sizes_bytes: NDArray[np.int64],
              columns: dict[str, NDArray[np.generic]], extra: Sequence[bytes]) -> None:
        """Append sequences.

        Args:
            lengths_tokens: int32 [sequences].
            sizes_bytes: int64 [sequences], text bytes.
            columns: "bin" and sidecars, [sum of lengths] each.
            extra: a line per sequence, or [].
        """
        ends = np.cumsum(lengths_tokens, dtype=np.int64)
        start = 0
        while start < len(lengths_tokens):
            first_token = int(ends[start - 1]) if start else 0
            # the whole documents that fit into the shard
            stop = int(np.searchsorted(ends, first_token + self._shard_tokens - self.shards[-1].num_tokens,
                                       side="right"))
            stop = start + (stop - start) // self._group * self._group
            if stop <= start:
                if self.shards[-1].num_documents:
                    self._end_shard()
                    self._begin_shard()
                    continue
                stop = start + self._group  # a document above the limit gets a separate shard
            tokens = slice(first_token, int(ends[stop - 1]))
            part = {suffix: column[tokens] for suffix, column in columns.items()}
            if self._banks is not None:
                part[FEATURES] = self._banks.renumber_features(part["bin"], part[FEATURES].astype(np.int64))
            self._writer.write(lengths_tokens[start:stop], part)
            if self._lines is not None:
                self._lines.writelines(extra[start:stop])
            shard = self.shards[-1]
            shard.num_documents += stop - start
            shard.num_tokens += tokens.stop - tokens.start
            shard.num_bytes += int(sizes_bytes[start:stop].sum())
            start = stop

    def to_record(self) -> dict[str, Any]:
        """Return the split's manifest record: shards and sums."""
        shards = [asdict(s) for s in self.shards]
        counts = ("num_documents", "num_tokens", "num_bytes")
        return {"shards": shards} | {field: sum(s[field] for s in shards) for field in counts}
