"""Inputs for the speed model: a model's shape, and the workload per optimizer step."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal, NamedTuple

from megatron_sov.model.config import LinearAttentionConfig, ModelConfig, PhaseConfig, RunConfig
from megatron_sov.model.families.count import compute_mean_keys
from megatron_sov.work.clusters.chips import Chip, Links

Block = Literal["attention", "linear", "mamba", "dense", "expert", "moe", "prediction", "head"]
HEAD = "head"
"""Name for the output head, which `train.recompute` never recomputes."""


class MatrixWork(NamedTuple):
    """A weight [rows, columns] in a product with every token."""

    rows: float
    columns: float
    cut: Literal["rows", "columns", "tokens", ""]
    """Dimension that tensor parallelism splits: the weight's rows or columns, tokens, or none."""
    part: str = ""
    """Name in `gpu.recompute_modules` (mla_up_proj, mlp, moe, shared_experts), `HEAD`, or empty."""
    quantized: bool = True
    """Whether the product uses `Workload.precision`; routers and heads use bf16."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes in a decoder, or in a hybrid with Mamba-2 layers."""

    num_layers: int
    hidden_size: int
    num_heads: int
    head_dim: int
    """Query and key width per head; under latent attention, without the rotated part."""
    num_kv_heads: int
    vocab_size: int
    dense_ffn_dim: int = 0
    gated: bool = True
    """Three matrices per feed-forward network (SwiGLU) instead of two."""
    norms_per_block: float = 1
    """Norms over the residual per block: 1 (pre-norm), or 2 (pre- and post-norm)."""
    tied: bool = False
    """Tied embedding and head."""
    num_experts: int = 0
    """Routed experts per layer; 0: dense model."""
    num_experts_per_token: int = 0
    expert_ffn_dim: int = 0
    num_shared_experts: float = 0
    """Shared experts' width in units equal to `expert_ffn_dim`."""
    num_dense_layers: int = 0
    """Dense layers in a model with experts."""
    num_mtp_layers: int = 0
    """Multi-token prediction layers."""
    mtp_moe: bool = False
    """Whether prediction layers have experts (DeepSeek-V3)."""
    mtp_depths: int = 1
    """Applications per prediction layer."""
    mtp_window: int = 0
    """Prediction layers' attention window, in keys; 0: none."""
    window: int = 0
    """Attention window in keys, the query included; 0: no windowed layers."""
    global_every: int = 0
    """Every n-th attention layer is global, all further layers have `window`; 0: all layers are global."""
    layer_windows: tuple[tuple[int, int], ...] = ()
    """(window, layer count), if `window` and `global_every` cannot express the layers."""
    q_lora_rank: int = 0
    """Query rank in latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1); 0: full rank."""
    kv_lora_rank: int = 0
    """Key and value rank in latent attention; 0: no latent attention."""
    rope_head_dim: int = 0
    """Rotated width per head in latent attention, in addition to `head_dim`."""
    v_head_dim: int = 0
    """Value width per head in latent attention; 0: `head_dim`."""
    expert_latent_dim: int = 0
    """Hidden width inside routed experts, between two projections (LatentMoE); 0: `hidden_size`."""
    linear: LinearAttentionConfig | None = None
    num_linear_layers: int = 0
    """Layers with linear attention in place of softmax attention."""
    attention_gate: bool = False
    """Whether softmax attention has an output gate, as wide as its queries."""
    num_mamba_layers: int = 0
    """Layers with a Mamba-2 block in place of attention."""
    num_ffn_layers: int = 0
    """Feed-forward layers in models with one block per layer (Nemotron-H); 0: every layer has a feed-forward
    network."""
    mamba_num_heads: int = 0
    """Heads per Mamba-2 block (arXiv 2405.21060)."""
    mamba_head_dim: int = 0
    mamba_state_dim: int = 0
    mamba_num_groups: int = 0
    """Head groups with shared state projections."""

    @property
    def num_attention_layers(self) -> int:
        """Layers with softmax attention."""
        return self.num_layers - self.num_linear_layers - self.num_mamba_layers - self.num_ffn_layers

    @property
    def num_feed_forward_layers(self) -> int:
        return self.num_ffn_layers or self.num_layers

    @property
    def num_moe_layers(self) -> int:
        return self.num_feed_forward_layers - self.num_dense_layers if self.num_experts else 0

    @property
    def windowed(self) -> tuple[tuple[int, int], ...]:
        """(window, layer count) pairs for windowed layers."""
        if self.layer_windows or not (self.window and self.global_every):
            return self.layer_windows
        return ((self.window, self.num_attention_layers - self.num_attention_layers // self.global_every),)

    @property
    def num_window_layers(self) -> int:
        return sum(layers for _, layers in self.windowed)

    @property
    def num_predictions(self) -> int:
        """Applications over all prediction layers."""
        return self.num_mtp_layers * self.mtp_depths

    @property
    def query_dim(self) -> int:
        """Query and key width per head, with latent attention's rotated part."""
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
        """Return a block's weights; "moe" is an MoE block without routed experts, "prediction" the projection
        before a prediction layer."""
        h, inner = self.hidden_size, self.mamba_num_heads * self.mamba_head_dim
        if block == "attention":
            return self._list_attention_matrices()
        if block == "linear":
            assert self.linear is not None
            return self._list_linear_matrices(self.linear)
        if block == "mamba":
            width = 2 * inner + 2 * self.mamba_num_groups * self.mamba_state_dim + self.mamba_num_heads
            return [MatrixWork(width, h, "rows"), MatrixWork(h, inner, "columns")]
        if block == "dense":
            return self._list_ffn_matrices(self.dense_ffn_dim, h, "mlp")
        if block == "expert":
            return self._list_ffn_matrices(self.expert_ffn_dim, self.expert_width, "moe")
        if block == "prediction":
            return [MatrixWork(h, 2 * h, "rows")]
        if block == "head":
            # Head and router use bf16 under every 8- or 4-bit recipe.
            return [MatrixWork(self.vocab_size, h, "rows", HEAD, quantized=False)]
        matrices = [MatrixWork(self.num_experts, h, "tokens", quantized=False)]
        if self.num_shared_experts:
            shared_dim = self.num_shared_experts * self.expert_ffn_dim
            matrices += self._list_ffn_matrices(shared_dim, h, "shared_experts")
        if self.expert_latent_dim:
            matrices += [MatrixWork(self.expert_latent_dim, h, "tokens"),
                         MatrixWork(h, self.expert_latent_dim, "tokens")]
        return matrices

    def _list_attention_matrices(self) -> list[MatrixWork]:
        h, heads = self.hidden_size, self.num_heads
        out = MatrixWork(h, heads * self.value_dim, "columns")
        # Megatron computes queries, keys and values in one product.
        if not self.kv_lora_rank:
            queries = 2 * heads if self.attention_gate else heads
            return [MatrixWork((queries + 2 * self.num_kv_heads) * self.head_dim, h, "rows"), out]
        # Latent attention: project down to a narrow vector, then up to all heads' keys and values.
        matrices = [MatrixWork(self.kv_lora_rank + self.rope_head_dim, h, ""),
                    MatrixWork(heads * (self.head_dim + self.value_dim), self.kv_lora_rank, "rows",
                               "mla_up_proj"), out]
        if not self.q_lora_rank:
            return [*matrices, MatrixWork(heads * self.query_dim, h, "rows")]
        return [*matrices, MatrixWork(self.q_lora_rank, h, ""),
                MatrixWork(heads * self.query_dim, self.q_lora_rank, "rows", "mla_up_proj")]

    def _list_linear_matrices(self, linear: LinearAttentionConfig) -> list[MatrixWork]:
        h, values = self.hidden_size, linear.num_value_heads * linear.value_head_dim
        # two narrow vectors, then decays per key channel and output gates
        return [MatrixWork(linear.num_key_heads * sum(linear.projected), h, "rows"),
                MatrixWork(h, values, "columns"), MatrixWork(2 * linear.gate_rank, h, ""),
                MatrixWork(linear.num_key_heads * linear.key_head_dim, linear.gate_rank, "rows"),
                MatrixWork(values, linear.gate_rank, "rows")]

    def _list_ffn_matrices(self, inner: float, width: int, part: str) -> list[MatrixWork]:
        """Return the up projection, with the gate, and the down projection."""
        return [MatrixWork((self.ffn_matrices - 1) * inner, width, "rows", part),
                MatrixWork(width, inner, "columns", part)]

    def count_block_params(self, block: Block) -> int:
        return round(sum(matrix.rows * matrix.columns for matrix in self.list_matrices(block)))

    def count_experts_params(self, experts: int) -> int:
        """Count an MoE block's weights with `experts` routed experts."""
        return experts * self.count_block_params("expert") + self.count_block_params("moe")

    def count_params(self) -> int:
        """Count the parameters, without prediction layers, norms and biases."""
        embedding = 0 if self.tied else self.vocab_size * self.hidden_size
        return self._count_product_weights(self.num_experts) + embedding

    def count_mtp_params(self, experts: int) -> int:
        """Count the weights in all prediction layers, with `experts` routed experts and without the head."""
        ffn = self.count_experts_params(experts) if self.mtp_moe else self.count_block_params("dense")
        projection, attention = self.count_block_params("prediction"), self.count_block_params("attention")
        return self.num_mtp_layers * (projection + attention + ffn)

    def _count_product_weights(self, experts: int) -> int:
        """Count the weights in products of trunk and head, with `experts` routed experts per layer."""
        num_weights = self.count_block_params("head")
        layers: dict[Block, int] = {"attention": self.num_attention_layers, "mamba": self.num_mamba_layers,
                                    "linear": self.num_linear_layers,
                                    "dense": self.num_feed_forward_layers - self.num_moe_layers}
        num_weights += sum(count * self.count_block_params(block) for block, count in layers.items() if count)
        if self.num_moe_layers:
            num_weights += self.num_moe_layers * self.count_experts_params(experts)
        return num_weights

    def count_forward_flops(self, seq_len: int) -> float:
        """Return the mean forward FLOPs per token in a document with `seq_len` tokens (`families.count`):
        two per weight, prediction layers included, and causal attention."""
        predicting = (self.mtp_depths * self.count_mtp_params(self.num_experts_per_token)
                      + self.num_predictions * (self.vocab_size * self.hidden_size))
        return (self._count_token_flops(partial(compute_mean_keys, seq_len)) + 2 * predicting
                + self.num_predictions * self._count_key_flops()
                * compute_mean_keys(seq_len, self.mtp_window))

    def _count_token_flops(self, keys: Callable[[int], float]) -> float:
        """Return the FLOPs per token in trunk and head; `keys` maps a window (0: none) to keys per query."""
        num_keys = ((self.num_attention_layers - self.num_window_layers) * keys(0)
                    + sum(layers * keys(window) for window, layers in self.windowed))
        return (2 * self._count_product_weights(self.num_experts_per_token)
                + self._count_key_flops() * num_keys + self.num_mamba_layers * self.count_mamba_scan_flops()
                + (0 if self.linear is None else 2 * self.num_linear_layers * self.linear.products_per_token))

    def _count_key_flops(self) -> int:
        """Return the FLOPs per query and key in a layer, over all heads."""
        return 2 * self.num_heads * (self.query_dim + self.value_dim)

    def count_mamba_scan_flops(self) -> float:
        """Return the FLOPs per token in a Mamba-2 recurrence (`megatron.core`: 7 per state element)."""
        return 7 * self.mamba_num_heads * self.mamba_head_dim * self.mamba_state_dim

    def count_train_flops(self, seq_len: int) -> float:
        """Return the model FLOPs per token, forward and backward: three forward passes."""
        return 3 * self.count_forward_flops(seq_len)


@cache
def build_shape(model: ModelConfig) -> ModelShape:
    """Convert a recipe's `model` settings to a shape."""
    latent = model.latent_attention
    windowed = sum(kind == "sliding_attention" for kind in model.layer_types())
    # `global_every` expresses a single period; without global layers it exceeds the layer count.
    attending = model.num_layers - model.num_linear_layers()
    num_global = attending - windowed
    every = attending // num_global if num_global else attending + 1
    is_periodic = not model.layer_windows and attending - attending // every == windowed
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
        layer_windows=() if is_periodic or not windowed else tuple(sorted(Counter(
            window for window in model.windows() if window).items())),
        window=model.sliding_window_tokens if windowed else 0, global_every=every if windowed else 0,
        q_lora_rank=(latent.q_lora_rank or 0) if latent is not None else 0,
        kv_lora_rank=latent.kv_lora_rank if latent is not None else 0,
        rope_head_dim=latent.qk_rope_head_dim if latent is not None else 0,
        v_head_dim=latent.v_head_dim if latent is not None else 0)


Precision = Literal["bf16", "fp8", "fp8_blockwise", "mxfp8", "nvfp4"]
"""Number format for matrix products in layers; fp8 has tensorwise or rowwise scales."""
PRECISIONS: dict[str, Precision] = {"none": "bf16", "tensorwise": "fp8", "delayed": "fp8",
                                    "blockwise": "fp8_blockwise", "mxfp8": "mxfp8", "nvfp4": "nvfp4"}
"""`train.fp8` -> `Workload.precision`."""


@dataclass(frozen=True)
class Workload:
    shape: ModelShape
    chip: Chip
    links: Links
    num_gpus: int
    seq_len: int
    micro_batch_size: int = 1
    global_batch_size: int = 1
    document_tokens: int = 0
    """Tokens per packed document, which limits attention; 0: a row is one document."""
    tp: int = 1
    sp: bool = False
    pp: int = 1
    vpp: int = 1
    """Chunks per pipeline stage."""
    stage_layers: tuple[int, ...] = ()
    """Trunk layers per stage, with prediction layers and head on the last stage; empty: even stages."""
    cp: int = 1
    ep: int = 1
    etp: int = 1
    """Tensor parallel size inside an expert."""
    sharding: Literal["none", "zero1", "fsdp"] = "none"
    """State sharded over data-parallel processes: none, optimizer (zero1), or everything (fsdp)."""
    sharding_group: int = 0
    """Sharding group size under HSDP; 0: all data-parallel processes."""
    precision: Precision = "bf16"
    recompute: Literal["none", "selective", "full"] = "none"
    recompute_modules: tuple[str, ...] = ()
    """Selective recomputation: names as in `gpu.recompute_modules`; layer: every second layer; op: every
    second product."""
    dispatcher: Literal["alltoall", "allgather", "deepep", "hybridep"] = "alltoall"
    overlap_grad_reduce: bool = True
    """Gradient reduction overlaps the backward pass."""
    overlap_param_gather: bool = True
    """Weight gathering overlaps the forward pass."""
    overlap_tp: bool = False
    """Tensor-parallel messages overlap products (user buffers, async TP)."""
    overlap_ep: bool = False
    """Expert messages overlap another micro-batch."""
    cuda_graphs: Literal["none", "routers", "partial", "full"] = "none"
    """routers: a graph between attention and token exchange; partial: with attention; full: one graph per
    step."""
    fused_kernels: bool = True
    """Fused kernels between products (Transformer Engine, torch.compile), not a kernel per operation."""
    attention_kernel: Literal["newest", "portable"] = "newest"
    """newest: the chip generation's kernels (cuDNN, FlashAttention 3); portable: FlashAttention 2, Triton."""
    exchanges_heads: bool = False
    """Context parallelism exchanges heads (all-to-all), not keys and values."""
    software_age_years: float = 0.0
    """Software age relative to the newest fitted runs."""
    fused_experts: bool = False
    """Grouped products with fused activation and quantization."""
    dropless: bool = True
    """No token is dropped, so the host reads token counts per expert."""
    imbalance: float = 1.0
    """Tokens on the fullest expert-parallel rank divided by the mean."""
    grad_bytes: int = 4
    """Bytes per gradient element in reductions."""
    weight_bytes: int = 2
    """Bytes per gathered weight element."""
    optimizer: Literal["adam", "muon"] = "adam"
    offload: float = 0.0
    """Share of optimizer states in host memory (`gpu.optimizer_offload`)."""
    tuned: bool = True
    """Whether the layout was tuned for speed."""
    objective: Literal["train", "lora"] = "train"
    """Train all weights, or LoRA adapters."""

    @property
    def dp(self) -> int:
        return max(1, self.num_gpus // (self.tp * self.pp * self.cp))

    @property
    def expert_dp(self) -> int:
        return max(1, self.num_gpus // (self.etp * self.ep * self.pp))

    @property
    def num_micro_batches(self) -> int:
        return max(1, -(-self.global_batch_size // (self.dp * self.micro_batch_size)))

    @property
    def step_tokens(self) -> int:
        return self.global_batch_size * self.seq_len


def build_workload(config: RunConfig, phase: PhaseConfig, num_gpus: int, chip: Chip, links: Links,
                   imbalance: float = 1.0) -> Workload:
    """Build the workload for a step in `phase`, with the layout in `config.parallel`."""
    p, t, g = config.parallel, config.train, config.gpu
    recompute: Literal["none", "selective", "full"] = "none"
    if t.recompute:
        recompute = "selective" if t.recompute == "selective" else "full"
    stages = tuple(len(p.stage_layers(stage, config.model.num_layers)) for stage in range(p.pp))
    uses_muon = config.optim.name == "muon" or any(group.optimizer == "muon" for group in config.optim.groups)
    # As `engine.model.gpu_settings.uses_document_attention` if Transformer Engine supports all heads; our
    # kernel is FlashAttention 2.
    uses_local = g.attention == "local" or (g.attention == "auto" and (p.cp > 1 or t.deterministic))
    return Workload(
        build_shape(config.model), chip, links, num_gpus, phase.seq_len, t.micro_batch_size,
        phase.global_batch_size or t.global_batch_size, tp=p.tp, sp=p.sp, pp=p.pp, vpp=p.vpp,
        stage_layers=stages, cp=p.cp, ep=p.ep, etp=p.etp, sharding="zero1" if p.zero1 else "none",
        precision=PRECISIONS[t.fp8], recompute=recompute,
        recompute_modules=g.recompute_modules if recompute == "selective" else (),
        dispatcher=p.expert_dispatcher, overlap_grad_reduce=p.overlap_grad_reduce,
        overlap_param_gather=p.overlap_param_gather, overlap_ep=p.expert_overlap == "micro_batches",
        cuda_graphs="routers" if g.cuda_graphs else "none",
        attention_kernel="portable" if uses_local else "newest", exchanges_heads=p.cp > 1 and not uses_local,
        imbalance=imbalance, grad_bytes=2 if g.grad_dtype == "bf16" else 4,
        weight_bytes=1 if t.fp8_weights and t.fp8 != "mxfp8" else 2,
        optimizer="muon" if uses_muon else "adam", offload=g.optimizer_offload,
        objective="lora" if config.lora.on else "train")
