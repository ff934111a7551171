"""The autoencoder whose latents the picture decoder denoises: diffusers' `AutoencoderKL`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Le, Len
from diffusers import AutoencoderKL

from megatron_sov.base.errors import UserError, told_in_a_line
from megatron_sov.base.settings import multiple_of, problems_of, read
from megatron_sov.model.pretrained import load_pretrained

MAX_BLOCKS = 8
MAX_CONFIG_BYTES = 1_000_000


Width = Annotated[int, Ge(1), Le(65_536)]


@dataclass(frozen=True)
class VAESettings:
    """The defaults are Flux's autoencoder, which the authors' latents (16 channels, an eighth of the side)
    fit; names are those of diffusers' config."""

    latent_channels: Annotated[int, Ge(1), Le(1024)] = 16
    """Of a latent."""
    block_out_channels: Annotated[
        tuple[Width, ...], Len(1, MAX_BLOCKS), multiple_of("norm_num_groups")] = (128, 256, 512, 512)
    """Of each block; every one but the last halves the picture's sides."""
    layers_per_block: Annotated[int, Ge(1), Le(100)] = 2
    """Residual layers of a block."""
    norm_num_groups: Annotated[int, Ge(1), Le(65536)] = 32
    """Groups of its norms."""
    scaling_factor: Annotated[float, Ge(1e-06), Le(1000000.0)] = 0.3611
    """What latents are multiplied with, so that they spread as the noise does."""
    shift_factor: Annotated[float, Ge(-1000000.0), Le(1000000.0)] = 0.1159
    """What is taken off them before."""
    use_quant_conv: bool = False
    """A convolution of size 1 behind the encoder."""
    use_post_quant_conv: bool = False
    """A convolution of size 1 before the decoder."""

    @property
    def pixels(self) -> int:
        """Pixels of a side of one latent."""
        return 2**(len(self.block_out_channels) - 1)


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
