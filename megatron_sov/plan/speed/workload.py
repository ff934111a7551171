"""What the arithmetic of speed needs of a model: sizes, whether they come from a recipe or from a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal, NamedTuple

from megatron_sov.model.config import LinearAttentionConfig, ModelConfig, PhaseConfig, RunConfig
from megatron_sov.model.families.count import compute_mean_keys
from megatron_sov.work.clusters.chips import Chip, Links

Block = Literal["attention", "linear", "mamba", "dense", "expert", "beside experts", "prediction", "head"]
HEAD = "head"
"""Part that no recomputation computes again: it goes by layers, and the head is behind them."""


class MatrixWork(NamedTuple):
    """A weight [rows, columns] that a token is multiplied with."""

    rows: float
    columns: float
    cut: Literal["rows", "columns", "tokens", ""]
    """What of the product tensor parallelism shares: rows or columns of the weight, tokens, or nothing."""
    part: str = ""
    """What recomputation calls it: mla_up_proj, mlp, moe, shared_experts; `HEAD`; or nothing."""
    quantized: bool = True
    """Whether the workload's precision holds; routers and heads stay in bf16."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder: layers of attention and a feed-forward network, or a hybrid with Mamba-2 layers."""

    num_layers: int
    hidden_size: int
    num_heads: int
    head_dim: int
    """Width of a head's queries and keys; under latent attention of their part without positions."""
    num_kv_heads: int
    vocab_size: int
    dense_ffn_dim: int = 0
    """Inner width of dense feed-forward layers."""
    gated: bool = True
    """Whether feed-forward networks have a gate (three matrices, SwiGLU) or not (two)."""
    norms_per_block: float = 1
    """Norms of an attention block or feed-forward network over the residual's width: before it, or behind it
    too."""
    tied: bool = False
    """Whether the output head is the embedding."""
    num_experts: int = 0
    """Routed experts of a layer; 0: all layers are dense."""
    num_experts_per_token: int = 0
    """Routed experts that a token visits."""
    expert_ffn_dim: int = 0
    num_shared_experts: float = 0
    """Width of what every token visits beside the routed experts, in units of `expert_ffn_dim`."""
    num_dense_layers: int = 0
    """Layers whose feed-forward network is dense, in a model with experts."""
    num_mtp_layers: int = 0
    """Multi-token prediction layers."""
    mtp_moe: bool = False
    """Whether those have experts (DeepSeek-V3) or are dense."""
    mtp_depths: int = 1
    """How many times each of those is applied."""
    mtp_window: int = 0
    """Keys that a query of those sees; 0: all."""
    window: int = 0
    """Keys that a query of a windowed layer sees, itself included; 0: no such layers."""
    global_every: int = 0
    """One in so many attention layers sees everything, the others `window` keys; 0: all see everything."""
    layer_windows: tuple[tuple[int, int], ...] = ()
    """(keys, layers) of the windowed layers, where these do not follow from the two above."""
    q_lora_rank: int = 0
    """Rank of the queries of latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1); 0: in full."""
    kv_lora_rank: int = 0
    """Rank of its keys and values; 0: the attention is not latent."""
    rope_head_dim: int = 0
    """Width of the part of its heads that is rotated, beside `head_dim`."""
    v_head_dim: int = 0
    """Width of its values; 0: `head_dim`."""
    expert_latent_dim: int = 0
    """Width that routed experts work in, between two projections (LatentMoE); 0: `hidden_size`."""
    linear: LinearAttentionConfig | None = None
    """Sizes of linear attention."""
    num_linear_layers: int = 0
    """Layers with linear attention in the place of the other."""
    attention_gate: bool = False
    """Whether the other's output is gated, by as much as queries are projected to."""
    num_mamba_layers: int = 0
    """Layers with a Mamba-2 block in the place of attention."""
    num_ffn_layers: int = 0
    """Layers that are feed-forward networks alone, in models whose layers are one block each (Nemotron-H);
    0: every layer has one behind its attention or Mamba block."""
    mamba_num_heads: int = 0
    """Heads of a Mamba-2 block (arXiv 2405.21060)."""
    mamba_head_dim: int = 0
    mamba_state_dim: int = 0
    mamba_num_groups: int = 0
    """Groups of heads that share input and output projections of the state."""

    @property
    def num_attention_layers(self) -> int:
        """Layers with attention whose queries see keys."""
        return self.num_layers - self.num_linear_layers - self.num_mamba_layers - self.num_ffn_layers

    @property
    def num_feed_forward_layers(self) -> int:
        return self.num_ffn_layers or self.num_layers

    @property
    def num_moe_layers(self) -> int:
        return self.num_feed_forward_layers - self.num_dense_layers if self.num_experts else 0

    @property
    def windowed(self) -> tuple[tuple[int, int], ...]:
        """(keys, layers) of the layers whose queries see so many keys at most."""
        if self.layer_windows or not (self.window and self.global_every):
            return self.layer_windows
        return ((self.window, self.num_attention_layers - self.num_attention_layers // self.global_every),)

    @property
    def num_window_layers(self) -> int:
        return sum(layers for _, layers in self.windowed)

    @property
    def num_predictions(self) -> int:
        """Applications of prediction layers."""
        return self.num_mtp_layers * self.mtp_depths

    @property
    def query_dim(self) -> int:
        """Width of queries and keys of a head, the rotated part of latent attention included."""
        return self.head_dim + (self.rope_head_dim if self.kv_lora_rank else 0)

    @property
    def value_dim(self) -> int:
        return self.v_head_dim or self.head_dim

    @property
    def expert_width(self) -> int:
        return self.expert_latent_dim or self.hidden_size

    @property
    def ffn_matrices(self) -> int:
        return 3 if self.gated else 2

    def list_matrices(self, block: Block) -> list[MatrixWork]:
        """Return the weights that tokens are multiplied with in one block of a layer, in an expert, between
        a token's embedding and a prediction layer, or in the output head."""
        h, inner = self.hidden_size, self.mamba_num_heads * self.mamba_head_dim
        if block == "attention":
            return self._attention()
        if block == "linear":
            assert self.linear is not None
            return self._linear(self.linear)
        if block == "mamba":
            width = 2 * inner + 2 * self.mamba_num_groups * self.mamba_state_dim + self.mamba_num_heads
            return [MatrixWork(width, h, "rows"), MatrixWork(h, inner, "columns")]
        if block == "dense":
            return self._feed_forward(self.dense_ffn_dim, h, "mlp")
        if block == "expert":
            return self._feed_forward(self.expert_ffn_dim, self.expert_width, "moe")
        if block == "prediction":
            return [MatrixWork(h, 2 * h, "rows")]
        if block == "head":
            # The head stays in bf16 under every recipe of 8 or 4 bits, and so does the router below.
            return [MatrixWork(self.vocab_size, h, "rows", HEAD, quantized=False)]
        found = [MatrixWork(self.num_experts, h, "tokens", quantized=False)]
        if self.num_shared_experts:
            found += self._feed_forward(self.num_shared_experts * self.expert_ffn_dim, h, "shared_experts")
        if self.expert_latent_dim:
            found += [MatrixWork(self.expert_latent_dim, h, "tokens"),
                      MatrixWork(h, self.expert_latent_dim, "tokens")]
        return found

    def _attention(self) -> list[MatrixWork]:
        h, heads = self.hidden_size, self.num_heads
        out = MatrixWork(h, heads * self.value_dim, "columns")
        # Megatron computes queries, keys and values in one product.
        if not self.kv_lora_rank:
            queries = 2 * heads if self.attention_gate else heads
            return [MatrixWork((queries + 2 * self.num_kv_heads) * self.head_dim, h, "rows"), out]
        # Latent attention: one narrow vector down, then keys and values of all heads up from it.
        both = heads * (self.head_dim + self.value_dim)
        found = [MatrixWork(self.kv_lora_rank + self.rope_head_dim, h, ""),
                 MatrixWork(both, self.kv_lora_rank, "rows", "mla_up_proj"), out]
        if not self.q_lora_rank:
            return [*found, MatrixWork(heads * self.query_dim, h, "rows")]
        return [*found, MatrixWork(self.q_lora_rank, h, ""),
                MatrixWork(heads * self.query_dim, self.q_lora_rank, "rows", "mla_up_proj")]

    def _linear(self, linear: LinearAttentionConfig) -> list[MatrixWork]:
        h, values = self.hidden_size, linear.num_value_heads * linear.value_head_dim
        # two narrow vectors, then a decay of each channel of keys and the output's gates
        return [MatrixWork(linear.num_key_heads * sum(linear.projected), h, "rows"),
                MatrixWork(h, values, "columns"), MatrixWork(2 * linear.gate_rank, h, ""),
                MatrixWork(linear.num_key_heads * linear.key_head_dim, linear.gate_rank, "rows"),
                MatrixWork(values, linear.gate_rank, "rows")]

    def _feed_forward(self, inner: float, width: int, part: str) -> list[MatrixWork]:
        """Return two matrices of a network, of which the first one has the gate, where there is one."""
        return [MatrixWork((self.ffn_matrices - 1) * inner, width, "rows", part),
                MatrixWork(width, inner, "columns", part)]

    def count_block_params(self, block: Block) -> int:
        return round(sum(one.rows * one.columns for one in self.list_matrices(block)))

    def count_experts_params(self, experts: int) -> int:
        """Return the weights of a feed-forward network with so many routed experts."""
        return experts * self.count_block_params("expert") + self.count_block_params("beside experts")

    def params(self) -> int:
        """Return the parameters, prediction layers left out; norms and biases, which no product has, too."""
        return self._multiplied(self.num_experts) + (0 if self.tied else self.vocab_size * self.hidden_size)

    def count_mtp_params(self, experts: int) -> int:
        """Return the weights of all prediction layers (projection, attention, feed-forward network), with so
        many routed experts; their head is the trunk's."""
        ffn = self.count_experts_params(experts) if self.mtp_moe else self.count_block_params("dense")
        return self.num_mtp_layers * (self.count_block_params("prediction") + \
                                      self.count_block_params("attention") + ffn)

    def _multiplied(self, experts: int) -> int:
        """Return the weights of the trunk's products and the head, with so many experts of each layer."""
        found = self.count_block_params("head")
        layers: dict[Block, int] = {"attention": self.num_attention_layers, "mamba": self.num_mamba_layers,
                                    "linear": self.num_linear_layers,
                                    "dense": self.num_feed_forward_layers - self.num_moe_layers}
        found += sum(number * self.count_block_params(block) for block, number in layers.items() if number)
        if self.num_moe_layers:
            found += self.num_moe_layers * self.count_experts_params(experts)
        return found

    def count_forward_flops(self, seq_len: int) -> float:
        """Return the FLOPs of a token's forward pass, the mean over a row of one document.

        Counted as in `families.count`: two for each weight of a product, prediction layers and their heads
        included, and of attention the causal half.
        """
        predicting = (self.mtp_depths * self.count_mtp_params(self.num_experts_per_token)
                      + self.num_predictions * (self.vocab_size * self.hidden_size))
        return (self._token_flops(partial(compute_mean_keys, seq_len)) + 2 * predicting
                + self.num_predictions * self._key_flops() * compute_mean_keys(seq_len, self.mtp_window))

    def _token_flops(self, keys: Callable[[int], float]) -> float:
        """Return the FLOPs of a token in the trunk and the head, whose query sees so many keys under a window
        (0: none)."""
        seen = ((self.num_attention_layers - self.num_window_layers) * keys(0)
                + sum(layers * keys(window) for window, layers in self.windowed))
        return (2 * self._multiplied(self.num_experts_per_token) + self._key_flops() * seen
                + self.num_mamba_layers * self.count_mamba_scan_flops()
                + (0 if self.linear is None else 2 * self.num_linear_layers * self.linear.products_per_token))

    def _key_flops(self) -> int:
        """Return the FLOPs of all heads of a layer for a query and a key: their product, and the value's."""
        return 2 * self.num_heads * (self.query_dim + self.value_dim)

    def count_mamba_scan_flops(self) -> float:
        """Return the FLOPs of a Mamba-2 block's state for a token, as a recurrence: it is written and read
        (`megatron.core`'s count: 7 for each element of the state)."""
        return 7 * self.mamba_num_heads * self.mamba_head_dim * self.mamba_state_dim

    def count_train_flops(self, seq_len: int) -> float:
        """Return the model FLOPs of forward and backward pass of a token: three forward passes."""
        return 3 * self.count_forward_flops(seq_len)


@cache
def build_shape(model: ModelConfig) -> ModelShape:
    """Return the shape of a recipe's model."""
    latent = model.latent_attention
    windowed = sum(kind == "sliding_attention" for kind in model.layer_types())
    # A shape knows one period only ("every n-th layer is global"); with no global layer the period is
    # beyond the last one.
    attending = model.num_layers - model.num_linear_layers()
    num_global = attending - windowed
    every = attending // num_global if num_global else attending + 1
    follows = not model.layer_windows and attending - attending // every == windowed
    return ModelShape(
        num_layers=model.num_layers, hidden_size=model.hidden_size, num_heads=model.num_heads,
        head_dim=model.head_dim if latent is None else latent.qk_nope_head_dim,
        num_kv_heads=model.num_kv_heads, vocab_size=model.vocab_size,
        dense_ffn_dim=model.dense_ffn_dim, norms_per_block=model.norms_per_layer() / 2,
        tied=model.tied_embeddings, num_experts=model.num_experts,
        num_experts_per_token=model.num_experts_per_token if model.num_experts else 0,
        expert_ffn_dim=model.expert_ffn_dim if model.num_experts else 0,
        num_shared_experts=model.num_shared_experts if model.num_experts else 0,
        num_dense_layers=model.num_layers - model.num_moe_layers() if model.num_experts else 0,
        num_mtp_layers=model.num_mtp_layers, mtp_moe=model.mtp_experts, mtp_depths=model.mtp_depths,
        linear=model.linear_attention, num_linear_layers=model.num_linear_layers(),
        attention_gate=model.attention_output_gate,
        mtp_window=model.mtp_window() if model.num_mtp_layers else 0,
        layer_windows=() if follows or not windowed else tuple(sorted(Counter(
            window for window in model.windows() if window).items())),
        window=model.sliding_window_tokens if windowed else 0, global_every=every if windowed else 0,
        q_lora_rank=(latent.q_lora_rank or 0) if latent is not None else 0,
        kv_lora_rank=latent.kv_lora_rank if latent is not None else 0,
        rope_head_dim=latent.qk_rope_head_dim if latent is not None else 0,
        v_head_dim=latent.v_head_dim if latent is not None else 0)


# One optimizer step of one stage on a number of GPUs: what is computed, where, and how it is cut.


Precision = Literal["bf16", "fp8", "fp8_blockwise", "mxfp8", "nvfp4"]
"""Of the matrix products of layers: as `train.fp8` names them, fp8 being tensorwise or rowwise scales."""
PRECISIONS: dict[str, Precision] = {"none": "bf16", "tensorwise": "fp8", "delayed": "fp8",
                                    "blockwise": "fp8_blockwise", "mxfp8": "mxfp8", "nvfp4": "nvfp4"}
"""`train.fp8` -> precision of a workload."""


@dataclass(frozen=True)
class Workload:
    shape: ModelShape
    chip: Chip
    links: Links
    num_gpus: int
    seq_len: int
    micro_batch_size: int = 1
    """Rows of one forward pass of one replica."""
    global_batch_size: int = 1
    document_tokens: int = 0
    """Tokens of a document where attention does not cross documents; 0: a row is one document."""
    tp: int = 1
    sp: bool = False
    pp: int = 1
    vpp: int = 1
    """Runs of layers on each pipeline stage."""
    stage_layers: tuple[int, ...] = ()
    """Trunk layers of each stage of a pipeline, prediction layers and head being on the last one; empty:
    nobody says, and stages are as even as can be."""
    cp: int = 1
    ep: int = 1
    etp: int = 1
    """Tensor parallel size inside an expert."""
    sharding: Literal["none", "zero1", "fsdp"] = "none"
    """What data-parallel processes share: nothing, the optimizer's state, or weights and gradients too."""
    sharding_group: int = 0
    """Processes that share it, where copies of them exist (HSDP); 0: all data-parallel ones."""
    precision: Precision = "bf16"
    """Of the layers' matrix products."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again."""
    recompute_modules: tuple[str, ...] = ()
    """What of it is selective: core_attn, layernorm, mlp, moe, moe_act, shared_experts, mla_up_proj; layer
    for every second layer as a whole, op for every second product."""
    dispatcher: Literal["alltoall", "allgather", "deepep", "hybridep"] = "alltoall"
    """How tokens reach their experts."""
    overlap_grad_reduce: bool = True
    """Whether gradients are summed beside the backward pass."""
    overlap_param_gather: bool = True
    """Whether weights are gathered beside the forward pass."""
    overlap_tp: bool = False
    """Whether messages of tensor parallelism run beside the products (user buffers, async TP)."""
    overlap_ep: bool = False
    """Whether tokens travel to experts beside another micro-batch's computation."""
    cuda_graphs: Literal["none", "partial", "full"] = "none"
    """Whether kernels of parts of a layer, or of the whole step, are launched as one."""
    fused_kernels: bool = True
    """Whether what stands between products runs in few kernels (Transformer Engine, torch.compile), or each
    operation in its own."""
    attention_kernel: Literal["newest", "portable"] = "newest"
    """Whether attention has a kernel made for the chip's generation (cuDNN, FlashAttention 3), or one that
    runs everywhere (FlashAttention 2, Triton)."""
    exchanges_heads: bool = False
    """Whether processes that share a row get the whole row of some heads, not the keys of all of it."""
    software_age_years: float = 0.0
    """How much older the software is than the newest runs that the parameters were fitted to."""
    fused_experts: bool = False
    """Whether activation and quantisation of experts run inside their grouped products."""
    dropless: bool = True
    """Whether every token reaches its experts, so that the host has to know how many each has; otherwise all
    have as many, and what is too much is dropped."""
    imbalance: float = 1.0
    """Tokens of the fullest expert-parallel rank in units of the mean."""
    grad_bytes: int = 4
    """Bytes of a gradient that is summed."""
    weight_bytes: int = 2
    """Bytes of a weight that is gathered; those of tables count as the rest."""
    optimizer: Literal["adam", "muon"] = "adam"
    offload: float = 0.0
    """Share of the optimizer that lies and runs in host memory."""
    tuned: bool = True
    """Whether somebody looked for a fast layout; not so for runs that show that something works."""
    objective: Literal["train", "lora"] = "train"
    """Whether all weights learn, or adapters alone."""

    @property
    def dp(self) -> int:
        return max(1, self.num_gpus // (self.tp * self.pp * self.cp))

    @property
    def expert_dp(self) -> int:
        return max(1, self.num_gpus // (self.etp * self.ep * self.pp))

    @property
    def num_micro_batches(self) -> int:
        """Forward passes of a replica in a step."""
        return max(1, -(-self.global_batch_size // (self.dp * self.micro_batch_size)))

    @property
    def step_tokens(self) -> int:
        return self.global_batch_size * self.seq_len


def build_workload(config: RunConfig, phase: PhaseConfig, num_gpus: int, chip: Chip, links: Links,
           imbalance: float = 1.0) -> Workload:
    """Return a step of a phase of a run."""
    p, t, g = config.parallel, config.train, config.gpu
    recompute: Literal["none", "selective", "full"] = "none"
    if t.recompute:
        recompute = "selective" if t.recompute == "selective" else "full"
    stages = tuple(len(p.stage_layers(stage, config.model.num_layers)) for stage in range(p.pp))
    muon = config.optim.name == "muon" or any(group.optimizer == "muon" for group in config.optim.groups)
    # as `engine.model.gpu_settings.own_attention_serves` where Transformer Engine has kernels for all heads;
    # its own kernel is that of FlashAttention 2
    own = g.attention == "local" or (g.attention == "auto" and (p.cp > 1 or t.deterministic))
    return Workload(build_shape(config.model), chip, links, num_gpus, phase.seq_len, t.micro_batch_size,
                    phase.global_batch_size or t.global_batch_size, tp=p.tp, sp=p.sp, pp=p.pp, vpp=p.vpp,
                    stage_layers=stages, cp=p.cp, ep=p.ep, etp=p.etp, sharding="zero1" if p.zero1 else "none",
                    precision=PRECISIONS[t.fp8], recompute=recompute, recompute_modules=g.recompute_modules if
                    recompute == "selective" else (), dispatcher=p.expert_dispatcher,
                    overlap_grad_reduce=p.overlap_grad_reduce, overlap_param_gather=p.overlap_param_gather,
                    overlap_ep=p.expert_overlap == "micro_batches", attention_kernel="portable" if own else
                    "newest", exchanges_heads=p.cp > 1 and not own, imbalance=imbalance, grad_bytes=2 if
                    g.grad_dtype == "bf16" else 4, weight_bytes=1 if t.fp8_weights and t.fp8 != "mxfp8" else
                    2, optimizer="muon" if muon else "adam", offload=g.optimizer_offload, objective="lora" if
                    config.lora.on else "train")
