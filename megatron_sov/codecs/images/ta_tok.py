"""TA-Tok (https://arxiv.org/abs/2506.18898, csuhan/Tar on GitHub) as published: SigLIP 2's last layer but
one, a layer, and unit SimVQ over 65,536 codes; what turns a picture into ids, and no more.

The authors' serving code draws ids at a temperature; here the likeliest is taken, as a picture has one text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_sov.codecs.images.quantiser import UnitSimVQ
from megatron_sov.codecs.sizes import outside
from megatron_sov.errors import UserError

_SO400M_HEADS = 16
"""Of attention in SigLIP so400m; no tensor tells it."""
_POSITIONS = "encoder.embeddings.position_embedding.weight"
_PATCHES = "encoder.embeddings.patch_embedding.weight"


@dataclass(frozen=True)
class TATokSettings:
    """Sizes: TA-Tok's own."""

    side_pixels: int = 384
    """Height and width of a picture; what is over behind whole patches is not seen."""
    patch_pixels: int = 14
    """Of a patch: 384 pixels have 27."""
    width: int = 1152
    """Of the vision transformer."""
    feed_forward_width: int = 4304
    """Of its layers."""
    num_layers: int = 26
    """Of it that are used: all but the last."""
    num_heads: int = _SO400M_HEADS
    """Of its attention; divides `width`."""
    code_width: int = 1536
    """Of the codebook's vectors."""
    codebook_size: int = 65_536
    """Tokens there are."""

    def problems(self) -> list[str]:
        """Return one sentence for each setting that is not well."""
        found = outside(self, side_pixels=(1, 4096), patch_pixels=(1, 4096), width=(1, 16_384),
                        feed_forward_width=(1, 65_536), num_layers=(1, 200), num_heads=(1, 256),
                        code_width=(1, 16_384), codebook_size=(2, 1 << 20))
        if not found and self.patch_pixels > self.side_pixels:
            found.append(f"patch_pixels = {self.patch_pixels} must be at most side_pixels = "
                         f"{self.side_pixels}")
        if not found and self.width % self.num_heads:
            found.append(f"width = {self.width} must be a multiple of num_heads = {self.num_heads}")
        return found


class TATok(nn.Module):
    """Pictures as ids; an `interface.ImageTokenizer`."""

    Settings = TATokSettings

    def __init__(self, settings: TATokSettings) -> None:
        super().__init__()
        from transformers import SiglipVisionConfig, SiglipVisionModel

        self.settings = settings
        self.side_pixels, self.grid = settings.side_pixels, settings.side_pixels // settings.patch_pixels
        self.codebook_size, self.width = settings.codebook_size, settings.code_width
        self.encoder = SiglipVisionModel(SiglipVisionConfig(
            hidden_size=settings.width, intermediate_size=settings.feed_forward_width,
            num_hidden_layers=settings.num_layers, num_attention_heads=settings.num_heads,
            image_size=settings.side_pixels, patch_size=settings.patch_pixels, vision_use_head=False))
        self.encoder.post_layernorm = nn.Identity()  # behind the layer that is used
        self.task = nn.Sequential(nn.Linear(settings.width, settings.width), nn.Tanh())
        self.to_code = nn.Linear(settings.width, settings.code_width)
        self.quantiser = UnitSimVQ(settings.code_width, settings.codebook_size, bias=True)

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return [n, grid * grid] int64 ids of [n, 3, side, side] float32 pictures in 0..1."""
        with torch.no_grad():
            seen = self.encoder.encoder(inputs_embeds=self.encoder.embeddings(pictures * 2 - 1))
            return self.quantiser.nearest(self.to_code(self.task(seen.last_hidden_state)))

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
    settings = TATokSettings(side_pixels=side, patch_pixels=patch, width=width, num_layers=layers - 1,
                             feed_forward_width=_shape(found, needed[2], 2, where)[0],
                             num_heads=_SO400M_HEADS if width % _SO400M_HEADS == 0 else 1,
                             code_width=code_width, codebook_size=codebook_size)
    names = {"encode_task_layer.": "task.", "bottleneck.in_linear.": "to_code.",
             f"{regularizer}.embedding_proj.": "quantiser.book.code_transform.0.",
             f"{regularizer}.embedding.weight": "quantiser.book.frozen_codebook", "encoder.": "encoder."}
    unused = ("encoder.post_layernorm.", "encoder.head.", f"encoder.encoder.layers.{layers - 1}.")
    state = {}
    for name, tensor in found.items():
        old = next((begin for begin in names if name.startswith(begin)), None)
        if old is not None and not name.startswith(unused) and not name.endswith("position_ids"):
            state[names[old] + name.removeprefix(old)] = tensor
    return settings, state


def _shape(found: Mapping[str, Any], name: str, num_axes: int, where: str) -> tuple[int, ...]:
    """Return a tensor's shape; `UserError` where it has another number of axes."""
    shape = tuple(found[name].shape)
    if len(shape) != num_axes:
        raise UserError(f"{where}: {name} has the shape {list(shape)}, not {num_axes} axes; it is no TA-Tok")
    return shape
