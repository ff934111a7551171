"""What needles are made of: whole rare words, pairs that never mix, and text without special tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from megatron_sov.data.shards import Source, open_sources
from megatron_sov.errors import UserError
from megatron_sov.eval.needle_text import Haystack, NeedleForm, needle_form


def test_words_are_rare_and_whole_and_read_as_english(form: NeedleForm, token_shards: Path) -> None:
    tokenizer = Tokenizer.from_file(str(token_shards / "tokenizer/tokenizer.json"))
    words = [tokenizer.decode([w]) for w in form.words]
    assert len(set(words)) == 64
    assert all(w[0] == " " and w[1:].isalpha() and len(w) >= 5 for w in words)
    key, value = form.draw(np.random.default_rng(0), 2, test=True)
    text = tokenizer.decode(form.statement(key, value))
    assert text == "\nThe code of" + "".join(tokenizer.decode([w]) for w in [*key, *value]) + "."
    assert tokenizer.encode(text, add_special_tokens=False).ids == form.statement(key, value)


def test_pairs_of_tests_and_of_training_never_mix(form: NeedleForm) -> None:
    test, train = ({tuple(p) for p in form.pairs[which].tolist()} for which in (True, False))
    assert not test & train
    assert len(test) + len(train) == 64 * 63
    assert 0.15 < len(test) / (64 * 63) < 0.25
    fewer = NeedleForm(form.opening, form.closing, form.words[::-2])
    assert {tuple(p) for p in fewer.pairs[True].tolist()} < test, "the split must not depend on which words there are"


def test_text_goes_on_through_documents_and_leaves_special_tokens_out(form: NeedleForm, haystacks: dict[str, Haystack],
                                                                      token_shards: Path) -> None:
    stored = []
    for source in open_sources({str(token_shards): 1.0}, 1024):
        shard = source.shard("heldout")
        ids = np.concatenate([shard.tokens(i, 0, int(n)) for i, n in enumerate(shard.lengths)] * 2)
        assert set(form.special) & set(ids.tolist())
        stored.append(" ".join(map(str, ids[~np.isin(ids, form.special)])))
    found = [haystacks["heldout"].text(np.random.default_rng(seed), 400) for seed in range(12)]
    texts = [" ".join(map(str, ids)) for ids in found]
    assert all(len(ids) == 400 for ids in found)
    sources = {next(k for k, s in enumerate(stored) if text in s) for text in texts}
    assert sources == {0, 1} and len(set(texts)) == 12


def test_mistakes_are_named(token_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no readable tokenizer\.json"):
        needle_form(tmp_path)
    tokenizer = Tokenizer.from_file(str(token_shards / "tokenizer/tokenizer.json"))
    letters = type(tokenizer.model)({c: i for i, c in enumerate("abc")}, [])
    Tokenizer(letters).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="only 0 of its tokens are whole words, needles need 16"):
        needle_form(tmp_path)
    chats = Source("chats", token_shards, True, {}, {"heldout": 100}, 1.0)
    with pytest.raises(UserError, match="hold no 'heldout' text to hide needles in"):
        Haystack([chats], "heldout", ())
