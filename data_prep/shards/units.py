"""Units of work: a part of the input encoded into a folder of its own, kept until the whole is complete.

A unit's folder is named by a hash of its input's bytes and of every setting that its content depends on, and
appears by a rename when it is complete.  A command that was killed therefore continues with the units that
are there, and a unit whose input or settings changed is not found and made anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from data_prep.shards.encode import EncodedBatch, Encoder, EncodingSettings
from data_prep.shards.token_artifact import hash_document
from megatron_sov.base.artifacts import format_json
from megatron_sov.base.documents import BadRecord, Document, FileSpan, RecordReading
from megatron_sov.base.documents.files import PARQUET_SUFFIX, open_parquet
from megatron_sov.base.documents.reading import CountedSpan
from megatron_sov.base.documents.shard_files import FEATURES
from megatron_sov.base.errors import UserError
from megatron_sov.chat.media_tokens import MEDIA_TOKEN
from megatron_sov.work.processes.pool import map_in_processes
from megatron_sov.work.progress.resumable import build_part, part_folder

Unit = tuple[FileSpan, ...]
RECORD = "record.json"
CODE_VERSION = 6
"""Raised when the same input and settings would give another unit."""
BATCH_BYTES = 1_000_000
"""Text that is encoded at a time."""
SEQUENCES_PER_DOCUMENT = {"text": 1, "chat": 1, "preference": 2, "prompt": 1}
"""Sequences of a document, which stay together."""
SEQUENCE = np.dtype([("tokens", "<i4"), ("bytes", "<u4"), ("hash", "<u8"), ("id", "<u8"), ("span", "<u4"),
                     ("line", "<u8")])
"""What is kept of each sequence: its tokens, bytes of text, hash for the held-out rule,
hash of its id (0: none), place."""
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class UnitSettings:
    """Everything that units depend on besides their input."""

    tokenizer: Path
    """Artifact of kind "tokenizer"."""
    tokenizer_sha256: str
    """Hash of its tokenizer.json."""
    config_sha256: str
    """Hash of its tokenizer_config.json, which holds the chat template."""
    dtype: str
    reading: RecordReading
    encoding: EncodingSettings


@dataclass(frozen=True)
class UnitRecord:
    """What a complete unit says about itself."""

    key: str
    """Name of its folder."""
    num_sequences: int
    """Rows of `SEQUENCE`."""
    num_tokens: int
    num_lines: tuple[int, ...]
    """Lines or rows of each span."""
    num_bad: dict[str, int]
    """Code -> bad records."""
    tags: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    """Bucket ("": there are none) -> tag -> the values that its documents have, sorted."""
    num_unread: dict[str, int] = field(default_factory=dict)
    """Field of messages that is not read -> messages that have it."""
    num_read: int = 0
    """Records that the readers of its spans have yielded, good and bad."""
    encoded_now: bool = True
    """False where it was found complete."""


class UnitEncoder:
    """Encodes units; one per process."""

    def __init__(self, settings: UnitSettings, work: Path) -> None:
        """`work`: folder that holds the units."""
        self.settings, self.work = settings, work
        self._encoder: Encoder | None = None

    def encode(self, unit: Unit) -> UnitRecord:
        """Return the unit's record; it is encoded unless it is there already.

        Raises:
            UserError: a file cannot be read, or the disk refuses.
        """
        key = compute_unit_key(unit, self.settings)
        # The record is written last, and the folder gets its name by a rename.
        folder, is_new = build_part(self.work, key, RECORD, partial(self._write, unit, key))
        raw = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return UnitRecord(**{**raw, "num_lines": tuple(raw["num_lines"]), "encoded_now": is_new})

    def _write(self, unit: Unit, key: str, folder: Path) -> None:
        if self._encoder is None:  # loaded by the first unit that needs it
            self._encoder = Encoder(self.settings.tokenizer, self.settings.encoding)
        with _UnitWriter(folder, key, self.settings, self._encoder) as writer:
            writer.read(unit)


class _UnitWriter:
    """Writes one unit's files, batch after batch, so that memory does not grow with the unit."""

    def __init__(self, folder: Path, key: str, settings: UnitSettings, encoder: Encoder) -> None:
        self._folder, self._key, self._settings, self._encoder = folder, key, settings, encoder
        names = ["tokens", "sequences", "bad", *(["kinds"] if settings.reading.kind != "text" else []),
                 *(["extra"] if settings.reading.kind == "prompt" else []),
                 *(["columns"] if settings.reading.columns else []),
                 *(["buckets"] if settings.reading.bucket_by else []),
                 *([FEATURES] if settings.encoding.media is not None else [])]
        self._files: dict[str, IO[bytes]] = {
            name: open(folder / name, "wb") for name in names}  # noqa: SIM115  (closed in __exit__)
        self._num_read = self._num_sequences = self._num_tokens = 0
        self._num_lines: list[int] = []
        self._bad: Counter[str] = Counter()
        self._unread: Counter[str] = Counter()
        self._tags: dict[str, dict[str, set[str]]] = {}

    def __enter__(self) -> _UnitWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for file in self._files.values():
            file.close()
        # Without an error only: a unit with a record is complete.
        if kind is None:
            (self._folder / RECORD).write_text(format_json(self.record()))

    def record(self) -> UnitRecord:
        return UnitRecord(self._key, self._num_sequences, self._num_tokens, tuple(self._num_lines),
                          dict(self._bad),
                          {bucket: {tag: sorted(values) for tag, values in tags.items()}
                           for bucket, tags in self._tags.items()}, dict(self._unread), self._num_read)

    def read(self, unit: Unit) -> None:
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
                # Characters are near enough to bytes to bound memory.
                size_bytes += sum(map(len, item.texts()))
                if size_bytes >= BATCH_BYTES:
                    self._write(batch)
                    batch, size_bytes = [], 0
            self._num_lines.append(counted.num_lines)
        self._write(batch)

    def _write_bad(self, span: int, bad: BadRecord) -> None:
        self._bad[bad.code] += 1
        row = {"span": span, "line": bad.line, "code": bad.code, "reason": bad.reason,
               "content": bad.content.decode(errors="replace")}
        self._files["bad"].write(json.dumps(row, ensure_ascii=False).encode(errors="replace") + b"\n")

    def _write(self, batch: list[tuple[int, Document]]) -> None:
        if not batch:
            return
        try:
            encoded = self._encoder.encode_batch([d for _, d in batch])
        except BadRecord as e:
            if len(batch) == 1:
                number, document = batch[0]
                self._write_bad(number, BadRecord(e.code, e.reason, document.line,
                                                  "\n".join(document.texts()).encode()[:1000]))
            else:  # find out which of them it is
                # By halves: a batch is encoded log2(n) times more, and not n times.
                self._write(batch[: len(batch) // 2])
                self._write(batch[len(batch) // 2 :])
            return
        self._write_encoded(batch, encoded)

    def _write_encoded(self, batch: list[tuple[int, Document]], encoded: EncodedBatch) -> None:
        group = SEQUENCES_PER_DOCUMENT[batch[0][1].kind]
        sequences = np.zeros(len(batch) * group, SEQUENCE)
        sequences["tokens"] = encoded.lengths_tokens
        for i, (number, document) in enumerate(batch):
            row = sequences[i * group : (i + 1) * group]
            row["hash"], row["span"], row["line"] = hash_document(document), number, document.line
            row["bytes"] = _sizes_bytes(document)
            row["id"] = _id_hash(document.id)
            for tag, value in zip(self._settings.reading.tags, document.tags, strict=True):
                self._tags.setdefault(document.bucket, {}).setdefault(tag, set()).add(value)
            if "extra" in self._files:
                self._files["extra"].write(document.extra.encode() + b"\n")
            if "buckets" in self._files:
                self._files["buckets"].write(f"{document.bucket}\n".encode() * group)
            if "columns" in self._files:
                numbers = [document.columns[name] for name in self._settings.reading.columns]
                # Transposed: a row for each sequence, a number for each column.
                self._files["columns"].write(np.array(numbers, "<f4").T.tobytes())
        self._files["tokens"].write(
            encoded.ids.astype(np.dtype(self._settings.dtype).newbyteorder("<")).tobytes())
        self._files["sequences"].write(sequences.tobytes())
        if "kinds" in self._files:
            self._files["kinds"].write(encoded.kinds.tobytes())
        if FEATURES in self._files:
            self._files[FEATURES].write(encoded.media.astype("<i8").tobytes())
        self._num_sequences += len(sequences)
        self._num_tokens += len(encoded.ids)


def _sizes_bytes(document: Document) -> list[int]:
    if document.media is not None:  # of what people wrote: bytes of media would be of another kind
        return [sum(len(MEDIA_TOKEN.sub("", text).encode()) for text in document.texts())]
    if document.kind != "preference":
        return [sum(len(text.encode()) for text in document.texts())]
    return [sum(len(text.encode()) for message in (*document.messages, *side) for text in message.texts())
            for side in (document.chosen, document.rejected)]


def _id_hash(id_: str | None) -> int:
    if id_ is None:
        return 0
    return (int.from_bytes(hashlib.blake2b(id_.encode(errors="replace"), digest_size=8).digest(), "little")
            or 1)


def compute_unit_key(unit: Unit, settings: UnitSettings) -> str:
    """Return the hash of a unit's input and settings; paths are no part of it, so moved input is known again.

    Raises:
        UserError: a file cannot be read.
    """
    # The tokenizer counts by its hash, not by its path.
    facts = {**dataclasses.asdict(settings), "tokenizer": None, "code_version": CODE_VERSION}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for span in unit:
        is_first = span.start == 0  # a byte order mark counts there only
        digest.update(f"\n{span.suffix} {span.compression} {span.document_bytes} {span.stop - span.start} "
                      f"{is_first}\n".encode())
        try:
            for block in _content(span):
                digest.update(block)
        except OSError as e:
            raise UserError(f"{span.file}: cannot be read ({e.strerror or e}); "
                            "check the path and its permissions") from e
    return digest.hexdigest()


def _content(span: FileSpan) -> Iterator[bytes]:
    start, stop = span.start, span.stop
    if span.suffix == PARQUET_SUFFIX:
        try:
            metadata = open_parquet(span.file).metadata
        except BadRecord:
            start, stop = 0, span.size_bytes
        else:
            # Row groups alone do not say what their bytes mean.
            yield str(metadata.schema).encode()
            start, stop = _parquet_bytes(metadata, range(span.start, span.stop))
    with open(span.file, "rb") as f:
        f.seek(start)
        while start < stop and (block := f.read(min(_BLOCK_BYTES, stop - start))):
            start += len(block)
            yield block


def _parquet_bytes(metadata: Any, row_groups: range) -> tuple[int, int]:
    columns = [metadata.row_group(i).column(c) for i in row_groups for c in range(metadata.num_columns)]
    starts = [min(filter(None, (c.dictionary_page_offset, c.data_page_offset))) for c in columns]
    return (min(starts, default=0),
            max((s + c.total_compressed_size for s, c in zip(starts, columns, strict=True)), default=0))


@dataclass(frozen=True)
class StoredUnit:
    """A complete unit opened for reading."""

    sequences: NDArray[np.void]
    """[sequences] of `SEQUENCE`."""
    tokens: NDArray[np.generic]
    """[tokens] ids."""
    kinds: NDArray[np.uint8] | None
    """[tokens]; None for plain text."""
    columns: NDArray[np.float32]
    """[sequences, columns] as `RecordReading.columns` names them."""
    folder: Path
    media: NDArray[np.int64] | None = None
    """[tokens] what the sidecar of banks says; None: there are no media."""

    def buckets(self) -> NDArray[np.str_]:
        """Return the bucket of each sequence, [sequences]; "" where there are none."""
        file = self.folder / "buckets"
        if not file.exists():
            return np.full(len(self.sequences), "")
        return np.array(file.read_text(encoding="utf-8").split("\n")[:-1], dtype=np.str_)

    def bad_rows(self) -> Iterator[dict[str, Any]]:
        with open(self.folder / "bad", encoding="utf-8") as f:
            yield from map(json.loads, f)


def open_unit(work: Path, key: str, dtype: str) -> StoredUnit:
    """Open a complete unit by memory map."""
    folder = part_folder(work, key)

    def mapped(name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return a file's items; an empty file cannot be mapped."""
        file = folder / name
        return np.memmap(file, dtype, "r") if file.stat().st_size else np.zeros(0, dtype)

    kinds = mapped("kinds", np.dtype(np.uint8)) if (folder / "kinds").exists() else None
    sequences = mapped("sequences", SEQUENCE)
    columns = mapped("columns", np.dtype("<f4")) if (folder / "columns").exists() else np.zeros(0, "<f4")
    return StoredUnit(sequences, mapped("tokens", np.dtype(dtype).newbyteorder("<")), kinds,
                      columns.reshape(len(sequences), len(columns) // max(1, len(sequences))), folder,
                      mapped(FEATURES, np.dtype("<i8")) if (folder / FEATURES).exists() else None)


def encode_units(units: list[Unit], settings: UnitSettings, work: Path,
                 workers: int) -> Generator[UnitRecord, None, None]:
    """Yield the record of each unit, in order; what is there already is kept.

    Processes and not threads: two threads are as quick (benchmarks/data_pack.py), but about a third of the
    work, reading JSON and making arrays, holds Python's lock, so more than three would wait for one another.

    Raises:
        UserError: a file cannot be read, the disk refuses, or a worker was ended from outside.
    """
    yield from map_in_processes(_unit_encoder, (settings, work), units, workers)


def _unit_encoder(settings: UnitSettings, work: Path) -> Callable[[Unit], UnitRecord]:
    return UnitEncoder(settings, work).encode
