"""Start of a run: weights of media encoders from Hugging Face folders, and tokenizer settings of the base
model."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from megatron_sov import recipes
from megatron_sov.base.errors import UserError
from megatron_sov.convert.encoder_weights import open_encoder
from megatron_sov.model.config import AudioEncoderConfig, ModelConfig, VisionEncoderConfig
from megatron_sov.model.families.encoders import AUDIO, VISION
from megatron_sov.train.checkpointer import _read_companions

SIGLIP = VisionEncoderConfig(kind="siglip", placeholder_ids=(5,), image_size=8, patch_size=4, hidden_size=16,
                             num_layers=1, num_heads=2, ffn_dim=24)
WHISPER = AudioEncoderConfig(kind="whisper", placeholder_ids=(6,), num_mels=4, num_frames=20, hidden_size=16,
                             num_layers=1, num_heads=2, ffn_dim=24)


def build_model_config(**encoders: Any) -> ModelConfig:
    """Return a tiny model with encoders."""
    return dataclasses.replace(recipes.get("tiny-qwen3").model, **encoders)


@pytest.fixture
def siglip(tmp_path: Path) -> Path:
    """Return a folder with SigLIP's picture encoder, as transformers saves it."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    SiglipVisionModel(SiglipVisionConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24)).save_pretrained(tmp_path / "siglip")
    return tmp_path / "siglip"


def test_every_tensor_is_loaded_by_its_name(siglip: Path) -> None:
    files, names = open_encoder(siglip, VISION, build_model_config(vision=SIGLIP))
    stored = load_file(siglip / "model.safetensors")
    encoder_names = [name for name in stored if not name.startswith(("head.", "vision_model.head."))]
    assert len(names) == len({*names.values()}) == len(encoder_names)
    name = names["vision.encoder.embeddings.patch_embedding.weight"]
    assert files[name].read(name).equal(stored[name])


def test_an_encoder_inside_a_larger_model(tmp_path: Path) -> None:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    WhisperForConditionalGeneration(WhisperConfig(
        num_mel_bins=4, max_source_positions=10, d_model=16, encoder_layers=1, encoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=24, vocab_size=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)).save_pretrained(tmp_path)
    _, names = open_encoder(tmp_path, AUDIO, build_model_config(audio=WHISPER))
    assert names["audio.encoder.conv1.weight"] == "model.encoder.conv1.weight"
    with pytest.raises(UserError, match=r"num_mel_bins = 4|conv1\.weight"):
        open_encoder(tmp_path, AUDIO, build_model_config(audio=dataclasses.replace(WHISPER, num_mels=8)))


@pytest.mark.parametrize(("change", "message"), [
    ({"num_layers": 2}, "holds 0 encoders of kind 'siglip' with 2 layers"),
    ({"ffn_dim": 32}, r"mlp.fc1.weight \[24, 16\] instead of \[32, 16\]"),
    ({"num_heads": 4}, "num_attention_heads = 2, but the model has num_heads = 4"),
    ({"kind": "qwen2_5_vl", "full_attention_layers": (0,)}, "holds 0 encoders of kind 'qwen2_5_vl'")])
def test_another_encoder_is_refused(siglip: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_encoder(siglip, VISION, build_model_config(vision=dataclasses.replace(SIGLIP, **change)))


def test_two_encoders_are_refused(siglip: Path) -> None:
    stored = load_file(siglip / "model.safetensors")
    two_encoders = {prefix + name: tensor.clone() for prefix in ("a.", "b.")
                    for name, tensor in stored.items()}
    save_file(two_encoders, siglip / "model.safetensors")
    with pytest.raises(UserError, match="holds 2 encoders"):
        open_encoder(siglip, VISION, build_model_config(vision=SIGLIP))


# A run's tokenizer is that of its data; the other tokenizer files come from the folder of its base model.

VOCAB = {"model": {"vocab": {"<s>": 0, "</s>": 1, "<end>": 2}}}
BASE = {"tokenizer.json": VOCAB, "generation_config.json": {"eos_token_id": 1, "top_p": 0.9},
        "tokenizer_config.json": {"eos_token": "</s>", "unk_token": "<s>", "chat_template": "{{ x }}"},
        "special_tokens_map.json": {"unk_token": "<s>"}}
IMPORTED = {"tokenizer.json": VOCAB, "tokenizer_config.json": {
    "eos_token": "</s>", "pad_token": "</s>", "chat_template": "{{ x }}",
    "tokenizer_class": "PreTrainedTokenizerFast"}}
"""Files as `sov-tokenizer import` writes them for the tokenizer of `BASE`."""


def write_files(folder: Path, files: dict[str, Any], **more_files: Any) -> Path:
    folder.mkdir()
    for name, content in (files | more_files).items():
        # white space differs between folders, and must not matter
        (folder / name).write_text(json.dumps(content, indent=len(files) % 3))
    return folder


def read_companions(start: Path, data: Path) -> dict[str, Any]:
    """Return the tokenizer files of a run's checkpoints besides `tokenizer.json`, parsed."""
    return {name: json.loads(content) for name, content in _read_companions(start, data).items()}


def test_settings_of_the_base_are_taken_over(tmp_path: Path) -> None:
    base = write_files(tmp_path / "base", BASE)
    data = write_files(tmp_path / "data", IMPORTED)
    other_files = {name: content for name, content in BASE.items() if name != "tokenizer.json"}
    assert read_companions(base, data) == other_files
    assert read_companions(data, data) == {"tokenizer_config.json": IMPORTED["tokenizer_config.json"]}


@pytest.mark.each(("data_settings", "expected_settings", "expected_generation"), [
    ({"chat_template": "{{ y }}"}, {"chat_template": "{{ y }}"}, {"eos_token_id": 1, "top_p": 0.9}),
    ({"eos_token": "<end>"}, {"eos_token": "<end>"}, {"top_p": 0.9}),
    ({"bos_token": "<s>"}, {"bos_token": "<s>"}, {"eos_token_id": 1, "top_p": 0.9}),
    ({"eos_token": None}, {}, {"eos_token_id": 1, "top_p": 0.9}),
    ({"chat_template": None}, {}, {"eos_token_id": 1, "top_p": 0.9})])
def test_chat_template_comes_from_the_data(data_settings: dict[str, Any], expected_settings: dict[str, Any],
                                           expected_generation: dict[str, Any], tmp_path: Path) -> None:
    base = write_files(tmp_path / "base", BASE)
    data = write_files(tmp_path / "data", IMPORTED | {
        "tokenizer_config.json": IMPORTED["tokenizer_config.json"] | data_settings})
    result = read_companions(base, data)
    assert result["tokenizer_config.json"] == BASE["tokenizer_config.json"] | expected_settings
    assert result["generation_config.json"] == expected_generation


def test_a_template_of_the_data_replaces_the_base_template(tmp_path: Path) -> None:
    base = write_files(tmp_path / "base", BASE)
    (base / "chat_template.jinja").write_text("{{ z }}")
    result = read_companions(base, write_files(tmp_path / "data", IMPORTED))
    assert result["tokenizer_config.json"]["chat_template"] == "{{ x }}"
    assert "chat_template.jinja" not in result


def test_settings_of_another_tokenizer_are_not_inherited(tmp_path: Path) -> None:
    base = write_files(tmp_path / "base", BASE)
    other = {"model": {"vocab": {"<s>": 0, "</s>": 2, "<end>": 1}}}
    assert read_companions(base, write_files(tmp_path / "data", IMPORTED | {"tokenizer.json": other})) == {}
    (tmp_path / "none").mkdir()
    assert read_companions(tmp_path / "none", base) == {}
