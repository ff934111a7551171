"""Config items of gpt-oss (see `hf_config.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_sov.config import ModelConfig
from megatron_sov.errors import UserError
from megatron_sov.models.hf_config import Rope
from megatron_sov.models.hf_layers import SlidingLayers


@dataclass(frozen=True)
class SaidRope(Rope):
    """Rotary frequencies that must be said: where they are absent transformers takes gpt-oss's own YaRN,
    other programs plain rotations."""

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return theta and YaRN; `UserError` where nothing is said."""
        if not config.get("rope_parameters") and not config.get("rope_scaling"):
            raise UserError("config.json: lacks rope_parameters (rope_scaling in older files), and programs "
                            "assume different things then; add it, with rope_type 'default' for plain "
                            "rotations")
        return super().read(config)


@dataclass(frozen=True)
class AlternatingLayers:
    """Which layers slide: the explicit list, or the first of each two."""

    names: tuple[str, ...] = ("layer_types", "sliding_window")

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return the explicit list and the window."""
        return {"layer_types": model.layer_types(), "sliding_window": model.sliding_window_tokens or None}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the shortest pattern that gives the list, and the window."""
        return SlidingLayers(default_window=128).read({"sliding_window_pattern": 2, **config})


@dataclass(frozen=True)
class Quantization:
    """How a folder's weights are packed; they are written as they are, so that nothing is said then."""

    method: str
    """The one method that is read."""
    names: tuple[str, ...] = ("quantization_config",)

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return nothing; `UserError` where weights are packed in another way."""
        said = config.get("quantization_config", {"quant_method": self.method})
        found = said.get("quant_method") if isinstance(said, dict) else said
        if found != self.method:
            raise UserError(f"config.json: quantization_config has quant_method = {found!r}, but only "
                            f"{self.method!r} is read for this family; take the weights in bfloat16")
        return {}
