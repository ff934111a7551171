"""What docs/omni.md says of a Hugging Face folder with encoders: transformers' classes load it, and compute
what our model computes."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from megatron_sov.config import AudioEncoderConfig, VisionEncoderConfig
from megatron_sov.convert.hf_export import to_hf
from megatron_sov.convert.processor import processor_files
from megatron_sov.generate.load import load_forward_model
from megatron_sov.mcore.decode.forward_only import Inputs
from megatron_sov.mcore.parallel import world
from megatron_sov.media.banks import PICTURES, SOUNDS
from megatron_sov.media.placed import placed
from megatron_sov.recipes import get
from megatron_sov.runs.checkpoints import settings_of
from tests.omni_model import NUM_PICTURE_TOKENS, save_omni_model

PAGE = (Path(__file__).parents[2] / "docs/omni.md").read_text(encoding="utf-8")


def ours(checkpoint: Path, ids: list[int], records: dict[str, np.ndarray]) -> torch.Tensor:
    """Return the logits of a row in which all placeholders of a kind stand for records in order."""
    config = settings_of(checkpoint)
    assert config.model.vision is not None and config.model.audio is not None
    pads = {PICTURES: config.model.vision, SOUNDS: config.model.audio}
    media = {}
    for kind, encoder in pads.items():
        places = np.flatnonzero(np.isin(ids, encoder.placeholder_ids))
        media[kind] = placed(places, np.arange(len(places)), records[kind], encoder.slots)
    world.join(config.parallel)
    try:
        row = Inputs([ids], torch.device("cpu"))
        row.inputs = dataclasses.replace(row.inputs, media=media)
        return load_forward_model(checkpoint, config).logits(row, torch.arange(len(ids)))
    finally:
        world.leave()


def test_the_page_computes_what_the_model_computes(tmp_path: Path, packed_data: Any, one_rank: None,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_omni_model(tmp_path / "model", packed_data.tokenizer, ("model.init_std=0.1",))
    to_hf("model", "omni-hf")
    names: dict[str, Any] = {}
    code = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[-1]
    exec(compile(code, "the page", "exec"), names)
    media, random = names["media"], np.random.default_rng(0)
    assert media["pictures"]["placeholders"] == ["<|IMAGE_PAD|>", "<|VIDEO_PAD|>"]
    assert (media["pictures"]["slots"], media["sounds"]["slots"]) == (4, 50)
    assert media["image_tokens"]["size"] == NUM_PICTURE_TOKENS and media["image_tokens"]["codecs"] == []
    pixels = random.integers(256, size=(2, 16, 16, 3), dtype=np.uint8)
    sound = random.uniform(-0.5, 0.5, 30_000).astype(np.float32)
    pad, said = media["pictures"]["placeholder_ids"][0], media["sounds"]["placeholder_ids"][0]
    ids = [9, *[pad] * 4, 7, *[pad] * 4, 30, *[said] * 50, 5, 4]
    heard = names["AutoFeatureExtractor"].from_pretrained("omni-hf")(
        sound, sampling_rate=16_000, return_tensors="np")["input_features"]
    assert heard.shape[1:] == tuple(media["sounds"]["record_shape"])
    with torch.no_grad():
        theirs = names["logits"](torch.tensor(ids), [Image.fromarray(p) for p in pixels], [sound])
        blind = names["logits"](torch.tensor(ids), [Image.new("RGB", (16, 16))] * 2, [sound])
    found = ours(tmp_path / "model", ids, {PICTURES: pixels.transpose(0, 3, 1, 2), SOUNDS: heard})
    assert torch.allclose(found, theirs, rtol=1e-5, atol=1e-5)
    assert (theirs[-1] - blind[-1]).abs().max() > 1e-3
    prefixes = (*media["pictures"]["prefixes"], *media["sounds"]["prefixes"])
    tensors = load_file("omni-hf/model.safetensors")
    assert all(any(name.startswith(prefix) for name in tensors) for prefix in prefixes)


def test_other_kinds_have_their_own_classes(tmp_path: Path) -> None:
    from transformers import AutoFeatureExtractor, AutoImageProcessor

    model = dataclasses.replace(get("tiny-qwen3").model, vision=VisionEncoderConfig(
        "siglip", (5,), image_size=24, patch_size=8), audio=AudioEncoderConfig("whisper", (6,), num_mels=8,
                                                                               num_frames=200))
    files = processor_files(model, tmp_path, {})
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    for kept in ([*files], ["preprocessor_config.json"]):  # either file alone will do
        for name in set(files) - set(kept):
            (tmp_path / name).unlink()
        picture = Image.new("RGB", (60, 30), (255, 0, 0))
        seen = AutoImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="np")["pixel_values"]
        red = (1 - model.vision.mean[0]) / model.vision.std[0] if model.vision else 0
        assert seen.shape == (1, 3, 24, 24) and seen[0, 0] == pytest.approx(np.full((24, 24), red), rel=1e-5)
        heard = AutoFeatureExtractor.from_pretrained(tmp_path)(np.zeros(5), sampling_rate=16_000)
        assert np.shape(heard["input_features"]) == (1, 8, 200)
    plain = get("tiny-qwen3").model
    assert processor_files(plain, tmp_path, {}) == {}
    part = dataclasses.replace(plain, audio=AudioEncoderConfig("whisper", (6,), num_frames=60))
    assert "feature_extractor" not in processor_files(part, tmp_path, {})["processor_config.json"]
