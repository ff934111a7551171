"""The picture decoder: a diffusion transformer that draws what an image tokenizer's ids stand for, and the
autoencoder (diffusers' `AutoencoderKL`) whose latents it denoises.

Its shape is that of the authors' serving code (OmniServe, decoder/vision/track_b/pipeline.py): one stream of
single-stream blocks (attention and feed-forward side by side, QK-norm, adaptive layer norm), places turned by
row and column.  The tokens' embeddings are stretched over the picture and stand beside the noisy numbers at
each place; their mean joins the noise level in the modulation.  Blocks, rotations and sampler are diffusers'.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings
from diffusers.models.normalization import AdaLayerNormContinuous
from diffusers.models.transformers.transformer_flux import FluxPosEmbed, FluxSingleTransformerBlock
from torch import nn

from megatron_sov.base.errors import UserError, told_in_a_line
from megatron_sov.base.settings import problems_of, read
from megatron_sov.model.pretrained import load_pretrained
from megatron_sov.omni.codecs.decoder_settings import NUM_AXES, DiTSettings, VAESettings

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
    # a number takes one byte at least
    if asked > held_bytes:
        raise UserError(f"{folder}: is no folder of diffusers' AutoencoderKL ({file.name} asks for {asked:,} "
                        f"numbers, and {weights.name} has {held_bytes:,} bytes); download both again")


def _config(vae: AutoencoderKL) -> dict[str, Any]:
    """Return what shapes an autoencoder's arithmetic."""
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in vae.config.items()
             if not name.startswith("_") and name not in ("sample_size", "force_upcast")}
    return {**plain, "shift_factor": plain["shift_factor"] or 0.0}


LEVELS = 1000
"""Noise levels of the scheduler, diffusers' `num_train_timesteps`."""


class DiT(nn.Module):
    """Noisy pictures and ids -> the velocity from the picture to the noise; `decode` samples with it."""

    Settings = DiTSettings
    token_embeddings: torch.Tensor
    """[codebook_size, token_width], of the tokenizer; kept with the weights, and not learned."""

    def __init__(self, settings: DiTSettings) -> None:
        super().__init__()
        self.settings = settings
        s = settings
        self.vae = None if s.vae is None else new_vae(s.vae)
        self.register_buffer("token_embeddings", torch.zeros(s.codebook_size, s.token_width))
        self.place_in = nn.Linear(s.patch_channels + s.token_width, s.width)
        self.condition_in = CombinedTimestepTextProjEmbeddings(s.width, s.token_width)
        self.turns = FluxPosEmbed(s.rope_theta, list(s.rope_axes))
        blocks = [FluxSingleTransformerBlock(s.width, s.num_heads, s.width // s.num_heads, s.mlp_ratio)
                  for _ in range(s.num_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.last_norm = AdaLayerNormContinuous(s.width, s.width, elementwise_affine=False, eps=1e-6)
        self.place_out = nn.Linear(s.width, s.patch_channels)
        # every block begins as the identity and the velocity as 0 (adaLN-Zero, arXiv 2212.09748)
        for last in (*(block.norm.linear for block in blocks), self.last_norm.linear, self.place_out):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    @property
    def side_pixels(self) -> int:
        """Height and width of a square picture."""
        return self.settings.side_pixels

    def forward(self, noisy: torch.Tensor, level: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Return [n, channels, h, w] velocities.

        Args:
            noisy: [n, channels, h, w] pictures (or latents) with noise.
            level: [n] share of noise in them, 0..1.
            ids: [n, grid * grid] tokens.
        """
        s = self.settings
        height, width = noisy.shape[2:]
        rows, columns = height // s.patch, width // s.patch
        seen = self.token_embeddings[ids].to(noisy.dtype)
        beside = nn.functional.interpolate(seen.transpose(1, 2).unflatten(2, (s.grid, s.grid)),
                                           size=(rows, columns), mode="bilinear")
        hidden = self.place_in(torch.cat([_to_places(noisy, s.patch), beside.flatten(2).transpose(1, 2)], 2))
        # diffusers' embedding expects the scheduler's scale, 0 to 1000
        condition = self.condition_in(level * LEVELS, seen.mean(1))
        turns = self.turns(_places(rows, columns, noisy.device))
        # the block joins places of a text with those of the picture; here is no text
        none = hidden[:, :0]
        for block in self.blocks:
            _, hidden = block(hidden, none, condition, turns)
        return _from_places(self.place_out(self.last_norm(hidden, condition)), s.patch, rows, columns)

    def to_latents(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return what is denoised of [n, 3, h, w] pictures in 0..1."""
        pictures = pictures * 2 - 1
        if self.vae is None or self.settings.vae is None:
            return pictures
        sizes = self.settings.vae
        # the mode and no draw: a picture has one target
        latents: torch.Tensor = self.vae.encode(pictures).latent_dist.mode()
        return (latents - sizes.shift_factor) * sizes.scaling_factor

    def to_pictures(self, latents: torch.Tensor) -> torch.Tensor:
        """Return [n, 3, h, w] pictures in 0..1 of what was denoised."""
        if self.vae is not None and self.settings.vae is not None:
            sizes = self.settings.vae
            latents = self.vae.decode(latents / sizes.scaling_factor + sizes.shift_factor).sample
        return (latents.clamp(-1, 1) + 1) / 2

    @torch.no_grad()
    def decode(self, ids: torch.Tensor, *, steps: int | None = None, seed: int = 0,
               ratio: tuple[int, int] = (1, 1)) -> torch.Tensor:
        """Return [n, 3, height, width] float32 pictures in 0..1 of [n, grid * grid] ids.

        The noise is drawn on the CPU, picture after picture, so the first pictures are the same however many
        follow them, and on every device.

        Args:
            ids: tokens of one picture a row.
            steps: of the sampler (None: `settings.steps`).
            seed: of the noise.
            ratio: width : height, as the mark `<|vision_ratio_W:H|>` has it.

        Raises:
            UserError: ids that are none, or a shape without pixels.
        """
        s = self.settings
        self._check(ids, ratio)
        height, width = s.size_of(*ratio)
        shape = (len(ids), s.channels, height // s.latent_pixels, width // s.latent_pixels)
        generator = torch.Generator().manual_seed(seed)
        weight = self.place_in.weight
        latents = torch.randn(shape, generator=generator).to(weight.device)
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=LEVELS, shift=s.shift)
        scheduler.set_timesteps(s.steps if steps is None else steps, device=weight.device)
        ids = ids.to(weight.device)
        for time in scheduler.timesteps:
            velocity = self(latents.to(weight.dtype), (time / LEVELS).expand(len(ids)), ids)
            # steps are summed up in float32: bf16 would lose small ones
            latents = scheduler.step(velocity.float(), time, latents).prev_sample
        return self.to_pictures(latents.to(weight.dtype)).float()

    def _check(self, ids: torch.Tensor, ratio: tuple[int, int]) -> None:
        s = self.settings
        if ids.ndim != 2 or ids.shape[1] != s.grid**2:
            raise UserError(f"a picture has {s.grid} x {s.grid} = {s.grid**2} tokens, and here are "
                            f"{ids.shape[-1] if ids.ndim else 1}; let the model finish its picture, or take "
                            "the decoder of this tokenizer")
        outside = ids[(ids < 0) | (ids >= s.codebook_size)]
        if len(outside):
            raise UserError(f"image token {int(outside[0])} is outside of the decoder's codebook "
                            f"(0 to {s.codebook_size - 1}); take the decoder of this tokenizer")
        if min(ratio) < 1 or min(s.size_of(*ratio)) < 1:
            raise UserError(f"a picture of ratio {ratio[0]}:{ratio[1]} has no pixels with the area of "
                            f"{s.side_pixels} x {s.side_pixels}; ask for a ratio nearer to 1:1")


def _to_places(pictures: torch.Tensor, patch: int) -> torch.Tensor:
    """Return [n, places, channels * patch * patch] of [n, channels, h, w]."""
    return nn.functional.unfold(pictures, patch, stride=patch).transpose(1, 2)


def _from_places(places: torch.Tensor, patch: int, rows: int, columns: int) -> torch.Tensor:
    return nn.functional.fold(places.transpose(1, 2), (rows * patch, columns * patch), patch, stride=patch)


def _places(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Return [rows * columns, 3]: 0, row and column of each place."""
    places = torch.zeros(rows, columns, NUM_AXES, device=device)
    places[..., 1] = torch.arange(rows, device=device)[:, None]
    places[..., 2] = torch.arange(columns, device=device)[None, :]
    return places.flatten(0, 1)
