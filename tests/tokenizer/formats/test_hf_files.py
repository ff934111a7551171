"""Tokenizer files: text never encodes to special tokens, and bytes are spelled as in `tokenizers`."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers

from megatron_sov.base.errors import UserError
from tokenizer.bpe.vocabulary import Vocabulary, get_byte_ids, spell_token
from tokenizer.formats.hf_files import TOKENIZER_JSON, build_tokenizer
from tokenizer.presets import K_EXAONE, SOLAR_OPEN, Preset
from tokenizer.train_run import CheckFailed, check_round_trip

TEXT = ["<|end|> <|end|>\n" * 50, "plain words, plain text. " * 30]


def test_a_merge_that_spells_a_special_token_is_refused(learn: Callable[..., Vocabulary]) -> None:
    whole = replace(SOLAR_OPEN, name="mine", split_pattern=r"\S+|\s+")
    with pytest.raises(UserError, match=r"text can become the special token '<\|end\|>'"):
        build_tokenizer(whole, learn(whole, 290, TEXT))
    single = replace(SOLAR_OPEN, name="mine", special_tokens={**SOLAR_OPEN.special_tokens, "a": 9})
    with pytest.raises(UserError, match="text can become the special token 'a'"):
        build_tokenizer(single, learn(single, 260, TEXT))


def test_special_tokens_in_text_are_encoded_only_on_request(learn: Callable[..., Vocabulary]) -> None:
    tokenizer = build_tokenizer(SOLAR_OPEN, learn(SOLAR_OPEN, 290, TEXT))
    assert tokenizer.encode("<|end|>").ids == [21]
    tokenizer.encode_special_tokens = True
    assert min(tokenizer.encode("<|end|>").ids) >= 64


def test_bytes_are_spelled_as_the_library_does() -> None:
    assert [spell_token(bytes([b])) for b in sorted(range(256), key=lambda b: get_byte_ids()[b])] == sorted(
        pre_tokenizers.ByteLevel.alphabet())
    for text in ("a b\n", "가", "é\x00\x7f"):
        split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
        assert spell_token(text.encode()) == split[0][0]


SAMPLES = ["one of the cats and one of the dogs, 그 고양이 그리고 그 강아지 " * 20]


def check(preset: Preset, vocabulary: Vocabulary, folder: Path, built: Preset | None = None,
          stage_1: int = 290) -> str:
    """Save a tokenizer with the rules of `built`, by default `preset`; return the sentence of its check."""
    tokenizer = build_tokenizer(built or preset, vocabulary)
    tokenizer.save(str(folder / TOKENIZER_JSON))
    checked = check_round_trip(tokenizer, preset, vocabulary, stage_1, folder, SAMPLES)
    assert checked.bytes_per_token == [pytest.approx(
        len(SAMPLES[0].encode()) / len(tokenizer.encode(SAMPLES[0]).ids))]
    return checked.sentence


def test_a_correct_tokenizer_passes_the_check(learn: Callable[..., Vocabulary], tmp_path: Path) -> None:
    assert check(K_EXAONE, learn(K_EXAONE, 320, SAMPLES, transition=290), tmp_path).endswith(
        "two steps the same as one")
    assert check(SOLAR_OPEN, learn(SOLAR_OPEN, 290, SAMPLES), tmp_path).endswith(
        "transformers give the same ids")


@pytest.mark.each(("preset", "sizes", "built", "message"), [
    (SOLAR_OPEN, {"num_tokens": 290}, replace(SOLAR_OPEN, normalization="nfc"),
     "decoding does not give back"),
    (K_EXAONE, {"num_tokens": 320, "transition": 290}, replace(K_EXAONE, superword_pattern=r"\S|\s"),
     "tiktoken and transformers differ on")])
def test_files_with_other_rules_fail_the_check(learn: Callable[..., Vocabulary], preset: Preset,
                                               sizes: dict[str, int], built: Preset, message: str,
                                               tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match=message):
        check(preset, learn(preset, texts=SAMPLES, **sizes), tmp_path, built)


def test_a_different_file_is_detected(learn: Callable[..., Vocabulary], tmp_path: Path) -> None:
    vocabulary = learn(SOLAR_OPEN, 290, SAMPLES)
    tokenizer = build_tokenizer(SOLAR_OPEN, vocabulary)
    build_tokenizer(SOLAR_OPEN, learn(SOLAR_OPEN, 270, SAMPLES)).save(str(tmp_path / TOKENIZER_JSON))
    with pytest.raises(CheckFailed, match="tiktoken and transformers differ on"):
        check_round_trip(tokenizer, SOLAR_OPEN, vocabulary, 290, tmp_path, SAMPLES)


def test_a_step_without_effect_is_detected(learn: Callable[..., Vocabulary], tmp_path: Path) -> None:
    vocabulary = learn(K_EXAONE, 320, SAMPLES, transition=290)
    tokenizer = build_tokenizer(K_EXAONE, vocabulary)
    tokenizer.save(str(tmp_path / TOKENIZER_JSON))
    # the first merge of stage 2 is missing in memory, but not in the file
    vocabulary.merges[290 - 256] = vocabulary.merges[0]
    with pytest.raises(CheckFailed, match="two steps differ from one on"):
        check_round_trip(tokenizer, K_EXAONE, vocabulary, 290, tmp_path, SAMPLES)
