"""Weight and config items for linear attention (Kimi Delta Attention), whose tensors have rows ordered by
head."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_sov.base.errors import UserError
from megatron_sov.model.config import LinearAttentionConfig, ModelConfig
from megatron_sov.model.config.model import LAYER_TYPES, shortest_pattern
from megatron_sov.model.families.hf_layers import read_num_layers
from megatron_sov.model.families.weights import (
    GateUp, Layout, Reshaped, Same, WeightEntry, get_linear_attention, resolve_shape)


@dataclass(frozen=True)
class HeadRows:
    """A Megatron tensor that stacks several Hugging Face tensors per head
    (`LinearAttentionConfig.projected`)."""

    megatron: str
    hf: tuple[tuple[str, int], ...]
    """(Hugging Face tensor, index in `projected`)."""
    columns: str
    """Sizes of the other axes, in letters."""
    fp32: bool = False

    @property
    def hf_names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.hf)

    def layout(self, model: ModelConfig) -> Layout:
        """Return the division of [heads, rows per head, columns]."""
        linear = get_linear_attention(model)
        lengths = tuple(linear.projected[kind] for _, kind in self.hf)
        return Layout((linear.num_key_heads, sum(lengths), *resolve_shape(self.columns, model)), 1, lengths,
                      2)


@dataclass(frozen=True)
class TapRows(HeadRows):
    """Weights of the causal convolution, [channels, 1, taps]."""

    columns: str = ""

    def layout(self, model: ModelConfig) -> Layout:
        """Return the division of [heads, channels per head, 1, taps]."""
        layout = super().layout(model)
        return replace(layout, view=(*layout.view, 1, get_linear_attention(model).conv_taps))


@dataclass(frozen=True)
class GatedQKV:
    """Query, key and value with an output gate per query head, which is a separate Hugging Face tensor."""

    megatron: str
    hf_names: tuple[str, str, str, str]
    """Query, gate, key, value."""
    fp32: bool = False

    def layout(self, model: ModelConfig) -> Layout:
        """Return the division of [groups, query heads + gates + key + value, head_dim, hidden]."""
        heads = model.num_heads // model.num_kv_heads
        view = (model.num_kv_heads, 2 * heads + 2, model.head_dim, model.hidden_size)
        return Layout(view, 1, (heads, heads, 1, 1), 3)


GATED_ATTENTION: tuple[WeightEntry, ...] = (
    Same("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", "H"),
    GatedQKV("self_attention.linear_qkv.weight", (
        "self_attn.q_proj.weight", "self_attn.g_proj.weight", "self_attn.k_proj.weight",
        "self_attn.v_proj.weight")),
    Same("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "H A"))
"""Attention with output gates in a separate matrix."""

KIMI_DELTA: tuple[WeightEntry, ...] = (
    Same("input_layernorm.weight", "input_layernorm.weight", "H"),
    HeadRows("self_attention.in_proj.weight", (
        ("self_attn.q_proj.weight", 0), ("self_attn.k_proj.weight", 1), ("self_attn.v_proj.weight", 2),
        ("self_attn.b_proj.weight", 3)), "H"),
    TapRows("self_attention.conv1d.weight", (
        ("self_attn.q_conv1d.weight", 0), ("self_attn.k_conv1d.weight", 1),
        ("self_attn.v_conv1d.weight", 2))),
    GateUp("self_attention.gates_down_proj.weight", "self_attn.f_a_proj.weight", "self_attn.g_a_proj.weight",
           "R H"),
    Same("self_attention.decay_up_proj.weight", "self_attn.f_b_proj.weight", "X R"),
    Same("self_attention.output_up_proj.weight", "self_attn.g_b_proj.weight", "W R"),
    Reshaped("self_attention.A_log", "self_attn.A_log", "T", hf_shape="G G T G"),
    Same("self_attention.dt_bias", "self_attn.dt_bias", "X"),
    Same("self_attention.out_norm.weight", "self_attn.o_norm.weight", "U"),
    Same("self_attention.out_proj.weight", "self_attn.o_proj.weight", "H W"))


def check_integer(name: str, value: Any) -> int:
    """Return `value`; `UserError` if it is not an integer (`int` would accept 4.9)."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"config.json: {name} = {value!r} must be a whole number; restore it from its source")
    return value


def parse_layer_pattern(types: list[Any], count: int) -> dict[str, Any]:
    """Return the shortest `attention_pattern` for layer types; `UserError`: an unknown type."""
    letter = {kind: letter for letter, kind in LAYER_TYPES.items() if letter in "DG"}
    letters = "".join(letter.get(kind, "?") for kind in types)
    if len(letters) != count or "?" in letters:
        raise UserError("config.json: layer_types must name linear_attention or full_attention for each of "
                        f"{count} layers; it has {types}")
    return {"attention_pattern": shortest_pattern(letters)}


def read_delta_sizes(model: ModelConfig, *, negative: bool) -> tuple[int, int, int]:
    """Return (heads, head size, taps) of Kimi Delta Attention; `UserError` for sizes that the family cannot
    express."""
    linear = get_linear_attention(model)
    width = linear.key_head_dim
    if linear != LinearAttentionConfig(linear.num_key_heads, linear.num_key_heads, width, width, width,
                                       linear.conv_taps, linear.negative_eigenvalues and negative):
        raise UserError(f"model.linear_attention = {asdict(linear)}: in family '{model.family}' keys and "
                        "values must have the same number of heads and the same width, equal to gate_rank"
                        + ("" if negative else ", and negative_eigenvalues must be false"))
    return linear.num_key_heads, width, linear.conv_taps


@dataclass(frozen=True)
class SolarLayers:
    """Solar Open 2's layer types and sizes: layers with softmax attention, and Kimi Delta Attention in the
    others. Programs read one list or the other, so exports write both."""

    sizes: tuple[str, ...] = ("num_heads", "head_dim", "short_conv_kernel_size")
    """Fields of `linear_attn_config`."""
    names: tuple[str, ...] = ("layer_types", "gqa_layers", "gqa_interval", "linear_attn_config",
                              "kda_allow_neg_eigval")

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return all fields but the interval; `UserError` for unequal sizes, or without softmax attention."""
        sizes, types = read_delta_sizes(model, negative=True), model.layer_types()
        softmax = [i for i, kind in enumerate(types) if kind == "full_attention"]
        if not softmax:
            raise UserError(f"model.attention_pattern = {model.attention_pattern!r}: family '{model.family}' "
                            "needs a layer with softmax attention; add a G")
        return {"layer_types": types, "gqa_layers": softmax,
                "linear_attn_config": {**dict(zip(self.sizes, sizes, strict=True)), "num_kv_heads": None},
                "kda_allow_neg_eigval": get_linear_attention(model).negative_eigenvalues}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the shortest pattern and the sizes; `UserError` if two spellings disagree or key/value heads
        differ from query heads."""
        default = {"num_heads": config.get("num_attention_heads", 64),
                   "head_dim": config.get("head_dim", 128), "short_conv_kernel_size": 4}
        part = dict(config.get("linear_attn_config", default))
        kv_heads = part.pop("num_kv_heads", None)
        if sorted(part) != sorted(self.sizes):
            raise UserError(f"config.json: linear_attn_config has {', '.join(sorted(part)) or 'no fields'}; "
                            f"besides num_kv_heads, it must have exactly {', '.join(self.sizes)}")
        heads, width, taps = (check_integer(f"linear_attn_config.{name}", part[name]) for name in self.sizes)
        if kv_heads and kv_heads != heads:
            raise UserError(f"config.json: linear_attn_config.num_kv_heads = {kv_heads}, but only null or "
                            f"num_heads = {heads} is supported: keys and values have as many heads as "
                            "queries")
        negative = config.get("kda_allow_neg_eigval", True)
        if not isinstance(negative, bool):
            raise UserError(f"config.json: kda_allow_neg_eigval = {negative!r} must be true or false")
        return {**self._layers(config), "linear_attention": asdict(
            LinearAttentionConfig(heads, heads, width, width, width, taps, negative))}

    @staticmethod
    def _layers(config: dict[str, Any]) -> dict[str, Any]:
        count, interval = read_num_layers(config), config.get("gqa_interval", 3)
        if check_integer("gqa_interval", interval) < 1:
            raise UserError(f"config.json: gqa_interval = {interval!r} must be an integer of 1 or more")
        softmax = config.get("gqa_layers", [*range(0, count, interval + 1)])
        listed = ["full_attention" if i in softmax else "linear_attention" for i in range(count)]
        types = config.get("layer_types", listed)
        pattern = parse_layer_pattern(types, count)
        # transformers writes a default `gqa_interval`, so the interval counts only without `layer_types`.
        if "gqa_layers" in config and (types != listed or len({*softmax}) != len(softmax)
                                       or listed.count("full_attention") != len(softmax)):
            raise UserError(f"config.json: gqa_layers = {softmax} must name layers from 0 to {count - 1} "
                            "once each, and agree with layer_types")
        if "full_attention" not in types:
            raise UserError("config.json: no layer has softmax attention; this family needs at least one in "
                            "gqa_layers")
        return pattern


