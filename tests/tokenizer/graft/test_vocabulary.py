"""Tokens of one sentencepiece model grafted onto another: characters that had only bytes,
and merges of them."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer

from megatron_sov.base.errors import UserError
from tokenizer.formats.sentencepiece_format import from_sentencepiece, new_proto
from tokenizer.graft.vocabulary import CHARACTERS, Surgery, kind_of

ENGLISH = ["the quick brown fox jumps over the lazy dog", "and the other dogs jump over it",
           "it is a fact that they said so"]
THAI = ["กำลังเรียนภาษาไทย น้ำใจไมตรี เป็นมนุษย์สุดประเสริฐ", "ภาษาไทย มนุษย์ ประเทศไทย", "the dog"]


def bpe(lines: list[str], vocab_size: int) -> dict[str, Any]:
    out, proto = io.BytesIO(), new_proto()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 5), model_writer=out, minloglevel=2, vocab_size=vocab_size,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", character_coverage=1.0)
    proto.ParseFromString(out.getvalue())
    return from_sentencepiece(proto, "m")


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def test_characters_and_merges_of_another_model() -> None:
    base, donor = bpe(ENGLISH, 330), bpe(THAI, 340)
    surgery = Surgery(base, "base", set())
    assert surgery.kind == kind_of(donor) == CHARACTERS
    surgery.add_tokens_of(donor, "donor", None)
    before, after = Tokenizer.from_str(json.dumps(base)), Tokenizer.from_str(json.dumps(surgery.finished()))
    new = {token.token: token for token in surgery.new}
    assert {t.how for t in surgery.new} == {"character", "merge"}
    assert new["ท"].old_ids == [before.token_to_id(f"<0x{b:02X}>") for b in "ท".encode()]
    assert (ids(after, "ไทย") != ids(before, "ไทย")
            and len(ids(after, THAI[0])) < 0.4 * len(ids(before, THAI[0])))
    assert after.decode(ids(after, THAI[0])) == THAI[0]
    for text in (*ENGLISH, "東京 é", ""):
        assert ids(after, text) == ids(before, text)
    for token in surgery.new:
        assert after.token_to_id(token.token) == token.id
        assert [t.id for t in after.model.tokenize(token.token)] == [token.id]
        assert [i for t in before.model.tokenize(token.token) for i in [t.id]] == token.old_ids


def test_ids_stop_where_there_is_no_more_room() -> None:
    base = bpe(ENGLISH, 330)
    surgery = Surgery(base, "base", set())
    surgery.add_tokens_of(bpe(THAI, 340), "donor", 335)
    assert [t.id for t in surgery.new] == [330, 331, 332, 333, 334] and "no room" in surgery.skipped


def test_kinds_do_not_mix() -> None:
    base = bpe(ENGLISH, 330)
    byte_level = {"added_tokens": [], "pre_tokenizer": {"type": "ByteLevel"},
                  "model": {"type": "BPE", "vocab": {}, "merges": []}}
    with pytest.raises(UserError, match="since it is byte-level BPE and base is character BPE; both must be"):
        Surgery(base, "base", set()).add_tokens_of(byte_level, "donor", None)
