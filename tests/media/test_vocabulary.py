"""Blocks of ids as a tokenizer's manifest has them."""

from __future__ import annotations

import pytest

from megatron_sov.errors import UserError
from megatron_sov.media.vocabulary import AUDIO, IMAGE, Block, described, read_blocks


def test_blocks_are_read_back() -> None:
    blocks = [Block(AUDIO, 128606, 6561), Block(IMAGE, 135168, 65536)]
    assert read_blocks(described(blocks), "it") == {b.kind: b for b in blocks}
    assert blocks[1].end == 200704 and read_blocks(None, "it") == {}


def test_a_broken_record_is_refused() -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_blocks({AUDIO: {"first": 1}}, "it")
