"""Unpack files within limits, and decode bytes to text by declaration, detection or setting."""

import codecs
import gzip
import io
import math
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, cast

from annotated_types import Ge, Le

from megatron_sov.base.documents import BadRecord
from megatron_sov.base.documents.files import open_bytes
from megatron_sov.base.settings import Bound, ProblemCode, Violation

MAX_RATIO = 250
"""Maximum ratio of unpacked to packed bytes after the first `FREE_BYTES`; human text stays below 50."""
FREE_BYTES = 1 << 20
_BLOCK_BYTES = 1 << 20
LimitBytes = Annotated[int, Ge(1000)]
DETECT = "detect"
"""Value of the option `encoding`: UTF-8 if the bytes are valid UTF-8, otherwise a guess from the bytes."""
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
          (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_DECLARED = re.compile(rb"""(?:<meta[^>]{0,400}?charset\s*=|<\?xml[^>]{0,200}?encoding\s*=)\s*["']?\s*"""
                       rb"""([A-Za-z0-9_.:-]{2,40})""", re.IGNORECASE)
_BROWSERS = {"iso-8859-1": "cp1252", "latin-1": "cp1252", "us-ascii": "cp1252", "ascii": "cp1252",
             "euc-kr": "cp949", "ks_c_5601-1987": "cp949", "ksc5601": "cp949", "shift_jis": "cp932",
             "x-sjis": "cp932", "gb2312": "gb18030", "gbk": "gb18030", "windows-874": "cp874",
             "tis-620": "cp874", "x-windows-949": "cp949", "utf-16": "utf-8", "utf-16le": "utf-8",
             "utf-16be": "utf-8"}
"""Declared encoding -> the larger encoding that browsers use (encoding.spec.whatwg.org, 4.2). A page with a
readable meta element is not UTF-16 (html.spec.whatwg.org, 13.2.3.2)."""
_SAMPLE_BYTES = 1 << 16
_MAX_REPLACED = 0.01
"""Maximum share of undecodable characters; above this share the encoding is wrong."""


@dataclass(frozen=True)
class EncodingLimits:
    """Limits for every format."""

    time_s: Annotated[float, Ge(0.1), Le(86_400)] = 60.0
    """Processor time for reading one document; the elapsed time may be ten times as long."""
    memory_bytes: Annotated[int, Ge(1 << 29)] = 4 << 30
    """Address space for the reading process; parsers alone take half a gigabyte."""
    document_bytes: LimitBytes = 64 << 20
    """UTF-8 bytes in a document."""
    unpacked_bytes: LimitBytes = 1 << 30
    """Unpacked bytes in an archive, or in a file read into memory."""


@contextmanager
def open_unpacked(file: Path) -> Iterator[IO[bytes]]:
    """Open a file, unpacking `.gz` and `.zst`; raises `BadRecord` in the with block for damaged data."""
    with open_bytes(file, file.suffix.lower()) as stream:
        try:
            yield stream
        # The caller has already yielded the data before the damage.
        except (EOFError, zlib.error, gzip.BadGzipFile) as e:
            raise BadRecord("truncated", f"is cut off or damaged ({e}); fetch the file again") from None


def iter_limited_blocks(stream: IO[bytes], packed_bytes: int, max_bytes: float = math.inf) -> Iterator[bytes]:
    """Yield blocks of unpacked bytes; raises `BadRecord` (see `check_unpacked_size`).

    Args:
        stream: unpacked bytes.
        packed_bytes: the packed file's size.
        max_bytes: limit for the whole stream.
    """
    total = 0
    while block := read_block(stream, _BLOCK_BYTES):
        total += len(block)
        check_unpacked_size(packed_bytes, total, max_bytes)
        yield block


def read_block(stream: IO[bytes], max_bytes: int) -> bytes:
    """Read up to `max_bytes`; unlike `read`, this returns the bytes before damaged data."""
    return cast(io.BufferedReader, stream).read1(max_bytes)


def check_unpacked_size(packed_bytes: int, unpacked_bytes: int, max_bytes: float) -> None:
    """Raise `BadRecord` above `max_bytes`, or above `MAX_RATIO` times the packed size."""
    if unpacked_bytes > max_bytes:
        raise BadRecord("too_long", f"holds more than unpacked_bytes = {max_bytes:,} bytes; raise the "
                                    "limit, or leave it out")
    # Small files may have any ratio.
    if unpacked_bytes > FREE_BYTES + MAX_RATIO * packed_bytes:
        raise BadRecord("bomb", f"unpacks {packed_bytes:,} bytes to more than {MAX_RATIO} times as much, as "
                                "no text does; leave it out")


def read_unpacked(file: Path, limits: EncodingLimits) -> bytes:
    """Read a file into memory; raises `BadRecord` for damaged data and above the limits."""
    with open_unpacked(file) as stream:
        return b"".join(iter_limited_blocks(stream, file.stat().st_size, limits.unpacked_bytes))


def _find_encoding_problem(encoding: str) -> Violation | None:
    try:
        if encoding == DETECT or codecs.lookup(encoding)._is_text_encoding:
            return None
    except (LookupError, ValueError):
        pass
    return ProblemCode.CHOICE, "is no encoding that Python knows", f"write {DETECT}, utf-8, cp949, ..."


Encoding = Annotated[str, Bound(_find_encoding_problem)]
"""Python's name for a text encoding, or `DETECT`."""


def decode_text(raw: bytes, encoding: str) -> str:
    """Decode a text file without its byte order mark; raises `BadRecord` for another or no encoding."""
    if encoding == DETECT:
        # UTF-32 first: its mark begins with the mark of UTF-16.
        for mark, name in _MARKS:
            if raw.startswith(mark):
                return _decode_strictly(raw, name)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return _decode_strictly(raw, guess_encoding(raw))
    return _decode_strictly(raw, "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding)


def decode_page(raw: bytes, declared: str = "") -> str:
    """Decode a page by byte order mark, HTTP header, meta element or a guess, as browsers do. Undecodable
    bytes become U+FFFD; raises `BadRecord` above `_MAX_REPLACED`.

    Args:
        raw: the page.
        declared: encoding in the HTTP header; "": none.
    """
    for mark, name in _MARKS:
        if raw.startswith(mark):
            return raw.decode(name, "replace")
    try:
        return raw.decode("utf-8")  # before declarations: no other encoding gives valid UTF-8
    except UnicodeDecodeError:
        pass
    # Browsers search the first kilobyte; some pages declare the encoding later.
    meta = _DECLARED.search(raw[:4096])
    for name in (declared, meta[1].decode() if meta else ""):
        text = _decode_like_browsers(raw, name)
        if text is not None:
            return text
    text = _decode_like_browsers(raw, guess_encoding(raw))
    if text is None:
        raise BadRecord("encoding", "is no text in any encoding that fits; leave it out", content=raw[:1000])
    return text


def _decode_like_browsers(raw: bytes, name: str) -> str | None:
    name = name.strip().lower()
    try:
        text = raw.decode(_BROWSERS.get(name, name), "replace") if name else ""
    except (LookupError, ValueError):
        return None
    return text if text and text.count("\ufffd") <= _MAX_REPLACED * len(text) else None


def guess_encoding(raw: bytes) -> str:
    """Return the encoding that fits a text best; raises `BadRecord` if none does."""
    # Zero bytes occur in no text encoding that the library guesses; it does not guess UTF-16 without a mark.
    if b"\0" in raw[:_SAMPLE_BYTES]:
        raise BadRecord("binary", "is no text (it holds zero bytes); leave it out")
    from charset_normalizer import from_bytes  # optional package (extra `data`)

    best = from_bytes(raw[:_SAMPLE_BYTES]).best()
    if best is None:
        raise BadRecord("encoding", "is no UTF-8 and fits no other encoding; set encoding to the right one, "
                                    "or leave it out", content=raw[:1000])
    return best.encoding


def _decode_strictly(raw: bytes, encoding: str) -> str:
    try:
        return raw.decode(encoding)
    except (UnicodeDecodeError, UnicodeError) as e:
        code = "utf8" if encoding.startswith("utf-8") else "encoding"
        hint = " (encoding: detect finds out which it is)" if code == "utf8" else ""
        name = encoding.removesuffix("-sig").upper()
        raise BadRecord(code, f"is not {name} ({str(e)[:120]}); set encoding to what it is{hint}",
                        content=raw[:1000]) from None
