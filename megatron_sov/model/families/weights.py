"""The vocabulary of a weight map: which Hugging Face tensors make up which megatron-core tensor.

A declaration says once how a Megatron tensor is viewed and along which axis it falls into Hugging Face
tensors (`Layout`); joining and splitting both follow from that, so a map cannot disagree with its inverse.
Shapes are written in letters (`SIZES`), e.g. "V H".  Tensors are only asked to `reshape`, `narrow`, `copy_`
and `new_empty`, so nothing here needs torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from megatron_sov.base.errors import UserError
from megatron_sov.model.config import LatentAttentionConfig, LinearAttentionConfig, ModelConfig

SIZES: dict[str, Callable[[ModelConfig], int]] = {
    "V": lambda m: m.vocab_size,
    "H": lambda m: m.hidden_size,
    "D": lambda m: m.head_dim,
    "N": lambda m: m.num_heads,
    "A": lambda m: m.num_heads * m.head_dim,
    "F": lambda m: m.dense_ffn_dim,
    "E": lambda m: m.num_experts,
    "I": lambda m: m.expert_ffn_dim,
    "S": lambda m: m.expert_ffn_dim * m.num_shared_experts,
    "Q": lambda m: latent_of(m).q_lora_rank or 0,
    "K": lambda m: latent_of(m).kv_lora_rank,
    "C": lambda m: latent_of(m).cached_dim,
    "B": lambda m: m.num_heads * (latent_of(m).qk_nope_head_dim + latent_of(m).v_head_dim),
    "O": lambda m: m.num_heads * latent_of(m).v_head_dim,
    "T": lambda m: linear_of(m).num_value_heads,
    "U": lambda m: linear_of(m).value_head_dim,
    "W": lambda m: linear_of(m).num_value_heads * linear_of(m).value_head_dim,
    "X": lambda m: linear_of(m).num_key_heads * linear_of(m).key_head_dim,
    "R": lambda m: linear_of(m).gate_rank,
    "G": lambda m: 1,
}
"""Letters of a shape: Vocabulary, Hidden, heaD, Number of query heads, All of them, dense Ffn, Experts,
expert's Inner, Shared experts' inner; of latent attention the Query vector, the one of Keys and values, what
is Cached, what keys without positions and values have in all heads (Both), and what heads Output; of linear
attention the value heads (T), the width of one (U) and of all (W), that of all keys (X), and the Rank of
gates; the one Gate of shared experts."""
_TOKEN = re.compile(r"(\d*)([A-Z])")


def latent_of(model: ModelConfig) -> LatentAttentionConfig:
    """Return the sizes of latent attention; `UserError` where a model of a family that has it gives none."""
    if model.latent_attention is None:
        raise UserError(f"model.latent_attention = null: family '{model.family}' has latent attention; "
                        "give its sizes")
    return model.latent_attention


def linear_of(model: ModelConfig) -> LinearAttentionConfig:
    """Return the sizes of linear attention; `UserError` where a model of a family that has it gives none."""
    if model.linear_attention is None:
        raise UserError(f"model.linear_attention = null: family '{model.family}' has linear attention; give "
                        "its sizes")
    return model.linear_attention


def shape_of(letters: str, model: ModelConfig) -> tuple[int, ...]:
    """Return the shape that letters such as "V H" or "H 2H" stand for in `model`."""
    # `_check_letters` has refused unknown letters where the map was declared, so every token matches.
    matches = [_TOKEN.fullmatch(token) for token in letters.split()]
    return tuple(int(m[1] or 1) * SIZES[m[2]](model) for m in matches if m)


def _check_letters(letters: str, where: str) -> None:
    for token in letters.split() or [""]:
        match = _TOKEN.fullmatch(token)
        if not match or match[2] not in SIZES:
            raise ValueError(f"{where}: {token!r} in the shape {letters!r} is none of {', '.join(SIZES)} "
                             "with an optional factor")


@dataclass(frozen=True)
class Layout:
    """How a block of a Megatron tensor falls into Hugging Face tensors."""

    view: tuple[int, ...]
    """Shape in which the block is viewed."""
    axis: int
    """Axis of the view along which it is cut."""
    lengths: tuple[int, ...]
    """Extent of each Hugging Face tensor along that axis; they add up to the axis."""
    merged: int
    """How many leading axes of the view are one axis in the stored tensors."""

    def stored(self, length: int) -> tuple[int, ...]:
        """Return the stored shape of a part that has `length` along the cut axis."""
        part = self.part(length)
        # Leading axes (groups, heads, head size) are one axis of rows on disk.
        return (math.prod(part[:self.merged]), *part[self.merged:])

    @property
    def block(self) -> tuple[int, ...]:
        return self.stored(self.view[self.axis])

    def to_stored(self, part: Any, length: int) -> Any:
        """Return a viewed part of that length as Hugging Face stores it."""
        return part.reshape(self.stored(length))

    def to_view(self, tensor: Any, length: int) -> Any:
        """Return a Hugging Face tensor of that length as a part of the view."""
        return tensor.reshape(self.part(length))

    def part(self, length: int) -> tuple[int, ...]:
        """Return the viewed shape of a part that has `length` along the cut axis."""
        return (*self.view[:self.axis], length, *self.view[self.axis + 1:])

    def starts(self) -> list[int]:
        """Return where each part begins along the cut axis."""
        return [sum(self.lengths[:i]) for i in range(len(self.lengths))]


class WeightEntry(Protocol):
    """One line of a weight map."""

    @property
    def megatron(self) -> str:
        """Return the Megatron tensor's name."""
    @property
    def hf_names(self) -> tuple[str, ...]:
        """Return the Hugging Face tensors' names, in the order of the layout's parts."""
    @property
    def fp32(self) -> bool:
        """Return whether the tensor is float32 whatever the dtype of the rest."""
    def layout(self, model: ModelConfig) -> Layout:
        """Return how the Megatron tensor (one expert's block of it) falls into Hugging Face tensors."""


@dataclass(frozen=True)
class Same:
    """One Hugging Face tensor that is the Megatron tensor."""

    megatron: str
    hf: str
    shape: str
    fp32: bool = False
    """Whether the tensor is float32 whatever the dtype of the rest."""

    def __post_init__(self) -> None:
        _check_letters(self.shape, self.megatron)

    @property
    def hf_names(self) -> tuple[str, ...]:
        return (self.hf,)

    def layout(self, model: ModelConfig) -> Layout:
        shape = shape_of(self.shape, model)
        # One part as long as the axis: joining and splitting are then a plain copy.
        return Layout(shape, 0, (shape[0],), 1)


@dataclass(frozen=True)
class ReshapedLayout(Layout):
    """One Hugging Face tensor with the block's numbers in another shape."""

    hf_shape: tuple[int, ...] = ()

    @property
    def block(self) -> tuple[int, ...]:
        return self.view

    def stored(self, length: int) -> tuple[int, ...]:
        return self.hf_shape


@dataclass(frozen=True)
class Reshaped(Same):
    """One Hugging Face tensor that is the Megatron tensor in another shape."""

    hf_shape: str = ""
    """Letters of the Hugging Face tensor's shape."""

    def layout(self, model: ModelConfig) -> Layout:
        shape = shape_of(self.shape, model)
        return ReshapedLayout(shape, 0, (shape[0],), 1, shape_of(self.hf_shape, model))


@dataclass(frozen=True)
class GateUp:
    """The gate's rows, then the up projection's, stacked in one Megatron tensor."""

    megatron: str
    gate: str
    up: str
    shape: str
    """Shape of each of the two Hugging Face tensors."""
    fp32: bool = False

    def __post_init__(self) -> None:
        _check_letters(self.shape, self.megatron)

    @property
    def hf_names(self) -> tuple[str, ...]:
        return (self.gate, self.up)

    def layout(self, model: ModelConfig) -> Layout:
        # Megatron computes gate and up in one product and halves the output, so the gate's rows come first
        # as a block.
        return Layout((2, *shape_of(self.shape, model)), 0, (1, 1), 2)


@dataclass(frozen=True)
class QKV:
    """Query, key and value interleaved by key/value group: for each group its query heads,
    its key head, its value head."""

    megatron: str
    query: str
    key: str
    value: str
    columns: str = "H"
    """Width of the matrices; "" for biases, which are interleaved like the rows."""
    fp32: bool = False

    def __post_init__(self) -> None:
        if self.columns:
            _check_letters(self.columns, self.megatron)

    @property
    def hf_names(self) -> tuple[str, ...]:
        return (self.query, self.key, self.value)

    def layout(self, model: ModelConfig) -> Layout:
        """Return the parts of [groups, query heads + key + value, head_dim, columns],
        cut along the heads of a group."""
        # Query heads that share one key/value head. They lie together, so tensor parallelism can cut
        # between groups.
        heads = model.num_heads // model.num_kv_heads
        # Biases have no columns: `shape_of("")` is (), and the view ends with the head size.
        view = (model.num_kv_heads, heads + 2, model.head_dim, *shape_of(self.columns, model))
        return Layout(view, 1, (heads, 1, 1), 3)


@dataclass(frozen=True)
class Experts:
    """An entry per expert ("{e}" in the Hugging Face names), stacked along a leading axis of
    the Megatron tensor."""

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
    """Entries under common prefixes, and where they occur."""

    where: Literal["once", "untied", "mtp", "mtp layer behind", "every layer", "dense layers", "moe layers",
                   "layers with norms behind", "linear layers", "other layers"]
    """untied: once, in models whose output head is not the embedding matrix; mtp: once, in models with
    multi-token prediction; mtp layer behind: the same, where Hugging Face counts it as one more layer of the
    trunk; layers with norms behind: every one, in models that normalise the output of every block; linear
    layers, other layers: those with linear attention, and those with another."""
    megatron: str
    """Prefix of the Megatron names; "{l}" is the layer, which a prediction layer behind the trunk lacks."""
    hf: str
    """Prefix of the Hugging Face names; "{l}" is the layer."""
    entries: tuple[WeightEntry, ...]
    when: str = ""
    """Field or property of `ModelConfig` without which the section holds nowhere; empty: none."""

    def __post_init__(self) -> None:
        # Mistakes of a declaration show here, at import, not in a converted model that computes nonsense.
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
            misplaced = ["{l}"] if isinstance(entry, Experts) else ["{l}", "{e}"]
            if any(placeholder in name for placeholder in misplaced
                   for name in (entry.megatron, *entry.hf_names)):
                raise ValueError(f"section {self.megatron!r}, entry {entry.megatron!r} <-> {entry.hf_names}: "
                                 "a layer's placeholder belongs in the prefixes, an expert's in Experts(...)")
        for names in ([n for entry in self.entries for n in entry.hf_names],
                      [entry.megatron for entry in self.entries]):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"section {self.megatron!r} <-> {self.hf!r}: {', '.join(twice)} stand twice")

    def layers(self, model: ModelConfig) -> Sequence[int | None]:
        """Return the layers for which the section holds, as Hugging Face counts them; [None] or nothing for
        one that belongs to no layer."""
        if self.when and not getattr(model, self.when):
            return []
        # Layers with experts are the last ones: leading layers are dense (DeepSeek-V3).
        first_moe = model.num_layers - model.num_moe_layers()
        linear = [kind == "linear_attention" for kind in model.layer_types()]
        places: dict[str, Sequence[int | None]] = {
            "once": [None], "untied": [] if model.tied_embeddings else [None],
            "mtp": [None] if model.num_mtp_layers else [],
            "mtp layer behind": [model.num_layers] if model.num_mtp_layers else [],
            "every layer": range(model.num_layers),
            "linear layers": [i for i, is_linear in enumerate(linear) if is_linear],
            "other layers": [i for i, is_linear in enumerate(linear) if not is_linear],
            "layers with norms behind": range(
                model.num_layers if model.block_norms in ("post", "both") else 0),
            "dense layers": range(first_moe), "moe layers": range(first_moe, model.num_layers)}
        return places[self.where]


@dataclass(frozen=True)
class Link:
    """One block of one Megatron tensor of a model, and the Hugging Face tensors that it consists of."""

    key: str
    """Name of the Megatron tensor."""
    shape: tuple[int, ...]
    """Global shape of the Megatron tensor."""
    offset: tuple[int, ...]
    """First index of the block: (expert, 0, 0) for an expert, else zeros."""
    hf_names: tuple[str, ...]
    layout: Layout
    fp32: bool

    @property
    def block_shape(self) -> tuple[int, ...]:
        """Return the block's shape, an expert's without the leading axis."""
        return self.layout.block

    @property
    def extent(self) -> tuple[int, ...]:
        """Return the block's shape with as many axes as the global tensor."""
        # An expert's block is one index thick along the leading axis of the stacked tensor.
        return (1,) * (len(self.shape) - len(self.block_shape)) + self.block_shape

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self.layout.stored(n)
                for name, n in zip(self.hf_names, self.layout.lengths, strict=True)}

    def rows(self) -> dict[str, tuple[int, int]]:
        """Return the first row in the block and the number of rows of each Hugging Face tensor; nothing where
        their rows are interleaved."""
        # Cut along another axis than the first, rows of several tensors alternate, and no one range holds
        # one of them.
        if self.layout.axis:
            return {}
        each = math.prod(self.layout.view[1:self.layout.merged])
        return {name: (start * each, length * each) for name, start, length in zip(
            self.hf_names, self.layout.starts(), self.layout.lengths, strict=True)}

    def _parts(self, viewed: Any) -> Iterator[tuple[str, int, Any]]:
        for name, start, length in zip(self.hf_names, self.layout.starts(), self.layout.lengths, strict=True):
            yield name, length, viewed.narrow(self.layout.axis, start, length)

    def split(self, block: Any) -> dict[str, Any]:
        """Return the Hugging Face tensors of a block; they may share its memory."""
        viewed = block.reshape(self.layout.view)
        return {name: self.layout.to_stored(part, n) for name, n, part in self._parts(viewed)}

    def join(self, tensors: dict[str, Any]) -> Any:
        """Return the block that these Hugging Face tensors (of one dtype and device) make up."""
        # No copy where one tensor is the block: at hundreds of billions of weights that would double the
        # memory.
        if len(self.hf_names) == 1:
            tensor = tensors[self.hf_names[0]]
            return self.layout.to_view(tensor, self.layout.lengths[0]).reshape(self.block_shape)
        # `new_empty` gives dtype and device of the parts, without torch imported here.
        viewed = tensors[self.hf_names[0]].new_empty(self.layout.view)
        for name, length, part in self._parts(viewed):
            part.copy_(self.layout.to_view(tensors[name], length))
        return viewed.reshape(self.block_shape)


def links(sections: Sequence[WeightSection], model: ModelConfig) -> list[Link]:
    """Return every block of every tensor of `model`: what stands once, then layer by layer,
    then multi-token prediction.

    Raises:
        ValueError: the map names a tensor twice.
    """
    trunk = [s for s in sections if not s.where.startswith("mtp")]
    prediction = [s for s in sections if s.where.startswith("mtp")]
    # Layer by layer, so a converter that streams holds one layer's tensors at a time.
    order = ([(s, layer) for layer in (None, *range(model.num_layers)) for s in trunk]
             + [(s, layer) for layer in (None, model.num_layers) for s in prediction])
    found = [x for s, layer in order if layer in s.layers(model) for x in _expand(s, model, layer)]
    # A name twice would silently overwrite one tensor by another on export.
    hf_names = [name for link in found for name in link.hf_names]
    blocks = [(link.key, link.offset) for link in found]
    if len(set(hf_names)) != len(hf_names) or len(set(blocks)) != len(blocks):
        raise ValueError(f"the weight map of {model.family} names a tensor twice")
    return found


def _expand(section: WeightSection, model: ModelConfig, layer: int | None = None) -> Iterator[Link]:
    def named(prefix: str, name: str, expert: int | None = None) -> str:
        return (prefix + name).replace("{l}", str(layer)).replace("{e}", str(expert))

    for entry in section.entries:
        layout = entry.layout(model)
        key = named(section.megatron, entry.megatron)
        block = layout.block
        # Only stacked experts have a block per expert; every other tensor is one block at offset zero.
        stacked = isinstance(entry, Experts)
        for expert in range(model.num_experts if stacked else 1):
            shape = (model.num_experts, *block) if stacked else block
            offset = (expert if stacked else 0, *(0,) * (len(shape) - 1))
            yield Link(key, shape, offset, tuple(named(section.hf, n, expert) for n in entry.hf_names),
                       layout, entry.fp32)


# Parts of weight maps that most decoder families share: the names inside a layer, under a layer's prefix.

EMBEDDINGS_AND_HEAD = (
    WeightSection("once", "", "", (
        Same("embedding.word_embeddings.weight", "model.embed_tokens.weight", "V H"),
        Same("decoder.final_layernorm.weight", "model.norm.weight", "H"),
    )),
    WeightSection("untied", "", "", (Same("output_layer.weight", "lm_head.weight", "V H"),)),
)

PROJECTIONS: tuple[WeightEntry, ...] = (
    QKV("self_attention.linear_qkv.weight", "self_attn.q_proj.weight", "self_attn.k_proj.weight",
        "self_attn.v_proj.weight"),
    Same("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "H A"),
)
"""Attention without the norm before it."""

ATTENTION: tuple[WeightEntry, ...] = (
    Same("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", "H"), *PROJECTIONS,
)

QKV_BIAS: tuple[WeightEntry, ...] = (
    QKV("self_attention.linear_qkv.bias", "self_attn.q_proj.bias", "self_attn.k_proj.bias",
        "self_attn.v_proj.bias", columns=""),
)

QK_NORM: tuple[WeightEntry, ...] = (
    Same("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", "D"),
    Same("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", "D"),
)

SWIGLU: tuple[WeightEntry, ...] = (
    GateUp("mlp.linear_fc1.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", "F H"),
    Same("mlp.linear_fc2.weight", "mlp.down_proj.weight", "H F"),
)
"""A dense feed-forward network without the norm before it."""

DENSE_FFN: tuple[WeightEntry, ...] = (
    Same("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight", "H"), *SWIGLU,
)

ROUTED_EXPERTS: tuple[WeightEntry, ...] = (
    Same("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "H"),
    Same("mlp.router.weight", "mlp.gate.weight", "E H"),
    Experts(GateUp("mlp.experts.experts.linear_fc1.weight",
                   "mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight", "I H")),
    Experts(Same("mlp.experts.experts.linear_fc2.weight", "mlp.experts.{e}.down_proj.weight", "H I")),
)
"""All of a mixture-of-experts block but shared experts and the router's selection bias."""

SHARED_EXPERTS: tuple[WeightEntry, ...] = (
    GateUp("mlp.shared_experts.linear_fc1.weight",
           "mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight", "S H"),
    Same("mlp.shared_experts.linear_fc2.weight", "mlp.shared_experts.down_proj.weight", "H S"),
)


def norms_behind(attention: str, feed_forward: str) -> tuple[WeightEntry, ...]:
    """Return the entries of the norms of both blocks' outputs, by their Hugging Face names."""
    return (Same("self_attn_bda.norm.weight", f"{attention}.weight", "H"),
            Same("mlp_bda.norm.weight", f"{feed_forward}.weight", "H"))


def router_bias(hf_name: str) -> Same:
    """Return the entry of the router's selection bias: float32 always, since its steps of
    1e-4 vanish in less."""
    return Same("mlp.router.expert_bias", hf_name, "E", fp32=True)


DEEPSEEK_EXPERTS = (*ROUTED_EXPERTS, *SHARED_EXPERTS, router_bias("mlp.gate.e_score_correction_bias"))
"""A mixture-of-experts block as DeepSeek-V3 has it."""


def trunk(where: Literal["every layer", "dense layers", "moe layers", "layers with norms behind",
                         "linear layers", "other layers"],
          *parts: tuple[WeightEntry, ...], when: str = "") -> WeightSection:
    """Return the section of parts that stand in the trunk's layers, under the prefixes that all families
    share; `when` as `WeightSection` has it."""
    return WeightSection(where, "decoder.layers.{l}.", "model.layers.{l}.",
                         tuple(entry for part in parts for entry in part), when)


def prediction_layer(*parts: tuple[WeightEntry, ...]) -> tuple[WeightSection, WeightSection]:
    """Return the sections of a multi-token prediction layer whose transformer layer has these parts, under
    the names of K-EXAONE's (`mtp.*`)."""
    return (
        WeightSection("mtp", "mtp.layers.0.", "mtp.", (
            Same("enorm.weight", "pre_fc_norm_embedding.weight", "H"),
            Same("hnorm.weight", "pre_fc_norm_hidden.weight", "H"),
            Same("eh_proj.weight", "fc.weight", "H 2H"),
            Same("final_layernorm.weight", "norm.weight", "H"),
        )),
        WeightSection("mtp", "mtp.layers.0.transformer_layer.", "mtp.layers.0.",
                      tuple(entry for part in parts for entry in part)))


PREDICTION_BEHIND = WeightSection("mtp layer behind", "mtp.layers.0.", "model.layers.{l}.", (
    Same("enorm.weight", "enorm.weight", "H"), Same("hnorm.weight", "hnorm.weight", "H"),
    Same("eh_proj.weight", "eh_proj.weight", "H 2H"),
    Same("final_layernorm.weight", "shared_head.norm.weight", "H"),
))
"""What stands around the transformer layer of a multi-token prediction layer, under the names of
DeepSeek-V3's."""
COPIES_BEHIND = {"model.layers.{l}.embed_tokens.weight": "model.embed_tokens.weight",
                 "model.layers.{l}.shared_head.head.weight": "lm_head.weight"}
"""Tensors that are in such a layer once more -> those that they equal."""


def inside_prediction(*parts: tuple[WeightEntry, ...], when: str = "") -> WeightSection:
    """Return the section of parts that stand in the transformer layer of such a prediction layer; `when` as
    `WeightSection` has it."""
    return WeightSection("mtp layer behind", "mtp.layers.0.transformer_layer.", "model.layers.{l}.",
                         tuple(entry for part in parts for entry in part), when)


PLAIN_DECODER = (
    *EMBEDDINGS_AND_HEAD, trunk("every layer", ATTENTION), trunk("dense layers", DENSE_FFN),
    trunk("moe layers", ROUTED_EXPERTS, SHARED_EXPERTS), *prediction_layer(ATTENTION, DENSE_FFN))
"""A model of no family, as tables of published runs describe them."""
