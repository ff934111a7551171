"""Needle words are rare whole words of the language, and pairs of tests and training are disjoint."""

import inspect
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatron_sov.base.errors import UserError
from megatron_sov.eval.needle.text import (
    LANGUAGES, PHRASES, Haystack, NeedleForm, build_needle_form, detect_language, fill_slots, list_phrases,
    open_haystacks)
from megatron_sov.model.config import Language
from megatron_sov.train.data.sources import Source, open_sources


def test_words_are_rare_whole_tokens(form: NeedleForm, token_shards: Path) -> None:
    tokenizer = Tokenizer.from_file(str(token_shards / "tokenizer/tokenizer.json"))
    words = [tokenizer.decode([w]) for w in form.words]
    assert len(set(words)) == 64
    assert all(w[0] == " " and w[1:].isalpha() and len(w) >= 5 for w in words)
    key, value = form.draw(np.random.default_rng(0), 2, test=True)
    sentence = form.draw_sentence(np.random.default_rng(0), test=True)
    text = tokenizer.decode(fill_slots(sentence, key, value))
    assert text == "\ncodes.add(" + "".join(tokenizer.decode([w]) for w in [*key, *value]) + ")"
    assert fill_slots(sentence, key, value)[:len(fill_slots(sentence, key))] == fill_slots(sentence, key)
    assert fill_slots(sentence, key)[-2:] == key.tolist()


def test_pairs_and_sentences_of_test_and_training_are_disjoint(form: NeedleForm) -> None:
    test, train = ({tuple(p) for p in form.pairs[which].tolist()} for which in (True, False))
    assert not test & train
    assert len(test) + len(train) == 64 * 63
    assert 0.15 < len(test) / (64 * 63) < 0.25
    fewer_words = NeedleForm(form.language, form.sentences, form.words[::-2])
    assert {tuple(p) for p in fewer_words.pairs[True].tolist()} < test, (
        "the split must not depend on which words there are")
    assert not set(form.sentences[True]) & set(form.sentences[False])


KOREAN = ["서울은", "바다가", "나무를", "하늘에", "사람들", "학교에", "도서관", "음악을", "자동차", "컴퓨터",
          "고양이", "강아지", "비행기", "대한민국", "아침에", "저녁에"]
THAI = ["น้ำ", "ภูเขา", "ต้นไม้", "บ้าน", "ทะเล", "แม่น้ำ", "ดอกไม้", "หนังสือ", "โรงเรียน", "ตลาด", "รถไฟ",
        "เรือ", "นก", "ปลา", "แมว", "หมา"]


def write_word_tokenizer(folder: Path, words: list[str]) -> Path:
    """A tokenizer of single bytes and whole words with a leading space."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary = {sign: i for i, sign in enumerate(alphabet)}
    merges = []
    for word in words:
        signs = byte_level.pre_tokenize_str(" " + word)[0][0]
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
def test_words_are_of_the_language(language: str, words: list[str], tmp_path: Path) -> None:
    other_words = [f"word{chr(97 + i)}" for i in range(20)]
    folder = write_word_tokenizer(tmp_path / "tokenizer", [*words, *other_words])
    form = build_needle_form(folder, language)  # type: ignore[arg-type]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    words_found = {tokenizer.decode([w]) for w in form.words}
    assert {" " + word for word in words} <= words_found, "and parts of them that are words to the tokenizer"
    assert not any(word.isascii() for word in words_found)


@pytest.mark.each("language", LANGUAGES)
def test_words_fall_back_to_other_languages(language: str, token_shards: Path) -> None:
    form = build_needle_form(token_shards / "tokenizer", language)  # type: ignore[arg-type]
    assert form.language == language and len(form.words) == 64
    assert form.needle_tokens(test=True) >= 4 + 2


def test_invalid_values_raise_user_error(token_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot be read"):
        build_needle_form(tmp_path, "english")
    tokenizer = Tokenizer.from_file(str(token_shards / "tokenizer/tokenizer.json"))
    letters = type(tokenizer.model)({c: i for i, c in enumerate("abc")}, [])
    Tokenizer(letters).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="words, needles need 16"):
        build_needle_form(tmp_path, "english")


@pytest.mark.each("language", LANGUAGES)
def test_test_and_training_phrases_are_disjoint(language: Language) -> None:
    phrases = [list_phrases(language, test=test) for test in (True, False)]
    assert all(phrases) and not set(phrases[0]) & set(phrases[1])
    openings = [{text.split("{}")[0] for text in side} for side in phrases]
    assert not openings[0] & openings[1], "a model that learned what stands before a key would know the test"


def test_value_directly_follows_its_key() -> None:
    assert all(text.endswith(("{}{}.", "{}{})")) for texts in PHRASES.values() for text in texts)


PROSE = {
    "english": "It was a bright cold day in April, and the clocks were striking thirteen. (He said so.)\n",
    "korean": "대한민국은 민주공화국이다. 모든 권력은 국민으로부터 나온다. The end.\n",
    "thai": "ประเทศไทยเป็นราชอาณาจักรอันหนึ่งอันเดียว จะแบ่งแยกมิได้ Bangkok\n",
}


def test_text_spans_documents_without_special_tokens(form: NeedleForm, haystacks: dict[str, Haystack],
                                                     token_shards: Path) -> None:
    source_texts = []
    for source in open_sources({str(token_shards): 1.0}, 1024):
        shard = source.open_split("heldout")
        ids = np.concatenate([shard.tokens(i, 0, int(n)) for i, n in enumerate(shard.lengths)] * 2)
        assert set(form.special) & set(ids.tolist())
        source_texts.append(" ".join(map(str, ids[~np.isin(ids, form.special)])))
    words_found = [haystacks["heldout"].text(np.random.default_rng(seed), 400) for seed in range(12)]
    texts = [" ".join(map(str, ids)) for ids in words_found]
    assert all(len(ids) == 400 for ids in words_found)
    sources = {next(k for k, s in enumerate(source_texts) if text in s) for text in texts}
    assert sources == {0, 1} and len(set(texts)) == 12


def test_language_is_detected_or_given(token_shards: Path) -> None:
    assert {name: detect_language(text) for name, text in PROSE.items()} == {name: name for name in PROSE}
    assert detect_language(inspect.getsource(inspect)) == "code"
    sources = open_sources({str(token_shards): 1.0}, 1024)
    tokenizer = token_shards / "tokenizer"
    haystacks = open_haystacks(sources, "heldout", tokenizer, source_languages={"second": "english"})
    assert [h.language for h in haystacks] == ["english", "code"]
    assert [h.sizes for h in haystacks] == [(sources[1].num_tokens["heldout"],),
                                            (sources[0].num_tokens["heldout"],)]
    (code_haystack,) = open_haystacks(sources, "heldout", tokenizer, languages=["code"],
                                      source_languages={"second": "english"})
    assert code_haystack.language == "code"


def test_invalid_haystacks_raise_user_error(token_shards: Path) -> None:
    tokenizer = token_shards / "tokenizer"
    sources = open_sources({str(token_shards): 1.0}, 1024)
    chats = Source("chats", token_shards, "chat", {}, {"heldout": 100}, 1.0)
    with pytest.raises(UserError, match="hold no 'heldout' text"):
        open_haystacks([chats], "heldout", tokenizer)
    with pytest.raises(UserError, match="'heldout' text is thai"):
        open_haystacks(sources, "heldout", tokenizer, languages=["code", "thai"])
    with pytest.raises(UserError, match="--language third=thai: the data"):
        open_haystacks(sources, "heldout", tokenizer, source_languages={"third": "thai"})
