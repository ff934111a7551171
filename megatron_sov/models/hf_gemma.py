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
class SoftCap:
    """A soft cap; null is none."""

    hf: str
    model: str
    default: float | None
    """What transformers assumes where the field is absent."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return the one field."""
        return (self.hf,)

    @property
    def null_tells(self) -> tuple[str, ...]:
        """Return the one field, whose null is not its absence."""
        return (self.hf,)

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return the cap."""
        return {self.hf: getattr(model, self.model)}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the cap; `UserError` where it is 0, which transformers would divide by."""
        found = config.get(self.hf, self.default)
        if found is not None and not float(found) > 0:
            raise UserError(f"config.json: {self.hf} = {found!r} must be a number greater than 0, or null "
                            "for no cap")
        return {self.model: None if found is None else float(found)}


@dataclass(frozen=True)
class TwoThetas:
    """Rotary frequencies of global and of sliding layers: `rope_parameters` by kind of layer, or the older
    `rope_theta`, `rope_local_base_freq` and `rope_scaling`, which is of global layers alone."""

    names: tuple[str, ...] = ("rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq")

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return both; `UserError` for scaled rotations that it does not know."""
        if model.yarn is not None or model.llama3_rope is not None:
            raise UserError(f"model.yarn and model.llama3_rope: family '{model.family}' knows plain and "
                            "linearly scaled rotations only; set both to null")
        if model.local_rope_theta is None and model.linear_rope_factor is not None:
            raise UserError(f"model.linear_rope_factor = {model.linear_rope_factor}: family '{model.family}' "
                            "scales global layers alone; set model.local_rope_theta, to model.rope_theta = "
                            f"{model.rope_theta} where sliding layers have the same")
        local = model.rope_theta if model.local_rope_theta is None else model.local_rope_theta
        scaled = {"rope_type": "default"} if model.linear_rope_factor is None else {
            "rope_type": "linear", "factor": model.linear_rope_factor}
        return {"rope_parameters": {"full_attention": {**scaled, "rope_theta": model.rope_theta},
                                    "sliding_attention": {"rope_type": "default", "rope_theta": local}}}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return both thetas and the factor; `UserError` for other scaled rotations, and where two spellings
        disagree."""
        said = config.get("rope_parameters", {})
        if strange := [name for name in said if name not in KINDS]:
            raise UserError(f"config.json: rope_parameters has {', '.join(map(str, strange))}, and this "
                            f"family has them for {' and '.join(KINDS)}, each by itself; put them there")
        old = {"full_attention": config.get("rope_theta"),
               "sliding_attention": config.get("rope_local_base_freq")}
        thetas, factors = {}, {}
        for kind in KINDS:
            rope = dict(said.get(kind) or {})
            theta = rope.pop("rope_theta", None)
            factors[kind] = _linear_factor(rope, f"rope_parameters of {kind}")
            if None not in (theta, old[kind]) and theta != old[kind]:
                raise UserError(f"config.json: {kind} rotates by {theta} in rope_parameters and by "
                                f"{old[kind]} beside it; remove one of them")
            found = [value for value in (theta, old[kind], THETAS[kind]) if value is not None]
            thetas[kind] = float(found[0])
        if factors["sliding_attention"] is not None:
            raise UserError(f"config.json: rope_parameters of sliding_attention = "
                            f"{said['sliding_attention']}, but only global layers may be scaled")
        factor = factors["full_attention"]
        if config.get("rope_scaling"):
            beside = _linear_factor(dict(config["rope_scaling"]), "rope_scaling")
            if said.get("full_attention") and beside != factor:
                raise UserError(f"config.json: rope_scaling = {config['rope_scaling']}, and rope_parameters "
                                f"of full_attention = {said['full_attention']}; remove one of them")
            factor = beside
        return {"rope_theta": thetas["full_attention"], "local_rope_theta": thetas["sliding_attention"],
                "yarn": None, "llama3_rope": None, "linear_rope_factor": factor}


def _linear_factor(rope: dict[str, Any], where: str) -> float | None:
    """Return the factor of linearly scaled rotations, None for plain ones; `UserError` for all else."""
    told = dict(rope)
    old_kind = rope.pop("type", "default")
    kind = rope.pop("rope_type", old_kind)
    factor = rope.pop("factor", None) if kind == "linear" else None
    if kind not in ("default", "linear") or rope or (kind == "linear") == (factor is None):
        raise UserError(f"config.json: {where} = {told}, but only rope_type 'default', and 'linear' with its "
                        "factor, are supported for this family")
    return None if factor is None else float(factor)


@dataclass(frozen=True)
class PeriodicLayers:
    """Which layers slide: the explicit list, or every how many-th layer is global."""

    period: int
    """What transformers assumes where nothing is said."""
    names: tuple[str, ...] = ("layer_types", "sliding_window", "sliding_window_pattern")

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return the explicit list and the window."""
        return {"layer_types": model.layer_types(), "sliding_window": model.sliding_window_tokens or None}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the shortest pattern that gives the list, and the window; `UserError` where two names of it
        disagree."""
        window = config.get("sliding_window", 4096)
        if config.get("sliding_window_size", window) != window:
            raise UserError(f"config.json: sliding_window = {window} and sliding_window_size = "
                            f"{config['sliding_window_size']} disagree; remove one of them")
        return SlidingLayers(default_window=4096).read({"sliding_window_pattern": self.period, **config})
