"""`sov-tokenizer media`: media tokens have ids after the text tokens."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from megatron_sov.base.artifacts import create_artifact, find_damaged_files, read_manifest, sha256_file
from megatron_sov.chat.media_tokens import (
    AUDIO, AUDIO_PAD, IMAGE, IMAGE_PAD, MARKS, VIDEO_PAD, VocabularyBlock, codebook_token, read_blocks)
from megatron_sov.model.recipes import get
from tokenizer.cli import main
from tokenizer.media import MediaTokens, assign_media_ids


@pytest.fixture
def plain(build, tmp_path: Path) -> Path:
    """A tokenizer artifact of 264 ids."""
    file = build() / "tokenizer.json"
    with create_artifact(tmp_path / "text", "tokenizer") as artifact:
        shutil.copy(file, artifact.path)
        (artifact.path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
        artifact.content = {"preset": "custom", "vocab_size": 264, "eos_id": 263,
                            "tokenizer_sha256": sha256_file(file)}
    return tmp_path / "text"


def run_media(*arguments: object) -> int:
    return main(["media", *map(str, arguments)])


@pytest.mark.deep
def test_text_keeps_its_ids_and_blocks_follow(plain: Path, tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    assert run_media(plain, "--audio-tokens", 5, "--image-tokens", 7, "--output", tmp_path / "omni") == 0
    content = read_manifest(tmp_path / "omni", "tokenizer").content
    first = 264 + len(MARKS)
    assert read_blocks(content["media"], "it") == {AUDIO: VocabularyBlock(AUDIO, first, 5),
                                                   IMAGE: VocabularyBlock(IMAGE, first + 5, 7)}
    assert content["vocab_size"] == first + 12 and content["eos_id"] == 263
    assert content["tokenizer_sha256"] == sha256_file(tmp_path / "omni/tokenizer.json")
    old, new = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (plain, tmp_path / "omni"))
    text = "The other man in there."
    assert old.encode(text).ids == new.encode(text).ids
    assert new.encode(codebook_token(AUDIO, 4) + codebook_token(IMAGE, 6)).ids == [first + 4, first + 11]
    loaded = AutoTokenizer.from_pretrained(tmp_path / "omni")
    assert loaded.convert_tokens_to_ids("<|IMAGE_PAD|>") == new.token_to_id("<|IMAGE_PAD|>")
    assert not find_damaged_files(tmp_path / "omni")
    assert run_media(tmp_path / "omni", "--image-tokens", 8, "--output", tmp_path / "more") == 2
    assert "is a token already" in capsys.readouterr().err


def test_the_published_blocks_make_the_published_vocabulary() -> None:
    """HyperCLOVA X 8B Omni has 200,704 ids: text below 128,606, 6,561 of audio, pictures from 135,168 on."""
    marks = dict.fromkeys(MARKS)
    words, blocks = assign_media_ids(MediaTokens(6561, 65536, 128_606, 135_168), marks, 128_606)
    assert blocks == [VocabularyBlock(AUDIO, 128_606, 6561), VocabularyBlock(IMAGE, 135_168, 65_536)]
    assert blocks[1].end == 200_704
    assert len(words) == 200_704 - 128_606 and words.count("<|reserved_media_0|>") == 1


@pytest.mark.parametrize("num_ids", [128_606 - len(MARKS), 128_000])
def test_placeholders_are_where_the_recipe_has_them(num_ids: int) -> None:
    words, _ = assign_media_ids(MediaTokens(6561, 65536, 128_606, 135_168), (), num_ids)
    model = get("hyperclova-omni-8b").model
    assert model.vision is not None and model.audio is not None
    assert [words[i - num_ids] for i in (*model.vision.placeholder_ids, *model.audio.placeholder_ids)] == [
        IMAGE_PAD, VIDEO_PAD, AUDIO_PAD]


@pytest.mark.parametrize(("options", "words"), [
    ((), "--audio-tokens 0: adds nothing, and no --image-tokens do"),
    (("--audio-tokens", -1), "--audio-tokens -1: must be at least 0"),
    (("--audio-tokens", 4, "--image-first", 900), "--image-first 900: is only for --image-tokens"),
    (("--audio-tokens", 4, "--audio-first", 10), "the ids up to 297 are taken"),
    (("--audio-tokens", 4, "--audio-first", 10**9), "no more than")])
def test_impossible_media_vocabularies_give_one_sentence(plain: Path, tmp_path: Path,
                                                         capsys: pytest.CaptureFixture[str],
                                                         options: tuple[object, ...], words: str) -> None:
    assert run_media(plain, *options, "--output", tmp_path / "omni") == 2
    assert words in capsys.readouterr().err and not (tmp_path / "omni").exists()


def test_a_model_folder_is_refused_with_the_resizing_command(plain: Path, tmp_path: Path,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    (plain / "config.json").write_text("{}")
    assert run_media(plain, "--image-tokens", 4, "--output", tmp_path / "omni") == 2
    assert "is a model; pass the tokenizer" in capsys.readouterr().err
