"""Tokenizer, chat template and token ids are copied with the weights; code is not."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import GenerationConfig

from megatron_sov import convert
from megatron_sov.base.errors import UserError
from megatron_sov.convert.companion_files import read_token_ids
from megatron_sov.convert.hf_export import to_hf
from megatron_sov.engine.decode.forward_only import DocumentBatch
from megatron_sov.engine.parallel import world
from megatron_sov.infer.engines.load import load_forward_model
from megatron_sov.infer.engines.target import Target
from megatron_sov.model.config import AudioEncoderConfig, VisionEncoderConfig
from megatron_sov.model.families.family import TokenIds
from megatron_sov.model.modality import PICTURES, SOUNDS, take_records
from megatron_sov.model.recipes import get
from megatron_sov.omni.modality import build_processor_files
from megatron_sov.runs.checkpoints import read_checkpoint_settings
from tests.convert.hf_folders import check_refused, round_trip, save_tensors, set_config, write_folder
from tests.omni_model import NUM_PICTURE_TOKENS, save_omni_model
from tests.pages_typed import blocks, page_text


def test_companion_files_are_copied(solar_dir: Path, tmp_path: Path) -> None:
    (source := tmp_path / "source").mkdir()
    for file in solar_dir.iterdir():
        shutil.copy(file, source)
    (source / "modeling.py").write_text("raise SystemExit('code of strangers')")
    back = round_trip(source, tmp_path)
    for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (back / name).read_bytes() == (solar_dir / name).read_bytes()
    assert not (back / "modeling.py").exists()
    config = json.loads((back / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)


@pytest.mark.each("content", ["", "hello", "[1]", '{"a": 1', "version https://git-lfs.github.com/spec/v1"])
@pytest.mark.each("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_damaged_companion_file_is_named(name: str, content: str, solar_dir: Path, tmp_path: Path) -> None:
    source = shutil.copytree(solar_dir, tmp_path / "source")
    (source / name).write_text(content)
    check_refused(source, f"source/{name}: .*; restore it from its source")


def test_links_to_outside_the_folder_are_rejected(solar_dir: Path, tmp_path: Path) -> None:
    source = shutil.copytree(solar_dir, tmp_path / "source")
    (tmp_path / "secret").write_text("secret")
    (source / "added_tokens.json").symlink_to("../secret")
    check_refused(source, r"added_tokens\.json: is a link")


def add_turn_end(folder: Path, template: str) -> None:
    """Give a folder the special token <end>, id 3, with which its chat template ends each message."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [
        {"id": 3, "content": "<end>", "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "chat_template.jinja").write_text(template)


def test_turn_ends_are_stop_tokens_of_the_export(solar_dir: Path, tmp_path: Path) -> None:
    """Engines take their stop tokens from generation_config.json."""
    source = shutil.copytree(solar_dir, tmp_path / "source",
                             ignore=shutil.ignore_patterns("generation_config.json"))
    add_turn_end(source, "{% for m in messages %}{{ m.content }}<end>{% endfor %}{{ eos_token }}")
    set_config(source, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    back = round_trip(source, tmp_path)
    written = json.loads((back / "generation_config.json").read_text())
    assert written == {"bos_token_id": 0, "eos_token_id": [1, 3]}
    assert json.loads((back / "config.json").read_text())["eos_token_id"] == 1


GENERATION, CONFIG = "generation_config.json", "config.json"
TOKENIZER_CONFIG, SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
TOKEN_ID_FILES: dict[str, tuple[dict[str, dict[str, Any]], TokenIds]] = {
    "generation defaults before the config": (
        {GENERATION: {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3},
         CONFIG: {"bos_token_id": 4, "eos_token_id": 5, "pad_token_id": 6}}, TokenIds(1, 2, 3)),
    "generation defaults without eos": (
        {GENERATION: {"temperature": 0.6}, CONFIG: {"bos_token_id": 4, "eos_token_id": 5}}, TokenIds(4, 5)),
    "nulls": ({GENERATION: {"eos_token_id": None, "pad_token_id": 3}, CONFIG: {"eos_token_id": 5}},
              TokenIds(None, 5, 3)),
    "several ends": ({GENERATION: {"eos_token_id": [2, 7]}, CONFIG: {"eos_token_id": 5}},
                     TokenIds(eos=[2, 7])),
    "several ends in the config": ({GENERATION: {"bos_token_id": 1}, CONFIG: {"eos_token_id": [5, 6]}},
                                   TokenIds(1, [5, 6])),
    "an empty list": ({GENERATION: {"eos_token_id": []}, CONFIG: {"eos_token_id": 5}}, TokenIds(eos=5)),
    "id 0": ({GENERATION: {"eos_token_id": 0}, CONFIG: {"eos_token_id": 5}}, TokenIds(eos=0)),
    "no generation defaults": ({CONFIG: {"bos_token_id": 4, "eos_token_id": [5]}}, TokenIds(4, [5])),
    "a part of the text model": (
        {CONFIG: {"bos_token_id": 4, "text_config": {"bos_token_id": 8, "eos_token_id": 9}}}, TokenIds(4, 9)),
    "texts": ({GENERATION: {"bos_token_id": 1}, TOKENIZER_CONFIG: {"bos_token": "<s>", "eos_token": "</s>"}},
              TokenIds(1, 1)),
    "texts as objects": ({TOKENIZER_CONFIG: {"eos_token": {"content": "<end>", "lstrip": False},
                                             "pad_token": "a"}},
                         TokenIds(eos=7, pad=2)),
    "texts of an older file": ({SPECIAL_TOKENS: {"eos_token": "</s>"}, TOKENIZER_CONFIG: {"pad_token": None}},
                               TokenIds(eos=1)),
    "values that are no ids": ({GENERATION: {"bos_token_id": True, "eos_token_id": ["x", 3, -1]},
                                CONFIG: {"bos_token_id": 4}}, TokenIds(4, [3])),
    "nothing": ({}, TokenIds())}
"""Case -> (contents of a folder's files, the token ids that are read from them)."""


@pytest.mark.each("name", TOKEN_ID_FILES)
def test_special_ids_come_from_the_first_file(name: str, tmp_path: Path) -> None:
    """transformers' generate uses the same order of files; without an id it would never stop."""
    files, expected = TOKEN_ID_FILES[name]
    (tmp_path / "tokenizer.json").write_text(json.dumps({
        "added_tokens": [{"id": 7, "content": "<end>"}], "model": {"vocab": {"<s>": 0, "</s>": 1, "a": 2}}}))
    for file, content in files.items():
        (tmp_path / file).write_text(json.dumps(content))
    result = read_token_ids(tmp_path)
    assert result == expected
    if name != "values that are no ids" and {GENERATION, CONFIG} & set(files):
        hf_config = (GenerationConfig.from_pretrained(tmp_path) if GENERATION in files
                     else GenerationConfig.from_model_config(files[CONFIG]))
        for token, token_id in vars(result).items():
            assert getattr(hf_config, f"{token}_token_id") in (None, [], token_id), token


def test_unknown_eos_token_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    (tmp_path / TOKENIZER_CONFIG).write_text('{"eos_token": "<gone>"}')
    with pytest.raises(UserError, match="eos_token = '<gone>'"):
        read_token_ids(tmp_path)
    (tmp_path / GENERATION).write_text('{"eos_token_id": 0}')
    assert read_token_ids(tmp_path) == TokenIds(eos=0)
    (tmp_path / TOKENIZER_CONFIG).write_text('{"bos_token": "a", "pad_token": "<unused>"}')
    assert read_token_ids(tmp_path) == TokenIds(bos=0, eos=0)


@pytest.mark.parametrize("defaults", [
    {"temperature": 0.6}, {"temperature": 0.6, "eos_token_id": None}, {}, None])
def test_missing_ids_are_added_to_generation_config(defaults: dict[str, Any] | None, solar_dir: Path,
                                                    tmp_path: Path) -> None:
    source = shutil.copytree(solar_dir, tmp_path / "source", ignore=shutil.ignore_patterns(GENERATION))
    if defaults is not None:
        (source / GENERATION).write_text(json.dumps(defaults))
    back = round_trip(source, tmp_path)
    generation, config = (json.loads((back / name).read_text()) for name in (GENERATION, CONFIG))
    assert generation == (defaults or {}) | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    assert GenerationConfig.from_pretrained(back).eos_token_id == 2
    verification = convert.verify(tmp_path / "ckpt", back, load=False)
    assert verification.passed, verification.checks
    (back / GENERATION).write_text(json.dumps(generation | {"eos_token_id": 1}))
    failed_checks = [check for check in convert.verify(source, back, load=False).checks
                     if check.name == "special token ids that differ" and not check.passed]
    assert [check.detail for check in failed_checks] == ["eos ([2] and [1])"]


def test_turn_ends_are_added_to_base_defaults(solar_dir: Path, tmp_path: Path) -> None:
    """As after fine-tuning a base whose defaults stop at eos only."""
    source = shutil.copytree(solar_dir, tmp_path / "source")
    add_turn_end(source, "{% for m in messages %}{{ m.content }}<end>{% endfor %}")
    before = json.loads((source / GENERATION).read_text())
    back = round_trip(source, tmp_path)
    assert json.loads((tmp_path / "ckpt/tokenizer" / GENERATION).read_text()) == before
    assert json.loads((back / GENERATION).read_text()) == before | {"eos_token_id": [2, 3]}


def test_different_pre_tokenizer_is_warned_about(solar_dir: Path, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    """transformers replaces the pre-tokenizer of every qwen2 folder."""
    from transformers import (
        AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer)

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 1}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=1024, **sizes))
    # The characters by which byte-level BPE writes the 256 bytes.
    byte_characters = [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]
    alphabet = {chr(code): i for i, code in enumerate(byte_characters)}
    for name in ("other pre-tokenizer", "qwen2"):
        model.save_pretrained(source := tmp_path / name)
        if name == "other pre-tokenizer":
            shutil.copy(solar_dir / "tokenizer.json", source)
        else:
            Qwen2Tokenizer(vocab={**alphabet, "<|endoftext|>": 256}, merges=[]).save_pretrained(source)
        convert.from_hf(source, tmp_path / f"{name} ckpt")
        capsys.readouterr()
        convert.to_hf(tmp_path / f"{name} ckpt", tmp_path / f"{name} hf")
        assert ("token ids may differ" in capsys.readouterr().err) == (name == "other pre-tokenizer")
    exported, text = tmp_path / "other pre-tokenizer hf", "in 1234 words 가나다"
    ids = PreTrainedTokenizerFast.from_pretrained(str(solar_dir))(text)["input_ids"]
    assert PreTrainedTokenizerFast.from_pretrained(str(exported))(text)["input_ids"] == ids
    assert AutoTokenizer.from_pretrained(str(exported))(text)["input_ids"] != ids


# Claims of docs/omni.md about Hugging Face folders with encoders: transformers' classes load them and compute
# the same values.


def compute_logits(checkpoint: Path, ids: list[int], records: dict[str, np.ndarray]) -> torch.Tensor:
    """Compute our logits [tokens, vocabulary] of a row; the placeholders of a kind in `ids` represent its
    `records` in order."""
    config = read_checkpoint_settings(checkpoint)
    assert config.model.vision is not None and config.model.audio is not None
    encoders = {PICTURES: config.model.vision, SOUNDS: config.model.audio}
    inputs = {}
    for kind, encoder in encoders.items():
        places = np.flatnonzero(np.isin(ids, encoder.placeholder_ids))
        inputs[kind] = take_records(places, np.arange(len(places)), records[kind], encoder.slots)
    world.join_world(config.parallel)
    try:
        row = DocumentBatch([ids], torch.device("cpu"))
        row.inputs = dataclasses.replace(row.inputs, encoder_inputs=inputs)
        return load_forward_model(checkpoint, config).logits(row, torch.arange(len(ids)))
    finally:
        world.leave_world()


@pytest.mark.deep
def test_multimodal_export_equals_our_model(cwd: Path, packed_data: Any, one_rank: None) -> None:
    save_omni_model(cwd / "model", packed_data.tokenizer, ("model.init_std=0.1",))
    to_hf("model", "omni-hf")
    page_names: dict[str, Any] = {}
    [code] = [block for block in blocks(page_text("omni.md"), "python") if "def logits" in block]
    exec(compile(code, "docs/omni.md", "exec"), page_names)
    media, random = page_names["media"], np.random.default_rng(0)
    assert media["pictures"]["placeholders"] == ["<|IMAGE_PAD|>", "<|VIDEO_PAD|>"]
    assert (media["pictures"]["slots"], media["sounds"]["slots"]) == (4, 50)
    assert media["image_tokens"]["size"] == NUM_PICTURE_TOKENS and media["image_tokens"]["codecs"] == []
    pixels = random.integers(256, size=(2, 16, 16, 3), dtype=np.uint8)
    sound = random.uniform(-0.5, 0.5, 30_000).astype(np.float32)
    image_id, audio_id = (media[kind]["placeholder_ids"][0] for kind in ("pictures", "sounds"))
    ids = [9, *[image_id] * 4, 7, *[image_id] * 4, 30, *[audio_id] * 50, 5, 4]
    spectrogram = page_names["AutoFeatureExtractor"].from_pretrained("omni-hf")(
        sound, sampling_rate=16_000, return_tensors="np")["input_features"]
    assert spectrogram.shape[1:] == tuple(media["sounds"]["record_shape"])
    with torch.no_grad():
        hf_logits = page_names["logits"](torch.tensor(ids), [Image.fromarray(p) for p in pixels], [sound])
        black_logits = page_names["logits"](torch.tensor(ids), [Image.new("RGB", (16, 16))] * 2, [sound])
    logits = compute_logits(cwd / "model", ids,
                            {PICTURES: pixels.transpose(0, 3, 1, 2), SOUNDS: spectrogram})
    assert torch.allclose(logits, hf_logits, rtol=1e-5, atol=1e-5)
    assert (hf_logits[-1] - black_logits[-1]).abs().max() > 1e-3, "the images change the logits"
    prefixes = (*media["pictures"]["prefixes"], *media["sounds"]["prefixes"])
    tensors = load_file("omni-hf/model.safetensors")
    assert all(any(name.startswith(prefix) for name in tensors) for prefix in prefixes)


def test_multimodal_export_has_processor_classes(tmp_path: Path) -> None:
    from transformers import AutoFeatureExtractor, AutoImageProcessor

    model = dataclasses.replace(get("tiny-qwen3").model, vision=VisionEncoderConfig(
        "siglip", (5,), image_size=24, patch_size=8), audio=AudioEncoderConfig("whisper", (6,), num_mels=8,
                                                                               num_frames=200))
    files = build_processor_files(model, tmp_path, {})
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    for remaining_files in ([*files], ["preprocessor_config.json"]):  # this file alone is enough
        for name in set(files) - set(remaining_files):
            (tmp_path / name).unlink()
        picture = Image.new("RGB", (60, 30), (255, 0, 0))
        pixels = AutoImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="np")["pixel_values"]
        red = (1 - model.vision.mean[0]) / model.vision.std[0] if model.vision else 0
        assert pixels.shape == (1, 3, 24, 24)
        assert pixels[0, 0] == pytest.approx(np.full((24, 24), red), rel=1e-5)
        features = AutoFeatureExtractor.from_pretrained(tmp_path)(np.zeros(5), sampling_rate=16_000)
        assert np.shape(features["input_features"]) == (1, 8, 200)
    text_model = get("tiny-qwen3").model
    assert build_processor_files(text_model, tmp_path, {}) == {}
    short_audio = dataclasses.replace(text_model, audio=AudioEncoderConfig("whisper", (6,), num_frames=60))
    processor = build_processor_files(short_audio, tmp_path, {})["processor_config.json"]
    assert "feature_extractor" not in processor


# The text model inside a vision-language folder written by transformers: it is read alone, computes the same,
# and omitted tensors are reported.

PREFIXES = {"as released": ("language_model.model.", "vision_tower.", "multi_modal_projector."),
            "as in memory": ("model.language_model.", "model.vision_tower.", "model.multi_modal_projector.")}
"""Spelling -> prefixes of the tensor names of the text model, the encoder and the projector."""


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny Gemma 3 with a vision tower."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vision_model") / "hf"
    text = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8,
            "sliding_window_pattern": 2, "query_pre_attn_scalar": 5, "initializer_range": 0.3,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 8, "patch_size": 4}
    model = Gemma3ForConditionalGeneration(Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=90,
        boi_token_index=91, eoi_token_index=92, eos_token_id=[1, 6]))
    model.save_pretrained(folder)
    return folder


def write_renamed_folder(folder: Path, spelling: str, out: Path,
                         change: Callable[[dict[str, Any]], Any] = bool) -> Path:
    """Write a model's folder with tensor names in a spelling of `PREFIXES` and a changed config.json."""
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        old, new = next((prefix, new_prefix) for prefixes in PREFIXES.values()
                        for prefix, new_prefix in zip(prefixes, PREFIXES[spelling], strict=True)
                        if name.startswith(prefix))
        tensors[new + name.removeprefix(old)] = tensor
    config = json.loads((folder / "config.json").read_text())
    change(config)
    return write_folder(out, tensors, config)


@pytest.mark.parametrize("spelling", PREFIXES)
def test_text_model_of_a_multimodal_folder_is_equal(vision_model: Path, spelling: str, tmp_path: Path,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, Gemma3ForConditionalGeneration

    source = write_renamed_folder(vision_model, spelling, tmp_path / "hf")
    convert.from_hf(source, tmp_path / "ckpt")
    errors = capsys.readouterr().err
    assert (Target(source, True).vocab_size, Target(source, True).max_tokens) == (96, 131072)
    assert "tensors of the image encoder (" in errors and errors.count("are not converted") == 1
    convert.to_hf(tmp_path / "ckpt", tmp_path / "back")
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["architectures"] == ["Gemma3ForCausalLM"] and config["model_type"] == "gemma3_text"
    assert config["rope_parameters"]["full_attention"] == {
        "rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    remaining = load_file(source / "model.safetensors")
    text_prefix = PREFIXES[spelling][0]
    for name, tensor in load_file(tmp_path / "back/model.safetensors").items():
        assert torch.equal(tensor, remaining.pop(text_prefix + name.removeprefix("model.")))
    assert not [name for name in remaining if name.startswith(text_prefix)], (
        "every tensor of the text model is exported")
    tokens = torch.arange(20)[None] * 7 % 90
    with torch.no_grad():
        multimodal_logits = Gemma3ForConditionalGeneration.from_pretrained(vision_model)(
            input_ids=tokens).logits
        text_logits = AutoModelForCausalLM.from_pretrained(tmp_path / "back")(input_ids=tokens).logits
    torch.testing.assert_close(text_logits, multimodal_logits, rtol=1e-5, atol=1e-5)


def set_text(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    """Return a change of `text_config` for `write_renamed_folder`."""
    return lambda config: config["text_config"].update({name: value})


@pytest.mark.each(("change", "expected"), [
    (lambda config: config.pop("text_config"), "text_config = None must hold the text model's"),
    (lambda config: config.update(architectures=["Gemma3ForSequenceClassification"]),
     r"architectures = \['Gemma3ForSequenceClassification'\], but model_type 'gemma3' is Gemma3ForCond"),
    (set_text("model_type", "llama"),
     "text_config.model_type = 'llama', but only 'gemma3_text' is supported"),
    (set_text("tie_word_embeddings", False), "tie_word_embeddings = True, and False in text_config"),
    (set_text("tie_word_embeddings", [True]), r"tie_word_embeddings = True, and \[True\] in text_config"),
    (set_text("attn_logit_softcapping", 50.0), r"attn_logit_softcapping = 50\.0, but only None is supported"),
    (set_text("intermediate_size", 25), r"its tensors do not match the model: .* of another shape"),
    (set_text("is_causal", False), r"is_causal = False \(read by transformers, but not supported\)"),
])
def test_unsupported_multimodal_folders_raise_user_error(vision_model: Path,
                                                         change: Callable[[dict[str, Any]], Any],
                                                         expected: str, tmp_path: Path) -> None:
    check_refused(write_renamed_folder(vision_model, "as released", tmp_path / "hf", change), expected)


def test_duplicate_and_unknown_tensors_are_rejected(vision_model: Path, tmp_path: Path) -> None:
    source = write_renamed_folder(vision_model, "as released", tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    norm = tensors["language_model.model.norm.weight"]
    for name, expected in (("model.language_model.norm.weight", "are both model.norm.weight of the text"),
                           ("audio_tower.norm.weight", r"1 unexpected \(audio_tower\.norm\.weight\)")):
        save_tensors(source, tensors | {name: norm.clone()})
        check_refused(source, expected)

