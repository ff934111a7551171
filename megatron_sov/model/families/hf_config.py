"""The vocabulary of a config map: fields of a Hugging Face config.json <-> fields of `ModelConfig`.

Each item knows the config.json names that it answers for, writes them and reads them; a field of a foreign
config.json that no item answers for is refused, since transformers would silently ignore it and we would
train another model.  Items about layers of different kinds stand in `hf_layers.py`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from megatron_sov.base.errors import UserError
from megatron_sov.model.config import ModelConfig, YarnConfig
from megatron_sov.model.config.model import Llama3RopeConfig
from megatron_sov.model.families.hf_layers import SlidingLayers

SMALLEST_SCALE = 1e-9
"""Of the products of queries and keys, where it is an integer's root: that of a width that no head has."""
REQUIRED = object()
"""Default of a field without which a config.json is incomplete."""


class ConfigItem(Protocol):
    """One line of a config map."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return the config.json fields that this item answers for."""
    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return the config.json fields of a model."""
    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the `ModelConfig` fields that a config.json says; `UserError` where it says what
        we do not compute."""


@dataclass(frozen=True)
class Renamed:
    """A field that both sides have."""

    hf: str
    model: str
    default: Any = REQUIRED
    """What transformers assumes where the field is absent: a value, or a function of the config."""
    aliases: tuple[str, ...] = ()
    """Other names under which it is found."""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.hf, *self.aliases)

    @property
    def null_tells(self) -> tuple[str, ...]:
        """Return the field where its absence means true: transformers takes null for false."""
        return (self.hf,) if self.default is True else ()

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {self.hf: getattr(model, self.model)}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the model's field; `UserError` where a required one is absent, or its names disagree."""
        # Older and newer spellings may both be there; equal ones agree.
        found = {name: config[name] for name in self.names if name in config}
        if len(set(found.values())) > 1:
            raise UserError(f"config.json: {' and '.join(f'{n} = {v}' for n, v in found.items())} disagree; "
                            "remove one of them")
        if found:
            return {self.model: next(iter(found.values()))}
        if self.default is REQUIRED:
            raise UserError(f"config.json: lacks '{self.hf}'; add it (it becomes model.{self.model})")
        return {self.model: self.default(config) if callable(self.default) else self.default}


@dataclass(frozen=True)
class Fixed:
    """A field with one value that our model computes; another value is refused, absence means this value."""

    hf: str
    value: Any
    written: bool = True
    """Whether the field is written; False for fields that only older configs carry."""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.hf,)

    @property
    def null_tells(self) -> tuple[str, ...]:
        """Return the field where only true is supported: transformers takes null for false."""
        return (self.hf,) if self.value is True else ()

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {self.hf: self.value} if self.written else {}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return nothing; `UserError` where the value is another one."""
        # Absence means the value: such fields are often left out.
        found = config.get(self.hf, self.value)
        if found != self.value:
            raise UserError(f"config.json: {self.hf} = {found!r}, but only {self.value!r} is supported "
                            "for this family")
        return {}


@dataclass(frozen=True)
class Unused:
    """Fields that change no weight and no computation, whatever their value."""

    names: tuple[str, ...]

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return nothing, whatever they say."""
        return {}


@dataclass(frozen=True)
class Encoders:
    """Encoders of pictures and sounds, and the ids of discrete ones, in our own terms: transformers' class of
    a text model has none."""

    names: tuple[str, ...] = ("vision_config", "audio_config", "audio_tokens", "image_tokens")

    def write(self, model: ModelConfig) -> dict[str, Any]:
        found = {"vision_config": model.vision, "audio_config": model.audio,
                 "audio_tokens": model.audio_tokens, "image_tokens": model.image_tokens}
        return {name: asdict(config) for name, config in found.items() if config is not None}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return them as fields of a model; one that the file does not have is none."""
        return {name.removesuffix("_config"): config.get(name) for name in self.names}


@dataclass(frozen=True)
class Rope:
    """Rotary frequencies: `rope_parameters` of transformers 5,
    or the older `rope_theta` and `rope_scaling`."""

    default_theta: float
    """What transformers assumes where no theta is given."""

    @property
    def names(self) -> tuple[str, ...]:
        return ("rope_parameters", "rope_scaling", "rope_theta")

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return `rope_parameters`, with every number explicit."""
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
        """Return theta and scaling; `UserError` for other kinds of scaling and parameters without effect."""
        # transformers 5 writes `rope_parameters`; older files have `rope_scaling` and the theta next to it.
        spellings = [config[name] for name in ("rope_parameters", "rope_scaling") if config.get(name)]
        if len(spellings) == 2 and spellings[0] != spellings[1]:
            raise UserError(f"config.json: rope_parameters = {spellings[0]} and rope_scaling = "
                            f"{spellings[1]} disagree; remove one of them")
        # A copy: what is understood is taken out, and what is left at the end is refused.
        rope = dict(spellings[0]) if spellings else {}
        thetas = [found["rope_theta"] for found in (rope, config) if "rope_theta" in found]
        if thetas[1:] and thetas[0] != thetas[1]:
            raise UserError(f"config.json: rope_theta = {thetas[1]}, and {thetas[0]} in rope_parameters; "
                            "make them agree")
        rope.pop("rope_theta", None)
        theta = float(thetas[0] if thetas else self.default_theta)
        old_kind = rope.pop("type", "default")
        kind = rope.pop("rope_type", old_kind)
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
        """Take Llama 3.1's parameters out of `rope`, all of which transformers asks for."""
        try:
            return Llama3RopeConfig(float(rope.pop("factor")), float(rope.pop("low_freq_factor")),
                                    float(rope.pop("high_freq_factor")),
                                    int(rope.pop("original_max_position_embeddings")))
        except KeyError as e:
            raise UserError(f"config.json: rope_type 'llama3' lacks {e}; add it to "
                            "rope_parameters") from None

    @staticmethod
    def _read_yarn(rope: dict[str, Any], config: dict[str, Any]) -> YarnConfig:
        """Take YaRN's parameters out of `rope`; whatever is left there is not understood."""
        try:
            original = int(rope.pop("original_max_position_embeddings"))
            if original < 1:
                raise UserError(f"config.json: original_max_position_embeddings = {original} "
                                "must be at least 1")
            factor = _given(rope, "factor", config["max_position_embeddings"] / original)
        except KeyError as e:
            raise UserError(f"config.json: rope_type 'yarn' lacks {e}; add it to rope_parameters") from None
        # transformers' default, formula of arXiv 2309.00071 section 3.4; the trainer computes the same
        expected = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
        attention_factor = rope.pop("attention_factor", None)
        if attention_factor is not None and not math.isclose(attention_factor, expected, rel_tol=1e-6):
            raise UserError(f"config.json: attention_factor = {attention_factor}, but only 0.1 ln(factor) + "
                            f"1 = {expected:.6f} is supported")
        if rope.pop("truncate", True) is not True:
            raise UserError("config.json: truncate of rope_type 'yarn' must be true, or absent: the ends of "
                            "its ramp are rounded to whole channels")
        return YarnConfig(factor, original, _given(rope, "beta_fast", 32.0), _given(rope, "beta_slow", 1.0))


@dataclass(frozen=True)
class AttentionScale:
    """The factor on the products of queries and keys, as a number that is always there."""

    hf: str
    scalar: int = 0
    """What transformers assumes where the field, whose root the products are divided by, is absent (Gemma);
    0: the field is the factor."""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.hf,)

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return the factor; `UserError` where it is no integer's root."""
        factor = _usual_scale(model.head_dim) if model.attention_multiplier is None else (
            model.attention_multiplier)
        if not self.scalar:
            return {self.hf: factor}
        # Gemma states n of 1 / sqrt(n) as an integer; other factors cannot be written.
        scalar = round(factor ** -2) if factor > SMALLEST_SCALE else 0
        if scalar < 1 or not math.isclose(scalar ** -0.5, factor, rel_tol=1e-9):
            raise UserError(f"model.attention_multiplier = {factor}: family '{model.family}' knows 1 / "
                            "sqrt(n) of an integer n only")
        return {self.hf: scalar}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the factor, None for the usual one."""
        usual = _usual_scale(config.get("head_dim") or hidden_over_heads(config))
        found = (int(config.get(self.hf, self.scalar)) ** -0.5 if self.scalar
                 else float(config.get(self.hf, usual)))
        return {"attention_multiplier": None if found == usual else found}


def _usual_scale(head_dim: int) -> float:
    return float(head_dim ** -0.5)


def _given(rope: dict[str, Any], name: str, default: float) -> float:
    """Take a parameter out of `rope`; `default` where it is absent or null."""
    value = rope.pop(name, None)
    return default if value is None else float(value)


def hidden_over_heads(config: dict[str, Any]) -> int:
    """Return the width of a head where config.json has no `head_dim`, as transformers computes it."""
    return int(config["hidden_size"] // config["num_attention_heads"])


# Config items of Gemma.

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
        return {"embedding_multiplier": math.sqrt(config["hidden_size"])}


@dataclass(frozen=True)
class LogitsSoftCap:
    """A soft cap on logits; null, and absence, is none."""

    names: tuple[str, ...] = ("final_logit_softcapping",)

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {self.names[0]: model.logits_softcap}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the cap; `UserError` where it is 0, which transformers would divide by."""
        found = config.get(self.names[0])
        if found is not None and not float(found) > 0:
            raise UserError(f"config.json: {self.names[0]} = {found!r} must be a number greater than 0, or "
                            "null for no cap")
        return {"logits_softcap": None if found is None else float(found)}


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
            # The newer spelling first, then the older, then transformers' default.
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
class GemmaLayers:
    """Which layers slide: the explicit list, or all but every sixth."""

    names: tuple[str, ...] = ("layer_types", "sliding_window", "sliding_window_pattern")

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {"layer_types": model.layer_types(), "sliding_window": model.sliding_window_tokens or None}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the shortest pattern that gives the list, and the window."""
        return SlidingLayers(default_window=4096).read({"sliding_window_pattern": 6, **config})
