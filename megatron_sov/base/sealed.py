"""Sealed files contain a BLAKE3 checksum over the whole file, checked before reading.

The seal is part of the file and therefore survives copies and renames. Parquet files store it as footer
metadata, JSON files as a key, and all other files after the last byte. The checksum is computed with zeros in
place of the seal. Other programs can read sealed files as usual.
"""

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import write_atomically
from megatron_sov.base.digests import Digest
from megatron_sov.base.errors import UserError

SEAL = "seal"
"""JSON key and Parquet metadata key for the seal."""
_MARK, _ZEROS = b"sealed:blake3:", b"0" * 64
SEAL_PLACEHOLDER = (_MARK + _ZEROS).decode()
"""Placeholder for a seal: mark and zeros."""
_TAIL_BYTES = 1 << 16
"""Bytes at the end of a file that are searched for the seal."""
_PARQUET, _KEY = b"PAR1", SEAL.encode() + b"\x18" + bytes([len(_MARK + _ZEROS)])
"""Magic bytes at the end of a Parquet file; bytes before a seal in its footer (key, type, length)."""
_MOST_FOOTER_BYTES = 1 << 28
_BLOCK_BYTES = 1 << 20
_SETTLED_S = 1.0
"""Seconds after which a further change must alter a file's change time (clock ticks are coarse)."""
RUN_AGAIN = "delete it and run the command again"


def seal_bytes(data: bytes, owner: str = "") -> bytes:
    """Return `data` with its checksum in place of the last `SEAL_PLACEHOLDER`; without `SEAL_PLACEHOLDER`,
    append the seal.

    Args:
        data: the bytes to seal.
        owner: identity of the owner, hashed but not stored: a file copied from another owner fails its check
            (same meaning in the whole module).
    """
    # the last occurrence: the text of a row may contain `SEAL_PLACEHOLDER`
    head, mark, tail = data.rpartition(SEAL_PLACEHOLDER.encode())
    if not mark:
        head, tail = data, b""
    return head + _MARK + _hash_parts([head, _MARK + _ZEROS, tail], owner) + tail


def seal_file(file: Path, owner: str = "") -> None:
    """Write a file's checksum over the last `SEAL_PLACEHOLDER` or after the end."""
    with open(file, "r+b") as f:
        start = _find_mark(f, SEAL_PLACEHOLDER.encode())
        if start is None:
            start = f.seek(0, os.SEEK_END)
            f.write(SEAL_PLACEHOLDER.encode())
        # the seal still holds zeros here
        digest = _hash_around_seal(f, start, owner)
        f.seek(start + len(_MARK))
        f.write(digest)


def write_sealed(file: Path, data: bytes, owner: str = "") -> None:
    """Write `data` followed by a seal; memory maps find the data at offset 0. Raises `UserError`: the disk is
    full or the folder is not writable."""
    write_atomically(file, data + _MARK + _hash_parts([data, SEAL_PLACEHOLDER.encode()], owner))


def find_seal_damage(file: Path, owner: str = "") -> str | None:
    """Return a sentence if a file is missing or damaged, else None; a process reads unchanged files once."""
    try:
        check_seal(file, "", owner)
    except OSError as e:
        return f"{file}: cannot be read ({os.strerror(e.errno or 0)})"
    except UserError as e:
        return str(e).removesuffix("; ")
    return None


def check_seal(file: Path, remedy: str = RUN_AGAIN, owner: str = "", *, is_required: bool = True) -> None:
    """Raise `UserError` with the fix `remedy` if a file is damaged, or has no seal although it `is_required`.
    Raises `OSError`: the file cannot be read."""
    stat = os.stat(file)
    # cache key: changes with the content, because `touch` cannot set back the change time
    version = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    is_settled = time.time_ns() - stat.st_ctime_ns > _SETTLED_S * 1e9
    # do not cache a fresh result: the next change may have the same change time
    is_sealed = (_is_sealed if is_settled else _is_sealed.__wrapped__)(os.fspath(file), version, owner)
    damage = ""
    if is_sealed is False:
        damage = f"is damaged{' or belongs elsewhere' if owner else ''} (it differs from its own checksum)"
    elif is_sealed is None and is_required:
        damage = "is damaged (it has no checksum of its own)"
    if damage:
        raise UserError(f"{file}: {damage}; {remedy}")


@lru_cache(maxsize=1 << 16)
def _is_sealed(file: str, mark: tuple[int, ...], owner: str) -> bool | None:
    """Return whether a file matches the seal; None: no seal. `mark` only extends the cache key."""
    with open(file, "rb") as f:
        start = _find_mark(f, _MARK)
        if start is None:
            return None
        f.seek(start + len(_MARK))
        return bool(f.read(len(_ZEROS)) == _hash_around_seal(f, start, owner))


def _find_mark(f: Any, mark: bytes) -> int | None:
    """Return the offset of the last seal mark near the end of a file, else None.

    In Parquet, search the whole footer for the mark after its key: elsewhere it would be text of a row.
    """
    size = f.seek(0, os.SEEK_END)
    f.seek(max(0, size - 8))
    end, tail, key = f.read(), _TAIL_BYTES, b""
    # Parquet ends with the footer's length (4 bytes) and magic bytes; metadata is in the footer
    if end[4:] == _PARQUET:
        tail, key = min(int.from_bytes(end[:4], "little"), _MOST_FOOTER_BYTES) + len(end), _KEY
    begin = max(0, size - tail)
    f.seek(begin)
    index = f.read().rfind(key + mark)
    # `key` is empty except in Parquet
    start = begin + index + len(key)
    return None if index < 0 or start + len(SEAL_PLACEHOLDER) > size else start


def _hash_around_seal(f: Any, start: int, owner: str) -> bytes:
    """Return a file's checksum with zeros in the seal, which begins at offset `start`."""
    digest = _begin_digest(owner)
    f.seek(0)
    remaining = start
    while remaining and (block := f.read(min(remaining, _BLOCK_BYTES))):
        digest.update(block)
        remaining -= len(block)
    digest.update(SEAL_PLACEHOLDER.encode())
    f.seek(start + len(SEAL_PLACEHOLDER))
    while block := f.read(_BLOCK_BYTES):
        digest.update(block)
    return digest.text().partition(":")[2].encode()


def _begin_digest(owner: str) -> Digest:
    digest = Digest()
    if owner:
        digest.update(f"{owner}\0".encode("utf-8", "surrogateescape"))
    return digest


def _hash_parts(parts: Sequence[bytes], owner: str) -> bytes:
    digest = _begin_digest(owner)
    for part in parts:
        digest.update(part)
    return digest.text().partition(":")[2].encode()


def write_sealed_json(file: Path, value: Any, owner: str = "") -> None:
    """Write a JSON value with a seal: objects get the key "seal", other values move under "content".

    Objects that have one of these two keys also go under "content".
    """
    # flat if possible: other programs find the keys at the top level
    is_flat = isinstance(value, dict) and not {SEAL, "content"} & value.keys()
    content = {**value, SEAL: SEAL_PLACEHOLDER} if is_flat else {"content": value, SEAL: SEAL_PLACEHOLDER}
    # ASCII only: file names may hold bytes that are not valid UTF-8
    write_atomically(file, seal_bytes((json.dumps(content, indent=1) + "\n").encode(), owner))


def read_sealed_json(file: Path, remedy: str = RUN_AGAIN, owner: str = "") -> Any:
    """Return the value written by `write_sealed_json`. Raises `UserError`: missing or damaged file."""
    try:
        value = json.loads(_read_checked(file, remedy, owner))
        del value[SEAL]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"{file}: is damaged ({e}); {remedy}") from None
    return value["content"] if value.keys() == {"content"} else value


def try_read_sealed_json(file: Path) -> Any:
    """Return the value written by `write_sealed_json`; None: missing or damaged file (for caches)."""
    with suppress(UserError):
        return read_sealed_json(file)
    return None


def read_sealed_lines(file: Path, remedy: str = RUN_AGAIN) -> list[bytes]:
    """Return a sealed JSONL file's lines without the seal's line. Raises `UserError`: the file is missing,
    unreadable or damaged."""
    return [line + b"\n" for line in _read_checked(file, remedy).split(b"\n")[:-2]]


def _read_checked(file: Path, remedy: str, owner: str = "") -> bytes:
    try:
        check_seal(file, remedy, owner)
        return file.read_bytes()
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror or e}); {remedy}") from None


def seal_parquet(writer: Any) -> None:
    """Reserve space for the seal in a Parquet footer; `seal_file` fills the space afterwards."""
    writer.add_key_value_metadata({SEAL: SEAL_PLACEHOLDER})


def open_sealed_parquet(file: Path, remedy: str = RUN_AGAIN, *, is_required: bool = False,
                        **options: Any) -> Any:
    """Check a Parquet file's seal, and open the file with pyarrow.

    Args:
        remedy: the fix in the error message.
        is_required: refuse a file without a seal; files written by a pipeline always have one.
        options: of `pyarrow.parquet.ParquetFile`.

    Raises:
        UserError: the file is damaged.
        OSError, pyarrow.ArrowException: the file cannot be opened.
    """
    from pyarrow import parquet  # not at the top: it is slow to import, and most seals are of JSON files

    check_seal(file, remedy, is_required=is_required)
    return parquet.ParquetFile(file, page_checksum_verification=True, **options)
