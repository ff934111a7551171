"""The autoencoder whose latents the picture decoder denoises: diffusers' `AutoencoderKL`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from megatron_sov.base.errors import UserError, told_in_a_line
from megatron_sov.base.settings import problems_of, read
from megatron_sov.model.pretrained import load_pretrained
from megatron_sov.omni.codecs.decoder_settings import VAESettings

MAX_CONFIG_BYTES = 1_000_000


def new_vae(settings: VAESettings) -> AutoencoderKL:
    """Return an autoencoder of these sizes, with weights that nobody trained."""
    depth = len(settings.block_out_channels)
    return AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * depth,
                         up_block_types=("UpDecoderBlock2D",) * depth,
                         **{name: getattr(settings, name) for name in VAESettings.__dataclass_fields__})


def open_vae(folder: Path) -> tuple[VAESettings, AutoencoderKL]:
    """Return the autoencoder in a local folder that diffusers wrote (`config.json` and safetensors).

    Raises:
        UserError: there is none, or its shape is one that the settings cannot say.
    """
    _refuse_larger(folder)
    there = load_pretrained(AutoencoderKL, folder)
    found = _config(there)
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value
                              for name, value in found.items() if name in VAESettings.__dataclass_fields__}
    settings = VAESettings(**fields)
    problems = list(map(str, problems_of(settings)))
    if not problems:
        ours = _config(new_vae(settings))
        problems = [f"{name} = {value}" for name, value in found.items() if ours.get(name) != value]
    if problems:
        raise UserError(f"{folder}: this autoencoder's config.json asks for what is not supported "
                        f"({'; '.join(problems)}); take one of Flux's or Stable Diffusion's shape")
    return settings, there


def _refuse_larger(folder: Path) -> None:
    """Raise `UserError` where a folder's config.json asks for more numbers than its weights' file can hold:
    diffusers reserves the memory first."""
    file, weights = folder / "config.json", folder / "diffusion_pytorch_model.safetensors"
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"it has more than {MAX_CONFIG_BYTES:,} bytes")
        raw = json.loads(file.read_text(encoding="utf-8"))
        said = {name: raw[name] for name in VAESettings.__dataclass_fields__ if raw.get(name) is not None}
        held_bytes = weights.stat().st_size
    except (OSError, ValueError, RecursionError, AttributeError, TypeError) as e:
        raise UserError(f"{folder}: is no folder of diffusers' AutoencoderKL ({told_in_a_line(e)}); name one "
                        f"with config.json and {weights.name}") from None
    settings = read(VAESettings, said, str(file))
    with torch.device("meta"):
        asked = sum(tensor.numel() for tensor in new_vae(settings).state_dict().values())
    if asked > held_bytes:
        raise UserError(f"{folder}: is no folder of diffusers' AutoencoderKL ({file.name} asks for {asked:,} "
                        f"numbers, and {weights.name} has {held_bytes:,} bytes); download both again")


def _config(vae: AutoencoderKL) -> dict[str, Any]:
    """Return what shapes an autoencoder's arithmetic."""
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in vae.config.items()
             if not name.startswith("_") and name not in ("sample_size", "force_upcast")}
    return {**plain, "shift_factor": plain["shift_factor"] or 0.0}
