"""Tokens as people read them."""

from __future__ import annotations

import pytest

from tokenizer.report.check import cut, is_text, shown


@pytest.mark.parametrize(("token", "text"), [
    (b" the", "␣the"), ("한국".encode(), "한국"), (b"\n\t\x00", r"\n\t\x00"),
    ("안".encode()[:2], r"\xec\x95"), (" a b ", "␣a␣b␣"), ("\u00a0\u200b", r"\xa0\u200b"), (b"", "")])
def test_spaces_controls_and_parts_of_characters_are_seen(token: bytes | str, text: str) -> None:
    assert shown(token) == text


def test_a_cut_text_has_bars_between_its_tokens() -> None:
    assert cut([b"The", b" q", b"u", b"\n"]) == r"The|␣q|u|\n" and cut([]) == ""


@pytest.mark.parametrize(("token", "whole"), [(b"abc", True), ("가".encode(), True),
                                              ("가".encode()[1:], False), (b"\xff", False)])
def test_whole_characters_are_text(token: bytes, whole: bool) -> None:
    assert is_text(token) == whole
