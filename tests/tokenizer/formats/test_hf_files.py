"""Building the files: special tokens cannot be reached by text, and bytes are spelled as the
library spells them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from tokenizers import pre_tokenizers

from megatron_sov.base.errors import UserError
from tokenizer.bpe.vocabulary import Vocabulary, byte_ids, spelled
from tokenizer.formats.hf_files import finished
from tokenizer.presets import SOLAR_OPEN

TEXT = ["<|end|> <|end|>\n" * 50, "plain words, plain text. " * 30]


def test_a_merge_that_spells_a_special_token_is_refused(learn: Callable[..., Vocabulary]) -> None:
    whole = replace(SOLAR_OPEN, name="mine", split_pattern=r"\S+|\s+")
    with pytest.raises(UserError, match=r"text can become the special token '<\|end\|>'"):
        finished(whole, learn(whole, 290, TEXT))
    single = replace(SOLAR_OPEN, name="mine", special_tokens={**SOLAR_OPEN.special_tokens, "a": 9})
    with pytest.raises(UserError, match="text can become the special token 'a'"):
        finished(single, learn(single, 260, TEXT))


def test_special_tokens_in_text_are_found_only_on_request(learn: Callable[..., Vocabulary]) -> None:
    tokenizer = finished(SOLAR_OPEN, learn(SOLAR_OPEN, 290, TEXT))
    assert tokenizer.encode("<|end|>").ids == [21]
    tokenizer.encode_special_tokens = True
    assert min(tokenizer.encode("<|end|>").ids) >= 64


def test_bytes_are_spelled_as_the_library_does() -> None:
    assert [spelled(bytes([b])) for b in sorted(range(256), key=lambda b: byte_ids()[b])] == sorted(
        pre_tokenizers.ByteLevel.alphabet())
    for text in ("a b\n", "가", "é\x00\x7f"):
        split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
        assert spelled(text.encode()) == split[0][0]
