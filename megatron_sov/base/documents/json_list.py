"""A file that is one list in JSON, read item by item in bounded memory."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from typing import Any

from megatron_sov.base.documents.messages import BadRecord

_LIST_BLOCK_BYTES = 1 << 20
_ESCAPE_CHARS = 16
"""An error so near to the end of what is read may be of something that is not read to its end."""


def json_items(read: Callable[[int], bytes], limit_bytes: int) -> Iterator[Any]:
    """Yield the items of a list; what cannot be read as one is a `BadRecord`, the last that is yielded.

    Args:
        read: returns at most so many bytes of the file; none at its end.
        limit_bytes: of an item.
    """
    window = _ByteWindow(read, limit_bytes)
    try:
        if window.sign() != "[":
            raise BadRecord("json", "is no list in JSON; pass a list of records, or JSON Lines")
        window.at += 1
        if window.sign() != "]":
            yield window.item()
            while window.sign() == ",":
                window.at += 1
                yield window.item()
        if window.sign() != "]":
            raise BadRecord("json", "is not valid JSON: a ',' or the list's ']' must stand before it; mend "
                                    "it, or fetch it again")
        window.at += 1
        if window.sign():
            raise BadRecord("json", "has more behind the end of its list; keep one list in a file, or write "
                                    "JSON Lines")
    except BadRecord as e:
        yield e


class _ByteWindow:
    """What is read of the file, and where in it one is."""

    def __init__(self, read: Callable[[int], bytes], limit_bytes: int) -> None:
        self._read, self._limit = read, limit_bytes
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text, self.at, self._is_whole = "", 0, False

    def sign(self) -> str:
        """Go to the next character that is no blank, and return it; empty at the end."""
        while True:
            while self.at < len(self._text):
                if (char := self._text[self.at]) not in " \t\r\n":
                    return char
                self.at += 1
            if self._is_whole:
                return ""
            self._grow()

    def item(self) -> Any:
        """Return the item that begins here, and go behind it.

        Raises:
            BadRecord: it is no JSON, or too long.
        """
        self.sign()
        while True:
            try:
                found, end = json.JSONDecoder().raw_decode(self._text, self.at)
                # a number may go on behind what is read, as 1 does in 1.5 and 1e+5
                ends = isinstance(found, (dict, list, str)) or end + len("e+") < len(self._text)
                if ends or self._is_whole:
                    self.at = end
                    return found
            except json.JSONDecodeError as e:
                is_cut = e.pos > len(self._text) - _ESCAPE_CHARS or e.msg.startswith("Unterminated string")
                if self._is_whole or not is_cut:
                    raise BadRecord("json", f"is not valid JSON ({e.msg}); the rest of the file is not read; "
                                            "mend it") from None
            except (ValueError, RecursionError) as e:
                raise BadRecord("json", f"is not valid JSON ({str(e)[:100]}); the rest of the file is not "
                                        "read; mend it") from None
            if len(self._text) - self.at > self._limit:
                raise BadRecord("too_long", f"is longer than --max-document-bytes {self._limit}; cut it, or "
                                            "raise the limit; the rest of the file is not read")
            self._grow()

    def _grow(self) -> None:
        """Read on, at least so much as is held: an item is begun again a few times only."""
        left = max(_LIST_BLOCK_BYTES, len(self._text) - self.at)
        parts = [self._text[self.at:]]
        try:
            while left > 0 and not self._is_whole:
                block = self._read(left)
                self._is_whole = not block
                left -= len(block)
                parts.append(self._decode(block, self._is_whole))
        except UnicodeDecodeError as e:
            raise BadRecord("utf8", f"is not UTF-8 ({e.reason}); convert it, e.g. iconv -f CP949 -t UTF-8; "
                                    "it and what comes behind it are not read") from None
        self._text, self.at = "".join(parts), 0
