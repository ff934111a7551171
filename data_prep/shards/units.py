"""Encode units: parts of the input, each in its own folder until the whole artifact is complete.

A unit's folder is named by a hash of input bytes and settings, and appears by renaming once complete. After a
kill, a command reuses complete units; changed input or settings give another hash.
"""

import dataclasses
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from data_prep.shards.encode import EncodedBatch, Encoder, EncodingSettings
from data_prep.shards.heldout import hash_document
from megatron_sov.base.artifacts import format_json
from megatron_sov.base.documents import BadRecord, Document, FileSpan, RecordReading
from megatron_sov.base.documents.files import PARQUET_SUFFIX, open_parquet
from megatron_sov.base.documents.reading import CountedSpan
from megatron_sov.base.documents.records import count_text_bytes
from megatron_sov.base.documents.shard_files import FEATURES
from megatron_sov.base.errors import UserError
from megatron_sov.chat.media_tokens import MEDIA_TOKEN
from megatron_sov.work.processes.pool import map_in_processes
from megatron_sov.work.progress.resumable import build_part, part_folder

Unit = tuple[FileSpan, ...]
RECORD = "record.json"
CODE_VERSION = 6
"""Increase when equal input and settings give another unit."""
BATCH_BYTES = 1_000_000
"""Text per encoded batch."""
SEQUENCES_PER_DOCUMENT = {"text": 1, "chat": 1, "preference": 2, "prompt": 1}
"""Kind -> adjacent sequences per document."""
SEQUENCE = np.dtype([("tokens", "<i4"), ("bytes", "<u4"), ("hash", "<u8"), ("id", "<u8"), ("span", "<u4"),
                     ("line", "<u8")])
"""Row per sequence: tokens, text bytes, hash for the held-out rule, hash of the id (0: no id), and place."""
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class UnitSettings:
    """Settings that determine a unit, in addition to its input."""

    tokenizer: Path
    """Artifact of kind "tokenizer"."""
    tokenizer_sha256: str
    """Hash of `tokenizer.json`."""
    config_sha256: str
    """Hash of `tokenizer_config.json`, which holds the chat template."""
    dtype: str
    reading: RecordReading
    encoding: EncodingSettings


@dataclass(frozen=True)
class UnitRecord:
    """Counts of a complete unit, as in `record.json`."""

    key: str
    """Folder name."""
    num_sequences: int
    """Rows of `SEQUENCE`."""
    num_tokens: int
    num_lines: tuple[int, ...]
    """Lines or rows per span."""
    num_bad: dict[str, int]
    """Code -> bad records."""
    tags: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    """Bucket ("": no buckets) -> tag -> sorted values."""
    num_unread: dict[str, int] = field(default_factory=dict)
    """Unread message field -> messages with the field."""
    num_read: int = 0
    """Good and bad records from the span readers."""
    encoded_now: bool = True
    """False for units from an earlier command."""


def encode_units(units: list[Unit], settings: UnitSettings, work: Path,
                 workers: int) -> Generator[UnitRecord, None, None]:
    """Yield unit records in order; units from an earlier command are reused.

    Workers are processes: two threads are as fast (benchmarks/results/data_pack.txt), but a third of the work
    (JSON parsing, building arrays) holds Python's lock, so more than three threads would wait for each other.
    Raises `UserError`: a file is unreadable, the disk is full, or a worker was killed."""
    yield from map_in_processes(_create_encoder, (settings, work), units, workers)


def delete_empty_units(work: Path) -> None:
    """Delete the units without a token: every record was bad, so another attempt cannot reuse them."""
    for tokens in work.glob("*/*/tokens"):
        if not tokens.stat().st_size:
            shutil.rmtree(tokens.parent)


def _create_encoder(settings: UnitSettings, work: Path) -> Callable[[Unit], UnitRecord]:
    return UnitEncoder(settings, work).encode


class UnitEncoder:
    """Encodes units into folders below `work`; one instance per process."""

    def __init__(self, settings: UnitSettings, work: Path) -> None:
        self.settings, self.work = settings, work
        self._encoder: Encoder | None = None

    def encode(self, unit: Unit) -> UnitRecord:
        """Encode a unit unless its folder exists. Raises `UserError`: an unreadable file, or a full disk."""
        key = compute_unit_key(unit, self.settings)
        folder, is_new = build_part(self.work, key, RECORD, partial(self._write_unit, unit, key))
        raw = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return UnitRecord(**{**raw, "num_lines": tuple(raw["num_lines"]), "encoded_now": is_new})

    def _write_unit(self, unit: Unit, key: str, folder: Path) -> None:
        if self._encoder is None:  # loaded for the first incomplete unit
            self._encoder = Encoder(self.settings.tokenizer, self.settings.encoding)
        with _UnitWriter(folder, key, self.settings, self._encoder) as writer:
            writer.encode_spans(unit)


class _UnitWriter:
    """Writes a unit's files batch by batch, in bounded memory."""

    def __init__(self, folder: Path, key: str, settings: UnitSettings, encoder: Encoder) -> None:
        self._folder, self._key, self._settings, self._encoder = folder, key, settings, encoder
        optional = {"kinds": settings.reading.kind != "text", "extra": settings.reading.kind == "prompt",
                    "columns": settings.reading.columns, "buckets": settings.reading.bucket_by,
                    FEATURES: settings.encoding.media is not None}
        names = ["tokens", "sequences", "bad", *(name for name, is_written in optional.items() if is_written)]
        self._files: dict[str, IO[bytes]] = {
            name: open(folder / name, "wb") for name in names}  # noqa: SIM115  (closed in __exit__)
        self._num_read = self._num_sequences = self._num_tokens = 0
        self._num_lines: list[int] = []
        self._bad: Counter[str] = Counter()
        self._unread: Counter[str] = Counter()
        self._tags: dict[str, dict[str, set[str]]] = {}

    def __enter__(self) -> "_UnitWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for file in self._files.values():
            file.close()
        # last, and not after an error: the record marks a unit as complete
        if kind is None:
            (self._folder / RECORD).write_text(format_json(self._build_record()))

    def _build_record(self) -> UnitRecord:
        tags = {bucket: {tag: sorted(values) for tag, values in bucket_tags.items()}
                for bucket, bucket_tags in self._tags.items()}
        return UnitRecord(self._key, self._num_sequences, self._num_tokens, tuple(self._num_lines),
                          dict(self._bad), tags, dict(self._unread), self._num_read)

    def encode_spans(self, unit: Unit) -> None:
        batch: list[tuple[int, Document]] = []
        size_bytes = 0
        for number, span in enumerate(unit):
            counted = CountedSpan(span, self._settings.reading)
            for item in counted:
                self._num_read += 1
                if isinstance(item, BadRecord):
                    self._write_bad(number, item)
                    continue
                self._unread.update(item.unread())
                batch.append((number, item))
                # characters approximate bytes well enough to bound memory
                size_bytes += sum(map(len, item.texts()))
                if size_bytes >= BATCH_BYTES:
                    self._encode_batch(batch)
                    batch, size_bytes = [], 0
            self._num_lines.append(counted.num_lines)
        self._encode_batch(batch)

    def _write_bad(self, span: int, bad: BadRecord) -> None:
        self._bad[bad.code] += 1
        row = {"span": span, "line": bad.line, "code": bad.code, "reason": bad.reason,
               "content": bad.content.decode(errors="replace")}
        self._files["bad"].write(json.dumps(row, ensure_ascii=False).encode(errors="replace") + b"\n")

    def _encode_batch(self, batch: list[tuple[int, Document]]) -> None:
        if not batch:
            return
        try:
            encoded = self._encoder.encode_batch([d for _, d in batch])
        except BadRecord as e:
            if len(batch) == 1:
                number, document = batch[0]
                self._write_bad(number, BadRecord(e.code, e.reason, document.line,
                                                  "\n".join(document.texts()).encode()[:1000]))
            else:  # find the bad document by halves: log2(n) repetitions instead of n
                self._encode_batch(batch[: len(batch) // 2])
                self._encode_batch(batch[len(batch) // 2 :])
            return
        self._write_batch(batch, encoded)

    def _write_batch(self, batch: list[tuple[int, Document]], encoded: EncodedBatch) -> None:
        group = SEQUENCES_PER_DOCUMENT[batch[0][1].kind]
        sequences = np.zeros(len(batch) * group, SEQUENCE)
        sequences["tokens"] = encoded.lengths_tokens
        for i, (number, document) in enumerate(batch):
            row = sequences[i * group : (i + 1) * group]
            row["hash"], row["span"], row["line"] = hash_document(document), number, document.line
            row["bytes"] = _count_bytes(document)
            row["id"] = _hash_id(document.id)
            self._write_fields(document, group)
        arrays: dict[str, NDArray[Any]] = {
            "tokens": encoded.ids.astype(np.dtype(self._settings.dtype).newbyteorder("<")),
            "sequences": sequences, "kinds": encoded.kinds, FEATURES: encoded.media.astype("<i8")}
        for name, array in arrays.items():
            if name in self._files:
                self._files[name].write(array.tobytes())
        self._num_sequences += len(sequences)
        self._num_tokens += len(encoded.ids)

    def _write_fields(self, document: Document, group: int) -> None:
        """Record a document's tags, and write its extra fields, bucket and columns."""
        for tag, value in zip(self._settings.reading.tags, document.tags, strict=True):
            self._tags.setdefault(document.bucket, {}).setdefault(tag, set()).add(value)
        if "extra" in self._files:
            self._files["extra"].write(document.extra.encode() + b"\n")
        if "buckets" in self._files:
            self._files["buckets"].write(f"{document.bucket}\n".encode() * group)
        if "columns" in self._files:
            numbers = [document.columns[name] for name in self._settings.reading.columns]
            # [columns, sequences] transposed: a row per sequence
            self._files["columns"].write(np.array(numbers, "<f4").T.tobytes())


def _count_bytes(document: Document) -> list[int]:
    """Return UTF-8 bytes per sequence, without media tokens."""
    if document.media is not None:
        return [sum(count_text_bytes(MEDIA_TOKEN.sub("", text)) for text in document.texts())]
    if document.kind != "preference":
        return [sum(map(count_text_bytes, document.texts()))]
    sizes_bytes = []
    for side in (document.chosen, document.rejected):
        texts = [text for message in (*document.messages, *side) for text in message.texts()]
        sizes_bytes.append(sum(map(count_text_bytes, texts)))
    return sizes_bytes


def _hash_id(id_: str | None) -> int:
    if id_ is None:
        return 0
    digest = hashlib.blake2b(id_.encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def compute_unit_key(unit: Unit, settings: UnitSettings) -> str:
    """Hash a unit's input bytes and settings; paths are left out, so moved input keeps its key. Raises
    `UserError`: a file is unreadable."""
    # `tokenizer_sha256` and `config_sha256` stand for the tokenizer's path
    facts = {**dataclasses.asdict(settings), "tokenizer": None, "code_version": CODE_VERSION}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for span in unit:
        is_first = span.start == 0  # only a file's first span may begin with a byte order mark
        digest.update(f"\n{span.suffix} {span.compression} {span.document_bytes} {span.stop - span.start} "
                      f"{is_first}\n".encode())
        try:
            for block in _read_blocks(span):
                digest.update(block)
        except OSError as e:
            raise UserError(f"{span.file}: cannot be read ({e.strerror or e}); "
                            "check the path and its permissions") from e
    return digest.hexdigest()


def _read_blocks(span: FileSpan) -> Iterator[bytes]:
    start, stop = span.start, span.stop
    if span.suffix == PARQUET_SUFFIX:
        try:
            metadata = open_parquet(span.file).metadata
        except BadRecord:
            start, stop = 0, span.size_bytes
        else:
            # The schema gives the row groups' bytes their meaning; its text begins with a memory address.
            yield str(metadata.schema).partition("\n")[2].encode()
            start, stop = _locate_row_groups(metadata, range(span.start, span.stop))
    with open(span.file, "rb") as f:
        f.seek(start)
        while start < stop and (block := f.read(min(_BLOCK_BYTES, stop - start))):
            start += len(block)
            yield block


def _locate_row_groups(metadata: Any, row_groups: Sequence[int]) -> tuple[int, int]:
    """Return first and last byte offset of row groups in a Parquet file."""
    columns = [metadata.row_group(i).column(c) for i in row_groups for c in range(metadata.num_columns)]
    starts = [min(filter(None, (c.dictionary_page_offset, c.data_page_offset))) for c in columns]
    stops = [start + c.total_compressed_size for start, c in zip(starts, columns, strict=True)]
    return min(starts, default=0), max(stops, default=0)


@dataclass(frozen=True)
class StoredUnit:
    """A complete unit, memory-mapped."""

    sequences: NDArray[np.void]
    """[sequences] of `SEQUENCE`."""
    tokens: NDArray[np.generic]
    """[tokens] ids."""
    kinds: NDArray[np.uint8] | None
    """uint8 [tokens]; None for plain text."""
    columns: NDArray[np.float32]
    """float32 [sequences, columns], in the order of `RecordReading.columns`."""
    folder: Path
    media: NDArray[np.int64] | None = None
    """int64 [tokens], `FEATURES` sidecar; None without media."""

    def read_buckets(self) -> NDArray[np.str_]:
        """Return [sequences] bucket names; "" without buckets."""
        file = self.folder / "buckets"
        if not file.exists():
            return np.full(len(self.sequences), "")
        return np.array(file.read_text(encoding="utf-8").split("\n")[:-1], dtype=np.str_)

    def iter_bad_rows(self) -> Iterator[dict[str, Any]]:
        with open(self.folder / "bad", encoding="utf-8") as f:
            yield from map(json.loads, f)


def open_unit(work: Path, key: str, dtype: str) -> StoredUnit:
    """Memory-map a complete unit."""
    folder = part_folder(work, key)

    def map_file(name: str, dtype: str | np.dtype[Any]) -> NDArray[Any] | None:
        file = folder / name
        if not file.exists():
            return None
        # an empty file cannot be mapped
        return np.memmap(file, dtype, "r") if file.stat().st_size else np.zeros(0, dtype)

    sequences, tokens = map_file("sequences", SEQUENCE), map_file("tokens", np.dtype(dtype).newbyteorder("<"))
    columns = map_file("columns", "<f4")
    assert sequences is not None and tokens is not None
    columns = np.zeros(0, "<f4") if columns is None else columns
    return StoredUnit(sequences, tokens, kinds=map_file("kinds", "u1"),
                      columns=columns.reshape(len(sequences), len(columns) // max(1, len(sequences))),
                      folder=folder, media=map_file(FEATURES, "<i8"))
