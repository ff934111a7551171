"""`sov-tokenizer media`: tokens of media behind those of text, and rows for them in a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from megatron_sov.base.artifacts import damaged_files, new_artifact, read_manifest, sha256_file
from megatron_sov.chat.media_tokens import (
    AUDIO, AUDIO_PAD, IMAGE, IMAGE_PAD, MARKS, VIDEO_PAD, VocabularyBlock, entry, read_blocks)
from megatron_sov.model.recipes import get
from tokenizer.cli import main
from tokenizer.media import MediaTokens, laid_out


@pytest.fixture
def plain(build, tmp_path: Path) -> Path:
    """A tokenizer artifact of 264 ids."""
    file = build() / "tokenizer.json"
    with new_artifact(tmp_path / "text", "tokenizer") as artifact:
        shutil.copy(file, artifact.path)
        (artifact.path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
        artifact.content = {"preset": "custom", "vocab_size": 264, "eos_id": 263,
                            "tokenizer_sha256": sha256_file(file)}
    return tmp_path / "text"


def run(*arguments: object) -> int:
    return main(["media", *map(str, arguments)])


@pytest.mark.deep
def test_text_keeps_its_ids_and_blocks_follow(plain: Path, tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    assert run(plain, "--audio-tokens", 5, "--image-tokens", 7, "--output", tmp_path / "omni") == 0
    content = read_manifest(tmp_path / "omni", "tokenizer").content
    first = 264 + len(MARKS)
    assert read_blocks(content["media"], "it") == {AUDIO: VocabularyBlock(AUDIO, first, 5),
                                                   IMAGE: VocabularyBlock(IMAGE, first + 5, 7)}
    assert content["vocab_size"] == first + 12 and content["eos_id"] == 263
    assert content["tokenizer_sha256"] == sha256_file(tmp_path / "omni/tokenizer.json")
    old, new = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (plain, tmp_path / "omni"))
    text = "The other man in there."
    assert old.encode(text).ids == new.encode(text).ids
    assert new.encode(entry(AUDIO, 4) + entry(IMAGE, 6)).ids == [first + 4, first + 11]
    loaded = AutoTokenizer.from_pretrained(tmp_path / "omni")
    assert loaded.convert_tokens_to_ids("<|IMAGE_PAD|>") == new.token_to_id("<|IMAGE_PAD|>")
    assert not damaged_files(tmp_path / "omni")
    assert run(tmp_path / "omni", "--image-tokens", 8, "--output", tmp_path / "more") == 2
    assert "is a token already" in capsys.readouterr().err


def test_the_published_blocks_close_to_the_published_vocabulary() -> None:
    """HyperCLOVA X 8B Omni: text below 128,606, 6,561 of audio, pictures from 135,168, 200,704 in all."""
    marks = dict.fromkeys(MARKS)
    words, blocks = laid_out(MediaTokens(6561, 65536, 128_606, 135_168), marks, 128_606)
    assert blocks == [VocabularyBlock(AUDIO, 128_606, 6561),
                      VocabularyBlock(IMAGE, 135_168, 65_536)] and blocks[1].end == 200_704
    assert len(words) == 200_704 - 128_606 and words.count("<|reserved_media_0|>") == 1


@pytest.mark.parametrize("num_ids", [128_606 - len(MARKS), 128_000])
def test_placeholders_are_where_the_recipe_has_them(num_ids: int) -> None:
    words, _ = laid_out(MediaTokens(6561, 65536, 128_606, 135_168), (), num_ids)
    model = get("hyperclova-omni-8b").model
    assert model.vision is not None and model.audio is not None
    assert [words[i - num_ids] for i in (*model.vision.placeholder_ids, *model.audio.placeholder_ids)] == [
        IMAGE_PAD, VIDEO_PAD, AUDIO_PAD]


@pytest.mark.parametrize(("options", "words"), [
    ((), "--audio-tokens 0: adds nothing, and no --image-tokens do"),
    (("--audio-tokens", -1), "--audio-tokens -1: must be at least 0"),
    (("--audio-tokens", 4, "--image-first", 900), "--image-first 900: is only for --image-tokens"),
    (("--audio-tokens", 4, "--audio-first", 10), "the ids up to 297 are taken"),
    (("--audio-tokens", 4, "--audio-first", 10**9), "no more than"),
    (("--image-tokens", 4, "--noise", 0.1), "is no model")])
def test_what_cannot_be_is_one_sentence(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                        options: tuple[object, ...], words: str) -> None:
    assert run(plain, *options, "--output", tmp_path / "omni") == 2
    assert words in capsys.readouterr().err and not (tmp_path / "omni").exists()


@pytest.mark.deep
def test_a_model_gets_rows_near_the_mean_of_the_old_ones(plain: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=264, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1, initializer_range=0.5,
                         tie_word_embeddings=False)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(plain / name, tmp_path / "model")
    raw = json.loads((plain / "tokenizer.json").read_text())
    raw["normalizer"] = {"type": "NFC"}
    (tmp_path / "model/tokenizer.json").write_text(json.dumps(raw))
    (tmp_path / "model/config.json").write_text(
        (tmp_path / "model/config.json").read_text().replace('"qwen2"', '"llama"').replace("Qwen2", "Llama"))
    assert run(tmp_path / "model", "--audio-tokens", 4, "--image-tokens", 400, "--noise", 0.1, "--output",
               tmp_path / "omni") == 0
    old, new = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", tmp_path / "omni"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(new[name][:264], old[name])
        fresh, mean, deviation = new[name][264:], old[name].mean(0), old[name].std(0, unbiased=False)
        scaled = (fresh - mean) / deviation
        assert len(fresh) == len(MARKS) + 404 and len(torch.unique(fresh, dim=0)) == len(fresh)
        assert abs(float(scaled.mean())) < 0.01 and float(scaled.std()) == pytest.approx(0.1, rel=0.05)
    content = read_manifest(tmp_path / "omni", "hf_model").content
    assert read_blocks(content["media"], "it")[IMAGE].size == 400
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "omni").config.vocab_size == 264 + len(MARKS) + 404
