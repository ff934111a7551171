"""What a byte-level tokenizer.json says: GPT-2's pattern, bytes, ranks, and reasons why there are none."""

from __future__ import annotations

from typing import Any

import pytest
import regex
from tokenizers import pre_tokenizers

from megatron_sov.base.documents.byte_bpe import (
    GPT2_PATTERN, NotByteBpe, byte_characters, merges, ranks, split_pattern)


def byte_level(**model: Any) -> dict[str, Any]:
    vocab = dict(byte_characters()) | {"ab": 256, "abc": 257, "<e>": 258}
    return {"added_tokens": [{"content": "<e>", "special": True}], "pre_tokenizer": {
        "type": "ByteLevel", "add_prefix_space": False, "use_regex": True}, "model": {
        "type": "BPE", "vocab": vocab, "merges": ["a b", ["ab", "c"]], **model}}


def test_the_byte_alphabet_is_that_of_transformers() -> None:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert byte_characters() == {character: byte for byte, character in bytes_to_unicode().items()}


def test_byte_level_alone_splits_by_gpt2s_pattern() -> None:
    assert split_pattern(byte_level()) == GPT2_PATTERN
    text = "It's 2026,  don't\n\n  panic: 한국어 ไทย x=1 \t"
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    assert [text[a:b] for _, (a, b) in pieces] == [m.group() for m in regex.finditer(GPT2_PATTERN, text)]


def test_ranks_are_ids_of_bytes_and_products() -> None:
    assert merges(byte_level()) == [("a", "b"), ("ab", "c")]
    found = ranks(byte_level())
    assert found == {bytes([b]): b for b in range(256)} | {b"ab": 256, b"abc": 257}
    whole = byte_level(ignore_merges=True)
    whole["model"]["vocab"] |= {"xyz": 259}
    assert ranks(whole)[b"xyz"] == 259


@pytest.mark.parametrize(("model", "reason"), [
    ({"type": "Unigram"}, "its model is not plain byte-level BPE"),
    ({"merges": ["ab c", "a b"]}, "its ids do not rise with its merges"),
    ({"merges": ["a b"]}, "its vocabulary is not 256 bytes and one token for each merge"),
    ({"vocab": {"▁": 0}, "merges": []}, "its vocabulary is not spelled in bytes"),
])
def test_what_has_no_ranks_says_why(model: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotByteBpe, match=reason):
        ranks(byte_level(**model))
