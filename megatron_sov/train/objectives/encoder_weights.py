"""Starting weights of encoders of pictures and sounds, from a Hugging Face folder that holds such an encoder,
alone or inside a larger model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_sov.base.errors import UserError
from megatron_sov.engine.convert.sources import open_shards
from megatron_sov.engine.mcore.checkpoint.load import agreement
from megatron_sov.engine.mcore.checkpoint.writer import TensorFile
from megatron_sov.engine.mcore.model.language_model import LanguageModel
from megatron_sov.engine.mcore.model.local_shards import local_shards
from megatron_sov.model.config import AudioEncoderConfig, ModelConfig, RunConfig, VisionEncoderConfig
from megatron_sov.model.families.encoders import AUDIO, ENCODER, VISION, encoder_tensors
from megatron_sov.model.pretrained import CONFIG, listed, read_json
from megatron_sov.runs.checkpoints import refuse_missing

PARTS = ("vision_config", "audio_config", "thinker_config")
"""Fields of a larger model's config.json under which an encoder's own fields stand."""
FIELDS = {
    "siglip": {"hidden_size": "hidden_size", "num_hidden_layers": "num_layers",
               "num_attention_heads": "num_heads", "intermediate_size": "ffn_dim", "image_size": "image_size",
               "patch_size": "patch_size"},
    "qwen2_5_vl": {"hidden_size": "hidden_size", "depth": "num_layers", "num_heads": "num_heads",
                   "intermediate_size": "ffn_dim", "patch_size": "patch_size",
                   "spatial_merge_size": "merge_size", "temporal_patch_size": "temporal_patch_size",
                   "window_size": "window_size", "out_hidden_size": "out_hidden_size",
                   "fullatt_block_indexes": "full_attention_layers"},
    "whisper": {"d_model": "hidden_size", "encoder_layers": "num_layers",
                "encoder_attention_heads": "num_heads", "encoder_ffn_dim": "ffn_dim",
                "num_mel_bins": "num_mels"},
}
FIELDS["qwen2_audio"] = FIELDS["whisper"]
"""Kind -> field of transformers' config -> ours: what the shapes of weights do not tell, such as heads, has
to agree as well."""


@torch.no_grad()
def start_encoders(model: LanguageModel, config: RunConfig) -> None:
    """Give encoders the weights of the folders that `media` names; called by all processes together.

    Raises:
        UserError: on every process; a folder holds no such encoder, or one of other sizes.
    """
    for prefix, folder in ((VISION, config.media.vision_from), (AUDIO, config.media.audio_from)):
        if not folder:
            continue
        files, found = encoder_in(Path(folder), prefix, config.model)
        blocks = [block for block in local_shards(model) if block.key in found]
        with agreement():
            for block in blocks:
                name = found[block.key]
                block.data.copy_(files[name].read(name).reshape(block.data.shape))


def encoder_in(folder: Path, prefix: str,
               model: ModelConfig) -> tuple[dict[str, TensorFile], dict[str, str]]:
    """Return a folder's files by tensor, and for each of an encoder's tensors the name that it has there.

    Args:
        folder: with config.json and safetensors files.
        prefix: `VISION` or `AUDIO`.
        model: whose encoder it is.

    Raises:
        UserError: the folder holds no such encoder, several of them, or one of other sizes.
    """
    refuse_missing(folder)
    setting = f"media.{prefix[:-1]}_from = {str(folder)!r}"
    encoder = model.vision if prefix == VISION else model.audio
    assert encoder is not None  # by `RunConfig.problems`
    files = open_shards(folder)
    wanted = {key: shape for key, shape in encoder_tensors(model).items() if key.startswith(prefix + ENCODER)}
    names = {key: key.removeprefix(prefix + ENCODER) for key in wanted}
    first = next(iter(names.values()))
    places = [name.removesuffix(first) for name in files if name == first or name.endswith("." + first)]
    whole = [place for place in places if all(place + name in files for name in names.values())]
    if len(whole) != 1:
        lacking = [name for name in names.values() if not places or places[0] + name not in files]
        raise UserError(f"{setting}: holds {len(whole)} encoders of kind {encoder.kind!r} with "
                        f"{encoder.num_layers} layers, must hold one"
                        f"{'' if whole else f' (it lacks {listed(lacking)})'}; compare its {CONFIG} with "
                        f"model.{prefix[:-1]}")
    found = {key: whole[0] + name for key, name in names.items()}
    others = [f"{name} {list(files[name].entries[name].shape)} instead of {list(wanted[key])}"
              for key, name in found.items() if tuple(files[name].entries[name].shape) != wanted[key]]
    if others:
        raise UserError(f"{setting}: {listed(others)}; set the sizes of model.{prefix[:-1]} as its "
                        f"{CONFIG} has them")
    _refuse_other_sizes(folder, setting, encoder)
    return files, found


def _refuse_other_sizes(folder: Path, setting: str,
                        encoder: VisionEncoderConfig | AudioEncoderConfig) -> None:
    config: dict[str, Any] = read_json(folder / CONFIG)
    while part := next((config[name] for name in PARTS if isinstance(config.get(name), dict)), None):
        config = part
    for theirs, ours in FIELDS[encoder.kind].items():
        value = getattr(encoder, ours)
        told = config.get(theirs, value)
        if told != (list(value) if isinstance(value, tuple) else value):
            raise UserError(f"{setting}: its {CONFIG} has {theirs} = {told}, and the model's "
                            f"{ours} is {value}; make them agree")
