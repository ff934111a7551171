"""Settings of encoders: how many features they make, and everything that is wrong at once."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_sov import recipes
from megatron_sov.config import AudioEncoderConfig, RunConfig, VisionEncoderConfig, apply_settings, from_dict

VISION = {"placeholder_ids": [5], "full_attention_layers": [1], "num_layers": 2}


def config(*settings: str, vision: dict[str, Any] | None = None,
           audio: dict[str, Any] | None = None) -> RunConfig:
    """Return a tiny model with encoders."""
    return apply_settings(recipes.get("tiny-qwen3"), [
        f"model.vision={json.dumps(vision)}", f"model.audio={json.dumps(audio)}", *settings])


@pytest.mark.parametrize(("encoder", "slots"), [
    (VisionEncoderConfig(image_size=392), 196), (VisionEncoderConfig(image_size=56, merge_size=4), 1),
    (VisionEncoderConfig("siglip", image_size=384, patch_size=16), 576),
    (AudioEncoderConfig(), 750), (AudioEncoderConfig("whisper"), 1500),
    (AudioEncoderConfig(compression=25), 30)])
def test_features_of_a_record(encoder: Any, slots: int) -> None:
    assert encoder.slots == slots


@pytest.mark.parametrize(("vision", "audio", "said"), [
    ({"placeholder_ids": []}, None, "model.vision.placeholder_ids = [] must name at least one id"),
    ({**VISION, "placeholder_ids": [2048]}, None, "all below model.vocab_size = 2048"),
    ({**VISION, "image_size": 400}, None, "model.vision.image_size = 400 must be a multiple of 28"),
    ({**VISION, "hidden_size": 1250}, None, "model.vision.hidden_size = 1250 must be a multiple of 64"),
    ({**VISION, "full_attention_layers": [2]}, None, "between 0 and model.vision.num_layers - 1 = 1"),
    ({**VISION, "window_size": 14}, None, "model.vision.window_size = 14 must be at least 28"),
    ({**VISION, "std": [1, 1, 0]}, None, "model.vision.std = [1.0, 1.0, 0.0] positive ones"),
    ({**VISION, "num_layers": 0}, None, "model.vision.num_layers = 0 must lie between 1"),
    (None, {"placeholder_ids": [6], "num_frames": 3010},
     "model.audio.num_frames = 3010 must be a multiple of 4"),
    (None, {"placeholder_ids": [6], "num_frames": 3010, "compression": 25}, "must be a multiple of 100"),
    (None, {"placeholder_ids": [6], "num_heads": 3}, "must be a multiple of model.audio.num_heads = 3"),
    (None, {"placeholder_ids": [6], "compression": 25, "compressor_size": 100},
     "model.audio.compressor_head_dim"),
    (VISION, {"placeholder_ids": [5, 6]}, "both have [5]"),
])
def test_what_cannot_be_is_said_in_one_sentence(vision: Any, audio: Any, said: str) -> None:
    problems = config(vision=vision, audio=audio).problems()
    assert len(problems) == 1 and said in problems[0]


def test_what_is_said_of_encoders_that_are_not_there() -> None:
    problems = config("media.vision_from=a", "media.audio_from=b").problems()
    assert problems == ["media.vision_from = 'a': the model has no model.vision",
                        "media.audio_from = 'b': the model has no model.audio"]
    lora = config("lora.rank=4", "media.train_encoders=true", vision=VISION).problems()
    assert len(lora) == 1 and "media.train_encoders = True: lora.rank freezes" in lora[0]


def test_settings_come_back_from_json() -> None:
    found = config(vision=VISION, audio={"placeholder_ids": [6], "compression": 25})
    assert found.problems() == [] and from_dict(found.to_dict()) == found
