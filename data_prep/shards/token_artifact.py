"""Read token shard artifacts: manifest, shards, indexed splits, and documents shared between splits."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sov.base.artifacts import Manifest, read_manifest
from megatron_sov.base.documents.shard_files import (
    DTYPE_CODES, FEATURE_DTYPE, FEATURES, HEADER, MAGIC, VERSION, check_token_manifest)
from megatron_sov.base.errors import Fix, UserError, find_nearest_name

TRAIN, HELDOUT = "train", "heldout"
SPLITS = (TRAIN, HELDOUT)
KIND = "tokens"
QUARANTINE = "quarantine.jsonl"
SMALLEST_INT32_VOCAB = 65500
"""Megatron's `DType.optimal_dtype`: smaller vocabularies fit uint16 with room for reserved ids."""
SIDECARS = {"loss": "float32", "type": "uint8", "kind": "uint8"}
"""File ending -> dtype of an entry per token: loss weight, token type, mark for chats (`chat.marks`)."""
COLUMN_DTYPE = "float32"
"""Dtype for user columns, each a sidecar named after its column."""

ArtifactContent = tuple[Path, dict[str, Any]]
"""A folder with token shards, and its manifest's content."""


@dataclass(frozen=True)
class PackedShard:
    """A shard with its manifest records."""

    source: dict[str, Any]
    """The source's manifest record."""
    split: str
    """"train" or "heldout"."""
    prefix: Path
    """Path without file ending."""
    record: dict[str, Any]
    """The shard's manifest record."""

    def open(self) -> "IndexedSplit":
        """Memory-map the shard; raises `UserError` if files are missing or damaged."""
        return open_split(self.prefix)


@dataclass(frozen=True)
class IndexedSplit:
    """A memory-mapped shard."""

    dtype: str
    lengths_tokens: NDArray[np.int32]
    """int32 [documents], tokens per document."""
    starts_bytes: NDArray[np.int64]
    """int64 [documents], document offsets in `.bin`."""
    tokens: NDArray[np.generic]
    """[tokens] ids."""

    def documents(self) -> Iterator[NDArray[np.generic]]:
        item_bytes = np.dtype(self.dtype).itemsize
        for start_bytes, length in zip(self.starts_bytes.tolist(), self.lengths_tokens.tolist(), strict=True):
            yield self.tokens[start_bytes // item_bytes : start_bytes // item_bytes + length]


def read_tokens_manifest(data: Path) -> Manifest:
    """Read the manifest of an artifact of kind "tokens". Raises `UserError`: another kind of folder, or an
    invalid manifest."""
    manifest = read_manifest(data, KIND)
    check_token_manifest(str(data), manifest.content)
    return manifest


def count_tokens(content: dict[str, Any]) -> int:
    return sum(split["num_tokens"] for source in content["sources"] for split in source["splits"].values())


def iter_shards(data: Path, content: dict[str, Any], source: str | None = None,
                split: str | None = None) -> Iterator[PackedShard]:
    """Yield shards in order, optionally from a single source or split. Raises `UserError`: unknown source."""
    names = [s["name"] for s in content["sources"]]
    if source is not None and source not in names:
        nearest = names[0] if len(names) == 1 else find_nearest_name(source, names)
        raise UserError(f"--source {source!r}: {data} has no such source (sources: {', '.join(names)})",
                        Fix(options=("--source", nearest)) if nearest else None)
    for source_record in content["sources"]:
        if source not in (None, source_record["name"]):
            continue
        for name in SPLITS if split is None else (split,):
            for record in source_record["splits"].get(name, {"shards": []})["shards"]:
                yield PackedShard(source_record, name, data / record["prefix"], record)


def get_sidecars(kind: str, columns: Sequence[str] = (), has_media: bool = False) -> dict[str, str]:
    """Return ending -> dtype for the sidecars of a source with documents of a kind in `documents.KINDS`."""
    sidecars: dict[str, str] = {}
    if kind != "text":
        sidecars = dict(SIDECARS)
        if kind != "chat":
            del sidecars["kind"]
    if has_media:
        # the loss ignores feature placeholders, so texts with media need weights too
        sidecars |= {"loss": SIDECARS["loss"], FEATURES: FEATURE_DTYPE}
    return sidecars | dict.fromkeys(columns, COLUMN_DTYPE)


def choose_token_dtype(vocab_size: int) -> str:
    """Return Megatron's dtype for token ids in a vocabulary."""
    return "uint16" if vocab_size < SMALLEST_INT32_VOCAB else "int32"


def open_split(prefix: Path) -> IndexedSplit:
    """Memory-map a shard of an artifact. Raises `UserError`: a missing file, or index and tokens disagree."""
    split, bounds = open_pair(prefix, "pack the data again or restore it from a copy")
    if not np.array_equal(bounds, np.arange(len(bounds))) or not (split.lengths_tokens > 0).all():
        raise UserError(f"{prefix}.idx: has documents of several sequences, or without tokens; pack the data "
                        "again")
    return split


def open_pair(prefix: Path, remedy: str) -> tuple[IndexedSplit, NDArray[np.int64]]:
    """Memory-map `PREFIX.bin` from us, Megatron-LM, Megatron-Bridge or NeMo, and check every number in
    `PREFIX.idx`.

    Args:
        prefix: path without endings.
        remedy: end of messages, with the fix.

    Returns:
        Sequences, and document bounds int64 [documents + 1] in sequences.

    Raises:
        UserError: a missing file, another version or dtype, or an index that contradicts `.bin`.
    """
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    try:
        raw: NDArray[np.uint8] = np.zeros(0, np.uint8)
        if index.stat().st_size:
            raw = np.memmap(index, np.uint8, mode="r")
        size_bytes = tokens.stat().st_size
    except OSError as e:
        raise UserError(f"{e.filename}: cannot be read ({e.strerror}); {remedy}") from None
    dtype, num_sequences, num_bounds = _read_header(index, raw, remedy)
    # layout: header, int32 lengths and int64 starts of sequences, int64 bounds of documents
    lengths = np.frombuffer(raw, "<i4", num_sequences, HEADER.size)
    starts = np.frombuffer(raw, "<i8", num_sequences, HEADER.size + 4 * num_sequences)
    bounds = np.frombuffer(raw, "<i8", num_bounds, HEADER.size + 12 * num_sequences)
    if num_sequences and int(lengths.min()) < 0:
        raise UserError(f"{index}: sequence {int(lengths.argmin())} has {lengths.min()} tokens; {remedy}")
    # a gap between sequences would shift later tokens
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    expected_starts = ends - lengths.astype(np.int64) * dtype.itemsize
    wrong = np.flatnonzero(starts != expected_starts)
    if len(wrong):
        raise UserError(f"{index}: sequence {wrong[0]} begins at byte {starts[wrong[0]]}, and the one "
                        f"before it ends at {expected_starts[wrong[0]]}; {remedy}")
    # compared, not subtracted: differences of hostile numbers overflow
    if not num_bounds or bounds[0] != 0 or bounds[-1] != num_sequences or (bounds[1:] < bounds[:-1]).any():
        raise UserError(f"{index}: its document bounds do not go from 0 to its {num_sequences} sequences in "
                        f"order; {remedy}")
    expected_bytes = int(ends[-1]) if num_sequences else 0
    if size_bytes != expected_bytes:
        raise UserError(f"{tokens}: has {size_bytes} bytes, the index says {expected_bytes}; {remedy}")
    ids = np.memmap(tokens, dtype.newbyteorder("<"), mode="r") if expected_bytes else np.zeros(0, dtype)
    return IndexedSplit(dtype.name, lengths, starts, ids), bounds


def _read_header(index: Path, raw: NDArray[np.uint8], remedy: str) -> tuple[np.dtype[np.generic], int, int]:
    """Return dtype, number of sequences and number of document bounds."""
    if len(raw) < HEADER.size or bytes(raw[:len(MAGIC)]) != MAGIC:
        raise UserError(f"{index}: is no index of Megatron's indexed datasets; {remedy}")
    _, version, code, num_sequences, num_bounds = HEADER.unpack_from(bytes(raw[:HEADER.size]))
    dtypes = {c: name for name, c in DTYPE_CODES.items()}
    if version != VERSION or code not in dtypes:
        raise UserError(f"{index}: has version {version} and dtype code {code}; only version {VERSION} with "
                        f"ids of {' or '.join(DTYPE_CODES)} is read")
    expected_bytes = HEADER.size + 12 * num_sequences + 8 * num_bounds
    if len(raw) == expected_bytes + num_sequences and num_sequences:
        raise UserError(f"{index}: is of text and images (it has a mode for each sequence), which is not "
                        "read; name a pair of text")
    if len(raw) != expected_bytes:
        raise UserError(f"{index}: has {len(raw)} bytes, which does not fit its {num_sequences} sequences "
                        f"and {num_bounds} document bounds; {remedy}")
    return np.dtype(dtypes[code]), num_sequences, num_bounds


def hash_token_documents(split: IndexedSplit, group: int,
                         lengths_tokens: NDArray[np.int64] | None = None) -> list[int]:
    """Return a 64-bit hash of each document's ids. `group`: sequences per document (2 for preferences);
    `lengths_tokens`: restrict to documents with these lengths."""
    starts = split.starts_bytes[::group] // np.dtype(split.dtype).itemsize
    # adjacent sequences: a document ends at the start of the next
    stops = np.append(starts[1:], len(split.tokens)) if len(starts) else starts
    if lengths_tokens is not None:
        has_length = np.isin(stops - starts, lengths_tokens)
        starts, stops = starts[has_length], stops[has_length]
    return [
        int.from_bytes(hashlib.blake2b(split.tokens[start:stop].tobytes(), digest_size=8).digest(), "little")
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]


def check_overlap(parts: list[ArtifactContent]) -> None:
    """Check that no part trains on a document that another part holds out.

    Parts packed by the same held-out rule agree and are not read. Otherwise hash held-out documents first,
    then training documents of the same lengths. Raises `UserError`: number and folders of overlapping
    documents."""
    rules = [content.get("heldout") for _, content in parts]
    if all(rule is not None and rule == rules[0] for rule in rules):
        return
    heldout: dict[int, Path] = {}
    lengths: set[int] = set()
    for path, split, group in _iter_splits(parts, HELDOUT):
        heldout |= dict.fromkeys(hash_token_documents(split, group), path)
        lengths |= set(split.lengths_tokens.reshape(-1, group).sum(axis=1).tolist())
    # training data is far larger: hash only documents with a held-out document's length
    heldout_lengths = np.array(sorted(lengths), np.int64)
    overlaps: Counter[tuple[Path, Path]] = Counter()
    for path, split, group in _iter_splits(parts, TRAIN):
        hashes = hash_token_documents(split, group, heldout_lengths)
        overlaps.update((heldout[number], path) for number in hashes if number in heldout)
    if overlaps:
        (heldout_path, train_path), count = next(iter(overlaps.items()))
        raise UserError(f"{train_path}: trains on {count} documents that {heldout_path} holds out; pack both "
                        "with one `sov-data pack`, which keeps such twins on one side, or both with the same "
                        "--heldout, so large that each source gives up documents of its own accord")


def _iter_splits(parts: list[ArtifactContent], split: str) -> Iterator[tuple[Path, IndexedSplit, int]]:
    for path, content in parts:
        for shard in iter_shards(path, content, split=split):
            yield path, shard.open(), int(shard.source["group_documents"])


def format_table(data: Path) -> list[str]:
    """Return table lines with counts per source and split. Raises `UserError`: `data` is not an artifact of
    kind "tokens"."""
    content = read_tokens_manifest(data).content
    lines = [f"{data}: vocabulary {content['vocab_size']:,}, {content['dtype']}, "
             f"tokenizer {content['tokenizer_sha256'][:12]}",
             f"{'source':<20} {'format':<10} {'split':<8} {'shards':>6} {'documents':>12} {'tokens':>16} "
             f"{'bytes':>16} {'bytes/token':>12}"]
    for source in content["sources"]:
        for split in (TRAIN, HELDOUT):
            s = source["splits"][split]
            ratio = f"{s['num_bytes'] / s['num_tokens']:.3f}" if s["num_tokens"] else "-"
            counts = (f"{len(s['shards']):>6} {s['num_documents']:>12,} {s['num_tokens']:>16,} "
                      f"{s['num_bytes']:>16,}")
            lines.append(f"{source['name']:<20} {source['format']:<10} {split:<8} {counts} {ratio:>12}")
    return lines
