"""Bytes of tokens, against what the tokenizer itself decodes."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_sov.data.token_bytes import token_bytes
from megatron_sov.errors import UserError
from tokenizer.cli import main as sov_tokenizer

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
