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


def test_settings_come_back_from_json() -> None:
    found = config(vision=VISION, audio={"placeholder_ids": [6], "compression": 25})
    assert found.problems() == [] and from_dict(found.to_dict()) == found
