"""TA-Tok (https://arxiv.org/abs/2506.18898): pictures as ids, the nearest unit vectors to SigLIP's states.

SigLIP's vision transformer (https://arxiv.org/abs/2303.15343) is used up to its last layer but one; the
network is transformers' own.  Codes are SimVQ's (https://arxiv.org/abs/2411.02038): a frozen table behind one
linear layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import nn

from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import SettingsProblem, find_broken_rules, multiple_of_field

_SO400M_HEADS = 16
"""Of attention in SigLIP so400m; no tensor tells it."""
_POSITIONS = "encoder.embeddings.position_embedding.weight"
_PATCHES = "encoder.embeddings.patch_embedding.weight"


@dataclass(frozen=True)
class SiglipSettings:
    """Sizes of the transformer: those of so400m, patches of 14."""

    patch_pixels: Annotated[int, Ge(1), Le(4096)] = 14
    """Of a patch; what is over behind whole patches is not seen."""
    width: Annotated[int, Ge(1), Le(16384), multiple_of_field("num_heads")] = 1152
    """Of its states."""
    feed_forward_width: Annotated[int, Ge(1), Le(65536)] = 4304
    """Of its layers."""
    num_layers: Annotated[int, Ge(1), Le(200)] = 26
    """Of it that are used: all but the last."""
    num_heads: Annotated[int, Ge(1), Le(256)] = 16
    """Of its attention; divides `width`."""


class SiglipFeatures(nn.Module):
    """States [n, patches, width] of pictures.

    Args:
        settings: sizes.
        side_pixels: height and width of the pictures.
    """

    def __init__(self, settings: SiglipSettings, side_pixels: int) -> None:
        super().__init__()
        from transformers import SiglipVisionConfig, SiglipVisionModel

        self.settings = settings
        self.network: Any = SiglipVisionModel(SiglipVisionConfig(
            hidden_size=settings.width, intermediate_size=settings.feed_forward_width,
            num_hidden_layers=settings.num_layers, num_attention_heads=settings.num_heads,
            image_size=side_pixels, patch_size=settings.patch_pixels, vision_use_head=False))
        self.network.post_layernorm = nn.Identity()  # behind the layer that is used

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return the states of [n, 3, side, side] pictures in 0..1."""
        embedded = self.network.embeddings(pictures * 2 - 1)
        states: torch.Tensor = self.network.encoder(inputs_embeds=embedded).last_hidden_state
        return states


def used(name: str, num_layers: int) -> bool:
    """Return whether a tensor of the whole transformer, by its name there, belongs to `SiglipFeatures`."""
    return not name.startswith(("post_layernorm.", "head.", f"encoder.layers.{num_layers}.")) and not \
        name.endswith("position_ids")


_SCORES = 1 << 26
"""Numbers of a table of vectors by codes that is made at a time."""


class UnitLength(nn.Module):
    """Vectors at length 1."""

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return vectors of the last axis, normalised."""
        return F.normalize(vectors, dim=-1)


class _Book(nn.Module):
    """The table, and the layer that makes codes of it; with the names of vector-quantize-pytorch's SimVQ."""

    frozen_codebook: torch.Tensor

    def __init__(self, width: int, codebook_size: int) -> None:
        super().__init__()
        self.register_buffer("frozen_codebook", torch.randn(codebook_size, width) * width ** -0.5)
        self.code_transform = nn.Sequential(nn.Linear(width, width), UnitLength())


class UnitSimVQ(nn.Module):
    """SimVQ over unit vectors.

    Args:
        width: of the vectors.
        codebook_size: codes.
    """

    def __init__(self, width: int, codebook_size: int) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.book = _Book(width, codebook_size)

    def nearest(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return the ids [n, t] of [n, t, width] vectors, in bounded memory."""
        # once and not for each part: the whole table goes through the learned layer
        codes = self.book.code_transform(self.book.frozen_codebook)
        # 1,024 vectors at a time for 65,536 codes, else the table of distances is the largest tensor
        rows = max(1, _SCORES // self.codebook_size)
        flat = F.normalize(vectors, dim=-1).flatten(0, 1)
        ids = torch.cat([torch.cdist(part, codes).argmin(-1) for part in flat.split(rows)])
        return ids.view(vectors.shape[:2])


@dataclass(frozen=True)
class TATokSettings:
    """Sizes: TA-Tok's own."""

    side_pixels: Annotated[int, Ge(1), Le(4096)] = 384
    """Height and width of a picture: 27 patches of 14, and 6 pixels that are not seen."""
    encoder: SiglipSettings = field(default_factory=SiglipSettings)
    """SigLIP 2 so400m."""
    code_width: Annotated[int, Ge(1), Le(16384)] = 1536
    """Of the codebook's vectors."""
    codebook_size: Annotated[int, Ge(2), Le(1 << 20)] = 65_536
    """Tokens there are."""

    def problems(self) -> list[SettingsProblem]:
        return find_broken_rules(self, "", (
            self.encoder.patch_pixels <= self.side_pixels, "encoder.patch_pixels",
            f"must be at most side_pixels = {self.side_pixels}"))


class TATok(nn.Module):
    """Pictures as ids; an `folder.ImageTokenizer`."""

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
        """Return [n, grid * grid] int64 ids of [n, 3, side, side] float32 pictures in 0..1."""
        with torch.no_grad():
            return self.quantiser.nearest(self.to_code(self.task(self.encoder(pictures))))


def ta_tok_state(found: Mapping[str, torch.Tensor],
                 where: str) -> tuple[TATokSettings, dict[str, torch.Tensor]]:
    """Return settings and state of `TATok` from the tensors of TA-Tok as published.

    Tensors that only its decoder needs are left out; sizes are read off the shapes.

    Args:
        found: TA-Tok's names -> tensors.
        where: the file, for sentences.

    Raises:
        UserError: it is no TA-Tok, or one of another layout.
    """
    regularizer = "bottleneck.regularizer"
    needed = (_PATCHES, _POSITIONS, "encoder.encoder.layers.0.mlp.fc1.weight", "bottleneck.in_linear.weight",
              f"{regularizer}.embedding.weight", f"{regularizer}.embedding_proj.bias",
              "encode_task_layer.0.weight")
    if missing := [name for name in needed if name not in found]:
        raise UserError(f"{where}: lacks {missing[0]}, so it is no TA-Tok; pass ta_tok.pth or the "
                        "safetensors files of a model that has it inside")
    # the file has the last layer too, which is not used: see `used`
    layers = 1 + max(int(name.split(".")[3]) for name in found
                     if name.startswith("encoder.encoder.layers.") and name.split(".")[3].isdigit())
    width, _, patch, _ = _shape(found, _PATCHES, 4, where)
    grid = round(_shape(found, _POSITIONS, 2, where)[0] ** 0.5)
    codebook_size, code_width = _shape(found, f"{regularizer}.embedding.weight", 2, where)
    # 384 = 27 * 14 + 6: the side is not known from the weights where patches do not fill it
    side = 384 if 384 // patch == grid else grid * patch
    encoder = SiglipSettings(patch_pixels=patch, width=width, num_layers=layers - 1,
                             feed_forward_width=_shape(found, needed[2], 2, where)[0],
                             num_heads=_SO400M_HEADS if width % _SO400M_HEADS == 0 else 1)
    settings = TATokSettings(side_pixels=side, encoder=encoder, code_width=code_width,
                             codebook_size=codebook_size)
    names = {"encode_task_layer.": "task.", "bottleneck.in_linear.": "to_code.",
             f"{regularizer}.embedding_proj.": "quantiser.book.code_transform.0.",
             f"{regularizer}.embedding.weight": "quantiser.book.frozen_codebook",
             "encoder.": "encoder.network."}
    state = {}
    for name, tensor in found.items():
        old = next((begin for begin in names if name.startswith(begin)), None)
        if old is not None and (old != "encoder." or used(name.removeprefix(old), layers - 1)):
            state[names[old] + name.removeprefix(old)] = tensor
    return settings, state


def _shape(found: Mapping[str, Any], name: str, num_axes: int, where: str) -> tuple[int, ...]:
    """Return a tensor's shape; `UserError` where it has another number of axes."""
    shape = tuple(found[name].shape)
    if len(shape) != num_axes:
        raise UserError(f"{where}: {name} has the shape {list(shape)}, not {num_axes} axes; it is no TA-Tok")
    return shape
