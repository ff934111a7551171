"""Token ids mean the same on both sides, or the data is refused."""

from __future__ import annotations

import json
import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_sov.base.errors import UserError
from megatron_sov.chat.vocabulary import read_vocabulary, refuse_other_tokenizer, refuse_other_tokens
from megatron_sov.train.data.token_bytes import token_bytes
from tokenizer.cli import main as sov_tokenizer


def tokenizer(folder: Path, words: list[str], special: str = "<end>") -> Path:
    folder.mkdir()
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    made.add_special_tokens([special])
    made.save(str(folder / "tokenizer.json"))
    return folder


def test_ordinary_tokens_by_id(tmp_path: Path) -> None:
    assert read_vocabulary(tokenizer(tmp_path / "a", ["one", "two"])) == {0: "one", 1: "two"}


def test_equal_longer_and_renamed_special_tokens_pass(tmp_path: Path) -> None:
    data = tokenizer(tmp_path / "data", ["one", "two"])
    for name, words, special in (("same", ["one", "two"], "<end>"),
                                 ("longer", ["one", "two", "three"], "<end>"),
                                 ("renamed", ["one", "two"], "<stop>")):
        other = tokenizer(tmp_path / name, words, special)
        refuse_other_tokens(data, other)
        refuse_other_tokens(other, data)


def test_an_id_with_two_meanings_is_refused(tmp_path: Path) -> None:
    data, weights = (tokenizer(tmp_path / "data", ["one", "two"]),
                     tokenizer(tmp_path / "weights", ["one", "drei"]))
    with pytest.raises(UserError, match=r"1 ids mean other tokens than in .*weights \(e.g. 1: "
                                        r"'two' here, 'drei' there\)"):
        refuse_other_tokens(data, weights)


def test_without_a_tokenizer_on_one_side_nothing_is_compared(tmp_path: Path) -> None:
    data = tokenizer(tmp_path / "data", ["one"])
    refuse_other_tokens(None, data)
    refuse_other_tokens(data, tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"model": {}}'])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer.json: cannot be read as a tokenizer"):
        read_vocabulary(tmp_path)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "decoder": {"type": "ByteLevel"}, "post_processor": None,
        "added_tokens": [{"id": 5, "content": "<end>", "special": True}],
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4},
                  "merges": [["a", "b"], ["b", "c"]]}}))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>", "chat_template": "{{ x }}"}')
    return folder


def changed(folder: Path, file: str, change: Callable[[dict[str, Any]], Any]) -> Path:
    raw = json.loads((folder / file).read_text())
    change(raw)
    (folder / file).write_text(json.dumps(raw))
    return folder


def without_template(folder: Path) -> Path:
    (folder / "chat_template.jinja").write_text("{{ y }}")
    return folder


CUTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "merges": lambda r: r["model"]["merges"].reverse(), "normalizer": lambda r: r.update(normalizer=None),
    "pre_tokenizer": lambda r: r["pre_tokenizer"].update(add_prefix_space=True),
    "byte_fallback": lambda r: r["model"].update(byte_fallback=True)}
BESIDE: dict[str, Callable[[Path], Path]] = {
    "tokenizer.json: added_tokens": lambda d: changed(
        d, "tokenizer.json", lambda r: r["added_tokens"][0].update(content="<stop>")),
    "tokenizer.json: decoder": lambda d: changed(d, "tokenizer.json", lambda r: r.update(decoder=None)),
    "tokenizer_config.json: eos_token": lambda d: changed(
        d, "tokenizer_config.json", lambda r: r.update(eos_token="a")),
    r"chat_template.jinja \(or chat_template in tokenizer_config.json\)": without_template}


@pytest.mark.parametrize("field", CUTS)
def test_text_that_is_cut_otherwise_is_refused(field: str, bpe: Path, tmp_path: Path) -> None:
    other = changed(shutil.copytree(bpe, tmp_path / "other"), "tokenizer.json", CUTS[field])
    expected = rf"other/tokenizer.json: its {field} differs from that of .*, so the same text has other ids; "
    with pytest.raises(UserError, match=f"{expected}pack the data"):
        refuse_other_tokens(other, bpe)
    with pytest.raises(UserError, match=f"{expected}choose"):
        refuse_other_tokenizer(bpe, other, "choose")


@pytest.mark.parametrize("where", BESIDE)
def test_one_tokenizer_means_the_form_of_chats_as_well(where: str, bpe: Path, tmp_path: Path) -> None:
    other = BESIDE[where](shutil.copytree(bpe, tmp_path / "other"))
    refuse_other_tokens(other, bpe)
    with pytest.raises(UserError, match=f"other: {where} differs from that of .*; choose"):
        refuse_other_tokenizer(bpe, other, "choose")


def test_what_is_only_spelled_otherwise_is_the_same(bpe: Path, tmp_path: Path) -> None:
    """Merges as older files have them, settings that are off, lengths, a template in a file of its own."""
    other = changed(shutil.copytree(bpe, tmp_path / "other"), "tokenizer.json", lambda r: (
        r["model"].update(merges=["a b", "b c"], dropout=None, byte_fallback=False, ignore_merges=False),
        r["pre_tokenizer"].update(trim_offsets=False), r.update(truncation={"max_length": 9})))
    changed(other, "tokenizer_config.json", lambda r: (r.pop("chat_template"), r.update(
        eos_token={"content": "<end>"}, model_max_length=9)))
    (other / "chat_template.jinja").write_text("{{ x }}")
    refuse_other_tokenizer(bpe, other, "choose")
    refuse_other_tokens(other, bpe)


# Bytes of tokens, against what the tokenizer itself decodes.


TEXT = "The 가나다 fox — 한국어 문장입니다. naïve 🦊 jumps\n\tover 12345 dogs."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<|end|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    tokenizer.add_tokens([AddedToken("한 fox", special=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_the_bytes_of_a_text_are_the_sum_over_its_tokens(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    sizes = token_bytes(folder, 400)
    for text in (TEXT, "한 fox 한 fox", "🦊", "plain"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text
        assert sizes[ids].sum() == len(text.encode())


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_pieces_of_sentencepiece_are_characters(kind: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(f"{TEXT}\n{string.printable[:95]}\n{string.__doc__}\n" * 40)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "tiny"), vocab_size=380,
        byte_fallback=True, model_type=kind, character_coverage=0.98, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2)
    taken_over = ["import", str(tmp_path / "tiny.model"), "--eos", "</s>", "--output", str(tmp_path / "out")]
    assert sov_tokenizer(taken_over) == 0
    sizes = token_bytes(tmp_path / "out", 500)
    tokenizer = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    for text in ("The naïve fox", "한국어 문장입니다", "🦊 ☃"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert sizes[ids].sum() == len(f" {text}".encode()), "it puts a space before"
    assert sizes[tokenizer.token_to_id("<0x0A>")] == 1


def test_special_and_unused_ids_stand_for_no_text(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    sizes = token_bytes(folder, 400)
    assert sizes[tokenizer.token_to_id("<|end|>")] == 0
    assert (sizes[tokenizer.get_vocab_size():] == 0).all()
    assert len(token_bytes(folder, 100)) == 100


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read as a tokenizer"):
        token_bytes(tmp_path, 10)
