"""From bytes to text: by what a file says of itself, by its bytes, or by setting."""

from __future__ import annotations

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
from megatron_sov.base.documents.files import ZstdFile
from megatron_sov.base.settings import Bound, ProblemCode, Violation

# What reading may take: limits that every format has, and reading compressed files within them.

MAX_RATIO = 250
"""Of unpacked to packed bytes, above the first `FREE_BYTES`: text of people stays below 50."""
FREE_BYTES = 1 << 20
COMPRESSED = (".gz", ".zst")
_BLOCK_BYTES = 1 << 20
LimitBytes = Annotated[int, Ge(1000)]


@dataclass(frozen=True)
class EncodingLimits:
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
def open_unpacked(file: Path) -> Iterator[IO[bytes]]:
    """Open a file that may be compressed (`.gz`, `.zst`).

    Raises:
        BadRecord: inside the `with`, where the compressed data are cut off or damaged.
    """
    suffix = file.suffix.lower()
    if suffix == ".gz":
        stream = cast(IO[bytes], gzip.open(file, "rb"))  # noqa: SIM115  (closed below)
    elif suffix == ".zst":
        stream = io.BufferedReader(ZstdFile(file))
    else:
        stream = open(file, "rb")  # noqa: SIM115  (closed below)
    with stream:
        try:
            yield stream
        # Inside the `with` of the caller: what was read before the damage has been yielded.
        except (EOFError, zlib.error, gzip.BadGzipFile) as e:
            raise BadRecord("truncated", f"is cut off or damaged ({e}); fetch the file again") from None


def iter_limited_blocks(stream: IO[bytes], packed_bytes: int,
                        most_bytes: float = math.inf) -> Iterator[bytes]:
    """Yield what a stream holds.

    Args:
        stream: of unpacked bytes.
        packed_bytes: size of what it comes from.
        most_bytes: it may hold.

    Raises:
        BadRecord: it is more, or more than `MAX_RATIO` times as large as what it comes from.
    """
    total = 0
    while block := read_block(stream, _BLOCK_BYTES):
        total += len(block)
        check_unpacked_size(packed_bytes, total, most_bytes)
        yield block


def read_block(stream: IO[bytes], most_bytes: int) -> bytes:
    """Return what a stream has next: where it is damaged, all that comes before, which `read` would lose."""
    return cast(io.BufferedReader, stream).read1(most_bytes)


def check_unpacked_size(packed_bytes: int, unpacked_bytes: int, most_bytes: float) -> None:
    """Raise `BadRecord` where what is packed unpacks to too much."""
    if unpacked_bytes > most_bytes:
        raise BadRecord("too_long", f"holds more than unpacked_bytes = {most_bytes:,} bytes; raise the "
                                    "limit, or leave it out")
    # Small files may have any ratio.
    if unpacked_bytes > FREE_BYTES + MAX_RATIO * packed_bytes:
        raise BadRecord("bomb", f"unpacks {packed_bytes:,} bytes to more than {MAX_RATIO} times as much, as "
                                "no text does; leave it out")


def read_unpacked(file: Path, limits: EncodingLimits) -> bytes:
    """Return what a file holds, unpacked.

    Raises:
        BadRecord: as `unpacked` and `blocks_within`.
    """
    with open_unpacked(file) as stream:
        return b"".join(iter_limited_blocks(stream, file.stat().st_size, limits.unpacked_bytes))


DETECT = "detect"
"""Value of the option `encoding`: UTF-8 where it is, else by the bytes."""
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
          (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_DECLARED = re.compile(rb"""(?:<meta[^>]{0,400}?charset\s*=|<\?xml[^>]{0,200}?encoding\s*=)\s*["']?\s*"""
                       rb"""([A-Za-z0-9_.:-]{2,40})""", re.IGNORECASE)
_BROWSERS = {"iso-8859-1": "cp1252", "latin-1": "cp1252", "us-ascii": "cp1252", "ascii": "cp1252",
             "euc-kr": "cp949", "ks_c_5601-1987": "cp949", "ksc5601": "cp949", "shift_jis": "cp932",
             "x-sjis": "cp932", "gb2312": "gb18030", "gbk": "gb18030", "windows-874": "cp874",
             "tis-620": "cp874", "x-windows-949": "cp949", "utf-16": "utf-8", "utf-16le": "utf-8",
             "utf-16be": "utf-8"}
"""Encoding that a page names -> the larger one that browsers read it as (encoding.spec.whatwg.org, 4.2); a
page whose meta element can be read is no UTF-16 (html.spec.whatwg.org, 13.2.3.2)."""
_SAMPLE_BYTES = 1 << 16
_MOST_REPLACED = 0.01
"""Share of characters that were no text in the encoding; above it the encoding is wrong."""


def _unknown(encoding: str) -> Violation | None:
    try:
        if encoding == DETECT or codecs.lookup(encoding)._is_text_encoding:
            return None
    except (LookupError, ValueError):
        pass
    return ProblemCode.CHOICE, "is no encoding that Python knows", f"write {DETECT}, utf-8, cp949, ..."


Encoding = Annotated[str, Bound(_unknown)]
"""One of Python's names of encodings of text, or `DETECT`."""


def decode_text(raw: bytes, encoding: str) -> str:
    """Return a text file's text, without a byte order mark.

    Raises:
        BadRecord: it is none in that encoding, or none can be told from its bytes.
    """
    if encoding == DETECT:
        # The mark of UTF-32 begins with that of UTF-16, and is tried before it.
        for mark, name in _MARKS:
            if raw.startswith(mark):
                return _strict(raw, name)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return _strict(raw, guess_encoding(raw))
    return _strict(raw, "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding)


def decode_page(raw: bytes, declared: str = "") -> str:
    """Return a page's text as browsers find its encoding: mark, header, meta element, bytes; single bytes
    that are no text become U+FFFD.

    Args:
        raw: the page.
        declared: encoding that its HTTP header names; "": none.

    Raises:
        BadRecord: more than a hundredth of it is no text in that encoding.
    """
    for mark, name in _MARKS:
        if raw.startswith(mark):
            return raw.decode(name, "replace")
    try:
        return raw.decode("utf-8")  # whatever it says, nothing else looks like it
    except UnicodeDecodeError:
        pass
    # Browsers look no further than the first kilobyte; some pages name it later.
    meta = _DECLARED.search(raw[:4096])
    for name in (declared, meta[1].decode() if meta else ""):
        text = _as_browsers(raw, name)
        if text is not None:
            return text
    text = _as_browsers(raw, guess_encoding(raw))
    if text is None:
        raise BadRecord("encoding", "is no text in any encoding that fits; leave it out", content=raw[:1000])
    return text


def _as_browsers(raw: bytes, name: str) -> str | None:
    name = name.strip().lower()
    try:
        text = raw.decode(_BROWSERS.get(name, name), "replace") if name else ""
    except (LookupError, ValueError):
        return None
    return text if text and text.count("\ufffd") <= _MOST_REPLACED * len(text) else None


def guess_encoding(raw: bytes) -> str:
    """Return the encoding that fits a text's bytes best.

    Raises:
        BadRecord: none does.
    """
    # No encoding that is guessed here has zero bytes in text; UTF-16 without a mark is not guessed.
    if b"\0" in raw[:_SAMPLE_BYTES]:
        raise BadRecord("binary", "is no text (it holds zero bytes); leave it out")
    from charset_normalizer import from_bytes

    best = from_bytes(raw[:_SAMPLE_BYTES]).best()
    if best is None:
        raise BadRecord("encoding", "is no UTF-8 and fits no other encoding; set encoding to the right one, "
                                    "or leave it out", content=raw[:1000])
    return best.encoding


def _strict(raw: bytes, encoding: str) -> str:
    try:
        return raw.decode(encoding)
    except (UnicodeDecodeError, UnicodeError) as e:
        code = "utf8" if encoding.startswith("utf-8") else "encoding"
        way_out = " (encoding: detect finds out which it is)" if code == "utf8" else ""
        name = encoding.removesuffix("-sig").upper()
        raise BadRecord(code, f"is not {name} ({str(e)[:120]}); set encoding to what it is{way_out}",
                        content=raw[:1000]) from None
