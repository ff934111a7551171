"""Load image and audio encoders from Hugging Face folders into a new model."""

from pathlib import Path
from typing import Any

import torch

from megatron_sov.base.errors import UserError
from megatron_sov.base.hints.table import load_package_table
from megatron_sov.checkpoint.load import raise_on_all_ranks
from megatron_sov.checkpoint.safetensors_files import TensorFile
from megatron_sov.convert.sources import open_shards
from megatron_sov.engine.model.language_model import LanguageModel
from megatron_sov.engine.model.local_shards import list_local_shards
from megatron_sov.model.config import AudioEncoderConfig, ModelConfig, RunConfig, VisionEncoderConfig
from megatron_sov.model.families.encoders import AUDIO, ENCODER, VISION, encoder_shapes
from megatron_sov.model.pretrained import CONFIG, format_names, read_json
from megatron_sov.runs.checkpoints import check_model_path

ENCODER_SECTIONS = ("vision_config", "audio_config", "thinker_config")
"""Sections in a multimodal model's `config.json` that contain an encoder's fields."""
ENCODER_FIELDS: dict[str, dict[str, str]] = load_package_table(Path(__file__).with_suffix(".yaml"))
ENCODER_FIELDS["qwen2_audio"] = ENCODER_FIELDS["whisper"]
"""Encoder kind -> field of the transformers config -> our field. Values must agree: weight shapes alone do
not determine `num_heads`, for example."""


@torch.no_grad()
def load_encoder_weights(model: LanguageModel, config: RunConfig) -> None:
    """Load encoder weights from the folders `media.vision_from` and `media.audio_from`. Collective.

    Raises `UserError` on every rank if a folder's encoder is missing or has different sizes.
    """
    for prefix, folder in ((VISION, config.media.vision_from), (AUDIO, config.media.audio_from)):
        if not folder:
            continue
        files, names = open_encoder(Path(folder), prefix, config.model)
        blocks = [block for block in list_local_shards(model) if block.key in names]
        with raise_on_all_ranks():
            for block in blocks:
                name = names[block.key]
                block.data.copy_(files[name].read(name).reshape(block.data.shape))


def open_encoder(folder: Path, prefix: str,
                 model: ModelConfig) -> tuple[dict[str, TensorFile], dict[str, str]]:
    """Open an encoder in a Hugging Face folder, alone or inside a larger model.

    `prefix` is `VISION` or `AUDIO`. Returns tensor name in the folder -> file, and key of each encoder tensor
    in our `model` -> name in the folder. Raises `UserError` if the folder has no such encoder, has several,
    or has an encoder of different sizes.
    """
    check_model_path(folder)
    setting = f"media.{prefix[:-1]}_from = {str(folder)!r}"
    encoder = model.vision if prefix == VISION else model.audio
    assert encoder is not None  # by `RunConfig.problems`
    files = open_shards(folder)
    shapes = {key: shape for key, shape in encoder_shapes(model).items() if key.startswith(prefix + ENCODER)}
    suffixes = {key: key.removeprefix(prefix + ENCODER) for key in shapes}
    first = next(iter(suffixes.values()))
    prefixes = [name.removesuffix(first) for name in files if name == first or name.endswith("." + first)]
    complete = [start for start in prefixes if all(start + suffix in files for suffix in suffixes.values())]
    if len(complete) != 1:
        details = ""
        if not complete:
            missing = [suffix for suffix in suffixes.values()
                       if not prefixes or prefixes[0] + suffix not in files]
            details = f" (it lacks {format_names(missing)})"
        raise UserError(f"{setting}: holds {len(complete)} encoders of kind {encoder.kind!r} with "
                        f"{encoder.num_layers} layers, must hold one{details}; compare its {CONFIG} with "
                        f"model.{prefix[:-1]}")
    names = {key: complete[0] + suffix for key, suffix in suffixes.items()}
    differing = []
    for key, name in names.items():
        shape = files[name].entries[name].shape
        if tuple(shape) != shapes[key]:
            differing.append(f"{name} {list(shape)} instead of {list(shapes[key])}")
    if differing:
        raise UserError(f"{setting}: {format_names(differing)}; set model.{prefix[:-1]} to the sizes in "
                        f"its {CONFIG}")
    _check_encoder_fields(folder, setting, encoder)
    return files, names


def _check_encoder_fields(folder: Path, setting: str,
                          encoder: VisionEncoderConfig | AudioEncoderConfig) -> None:
    config: dict[str, Any] = read_json(folder / CONFIG)
    while section := next((config[name] for name in ENCODER_SECTIONS
                           if isinstance(config.get(name), dict)), None):
        config = section
    for theirs, ours in ENCODER_FIELDS[encoder.kind].items():
        value = getattr(encoder, ours)
        expected = list(value) if isinstance(value, tuple) else value
        their_value = config.get(theirs, value)
        if their_value != expected:
            raise UserError(f"{setting}: its {CONFIG} has {theirs} = {their_value}, but the model has "
                            f"{ours} = {value}; set both to the same value")
