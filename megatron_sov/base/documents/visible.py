"""Text of strangers on a terminal: control characters are shown, not sent."""

from __future__ import annotations

_KEPT = {"\n", "\t"}
_SHOWN = {code: repr(chr(code))[1:-1] for code in (*range(0x20), *range(0x7F, 0xA0))
          if chr(code) not in _KEPT}
"""Character -> its escape, e.g. \\x1b; C0 and C1 begin sequences that move the cursor or rename windows."""


def visible(text: str) -> str:
    """Return text in which every control character but line feed and tab is its escape."""
    return text.translate(_SHOWN)
