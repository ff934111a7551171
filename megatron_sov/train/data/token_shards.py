"""Memory-mapped token shards (Megatron-Core's `.bin` and `.idx`, with sidecars), and the sources in token
artifacts."""

from __future__ import annotations

import contextlib
import errno
import mmap
import re
import resource
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_sov.base.artifacts import manifest_sha256, read_manifest
from megatron_sov.base.documents.shard_files import (
    DAMAGED, FEATURE_DTYPE, FEATURES, PER_DOCUMENT, ROUTES, WRITTEN, RouteShape, unpack_flags)
from megatron_sov.base.errors import Fix, UserError, warn
from megatron_sov.chat.encode import TYPE_PROMPT, TYPE_RESPONSE
from megatron_sov.chat.marks import KIND
from megatron_sov.chat.vocabulary import find_difference
from megatron_sov.model.config.data import split_source_name
from megatron_sov.model.modality import (
    NO_BANKS, Banks, EncoderInputs, get_encoder_inputs, load_modality, read_banks)
from megatron_sov.runs.launch_environment import is_first_rank
from megatron_sov.train.data.token_manifest import check_token_manifest

IDX_MAGIC = b"MMIDIDX\x00\x00"
IDX_DTYPES: dict[int, type[np.generic]] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64,
                                           6: np.float64, 7: np.float32, 8: np.uint16}
"""Dtype codes in the `.idx` header, as in `megatron.core.datasets.indexed_dataset`."""
_HEADER_BYTES = len(IDX_MAGIC) + 8 + 1 + 8 + 8
TEXTS = ("text", "chat")
"""Data formats with a loss on single tokens."""
COMMANDS_BY_FORMAT = {"text": "`megatron-sov pretrain` learns from text",
                      "chat": "`megatron-sov sft` learns from chats",
                      "preference": "`megatron-sov prefer` learns from pairs of responses",
                      "prompt": "`megatron-sov rl run` takes a file of prompts, unpacked, as --prompts"}
"""Data format -> sentence about the command that trains on it."""
NO_COLUMNS = ("loss", "type", WRITTEN, ROUTES, FEATURES)
"""Sidecars that are not columns with a number per label."""
COLUMN_DTYPES = {KIND: np.dtype(np.uint8)}
"""Column -> dtype other than float32."""
CONTENT_VERSION = 2
"""Supported `content_version` in token manifests."""


@dataclass(frozen=True)
class Source:
    """A named source in a token artifact, with training and held-out documents."""

    name: str
    """Name in blends, events and the report."""
    artifact: Path | None
    """Token artifact folder; None if `train_documents` are built in memory."""
    format: str
    """Data format: "text", "chat", "prompt", "rollouts" (`data.rounds`), or "preference", with chosen and
    rejected response to a prompt in documents 2i and 2i + 1."""
    prefixes: dict[str, tuple[str, ...]]
    """Split ("train", "heldout") -> shard prefixes inside the artifact."""
    num_tokens: dict[str, int]
    """Split -> tokens."""
    share: float
    """Share in an empty blend; the sum over sources is 1."""
    train_documents: Documents | None = None
    """Training documents that replace the artifact's training split."""
    vocab_size: int = sys.maxsize
    """Tokenizer vocabulary size."""
    columns: tuple[str, ...] = ()
    """Columns in the shards, in addition to loss weights and types."""
    group: int = 1
    """Consecutive documents per unit: 2 for preference pairs, else 1."""
    tokenizer: Path | None = None
    """Tokenizer folder; by default the artifact's folder `tokenizer`."""
    routes: RouteShape | None = None
    """Shape for recorded expert routes; None for documents without routes."""
    banks: Banks = field(default_factory=dict)
    """Kind -> bank with pictures or sounds whose features replace placeholder tokens."""

    @property
    def is_chat(self) -> bool:
        """Whether documents have loss weights and are never split over rows."""
        return self.format != "text"

    def open_split(self, split: str) -> Documents:
        """Open the documents in the split "train" or "heldout"."""
        if self.train_documents is not None and split == "train":
            return self.train_documents
        if self.artifact is None:
            raise ValueError(f"source {self.name} has neither an artifact nor documents")
        return ShardChain([self.artifact / prefix for prefix in self.prefixes[split]], self.vocab_size,
                          self.columns, self.routes, self.banks)


def open_sources(paths: dict[str, float], vocab_size: int,
                 formats: tuple[str, ...] | None = TEXTS, *, warns: bool = True, is_fixed: bool = False
                 ) -> list[Source]:
    """Open the sources in token artifacts, and check that they fit each other and the model.

    `paths` maps [NAME=]folder to a weight: NAME renames a single source, and several become NAME-SOURCE.
    `vocab_size` belongs to the model; `is_fixed` means that it cannot be set. `formats` are supported values
    of `Source.format` (None: any). `warns=False` omits `warn_about_heldout_rules`.

    Raises `UserError` if `paths` is empty, tokenizers differ, two sources have one name, or a tokenizer has
    more ids than the model.
    """
    if not paths:
        raise UserError("data.paths is empty: pass at least one folder made by `sov-data pack` "
                        "with --data DIR")
    manifests = {path: read_manifest(split_source_name(path)[1], "tokens") for path in paths}
    for path, manifest in manifests.items():
        if manifest.content.get("content_version") != CONTENT_VERSION:
            raise UserError(f"{path}: was packed in layout {manifest.content.get('content_version', 1)}, "
                            f"this version reads layout {CONTENT_VERSION}; pack the data again")
    for path, manifest in manifests.items():
        check_token_manifest(path, manifest.content)
    hashes = {path: m.content["tokenizer_sha256"] for path, m in manifests.items()}
    first = next(iter(paths))
    for path, value in hashes.items():
        folders = [Path(split_source_name(shards)[1]) / "tokenizer" for shards in (path, first)]
        if value != hashes[first] and (problem := find_difference(*folders)):
            raise UserError(f"{path}: was packed with tokenizer {value[:12]}, {first} with "
                            f"{hashes[first][:12]} ({problem}); pack all data with the same tokenizer")
    if warns:
        warn_about_heldout_rules({path: m.content for path, m in manifests.items()})
    total_weight = sum(paths.values())
    if total_weight <= 0:
        raise UserError(f"--data weights {list(paths.values())}: at least one must be positive")
    sources: list[Source] = []
    for path, manifest in manifests.items():
        if manifest.content["vocab_size"] > vocab_size:
            fix = "pack with the model's own tokenizer" if is_fixed else (
                "set model.vocab_size or pack with another tokenizer")
            raise UserError(f"{path}: its tokenizer has {manifest.content['vocab_size']} ids, the model only "
                            f"model.vocab_size = {vocab_size}; {fix}")
        sources += _build_sources(path, manifest.content, paths[path] / total_weight, formats)
    artifacts: dict[str, Path | None] = {}
    for source in sources:
        if source.name in artifacts:
            raise UserError(f"source {source.name!r}: is in --data {artifacts[source.name]} and in "
                            f"{source.artifact}; name one of the folders, as --data NAME={source.artifact}")
        artifacts[source.name] = source.artifact
    return sources


class TokenShard:
    """Documents in a token shard; the time to open a shard does not depend on its size."""

    def __init__(self, prefix: Path, vocab_size: int = sys.maxsize, columns: tuple[str, ...] = (),
                 routes: RouteShape | None = None, banks: Banks = NO_BANKS) -> None:
        """Map the files `prefix` + suffix.

        `columns` are suffixes of column files (`PER_DOCUMENT`: a number per document), `routes` is the shape
        of `.routes`, and `banks` maps a kind to its bank of pictures or sounds. Raises `UserError` if a file
        is damaged or this process has too many open files.
        """
        self.prefix, self._vocab_size = prefix, vocab_size
        self._opened_by = prefix, vocab_size, columns, routes, banks
        try:
            index = read_index(self._get_file(".idx"))
            self.dtype, self.lengths, self.pointers = index.dtype, index.lengths, index.pointers
            self._num_tokens = index.num_tokens
            self._tokens = self._map_sidecar(".bin", self.dtype)
            self._loss = self._map_optional(".loss", np.float32)
            self._type = self._map_optional(".type", np.uint8)
            written = self._get_file(f".{WRITTEN}")
            self._written = None
            if written.exists():
                self._written = map_numbers(written, np.dtype(np.uint8), -(-self._num_tokens // 8))
            self._columns: dict[str, np.ndarray] = {}
            self._document_columns: dict[str, np.ndarray] = {}
            for name in columns:
                if name.endswith(PER_DOCUMENT):
                    self._document_columns[name.removesuffix(PER_DOCUMENT)] = map_numbers(
                        self._get_file(f".{name}"), np.dtype(np.float32), len(self.lengths))
                else:
                    dtype = COLUMN_DTYPES.get(name, np.dtype(np.float32))
                    self._columns[name] = self._map_sidecar(f".{name}", dtype)
            self.columns, self._route_shape = list_column_names(columns), routes
            if routes is not None:
                row = np.dtype((routes.dtype, (routes.layers, routes.top_k)))
                self._routes = self._map_sidecar(f".{ROUTES}", row)
            self.banks = banks
            if banks:
                self._features = self._map_features()
                self._bank_reader = load_modality().open_banks(prefix, banks)
            self.is_plain = self._loss is None and self._type is None and self._written is None
        except OSError as e:
            if e.errno == errno.EMFILE:
                raise UserError(f"{prefix}: this process may not open more than "
                                f"{resource.getrlimit(resource.RLIMIT_NOFILE)[0]} files; raise `ulimit -n`, "
                                "or pack into larger shards (--shard-tokens)") from None
            raise UserError(f"{prefix}: cannot be read as a token shard ({e}); pack the data again") from None
        except (IndexError, KeyError, ValueError) as e:
            raise UserError(f"{prefix}: cannot be read as a token shard ({e}); pack the data again") from None

    def __reduce__(self) -> tuple[Any, ...]:  # another process maps the files again
        return TokenShard, self._opened_by

    def _get_file(self, suffix: str) -> Path:
        return self.prefix.with_name(self.prefix.name + suffix)

    def _map_sidecar(self, suffix: str, dtype: np.dtype) -> np.ndarray:
        return map_numbers(self._get_file(suffix), dtype, self._num_tokens)

    def _map_optional(self, suffix: str, dtype: type[np.generic]) -> np.ndarray | None:
        return self._map_sidecar(suffix, np.dtype(dtype)) if self._get_file(suffix).exists() else None

    def _map_features(self) -> np.ndarray:
        try:
            return self._map_sidecar(f".{FEATURES}", np.dtype(FEATURE_DTYPE).newbyteorder("<"))
        except OSError as e:
            raise UserError(f"{self._get_file(f'.{FEATURES}')}: cannot be read ({e.strerror or e}); "
                            f"{DAMAGED}") from None

    def tokens(self, document: int, start: int, count: int) -> np.ndarray:
        """Return `count` token ids from `start` in a document, int64.

        Raises `UserError` if an id is outside the vocabulary, because a vocabulary-parallel embedding would
        ignore it.
        """
        ids: np.ndarray = self._tokens[self._get_range(document, start, count)].astype(np.int64)
        # as uint64, negative numbers are large
        if count and ids.view(np.uint64).max() >= self._vocab_size:
            wrong = next(int(i) for i in ids if not 0 <= i < self._vocab_size)
            raise UserError(f"{self._get_file('.bin')}: document {document} has token id {wrong}, and its "
                            f"tokenizer has {self._vocab_size} ids; {DAMAGED}")
        return ids

    def loss_weights(self, document: int, start: int, count: int) -> np.ndarray:
        """Return loss weights for tokens as targets, [count] float32; 1 without a sidecar."""
        if self._written is not None:
            return self._read_flags(document, start, count).astype(np.float32)
        if self._loss is None:
            return np.ones(count, np.float32)
        return self._loss[self._get_range(document, start, count)]

    def types(self, document: int, start: int, count: int) -> np.ndarray:
        """Return token types, [count] uint8: 0 text, 1 prompt, 2 response."""
        if self._written is not None:
            return np.where(self._read_flags(document, start, count), np.uint8(TYPE_RESPONSE),
                            np.uint8(TYPE_PROMPT))
        if self._type is None:
            return np.zeros(count, np.uint8)
        return self._type[self._get_range(document, start, count)]

    def column(self, name: str, document: int, start: int, count: int) -> np.ndarray:
        """Return numbers from a column for tokens as targets, [count] float32.

        Raises `UserError` if a number is not finite, because a NaN loss would name neither file nor column.
        """
        suffix = name
        if name in self._document_columns:
            suffix, numbers = name + PER_DOCUMENT, np.full(count, self._document_columns[name][document])
            numbers[self._read_flags(document, start, count) == 0] = 0
        else:
            numbers = self._columns[name][self._get_range(document, start, count)].astype(np.float32)
        if not np.isfinite(numbers).all():
            wrong = numbers[~np.isfinite(numbers)][0]
            raise UserError(f"{self._get_file(f'.{suffix}')}: document {document} has {wrong} in column "
                            f"{name!r}, must be a finite number; make the column again "
                            "(`sov-data verify` lists damaged files)")
        return numbers

    def routes(self, document: int, start: int, count: int) -> np.ndarray:
        """Return expert routes, [count, layers, top_k]. Raises `UserError` if a route is invalid."""
        routes = self._routes[self._get_range(document, start, count)]
        assert self._route_shape is not None
        if problem := self._route_shape.problem(routes):
            raise UserError(f"{self._get_file('.routes')}: document {document}, from token {start} on, "
                            f"{problem}; write the routes again")
        return routes

    def encoder_inputs(self, document: int, start: int, count: int) -> EncoderInputs:
        """Return encoder inputs for the tokens, with positions relative to `start`.

        Raises `UserError` if the bank lacks a feature, or a placeholder token has no feature.
        """
        features = self._features[self._get_range(document, start, count)]
        return self._bank_reader.inputs(self.tokens(document, start, count), features,
                                        f"{self._get_file(f'.{FEATURES}')}: document {document}")

    def _read_flags(self, document: int, start: int, count: int) -> np.ndarray:
        """Return 1 for tokens that a policy generated, else 0, [count] uint8."""
        if self._written is None:
            return np.ones(count, np.uint8)
        return unpack_flags(self._written, self._get_range(document, start, count).start, count)

    def _get_range(self, document: int, start: int, count: int) -> slice:
        first = int(self.pointers[document]) // self.dtype.itemsize + start
        if not 0 <= first <= first + count <= len(self._tokens):  # a slice beyond the end would be short
            raise UserError(f"{self._get_file('.idx')}: document {document} has {self.lengths[document]} "
                            f"tokens from byte {self.pointers[document]}, but the shard ends before; "
                            f"{DAMAGED}")
        return slice(first, first + count)


@dataclass(frozen=True)
class ShardIndex:
    """An `.idx` file's content."""

    dtype: np.dtype
    """Token id dtype."""
    lengths: np.ndarray
    """[documents] int32: tokens per document."""
    pointers: np.ndarray
    """[documents] int64: each document's first byte in `.bin`."""

    @property
    def num_tokens(self) -> int:
        if not len(self.lengths):
            return 0
        return int(self.pointers[-1]) // self.dtype.itemsize + int(self.lengths[-1])


def read_index(file: Path) -> ShardIndex:
    """Map an `.idx` file.

    Raises `UserError` if the file is not a Megatron index, and `IndexError`, `KeyError` or `ValueError` if it
    is damaged.
    """
    content = map_file(file)
    if content[:9] != IDX_MAGIC:
        raise UserError(f"{file}: is not a Megatron index (its first bytes are {content[:9]!r}); "
                        "pack the data again")
    count = int(np.frombuffer(content, np.uint64, 1, offset=18)[0])
    return ShardIndex(np.dtype(IDX_DTYPES[content[17]]),
                      np.frombuffer(content, np.int32, count, offset=_HEADER_BYTES),
                      np.frombuffer(content, np.int64, count, offset=_HEADER_BYTES + 4 * count))


def map_numbers(file: Path, dtype: np.dtype, count: int) -> np.ndarray:
    """Map a flat file with `count` numbers. Raises `UserError` if the file has a different size."""
    size_bytes, expected_bytes = file.stat().st_size, count * dtype.itemsize
    if size_bytes != expected_bytes:  # a slice beyond the end would silently be short
        raise UserError(f"{file}: has {size_bytes} bytes, its index requires {expected_bytes}; "
                        "pack the data again")
    return np.frombuffer(map_file(file), dtype)


def map_file(file: Path) -> mmap.mmap | bytes:
    """Map a file's bytes; return b"" for an empty file."""
    with open(file, "rb") as f:
        return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) if file.stat().st_size else b""


def raise_open_file_limit() -> None:
    """Raise `RLIMIT_NOFILE` to its hard limit, because each CPython mmap needs a file descriptor."""
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))


class Lengths(Protocol):
    """Tokens per document: an array, or a class with this part of an array's interface."""

    def __len__(self) -> int: ...
    def __getitem__(self, documents: Any, /) -> Any:
        """Return the token count for a document, or counts for an array."""
        ...

    def __iter__(self) -> Iterator[Any]: ...


class ChainedLengths:
    """Document lengths from several shards in sequence, read on access."""

    def __init__(self, parts: list[np.ndarray]) -> None:
        self.parts = parts
        self._ends = np.cumsum([len(p) for p in parts], dtype=np.int64).tolist()

    def locate(self, document: int) -> tuple[int, int]:
        """Return the part that contains a document, and the document's index there."""
        if not 0 <= document < self._ends[-1]:
            raise IndexError(f"document {document} of {self._ends[-1]}")
        part = bisect_right(self._ends, document)
        return part, document - (self._ends[part] - len(self.parts[part]))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, documents: Any) -> Any:
        if isinstance(documents, int):
            part, index = self.locate(documents)
            return int(self.parts[part][index])
        # by shard and ascending, so that each map is read once and in order
        order = np.argsort(documents)
        ascending = np.asarray(documents)[order]
        lengths = np.empty(len(order), np.int64)
        stops = np.searchsorted(ascending, self._ends)
        for part in np.flatnonzero(np.diff(stops, prepend=0)).tolist():
            chunk = slice(stops[part - 1] if part else 0, stops[part])
            first = self._ends[part] - len(self.parts[part])
            lengths[order[chunk]] = self.parts[part][ascending[chunk] - first]
        return lengths

    def __iter__(self) -> Iterator[int]:
        for part in self.parts:
            yield from part.tolist()


def list_column_names(endings: Iterable[str]) -> tuple[str, ...]:
    """Return column names from file suffixes."""
    return tuple(ending.removesuffix(PER_DOCUMENT) for ending in endings)


def warn_about_heldout_rules(contents: dict[str, dict[str, Any]]) -> None:
    """Warn if artifacts with one data format have different rules for held-out documents.

    A document may then be in the training split of an artifact and in the held-out split of another.
    """
    for kind in sorted({s["format"] for content in contents.values() for s in content["sources"]}):
        rules = {path: content.get("heldout") for path, content in contents.items()
                 if any(s["format"] == kind for s in content["sources"])}
        if any(rule != next(iter(rules.values())) for rule in rules.values()) and is_first_rank():
            warn(f"--data {', '.join(rules)}: documents were held out by different rules, so one folder may "
                 "train on another's held-out documents; join them by `sov-data mix`, which checks this")


class Documents(Protocol):
    """Documents in a source: a split's token shards, or documents built in memory."""

    @property
    def lengths(self) -> Lengths:
        """Tokens per document."""
        ...

    @property
    def is_plain(self) -> bool:
        """Whether every token has loss weight 1 and type 0, so that `build_row` reads neither."""
        ...

    def tokens(self, document: int, start: int, count: int) -> np.ndarray:
        """Return token ids, [count] int64."""
        ...

    def loss_weights(self, document: int, start: int, count: int) -> np.ndarray:
        """Return loss weights for tokens as targets, [count] float32."""
        ...

    def types(self, document: int, start: int, count: int) -> np.ndarray:
        """Return token types, [count] uint8."""
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        """Column names, in addition to loss weights and types."""
        ...

    def column(self, name: str, document: int, start: int, count: int) -> np.ndarray:
        """Return numbers from a column for tokens as targets, [count] float32."""
        ...

    def routes(self, document: int, start: int, count: int) -> np.ndarray:
        """Return expert routes, [count, layers, top_k], for sources with `Source.routes`."""
        ...


class DocumentView:
    """Documents that are stored in other `Documents`; subclasses implement `locate`."""

    def locate(self, document: int) -> tuple[Documents, int, int]:
        """Return the `Documents` that store a document, and the document's index and first token there."""
        raise NotImplementedError

    def tokens(self, document: int, start: int, count: int) -> np.ndarray:
        documents, index, first = self.locate(document)
        return documents.tokens(index, first + start, count)

    def loss_weights(self, document: int, start: int, count: int) -> np.ndarray:
        documents, index, first = self.locate(document)
        return documents.loss_weights(index, first + start, count)

    def types(self, document: int, start: int, count: int) -> np.ndarray:
        documents, index, first = self.locate(document)
        return documents.types(index, first + start, count)

    def column(self, name: str, document: int, start: int, count: int) -> np.ndarray:
        documents, index, first = self.locate(document)
        return documents.column(name, index, first + start, count)

    def routes(self, document: int, start: int, count: int) -> np.ndarray:
        documents, index, first = self.locate(document)
        return documents.routes(index, first + start, count)

    def encoder_inputs(self, document: int, start: int, count: int) -> EncoderInputs:
        documents, index, first = self.locate(document)
        return get_encoder_inputs(documents, index, first + start, count)


class ShardChain(DocumentView):
    """Documents in several shards, in sequence."""

    def __init__(self, prefixes: list[Path], vocab_size: int = sys.maxsize,
                 columns: tuple[str, ...] = (), routes: RouteShape | None = None,
                 banks: Banks = NO_BANKS) -> None:
        raise_open_file_limit()
        self._opened_by = prefixes, vocab_size, columns, routes, banks
        self._shards = [TokenShard(prefix, vocab_size, columns, routes, banks) for prefix in prefixes]
        self.columns, self.banks = list_column_names(columns), banks
        self.lengths = ChainedLengths([shard.lengths for shard in self._shards])
        self.is_plain = all(shard.is_plain for shard in self._shards)

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardChain, self._opened_by

    def locate(self, document: int) -> tuple[Documents, int, int]:
        shard, index = self.lengths.locate(document)
        return self._shards[shard], index, 0


def name_sources(path: str, content: dict[str, Any]) -> dict[str, str]:
    """Return source name in the manifest `content` -> name in the run, for `path` = [NAME=]folder."""
    name, names = split_source_name(path)[0], [source["name"] for source in content.get("sources", [])]
    if not name:
        return {source: source for source in names}
    if len(names) == 1:
        return {names[0]: name}
    return {source: f"{name}-{source}" for source in names}


def _fix_stage(kind: str) -> Fix | None:
    """Return the command that learns from data of a format."""
    match = re.search(r"`megatron-sov (sft|prefer)`", COMMANDS_BY_FORMAT.get(kind, ""))
    return Fix(command=match[1]) if match else None


def _build_sources(named_path: str, content: dict[str, Any], share: float,
                   formats: tuple[str, ...] | None) -> list[Source]:
    records, path = content["sources"], Path(split_source_name(named_path)[1])
    names = name_sources(named_path, content)
    for record in records:
        if formats is not None and record["format"] not in formats:
            raise UserError(f"{path}: source {record['name']!r} holds data of format {record['format']!r}, "
                            f"this stage learns from {' or '.join(formats)}; "
                            f"{COMMANDS_BY_FORMAT.get(record['format'], 'pass other data')}",
                            _fix_stage(record["format"]))
    train_tokens = sum(record["splits"]["train"]["num_tokens"] for record in records)
    if train_tokens == 0:
        raise UserError(f"{path}: holds no training tokens; pack more text")
    sources = []
    for record in records:
        where, sidecars, prefixes = f"{path}: source {record['name']!r}", record.get("sidecars", ()), {}
        for split, counts in record["splits"].items():
            prefixes[split] = tuple(shard["prefix"] for shard in counts["shards"])
        sources.append(Source(
            name=names[record["name"]], artifact=path, format=record["format"], prefixes=prefixes,
            num_tokens={split: counts["num_tokens"] for split, counts in record["splits"].items()},
            share=share * record.get("weight", record["splits"]["train"]["num_tokens"] / train_tokens),
            vocab_size=content["vocab_size"],
            columns=tuple(name for name in sidecars if name not in NO_COLUMNS),
            group=record.get("group_documents", 1),
            routes=RouteShape.from_record(record.get(ROUTES), where) if ROUTES in sidecars else None,
            banks=read_banks(record.get(FEATURES), where)))
    return sources


def tokenizer_folder(sources: list[Source]) -> Path | None:
    """Return the data's tokenizer folder, or None."""
    folders = (source.tokenizer or (source.artifact and source.artifact / "tokenizer") for source in sources)
    return next((f for f in folders if f is not None and (f / "tokenizer.json").is_file()), None)


def describe_inputs(sources: list[Source]) -> list[dict[str, str]]:
    """Return kind, path and manifest hash for each artifact in `sources`."""
    folders = dict.fromkeys(s.artifact for s in sources if s.artifact is not None)
    return [describe_input("tokens", folder) for folder in folders]


def describe_input(kind: str, folder: Path) -> dict[str, str]:
    """Return kind, path and manifest hash for an artifact."""
    return {"kind": kind, "path": str(folder), "manifest_sha256": manifest_sha256(folder)}
