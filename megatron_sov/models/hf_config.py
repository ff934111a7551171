"""The vocabulary of a config map: fields of a Hugging Face config.json <-> fields of `ModelConfig`.

Each item knows the config.json names that it answers for, writes them and reads them; a field of a foreign config.json
that no item answers for is refused, since transformers would silently ignore it and we would train another model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_sov.config import ModelConfig, YarnConfig
from megatron_sov.errors import UserError

REQUIRED = object()
"""Default of a field without which a config.json is incomplete."""


class Item(Protocol):
    """One line of a config map."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return the config.json fields that this item answers for."""
    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return the config.json fields of a model."""
    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the `ModelConfig` fields that a config.json says; `UserError` where it says what we do not compute."""


@dataclass(frozen=True)
class Renamed:
    """A field that both sides have."""

    hf: str
    model: str
    default: Any = REQUIRED
    """What transformers assumes where the field is absent: a value, or a function of the config."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return the one field."""
        return (self.hf,)

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return the field with the model's value."""
        return {self.hf: getattr(model, self.model)}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the model's field; `UserError` where a required one is absent."""
        if self.hf in config:
            return {self.model: config[self.hf]}
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
        """Return the one field."""
        return (self.hf,)

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return the field with its only value."""
        return {self.hf: self.value} if self.written else {}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return nothing; `UserError` where the value is another one."""
        found = config.get(self.hf, self.value)
        if found != self.value:
            raise UserError(f"config.json: {self.hf} = {found!r}, but only {self.value!r} is supported for this family")
        return {}


@dataclass(frozen=True)
class Unused:
    """Fields that change no weight and no computation, whatever their value."""

    names: tuple[str, ...]

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return nothing: such fields are not written."""
        return {}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return nothing, whatever they say."""
        return {}


@dataclass(frozen=True)
class Rope:
    """Rotary frequencies: `rope_parameters` of transformers 5, or the older `rope_theta` and `rope_scaling`."""

    default_theta: float
    """What transformers assumes where no theta is given."""
    names: tuple[str, ...] = ("rope_parameters", "rope_scaling", "rope_theta")

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return `rope_parameters`, with every number explicit."""
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
        if model.yarn:
            rope |= {"rope_type": "yarn", "factor": model.yarn.factor,
                     "original_max_position_embeddings": model.yarn.original_max_position_tokens,
                     "beta_fast": model.yarn.beta_fast, "beta_slow": model.yarn.beta_slow}
        return {"rope_parameters": rope}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return theta and YaRN; `UserError` for other kinds of scaling and for parameters without effect."""
        spellings = [config[name] for name in ("rope_parameters", "rope_scaling") if config.get(name)]
        if len(spellings) == 2 and spellings[0] != spellings[1]:
            raise UserError(f"config.json: rope_parameters = {spellings[0]} and rope_scaling = {spellings[1]} "
                            "disagree; remove one of them")
        rope = dict(spellings[0]) if spellings else {}
        theta = float(rope.pop("rope_theta", config.get("rope_theta", self.default_theta)))
        old_kind = rope.pop("type", "default")
        kind = rope.pop("rope_type", old_kind)
        if kind == "default":
            yarn = None
        elif kind == "yarn":
            yarn = self._read_yarn(rope, config)
        else:
            raise UserError(f"config.json: rope_type = {kind!r}, but only 'default' and 'yarn' are supported")
        share = rope.pop("partial_rotary_factor", 1.0)
        if share != 1.0:
            raise UserError(f"config.json: partial_rotary_factor = {share}, but only 1.0 is supported: heads rotate as a whole")
        if rope:
            raise UserError(f"config.json: rope parameters {', '.join(sorted(rope))} are unknown for rope_type {kind!r}; "
                            "remove them if they have no effect")
        return {"rope_theta": theta, "yarn": yarn}

    @staticmethod
    def _read_yarn(rope: dict[str, Any], config: dict[str, Any]) -> YarnConfig:
        """Take YaRN's parameters out of `rope`; whatever is left there is not understood."""
        try:
            original = int(rope.pop("original_max_position_embeddings"))
            factor = float(rope.pop("factor", None) or config["max_position_embeddings"] / original)
        except KeyError as e:
            raise UserError(f"config.json: rope_type 'yarn' lacks {e}; add it to rope_parameters") from None
        # transformers' default, formula of arXiv 2309.00071 section 3.4; the trainer computes the same
        expected = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
        attention_factor = rope.pop("attention_factor", None)
        if attention_factor is not None and not math.isclose(attention_factor, expected, rel_tol=1e-6):
            raise UserError(f"config.json: attention_factor = {attention_factor}, but only 0.1 ln(factor) + 1 = {expected:.6f} "
                            "is supported")
        truncate = rope.pop("truncate", True)
        if truncate is not True:
            raise UserError(f"config.json: truncate = {truncate}, but only true is supported for rope_type 'yarn'")
        return YarnConfig(factor, original, float(rope.pop("beta_fast", None) or 32), float(rope.pop("beta_slow", None) or 1))


@dataclass(frozen=True)
class SlidingLayers:
    """Which layers slide: explicit `layer_types` (transformers derives a different list from the pattern alone)."""

    default_window: int
    """What transformers assumes where `sliding_window` is absent, in tokens."""
    names: tuple[str, ...] = ("layer_types", "sliding_window", "sliding_window_pattern")

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return the explicit list, the window and the pattern."""
        return {"layer_types": model.layer_types(), "sliding_window": model.sliding_window_tokens,
                "sliding_window_pattern": model.attention_pattern}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the shortest pattern that gives the list, and the window."""
        num_layers = config.get("num_hidden_layers", 0)
        types = config.get("layer_types") or self._from_period(config.get("sliding_window_pattern", 4), num_layers)
        letters = "".join({"sliding_attention": "L", "full_attention": "G"}.get(kind, "?") for kind in types)
        if len(letters) != num_layers or "?" in letters:
            raise UserError(f"config.json: layer_types must name sliding_attention or full_attention for each of "
                            f"num_hidden_layers = {num_layers} layers; it has {types}")
        period = next(n for n in range(1, len(letters) + 1) if (letters[:n] * len(letters))[:len(letters)] == letters)
        return {"attention_pattern": letters[:period], "sliding_window_tokens": config.get("sliding_window", self.default_window)}

    @staticmethod
    def _from_period(period: Any, num_layers: int) -> list[str]:
        """As transformers reads an integer: every `period`-th layer is global; it accepts nothing else without a list."""
        if not isinstance(period, int) or period < 1:
            raise UserError(f"config.json: sliding_window_pattern = {period!r} needs an explicit layer_types list beside it")
        return ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(num_layers)]


@dataclass(frozen=True)
class LeadingDenseLayers:
    """Dense layers before the experts, in every spelling that published configs use."""

    default: int
    """What transformers assumes where nothing is said."""
    names: tuple[str, ...] = ("first_k_dense_replace", "mlp_layer_types", "is_moe_layer", "first_last_k_dense_replace")

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return the count and the explicit list."""
        return {"first_k_dense_replace": model.num_dense_layers, "mlp_layer_types": [
            "dense" if i < model.num_dense_layers else "sparse" for i in range(model.num_layers)]}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the count; `UserError` where two spellings disagree."""
        spellings: dict[str, Callable[[Any], list[bool]]] = {
            "mlp_layer_types": lambda kinds: [kind != "sparse" for kind in kinds],
            "is_moe_layer": lambda flags: [not flag for flag in flags],
            "first_k_dense_replace": self._leading(config),
            "first_last_k_dense_replace": self._leading(config),
        }
        said = {name: read(config[name]) for name, read in spellings.items() if name in config}
        dense = next(iter(said.values()), self._leading(config)(self.default))
        if any(other != dense for other in said.values()):
            raise UserError(f"config.json: {' and '.join(said)} disagree about which layers are dense; make them agree")
        if len(dense) != config.get("num_hidden_layers") or dense != sorted(dense, reverse=True):
            raise UserError("config.json: mlp_layer_types must name 'dense' layers first and 'sparse' ones after, "
                            f"one for each of num_hidden_layers = {config.get('num_hidden_layers')} layers")
        return {"num_dense_layers": sum(dense)}

    @staticmethod
    def _leading(config: dict[str, Any]) -> Callable[[Any], list[bool]]:
        return lambda count: [i < count for i in range(config.get("num_hidden_layers", 0))]
