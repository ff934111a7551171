"""Megatron-Core's indexed token format as `sov-data` writes and reads it (`documents.indexed_writer`): the
dtypes of its files, and a split opened with every number checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_sov.documents.indexed_writer import DTYPE_CODES, HEADER, MAGIC, VERSION
from megatron_sov.errors import UserError
from megatron_sov.media.banks import MEDIA, SIDECAR_DTYPE

SMALLEST_INT32_VOCAB = 65500
"""Megatron's DType.optimal_dtype: vocabularies below it fit uint16 with room for ids of its own."""
SIDECARS = {"loss": "float32", "type": "uint8", "kind": "uint8"}
"""Files of the same geometry as .bin: the weight of each token in the loss, the token's type, and, of chats,
what it is learned as (`chat.kinds`)."""
COLUMN_DTYPE = "float32"
"""Of the other sidecars: columns, each a file of its name."""


def sidecars_of(kind: str, columns: Sequence[str] = (), has_media: bool = False) -> dict[str, str]:
    """Return ending -> dtype of the sidecars of a source of that kind (one of `documents.KINDS`)."""
    own = {} if kind == "text" else {n: d for n, d in SIDECARS.items() if n != "kind" or kind == "chat"}
    # placeholders of features weigh nothing, in texts too
    media = {"loss": SIDECARS["loss"], MEDIA: SIDECAR_DTYPE} if has_media else {}
    return own | media | dict.fromkeys(columns, COLUMN_DTYPE)


def token_dtype(vocab_size: int) -> str:
    """Return the dtype of token ids that Megatron chooses for a vocabulary."""
    return "uint16" if vocab_size < SMALLEST_INT32_VOCAB else "int32"


@dataclass(frozen=True)
class IndexedSplit:
    """One split opened for reading by memory map."""

    dtype: str
    """Dtype of the ids."""
    lengths_tokens: NDArray[np.int32]
    """Tokens of each document, [documents]."""
    starts_bytes: NDArray[np.int64]
    """Where each document begins in .bin, [documents]."""
    tokens: NDArray[np.generic]
    """All ids, [tokens]."""

    def documents(self) -> Iterator[NDArray[np.generic]]:
        """Yield each document's ids, in order."""
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
