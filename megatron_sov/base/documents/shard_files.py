"""Files of token shards: Megatron-Core's indexed format, and the routes of tokens.

`PREFIX.bin` holds tokens, `PREFIX.idx` says where each document begins.  The index is (little endian): magic,
version (int64), dtype code (int8), number of sequences and of document bounds (int64 each), lengths in tokens
(int32), starts in bytes (int64), document bounds (int64).  Here one document is one sequence.

Routes say which experts each token of a document visited, in every layer that has experts.  Those of n tokens
are one array [n, layers, top_k] of expert numbers, in the narrowest unsigned type that leaves its largest
value free.  That value marks what was not recorded: it replaces all experts of a choice, or none.  Token t's
row says where t itself went when it was read; so a document's last token, which a generator writes and never
reads, has the mark.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sov.base.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES = {"int32": 4, "uint16": 8}


class IndexedWriter:
    """Writes one split: tokens and sidecars as they come, the index when closed."""

    def __init__(self, prefix: Path, dtype: str, sidecars: Mapping[str, str] | None = None) -> None:
        """Open `PREFIX.bin` and its sidecars (ending -> dtype, as loss weights and types);
        `dtype` is a key of `DTYPE_CODES`."""
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self.prefix, self.dtype = prefix, dtype
        # four bytes a document; the index is written from it at the end
        self.lengths_tokens = array("i")
        names = {"bin": dtype, **(sidecars or {})}
        # little endian on any machine, as Megatron-Core reads it
        self._dtypes = {suffix: np.dtype(name).newbyteorder("<") for suffix, name in names.items()}
        self._files = {suffix: open(f"{prefix}.{suffix}", "wb")  # noqa: SIM115  (closed in __exit__)
                       for suffix in names}

    def write(self, lengths_tokens: NDArray[np.int32], columns: dict[str, NDArray[np.generic]]) -> None:
        """Append documents.

        Args:
            lengths_tokens: tokens of each document.
            columns: "bin" (ids) and the sidecars' columns, each a flat array [sum of lengths], or [documents]
                where a document has one number.
        """
        for suffix, file in self._files.items():
            file.write(np.ascontiguousarray(columns[suffix], dtype=self._dtypes[suffix]).reshape(-1).data)
        self.lengths_tokens.frombytes(lengths_tokens.astype(np.int32).tobytes())

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()
        # no index after an error: files without one are no shard
        if kind is None:
            write_index(self.prefix, self.dtype, np.frombuffer(self.lengths_tokens, dtype=np.int32)
                        if self.lengths_tokens else np.zeros(0, np.int32))


def write_index(prefix: Path, dtype: str, lengths_tokens: NDArray[np.int32]) -> None:
    """Write `PREFIX.idx` of documents that follow one another in `PREFIX.bin`."""
    starts = np.zeros(len(lengths_tokens), dtype="<i8")
    # int64 before the sum: a split may have more tokens than int32 counts
    np.cumsum(lengths_tokens[:-1], out=starts[1:])
    starts *= np.dtype(dtype).itemsize
    with open(f"{prefix}.idx", "wb") as f:
        f.write(HEADER.pack(MAGIC, VERSION, DTYPE_CODES[dtype], len(lengths_tokens), len(lengths_tokens) + 1))
        f.write(lengths_tokens.astype("<i4").tobytes())
        f.write(starts.tobytes())
        # bounds of documents in sequences: one each, and the end
        f.write(np.arange(len(lengths_tokens) + 1, dtype="<i8").tobytes())


FEATURES, FEATURE_DTYPE = "media", "int64"
"""Ending of the sidecar of token shards that says which feature of an encoder replaces a token's embedding,
as record * slots + slot (a bank's records beside it begin with 0), and its numbers; the name is also that of
the banks' description in a source's record."""
NO_FEATURE = -1
"""In that sidecar: of a token that no feature replaces."""
DAMAGED = "`sov-data verify` names what is damaged, pack the data again"

WRITTEN = "written"
"""Ending of the sidecar of responses with a bit for each token, from the highest of a byte on: whether a
policy wrote it.  It stands in the place of weights (1 or 0) and types (response or prompt)."""
OF_DOCUMENTS = ".documents"
"""How the ending of a column goes on that has a number for each document: that of all its written tokens."""


def bits(flags: np.ndarray) -> np.ndarray:
    """Return flags [tokens] as the bytes of a file `WRITTEN`."""
    return np.packbits(flags)


def flags(packed: np.ndarray, first: int, count: int) -> np.ndarray:
    """Return `count` flags, uint8, from the `first` one of a file `WRITTEN`."""
    whole = np.unpackbits(packed[first // 8:(first + count + 7) // 8])
    return whole[first % 8:first % 8 + count]


ROUTES = "routes"
"""Ending of the sidecar of token shards that holds routes, and name of their shape in a source's record."""
NARROW, WIDE = "uint8", "uint16"
_ROUTE_TOKENS = 1 << 10
"""Those that are checked at a time: what is looked at stays in the processor's cache."""


@dataclass(frozen=True)
class RouteShape:
    """What routes belong to: numbers of a model."""

    layers: int
    """Layers with experts, from the first one on."""
    top_k: int
    """Experts that each token visits in a layer."""
    num_experts: int
    """Experts of a layer; numbers count from 0."""

    @property
    def dtype(self) -> str:
        """Type of an expert's number: one byte while that leaves a value for the mark, then two."""
        return NARROW if self.num_experts <= np.iinfo(NARROW).max else WIDE

    @property
    def mark(self) -> int:
        """What stands for a choice that was not recorded."""
        return int(np.iinfo(self.dtype).max)

    @property
    def bytes_per_token(self) -> int:
        return self.layers * self.top_k * np.dtype(self.dtype).itemsize

    def absent(self, num_tokens: int) -> np.ndarray:
        """Return routes [num_tokens, layers, top_k] of which none was recorded."""
        return np.full((num_tokens, self.layers, self.top_k), self.mark, self.dtype)

    def problem(self, routes: np.ndarray) -> str:
        """Return what is impossible about routes [tokens, layers, top_k], with token and layer (both from
        0); empty: nothing."""
        if routes.shape[1:] != (self.layers, self.top_k) or routes.dtype != np.dtype(self.dtype):
            return (f"has routes of shape {list(routes.shape)} and type {routes.dtype}, must be [tokens, "
                    f"{self.layers}, {self.top_k}] of {self.dtype}")
        for first in range(0, len(routes), _ROUTE_TOKENS):
            block = routes[first:first + _ROUTE_TOKENS]
            if problem := self._block_problem(block, first):
                return problem
        return ""

    def _block_problem(self, routes: np.ndarray, begin: int) -> str:
        # A choice is a column here: on whole columns each comparison is one pass over contiguous bytes, which
        # sorting the few experts of each token and layer is not.
        choices = np.ascontiguousarray(routes.reshape(-1, self.top_k).T)
        present = ~np.logical_and.reduce(choices == self.mark)
        beyond = np.logical_or.reduce(choices >= self.num_experts) & present
        twice = np.zeros(len(present), bool)
        for i in range(1, self.top_k):
            for j in range(i):
                twice |= choices[i] == choices[j]
        for wrong, rule in (
                (beyond, f"expert numbers must lie below {self.num_experts}, or all be {self.mark} (not "
                         "recorded)"),
                (twice & present, "a token visits an expert of a layer once")):
            if wrong.any():
                token, layer = divmod(int(wrong.argmax()), self.layers)
                return (f"sends token {begin + token} in layer {layer} of those with experts to "
                        f"{routes[token, layer].tolist()}; {rule}")
        return ""

    def record(self) -> dict[str, Any]:
        """Return what a manifest says of a source that has routes."""
        return {**asdict(self), "dtype": self.dtype}

    @classmethod
    def from_record(cls, record: Any, where: str) -> RouteShape:
        """Return what `record` gave.

        Raises:
            UserError: it is none; `where` names it.
        """
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


def joined_routes(before: np.ndarray | None, told: np.ndarray | None, num_read: int) -> np.ndarray | None:
    """Return the routes of a text that has grown: what was read earlier stays where it went then; what was
    not goes where it went now.

    Args:
        before: of what was read earlier, perhaps with marks; None: of nothing.
        told: of all that has been read now, from its beginning; None: of nothing.
        num_read: tokens of the text that were read; of which nothing is known, those have the mark.
    """
    known = before if told is None else told
    if known is None:
        return None
    mark = np.iinfo(known.dtype).max
    found = np.full((num_read, *known.shape[1:]), mark, known.dtype)
    # the later one stands above: what is known from earlier is kept
    for part in (told, before):
        if part is not None:
            part = part[:num_read]
            was_read = (part != mark).all(axis=2, keepdims=True)
            found[:len(part)] = np.where(was_read, part, found[:len(part)])
    return found
