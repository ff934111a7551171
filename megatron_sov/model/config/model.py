"""The architecture of a model: sizes, routing, attention, positions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen, MultipleOf

from megatron_sov.base.settings import (
    AboveZero, ActsWhen, AtLeastOne, NotNegative, NotNegativeInt, ProblemCode, SettingsProblem, find_broken,
    is_set)
from megatron_sov.base.settings.problem import show
from megatron_sov.model.config.bounds import MAX_LAYERS, MAX_SEQ_LEN
from megatron_sov.model.config.encoders import AudioEncoderConfig, VisionEncoderConfig

# Blocks of ids: where the discrete tokens of a medium stand in a vocabulary.

@dataclass(frozen=True)
class IdBlock:
    """The ids of one codebook: token `i` of it is id `first + i`."""

    first: NotNegativeInt
    """Id of its token 0."""
    size: AtLeastOne
    """Tokens of the codebook."""

    @property
    def end(self) -> int:
        """The id behind its last one."""
        return self.first + self.size


# Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Width = Annotated[int, Ge(1), Le(1_000_000)]


@dataclass(frozen=True)
class LatentAttentionConfig:
    """Sizes of latent attention: keys and values of all heads are made of one narrow vector, and a key that
    all heads share carries the position."""

    kv_lora_rank: Width
    """Width of the vector that keys and values are made of."""
    qk_nope_head_dim: Width
    """Channels of a head's queries and keys that have no position."""
    qk_rope_head_dim: Annotated[Width, MultipleOf(2)]
    """Channels that rotate; all heads share those of the key."""
    v_head_dim: Width
    """Width of a head's values."""
    q_lora_rank: Width | None = None
    """Width of the vector that queries are made of; None: they are made of the layer's input."""

    @property
    def query_dim(self) -> int:
        """Width of a head's queries and keys."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cached_dim(self) -> int:
        """Numbers that generating keeps of a token in a layer, for all heads together."""
        return self.kv_lora_rank + self.qk_rope_head_dim


# Linear attention: Kimi Delta Attention (arXiv 2510.26692).

@dataclass(frozen=True)
class LinearAttentionConfig:
    """Sizes of linear attention: each head of values has a state [key_head_dim, value_head_dim], whatever the
    length of a document."""

    num_key_heads: Annotated[int, Ge(1), Le(1_000_000)]
    """Heads of queries and keys."""
    num_value_heads: Annotated[int, Ge(1), Le(1_000_000)]
    """Heads of values: one for each head of keys."""
    key_head_dim: Width
    """Width of a head's queries and keys."""
    value_head_dim: Width
    """Width of a head's values."""
    gate_rank: Width
    """Width of each of the two vectors that a decay of each channel of keys, and the output's gates, are made
    of."""
    conv_taps: Annotated[int, Ge(1), Le(64)] = 4
    """Tokens that the causal convolution of each channel of queries, keys and values sees, its own too."""
    negative_eigenvalues: bool = False
    """Whether learning rates lie below 2 and not below 1, so that a state may turn what it holds along a key
    into its opposite (arXiv 2411.12537; Solar Open 2)."""

    @property
    def projected(self) -> tuple[int, int, int, int]:
        """Widths of what the layer's input becomes for each head: query, key, value, learning rate."""
        return (self.key_head_dim, self.key_head_dim, self.value_head_dim, 1)

    @property
    def convolved(self) -> int:
        """Channels of a head that are convolved: query, key and value."""
        return sum(self.projected[:3])

    @property
    def state_size(self) -> int:
        """Numbers of a layer's state, of all heads."""
        return self.num_value_heads * self.key_head_dim * self.value_head_dim

    @property
    def kept_size(self) -> int:
        """Numbers that generating keeps of a sequence in a layer: the state, and the last inputs of the
        convolution."""
        return self.state_size + (self.conv_taps - 1) * self.num_key_heads * self.convolved

    @property
    def token_products(self) -> int:
        """Multiplications of a token beside the projections: its key reads the state, which decays, is
        written, and is read by the query; and the convolution."""
        return 4 * self.state_size + self.conv_taps * self.num_key_heads * self.convolved


MAX_DEPTHS = 64
"""Tokens ahead that one prediction layer may be trained for: each costs its products and a head's."""
MAX_EXPERTS = 1_000_000
"""Experts of all layers: each has tensors of its own under Hugging Face names."""
Million = Annotated[int, Ge(1), Le(1_000_000)]
FfnWidth = Annotated[int, Ge(0), Le(100_000_000)]
Divisor = Annotated[float, Ge(1), Lt(math.inf)]


@dataclass(frozen=True)
class YarnConfig:
    """YaRN rotary scaling (arXiv 2309.00071), with the field's names and meaning in transformers."""

    factor: AboveZero = 2.0
    """How many times longer than the original the context becomes."""
    original_max_position_tokens: AtLeastOne = 65536
    """Context length, in tokens, before scaling."""
    beta_fast: AboveZero = 32.0
    """Rotations within the original context above which a dimension is left alone."""
    beta_slow: AboveZero = 1.0
    """Rotations within the original context below which a dimension is fully interpolated."""
    mscale: AboveZero = 1.0
    """Factor on 0.1 ln(factor) in the scale of the softmax (DeepSeek's mscale and mscale_all_dim, which are
    equal); others than 1 in models with latent attention only."""


@dataclass(frozen=True)
class Llama3RopeConfig:
    """Rotary scaling of Llama 3.1 (rope_type "llama3" of transformers, whose names and meaning these are)."""

    factor: Divisor = 8.0
    """Divisor of the frequencies whose wavelength is long beside the original context."""
    low_freq_factor: AboveZero = 1.0
    """Wavelengths above original_max_position_tokens / low_freq_factor are divided in full."""
    high_freq_factor: AboveZero = 4.0
    """Wavelengths below original_max_position_tokens / high_freq_factor are left alone."""
    original_max_position_tokens: AtLeastOne = 8192
    """Context length, in tokens, before scaling."""


def shortest_pattern(letters: str) -> str:
    """Return the shortest pattern whose repetition gives all letters."""
    return next((letters[:n] for n in range(1, len(letters) + 1)
                 if (letters[:n] * -(-len(letters) // n))[:len(letters)] == letters), "G")


LayerType = Literal["sliding_attention", "full_attention", "linear_attention"]
LAYER_TYPES: dict[str, LayerType] = {"L": "sliding_attention", "G": "full_attention", "D": "linear_attention"}
"""Letters of a pattern -> what the layer's attention is, in transformers' words."""


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of a model; `family` says how it maps to Hugging Face (`model/families`)."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        "num_dense_layers num_experts_per_token num_expert_groups num_groups_per_token num_shared_experts "
        "expert_ffn_dim router_score norm_topk_prob router_bias routed_scaling_factor "
        "router_bias_update_rate seq_aux_loss_coeff mtp_experts": is_set(".num_experts"),
        "router_bias_update_rate": is_set(".router_bias"),
        "local_rope_theta": is_set(".sliding_window_tokens"),
        "mtp_experts mtp_attention mtp_depths mtp_loss_coeff": is_set(".num_mtp_layers")}

    family: str
    """Name of the declaration in `megatron_sov/model/families`, equal to transformers' `model_type`."""
    vocab_size: Annotated[AtLeastOne, Le(100_000_000)]
    """Number of token ids, including reserved ones."""
    hidden_size: Annotated[AtLeastOne, Le(10_000_000)]
    """Width of the residual stream."""
    num_layers: Annotated[AtLeastOne, Le(MAX_LAYERS)]
    """Transformer layers of the trunk (multi-token prediction layers not counted)."""
    num_heads: Million
    """Query heads."""
    num_kv_heads: Million
    """Key/value heads (grouped-query attention)."""
    head_dim: Annotated[Million, MultipleOf(2)]
    """Width of one head."""
    num_dense_layers: NotNegativeInt = 0
    """Leading layers with a dense feed-forward network instead of experts."""
    dense_ffn_dim: FfnWidth = 0
    """Inner width of dense feed-forward layers (also of a dense multi-token prediction layer)."""
    num_experts: Annotated[NotNegativeInt, Le(100_000)] = 128
    """Routed experts of a layer; 0: every layer is dense."""
    num_experts_per_token: NotNegativeInt = 8
    """Routed experts that each token visits (top-k)."""
    num_expert_groups: AtLeastOne = 1
    """Equal groups of a layer's experts, in their order (node-limited routing, DeepSeek-V3, arXiv 2412.19437,
    section 2.1.2); 1: none.  A group's score is the sum of its two best, selection bias included."""
    num_groups_per_token: AtLeastOne = 1
    """Groups with the best scores, among whose experts each token's are chosen."""
    num_shared_experts: Annotated[NotNegativeInt, Le(1_000_000)] = 1
    """Experts that every token visits."""
    expert_ffn_dim: FfnWidth = 1280
    """Inner width of one expert."""
    router_score: Literal["sigmoid", "softmax"] = "sigmoid"
    """What turns the router's logits into scores: sigmoid each (DeepSeek-V3), or softmax over all experts."""
    norm_topk_prob: bool = True
    """Whether the scores of a token's chosen experts are divided by their sum."""
    router_bias: bool = True
    """Whether a bias that is added for the choice only balances the experts (arXiv 2408.15664); needs
    router_score sigmoid."""
    routed_scaling_factor: AboveZero = 1.0
    """Factor on the weights of the chosen experts."""
    router_bias_update_rate: NotNegative = 1e-3
    """Step of the router's selection bias per optimizer step (arXiv 2408.15664); 0 freezes it."""
    seq_aux_loss_coeff: NotNegative = 1e-4
    """Weight of the sequence-level load-balancing loss (DeepSeek-V3, arXiv 2412.19437, eq. 17)."""
    attention_pattern: Annotated[str, MinLen(1)] = "G"
    """Repeating pattern of layers: L = sliding window, G = global, D = linear attention."""
    sliding_window_tokens: Annotated[NotNegativeInt, Le(MAX_SEQ_LEN)] = 0
    """Window of L layers, in tokens, the current one included; 0 where the pattern has no L."""
    layer_windows: tuple[NotNegativeInt, ...] = ()
    """Window of every trunk layer, where L layers differ (K-EXAONE 2.0), 0 for G layers; empty: all L layers
    have sliding_window_tokens."""
    rope_on_global: bool = True
    """Whether global layers rotate queries and keys; False = NoPE."""
    rope_theta: AboveZero = 1e6
    """Base of the rotary frequencies."""
    local_rope_theta: AboveZero | None = None
    """Base of the rotary frequencies of sliding layers; None = that of global ones."""
    rope_share: Annotated[float, Gt(0), Le(1)] = 1.0
    """Share of a head's channels that rotate, the first ones; the others have no position."""
    yarn: YarnConfig | None = None
    """Rotary scaling beyond the original context; None = plain RoPE."""
    llama3_rope: Llama3RopeConfig | None = None
    """Rotary scaling as Llama 3.1 has it, in the place of YaRN; None = none."""
    linear_rope_factor: Divisor | None = None
    """Divisor of all rotary frequencies (of global layers, where local_rope_theta is given), in the place of
    YaRN; None = none."""
    qkv_bias: bool = False
    """Whether the query, key and value projections have a bias."""
    qk_norm: bool = False
    """RMSNorm over each head of queries and keys, before RoPE."""
    norm_eps: AboveZero = 1e-5
    """Epsilon of every RMSNorm."""
    zero_centered_norms: bool = False
    """Whether every RMSNorm multiplies by 1 + its weight."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    """What the gate of feed-forward networks passes through; gelu_tanh = GELU by its tanh approximation."""
    swiglu_limits: tuple[NotNegative, ...] = ()
    """Bound of every trunk layer's gate and up projections, of experts too, before the activation
    (K-EXAONE 2.0): the gate is at most that, the up projection within both signs of it; 0: none.  Empty: no
    layer has one."""
    block_norms: Literal["pre", "post", "both"] = "pre"
    """Where a layer normalises: pre = the input of attention and feed-forward network; post = their output,
    before it is added to the residual; both = input and output."""
    embedding_multiplier: AboveZero = 1.0
    """Factor on embeddings, as in maximal update parametrisation (arXiv 2203.03466)."""
    attention_multiplier: AboveZero | None = None
    """Factor on the products of queries and keys; None = 1 / sqrt(head_dim)."""
    residual_multiplier: AboveZero = 1.0
    """Factor on what attention and feed-forward network add to the residual."""
    logits_multiplier: AboveZero = 1.0
    """Factor on the output head's logits."""
    logits_softcap: AboveZero | None = None
    """Cap on the output head's logits, cap * tanh(x / cap), behind the factor on them and before any
    temperature; None = none."""
    tied_embeddings: bool = False
    """Whether the output head is the embedding matrix."""
    num_mtp_layers: Annotated[NotNegativeInt, Le(1)] = 0
    """Multi-token prediction layers after the trunk (DeepSeek-V3 form)."""
    mtp_experts: bool = False
    """Whether the multi-token prediction layer has experts as the trunk's layers have; False: it is dense."""
    mtp_attention: Literal["G", "L"] = "G"
    """Attention of the multi-token prediction layer: G = global (rotated as other global layers are),
    L = sliding window, of sliding_window_tokens."""
    mtp_depths: Annotated[AtLeastOne, Le(MAX_DEPTHS)] = 1
    """Applications of the multi-token prediction layer, each one token further ahead (K-EXAONE 2.0: 4)."""
    mtp_loss_coeff: NotNegative = 0.05
    """Weight of the multi-token prediction loss."""
    max_position_tokens: Annotated[AtLeastOne, Le(MAX_SEQ_LEN)] = 131072
    """Longest context the model claims, in tokens."""
    latent_attention: LatentAttentionConfig | None = None
    """Sizes of multi-head latent attention; None: attention has queries, keys and values of its own."""
    linear_attention: LinearAttentionConfig | None = None
    """Sizes of linear attention, of D layers; None: there are none."""
    attention_output_gate: bool = False
    """Whether what each head of other layers attends to is multiplied by the sigmoid of a projection of the
    layer's input (Solar Open 2; arXiv 2505.06708)."""
    audio_tokens: IdBlock | None = None
    """Ids of discrete sound; None: the vocabulary has none."""
    image_tokens: IdBlock | None = None
    """Ids of discrete pictures; None: the vocabulary has none."""
    vision: VisionEncoderConfig | None = None
    """Encoder of pictures whose features are put over placeholders' embeddings; None: there is none."""
    audio: AudioEncoderConfig | None = None
    """The same of sounds."""
    init_std: AboveZero = 0.02
    """Standard deviation of initial weights; matrices that write to the residual get it /
    sqrt(2 * num_layers)."""

    def layer_types(self) -> list[LayerType]:
        pattern = self.attention_pattern or "G"
        return [LAYER_TYPES.get(pattern[i % len(pattern)], "full_attention") for i in range(self.num_layers)]

    def num_linear_layers(self) -> int:
        """Return how many trunk layers have linear attention."""
        return self.layer_types().count("linear_attention")

    def state_tokens(self) -> int:
        """Return how many tokens' keys and values take as much memory, in 2 bytes a number, as the states of
        linear layers in 4; 0 where there are none, or no layer keeps keys."""
        linear = self.num_linear_layers()
        latent, of_one = self.latent_attention, 2 * self.num_kv_heads * self.head_dim
        keys = (self.num_layers - linear) * (of_one if latent is None else latent.cached_dim)
        if self.linear_attention is None or not keys:
            return 0
        return -(-2 * linear * self.linear_attention.kept_size // keys)

    def mtp_layer_type(self) -> LayerType:
        return "sliding_attention" if self.mtp_attention == "L" else "full_attention"

    def windows(self) -> list[int]:
        """Return the sliding window of every trunk layer, in tokens; 0: none."""
        return [*self.layer_windows] or [
            self.sliding_window_tokens if kind == "sliding_attention" else 0 for kind in self.layer_types()]

    def mtp_window(self) -> int:
        """Return the sliding window of the multi-token prediction layer, in tokens; 0: none."""
        return self.sliding_window_tokens if self.mtp_attention == "L" else 0

    def limits(self) -> list[float]:
        """Return the bound of every trunk layer's gate and up projections; 0: none."""
        return [*self.swiglu_limits] or [0.0] * self.num_layers

    def at_depth(self, num_layers: int) -> dict[str, Any]:
        """Return the settings of a trunk of so many layers: its windows are those of the first layers, begun
        anew behind the last one, and its bounds are spread over it as they are here."""
        found: dict[str, Any] = {"num_layers": num_layers}
        if self.layer_windows:
            windows = tuple(self.layer_windows[i % self.num_layers] for i in range(num_layers))
            found |= {"layer_windows": windows,
                      "attention_pattern": shortest_pattern("".join("GL"[window > 0] for window in windows))}
        if self.swiglu_limits:  # counted from the end: late layers have them
            found["swiglu_limits"] = tuple(self.swiglu_limits[-1 - i * self.num_layers // num_layers]
                                           for i in reversed(range(num_layers)))
        return found

    @property
    def num_predictions(self) -> int:
        """Tokens beyond the next one that training predicts: applications of prediction layers."""
        return self.num_mtp_layers * self.mtp_depths

    def rotates(self) -> bool:
        """Return whether a layer has positions, by rotation."""
        letters = self.attention_pattern + self.mtp_attention * bool(self.num_mtp_layers)
        return "L" in letters or (self.rope_on_global and "G" in letters)

    def rotated_channels(self) -> int:
        latent = self.latent_attention
        return latent.qk_rope_head_dim if latent is not None else round(self.head_dim * self.rope_share)

    @property
    def has_query_latent(self) -> bool:
        """Whether queries are made of a narrow vector."""
        return self.latent_attention is not None and self.latent_attention.q_lora_rank is not None

    @property
    def has_whole_queries(self) -> bool:
        """Whether the queries of latent attention are made of the layer's input."""
        return self.latent_attention is not None and self.latent_attention.q_lora_rank is None

    @property
    def is_multimodal(self) -> bool:
        """Whether it reads or writes pictures or sounds."""
        parts = (self.vision, self.audio, self.image_tokens, self.audio_tokens)
        return any(part is not None for part in parts)

    def norms_per_layer(self) -> int:
        """Return how many RMSNorms a layer has over the residual's width."""
        return 4 if self.block_norms == "both" else 2

    def num_moe_layers(self) -> int:
        """Return how many trunk layers have experts: all after the leading dense ones, or none."""
        return self.num_layers - self.num_dense_layers if self.num_experts else 0

    def num_mtp_moe_layers(self) -> int:
        """Return how many multi-token prediction layers have experts."""
        return self.num_mtp_layers if self.mtp_experts else 0

    def has_dense_layers(self) -> bool:
        """Return whether any layer, of the trunk or for prediction, has a dense feed-forward network."""
        return self.num_moe_layers() < self.num_layers or self.num_mtp_layers > self.num_mtp_moe_layers()

    def problems(self) -> list[SettingsProblem]:
        """Return every rule that the architecture breaks; its sizes lie within their bounds."""
        experts, layers = self.num_experts, self.num_layers
        groups, kept = self.num_expert_groups, self.num_groups_per_token
        of_groups = experts % groups == 0 and experts >= 2 * groups
        within = kept * experts // groups
        has_window = self.sliding_window_tokens > 0
        found = self._position_problems() + self._list_problems() + self._linear_problems()
        return found + self._media_problems() + find_broken(
            self, "model",
            (self.num_heads % self.num_kv_heads == 0, "num_kv_heads",
             f"must divide model.num_heads = {self.num_heads}"),
            (self.num_dense_layers <= layers, "num_dense_layers",
             f"must be at most model.num_layers = {layers}"),
            (not self.has_dense_layers() or self.dense_ffn_dim > 0, "dense_ffn_dim",
             "must be above 0 for dense and multi-token prediction layers"),
            (not self.num_moe_layers() or 0 < self.num_experts_per_token <= experts, "num_experts_per_token",
             f"must lie between 1 and model.num_experts = {experts}"),
            (not (self.router_bias and self.num_moe_layers()) or self.router_score == "sigmoid",
             "router_bias", f"needs model.router_score = sigmoid, it is {self.router_score}"),
            (not self.num_mtp_moe_layers() or self.num_moe_layers() > 0, "mtp_experts",
             "needs a trunk with experts, and none of its layers has any", "set it to false"),
            (kept <= groups, "num_groups_per_token", f"must be at most model.num_expert_groups = {groups}"),
            (kept > groups or groups == 1 or of_groups, "num_expert_groups",
             f"must divide model.num_experts = {experts} into groups of at least two"),
            (kept > groups or groups == 1 or not of_groups or within >= self.num_experts_per_token,
             "num_groups_per_token", f"leaves {within} experts to choose from, and "
             f"model.num_experts_per_token = {self.num_experts_per_token} must not be more"),
            (set(self.attention_pattern) <= {*LAYER_TYPES}, "attention_pattern",
             f"may hold only the letters {', '.join(LAYER_TYPES)}"),
            (("L" in self.attention_pattern) == has_window, "sliding_window_tokens",
             f"must be above 0 exactly when model.attention_pattern = {self.attention_pattern} has an L"),
            (not self.num_mtp_layers or self.mtp_attention != "L" or has_window, "mtp_attention",
             "needs model.sliding_window_tokens > 0"),
            (experts * layers <= MAX_EXPERTS, "num_experts", f"x model.num_layers {layers} must be at most "
             f"{MAX_EXPERTS:,} experts", "count their zeros"))

    def _linear_problems(self) -> list[SettingsProblem]:
        """Return what is wrong with linear attention and with gates."""
        linear, has_layers = self.linear_attention, "D" in self.attention_pattern
        p = find_broken(
            self, "model",
            (has_layers == (linear is not None), "linear_attention",
             f"must be given exactly when model.attention_pattern = {self.attention_pattern} has a D"),
            (not has_layers or self.block_norms != "post", "block_norms",
             "cannot be post beside linear attention, whose layers normalise before"),
            (not self.attention_output_gate or self.latent_attention is None, "attention_output_gate",
             "is not built for model.latent_attention", "set it to false"),
            (not (self.attention_output_gate and self.qkv_bias), "attention_output_gate",
             "cannot be with model.qkv_bias = true: no family has a bias of the gate", "set it to false"))
        if linear is None:
            return p
        return p + find_broken(
            linear, "model.linear_attention",
            (linear.num_value_heads == linear.num_key_heads, "num_value_heads",
             f"must be num_key_heads = {linear.num_key_heads}"))

    def _list_problems(self) -> list[SettingsProblem]:
        """Return what is wrong with settings of single layers."""
        slides = [kind == "sliding_attention" for kind in self.layer_types()]
        length = f"must have an entry for each of model.num_layers = {self.num_layers}"
        empty = "set it to []"
        return find_broken(
            self, "model",
            (len(self.layer_windows) in (0, self.num_layers), "layer_windows", length, empty),
            (len(self.layer_windows) != self.num_layers or [w > 0 for w in self.layer_windows] == slides,
             "layer_windows", "must be above 0 exactly in layers that model.attention_pattern calls L",
             empty),
            (len(self.swiglu_limits) in (0, self.num_layers), "swiglu_limits", length, empty))

    def _position_problems(self) -> list[SettingsProblem]:
        """Return what is wrong with rotations, their scaling, and attention that is latent."""
        yarn, llama3, latent = self.yarn, self.llama3_rope, self.latent_attention
        p = find_broken(
            self, "model",
            (self.rope_share == 1 or not self.head_dim * self.rope_share % 2, "rope_share",
             f"must give an even number of channels of model.head_dim = {self.head_dim}"),
            (self.local_rope_theta is None or (yarn is None and llama3 is None), "local_rope_theta",
             "needs plain rotations", "set model.yarn and model.llama3_rope to null"),
            (yarn is None or self.rope_share == 1, "rope_share", "must be 1 with model.yarn",
             "set model.yarn to null"),
            (self.linear_rope_factor is None or (yarn is None and llama3 is None), "linear_rope_factor",
             "stands beside model.yarn or model.llama3_rope, and a model has one rotary scaling at most",
             "set the others to null"),
            (yarn is None or self.rope_theta > 1, "rope_theta", "must be above 1 with model.yarn"),
            (yarn is None or yarn.mscale == 1 or latent is not None, "yarn.mscale",
             "needs model.latent_attention", "set it to 1"))
        if llama3 is not None:
            p += find_broken(
                llama3, "model.llama3_rope",
                (llama3.low_freq_factor < llama3.high_freq_factor, "low_freq_factor",
                 f"must be below model.llama3_rope.high_freq_factor = {llama3.high_freq_factor:g}"),
                (yarn is None, "factor", "stands beside model.yarn, and a model has one rotary scaling at "
                 "most", "set one of them to null"))
        if latent is None:
            return p
        plain = {"qkv_bias": False, "qk_norm": False, "rope_share": 1.0, "llama3_rope": None,
                 "local_rope_theta": None, "zero_centered_norms": False, "attention_multiplier": None}
        return p + find_broken(
            self, "model",
            (self.head_dim == latent.query_dim, "head_dim",
             f"must be model.latent_attention.qk_nope_head_dim {latent.qk_nope_head_dim} + qk_rope_head_dim "
             f"{latent.qk_rope_head_dim} = {latent.query_dim}"),
            (self.num_kv_heads == self.num_heads, "num_kv_heads", f"must be model.num_heads = "
             f"{self.num_heads} under model.latent_attention, which has keys and values for every head"),
            (self.block_norms == "pre", "block_norms",
             "must be pre with model.latent_attention, which normalises its input"),
            ("L" not in self.attention_pattern + self.mtp_attention, "attention_pattern",
             "cannot be with model.latent_attention, which has no sliding windows",
             "set model.attention_pattern and model.mtp_attention to G"),
            *((getattr(self, name) == value, name, "is not built for model.latent_attention",
               f"set it to {show(value)}") for name, value in plain.items()))

    def _media_problems(self) -> list[SettingsProblem]:
        """Return what is wrong with ids of media and with encoders."""
        found = {name: block for name in ("audio_tokens", "image_tokens")
                 if (block := getattr(self, name)) is not None}
        p = find_broken(self, "model", *(
            (block.end <= self.vocab_size, name, "must lie within model.vocab_size = "
             f"{self.vocab_size}") for name, block in found.items()))
        for (one, first), (other, second) in pairwise(sorted(found.items(), key=lambda item: item[1].first)):
            if first.end > second.first:
                p.append(SettingsProblem(ProblemCode.RULE, f"model.{one}",
                                         f"reaches up to {first.end} and model.{other} "
                                         f"begins at {second.first}; blocks must not overlap"))
        encoders = [encoder for encoder in (self.vision, self.audio) if encoder is not None]
        for encoder in encoders:
            p += encoder.problems(self.vocab_size)
        # A set per encoder first: an encoder may repeat its ids, two encoders may not share one.
        ids = [i for encoder in encoders for i in {*encoder.placeholder_ids}]
        if len(ids) > len({*ids}):
            p.append(SettingsProblem(ProblemCode.RULE, "model.vision.placeholder_ids",
                                     "has ids that model.audio."
                                     "placeholder_ids has too, and an id stands for a picture's feature or a "
                                     "sound's"))
        return p
