"""The architecture of a model: sizes, routing, attention, positions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_sov.config.blocks import IdBlock, block_problems
from megatron_sov.config.bounds import MAX_LAYERS, MAX_SEQ_LEN, above
from megatron_sov.config.encoders import AudioEncoderConfig, VisionEncoderConfig, both_problems
from megatron_sov.config.latent import LatentAttentionConfig

STRICT = {"extra": "forbid"}
MAX_EXPERTS = 1_000_000
"""Experts of all layers: each has tensors of its own under Hugging Face names."""


@dataclass(frozen=True)
class YarnConfig:
    """YaRN rotary scaling (arXiv 2309.00071), with the field's names and meaning in transformers."""

    __pydantic_config__ = STRICT
    factor: float = 2.0
    """How many times longer than the original the context becomes."""
    original_max_position_tokens: int = 65536
    """Context length, in tokens, before scaling."""
    beta_fast: float = 32.0
    """Rotations within the original context above which a dimension is left alone."""
    beta_slow: float = 1.0
    """Rotations within the original context below which a dimension is fully interpolated."""
    truncate: bool = True
    """Whether the ends of the ramp between the two are rounded outwards to whole channels."""
    mscale: float = 1.0
    """Factor on 0.1 ln(factor) in the scale of the softmax (DeepSeek's mscale and mscale_all_dim, which are
    equal); others than 1 in models with latent attention only."""

    def problems(self, rope_theta: float) -> list[str]:
        """Return one sentence for each rule that the scaling breaks, for a base of the frequencies."""
        p = [f"model.yarn.{name} = {value} must be positive"
             for name in ("factor", "original_max_position_tokens", "beta_fast", "beta_slow", "mscale")
             if not 0 < (value := getattr(self, name)) < math.inf]
        if not rope_theta > 1:
            p.append(f"model.yarn needs model.rope_theta above 1, it is {rope_theta}")
        return p


@dataclass(frozen=True)
class Llama3RopeConfig:
    """Rotary scaling of Llama 3.1 (rope_type "llama3" of transformers, whose names and meaning these are)."""

    __pydantic_config__ = STRICT
    factor: float = 8.0
    """Divisor of the frequencies whose wavelength is long beside the original context."""
    low_freq_factor: float = 1.0
    """Wavelengths above original_max_position_tokens / low_freq_factor are divided in full."""
    high_freq_factor: float = 4.0
    """Wavelengths below original_max_position_tokens / high_freq_factor are left alone."""
    original_max_position_tokens: int = 8192
    """Context length, in tokens, before scaling."""

    def problems(self) -> list[str]:
        """Return one sentence for each rule that the scaling breaks."""
        p = []
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            p.append(f"model.llama3_rope.low_freq_factor = {self.low_freq_factor} must lie between 0 and "
                     f"model.llama3_rope.high_freq_factor = {self.high_freq_factor}")
        if not 1 <= self.factor < math.inf:
            p.append(f"model.llama3_rope.factor = {self.factor} must be at least 1")
        if self.original_max_position_tokens < 1:
            p.append("model.llama3_rope.original_max_position_tokens = "
                     f"{self.original_max_position_tokens} must be positive")
        return p


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of a model; `family` says how it maps to Hugging Face (see `megatron_sov/models`)."""

    __pydantic_config__ = STRICT
    family: str
    """Name of the family's declaration in `megatron_sov/models`, equal to transformers' `model_type`."""
    vocab_size: int
    """Number of token ids, including reserved ones."""
    hidden_size: int
    """Width of the residual stream."""
    num_layers: int
    """Transformer layers of the trunk (multi-token prediction layers not counted)."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key/value heads (grouped-query attention)."""
    head_dim: int
    """Width of one head."""
    num_dense_layers: int = 0
    """Leading layers with a dense feed-forward network instead of experts."""
    dense_ffn_dim: int = 0
    """Inner width of dense feed-forward layers (also of a dense multi-token prediction layer)."""
    num_experts: int = 128
    """Routed experts of a layer; 0: every layer is dense."""
    num_experts_per_token: int = 8
    """Routed experts that each token visits (top-k)."""
    num_expert_groups: int = 1
    """Equal groups of a layer's experts, in their order (node-limited routing, DeepSeek-V3, arXiv 2412.19437,
    section 2.1.2); 1: none.  A group's score is the sum of its two best, selection bias included."""
    num_groups_per_token: int = 1
    """Groups with the best scores, among whose experts each token's are chosen."""
    num_shared_experts: int = 1
    """Experts that every token visits."""
    expert_ffn_dim: int = 1280
    """Inner width of one expert."""
    router_score: Literal["sigmoid", "softmax"] = "sigmoid"
    """What turns the router's logits into scores: sigmoid each (DeepSeek-V3), or softmax over all experts."""
    norm_topk_prob: bool = True
    """Whether the scores of a token's chosen experts are divided by their sum."""
    router_bias: bool = True
    """Whether a bias that is added for the choice only balances the experts (arXiv 2408.15664); needs
    router_score sigmoid."""
    routed_scaling_factor: float = 1.0
    """Factor on the weights of the chosen experts."""
    router_bias_update_rate: float = 1e-3
    """Step of the router's selection bias per optimizer step (arXiv 2408.15664); 0 freezes it."""
    seq_aux_loss_coeff: float = 1e-4
    """Weight of the sequence-level load-balancing loss (DeepSeek-V3, arXiv 2412.19437, eq. 17)."""
    attention_pattern: str = "G"
    """Repeating pattern of layers: L = sliding window, G = global."""
    sliding_window_tokens: int = 0
    """Window of L layers, in tokens, the current one included; 0 where the pattern has no L."""
    rope_on_global: bool = True
    """Whether global layers rotate queries and keys; False = NoPE."""
    rope_theta: float = 1e6
    """Base of the rotary frequencies."""
    local_rope_theta: float | None = None
    """Base of the rotary frequencies of sliding layers; None = that of global ones."""
    rope_share: float = 1.0
    """Share of a head's channels that rotate, the first ones; the others have no position."""
    yarn: YarnConfig | None = None
    """Rotary scaling beyond the original context; None = plain RoPE."""
    llama3_rope: Llama3RopeConfig | None = None
    """Rotary scaling as Llama 3.1 has it, in the place of YaRN; None = none."""
    linear_rope_factor: float | None = None
    """Divisor of all rotary frequencies (of global layers, where local_rope_theta is given), in the place of
    YaRN; None = none."""
    qkv_bias: bool = False
    """Whether the query, key and value projections have a bias."""
    linear_bias: bool = False
    """Whether attention's output projection, the router and the matrices of feed-forward networks and experts
    have one, too (gpt-oss); needs qkv_bias, and no shared experts."""
    attention_sinks: bool = False
    """Whether each head has a learned logit in the denominator of its softmax, a key without a value
    (arXiv 2309.17453, section 3.3; gpt-oss)."""
    qk_norm: bool = False
    """RMSNorm over each head of queries and keys, before RoPE."""
    norm_eps: float = 1e-5
    """Epsilon of every RMSNorm."""
    zero_centered_norms: bool = False
    """Whether every RMSNorm multiplies by 1 + its weight."""
    activation: Literal["silu", "gelu_tanh", "clamped_swiglu"] = "silu"
    """What the gate of feed-forward networks passes through; gelu_tanh = GELU by its tanh approximation;
    clamped_swiglu = g sigmoid(1.702 g) times 1 + the up projection, with g at most 7 and the up projection
    within -7 and 7 (gpt-oss)."""
    block_norms: Literal["pre", "post", "both"] = "pre"
    """Where a layer normalises: pre = the input of attention and feed-forward network; post = their output,
    before it is added to the residual; both = input and output."""
    embedding_multiplier: float = 1.0
    """Factor on embeddings, as in maximal update parametrisation (arXiv 2203.03466)."""
    attention_multiplier: float | None = None
    """Factor on the products of queries and keys; None = 1 / sqrt(head_dim)."""
    residual_multiplier: float = 1.0
    """Factor on what attention and feed-forward network add to the residual."""
    logits_multiplier: float = 1.0
    """Factor on the output head's logits."""
    attention_softcap: float | None = None
    """Cap on the products of queries and keys, cap * tanh(x / cap), before the mask; None = none."""
    logits_softcap: float | None = None
    """Cap on the output head's logits, behind the factor on them and before any temperature; None = none."""
    tied_embeddings: bool = False
    """Whether the output head is the embedding matrix."""
    num_mtp_layers: int = 0
    """Multi-token prediction layers after the trunk (DeepSeek-V3 form)."""
    mtp_experts: bool = False
    """Whether the multi-token prediction layer has experts as the trunk's layers have; False: it is dense."""
    mtp_attention: Literal["G", "L"] = "G"
    """Attention of the multi-token prediction layer: G = global (rotated as other global layers are),
    L = sliding window."""
    mtp_loss_coeff: float = 0.05
    """Weight of the multi-token prediction loss."""
    max_position_tokens: int = 131072
    """Longest context the model claims, in tokens."""
    latent_attention: LatentAttentionConfig | None = None
    """Sizes of multi-head latent attention; None: attention has queries, keys and values of its own."""
    audio_tokens: IdBlock | None = None
    """Ids of discrete sound; None: the vocabulary has none."""
    image_tokens: IdBlock | None = None
    """Ids of discrete pictures; None: the vocabulary has none."""
    vision: VisionEncoderConfig | None = None
    """Encoder of pictures whose features are put over placeholders' embeddings; None: there is none."""
    audio: AudioEncoderConfig | None = None
    """The same of sounds."""
    init_std: float = 0.02
    """Standard deviation of initial weights; matrices that write to the residual get it /
    sqrt(2 * num_layers)."""

    def layer_types(self) -> list[Literal["sliding_attention", "full_attention"]]:
        """Return the attention type of each trunk layer."""
        pattern = self.attention_pattern or "G"
        return ["sliding_attention" if pattern[i % len(pattern)] == "L" else "full_attention"
                for i in range(self.num_layers)]

    def mtp_layer_type(self) -> Literal["sliding_attention", "full_attention"]:
        """Return the attention type of the multi-token prediction layer."""
        return "sliding_attention" if self.mtp_attention == "L" else "full_attention"

    def window_tokens(self, kind: str) -> int:
        """Return the sliding window of layers of a kind (`layer_types`), in tokens; 0: none."""
        return self.sliding_window_tokens if kind == "sliding_attention" else 0

    def rotated_channels(self) -> int:
        """Return how many channels of a head rotate."""
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

    def _routing_problems(self) -> list[str]:
        p = []
        if self.num_moe_layers() and not 0 < self.num_experts_per_token <= self.num_experts:
            p.append(f"model.num_experts_per_token = {self.num_experts_per_token} must lie between 1 and "
                     f"num_experts = {self.num_experts}")
        if self.router_bias and self.router_score != "sigmoid" and self.num_moe_layers():
            p.append("model.router_bias = True needs model.router_score = 'sigmoid', "
                     f"it is {self.router_score!r}")
        if self.num_mtp_moe_layers() and not self.num_moe_layers():
            p.append("model.mtp_experts = True needs a trunk with experts, and none of its layers has any; "
                     "set it to false")
        groups, kept = self.num_expert_groups, self.num_groups_per_token
        if not 1 <= kept <= groups:
            return [*p, f"model.num_groups_per_token = {kept} must lie between 1 and model.num_expert_groups "
                    f"= {groups}"]
        if groups > 1 and (self.num_experts % groups or self.num_experts < 2 * groups):
            return [*p, f"model.num_expert_groups = {groups} must divide model.num_experts = "
                    f"{self.num_experts} into groups of at least two"]
        within = kept * self.num_experts // groups
        if groups > 1 and within < self.num_experts_per_token:
            p.append(f"model.num_groups_per_token = {kept} leaves {within} experts to choose from, and "
                     f"model.num_experts_per_token = {self.num_experts_per_token} must not be more")
        return p

    def _rotary_problems(self) -> list[str]:
        p = []
        if self.head_dim % 2:
            p.append(f"model.head_dim = {self.head_dim} must be even (RoPE rotates pairs)")
        if not 0 < self.rope_share <= 1 or (self.rope_share < 1 and self.head_dim * self.rope_share % 2):
            p.append(f"model.rope_share = {self.rope_share} must be in (0, 1], and give an even number of "
                     f"channels of model.head_dim = {self.head_dim}")
        if self.local_rope_theta is not None and (self.yarn is not None or self.llama3_rope is not None):
            p.append(f"model.local_rope_theta = {self.local_rope_theta} needs plain rotations; set "
                     "model.yarn and model.llama3_rope to null")
        if self.rope_share < 1 and self.yarn is not None:
            p.append(f"model.yarn needs model.rope_share = 1, it is {self.rope_share}; set it to null")
        if self.linear_rope_factor is not None:
            if not 1 <= self.linear_rope_factor < math.inf:
                p.append(f"model.linear_rope_factor = {self.linear_rope_factor} must be at least 1")
            if self.yarn is not None or self.llama3_rope is not None:
                p.append(f"model.linear_rope_factor = {self.linear_rope_factor} stands beside model.yarn or "
                         "model.llama3_rope, and a model has one rotary scaling at most; set the others to "
                         "null")
        if self.yarn is not None:
            p += self.yarn.problems(self.rope_theta)
        if self.llama3_rope is not None:
            p += self.llama3_rope.problems()
            if self.yarn is not None:
                p.append("model.yarn and model.llama3_rope: both are set, and a model has one rotary scaling "
                         "at most; set one of them to null")
        return p

    def _bias_and_sink_problems(self) -> list[str]:
        p = []
        if self.attention_sinks and self.attention_softcap is not None:
            p.append("model.attention_sinks = True cannot be with model.attention_softcap = "
                     f"{self.attention_softcap}: no attention has both; set it to null")
        if self.linear_bias and not self.qkv_bias:
            p.append("model.linear_bias = True needs model.qkv_bias = True, it is False")
        if self.linear_bias and self.num_moe_layers() and self.num_shared_experts:
            p.append("model.linear_bias = True needs model.num_shared_experts = 0, it is "
                     f"{self.num_shared_experts}: shared experts have no biases")
        return p

    def _latent_problems(self) -> list[str]:
        latent, p = self.latent_attention, []
        if latent is None:
            if self.yarn is not None and self.yarn.mscale != 1:
                p.append(f"model.yarn.mscale = {self.yarn.mscale} needs model.latent_attention; set it to 1")
            return p
        p += latent.problems(self.num_heads, self.num_kv_heads, self.head_dim)
        if "L" in self.attention_pattern or self.mtp_attention == "L":
            p.append("model.latent_attention has no sliding windows; set model.attention_pattern and "
                     "model.mtp_attention to 'G'")
        for name, plain in (("qkv_bias", False), ("qk_norm", False), ("rope_share", 1.0),
                            ("llama3_rope", None), ("local_rope_theta", None), ("rope_on_global", True),
                            ("block_norms", "pre"), ("zero_centered_norms", False),
                            ("attention_multiplier", None)):
            if getattr(self, name) != plain:
                p.append(f"model.{name} = {getattr(self, name)} is not built for model.latent_attention; set "
                         f"it to {str(plain).lower() if isinstance(plain, bool) else plain or 'null'}")
        return p

    def problems(self) -> list[str]:
        """Return one sentence for each rule that the architecture breaks."""
        p = []
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
                     "max_position_tokens"):
            if getattr(self, name) <= 0:
                p.append(f"model.{name} = {getattr(self, name)} must be positive")
        if self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads:
            p.append(f"model.num_kv_heads = {self.num_kv_heads} must divide model.num_heads = "
                     f"{self.num_heads}")
        p += self._rotary_problems() + self._latent_problems()
        if not 0 <= self.num_dense_layers <= self.num_layers:
            p.append(f"model.num_dense_layers = {self.num_dense_layers} must lie between 0 and num_layers = "
                     f"{self.num_layers}")
        if self.has_dense_layers() and self.dense_ffn_dim <= 0:
            p.append(f"model.dense_ffn_dim = {self.dense_ffn_dim} must be positive for dense and multi-token "
                     "prediction layers")
        p += self._routing_problems() + self._bias_and_sink_problems()
        if set(self.attention_pattern) - {"L", "G"} or not self.attention_pattern:
            p.append(f"model.attention_pattern = {self.attention_pattern!r} may hold only the "
                     "letters L and G")
        if ("L" in self.attention_pattern) != (self.sliding_window_tokens > 0):
            p.append(f"model.sliding_window_tokens = {self.sliding_window_tokens} must be positive exactly "
                     f"when attention_pattern = {self.attention_pattern!r} has an L")
        if self.num_mtp_layers and self.mtp_attention == "L" and not self.sliding_window_tokens:
            p.append("model.mtp_attention = 'L' needs model.sliding_window_tokens > 0, "
                     f"it is {self.sliding_window_tokens}")
        if self.num_mtp_layers not in (0, 1):
            p.append(f"model.num_mtp_layers = {self.num_mtp_layers} must be 0 or 1")
        for name in ("init_std", "norm_eps", "rope_theta", "local_rope_theta", "routed_scaling_factor",
                     "embedding_multiplier", "attention_multiplier", "residual_multiplier",
                     "logits_multiplier", "attention_softcap", "logits_softcap"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                p.append(f"model.{name} = {value} must be positive")
        p += [f"model.{name} = {value} must be 0 or more"
              for name in ("router_bias_update_rate", "seq_aux_loss_coeff", "mtp_loss_coeff")
              if not 0 <= (value := getattr(self, name)) < math.inf]
        p += block_problems(self.vocab_size, audio_tokens=self.audio_tokens, image_tokens=self.image_tokens)
        p += both_problems(self.vision, self.audio, self.vocab_size)
        if self.num_experts * self.num_layers > MAX_EXPERTS:
            p.append(f"model.num_layers {self.num_layers} x model.num_experts {self.num_experts} must be "
                     f"at most {MAX_EXPERTS:,} experts; count their zeros")
        return p + above(
            "model", self, vocab_size=100_000_000, hidden_size=10_000_000, num_layers=MAX_LAYERS,
            num_heads=1_000_000, num_kv_heads=1_000_000, head_dim=1_000_000, dense_ffn_dim=100_000_000,
            num_experts=100_000, num_shared_experts=1_000_000, expert_ffn_dim=100_000_000,
            sliding_window_tokens=MAX_SEQ_LEN, max_position_tokens=MAX_SEQ_LEN)
