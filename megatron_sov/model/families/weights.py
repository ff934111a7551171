"""Weight maps: the Hugging Face tensors that make up each Megatron-Core tensor.

A `Layout` declares how a Megatron tensor is viewed and along which axis it divides into Hugging Face tensors.
Splitting and joining both follow from the layout, so a map cannot disagree with its inverse. Shapes are
letters from `SIZES`, such as "V H". The code only calls `reshape`, `narrow`, `copy_` and `new_empty` of
tensors, so it does not import torch.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from megatron_sov.base.errors import UserError
from megatron_sov.model.config import LatentAttentionConfig, LinearAttentionConfig, ModelConfig

SIZES: dict[str, Callable[[ModelConfig], int]] = {
    "V": lambda m: m.vocab_size, "H": lambda m: m.hidden_size, "D": lambda m: m.head_dim,
    "N": lambda m: m.num_heads, "A": lambda m: m.num_heads * m.head_dim, "F": lambda m: m.dense_ffn_dim,
    "E": lambda m: m.num_experts, "I": lambda m: m.expert_ffn_dim,
    "S": lambda m: m.expert_ffn_dim * m.num_shared_experts,
    "Q": lambda m: get_latent_attention(m).q_lora_rank or 0,
    "K": lambda m: get_latent_attention(m).kv_lora_rank, "C": lambda m: get_latent_attention(m).cached_dim,
    "B": lambda m: m.num_heads * (get_latent_attention(m).qk_nope_head_dim
                                  + get_latent_attention(m).v_head_dim),
    "O": lambda m: m.num_heads * get_latent_attention(m).v_head_dim,
    "T": lambda m: get_linear_attention(m).num_value_heads,
    "U": lambda m: get_linear_attention(m).value_head_dim,
    "W": lambda m: get_linear_attention(m).num_value_heads * get_linear_attention(m).value_head_dim,
    "X": lambda m: get_linear_attention(m).num_key_heads * get_linear_attention(m).key_head_dim,
    "R": lambda m: get_linear_attention(m).gate_rank, "G": lambda m: 1}
"""Letter in a shape -> size. V: vocabulary; H: hidden; D: head; N: query heads; A: all query channels; F:
dense feed-forward; E: experts; I: expert feed-forward; S: shared experts' feed-forward; G: 1 (gate of shared
experts). Latent attention: Q: query latent; K: key/value latent; C: cached; B: keys without position plus
values, all heads; O: output of all heads. Linear attention: T: value heads; U: value head; W: all value
channels; X: all key channels; R: gate rank."""
_TOKEN = re.compile(r"(\d*)([A-Z])")
PREDICTION_COPIES = {"model.layers.{l}.embed_tokens.weight": "model.embed_tokens.weight",
                 "model.layers.{l}.shared_head.head.weight": "lm_head.weight"}
"""Copies in a DeepSeek-V3 prediction layer -> original tensor."""


def get_latent_attention(model: ModelConfig) -> LatentAttentionConfig:
    """Return the sizes of latent attention; `UserError` if the model has none."""
    if model.latent_attention is None:
        raise UserError(f"model.latent_attention = null: family '{model.family}' has latent attention; "
                        "give its sizes")
    return model.latent_attention


def get_linear_attention(model: ModelConfig) -> LinearAttentionConfig:
    """Return the sizes of linear attention; `UserError` if the model has none."""
    if model.linear_attention is None:
        raise UserError(f"model.linear_attention = null: family '{model.family}' has linear attention; give "
                        "its sizes")
    return model.linear_attention


def resolve_shape(letters: str, model: ModelConfig) -> tuple[int, ...]:
    """Return the sizes of a shape in letters, such as "V H" or "H 2H", for `model`."""
    # `_check_letters` rejected unknown letters when the map was declared, so every token matches.
    matches = [_TOKEN.fullmatch(token) for token in letters.split()]
    return tuple(int(m[1] or 1) * SIZES[m[2]](model) for m in matches if m)


def _check_letters(letters: str, where: str) -> None:
    for token in letters.split() or [""]:
        match = _TOKEN.fullmatch(token)
        if not match or match[2] not in SIZES:
            raise ValueError(f"{where}: {token!r} in the shape {letters!r} must be one of "
                             f"{', '.join(SIZES)}, with an optional factor")


@dataclass(frozen=True)
class Layout:
    """Division of a Megatron tensor's block into Hugging Face tensors."""

    view: tuple[int, ...]
    """Shape in which the block is viewed."""
    axis: int
    """Axis of the view along which the block is divided."""
    lengths: tuple[int, ...]
    """Length of each Hugging Face tensor along `axis`; the sum is the axis length."""
    merged: int
    """Leading axes in the view that are one axis in stored tensors."""

    def stored(self, length: int) -> tuple[int, ...]:
        """Return the stored shape of a part with `length` along the divided axis."""
        part = self.part(length)
        # Leading axes of the view (groups, heads, head size) are the rows of a stored tensor.
        return (math.prod(part[:self.merged]), *part[self.merged:])

    @property
    def block(self) -> tuple[int, ...]:
        return self.stored(self.view[self.axis])

    def to_view(self, tensor: Any, length: int) -> Any:
        """Reshape a Hugging Face tensor to a part of the view."""
        return tensor.reshape(self.part(length))

    def part(self, length: int) -> tuple[int, ...]:
        """Return the shape in the view of a part with `length` along the divided axis."""
        return (*self.view[:self.axis], length, *self.view[self.axis + 1:])

    def starts(self) -> list[int]:
        """Return the first index of each part along the divided axis."""
        return [sum(self.lengths[:i]) for i in range(len(self.lengths))]


class WeightEntry(Protocol):
    """A Megatron tensor and its Hugging Face tensors."""

    @property
    def megatron(self) -> str:
        """Megatron tensor name."""
    @property
    def hf_names(self) -> tuple[str, ...]:
        """Hugging Face tensor names, in the order in `layout`."""
    @property
    def fp32(self) -> bool:
        """Whether the tensor is float32 regardless of the model's dtype."""
    def layout(self, model: ModelConfig) -> Layout:
        """Return the division of the Megatron tensor (for experts, of a single expert's block)."""


@dataclass(frozen=True)
class Same:
    """A Hugging Face tensor equal to a Megatron tensor."""

    megatron: str
    hf: str
    shape: str
    fp32: bool = False
    """Whether the tensor is float32 regardless of the model's dtype."""

    def __post_init__(self) -> None:
        _check_letters(self.shape, self.megatron)

    @property
    def hf_names(self) -> tuple[str, ...]:
        return (self.hf,)

    def layout(self, model: ModelConfig) -> Layout:
        shape = resolve_shape(self.shape, model)
        # A single part over the whole axis: joining and splitting are copies.
        return Layout(shape, 0, (shape[0],), 1)


@dataclass(frozen=True)
class ReshapedLayout(Layout):
    """Layout of a Hugging Face tensor with the block's values in another shape."""

    hf_shape: tuple[int, ...] = ()

    @property
    def block(self) -> tuple[int, ...]:
        return self.view

    def stored(self, length: int) -> tuple[int, ...]:
        return self.hf_shape


@dataclass(frozen=True)
class Reshaped(Same):
    """A Hugging Face tensor equal to a Megatron tensor except for its shape."""

    hf_shape: str = ""
    """Hugging Face tensor shape, in letters."""

    def layout(self, model: ModelConfig) -> Layout:
        shape = resolve_shape(self.shape, model)
        return ReshapedLayout(shape, 0, (shape[0],), 1, resolve_shape(self.hf_shape, model))


@dataclass(frozen=True)
class GateUp:
    """Gate projection rows, then up projection rows, in a single Megatron tensor."""

    megatron: str
    gate: str
    up: str
    shape: str
    """Shape for gate and up tensors, in letters."""
    fp32: bool = False

    def __post_init__(self) -> None:
        _check_letters(self.shape, self.megatron)

    @property
    def hf_names(self) -> tuple[str, ...]:
        return (self.gate, self.up)

    def layout(self, model: ModelConfig) -> Layout:
        # Megatron computes gate and up in one product and halves the output: gate rows first, then up rows.
        return Layout((2, *resolve_shape(self.shape, model)), 0, (1, 1), 2)


@dataclass(frozen=True)
class QKV:
    """Query, key and value, interleaved by key/value group: the group's query heads, its key head, its value
    head."""

    megatron: str
    query: str
    key: str
    value: str
    columns: str = "H"
    """Columns of the matrices, in letters; "" for biases, which are interleaved like rows."""
    fp32: bool = False

    def __post_init__(self) -> None:
        if self.columns:
            _check_letters(self.columns, self.megatron)

    @property
    def hf_names(self) -> tuple[str, ...]:
        return (self.query, self.key, self.value)

    def layout(self, model: ModelConfig) -> Layout:
        """Return how [groups, query heads + key + value, head_dim, columns] divides along a group's heads."""
        # Query heads per key/value head. A group is contiguous, so tensor parallelism divides groups.
        heads = model.num_heads // model.num_kv_heads
        # Biases have no columns: `shape_of("")` is (), and the view ends with the head size.
        view = (model.num_kv_heads, heads + 2, model.head_dim, *resolve_shape(self.columns, model))
        return Layout(view, 1, (heads, 1, 1), 3)


@dataclass(frozen=True)
class Experts:
    """An entry repeated for every expert ("{e}" in Hugging Face names), stacked along the first axis of the
    Megatron tensor."""

    each: Same | GateUp

    def __post_init__(self) -> None:
        for name in self.each.hf_names:
            if "{e}" not in name:
                raise ValueError(f"{self.megatron}: its counterpart {name!r} lacks the placeholder "
                                 "{e} of an expert")
        if "{e}" in self.megatron:
            raise ValueError(f"{self.megatron}: holds all experts, so it has no placeholder {{e}}")

    @property
    def megatron(self) -> str:
        return self.each.megatron

    @property
    def hf_names(self) -> tuple[str, ...]:
        return self.each.hf_names

    @property
    def fp32(self) -> bool:
        return self.each.fp32

    def layout(self, model: ModelConfig) -> Layout:
        return self.each.layout(model)


@dataclass(frozen=True)
class WeightSection:
    """Entries with common name prefixes, and the layers that have them."""

    where: Literal["once", "untied", "mtp", "mtp layer behind", "every layer", "dense layers", "moe layers",
                   "layers with norms behind", "linear layers", "other layers"]
    """Layers with these entries. once: outside layers; untied: once, without `tied_embeddings`; mtp: once,
    with multi-token prediction; mtp layer behind: multi-token prediction that Hugging Face counts as an
    additional layer; layers with norms behind: every layer, with `block_norms` = post or both; linear layers,
    other layers: with and without linear attention."""
    megatron: str
    """Prefix for Megatron names. "{l}" stands for the layer index, except in "mtp layer behind"."""
    hf: str
    """Prefix for Hugging Face names; "{l}" stands for the layer index."""
    entries: tuple[WeightEntry, ...]
    when: str = ""
    """Field or property of `ModelConfig` that must be true for the section to apply; "" for no condition."""

    def __post_init__(self) -> None:
        # Find mistakes in a declaration at import, not in a converted model.
        per_layer = "layer" in self.where
        if self.where == "mtp layer behind":
            if "{l}" in self.megatron or "{l}" not in self.hf:
                raise ValueError(f"section {self.megatron!r} <-> {self.hf!r} for {self.where}: the Hugging "
                                 "Face prefix alone needs the placeholder {l}")
        elif any(("{l}" in prefix) != per_layer for prefix in (self.megatron, self.hf)):
            raise ValueError(f"section {self.megatron!r} <-> {self.hf!r} for {self.where}: "
                             f"{'both prefixes need' if per_layer else 'neither prefix may have'} the "
                             "placeholder {l}")
        for entry in self.entries:
            forbidden = ["{l}"] if isinstance(entry, Experts) else ["{l}", "{e}"]
            if any(placeholder in name for placeholder in forbidden
                   for name in (entry.megatron, *entry.hf_names)):
                raise ValueError(f"section {self.megatron!r}, entry {entry.megatron!r} <-> {entry.hf_names}: "
                                 "a layer's placeholder belongs in the prefixes, an expert's in Experts(...)")
        for names in ([n for entry in self.entries for n in entry.hf_names],
                      [entry.megatron for entry in self.entries]):
            repeated = sorted({name for name in names if names.count(name) > 1})
            if repeated:
                raise ValueError(
                    f"section {self.megatron!r} <-> {self.hf!r}: names {', '.join(repeated)} twice")

    def layers(self, model: ModelConfig) -> Sequence[int | None]:
        """Return the layers with this section by Hugging Face index; [None] for a section outside layers."""
        if self.when and not getattr(model, self.when):
            return []
        # Dense layers come first, then layers with experts (DeepSeek-V3).
        first_moe = model.num_layers - model.num_moe_layers()
        is_linear_layer = [kind == "linear_attention" for kind in model.layer_types()]
        layers_by_kind: dict[str, Sequence[int | None]] = {
            "once": [None], "untied": [] if model.tied_embeddings else [None],
            "mtp": [None] if model.num_mtp_layers else [],
            "mtp layer behind": [model.num_layers] if model.num_mtp_layers else [],
            "every layer": range(model.num_layers),
            "linear layers": [i for i, is_linear in enumerate(is_linear_layer) if is_linear],
            "other layers": [i for i, is_linear in enumerate(is_linear_layer) if not is_linear],
            "layers with norms behind": range(
                model.num_layers if model.block_norms in ("post", "both") else 0),
            "dense layers": range(first_moe), "moe layers": range(first_moe, model.num_layers)}
        return layers_by_kind[self.where]


@dataclass(frozen=True)
class Link:
    """A block of a model's Megatron tensor, and its Hugging Face tensors."""

    key: str
    """Megatron tensor name."""
    shape: tuple[int, ...]
    """Global shape of the Megatron tensor."""
    offset: tuple[int, ...]
    """First index of the block: (expert, 0, 0) for experts, else zeros."""
    hf_names: tuple[str, ...]
    layout: Layout
    fp32: bool

    @property
    def block_shape(self) -> tuple[int, ...]:
        """Block shape; for experts without the leading axis."""
        return self.layout.block

    @property
    def extent(self) -> tuple[int, ...]:
        """Block shape with as many axes as the global tensor."""
        # An expert's block has length 1 along the leading axis of the stacked tensor.
        return (1,) * (len(self.shape) - len(self.block_shape)) + self.block_shape

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self.layout.stored(n)
                for name, n in zip(self.hf_names, self.layout.lengths, strict=True)}

    def rows(self) -> dict[str, tuple[int, int]]:
        """Return Hugging Face name -> (first row, number of rows) in the block; {} for interleaved rows."""
        # If the view is divided along a later axis, rows of the tensors alternate.
        if self.layout.axis:
            return {}
        rows_per_unit = math.prod(self.layout.view[1:self.layout.merged])
        return {name: (start * rows_per_unit, length * rows_per_unit) for name, start, length in zip(
            self.hf_names, self.layout.starts(), self.layout.lengths, strict=True)}

    def _iter_parts(self, block_view: Any) -> Iterator[tuple[str, int, Any]]:
        for name, start, length in zip(self.hf_names, self.layout.starts(), self.layout.lengths, strict=True):
            yield name, length, block_view.narrow(self.layout.axis, start, length)

    def split(self, block: Any) -> dict[str, Any]:
        """Return the Hugging Face tensors of a block; the tensors may share the block's memory."""
        parts = self._iter_parts(block.reshape(self.layout.view))
        return {name: part.reshape(self.layout.stored(length)) for name, length, part in parts}

    def join(self, tensors: dict[str, Any]) -> Any:
        """Return the block made up of Hugging Face tensors with the same dtype and device."""
        # A single tensor is the block itself: a copy would double the memory of large models.
        if len(self.hf_names) == 1:
            tensor = tensors[self.hf_names[0]]
            return self.layout.to_view(tensor, self.layout.lengths[0]).reshape(self.block_shape)
        # `new_empty` keeps dtype and device without importing torch.
        block_view = tensors[self.hf_names[0]].new_empty(self.layout.view)
        for name, length, part in self._iter_parts(block_view):
            part.copy_(self.layout.to_view(tensors[name], length))
        return block_view.reshape(self.block_shape)


def build_links(sections: Sequence[WeightSection], model: ModelConfig) -> list[Link]:
    """Return links for all tensors in `model`: tensors outside layers, layers in order, multi-token
    prediction. Raises `ValueError`: the map names a tensor twice."""
    trunk = [s for s in sections if not s.where.startswith("mtp")]
    prediction = [s for s in sections if s.where.startswith("mtp")]
    # In layer order, so a streaming converter holds the tensors of one layer at a time.
    order = ([(s, layer) for layer in (None, *range(model.num_layers)) for s in trunk]
             + [(s, layer) for layer in (None, model.num_layers) for s in prediction])
    model_links = [link for section, layer in order if layer in section.layers(model)
                   for link in _iter_section_links(section, model, layer)]
    # A repeated name would overwrite a tensor during export.
    hf_names = [name for link in model_links for name in link.hf_names]
    blocks = [(link.key, link.offset) for link in model_links]
    if len(set(hf_names)) != len(hf_names) or len(set(blocks)) != len(blocks):
        raise ValueError(f"the weight map of {model.family} names a tensor twice")
    return model_links


def _iter_section_links(section: WeightSection, model: ModelConfig,
                        layer: int | None = None) -> Iterator[Link]:
    def format_name(prefix: str, name: str, expert: int | None = None) -> str:
        return (prefix + name).replace("{l}", str(layer)).replace("{e}", str(expert))

    for entry in section.entries:
        layout = entry.layout(model)
        key = format_name(section.megatron, entry.megatron)
        block = layout.block
        # Stacked experts have a block per expert; other tensors are a single block at offset 0.
        is_stacked = isinstance(entry, Experts)
        for expert in range(model.num_experts if is_stacked else 1):
            shape = (model.num_experts, *block) if is_stacked else block
            offset = (expert if is_stacked else 0, *(0,) * (len(shape) - 1))
            yield Link(key, shape, offset, tuple(format_name(section.hf, n, expert) for n in entry.hf_names),
                       layout, entry.fp32)


# Entries common to most decoder families, with names relative to the layer's prefix.

EMBEDDINGS_AND_HEAD = (
    WeightSection("once", "", "", (
        Same("embedding.word_embeddings.weight", "model.embed_tokens.weight", "V H"),
        Same("decoder.final_layernorm.weight", "model.norm.weight", "H"))),
    WeightSection("untied", "", "", (Same("output_layer.weight", "lm_head.weight", "V H"),)))

PROJECTIONS: tuple[WeightEntry, ...] = (
    QKV("self_attention.linear_qkv.weight", "self_attn.q_proj.weight", "self_attn.k_proj.weight",
        "self_attn.v_proj.weight"),
    Same("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "H A"))
"""Attention without its input norm."""

ATTENTION: tuple[WeightEntry, ...] = (
    Same("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", "H"), *PROJECTIONS)

QKV_BIAS: tuple[WeightEntry, ...] = (
    QKV("self_attention.linear_qkv.bias", "self_attn.q_proj.bias", "self_attn.k_proj.bias",
        "self_attn.v_proj.bias", columns=""),
)

QK_NORM: tuple[WeightEntry, ...] = (
    Same("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", "D"),
    Same("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", "D"))

SWIGLU: tuple[WeightEntry, ...] = (
    GateUp("mlp.linear_fc1.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", "F H"),
    Same("mlp.linear_fc2.weight", "mlp.down_proj.weight", "H F"))
"""Dense feed-forward network without its input norm."""

DENSE_FFN: tuple[WeightEntry, ...] = (
    Same("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight", "H"), *SWIGLU)

ROUTED_EXPERTS: tuple[WeightEntry, ...] = (
    Same("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "H"),
    Same("mlp.router.weight", "mlp.gate.weight", "E H"),
    Experts(GateUp("mlp.experts.experts.linear_fc1.weight",
                   "mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight", "I H")),
    Experts(Same("mlp.experts.experts.linear_fc2.weight", "mlp.experts.{e}.down_proj.weight", "H I")))
"""Mixture-of-experts block without shared experts and selection bias."""

SHARED_EXPERTS: tuple[WeightEntry, ...] = (
    GateUp("mlp.shared_experts.linear_fc1.weight",
           "mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight", "S H"),
    Same("mlp.shared_experts.linear_fc2.weight", "mlp.shared_experts.down_proj.weight", "H S"))


def output_norms(attention: str, feed_forward: str) -> tuple[WeightEntry, ...]:
    """Return entries for the norms on attention and feed-forward outputs, by Hugging Face names."""
    return (Same("self_attn_bda.norm.weight", f"{attention}.weight", "H"),
            Same("mlp_bda.norm.weight", f"{feed_forward}.weight", "H"))


def router_bias_entry(hf_name: str) -> Same:
    """Return the entry for the router's selection bias: always float32, as bf16 loses its small steps."""
    return Same("mlp.router.expert_bias", hf_name, "E", fp32=True)


DEEPSEEK_EXPERTS = (*ROUTED_EXPERTS, *SHARED_EXPERTS, router_bias_entry("mlp.gate.e_score_correction_bias"))
"""DeepSeek-V3's mixture-of-experts block."""


def trunk_section(where: Literal["every layer", "dense layers", "moe layers", "layers with norms behind",
                         "linear layers", "other layers"],
          *parts: tuple[WeightEntry, ...], when: str = "") -> WeightSection:
    """Return a section of transformer layers with `parts`, under the prefixes common to all families."""
    return WeightSection(where, "decoder.layers.{l}.", "model.layers.{l}.",
                         tuple(entry for part in parts for entry in part), when)


def prediction_sections(*parts: tuple[WeightEntry, ...]) -> tuple[WeightSection, WeightSection]:
    """Return a multi-token prediction layer's sections with `parts`, under K-EXAONE's names (`mtp.*`)."""
    return (
        WeightSection("mtp", "mtp.layers.0.", "mtp.", (
            Same("enorm.weight", "pre_fc_norm_embedding.weight", "H"),
            Same("hnorm.weight", "pre_fc_norm_hidden.weight", "H"),
            Same("eh_proj.weight", "fc.weight", "H 2H"), Same("final_layernorm.weight", "norm.weight", "H"))),
        WeightSection("mtp", "mtp.layers.0.transformer_layer.", "mtp.layers.0.",
                      tuple(entry for part in parts for entry in part)))


PREDICTION_AFTER_TRUNK = WeightSection("mtp layer behind", "mtp.layers.0.", "model.layers.{l}.", (
    Same("enorm.weight", "enorm.weight", "H"), Same("hnorm.weight", "hnorm.weight", "H"),
    Same("eh_proj.weight", "eh_proj.weight", "H 2H"),
    Same("final_layernorm.weight", "shared_head.norm.weight", "H")))
"""Tensors around the transformer layer of multi-token prediction, under DeepSeek-V3's names."""


def prediction_layer_section(*parts: tuple[WeightEntry, ...], when: str = "") -> WeightSection:
    """Return the section for `parts` inside DeepSeek-V3's multi-token prediction layer."""
    return WeightSection("mtp layer behind", "mtp.layers.0.transformer_layer.", "model.layers.{l}.",
                         tuple(entry for part in parts for entry in part), when)


PLAIN_DECODER = (
    *EMBEDDINGS_AND_HEAD, trunk_section("every layer", ATTENTION), trunk_section("dense layers", DENSE_FFN),
    trunk_section("moe layers", ROUTED_EXPERTS, SHARED_EXPERTS), *prediction_sections(ATTENTION, DENSE_FFN))
"""Sections for a model without a family, for published run tables."""
