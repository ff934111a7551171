"""Control characters in text of strangers."""

from __future__ import annotations

import unicodedata

from megatron_sov.documents.visible import visible


def test_control_characters_are_shown() -> None:
    assert visible("a\x1b[2Jb\x1b]0;title\x07\r\x9b") == r"a\x1b[2Jb\x1b]0;title\x07\r\x9b"


def test_all_else_stays() -> None:
    kept = "".join(chr(c) for c in range(0x3000) if unicodedata.category(chr(c)) != "Cc") + "\n\t한국어😀"
    assert visible(kept) == kept
    assert not [c for c in visible("".join(map(chr, range(256)))) if unicodedata.category(c) == "Cc"
                and c not in "\n\t"]
