"""From complete units to the shards of a source: in the order of the input, divided into training and
held-out documents."""

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

from data_prep.shards.token_artifact import HELDOUT, SPLITS, HeldoutRule, get_sidecars
from data_prep.shards.units import SEQUENCES_PER_DOCUMENT, StoredUnit, UnitRecord, open_unit
from megatron_sov.base.documents import FileSpan
from megatron_sov.base.documents.shard_files import FEATURES, NO_FEATURE, IndexedWriter
from megatron_sov.chat.encode import TYPE_PROMPT, TYPE_RESPONSE
from megatron_sov.chat.marks import KIND_NONE

if TYPE_CHECKING:
    from data_prep.media.packing import SourceBanks

BLOCK_TOKENS = 1 << 22
"""Tokens that are held in memory at a time."""
SHOWN_BAD_CHARS = 300


@dataclass
class EncodedSource:
    """A source whose units are all complete."""

    name: str
    kind: str
    """One of `documents.KINDS`."""
    path: Path
    units: list[tuple[tuple[FileSpan, ...], UnitRecord]] = field(default_factory=list)
    """The units in the order of the input, each with its record."""
    dropped: dict[int, NDArray[np.int64]] = field(default_factory=dict)
    """Unit -> sequences that are left out because they repeat an earlier document (`find_repeated`)."""
    num_shared_ids: int = 0
    """Documents that are kept although a document of another file has their id, with another text."""

    columns: tuple[str, ...] = ()
    banks: SourceBanks | None = None
    """Banks that its documents name; None: they have no media."""
    buckets: list[str] = field(default_factory=lambda: [""])
    """Those that its documents belong to, each of which becomes a source; "" alone: it is one itself."""
    largest: dict[str, int] = field(default_factory=dict)
    """Bucket -> largest hash of its documents."""

    def name_of(self, bucket: str) -> str:
        return f"{self.name}-{bucket}" if bucket else self.name

    @property
    def group(self) -> int:
        return SEQUENCES_PER_DOCUMENT[self.kind]


def survey_source(source: EncodedSource, work: Path, dtype: str, rule: HeldoutRule) -> int:
    """Find repeated documents, and tell the held-out rule the smallest and largest hash of the source, or of
    each of its buckets.

    Returns:
        How many documents are left.
    """
    units = [open_unit(work, record.key, dtype) for _, record in source.units]
    # One row of a document: both sides of a preference have the same hash and id.
    sequences = [unit.sequences[::source.group] for unit in units]
    counts = np.array([len(s) for s in sequences])
    ids, hashes = (np.concatenate([s[name] for s in sequences]) if sequences else np.zeros(0, np.uint64)
                   for name in ("id", "hash"))
    numbers = {file: i for i, file in enumerate(dict.fromkeys(span.file for spans, _ in source.units
                                                              for span in spans))}
    files = np.concatenate([np.array([numbers[span.file] for span in spans], np.int64)[s["span"]]
                            for (spans, _), s in zip(source.units, sequences, strict=True)]
                           or [np.zeros(0, np.int64)])
    repeated = find_repeated_documents(ids, files, hashes)
    with_ids = ids[(ids != 0) & ~repeated]
    source.num_shared_ids = len(with_ids) - len(np.unique(with_ids))
    unit_of = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum(counts) - counts
    for unit in np.unique(unit_of[repeated]).tolist():
        documents = np.flatnonzero(repeated & (unit_of == unit)) - starts[unit]
        source.dropped[unit] = (documents[:, None] * source.group + np.arange(source.group)).reshape(-1)
    hashes = hashes[~repeated]
    if len(hashes):
        # Repeated documents are out before the rule sees the source.
        buckets = np.concatenate([unit.buckets()[::source.group] for unit in units])[~repeated]
        source.buckets = np.unique(buckets).tolist()
        for bucket in source.buckets:
            inside = hashes[buckets == bucket]
            rule.learn_source(int(inside.min()), int(inside.max()))
            source.largest[bucket] = int(inside.max())
    return len(hashes)


def find_repeated_documents(ids: NDArray[np.uint64], files: NDArray[np.int64], hashes: NDArray[np.uint64]
                  ) -> NDArray[np.bool_]:
    """Return which documents [bool, documents] repeat an earlier one.

    The earlier one has their id, and is of the same file or has the same text. Files that number their
    documents alike, as the dumps of several wikis do, share ids without sharing documents.

    Args:
        ids: hash of each document's id in the order of the input; 0: it has none.
        files: number of its file.
        hashes: hash of its text.
    """
    repeated = np.zeros(len(ids), bool)
    if not ids.any():
        return repeated
    for other in (files, hashes):
        order = np.lexsort((other, ids))  # stable: the first document of the input comes first among equals
        same = (ids[order][1:] == ids[order][:-1]) & (other[order][1:] == other[order][:-1])
        repeated[order[1:]] |= same & (ids[order][1:] != 0)
    return repeated


def write_shards(source: EncodedSource, work: Path, artifact: Path, dtype: str, rule: HeldoutRule,
                 shard_tokens: int) -> dict[str, dict[str, Any]]:
    """Write the shards of a source; returns the manifest's record of each split, by bucket."""
    sidecars = get_sidecars(source.kind, source.columns, source.banks is not None)
    extra = source.kind == "prompt"
    with ExitStack() as stack:
        # All writers are open at once, so each unit is read a single time.
        writers = {(bucket, split): stack.enter_context(ShardedWriter(
            artifact, f"{source.name_of(bucket)}/{split}", dtype, sidecars, extra, source.group,
            shard_tokens, source.banks)) for bucket in source.buckets for split in SPLITS}
        for number, (_, record) in enumerate(source.units):
            unit = open_unit(work, record.key, dtype)
            heldout = rule.is_heldout(unit.sequences["hash"])
            kept = np.ones(len(heldout), bool)
            kept[source.dropped.get(number, np.zeros(0, np.int64))] = False
            buckets = unit.buckets()
            lines = stack.enter_context(open(unit.folder / "extra", "rb")) if extra else None
            for block, tokens in _blocks(unit):
                # Lines are read along with blocks, also those of documents that are left out.
                here = list(islice(lines, block.stop - block.start)) if lines else []
                for (bucket, split), writer in writers.items():
                    chosen = kept & (heldout == (split == HELDOUT)) & (buckets == bucket)
                    _write_block(writer, unit, block, tokens, chosen[block], here, source)
    return {bucket: {split: writers[bucket, split].record() for split in SPLITS} for bucket in source.buckets}


def _blocks(unit: StoredUnit) -> Iterator[tuple[slice, slice]]:
    """Yield ranges of sequences, and the ranges of their tokens, of about `BLOCK_TOKENS` each."""
    ends = np.cumsum(unit.sequences["tokens"], dtype=np.int64)
    start = passed = 0
    while start < len(ends):
        stop = max(start + 1, int(np.searchsorted(ends, passed + BLOCK_TOKENS, side="right")))
        stop = min(len(ends), stop + stop % 2)  # never between the two sequences of a preference
        yield slice(start, stop), slice(passed, int(ends[stop - 1]))
        start, passed = stop, int(ends[stop - 1])


def _write_block(writer: ShardedWriter, unit: StoredUnit, block: slice, tokens: slice,
                 chosen: NDArray[np.bool_], lines: list[bytes], source: EncodedSource) -> None:
    if not chosen.any():
        return
    lengths = unit.sequences["tokens"][block]
    mask = np.repeat(chosen, lengths)
    columns: dict[str, NDArray[np.generic]] = {"bin": unit.tokens[tokens][mask]}
    if unit.kinds is not None:
        kinds = unit.kinds[tokens][mask]
        learned = kinds != KIND_NONE
        columns["type"] = np.where(learned, TYPE_RESPONSE, TYPE_PROMPT).astype(np.uint8)
        columns["loss"] = learned.astype(np.float32)
        if source.kind == "chat":
            columns["kind"] = kinds
    if unit.media is not None:
        columns[FEATURES] = unit.media[tokens][mask]
        # In texts everything is learned but placeholders of features.
        columns.setdefault("loss", (columns[FEATURES] == NO_FEATURE).astype(np.float32))
    for i, name in enumerate(source.columns):
        columns[name] = np.repeat(unit.columns[block, i][chosen], lengths[chosen])
    extra = [line for line, keep in zip(lines, chosen, strict=True) if keep] if lines else []
    writer.write(lengths[chosen].astype(np.int32), unit.sequences["bytes"][block][chosen].astype(np.int64),
                 columns, extra)


def write_quarantine(source: EncodedSource, work: Path, dtype: str, file: IO[str]) -> dict[str, int]:
    """Append a source's bad records to the open `quarantine.jsonl`, in the order of the input;
    returns code -> records."""
    counts: Counter[str] = Counter()
    for row in iter_bad_records(source, work, dtype):
        counts[row["code"]] += 1
        file.write(json.dumps({"source": source.name, **row}, ensure_ascii=False) + "\n")
    return dict(counts)


def iter_bad_records(source: EncodedSource, work: Path, dtype: str) -> Iterator[dict[str, Any]]:
    """Yield file, line (or row), code, reason and the content's beginning of each bad record,
    repeated ids among them."""
    lines_before: Counter[Path] = Counter()
    for number, (spans, record) in enumerate(source.units):
        firsts = []
        # Units count lines from their own beginning: the file's number follows from the units before.
        for span, num_lines in zip(spans, record.num_lines, strict=True):
            firsts.append(lines_before[span.file])
            lines_before[span.file] += num_lines
        if not record.num_bad and number not in source.dropped:
            continue
        unit = open_unit(work, record.key, dtype)
        found = [(row["span"], row["line"], row["code"], row["reason"], row["content"])
                 for row in unit.bad_rows()]
        for i in source.dropped.get(number, np.zeros(0, np.int64))[:: source.group].tolist():
            sequence = unit.sequences[i]
            found.append((int(sequence["span"]), int(sequence["line"]), "duplicate_id",
                          "has the id of an earlier record in its file, or id and text of one in another "
                          "file; give it its own id, or remove it", ""))
        for span_number, line, code, reason, content in sorted(found, key=lambda f: (f[0], f[1] or math.inf)):
            yield {"file": str(spans[span_number].file), "line": firsts[span_number] + line if line else None,
                   "code": code, "reason": reason, "content": content[:SHOWN_BAD_CHARS]}


# Token shards of one source and split: a new one is begun where the next document would make one too large.


@dataclass
class ShardRecord:
    """What the manifest holds of one shard."""

    prefix: str
    """Path of its files without their endings, inside the artifact."""
    num_documents: int = 0
    """Sequences; a preference is two."""
    num_tokens: int = 0
    num_bytes: int = 0
    """UTF-8 bytes of the text behind them."""


class ShardedWriter:
    """Writes one split as one or more shards; there is always one, which may be empty."""

    def __init__(self, artifact: Path, name: str, dtype: str, sidecars: Mapping[str, str], extra: bool,
                 group: int, shard_tokens: int, banks: SourceBanks | None = None) -> None:
        """Begin the first shard.

        Args:
            artifact: folder of the artifact.
            name: source and split, e.g. "english/train"; shards are numbered behind it.
            dtype: dtype of ids.
            sidecars: ending -> dtype of the files beside.
            extra: whether `.extra.jsonl` is written, a line for each document.
            group: sequences that stay together.
            shard_tokens: most tokens of a shard, unless one document has more.
            banks: those of the source's documents; None: they have none.
        """
        self._artifact, self._name, self._dtype, self._sidecars, self._extra = (artifact, name, dtype,
                                                                                sidecars, extra)
        self._group, self._shard_tokens, self._source_banks = group, shard_tokens, banks
        self.shards: list[ShardRecord] = []
        self._begin()

    def __enter__(self) -> ShardedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._end(kind, error, trace)

    def _begin(self) -> None:
        self.shards.append(ShardRecord(f"{self._name}-{len(self.shards):05d}"))
        prefix = self._artifact / self.shards[-1].prefix
        self._writer = IndexedWriter(prefix, self._dtype, self._sidecars)
        self._banks = self._source_banks.open_shard(prefix) if self._source_banks else None
        self._lines: IO[bytes] | None = (open(f"{prefix}.extra.jsonl", "wb")  # noqa: SIM115  (closed in _end)
                                         if self._extra else None)

    def _end(self, kind: type[BaseException] | None = None, error: BaseException | None = None,
             trace: TracebackType | None = None) -> None:
        self._writer.__exit__(kind, error, trace)
        if self._lines is not None:
            self._lines.close()
        if self._banks is not None:
            self._banks.close()

    def write(self, lengths_tokens: NDArray[np.int32], sizes_bytes: NDArray[np.int64],
              columns: dict[str, NDArray[np.generic]], extra: Sequence[bytes]) -> None:
        """Append sequences: tokens and bytes of each, columns as in `IndexedWriter`,
        extra lines (one each, or none at all)."""
        ends = np.cumsum(lengths_tokens, dtype=np.int64)
        done = 0
        while done < len(lengths_tokens):
            passed = int(ends[done - 1]) if done else 0
            # As many sequences as still fit into this shard, cut to whole documents.
            stop = int(np.searchsorted(ends, passed + self._shard_tokens - self.shards[-1].num_tokens,
                                       side="right"))
            stop = done + (stop - done) // self._group * self._group
            if stop <= done:
                if self.shards[-1].num_documents:
                    self._end()
                    self._begin()
                    continue
                stop = done + self._group  # a document above the limit has a shard of its own
            part = slice(passed, int(ends[stop - 1]))
            here = {suffix: column[part] for suffix, column in columns.items()}
            if self._banks is not None:
                # Each shard numbers the rows of its banks from 0.
                here[FEATURES] = self._banks.moved(here["bin"], here[FEATURES].astype(np.int64))
            self._writer.write(lengths_tokens[done:stop], here)
            if self._lines is not None:
                self._lines.writelines(extra[done:stop])
            shard = self.shards[-1]
            shard.num_documents += stop - done
            shard.num_tokens += part.stop - part.start
            shard.num_bytes += int(sizes_bytes[done:stop].sum())
            done = stop

    def record(self) -> dict[str, Any]:
        """Return the manifest's record of the split: its shards and their sums."""
        shards = [asdict(s) for s in self.shards]
        counts = ("num_documents", "num_tokens", "num_bytes")
        return {"shards": shards} | {field: sum(s[field] for s in shards) for field in counts}
