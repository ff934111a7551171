"""An artifact of token shards as its readers see it, and which documents are held out: a function of their
text alone, so that duplicates, and answers to one prompt, land on the same side."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sov.base.artifacts import Manifest, read_manifest
from megatron_sov.base.documents import Document
from megatron_sov.base.documents.shard_files import (
    DTYPE_CODES, FEATURE_DTYPE, FEATURES, HEADER, MAGIC, VERSION)
from megatron_sov.base.errors import Fix, UserError, find_nearest_name

TRAIN, HELDOUT = "train", "heldout"
SPLITS = (TRAIN, HELDOUT)
_HASH_RANGE = 1 << 64


def hash_document(document: Document) -> int:
    """Return a 64-bit hash of a document's content; of a preference or a prompt, and of a chat that says how
    much of it is one, of the prompt, whose variants stay together.

    Text is hashed in composed Unicode form, because a tokenizer that composes makes such
    twins one and the same.
    """
    digest = hashlib.blake2b(digest_size=8)
    # Responses to one prompt have one hash: none is held out while another is trained on.
    messages = document.messages[:document.num_prompt or None]
    contents = [text for m in messages for text in m.texts()] or [document.text]
    for part in (*(m.role for m in messages), *contents):
        raw = unicodedata.normalize("NFC", part).encode()
        # Lengths keep parts apart: "ab", "c" is not "a", "bc".
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return int.from_bytes(digest.digest(), "little")


class HeldoutRule:
    """Holds out the documents whose hash falls below the share, from each source of two or more at least
    one, and of none all: the document with the largest hash stays to be trained on."""

    def __init__(self, share: float) -> None:
        """`share`: expected part of all documents, in [0, 1)."""
        self.share, self.threshold = share, int(share * _HASH_RANGE)
        self.chosen: set[int] = set()
        """Hashes that are held out although they lie above the threshold."""
        self.kept: set[int] = set()
        """Hashes that are trained on although they lie below it, or a twin was chosen."""

    def learn_source(self, smallest: int, largest: int) -> None:
        """Take note of a source's smallest and largest document hash:
        a small source gives up its smallest."""
        # No document of the source is below the threshold: it gives up the nearest one.
        if self.threshold and smallest >= self.threshold and smallest != largest:
            self.chosen.add(smallest)

    def keep_one(self, largest: int) -> bool:
        """Keep a source's document for training where it would be held out, and with it all others, since
        its hash is their largest; called when all sources are known.  Returns whether that was so."""
        is_last = largest < self.threshold or largest in self.chosen
        if is_last:
            self.kept.add(largest)
        return is_last

    def to_dict(self) -> dict[str, Any]:
        """Return the rule as the manifest keeps it: what was packed by the same one holds the same
        documents out."""
        return {"share": self.share, "chosen": sorted(self.chosen),
                **({"kept": sorted(self.kept)} if self.kept else {})}

    def is_heldout(self, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        chosen, kept = (np.array(sorted(some), np.uint64) for some in (self.chosen, self.kept))
        found: NDArray[np.bool_] = (hashes < self.threshold) | np.isin(hashes, chosen)
        # What is kept goes before what is chosen: a source must be left with something to train on.
        return found & ~np.isin(hashes, kept)


KIND = "tokens"
CONTENT_VERSION = 2
"""Layout of the manifest's content: since 2 a split is a list of shards, and formats stand beside sources."""
QUARANTINE = "quarantine.jsonl"


@dataclass(frozen=True)
class PackedShard:
    source: dict[str, Any]
    """The manifest's record of its source."""
    split: str
    """"train" or "heldout"."""
    prefix: Path
    """Its files without their endings."""
    record: dict[str, Any]

    def open(self) -> IndexedSplit:
        """Open it by memory map.

        Raises:
            UserError: its files are missing or damaged.
        """
        return open_split(self.prefix)


def read_tokens_manifest(data: Path) -> Manifest:
    """Return the manifest of an artifact of kind "tokens".

    Raises:
        UserError: `data` is no such artifact, or of another layout.
    """
    manifest = read_manifest(data, KIND)
    if (found := manifest.content.get("content_version", 1)) != CONTENT_VERSION:
        raise UserError(f"{data}: was packed in layout {found}, this version reads layout {CONTENT_VERSION}; "
                        "pack the data again")
    return manifest


def count_tokens(content: dict[str, Any]) -> int:
    return sum(split["num_tokens"] for source in content["sources"] for split in source["splits"].values())


def iter_shards(data: Path, content: dict[str, Any], source: str | None = None,
              split: str | None = None) -> Iterator[PackedShard]:
    """Yield the shards of an artifact, or of one source or split, in order.

    Raises:
        UserError: it has no such source.
    """
    names = [s["name"] for s in content["sources"]]
    if source is not None and source not in names:
        nearest = names[0] if len(names) == 1 else find_nearest_name(source, names)
        raise UserError(f"--source {source!r}: {data} has no such source (sources: {', '.join(names)})",
                        Fix(options=("--source", nearest)) if nearest else None)
    for described in content["sources"]:
        if source in (None, described["name"]):
            for name in SPLITS:
                if split in (None, name):
                    for record in described["splits"][name]["shards"]:
                        yield PackedShard(described, name, data / record["prefix"], record)


# Megatron-Core's indexed token format as it is written and read (`documents.shard_files`).


SMALLEST_INT32_VOCAB = 65500
"""Megatron's DType.optimal_dtype: vocabularies below it fit uint16 with room for ids of its own."""
SIDECARS = {"loss": "float32", "type": "uint8", "kind": "uint8"}
"""Files of the same geometry as .bin: the weight of each token in the loss, the token's type, and, of chats,
what it is learned as (`chat.marks`)."""
COLUMN_DTYPE = "float32"
"""Of the other sidecars: columns, each a file of its name."""


def get_sidecars(kind: str, columns: Sequence[str] = (), has_media: bool = False) -> dict[str, str]:
    """Return ending -> dtype of the sidecars of a source of that kind (one of `documents.KINDS`)."""
    own = {} if kind == "text" else {n: d for n, d in SIDECARS.items() if n != "kind" or kind == "chat"}
    # placeholders of features weigh nothing, in texts too
    media = {"loss": SIDECARS["loss"], FEATURES: FEATURE_DTYPE} if has_media else {}
    return own | media | dict.fromkeys(columns, COLUMN_DTYPE)


def choose_token_dtype(vocab_size: int) -> str:
    """Return the dtype of token ids that Megatron chooses for a vocabulary."""
    return "uint16" if vocab_size < SMALLEST_INT32_VOCAB else "int32"


@dataclass(frozen=True)
class IndexedSplit:
    """One split opened for reading by memory map."""

    dtype: str
    lengths_tokens: NDArray[np.int32]
    """Tokens of each document, [documents]."""
    starts_bytes: NDArray[np.int64]
    """Where each document begins in .bin, [documents]."""
    tokens: NDArray[np.generic]
    """All ids, [tokens]."""

    def documents(self) -> Iterator[NDArray[np.generic]]:
        item_bytes = np.dtype(self.dtype).itemsize
        for start_bytes, length in zip(self.starts_bytes.tolist(), self.lengths_tokens.tolist(), strict=True):
            yield self.tokens[start_bytes // item_bytes : start_bytes // item_bytes + length]


def open_split(prefix: Path) -> IndexedSplit:
    """Open a split, with every number of the index checked against the files.

    Raises:
        UserError: a file is missing, or the index is not a sound one for the .bin beside it.
    """
    index = Path(f"{prefix}.idx")
    try:
        raw = index.read_bytes()
        size_bytes = Path(f"{prefix}.bin").stat().st_size
    except OSError as e:
        raise UserError(f"{e.filename}: cannot be read ({e.strerror}); pack the data again or restore "
                        "it from a copy") from None
    if len(raw) < HEADER.size:
        raise UserError(f"{index}: has {len(raw)} bytes, an index has at least {HEADER.size}; "
                        "pack the data again")
    magic, version, code, num_sequences, num_bounds = HEADER.unpack_from(raw)
    dtypes = {c: name for name, c in DTYPE_CODES.items()}
    if magic != MAGIC or version != VERSION or code not in dtypes:
        raise UserError(f"{index}: is no index of version {VERSION} with ids of {' or '.join(DTYPE_CODES)}; "
                        "pack the data again")
    if len(raw) != HEADER.size + 12 * num_sequences + 8 * num_bounds:
        raise UserError(f"{index}: has {len(raw)} bytes, which does not fit its {num_sequences} sequences; "
                        "pack the data again")
    dtype = np.dtype(dtypes[code])
    lengths = np.frombuffer(raw, "<i4", num_sequences, HEADER.size)
    starts = np.frombuffer(raw, "<i8", num_sequences, HEADER.size + 4 * num_sequences)
    bounds = np.frombuffer(raw, "<i8", num_bounds, HEADER.size + 12 * num_sequences)
    # The same numbers twice in an index: each is checked against the other, and both against the .bin.
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    if not np.array_equal(bounds, np.arange(num_sequences + 1)) or (lengths <= 0).any() or \
            not np.array_equal(starts, ends - lengths.astype(np.int64) * dtype.itemsize):
        raise UserError(f"{index}: its documents do not follow one another without gaps; pack the data again")
    expected_bytes = int(ends[-1]) if num_sequences else 0
    if size_bytes != expected_bytes:
        raise UserError(f"{prefix}.bin: has {size_bytes} bytes, the index says {expected_bytes}; "
                        "pack the data again")
    tokens = (np.memmap(f"{prefix}.bin", dtype.newbyteorder("<"), mode="r") if num_sequences
              else np.zeros(0, dtype))
    return IndexedSplit(dtype.name, lengths, starts, tokens)


# Documents compared token by token: repeats, and held-out documents that are trained on.


Described = tuple[Path, dict[str, Any]]
"""A folder of token shards and its manifest's content."""


def hash_token_documents(split: IndexedSplit, group: int,
                    lengths_tokens: NDArray[np.int64] | None = None) -> list[int]:
    """Return 64 bits for each document's ids.

    Args:
        split: the documents.
        group: sequences of a document: those of a preference are one.
        lengths_tokens: only of documents as long as one of these; None: of all.
    """
    starts = split.starts_bytes[::group] // np.dtype(split.dtype).itemsize
    # Sequences of a document are neighbours: it ends where the next begins.
    stops = np.append(starts[1:], len(split.tokens)) if len(starts) else starts
    if lengths_tokens is not None:
        kept = np.isin(stops - starts, lengths_tokens)
        starts, stops = starts[kept], stops[kept]
    return [
        int.from_bytes(hashlib.blake2b(split.tokens[start:stop].tobytes(), digest_size=8).digest(), "little")
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]


def check_overlap(parts: list[Described]) -> None:
    """Refuse parts of which one trains on what another holds out.

    Parts that were packed by one rule, a share without exceptions, hold the same documents out; others are
    looked through: held-out documents first, then those to train on that are as long as one of them.

    Raises:
        UserError: with the number of such documents, and where they are.
    """
    rules = [content.get("heldout") for _, content in parts]
    # Under one rule the same text is on the same side in all parts.
    if all(rule is not None and rule == rules[0] for rule in rules):
        return
    held: dict[int, Path] = {}
    lengths: set[int] = set()
    for path, split, group in _splits(parts, HELDOUT):
        held |= dict.fromkeys(hash_token_documents(split, group), path)
        # Only documents of these lengths need hashing on the other side: training data is far larger.
        lengths |= set(split.lengths_tokens.reshape(-1, group).sum(axis=1).tolist())
    wanted = np.array(sorted(lengths), np.int64)
    found: dict[tuple[Path, Path], int] = {}
    for path, split, group in _splits(parts, TRAIN):
        for number in hash_token_documents(split, group, wanted):
            if number in held:
                pair = (held[number], path)
                found[pair] = found.get(pair, 0) + 1
    if found:
        (one, other), count = next(iter(found.items()))
        raise UserError(f"{other}: trains on {count} documents that {one} holds out; pack both with one "
                        "`sov-data pack`, which keeps such twins on one side, or both with the same "
                        "--heldout, so large that each source gives up documents of its own accord")


def _splits(parts: list[Described], split: str) -> Iterator[tuple[Path, IndexedSplit, int]]:
    for path, content in parts:
        for shard in iter_shards(path, content, split=split):
            yield path, shard.open(), int(shard.source["group_documents"])


def format_table(data: Path) -> list[str]:
    """Return the lines of the table.

    Raises:
        UserError: `data` is not an artifact of kind "tokens".
    """
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
