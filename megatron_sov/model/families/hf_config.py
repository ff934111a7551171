"""Config items: fields of a Hugging Face config.json and their `ModelConfig` fields.

An item declares the names of its config.json fields, and reads and writes them. A config.json field without
an item is rejected: transformers would ignore it silently and another model would be trained. `hf_layers.py`
has items for layers of different kinds.
"""

import dataclasses
import math
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from megatron_sov.base.errors import UserError
from megatron_sov.model.config import ModelConfig, YarnConfig
from megatron_sov.model.config.model import Llama3RopeConfig
from megatron_sov.model.families.hf_layers import SlidingLayers

SMALLEST_SCALE = 1e-9
"""Smallest attention scale that Gemma's integer field can express."""
REQUIRED = object()
"""Default for fields that a config.json must have."""
ATTENTION_KINDS = ("full_attention", "sliding_attention")
DEFAULT_THETAS = {"full_attention": 1e6, "sliding_attention": 1e4}
"""Kind of layer -> transformers' default for `rope_theta`."""


class ConfigItem(Protocol):
    """A config map entry."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the item's config.json fields."""
    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return the config.json fields for a model."""
    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the `ModelConfig` fields from a config.json; `UserError` for values that are not
        supported."""


@dataclass(frozen=True)
class Renamed:
    """A field with the same meaning in config.json and `ModelConfig`."""

    hf: str
    model: str
    default: Any = REQUIRED
    """Transformers' default: a value, or a function of the config."""
    aliases: tuple[str, ...] = ()
    """Other names of the field in config.json."""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.hf, *self.aliases)

    @property
    def null_tells(self) -> tuple[str, ...]:
        """The field, if it is true by default: transformers reads null as false."""
        return (self.hf,) if self.default is True else ()

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {self.hf: getattr(model, self.model)}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the `ModelConfig` field; `UserError` if a required field is absent or two names disagree."""
        # Older and newer names may both be present, with equal values.
        values = {name: config[name] for name in self.names if name in config}
        if len(set(values.values())) > 1:
            pairs = " and ".join(f"{name} = {value}" for name, value in values.items())
            raise UserError(f"config.json: {pairs} disagree; remove one of them")
        if values:
            return {self.model: next(iter(values.values()))}
        if self.default is REQUIRED:
            raise UserError(f"config.json: lacks '{self.hf}'; add it (it becomes model.{self.model})")
        return {self.model: self.default(config) if callable(self.default) else self.default}


@dataclass(frozen=True)
class Fixed:
    """A field with a single supported value, which is also the default."""

    hf: str
    value: Any
    written: bool = True
    """Whether exports write the field; False for fields of older configs."""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.hf,)

    @property
    def null_tells(self) -> tuple[str, ...]:
        """The field, if only true is supported: transformers reads null as false."""
        return (self.hf,) if self.value is True else ()

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {self.hf: self.value} if self.written else {}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return no fields; `UserError` for any other value."""
        value = config.get(self.hf, self.value)
        if value != self.value:
            raise UserError(f"config.json: {self.hf} = {value!r}, but only {self.value!r} is supported "
                            "for this family")
        return {}


@dataclass(frozen=True)
class Unused:
    """Fields without effect on weights and computation."""

    names: tuple[str, ...]

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Encoders:
    """Image and audio encoders and discrete media tokens, under our names: transformers' text classes have
    none."""

    names: tuple[str, ...] = ("vision_config", "audio_config", "audio_tokens", "image_tokens")

    def write(self, model: ModelConfig) -> dict[str, Any]:
        configs = {"vision_config": model.vision, "audio_config": model.audio,
                 "audio_tokens": model.audio_tokens, "image_tokens": model.image_tokens}
        return {name: asdict(config) for name, config in configs.items() if config is not None}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the encoder fields of `ModelConfig`; None for absent encoders."""
        return {name.removesuffix("_config"): config.get(name) for name in self.names}


@dataclass(frozen=True)
class Rope:
    """RoPE: `rope_parameters` in transformers 5, `rope_theta` and `rope_scaling` in older configs."""

    default_theta: float
    """Transformers' default for `rope_theta`."""

    @property
    def names(self) -> tuple[str, ...]:
        return ("rope_parameters", "rope_scaling", "rope_theta")

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return `rope_parameters` without relying on defaults."""
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
        if model.yarn:
            rope |= {"rope_type": "yarn", "factor": model.yarn.factor,
                     "original_max_position_embeddings": model.yarn.original_max_position_tokens,
                     "beta_fast": model.yarn.beta_fast, "beta_slow": model.yarn.beta_slow}
        if model.llama3_rope:
            scaling = dataclasses.asdict(model.llama3_rope)
            scaling["original_max_position_embeddings"] = scaling.pop("original_max_position_tokens")
            rope |= {"rope_type": "llama3", **scaling}
        if model.linear_rope_factor is not None:
            rope |= {"rope_type": "linear", "factor": model.linear_rope_factor}
        return {"rope_parameters": rope}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return theta and scaling; `UserError` for unsupported scaling and parameters without effect."""
        # transformers 5 writes `rope_parameters`; older files have `rope_scaling` next to `rope_theta`.
        spellings = [config[name] for name in ("rope_parameters", "rope_scaling") if config.get(name)]
        if len(spellings) == 2 and spellings[0] != spellings[1]:
            raise UserError(f"config.json: rope_parameters = {spellings[0]} and rope_scaling = "
                            f"{spellings[1]} disagree; remove one of them")
        # Remove every known parameter from a copy; the rest is rejected below.
        rope = dict(spellings[0]) if spellings else {}
        thetas = [source["rope_theta"] for source in (rope, config) if "rope_theta" in source]
        if thetas[1:] and thetas[0] != thetas[1]:
            raise UserError(f"config.json: rope_theta = {thetas[1]}, and {thetas[0]} in rope_parameters; "
                            "make them agree")
        rope.pop("rope_theta", None)
        theta = float(thetas[0] if thetas else self.default_theta)
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        if kind not in ("default", "yarn", "llama3", "linear"):
            raise UserError(f"config.json: rope_type = {kind!r}, but only 'default', 'yarn', 'llama3' and "
                            "'linear' are supported")
        if kind == "linear" and rope.get("factor") is None:
            raise UserError("config.json: rope_type 'linear' lacks 'factor'; add it to rope_parameters")
        linear = float(rope.pop("factor")) if kind == "linear" else None
        yarn = self._read_yarn(rope, config) if kind == "yarn" else None
        llama3 = self._read_llama3(rope) if kind == "llama3" else None
        if (share := rope.pop("partial_rotary_factor", 1.0)) != 1.0:
            raise UserError(f"config.json: partial_rotary_factor = {share}, but only 1.0 is supported: "
                            "heads rotate as a whole")
        if rope:
            raise UserError(f"config.json: rope parameters {', '.join(sorted(rope))} are unknown for "
                            f"rope_type {kind!r}; remove them if they have no effect")
        return {"rope_theta": theta, "yarn": yarn, "llama3_rope": llama3, "linear_rope_factor": linear}

    @staticmethod
    def _read_llama3(rope: dict[str, Any]) -> Llama3RopeConfig:
        """Remove Llama 3.1's parameters from `rope`; transformers requires all of them."""
        try:
            return Llama3RopeConfig(float(rope.pop("factor")), float(rope.pop("low_freq_factor")),
                                    float(rope.pop("high_freq_factor")),
                                    int(rope.pop("original_max_position_embeddings")))
        except KeyError as e:
            raise UserError(f"config.json: rope_type 'llama3' lacks {e}; add it to "
                            "rope_parameters") from None

    @staticmethod
    def _read_yarn(rope: dict[str, Any], config: dict[str, Any]) -> YarnConfig:
        """Remove YaRN's parameters from `rope`; the caller rejects the rest."""
        try:
            original = int(rope.pop("original_max_position_embeddings"))
            if original < 1:
                raise UserError(f"config.json: original_max_position_embeddings = {original} "
                                "must be at least 1")
            factor = _take_number(rope, "factor", config["max_position_embeddings"] / original)
        except KeyError as e:
            raise UserError(f"config.json: rope_type 'yarn' lacks {e}; add it to rope_parameters") from None
        # Default in transformers and in the trainer: arXiv 2309.00071, section 3.4.
        expected = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
        attention_factor = rope.pop("attention_factor", None)
        if attention_factor is not None and not math.isclose(attention_factor, expected, rel_tol=1e-6):
            raise UserError(f"config.json: attention_factor = {attention_factor}, but only 0.1 ln(factor) + "
                            f"1 = {expected:.6f} is supported")
        if rope.pop("truncate", True) is not True:
            raise UserError("config.json: truncate of rope_type 'yarn' must be true or absent: the trainer "
                            "rounds the ends of the ramp to whole channels")
        return YarnConfig(factor, original, _take_number(rope, "beta_fast", 32.0),
                          _take_number(rope, "beta_slow", 1.0))


@dataclass(frozen=True)
class AttentionScale:
    """Factor on query-key products, as a field that is always written."""

    hf: str
    scalar: int = 0
    """Gemma: default for the field, whose inverse square root is the factor. 0: the field is the factor."""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.hf,)

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return the factor; `UserError` if Gemma's field cannot express it."""
        factor = model.attention_multiplier
        if factor is None:
            factor = model.head_dim ** -0.5
        if not self.scalar:
            return {self.hf: factor}
        # Gemma stores the integer n of the factor 1 / sqrt(n).
        scalar = round(factor ** -2) if factor > SMALLEST_SCALE else 0
        if scalar < 1 or not math.isclose(scalar ** -0.5, factor, rel_tol=1e-9):
            raise UserError(f"model.attention_multiplier = {factor}: must be 1 / sqrt(n) with an integer n "
                            f"in family '{model.family}'")
        return {self.hf: scalar}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the factor; None for 1 / sqrt(head_dim)."""
        usual = (config.get("head_dim") or hidden_over_heads(config)) ** -0.5
        if self.scalar:
            factor = int(config.get(self.hf, self.scalar)) ** -0.5
        else:
            factor = float(config.get(self.hf, usual))
        return {"attention_multiplier": None if factor == usual else factor}


def _take_number(rope: dict[str, Any], name: str, default: float) -> float:
    """Remove a parameter from `rope` and return it; `default` if absent or null."""
    value = rope.pop(name, None)
    return default if value is None else float(value)


def hidden_over_heads(config: dict[str, Any]) -> int:
    """Return transformers' head size for a config.json without `head_dim`."""
    return int(config["hidden_size"] // config["num_attention_heads"])


@dataclass(frozen=True)
class ScaledEmbeddings:
    """Embeddings multiplied by sqrt(hidden_size), which config.json does not mention."""

    names: tuple[str, ...] = ()

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return no fields; `UserError` for any other factor."""
        root = math.sqrt(model.hidden_size)
        if not math.isclose(model.embedding_multiplier, root, rel_tol=1e-9):
            raise UserError(f"model.embedding_multiplier = {model.embedding_multiplier}: in family "
                            f"'{model.family}' it is the root of model.hidden_size = {model.hidden_size}; "
                            f"set it to {root}")
        return {}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        return {"embedding_multiplier": math.sqrt(config["hidden_size"])}


@dataclass(frozen=True)
class LogitsSoftCap:
    """Soft cap on logits; off if null or absent."""

    names: tuple[str, ...] = ("final_logit_softcapping",)

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {self.names[0]: model.logits_softcap}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the cap; `UserError` for 0, by which transformers would divide."""
        cap = config.get(self.names[0])
        if cap is not None and not float(cap) > 0:
            raise UserError(f"config.json: {self.names[0]} = {cap!r} must be a number greater than 0, or "
                            "null for no cap")
        return {"logits_softcap": None if cap is None else float(cap)}


@dataclass(frozen=True)
class TwoThetas:
    """RoPE in global and in sliding layers: `rope_parameters` per kind of layer, or the older `rope_theta`,
    `rope_local_base_freq` and `rope_scaling` (for global layers)."""

    names: tuple[str, ...] = ("rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq")

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return both thetas; `UserError` for unsupported scaling."""
        if model.yarn is not None or model.llama3_rope is not None:
            raise UserError(f"model.yarn and model.llama3_rope: family '{model.family}' supports RoPE "
                            "without scaling or with linear scaling; set both to null")
        if model.local_rope_theta is None and model.linear_rope_factor is not None:
            raise UserError(f"model.linear_rope_factor = {model.linear_rope_factor}: family '{model.family}' "
                            "scales only global layers; set model.local_rope_theta (if sliding layers have "
                            f"the same base, to model.rope_theta = {model.rope_theta})")
        local = model.rope_theta if model.local_rope_theta is None else model.local_rope_theta
        scaled: dict[str, Any] = {"rope_type": "default"}
        if model.linear_rope_factor is not None:
            scaled = {"rope_type": "linear", "factor": model.linear_rope_factor}
        return {"rope_parameters": {"full_attention": {**scaled, "rope_theta": model.rope_theta},
                                    "sliding_attention": {"rope_type": "default", "rope_theta": local}}}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return both thetas and the linear factor; `UserError` for unsupported scaling and for
        contradictions."""
        by_kind = config.get("rope_parameters", {})
        if unknown := [name for name in by_kind if name not in ATTENTION_KINDS]:
            raise UserError(f"config.json: rope_parameters has {', '.join(map(str, unknown))}, and in this "
                            f"family only {' and '.join(ATTENTION_KINDS)}; move the parameters there")
        old = {"full_attention": config.get("rope_theta"),
               "sliding_attention": config.get("rope_local_base_freq")}
        thetas, factors = {}, {}
        for kind in ATTENTION_KINDS:
            rope = dict(by_kind.get(kind) or {})
            theta = rope.pop("rope_theta", None)
            factors[kind] = _take_linear_factor(rope, f"rope_parameters of {kind}")
            if None not in (theta, old[kind]) and theta != old[kind]:
                raise UserError(f"config.json: rope_theta of {kind} is {theta} in rope_parameters and "
                                f"{old[kind]} outside of it; remove one of them")
            # The newer name, then the older name, then transformers' default.
            candidates = [value for value in (theta, old[kind], DEFAULT_THETAS[kind]) if value is not None]
            thetas[kind] = float(candidates[0])
        if factors["sliding_attention"] is not None:
            raise UserError(f"config.json: rope_parameters of sliding_attention = "
                            f"{by_kind['sliding_attention']}, but only global layers may be scaled")
        factor = factors["full_attention"]
        if config.get("rope_scaling"):
            old_factor = _take_linear_factor(dict(config["rope_scaling"]), "rope_scaling")
            if by_kind.get("full_attention") and old_factor != factor:
                raise UserError(f"config.json: rope_scaling = {config['rope_scaling']}, and rope_parameters "
                                f"of full_attention = {by_kind['full_attention']}; remove one of them")
            factor = old_factor
        return {"rope_theta": thetas["full_attention"], "local_rope_theta": thetas["sliding_attention"],
                "yarn": None, "llama3_rope": None, "linear_rope_factor": factor}


def _take_linear_factor(rope: dict[str, Any], where: str) -> float | None:
    """Return the factor of linear scaling, None for plain RoPE; `UserError` for other scaling."""
    parameters = dict(rope)
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    factor = rope.pop("factor", None) if kind == "linear" else None
    if kind not in ("default", "linear") or rope or (kind == "linear") == (factor is None):
        raise UserError(f"config.json: {where} = {parameters}, but only rope_type 'default', and 'linear' "
                        "with a factor, are supported for this family")
    return None if factor is None else float(factor)


@dataclass(frozen=True)
class GemmaLayers:
    """Sliding layers: an explicit list, or all layers except every sixth."""

    names: tuple[str, ...] = ("layer_types", "sliding_window", "sliding_window_pattern")

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {"layer_types": model.layer_types(), "sliding_window": model.sliding_window_tokens or None}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the shortest pattern and the window."""
        return SlidingLayers(default_window=4096).read({"sliding_window_pattern": 6, **config})
