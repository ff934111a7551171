"""Token shard files: Megatron-Core's indexed format, expert routes per token, and the manifest.

`PREFIX.bin` holds tokens, `PREFIX.idx` the beginning of each document. The index contains (little endian):
magic, version (int64), dtype code (int8), number of sequences and of document bounds (int64 each), lengths in
tokens (int32), starts in bytes (int64), document bounds (int64). Our shards have one sequence per document.

Routes are the experts that each token of a document visited, in every layer with experts. Routes of n tokens
are one array [n, layers, top_k] of expert numbers, in the narrowest unsigned type that leaves its largest
value free: the mark, in place of all top_k experts of a token and layer that were not recorded. Token t's row
holds the experts that t visited when it was read: a document's last token, generated but never read, has the
mark.
"""

import struct
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sov.base.artifacts import is_inside
from megatron_sov.base.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES = {"int32": 4, "uint16": 8}
FEATURES, FEATURE_DTYPE = "media", "int64"
"""Ending and dtype for the sidecar with the encoder feature that replaces a token's embedding: the number
`record * slots + slot`, with records from 0 in each bank. Also the key for banks in a source's record."""
NO_FEATURE = -1
"""Sidecar value for a token without feature."""
DAMAGED = "`sov-data verify` lists damaged files; pack the data again"
WRITTEN = "written"
"""Ending for the response sidecar with a bit per token (highest bit first): whether a policy wrote the token.
Replaces the sidecars for weights (1 or 0) and types (response or prompt)."""
PER_DOCUMENT = ".documents"
"""Suffix to the ending of a column with a number per document, shared by the document's written tokens."""
ROUTES = "routes"
"""Ending for the routes sidecar, and key for the routes' shape in a source's record."""
NARROW, WIDE = "uint8", "uint16"
CONTENT_VERSION = 2
"""Layout of a token manifest's content: version 2 has a list of shards per split, and formats per source."""
ARTIFACT_FIELDS = {"tokenizer_sha256": str, "vocab_size": int, "sources": list}
SOURCE_FIELDS = {"name": str, "format": str, "splits": dict}
SPLIT_FIELDS = {"num_tokens": int, "shards": list}
SHARD_FIELDS = {"prefix": str}
"""Fields of a manifest of token shards that readers need -> type."""
COUNTS = ("num_documents", "num_tokens", "num_bytes")
"""Manifest fields of a shard, summed over the shards of a split."""
_ROUTE_TOKENS = 1 << 10
"""Tokens checked at a time: few enough for the processor's cache."""


class IndexedWriter:
    """Writes a split: tokens and sidecars first, the index at the end."""

    def __init__(self, prefix: Path, dtype: str, sidecars: Mapping[str, str] | None = None) -> None:
        """Open `PREFIX.bin` and its sidecars.

        Args:
            prefix: path without ending.
            dtype: type of tokens, a key of `DTYPE_CODES`.
            sidecars: file ending -> dtype, e.g. for loss weights and types.
        """
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self.prefix, self.dtype = prefix, dtype
        # four bytes per document, for the index
        self.lengths_tokens = array("i")
        names = {"bin": dtype, **(sidecars or {})}
        # little endian on every machine, as required by Megatron-Core
        self._dtypes = {suffix: np.dtype(name).newbyteorder("<") for suffix, name in names.items()}
        self._files = {suffix: open(f"{prefix}.{suffix}", "wb")  # noqa: SIM115  (closed in __exit__)
                       for suffix in names}

    def write(self, lengths_tokens: NDArray[np.int32], columns: dict[str, NDArray[np.generic]]) -> None:
        """Append documents.

        Args:
            lengths_tokens: int32 [documents], tokens of each document.
            columns: "bin" (token ids) and sidecars: [sum of lengths] each, or [documents] for a column with
                one number per document.
        """
        for suffix, file in self._files.items():
            file.write(np.ascontiguousarray(columns[suffix], dtype=self._dtypes[suffix]).reshape(-1).data)
        self.lengths_tokens.frombytes(lengths_tokens.astype(np.int32).tobytes())

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()
        # after an error write no index: files without an index are not a shard
        if kind is None:
            write_index(self.prefix, self.dtype, np.array(self.lengths_tokens, np.int32))


def write_index(prefix: Path, dtype: str, lengths_tokens: NDArray[np.int32]) -> None:
    """Write `PREFIX.idx` for consecutive documents in `PREFIX.bin`."""
    starts = np.zeros(len(lengths_tokens), dtype="<i8")
    # `starts` is int64: a split may exceed the range of int32
    np.cumsum(lengths_tokens[:-1], out=starts[1:])
    starts *= np.dtype(dtype).itemsize
    with open(f"{prefix}.idx", "wb") as f:
        f.write(HEADER.pack(MAGIC, VERSION, DTYPE_CODES[dtype], len(lengths_tokens), len(lengths_tokens) + 1))
        f.write(lengths_tokens.astype("<i4").tobytes())
        f.write(starts.tobytes())
        # document bounds in units of sequences
        f.write(np.arange(len(lengths_tokens) + 1, dtype="<i8").tobytes())


def pack_flags(flags: np.ndarray) -> np.ndarray:
    """Pack flags [tokens] into bytes for a `WRITTEN` sidecar."""
    return np.packbits(flags)


def unpack_flags(packed: np.ndarray, first: int, count: int) -> np.ndarray:
    """Unpack `count` flags (uint8), beginning at flag `first`, from a `WRITTEN` sidecar."""
    unpacked = np.unpackbits(packed[first // 8:(first + count + 7) // 8])
    return unpacked[first % 8:first % 8 + count]


@dataclass(frozen=True)
class RouteShape:
    """Shape and dtype for routes, from a model's sizes."""

    layers: int
    """Layers with experts."""
    top_k: int
    """Experts per token and layer."""
    num_experts: int
    """Experts per layer, numbered from 0."""

    @property
    def dtype(self) -> str:
        """Expert number type: uint8 if a value remains for `mark`, else uint16."""
        return NARROW if self.num_experts <= np.iinfo(NARROW).max else WIDE

    @property
    def mark(self) -> int:
        """Value for an unrecorded choice."""
        return int(np.iinfo(self.dtype).max)

    @property
    def bytes_per_token(self) -> int:
        return self.layers * self.top_k * np.dtype(self.dtype).itemsize

    def build_unrecorded(self, num_tokens: int) -> np.ndarray:
        """Return routes [num_tokens, layers, top_k] without any recorded choice."""
        return np.full((num_tokens, self.layers, self.top_k), self.mark, self.dtype)

    def problem(self, routes: np.ndarray) -> str:
        """Describe the first error in routes [tokens, layers, top_k], with token and layer; "": valid."""
        if routes.shape[1:] != (self.layers, self.top_k) or routes.dtype != np.dtype(self.dtype):
            return (f"has routes of shape {list(routes.shape)} and type {routes.dtype}, must be [tokens, "
                    f"{self.layers}, {self.top_k}] of {self.dtype}")
        for first in range(0, len(routes), _ROUTE_TOKENS):
            block = routes[first:first + _ROUTE_TOKENS]
            if problem := self._block_problem(block, first):
                return problem
        return ""

    def _block_problem(self, routes: np.ndarray, begin: int) -> str:
        """Return the fault of routes [tokens, layers, K] from token `begin` on; "": none."""
        # a contiguous column per choice: comparing columns is faster than sorting the few experts per token
        choices = np.ascontiguousarray(routes.reshape(-1, self.top_k).T)
        present = ~np.logical_and.reduce(choices == self.mark)
        is_too_large = np.logical_or.reduce(choices >= self.num_experts) & present
        is_repeated = np.zeros(len(present), bool)
        for i in range(1, self.top_k):
            for j in range(i):
                is_repeated |= choices[i] == choices[j]
        for is_wrong, rule in (
                (is_too_large, f"expert numbers must lie below {self.num_experts}, or all be {self.mark} "
                               "(not recorded)"),
                (is_repeated & present, "a token visits an expert of a layer once")):
            if is_wrong.any():
                token, layer = divmod(int(is_wrong.argmax()), self.layers)
                return (f"sends token {begin + token} in layer {layer} of those with experts to "
                        f"{routes[token, layer].tolist()}; {rule}")
        return ""

    def record(self) -> dict[str, Any]:
        """Return the shape as recorded in a source's manifest entry."""
        return {**asdict(self), "dtype": self.dtype}

    @classmethod
    def from_record(cls, record: Any, where: str) -> "RouteShape":
        """Parse the result of `record`. Raises `UserError`: it is malformed; `where` begins the message."""
        try:
            shape = cls(*(int(record[name]) for name in ("layers", "top_k", "num_experts")))
            if min(shape.layers, shape.top_k) < 1 or shape.top_k > shape.num_experts:
                raise ValueError("no model has such numbers")
            if record["dtype"] != shape.dtype:
                raise ValueError(f"{shape.num_experts} experts need {shape.dtype}")
        except (KeyError, TypeError, ValueError) as e:
            raise UserError(f"{where}: routes = {record!r} cannot be read ({type(e).__name__}: {e}); must "
                            "have layers, top_k, num_experts and dtype; write the data again") from None
        return shape


def merge_routes(previous: np.ndarray | None, current: np.ndarray | None, num_read: int) -> np.ndarray | None:
    """Merge routes for a growing text: earlier recorded choices take precedence over current choices.

    Args:
        previous: routes of the earlier reading, possibly with marks; None: no routes.
        current: routes of the current reading from the text's beginning; None: no routes.
        num_read: number of tokens read so far; tokens without a route get the mark.
    """
    available = previous if current is None else current
    if available is None:
        return None
    mark = np.iinfo(available.dtype).max
    merged = np.full((num_read, *available.shape[1:]), mark, available.dtype)
    # the earlier routes come last and overwrite the current routes
    for routes in (current, previous):
        if routes is not None:
            routes = routes[:num_read]
            was_read = (routes != mark).all(axis=2, keepdims=True)
            merged[:len(routes)] = np.where(was_read, routes, merged[:len(routes)])
    return merged


def build_source_record(name: str, format: str, sidecars: Iterable[str],
                        shards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Build a source's record for the manifest: no held-out documents, and each document is a unit.

    `format` is "chat" or `documents.ROLLOUTS`, `sidecars` are suffixes of files next to the tokens, and
    `shards` has `prefix` and `COUNTS` of each shard.
    """
    counts = {count: sum(shard[count] for shard in shards) for count in COUNTS}
    return {"name": name, "format": format, "group_documents": 1, "sidecars": list(sidecars), "num_bad": {},
            "splits": {"train": {"shards": list(shards), **counts},
                       "heldout": {"shards": [], **dict.fromkeys(COUNTS, 0)}}}


def check_token_manifest(path: str, content: dict[str, Any]) -> None:
    """Check the manifest `content` of the token shards in `path`. Raises `UserError`: another
    `CONTENT_VERSION`, a field is missing, or a shard is not inside the folder."""
    if (version := content.get("content_version", 1)) != CONTENT_VERSION:
        raise UserError(f"{path}: was packed in layout {version}, this version reads layout "
                        f"{CONTENT_VERSION}; pack the data again")
    missing, prefixes = _find_missing(content, ARTIFACT_FIELDS, ""), list[str]()
    for i, source in enumerate(() if missing else content["sources"]):
        absent = _find_missing(source, SOURCE_FIELDS, f"sources[{i}].")
        for name, split in () if absent else {"train": {}, **source["splits"]}.items():
            where = f"sources[{i}].splits.{name}."
            absent += (absent_in_split := _find_missing(split, SPLIT_FIELDS, where))
            if not absent_in_split and split["num_tokens"] and not split["shards"]:
                absent.append(f"{where}shards for {split['num_tokens']:,} tokens")
            for n, shard in enumerate(() if absent_in_split else split["shards"]):
                absent += (absent_in_shard := _find_missing(shard, SHARD_FIELDS, f"{where}shards[{n}]."))
                prefixes += [] if absent_in_shard else [shard["prefix"]]
        missing += absent
    if missing:
        raise UserError(f"{path}: its manifest lacks {', '.join(missing)}; pack the data again, or restore "
                        "it from a copy")
    if outside := [prefix for prefix in prefixes if not is_inside(prefix)]:
        raise UserError(f"{path}: its manifest names the shard {outside[0]!r}, which is not inside the "
                        "folder; restore it from a copy")


def _find_missing(block: Any, fields: Mapping[str, type], where: str) -> list[str]:
    """Return the names of fields that `block` lacks or has in another type, after `where`."""
    fields_present = block if isinstance(block, dict) else {}
    return [f"{where}{name}" for name, kind in fields.items() if type(fields_present.get(name)) is not kind]
