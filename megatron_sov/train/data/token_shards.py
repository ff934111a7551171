"""Memory-mapped token shards (Megatron-Core's `.bin` and `.idx`, with sidecars), and the sources in token
artifacts."""

import contextlib
import errno
import mmap
import resource
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_sov.base.documents.shard_files import (
    DAMAGED, FEATURE_DTYPE, FEATURES, PER_DOCUMENT, ROUTES, WRITTEN, RouteShape, unpack_flags)
from megatron_sov.base.errors import UserError
from megatron_sov.chat.encode import TYPE_PROMPT, TYPE_RESPONSE
from megatron_sov.chat.marks import KIND
from megatron_sov.model.modality import (
    NO_BANKS, Banks, EncoderInputs, get_banks, get_encoder_inputs, load_modality)

IDX_MAGIC = b"MMIDIDX\x00\x00"
IDX_DTYPES: dict[int, type[np.generic]] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64,
                                           6: np.float64, 7: np.float32, 8: np.uint16}
"""Dtype codes in the `.idx` header, as in `megatron.core.datasets.indexed_dataset`."""
_HEADER_BYTES = len(IDX_MAGIC) + 8 + 1 + 8 + 8
COLUMN_DTYPES = {KIND: np.dtype(np.uint8)}
"""Column -> dtype other than float32."""


class TokenShard:
    """Documents in a token shard; the time to open a shard does not depend on its size."""

    def __init__(self, prefix: Path, vocab_size: int = sys.maxsize, columns: tuple[str, ...] = (),
                 routes: RouteShape | None = None, banks: Banks = NO_BANKS) -> None:
        """Map the files `prefix` + suffix.

        `columns` are suffixes of column files (`PER_DOCUMENT`: a number per document), `routes` is the shape
        of `.routes`, and `banks` maps a kind to its bank of pictures or sounds. Raises `UserError` if a file
        is damaged or this process has too many open files."""
        self.prefix, self._vocab_size = prefix, vocab_size
        self._arguments = prefix, vocab_size, columns, routes, banks
        try:
            index = read_index(self._get_file(".idx"))
            self.dtype, self.lengths, self.pointers = index.dtype, index.lengths, index.pointers
            self._num_tokens = index.num_tokens
            self._tokens = self._map_sidecar(".bin", self.dtype)
            self._loss = self._map_optional(".loss", np.float32)
            self._type = self._map_optional(".type", np.uint8)
            flags_file = self._get_file(f".{WRITTEN}")
            self._written = None
            if flags_file.exists():
                self._written = map_numbers(flags_file, np.dtype(np.uint8), -(-self._num_tokens // 8))
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
        except (OSError, IndexError, KeyError, ValueError) as e:
            if isinstance(e, OSError) and e.errno == errno.EMFILE:
                raise UserError(f"{prefix}: this process may not open more than "
                                f"{resource.getrlimit(resource.RLIMIT_NOFILE)[0]} files; raise `ulimit -n`, "
                                "or pack into larger shards (--shard-tokens)") from None
            raise UserError(f"{prefix}: cannot be read as a token shard ({e}); pack the data again") from None

    def __reduce__(self) -> tuple[Any, ...]:  # another process maps the files again
        return TokenShard, self._arguments

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
        ignore it."""
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

        Raises `UserError` if the bank lacks a feature, or a placeholder token has no feature."""
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


class DocumentView:
    """Documents that are stored in other `Documents`; subclasses implement `locate`."""

    def __init__(self, documents: "Documents", is_plain: bool) -> None:
        self._documents, self.is_plain = documents, is_plain
        self.columns, self.banks = documents.columns, get_banks(documents)

    def locate(self, document: int) -> "tuple[Documents, int, int]":
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
        self._arguments = prefixes, vocab_size, columns, routes, banks
        self._shards = [TokenShard(prefix, vocab_size, columns, routes, banks) for prefix in prefixes]
        self.columns, self.banks = list_column_names(columns), banks
        self.lengths = ChainedLengths([shard.lengths for shard in self._shards])
        self.is_plain = all(shard.is_plain for shard in self._shards)

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardChain, self._arguments

    def locate(self, document: int) -> "tuple[Documents, int, int]":
        shard, index = self.lengths.locate(document)
        return self._shards[shard], index, 0


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
    is damaged."""
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


class Documents(Protocol):
    """Documents in a source: a split's token shards, or documents built in memory."""

    @property
    def lengths(self) -> Lengths:
        """Tokens per document."""

    @property
    def is_plain(self) -> bool:
        """Whether every token has loss weight 1 and type 0, so that `build_row` reads neither."""

    def tokens(self, document: int, start: int, count: int) -> np.ndarray:
        """Return token ids, [count] int64."""

    def loss_weights(self, document: int, start: int, count: int) -> np.ndarray:
        """Return loss weights for tokens as targets, [count] float32."""

    def types(self, document: int, start: int, count: int) -> np.ndarray:
        """Return token types, [count] uint8."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Column names, in addition to loss weights and types."""

    def column(self, name: str, document: int, start: int, count: int) -> np.ndarray:
        """Return numbers from a column for tokens as targets, [count] float32."""

    def routes(self, document: int, start: int, count: int) -> np.ndarray:
        """Return expert routes, [count, layers, top_k], for sources with `Source.routes`."""
