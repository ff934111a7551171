"""SigLIP's vision transformer (https://arxiv.org/abs/2303.15343) up to its last layer but one, whose states
tell what is in a picture; the network is transformers' own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Le
from safetensors import SafetensorError, safe_open
from torch import nn

from megatron_sov.base.errors import UserError, first_line
from megatron_sov.base.settings import multiple_of, read

_PREFIX = "vision_model."
_FIELDS = {"patch_size": "patch_pixels", "hidden_size": "width", "intermediate_size": "feed_forward_width",
           "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"}
_MAX_CONFIG_BYTES = 1_000_000


@dataclass(frozen=True)
class SiglipSettings:
    """Sizes of the transformer: those of so400m, patches of 14."""

    patch_pixels: Annotated[int, Ge(1), Le(4096)] = 14
    """Of a patch; what is over behind whole patches is not seen."""
    width: Annotated[int, Ge(1), Le(16384), multiple_of("num_heads")] = 1152
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


def siglip_settings(folder: Path) -> tuple[SiglipSettings, int]:
    """Return sizes, and height and width of pictures, of a SigLIP of Hugging Face's form.

    Raises:
        UserError: its config.json is damaged, or is of another network.
    """
    file = folder / "config.json"
    try:
        if file.stat().st_size > _MAX_CONFIG_BYTES:
            raise ValueError(f"it has more than {_MAX_CONFIG_BYTES:,} bytes")
        raw = json.loads(file.read_text(encoding="utf-8"))
        vision = raw.get("vision_config", raw)
        if raw.get("model_type") not in ("siglip", "siglip_vision_model"):
            raise ValueError(f"model_type is {raw.get('model_type')!r}, not 'siglip'")
        sizes = {ours: vision[theirs] for theirs, ours in _FIELDS.items() if theirs in vision}
        side_pixels = vision.get("image_size", 224)
        if not isinstance(side_pixels, int) or not 1 <= side_pixels <= 4096:
            raise ValueError(f"image_size is {side_pixels!r}")
        sizes["num_layers"] -= 1
    except (OSError, ValueError, RecursionError, AttributeError, TypeError, KeyError) as e:
        raise UserError(f"{file}: is not the configuration of a SigLIP ({type(e).__name__}: {e}); pass a "
                        "folder such as siglip2-so400m-patch14-384") from None
    return read(SiglipSettings, sizes, str(file)), side_pixels


def load_siglip(features: SiglipFeatures, folder: Path) -> None:
    """Give the transformer the weights of a folder, from its safetensors files.

    Raises:
        UserError: they are missing, damaged, or of another shape.
    """
    found: dict[str, Any] = {}
    try:
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    own = name.removeprefix(_PREFIX)
                    if name.startswith(_PREFIX) and used(own, features.settings.num_layers):
                        found[own] = opened.get_tensor(name).float()
        features.network.load_state_dict(found)
    except (OSError, SafetensorError, RuntimeError) as e:
        raise UserError(f"{folder}: its safetensors files are not those of the SigLIP in its config.json "
                        f"({first_line(e)[:200]}); download it again") from None
