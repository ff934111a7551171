"""Cutting text at blank lines: nothing is lost, and pieces keep their limit."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_sov.documents import (
    cut_at_blank_lines,
    cut_text,
)


@given(st.text(alphabet=st.sampled_from("ab가é\U0001f600 \n\r")), st.integers(4, 20))
def test_pieces_join_to_the_text_and_keep_the_limit(text: str, limit_bytes: int) -> None:
    pieces = list(cut_text(text, limit_bytes))
    assert "".join(pieces) == text
    assert all(0 < len(p.encode()) <= limit_bytes for p in pieces)


@given(st.binary(max_size=200), st.integers(4, 50), st.integers(1, 20))
def test_cuts_terminate_on_any_bytes(raw: bytes, limit_bytes: int, block_bytes: int) -> None:
    blocks = [raw[i : i + block_bytes] for i in range(0, len(raw), block_bytes)]
    assert b"".join(cut_at_blank_lines(blocks, limit_bytes)) == raw


def test_cuts_prefer_blank_lines_then_lines_then_spaces() -> None:
    assert list(cut_text("aa\n\nbb\ncc dd", 9)) == ["aa\n\n", "bb\ncc dd"]
    assert list(cut_text("aaaa\nbb cc", 8)) == ["aaaa\n", "bb cc"]
    assert list(cut_text("aaaa bbbb", 8)) == ["aaaa ", "bbbb"]
    assert list(cut_text("가나다", 8)) == ["가나", "다"]
