"""What reading may take: limits that every format has, and reading compressed files within them."""

from __future__ import annotations

import gzip
import io
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, cast

from annotated_types import Ge, Le

from megatron_sov.documents import BadRecord

MAX_RATIO = 250
"""Of unpacked to packed bytes, above the first `FREE_BYTES`: text of people stays below 50."""
FREE_BYTES = 1 << 20
COMPRESSED = (".gz", ".zst")
_BLOCK_BYTES = 1 << 20
LimitBytes = Annotated[int, Ge(1000)]


@dataclass(frozen=True)
class Limits:
    """Options that every format has."""

    time_s: Annotated[float, Ge(0.1), Le(86_400)] = 60.0
    """Processor time that reading one document may take; ten times of it on the clock."""
    memory_bytes: Annotated[int, Ge(1 << 29)] = 4 << 30
    """Address space of the process that reads; the parsers take half a gigabyte themselves."""
    document_bytes: LimitBytes = 64 << 20
    """Text of one document, in UTF-8."""
    unpacked_bytes: LimitBytes = 1 << 30
    """What one file that is held in memory, or one archive, may hold when it is unpacked."""


@contextmanager
def unpacked(file: Path) -> Iterator[IO[bytes]]:
    """Open a file that may be compressed (`.gz`, `.zst`).

    Raises:
        BadRecord: inside the `with`, where the compressed data are cut off or damaged.
    """
    suffix = file.suffix.lower()
    if suffix == ".gz":
        stream = cast(IO[bytes], gzip.open(file, "rb"))  # noqa: SIM115  (closed below)
    elif suffix == ".zst":
        from megatron_sov.documents.zstd import ZstdFile

        stream = io.BufferedReader(ZstdFile(file))
    else:
        stream = open(file, "rb")  # noqa: SIM115  (closed below)
    with stream:
        try:
            yield stream
        except (EOFError, zlib.error, gzip.BadGzipFile) as e:
            raise BadRecord("truncated", f"is cut off or damaged ({e}); fetch the file again") from None


def blocks_within(stream: IO[bytes], packed_bytes: int, most_bytes: float = math.inf) -> Iterator[bytes]:
    """Yield what a stream holds.

    Args:
        stream: of unpacked bytes.
        packed_bytes: size of what it comes from.
        most_bytes: it may hold.

    Raises:
        BadRecord: it is more, or more than `MAX_RATIO` times as large as what it comes from.
    """
    total = 0
    while block := read_some(stream, _BLOCK_BYTES):
        total += len(block)
        refuse_bomb(packed_bytes, total, most_bytes)
        yield block


def read_some(stream: IO[bytes], most_bytes: int) -> bytes:
    """Return what a stream has next: where it is damaged, all that comes before, which `read` would lose."""
    return cast(io.BufferedReader, stream).read1(most_bytes)


def refuse_bomb(packed_bytes: int, unpacked_bytes: int, most_bytes: float) -> None:
    """Raise `BadRecord` where what is packed unpacks to too much."""
    if unpacked_bytes > most_bytes:
        raise BadRecord("too_long", f"holds more than unpacked_bytes = {most_bytes:,} bytes; raise the "
                                    "limit, or leave it out")
    if unpacked_bytes > FREE_BYTES + MAX_RATIO * packed_bytes:
        raise BadRecord("bomb", f"unpacks {packed_bytes:,} bytes to more than {MAX_RATIO} times as much, as "
                                "no text does; leave it out")


def read_whole(file: Path, limits: Limits) -> bytes:
    """Return what a file holds, unpacked.

    Raises:
        BadRecord: as `unpacked` and `blocks_within`.
    """
    with unpacked(file) as stream:
        return b"".join(blocks_within(stream, file.stat().st_size, limits.unpacked_bytes))
