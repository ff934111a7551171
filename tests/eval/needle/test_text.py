"""What needles are made of: whole rare words of the language where there are any,
and pairs that never mix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatron_sov.errors import UserError
from megatron_sov.eval.needle.text import LANGUAGES, NeedleForm, fill, needle_form


def test_words_are_rare_and_whole_and_read_as_a_sentence(form: NeedleForm, token_shards: Path) -> None:
    tokenizer = Tokenizer.from_file(str(token_shards / "tokenizer/tokenizer.json"))
    words = [tokenizer.decode([w]) for w in form.words]
    assert len(set(words)) == 64
    assert all(w[0] == " " and w[1:].isalpha() and len(w) >= 5 for w in words)
    key, value = form.draw(np.random.default_rng(0), 2, test=True)
    sentence = form.draw_sentences(np.random.default_rng(0), test=True).statement
    text = tokenizer.decode(fill(sentence, key, value))
    assert text == "\ncodes.add(" + "".join(tokenizer.decode([w]) for w in [*key, *value]) + ")"
    assert fill(sentence, key, value)[:len(fill(sentence, key))] == fill(sentence, key)
    assert fill(sentence, key)[-2:] == key.tolist()


def test_pairs_and_sentences_of_tests_and_of_training_never_mix(form: NeedleForm) -> None:
    test, train = ({tuple(p) for p in form.pairs[which].tolist()} for which in (True, False))
    assert not test & train
    assert len(test) + len(train) == 64 * 63
    assert 0.15 < len(test) / (64 * 63) < 0.25
    fewer = NeedleForm(form.language, form.sentences, form.words[::-2])
    assert {tuple(p) for p in fewer.pairs[True].tolist()} < test, (
        "the split must not depend on which words there are")
    assert not {s.statement for s in form.sentences[True]} & {s.statement for s in form.sentences[False]}


KOREAN = ["서울은", "바다가", "나무를", "하늘에", "사람들", "학교에", "도서관", "음악을", "자동차", "컴퓨터",
          "고양이", "강아지", "비행기", "대한민국", "아침에", "저녁에"]
THAI = ["น้ำ", "ภูเขา", "ต้นไม้", "บ้าน", "ทะเล", "แม่น้ำ", "ดอกไม้", "หนังสือ", "โรงเรียน", "ตลาด", "รถไฟ",
        "เรือ", "นก", "ปลา", "แมว", "หมา"]


def word_tokenizer(folder: Path, words: list[str]) -> Path:
    """A tokenizer whose tokens are single bytes and whole words with a space before."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary = {sign: i for i, sign in enumerate(alphabet)}
    merges = []
    for word in words:
        signs = spell.pre_tokenize_str(" " + word)[0][0]
        for end in range(2, len(signs) + 1):
            if signs[:end] not in vocabulary:
                vocabulary[signs[:end]] = len(vocabulary)
                merges.append((signs[:end - 1], signs[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(("language", "words"), [("korean", KOREAN), ("thai", THAI)])
def test_a_language_has_words_of_its_own(language: str, words: list[str], tmp_path: Path) -> None:
    folder = word_tokenizer(tmp_path / "tokenizer", [*words, *(f"word{chr(97 + i)}" for i in range(20))])
    form = needle_form(folder, language)  # type: ignore[arg-type]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = {tokenizer.decode([w]) for w in form.words}
    assert {" " + word for word in words} <= found, "and parts of them that are words to the tokenizer"
    assert not any(word.isascii() for word in found)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_tokenizer_without_the_language_lends_its_words(language: str, token_shards: Path) -> None:
    form = needle_form(token_shards / "tokenizer", language)  # type: ignore[arg-type]
    assert form.language == language and len(form.words) == 64
    assert form.phrase_tokens("statement", test=True) >= 4 + 2


def test_mistakes_are_named(token_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot be read as a tokenizer"):
        needle_form(tmp_path, "english")
    tokenizer = Tokenizer.from_file(str(token_shards / "tokenizer/tokenizer.json"))
    letters = type(tokenizer.model)({c: i for i, c in enumerate("abc")}, [])
    Tokenizer(letters).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="only 0 of its tokens are whole words, needles need 16"):
        needle_form(tmp_path, "english")
