"""A `.bin/.idx` pair that others wrote (Megatron-LM's `preprocess_data`, Megatron-Bridge, NeMo), with every
number of its index checked.

Theirs may have several sequences in a document (`--split-sentences`) and documents without any; here a
document is all of its sequences together, and empty ones are left out, which changes no byte of the .bin.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.indexed import IndexedSplit
from megatron_sov.documents.indexed_writer import DTYPE_CODES, HEADER, MAGIC, VERSION
from megatron_sov.errors import UserError

_REMEDY = "restore it from a copy"
_MODE_BYTES = 1
"""Of each sequence, at the end of an index of text and images."""


def open_foreign(prefix: Path) -> tuple[IndexedSplit, int]:
    """Return the pair's documents, and how many empty ones are left out.

    Args:
        prefix: path of both files without their endings.

    Raises:
        UserError: a file is missing, of another version or dtype, or the index is no sound one for the .bin.
    """
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    try:
        raw: NDArray[np.uint8] = np.memmap(index, np.uint8, mode="r") if os.path.getsize(index) else \
            np.zeros(0, np.uint8)
        size_bytes = tokens.stat().st_size
    except OSError as e:
        raise UserError(f"{e.filename}: cannot be read ({e.strerror}); pass the path that both files have, "
                        "without .bin and .idx") from None
    dtype, num_sequences, num_bounds = _header(index, raw)
    at = HEADER.size
    lengths = np.frombuffer(raw, "<i4", num_sequences, at).astype(np.int64)
    starts = np.frombuffer(raw, "<i8", num_sequences, at + 4 * num_sequences)
    bounds = np.frombuffer(raw, "<i8", num_bounds, at + 12 * num_sequences)
    if num_sequences and int(lengths.min()) < 0:
        raise UserError(f"{index}: sequence {int(lengths.argmin())} has {lengths.min()} tokens; {_REMEDY}")
    ends = np.cumsum(lengths) * dtype.itemsize
    wrong = np.flatnonzero(starts != ends - lengths * dtype.itemsize)
    if len(wrong):
        raise UserError(f"{index}: sequence {wrong[0]} begins at byte {starts[wrong[0]]}, and the one "
                        f"before it ends at {int(ends[wrong[0]] - lengths[wrong[0]] * dtype.itemsize)}; "
                        f"{_REMEDY}")
    if not num_bounds or bounds[0] != 0 or bounds[-1] != num_sequences or (np.diff(bounds) < 0).any():
        raise UserError(f"{index}: its document bounds do not go from 0 to its {num_sequences} sequences in "
                        f"order; {_REMEDY}")
    expected_bytes = int(ends[-1]) if num_sequences else 0
    if size_bytes != expected_bytes:
        raise UserError(f"{tokens}: has {size_bytes} bytes, the index says {expected_bytes}; {_REMEDY}")
    cumulative = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    documents = np.diff(cumulative[bounds])
    kept = documents[documents > 0]
    if not len(kept):
        raise UserError(f"{index}: holds no document; name another pair")
    if int(kept.max()) >= 1 << 31:
        raise UserError(f"{index}: a document has {kept.max():,} tokens, and at most {(1 << 31) - 1:,} are "
                        "read")
    begins = (np.cumsum(kept) - kept) * dtype.itemsize
    ids = np.memmap(tokens, dtype.newbyteorder("<"), mode="r")
    return IndexedSplit(dtype.name, kept.astype(np.int32), begins, ids), len(documents) - len(kept)


def _header(index: Path, raw: NDArray[np.uint8]) -> tuple[np.dtype[np.generic], int, int]:
    """Return the ids' dtype, and the number of sequences and bounds."""
    if len(raw) < HEADER.size or bytes(raw[:len(MAGIC)]) != MAGIC:
        raise UserError(f"{index}: is no index of Megatron's indexed datasets; name a pair that "
                        "preprocess_data wrote (the old --dataset-impl lazy and cached are not read)")
    _, version, code, num_sequences, num_bounds = HEADER.unpack_from(bytes(raw[:HEADER.size]))
    dtypes = {c: name for name, c in DTYPE_CODES.items()}
    if version != VERSION or code not in dtypes:
        raise UserError(f"{index}: has version {version} and dtype code {code}; only version {VERSION} with "
                        f"ids of {' or '.join(DTYPE_CODES)} is read")
    size_bytes = HEADER.size + 12 * num_sequences + 8 * num_bounds
    if len(raw) == size_bytes + _MODE_BYTES * num_sequences and num_sequences:
        raise UserError(f"{index}: is of text and images (it has a mode for each sequence), which is not "
                        "read; name a pair of text")
    if len(raw) != size_bytes:
        raise UserError(f"{index}: has {len(raw)} bytes, which does not fit its {num_sequences} sequences "
                        f"and {num_bounds} document bounds; {_REMEDY}")
    return np.dtype(dtypes[code]), num_sequences, num_bounds
