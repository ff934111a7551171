"""TA-Tok image tokenizer (https://arxiv.org/abs/2506.18898): quantized SigLIP states.

The encoder is transformers' SigLIP vision model (https://arxiv.org/abs/2303.15343) up to its penultimate
layer. The quantizer is SimVQ (https://arxiv.org/abs/2411.02038): a frozen codebook followed by a learned
linear layer; a state's id is its nearest code on the unit sphere.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import SettingsProblem, find_broken_rules, multiple_of_field

_SO400M_HEADS = 16
"""Attention heads in SigLIP so400m; tensor shapes do not reveal the number."""
_POSITIONS = "encoder.embeddings.position_embedding.weight"
_PATCHES = "encoder.embeddings.patch_embedding.weight"
_MAX_DISTANCES = 1 << 26
"""Largest distance table [vectors, codes], in elements."""


@dataclass(frozen=True)
class SiglipSettings:
    """Vision transformer sizes. Defaults: so400m with 14-pixel patches."""

    patch_pixels: Annotated[int, Ge(1), Le(4096)] = 14
    """Patch height and width; remaining pixels at the right and bottom edge are ignored."""
    width: Annotated[int, Ge(1), Le(16384), multiple_of_field("num_heads")] = 1152
    """Hidden size."""
    feed_forward_width: Annotated[int, Ge(1), Le(65536)] = 4304
    """Feed-forward hidden size."""
    num_layers: Annotated[int, Ge(1), Le(200)] = 26
    """Layers to run: all layers except the last."""
    num_heads: Annotated[int, Ge(1), Le(256)] = 16
    """Attention heads; must divide `width`."""


class SiglipFeatures(nn.Module):
    """SigLIP's hidden states for pictures in the penultimate layer."""

    def __init__(self, settings: SiglipSettings, side_pixels: int) -> None:
        super().__init__()
        self.settings = settings
        self.network: Any = SiglipVisionModel(SiglipVisionConfig(
            hidden_size=settings.width, intermediate_size=settings.feed_forward_width,
            num_hidden_layers=settings.num_layers, num_attention_heads=settings.num_heads,
            image_size=side_pixels, patch_size=settings.patch_pixels, vision_use_head=False))
        self.network.post_layernorm = nn.Identity()  # only follows the last layer

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return states [n, patches, width] for pictures [n, 3, side, side] in 0..1."""
        embedded = self.network.embeddings(pictures * 2 - 1)
        states: torch.Tensor = self.network.encoder(inputs_embeds=embedded).last_hidden_state
        return states


class UnitLength(nn.Module):
    """Scales vectors along the last axis to length 1."""

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        return F.normalize(vectors, dim=-1)


class _Codebook(nn.Module):
    """Frozen codebook and learned layer, named like in vector-quantize-pytorch's `SimVQ`."""

    frozen_codebook: torch.Tensor

    def __init__(self, width: int, codebook_size: int) -> None:
        super().__init__()
        self.register_buffer("frozen_codebook", torch.randn(codebook_size, width) * width ** -0.5)
        self.code_transform = nn.Sequential(nn.Linear(width, width), UnitLength())


class UnitSimVQ(nn.Module):
    """SimVQ quantizer for unit vectors [width]."""

    def __init__(self, width: int, codebook_size: int) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.book = _Codebook(width, codebook_size)

    def find_nearest(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return the ids [n, t] of the nearest codes to `vectors` [n, t, width]."""
        codes = self.book.code_transform(self.book.frozen_codebook)
        # In parts, because the full distance table would be the largest tensor.
        rows = max(1, _MAX_DISTANCES // self.codebook_size)
        flat = F.normalize(vectors, dim=-1).flatten(0, 1)
        ids = torch.cat([torch.cdist(part, codes).argmin(-1) for part in flat.split(rows)])
        return ids.view(vectors.shape[:2])


@dataclass(frozen=True)
class TATokSettings:
    """TA-Tok sizes. Defaults: the published model."""

    side_pixels: Annotated[int, Ge(1), Le(4096)] = 384
    """Picture height and width: 27 patches with 14 pixels each, and 6 ignored pixels."""
    encoder: SiglipSettings = field(default_factory=SiglipSettings)
    """SigLIP 2 encoder sizes."""
    code_width: Annotated[int, Ge(1), Le(16384)] = 1536
    """Codebook vector size."""
    codebook_size: Annotated[int, Ge(2), Le(1 << 20)] = 65_536
    """Vocabulary size."""

    def problems(self) -> list[SettingsProblem]:
        return find_broken_rules(self, "", (
            self.encoder.patch_pixels <= self.side_pixels, "encoder.patch_pixels",
            f"must be at most side_pixels = {self.side_pixels}"))


class TATok(nn.Module):
    """TA-Tok encoder: a picture becomes `grid` * `grid` ids, row by row."""

    Settings = TATokSettings

    def __init__(self, settings: TATokSettings) -> None:
        super().__init__()
        self.settings = settings
        self.side_pixels = settings.side_pixels
        self.grid = settings.side_pixels // settings.encoder.patch_pixels
        self.codebook_size = settings.codebook_size
        width = settings.encoder.width
        self.encoder = SiglipFeatures(settings.encoder, settings.side_pixels)
        self.task = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.to_code = nn.Linear(width, settings.code_width)
        self.quantiser = UnitSimVQ(settings.code_width, settings.codebook_size)

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return int64 ids [n, grid * grid] for float32 pictures [n, 3, side, side] in 0..1."""
        with torch.no_grad():
            return self.quantiser.find_nearest(self.to_code(self.task(self.encoder(pictures))))


def convert_ta_tok_state(tensors: Mapping[str, torch.Tensor],
                         where: str) -> tuple[TATokSettings, dict[str, torch.Tensor]]:
    """Convert published TA-Tok tensors to the settings and state of `TATok`, without the decoder.

    Args:
        tensors: published name -> tensor.
        where: file name for error messages.

    Raises:
        UserError: a tensor is missing or has another number of axes.
    """
    regularizer = "bottleneck.regularizer"
    required = (_PATCHES, _POSITIONS, "encoder.encoder.layers.0.mlp.fc1.weight",
                "bottleneck.in_linear.weight", f"{regularizer}.embedding.weight",
                f"{regularizer}.embedding_proj.bias", "encode_task_layer.0.weight")
    if missing := [name for name in required if name not in tensors]:
        raise UserError(f"{where}: lacks {missing[0]}, so it is not TA-Tok; pass the safetensors files of a "
                        "model that contains TA-Tok")
    num_layers = 1 + max(int(name.split(".")[3]) for name in tensors
                         if name.startswith("encoder.encoder.layers.") and name.split(".")[3].isdecimal())
    width, _, patch, _ = _get_shape(tensors, _PATCHES, 4, where)
    grid = round(_get_shape(tensors, _POSITIONS, 2, where)[0] ** 0.5)
    codebook_size, code_width = _get_shape(tensors, f"{regularizer}.embedding.weight", 2, where)
    # The published 384 pixels are not a multiple of the 14-pixel patches, and shapes only give the patches.
    side = 384 if 384 // patch == grid else grid * patch
    encoder = SiglipSettings(patch_pixels=patch, width=width, num_layers=num_layers - 1,
                             feed_forward_width=_get_shape(tensors, required[2], 2, where)[0],
                             num_heads=_SO400M_HEADS if width % _SO400M_HEADS == 0 else 1)
    settings = TATokSettings(side_pixels=side, encoder=encoder, code_width=code_width,
                             codebook_size=codebook_size)
    prefixes = {"encode_task_layer.": "task.", "bottleneck.in_linear.": "to_code.",
                f"{regularizer}.embedding_proj.": "quantiser.book.code_transform.0.",
                f"{regularizer}.embedding.weight": "quantiser.book.frozen_codebook",
                "encoder.": "encoder.network."}
    state = {}
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is None:
            continue
        if prefix != "encoder." or is_encoder_tensor(name.removeprefix(prefix), num_layers - 1):
            state[prefixes[prefix] + name.removeprefix(prefix)] = tensor
    return settings, state


def is_encoder_tensor(name: str, num_layers: int) -> bool:
    """Return whether `SiglipFeatures` with `num_layers` contains a tensor from the full SigLIP model."""
    unused_prefixes = ("post_layernorm.", "head.", f"encoder.layers.{num_layers}.")
    return not name.startswith(unused_prefixes) and not name.endswith("position_ids")


def _get_shape(tensors: Mapping[str, Any], name: str, num_axes: int, where: str) -> tuple[int, ...]:
    """Return a tensor's shape; raise `UserError` for another number of axes."""
    shape = tuple(tensors[name].shape)
    if len(shape) != num_axes:
        raise UserError(f"{where}: {name} has the shape {list(shape)}, not {num_axes} axes; it is not TA-Tok")
    return shape
