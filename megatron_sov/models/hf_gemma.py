"""Config items of Gemma (see `hf_config.py`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron_sov.config import ModelConfig
from megatron_sov.errors import UserError
from megatron_sov.models.hf_layers import SlidingLayers

KINDS = ("full_attention", "sliding_attention")
THETAS = {"full_attention": 1e6, "sliding_attention": 1e4}
"""Kind of layers -> what transformers assumes where no theta is given."""


@dataclass(frozen=True)
class EmbeddingsByWidth:
    """Embeddings times the root of the width, for which there is no field."""

    names: tuple[str, ...] = ()

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return nothing; `UserError` for another factor."""
        root = math.sqrt(model.hidden_size)
        if not math.isclose(model.embedding_multiplier, root, rel_tol=1e-9):
            raise UserError(f"model.embedding_multiplier = {model.embedding_multiplier}: in family "
                            f"'{model.family}' it is the root of model.hidden_size = {model.hidden_size}; "
                            f"set it to {root}")
        return {}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the root of the width."""
        return {"embedding_multiplier": math.sqrt(config["hidden_size"])}


@dataclass(frozen=True)
class TwoThetas:
    """Rotary frequencies of global and of sliding layers: `rope_parameters` by kind of layer, or the older
    `rope_theta` and `rope_local_base_freq`."""

    names: tuple[str, ...] = ("rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq")

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return both; `UserError` for scaled rotations."""
        if model.yarn is not None or model.llama3_rope is not None:
            raise UserError(f"model.yarn and model.llama3_rope: family '{model.family}' knows plain "
                            "rotations only; set both to null")
        local = model.rope_theta if model.local_rope_theta is None else model.local_rope_theta
        return {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": theta}
                                    for kind, theta in zip(KINDS, (model.rope_theta, local), strict=True)}}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return both thetas; `UserError` for scaled rotations."""
        if config.get("rope_scaling"):
            raise UserError(f"config.json: rope_scaling = {config['rope_scaling']}, but only plain rotations "
                            "are supported for this family")
        said = config.get("rope_parameters", {})
        old = {"full_attention": config.get("rope_theta"),
               "sliding_attention": config.get("rope_local_base_freq")}
        thetas = {}
        for kind in KINDS:
            rope = dict(said.get(kind) or {})
            theta = rope.pop("rope_theta", None)
            if rope.pop("rope_type", "default") != "default" or rope:
                raise UserError(f"config.json: rope_parameters of {kind} = {said[kind]}, but only rope_type "
                                "'default' with its rope_theta is supported for this family")
            if None not in (theta, old[kind]) and theta != old[kind]:
                raise UserError(f"config.json: {kind} rotates by {theta} in rope_parameters and by "
                                f"{old[kind]} beside it; remove one of them")
            found = [value for value in (theta, old[kind], THETAS[kind]) if value is not None]
            thetas[kind] = float(found[0])
        return {"rope_theta": thetas["full_attention"], "local_rope_theta": thetas["sliding_attention"],
                "yarn": None, "llama3_rope": None}


@dataclass(frozen=True)
class PeriodicLayers:
    """Which layers slide: the explicit list, or every how many-th layer is global (6 where nothing is
    said)."""

    names: tuple[str, ...] = ("layer_types", "sliding_window", "sliding_window_pattern")

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return the explicit list and the window."""
        return {"layer_types": model.layer_types(), "sliding_window": model.sliding_window_tokens or None}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the shortest pattern that gives the list, and the window."""
        return SlidingLayers(default_window=4096).read({"sliding_window_pattern": 6, **config})
