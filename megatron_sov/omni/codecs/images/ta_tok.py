"""TA-Tok (https://arxiv.org/abs/2506.18898, csuhan/Tar on GitHub) as published: SigLIP 2's last layer but
one, a layer, and unit SimVQ over 65,536 codes; what turns a picture into ids, and no more.

The authors' serving code draws ids at a temperature; here the likeliest is taken, as a picture has one text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from annotated_types import Ge, Le
from torch import nn

from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import SettingsProblem, find_broken
from megatron_sov.omni.codecs.images.siglip import SiglipFeatures, SiglipSettings, used
from megatron_sov.omni.codecs.images.simvq import UnitSimVQ

_SO400M_HEADS = 16
"""Of attention in SigLIP so400m; no tensor tells it."""
_POSITIONS = "encoder.embeddings.position_embedding.weight"
_PATCHES = "encoder.embeddings.patch_embedding.weight"


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
        """Return what does not fit together."""
        return find_broken(self, "", (
            self.encoder.patch_pixels <= self.side_pixels, "encoder.patch_pixels",
            f"must be at most side_pixels = {self.side_pixels}"))


class TATok(nn.Module):
    """Pictures as ids; an `interface.ImageTokenizer`."""

    Settings = TATokSettings

    def __init__(self, settings: TATokSettings) -> None:
        super().__init__()
        self.settings = settings
        self.side_pixels = settings.side_pixels
        self.grid = settings.side_pixels // settings.encoder.patch_pixels
        self.codebook_size, self.width = settings.codebook_size, settings.code_width
        width = settings.encoder.width
        self.encoder = SiglipFeatures(settings.encoder, settings.side_pixels)
        self.task = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.to_code = nn.Linear(width, settings.code_width)
        self.quantiser = UnitSimVQ(settings.code_width, settings.codebook_size, bias=True)

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return [n, grid * grid] int64 ids of [n, 3, side, side] float32 pictures in 0..1."""
        with torch.no_grad():
            return self.quantiser.nearest(self.to_code(self.task(self.encoder(pictures))))

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return [n, grid * grid, width] float32 embeddings of ids: unit vectors."""
        with torch.no_grad():
            return self.quantiser.embed(ids)


def converted(found: Mapping[str, torch.Tensor], where: str) -> tuple[TATokSettings, dict[str, torch.Tensor]]:
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
