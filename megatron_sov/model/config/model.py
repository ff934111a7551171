"""Model architecture settings: layer sizes, expert routing, attention and position encodings (no torch)."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen, MultipleOf

from megatron_sov.base.settings import (
    AboveZero, ActsWhen, AtLeastOne, NotNegative, NotNegativeInt, ProblemCode, SettingsProblem,
    find_broken_rules, is_one_of, is_set)
from megatron_sov.base.settings.problem import format_setting
from megatron_sov.model.config.bounds import MAX_LAYERS, MAX_SEQ_LEN
from megatron_sov.model.config.encoders import AudioEncoderConfig, VisionEncoderConfig

Width = Annotated[int, Ge(1), Le(1_000_000)]
Million = Annotated[int, Ge(1), Le(1_000_000)]
FfnWidth = Annotated[int, Ge(0), Le(100_000_000)]
Divisor = Annotated[float, Ge(1), Lt(math.inf)]
LayerType = Literal["sliding_attention", "full_attention", "linear_attention"]

MAX_DEPTHS = 64
"""Limit for `mtp_depths`; every depth costs a forward pass through prediction layer and output head."""
MAX_EXPERTS = 1_000_000
"""Limit for experts in all layers together; every expert has separate tensors in a Hugging Face folder."""
QUANTILE_BINS = 1000
"""Bins per expert for `router_bias_update=quantile`."""
LAYER_TYPES: dict[str, LayerType] = {"L": "sliding_attention", "G": "full_attention", "D": "linear_attention"}
"""Letter in `attention_pattern` -> transformers' name in `layer_types`."""


@dataclass(frozen=True)
class IdBlock:
    """Consecutive token ids for a codebook (discrete audio or image tokens): code `i` has token id `first +
    i`."""

    first: NotNegativeInt
    """Token id for code 0."""
    size: AtLeastOne
    """Codebook size."""

    @property
    def end(self) -> int:
        """First token id after the block."""
        return self.first + self.size


@dataclass(frozen=True)
class LatentAttentionConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1). All heads' keys and values
    are projected from a latent vector with width `kv_lora_rank`; a rotated key with width `qk_rope_head_dim`,
    shared by all heads, carries the position."""

    kv_lora_rank: Width
    """Latent vector width for keys and values."""
    qk_nope_head_dim: Width
    """Query and key channels per head without rotary position."""
    qk_rope_head_dim: Annotated[Width, MultipleOf(2)]
    """Query and key channels per head with rotary position; all heads share the rotated key. Must be even."""
    v_head_dim: Width
    """Value channels per head."""
    q_lora_rank: Width | None = None
    """Latent vector width for queries. None: queries are projected from the layer's input directly."""

    @property
    def query_dim(self) -> int:
        """Query and key channels per head: `qk_nope_head_dim + qk_rope_head_dim`."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cached_dim(self) -> int:
        """Values per token and layer in the generation cache, for all heads together."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclass(frozen=True)
class LinearAttentionConfig:
    """Linear attention (Kimi Delta Attention, arXiv 2510.26692). Each value head keeps a state
    `[key_head_dim, value_head_dim]` whose size does not grow with the sequence."""

    num_key_heads: Annotated[int, Ge(1), Le(1_000_000)]
    """Query and key heads."""
    num_value_heads: Annotated[int, Ge(1), Le(1_000_000)]
    """Value heads; must equal `num_key_heads`."""
    key_head_dim: Width
    """Channels per query and key head."""
    value_head_dim: Width
    """Channels per value head."""
    gate_rank: Width
    """Rank for two low-rank projections: the decay per key channel, and the output gate."""
    conv_taps: Annotated[int, Ge(1), Le(64)] = 4
    """Kernel size, in tokens, for the causal convolution over queries, keys and values; includes the current
    token."""
    negative_eigenvalues: bool = False
    """Let the delta rule's learning rate reach 2 instead of 1, so that a state can reverse its content along
    a key (arXiv 2411.12537; used by Solar Open 2)."""

    @property
    def projected(self) -> tuple[int, int, int, int]:
        """Output channels of `in_proj` per head: (query, key, value, learning rate)."""
        return (self.key_head_dim, self.key_head_dim, self.value_head_dim, 1)

    @property
    def convolved_channels(self) -> int:
        """Convolved channels per head: query, key and value."""
        return sum(self.projected[:3])

    @property
    def state_size(self) -> int:
        """Values in a layer's recurrent state, all heads together."""
        return self.num_value_heads * self.key_head_dim * self.value_head_dim

    @property
    def cached_size(self) -> int:
        """Values per sequence and layer in the generation cache: the state, and the last `conv_taps - 1`
        inputs of the convolution."""
        return self.state_size + (self.conv_taps - 1) * self.num_key_heads * self.convolved_channels

    @property
    def products_per_token(self) -> int:
        """Multiplications per token outside the projections: reading, decaying, writing and querying the
        state (4 passes), and the convolution."""
        return 4 * self.state_size + self.conv_taps * self.num_key_heads * self.convolved_channels


@dataclass(frozen=True)
class YarnConfig:
    """YaRN rotary scaling (arXiv 2309.00071); fields have their transformers names."""

    factor: AboveZero = 2.0
    """Context length after scaling, divided by `original_max_position_tokens`."""
    original_max_position_tokens: AtLeastOne = 65536
    """Context length before scaling, in tokens."""
    beta_fast: AboveZero = 32.0
    """Channels that rotate more often than this within the original context keep their frequency."""
    beta_slow: AboveZero = 1.0
    """Channels that rotate less often than this within the original context are fully interpolated."""
    mscale: AboveZero = 1.0
    """Factor on 0.1 ln(`factor`) in the softmax scale (DeepSeek's `mscale` and `mscale_all_dim`, which must
    be equal). Values other than 1 need `model.latent_attention`."""


@dataclass(frozen=True)
class Llama3RopeConfig:
    """Llama 3.1's rotary scaling; fields have their transformers names (`rope_type: llama3`)."""

    factor: Divisor = 8.0
    """Divisor for frequencies with long wavelengths."""
    low_freq_factor: AboveZero = 1.0
    """Wavelengths above `original_max_position_tokens / low_freq_factor` are divided by the full `factor`."""
    high_freq_factor: AboveZero = 4.0
    """Wavelengths below `original_max_position_tokens / high_freq_factor` keep their frequency."""
    original_max_position_tokens: AtLeastOne = 8192
    """Context length before scaling, in tokens."""


def shortest_pattern(letters: str) -> str:
    """Return the shortest prefix whose repetition yields `letters`, one letter per layer."""
    for length in range(1, len(letters) + 1):
        repeated = letters[:length] * math.ceil(len(letters) / length)
        if repeated[:len(letters)] == letters:
            return letters[:length]
    return "G"


@dataclass(frozen=True)
class ModelConfig:
    """Model architecture. `family` selects the mapping to Hugging Face names
    (`megatron_sov/model/families`)."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        "num_dense_layers num_experts_per_token num_expert_groups num_groups_per_token num_shared_experts "
        "expert_ffn_dim router_score norm_topk_prob router_bias routed_scaling_factor "
        "router_bias_update_rate router_bias_update seq_aux_loss_coeff mtp_experts": is_set(".num_experts"),
        "router_bias_update_rate router_bias_update": is_set(".router_bias"),
        "router_bias_update_rate": is_one_of(".router_bias_update", "sign"),
        "local_rope_theta": is_set(".sliding_window_tokens"),
        "mtp_experts mtp_attention mtp_depths mtp_loss_coeff": is_set(".num_mtp_layers")}

    family: str
    """Model family; equals `model_type` in a Hugging Face config.json."""
    vocab_size: Annotated[AtLeastOne, Le(100_000_000)]
    """Vocabulary size, reserved token ids included."""
    hidden_size: Annotated[AtLeastOne, Le(10_000_000)]
    """Residual stream width."""
    num_layers: Annotated[AtLeastOne, Le(MAX_LAYERS)]
    """Transformer layers, without multi-token prediction layers."""
    num_heads: Million
    """Query heads."""
    num_kv_heads: Million
    """Key/value heads (grouped-query attention)."""
    head_dim: Annotated[Million, MultipleOf(2)]
    """Channels per attention head."""
    num_dense_layers: NotNegativeInt = 0
    """First layers with a dense feed-forward network instead of experts."""
    dense_ffn_dim: FfnWidth = 0
    """Inner width for dense feed-forward networks, including a dense multi-token prediction layer."""
    num_experts: Annotated[NotNegativeInt, Le(100_000)] = 128
    """Routed experts per layer. 0: all layers are dense."""
    num_experts_per_token: NotNegativeInt = 8
    """Routed experts per token (top-k)."""
    num_expert_groups: AtLeastOne = 1
    """Equal groups of consecutive experts for group-limited routing (DeepSeek-V3, arXiv 2412.19437, section
    2.1.2). A group's score is the sum of its two best expert scores, selection bias included. 1: no
    groups."""
    num_groups_per_token: AtLeastOne = 1
    """Best-scoring groups from which a token's experts are chosen."""
    num_shared_experts: Annotated[NotNegativeInt, Le(1_000_000)] = 1
    """Shared experts, which process every token."""
    expert_ffn_dim: FfnWidth = 1280
    """Inner width for a routed or shared expert."""
    router_score: Literal["sigmoid", "softmax"] = "sigmoid"
    """Function from router logits to scores: sigmoid per expert (DeepSeek-V3), or softmax over all
    experts."""
    norm_topk_prob: bool = True
    """Divide a token's chosen expert scores by their sum."""
    router_bias: bool = True
    """Balance expert load with a bias that only affects which experts are chosen (arXiv 2408.15664). Needs
    `router_score=sigmoid`."""
    routed_scaling_factor: AboveZero = 1.0
    """Factor on the chosen experts' combine weights."""
    router_bias_update_rate: NotNegative = 1e-3
    """Change in the selection bias per optimizer step (arXiv 2408.15664). 0 freezes the bias."""
    router_bias_update: Literal["sign", "quantile"] = "sign"
    """`sign`: a step changes the selection bias by `router_bias_update_rate`. `quantile`: a step sets the
    bias that would have given each expert an equal share of its global batch (Megatron-LM pull request 6637),
    and `router_bias_update_rate` is not used."""
    seq_aux_loss_coeff: NotNegative = 1e-4
    """Sequence-level load-balancing loss weight (DeepSeek-V3, arXiv 2412.19437, equation 17)."""
    attention_pattern: Annotated[str, MinLen(1)] = "G"
    """Repeating pattern, one letter per layer: L = sliding window, G = global attention, D = linear
    attention."""
    sliding_window_tokens: Annotated[NotNegativeInt, Le(MAX_SEQ_LEN)] = 0
    """Window for L layers in tokens, current token included. Must be 0 if the pattern has no L."""
    layer_windows: tuple[NotNegativeInt, ...] = ()
    """Window for every layer in tokens, if L layers differ (K-EXAONE 2.0); 0 for G layers. Empty: L layers
    use `sliding_window_tokens`."""
    rope_on_global: bool = True
    """Rotate queries and keys in G layers. False: G layers have no position encoding (NoPE)."""
    rope_theta: AboveZero = 1e6
    """RoPE base."""
    local_rope_theta: AboveZero | None = None
    """RoPE base in L layers. None: `rope_theta`."""
    rope_share: Annotated[float, Gt(0), Le(1)] = 1.0
    """Share of head channels that rotate, counted from the first channel."""
    yarn: YarnConfig | None = None
    """YaRN scaling for contexts beyond the original length. None: plain RoPE."""
    llama3_rope: Llama3RopeConfig | None = None
    """Llama 3.1 rotary scaling; cannot be combined with `model.yarn`. None: off."""
    linear_rope_factor: Divisor | None = None
    """Divisor for all rotary frequencies; cannot be combined with `model.yarn`. With `local_rope_theta`, only
    G layers are scaled. None: off."""
    qkv_bias: bool = False
    """Add a bias to the query, key and value projections."""
    qk_norm: bool = False
    """Apply RMSNorm to every query and key head before RoPE."""
    norm_eps: AboveZero = 1e-5
    """Epsilon in every RMSNorm."""
    zero_centered_norms: bool = False
    """Scale RMSNorm outputs by 1 + weight instead of the weight (Gemma)."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    """Activation for the gate projection in feed-forward networks; gelu_tanh is GELU's tanh approximation."""
    swiglu_limits: tuple[NotNegative, ...] = ()
    """Clamp per layer for gate and up projections before the activation, experts included (K-EXAONE 2.0):
    gate <= limit, -limit <= up <= limit. 0: no clamp in that layer. Empty: no clamp."""
    block_norms: Literal["pre", "post", "both"] = "pre"
    """RMSNorm position around attention and feed-forward network. pre: on the input; post: on the output,
    before the residual addition; both: on input and output."""
    embedding_multiplier: AboveZero = 1.0
    """Factor on embeddings, as in maximal update parametrisation (arXiv 2203.03466)."""
    attention_multiplier: AboveZero | None = None
    """Factor on query-key products. None: 1 / sqrt(`head_dim`)."""
    residual_multiplier: AboveZero = 1.0
    """Factor on attention and feed-forward outputs before the residual addition."""
    logits_multiplier: AboveZero = 1.0
    """Factor on logits."""
    logits_softcap: AboveZero | None = None
    """Limit for logits: cap * tanh(logits / cap), applied after `logits_multiplier` and before any
    temperature. None: off."""
    tied_embeddings: bool = False
    """Use the embedding matrix as the output head."""
    num_mtp_layers: Annotated[NotNegativeInt, Le(1)] = 0
    """Multi-token prediction layers after the last transformer layer (DeepSeek-V3 form); 0 or 1."""
    mtp_experts: bool = False
    """Give the multi-token prediction layer experts, with the same sizes as other layers. False: dense."""
    mtp_attention: Literal["G", "L"] = "G"
    """Attention in the multi-token prediction layer: G = global, L = sliding window
    (`sliding_window_tokens`)."""
    mtp_depths: Annotated[AtLeastOne, Le(MAX_DEPTHS)] = 1
    """How often the multi-token prediction layer is applied; every application predicts a token further ahead
    (K-EXAONE 2.0: 4)."""
    mtp_loss_coeff: NotNegative = 0.05
    """Multi-token prediction loss weight."""
    max_position_tokens: Annotated[AtLeastOne, Le(MAX_SEQ_LEN)] = 131072
    """Longest supported context, in tokens."""
    latent_attention: LatentAttentionConfig | None = None
    """Multi-head latent attention. None: standard attention."""
    linear_attention: LinearAttentionConfig | None = None
    """Linear attention in D layers. None: the model has no D layers."""
    attention_output_gate: bool = False
    """Multiply every attention head's output by a sigmoid gate projected from the layer's input (Solar Open
    2; arXiv 2505.06708). D layers are not affected."""
    audio_tokens: IdBlock | None = None
    """Token ids for discrete audio. None: the vocabulary has no audio tokens."""
    image_tokens: IdBlock | None = None
    """Token ids for discrete images. None: the vocabulary has no image tokens."""
    vision: VisionEncoderConfig | None = None
    """Image encoder whose features replace placeholder token embeddings. None: no image encoder."""
    audio: AudioEncoderConfig | None = None
    """Audio encoder whose features replace placeholder token embeddings. None: no audio encoder."""
    init_std: AboveZero = 0.02
    """Initial weights' standard deviation. Matrices that write to the residual stream use `init_std` / sqrt(2
    * `num_layers`)."""

    def layer_types(self) -> list[LayerType]:
        pattern = self.attention_pattern or "G"
        return [LAYER_TYPES.get(pattern[i % len(pattern)], "full_attention") for i in range(self.num_layers)]

    def num_linear_layers(self) -> int:
        return self.layer_types().count("linear_attention")

    def count_state_tokens(self) -> int:
        """Return how many cached tokens take as much memory (bf16 keys and values) as the float32 states in
        all linear layers. 0 if the model has no linear layers, or no layer caches keys."""
        num_linear, latent = self.num_linear_layers(), self.latent_attention
        layer_cache = 2 * self.num_kv_heads * self.head_dim if latent is None else latent.cached_dim
        token_cache = (self.num_layers - num_linear) * layer_cache
        if self.linear_attention is None or not token_cache:
            return 0
        # A float32 state value takes as many bytes as two bf16 values; rounded up.
        return -(-2 * num_linear * self.linear_attention.cached_size // token_cache)

    def mtp_layer_type(self) -> LayerType:
        return "sliding_attention" if self.mtp_attention == "L" else "full_attention"

    def windows(self) -> list[int]:
        """Return the sliding window for every layer in tokens; 0 for layers without a window."""
        return [*self.layer_windows] or [
            self.sliding_window_tokens if kind == "sliding_attention" else 0 for kind in self.layer_types()]

    def mtp_window(self) -> int:
        """Return the multi-token prediction layer's window in tokens; 0 without a window."""
        return self.sliding_window_tokens if self.mtp_attention == "L" else 0

    def limits(self) -> list[float]:
        """Return the SwiGLU clamp for every layer; 0 for layers without a clamp."""
        return [*self.swiglu_limits] or [0.0] * self.num_layers

    def fields_for_depth(self, num_layers: int) -> dict[str, Any]:
        """Return `ModelConfig` fields for a model with `num_layers` layers. `layer_windows` repeats from the
        first layer; `swiglu_limits` is resampled over the new depth."""
        fields: dict[str, Any] = {"num_layers": num_layers}
        if self.layer_windows:
            windows = tuple(self.layer_windows[i % self.num_layers] for i in range(num_layers))
            letters = "".join("L" if window else "G" for window in windows)
            fields |= {"layer_windows": windows, "attention_pattern": shortest_pattern(letters)}
        if self.swiglu_limits:
            # Resample from the end: published models clamp their last layers.
            fields["swiglu_limits"] = tuple(self.swiglu_limits[-1 - i * self.num_layers // num_layers]
                                            for i in reversed(range(num_layers)))
        return fields

    @property
    def num_predictions(self) -> int:
        """Tokens beyond the next token that training predicts: `num_mtp_layers * mtp_depths`."""
        return self.num_mtp_layers * self.mtp_depths

    def rotates(self) -> bool:
        """Return whether any layer applies RoPE."""
        letters = self.attention_pattern
        if self.num_mtp_layers:
            letters += self.mtp_attention
        return "L" in letters or (self.rope_on_global and "G" in letters)

    def rotated_channels(self) -> int:
        latent = self.latent_attention
        return latent.qk_rope_head_dim if latent is not None else round(self.head_dim * self.rope_share)

    @property
    def has_query_latent(self) -> bool:
        """Whether queries are projected from a latent vector (`q_lora_rank`)."""
        return self.latent_attention is not None and self.latent_attention.q_lora_rank is not None

    @property
    def has_whole_queries(self) -> bool:
        """Whether latent attention projects queries from the layer's input."""
        return self.latent_attention is not None and self.latent_attention.q_lora_rank is None

    @property
    def is_multimodal(self) -> bool:
        """Whether the model reads or writes images or audio."""
        parts = (self.vision, self.audio, self.image_tokens, self.audio_tokens)
        return any(part is not None for part in parts)

    def norms_per_layer(self) -> int:
        """Count RMSNorms with width `hidden_size` per layer."""
        return 4 if self.block_norms == "both" else 2

    def num_moe_layers(self) -> int:
        """Count transformer layers with experts."""
        return self.num_layers - self.num_dense_layers if self.num_experts else 0

    def num_mtp_moe_layers(self) -> int:
        return self.num_mtp_layers if self.mtp_experts else 0

    def has_dense_layers(self) -> bool:
        """Return whether any transformer or prediction layer has a dense feed-forward network."""
        return self.num_moe_layers() < self.num_layers or self.num_mtp_layers > self.num_mtp_moe_layers()

    def problems(self) -> list[SettingsProblem]:
        """Return every violated rule between architecture settings; single values must be within bounds."""
        experts, layers = self.num_experts, self.num_layers
        groups, chosen_groups = self.num_expert_groups, self.num_groups_per_token
        has_equal_groups = experts % groups == 0 and experts >= 2 * groups
        candidates = chosen_groups * experts // groups
        has_window = self.sliding_window_tokens > 0
        problems = self._position_problems() + self._list_problems() + self._linear_problems()
        return problems + self._media_problems() + find_broken_rules(
            self, "model",
            (self.num_heads % self.num_kv_heads == 0, "num_kv_heads",
             f"must divide model.num_heads = {self.num_heads}",
             f"set model.num_heads={-(-self.num_heads // self.num_kv_heads) * self.num_kv_heads}"),
            (self.num_dense_layers <= layers, "num_dense_layers",
             f"must be at most model.num_layers = {layers}"),
            (not self.has_dense_layers() or self.dense_ffn_dim > 0, "dense_ffn_dim",
             "must be above 0 in a model with dense or multi-token prediction layers"),
            (not self.num_moe_layers() or 0 < self.num_experts_per_token <= experts, "num_experts_per_token",
             f"must be between 1 and model.num_experts = {experts}"),
            (not (self.router_bias and self.num_moe_layers()) or self.router_score == "sigmoid",
             "router_bias", f"needs model.router_score = sigmoid, not {self.router_score}"),
            (self.router_bias_update == "sign" or (
                self.router_bias and groups == 1 and self.num_experts_per_token < experts),
             "router_bias_update", "quantile needs model.router_bias, model.num_expert_groups = 1 and fewer "
             f"model.num_experts_per_token than model.num_experts = {experts}"),
            (not self.num_mtp_moe_layers() or self.num_moe_layers() > 0, "mtp_experts",
             "needs transformer layers with experts, and this model has only dense layers",
             "set it to false"),
            (chosen_groups <= groups, "num_groups_per_token",
             f"must be at most model.num_expert_groups = {groups}"),
            (chosen_groups > groups or groups == 1 or has_equal_groups, "num_expert_groups",
             f"must divide model.num_experts = {experts} into groups of at least two"),
            (chosen_groups > groups or groups == 1 or not has_equal_groups
             or candidates >= self.num_experts_per_token, "num_groups_per_token",
             f"leaves {candidates} experts to choose from, fewer than model.num_experts_per_token = "
             f"{self.num_experts_per_token}"),
            (set(self.attention_pattern) <= {*LAYER_TYPES}, "attention_pattern",
             f"may hold only the letters {', '.join(LAYER_TYPES)}"),
            (("L" in self.attention_pattern) == has_window, "sliding_window_tokens",
             f"must be above 0 exactly when model.attention_pattern = {self.attention_pattern} has an L"),
            (not self.num_mtp_layers or self.mtp_attention != "L" or has_window, "mtp_attention",
             "needs model.sliding_window_tokens > 0"),
            (experts * layers <= MAX_EXPERTS, "num_experts", f"x model.num_layers {layers} must be at most "
             f"{MAX_EXPERTS:,} experts", "count their zeros"))

    def _linear_problems(self) -> list[SettingsProblem]:
        linear, has_linear_layers = self.linear_attention, "D" in self.attention_pattern
        problems = find_broken_rules(
            self, "model",
            (has_linear_layers == (linear is not None), "linear_attention",
             f"must be set exactly when model.attention_pattern = {self.attention_pattern} has a D"),
            (not has_linear_layers or self.block_norms != "post", "block_norms",
             "cannot be post in a model with linear attention, which normalises its input"),
            (not self.attention_output_gate or self.latent_attention is None, "attention_output_gate",
             "does not support model.latent_attention", "set it to false"),
            (not (self.attention_output_gate and self.qkv_bias), "attention_output_gate",
             "does not support model.qkv_bias = true: no family has a bias on the gate", "set it to false"))
        if linear is None:
            return problems
        return problems + find_broken_rules(
            linear, "model.linear_attention",
            (linear.num_value_heads == linear.num_key_heads, "num_value_heads",
             f"must be num_key_heads = {linear.num_key_heads}"))

    def _list_problems(self) -> list[SettingsProblem]:
        """Check `layer_windows` and `swiglu_limits`, which have an entry per layer."""
        slides = [kind == "sliding_attention" for kind in self.layer_types()]
        length = f"must have one entry per layer: model.num_layers = {self.num_layers}"
        empty = "set it to []"
        return find_broken_rules(
            self, "model", (len(self.layer_windows) in (0, self.num_layers), "layer_windows", length, empty),
            (len(self.layer_windows) != self.num_layers or [w > 0 for w in self.layer_windows] == slides,
             "layer_windows", "must be above 0 exactly for the L layers of model.attention_pattern", empty),
            (len(self.swiglu_limits) in (0, self.num_layers), "swiglu_limits", length, empty))

    def _position_problems(self) -> list[SettingsProblem]:
        """Check RoPE, RoPE scaling and latent attention."""
        yarn, llama3, latent = self.yarn, self.llama3_rope, self.latent_attention
        problems = find_broken_rules(
            self, "model",
            (self.rope_share == 1 or not self.head_dim * self.rope_share % 2, "rope_share",
             f"must rotate an even number of the model.head_dim = {self.head_dim} channels"),
            (self.local_rope_theta is None or (yarn is None and llama3 is None), "local_rope_theta",
             "needs RoPE without scaling", "set model.yarn and model.llama3_rope to null"),
            (yarn is None or self.rope_share == 1, "rope_share", "must be 1 with model.yarn",
             "set model.yarn to null"),
            (self.linear_rope_factor is None or (yarn is None and llama3 is None), "linear_rope_factor",
             "cannot be combined with model.yarn or model.llama3_rope: a model has at most one rotary "
             "scaling", "set the others to null"),
            (yarn is None or self.rope_theta > 1, "rope_theta", "must be above 1 with model.yarn"),
            (yarn is None or yarn.mscale == 1 or latent is not None, "yarn.mscale",
             "needs model.latent_attention", "set it to 1"))
        if llama3 is not None:
            problems += find_broken_rules(
                llama3, "model.llama3_rope",
                (llama3.low_freq_factor < llama3.high_freq_factor, "low_freq_factor",
                 f"must be below model.llama3_rope.high_freq_factor = {llama3.high_freq_factor:g}"),
                (yarn is None, "factor", "cannot be combined with model.yarn: a model has at most one rotary "
                 "scaling", "set one of them to null"))
        if latent is None:
            return problems
        unsupported = {"qkv_bias": False, "qk_norm": False, "rope_share": 1.0, "llama3_rope": None,
                       "local_rope_theta": None, "zero_centered_norms": False, "attention_multiplier": None}
        return problems + find_broken_rules(
            self, "model",
            (self.head_dim == latent.query_dim, "head_dim",
             f"must be model.latent_attention.qk_nope_head_dim {latent.qk_nope_head_dim} + qk_rope_head_dim "
             f"{latent.qk_rope_head_dim} = {latent.query_dim}"),
            (self.num_kv_heads == self.num_heads, "num_kv_heads", f"must be model.num_heads = "
             f"{self.num_heads} with model.latent_attention, which has keys and values for every head"),
            (self.block_norms == "pre", "block_norms",
             "must be pre with model.latent_attention, which normalises its input"),
            ("L" not in self.attention_pattern + self.mtp_attention, "attention_pattern",
             "cannot have an L with model.latent_attention, which has no sliding windows",
             "set model.attention_pattern and model.mtp_attention to G"),
            *((getattr(self, name) == value, name, "does not support model.latent_attention",
               f"set it to {format_setting(value)}") for name, value in unsupported.items()))

    def _media_problems(self) -> list[SettingsProblem]:
        """Check media token ids and encoders."""
        blocks = {name: block for name in ("audio_tokens", "image_tokens")
                  if (block := getattr(self, name)) is not None}
        problems = find_broken_rules(self, "model", *(
            (block.end <= self.vocab_size, name, f"must end within model.vocab_size = {self.vocab_size}")
            for name, block in blocks.items()))
        by_first_id = sorted(blocks.items(), key=lambda item: item[1].first)
        for (name, block), (next_name, next_block) in pairwise(by_first_id):
            if block.end > next_block.first:
                problems.append(SettingsProblem(
                    ProblemCode.RULE, f"model.{name}", f"ends at {block.end} and model.{next_name} begins at "
                    f"{next_block.first}; blocks must not overlap"))
        encoders = [encoder for encoder in (self.vision, self.audio) if encoder is not None]
        for encoder in encoders:
            problems += encoder.problems(self.vocab_size)
        # An encoder may repeat an id; two encoders must not share one.
        if len(encoders) == 2 and {*encoders[0].placeholder_ids} & {*encoders[1].placeholder_ids}:
            problems.append(SettingsProblem(
                ProblemCode.RULE, "model.vision.placeholder_ids", "and model.audio.placeholder_ids share an "
                "id; a placeholder id stands for image features or for audio features, not both"))
        return problems
