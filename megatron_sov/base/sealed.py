"""Files that carry a checksum of all of their bytes, which is looked at before anything of them is believed.

The seal stands in the file itself, so that it goes along with a second name or a copy: in Parquet as metadata
of the footer, in JSON as a key, in everything else behind the last byte.  It is the BLAKE3 of the file with
zeros in the seal's place.  Other programs read the files as they always do.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import atomic_write
from megatron_sov.base.digests import Digest
from megatron_sov.base.errors import UserError

SEAL = "seal"
"""Name of the key that holds it."""
_MARK, _ZEROS = b"sealed:blake3:", b"0" * 64
PLACE = (_MARK + _ZEROS).decode()
"""Stands where the seal comes."""
_TAIL_BYTES = 1 << 16
"""From the end of a file; a seal lies in it."""
_PARQUET, _KEY = b"PAR1", SEAL.encode() + b"\x18" + bytes([len(_MARK + _ZEROS)])
"""How a Parquet file ends; what stands before a seal in its footer: key, type of the value, its length."""
_MOST_FOOTER_BYTES = 1 << 28
_BLOCK_BYTES = 1 << 20
_SETTLED_S = 1.0
"""A file that changed so lately may change again within one tick of its time of change."""
RUN_AGAIN = "delete it and run the command again"


def sealed(data: bytes, of: str = "") -> bytes:
    """Return bytes with their checksum at the last `PLACE` in them, or behind them where they have none.

    Args:
        data: the bytes.
        of: what they belong to (everywhere in this module); it goes into the checksum and not into the file,
            so that a sound file of something else is no sound file here.
    """
    # the last one: text of rows may spell a seal's place
    head, mark, tail = data.rpartition(PLACE.encode())
    if not mark:
        head, tail = data, b""
    return head + _MARK + _hex([head, _MARK + _ZEROS, tail], of) + tail


def seal_file(file: Path, of: str = "") -> str:
    """Put the checksum of a complete file at its last `PLACE`, or behind its last byte; returns it."""
    with open(file, "r+b") as f:
        start = _place(f, PLACE.encode())
        if start is None:
            start = f.seek(0, os.SEEK_END)
            f.write(PLACE.encode())
        # over the file with zeros in the seal's place, which are there at this moment
        digest = _digest(f, start, of)
        f.seek(start + len(_MARK))
        f.write(digest)
    return digest.decode()


def write_sealed(file: Path, data: bytes, of: str = "") -> None:
    """Write bytes with their checksum behind them; what maps the file finds them at its beginning.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    atomic_write(file, data + _MARK + _hex([data, PLACE.encode()], of))


def seal_of(file: Path) -> str:
    """Return the checksum that a file says it has, which nobody has looked at; "": none."""
    with open(file, "rb") as f:
        return _read_seal(f, _place(f, _MARK)).decode("ascii", "replace")


def seal_damage(file: Path, of: str = "", *, is_required: bool = True, seal: str | None = None) -> str | None:
    """Return one sentence where a file is missing or not what was sealed, else None; within one process a
    file that has not changed is read once.

    Args:
        file: the file.
        of: what it belongs to.
        is_required: whether a file without a seal is refused.
        seal: the checksum that it was written with, as a note beside it says; None: there is no note.
    """
    try:
        check_seal(file, "", of, is_required=is_required, seal=seal)
    except OSError as e:
        return f"{file}: cannot be read ({os.strerror(e.errno or 0)})"
    except UserError as e:
        return str(e).removesuffix("; ")
    return None


def check_seal(file: Path, way: str = RUN_AGAIN, of: str = "", *, is_required: bool = True,
               seal: str | None = None) -> None:
    """Raise `UserError` where a file is not what was sealed, with `way`: what to do.  As `seal_damage`.

    Raises:
        OSError: it cannot be read.
    """
    stat = os.stat(file)
    # what changes with the content; the change time cannot be set back by touch
    mark = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    is_settled = time.time_ns() - stat.st_ctime_ns > _SETTLED_S * 1e9
    # a file that has just changed is read each time, for its next change may have the same time
    is_sealed = (_is_sealed if is_settled else _is_sealed.__wrapped__)(os.fspath(file), mark, of)
    what = ""
    if is_sealed is False:
        what = f"is damaged{' or belongs elsewhere' if of else ''} (it differs from its own checksum)"
    elif is_sealed is None and (is_required or seal is not None):
        what = "is damaged (it has no checksum of its own)"
    elif seal is not None and seal_of(file) != seal:
        what = "is not the file that was written here (its checksum is another one)"
    if what:
        raise UserError(f"{file}: {what}; {way}")


@lru_cache(maxsize=1 << 16)
def _is_sealed(file: str, mark: tuple[int, ...], of: str) -> bool | None:
    """Return whether a file's content is what its seal says; None: it has no seal."""
    with open(file, "rb") as f:
        start = _place(f, _MARK)
        return None if start is None else _read_seal(f, start) == _digest(f, start, of)


def _read_seal(f: Any, start: int | None) -> bytes:
    if start is None:
        return b""
    f.seek(start + len(_MARK))
    return bytes(f.read(len(_ZEROS)))


def _place(f: Any, wanted: bytes) -> int | None:
    """Return where the last mark begins near the end of a file, with room for a checksum behind it; in
    Parquet under its key in the footer, which may be long: what stands elsewhere is text of rows."""
    size = f.seek(0, os.SEEK_END)
    f.seek(max(0, size - 8))
    end, tail, key = f.read(), _TAIL_BYTES, b""
    # Parquet ends with the footer's length in 4 bytes and its magic; metadata is in the footer
    if end[4:] == _PARQUET:
        tail, key = min(int.from_bytes(end[:4], "little"), _MOST_FOOTER_BYTES) + len(end), _KEY
    begin = max(0, size - tail)
    f.seek(begin)
    found = f.read().rfind(key + wanted)
    # after the key, which is part of the search in Parquet alone
    place = begin + found + len(key)
    return None if found < 0 or place + len(PLACE) > size else place


def _digest(f: Any, start: int, of: str) -> bytes:
    """Return the checksum of a file whose seal begins at a place."""
    digest = _begin_digest(of)
    f.seek(0)
    left = start
    while left and (block := f.read(min(left, _BLOCK_BYTES))):
        digest.update(block)
        left -= len(block)
    digest.update(PLACE.encode())
    f.seek(start + len(PLACE))
    while block := f.read(_BLOCK_BYTES):
        digest.update(block)
    return digest.text().partition(":")[2].encode()


def _begin_digest(of: str) -> Digest:
    digest = Digest()
    if of:
        digest.update(f"{of}\0".encode("utf-8", "surrogateescape"))
    return digest


def _hex(parts: Sequence[bytes], of: str) -> bytes:
    digest = _begin_digest(of)
    for part in parts:
        digest.update(part)
    return digest.text().partition(":")[2].encode()


def write_json(file: Path, value: Any, of: str = "") -> None:
    """Write a value of plain JSON, an object flat beside its seal, anything else below "content": also an
    object with a key of that name, which could not be told apart."""
    # flat where that can be undone: other programs find the keys where they expect them
    is_flat = isinstance(value, dict) and not {SEAL, "content"} & value.keys()
    whole = {**value, SEAL: PLACE} if is_flat else {"content": value, SEAL: PLACE}
    # nothing but ASCII: names of files may hold bytes that are no text
    atomic_write(file, sealed((json.dumps(whole, indent=1) + "\n").encode(), of))


def read_json(file: Path, way: str = RUN_AGAIN, of: str = "", *, seal: str | None = None) -> Any:
    """Return what `write_json` wrote.

    Raises:
        UserError: it is missing, cannot be read, or differs from what was written.
    """
    try:
        found = json.loads(_checked(file, way, of, seal))
        del found[SEAL]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"{file}: is damaged ({e}); {way}") from None
    return found["content"] if found.keys() == {"content"} else found


def try_read_json(file: Path, of: str = "") -> Any:
    """Return what `write_json` wrote; None where that is missing or damaged, and nothing but a shortcut."""
    with suppress(UserError):
        return read_json(file, of=of)
    return None


def read_lines(file: Path, way: str = RUN_AGAIN, of: str = "", *, seal: str | None = None) -> list[bytes]:
    """Return the lines of a sealed file of JSON lines, without that of the seal.

    Raises:
        UserError: it is missing, cannot be read, or differs from what was written.
    """
    return [line + b"\n" for line in _checked(file, way, of, seal).split(b"\n")[:-2]]


def read_sealed(file: Path, way: str = RUN_AGAIN, of: str = "") -> bytes:
    """Return the bytes whose seal stands behind them.

    Raises:
        UserError: it is missing, cannot be read, or differs from what was written.
    """
    return _checked(file, way, of)[:-len(PLACE)]


def _checked(file: Path, way: str, of: str, seal: str | None = None) -> bytes:
    try:
        check_seal(file, way, of, seal=seal)
        return file.read_bytes()
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror or e}); {way}") from None


def seal_parquet(writer: Any) -> None:
    """Leave the place of a seal in the footer of a Parquet file under construction; behind its end
    `seal_file` fills it."""
    writer.add_key_value_metadata({SEAL: PLACE})


def open_parquet(file: Path, way: str = RUN_AGAIN, *, is_required: bool = False, seal: str | None = None,
                 **options: Any) -> Any:
    """Return a Parquet file opened by pyarrow; one that is sealed is what was written.

    Args:
        file: the file.
        way: what to do where it is damaged, for the message.
        is_required: whether a file without a seal is refused: all that a pipeline leaves for itself has one.
        seal: as of `seal_damage`.
        options: of `pyarrow.parquet.ParquetFile`.

    Raises:
        UserError: its seal says that it is damaged.
        OSError, pyarrow.ArrowException: it cannot be opened.
    """
    from pyarrow import parquet

    check_seal(file, way, is_required=is_required, seal=seal)
    return parquet.ParquetFile(file, page_checksum_verification=True, **options)
