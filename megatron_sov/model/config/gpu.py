"""GPU settings (kernels, memory, messages), which change results only by rounding, and rules for FP8."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Le

from megatron_sov.base.settings import (
    ActsWhen, NotNegative, SettingsProblem, Share, find_broken_rules, is_one_of, is_set)
from megatron_sov.model.config.bounds import Steps
from megatron_sov.model.config.data import PhaseConfig
from megatron_sov.model.config.layout import ParallelConfig
from megatron_sov.model.config.model import ModelConfig
from megatron_sov.model.config.train import OptimConfig, TrainConfig

Switch = Literal["auto", "on", "off"]
RecomputeModule = Literal["core_attn", "layernorm", "mlp", "moe", "moe_act", "shared_experts"]
OffloadModule = Literal["qkv_linear", "core_attn", "attn_proj", "mlp_norm", "expert_fc1", "moe_act"]
GraphedPart = Literal["moe_router", "moe_preprocess"]
EXPERT_MODULES = ("layernorm", "moe", "moe_act", "shared_experts", "mlp_norm", "expert_fc1")
"""Modules that only layers with experts have. Norms belong here because dense layers fuse them into the next
Transformer Engine linear layer."""


@dataclass(frozen=True)
class Fp8Recipe:
    """Size requirements of a scaling recipe for 8-bit or 4-bit matrix products (`train.fp8`)."""

    row_multiple: int
    """Divisor of the tokens per row on each process; tokens per expert are padded to it."""
    width_multiple: int
    """Divisor of both sizes of every quantised weight on each process."""
    auto_format: str
    """8-bit format for `train.fp8_format=auto`; "" for 4 bits, which have a single format."""


RECIPES = {
    # Rows: `get_fp8_align_size` and `get_fp4_align_size` in Megatron-Core. Widths, in Transformer Engine:
    # leading dimensions of FP8 products are multiples of 16 (cublaslt_gemm.cu), MX blocks have 32 values
    # (quantizer.cpp), and 16 bytes of FP4 hold 32 values (fp4_utils.py).
    "tensorwise": Fp8Recipe(16, 16, "hybrid"),
    "blockwise": Fp8Recipe(16, 16, "e4m3"),
    "mxfp8": Fp8Recipe(32, 32, "e4m3"),
    "nvfp4": Fp8Recipe(128, 32, ""),
}


def fp8_format(train: TrainConfig) -> str:
    """Return Transformer Engine's name of the 8-bit format."""
    return RECIPES[train.fp8].auto_format if train.fp8_format == "auto" else train.fp8_format


def find_fp8_weight_problems(train: TrainConfig, parallel: ParallelConfig, optim: OptimConfig,
                             gpu: "GpuConfig") -> list[SettingsProblem]:
    """Return every violated rule for `train.fp8_weights`."""
    if not train.fp8_weights:
        return []
    return find_broken_rules(
        train, "train",
        (train.fp8 not in ("none", "nvfp4"), "fp8_weights",
         f"needs an 8-bit recipe, and train.fp8 = {train.fp8}", "choose another recipe, or leave it out"),
        (parallel.zero1, "fp8_weights", "needs parallel.zero1 = true, whose optimizer quantises master "
         "weights", "set it, or leave this out"),
        (not any(group.frozen for group in optim.groups), "fp8_weights",
         "cannot be used with frozen optim.groups: a frozen weight has no master to write into checkpoints",
         "leave one of them out"),
        (not gpu.cuda_graphs, "fp8_weights", "cannot be used with gpu.cuda_graphs: it is not tested whether "
         "graphs see reallocated weights", "leave one of them out"),
        (not gpu.optimizer_offload, "fp8_weights", "cannot be used with gpu.optimizer_offload: masters in "
         "host memory cannot be quantised on the GPU", "leave one of them out"))


def find_fp8_problems(train: TrainConfig, model: ModelConfig, parallel: ParallelConfig,
                      phases: Sequence[PhaseConfig]) -> list[SettingsProblem]:
    """Return every violated rule for `train.fp8`, from Transformer Engine 2.20 and Megatron-Core."""
    if train.fp8 == "none":
        return []
    if train.fp8 == "delayed":
        return find_broken_rules(train, "train", (
            False, "fp8", "is not supported: its scales depend on the largest values of earlier steps, which "
            "checkpoints do not store, so a resumed run would differ", "use tensorwise, which scales each "
            "tensor by its current largest value"))
    start, end = train.fp8_bf16_layers_at_start, train.fp8_bf16_layers_at_end
    pads_tokens = train.fp8_pad_routed_tokens and model.num_moe_layers() > 0
    problems = find_broken_rules(
        train, "train",
        (train.precision == "bf16", "fp8", f"needs train.precision = bf16, not {train.precision}: products "
         "outside of transformer layers stay in bf16", "set train.precision=bf16"),
        (start + end < model.num_layers, "fp8_bf16_layers_at_start",
         f"and train.fp8_bf16_layers_at_end = {end} cover all {model.num_layers} layers, so train.fp8 = "
         f"{train.fp8} has no effect", "lower one or set train.fp8=none"),
        (not pads_tokens or parallel.expert_dispatcher != "allgather", "fp8_pad_routed_tokens",
         "cannot be used with parallel.expert_dispatcher = allgather", "use alltoall or leave it out"))
    multiple = RECIPES[train.fp8].row_multiple
    # The multiple holds for the part of a row on each process.
    row_parts = parallel.cp * (parallel.tp if parallel.sp else 1)
    divided = (f" / parallel.cp {parallel.cp}" if parallel.cp > 1 else "") + (
        f" / parallel.tp {parallel.tp} (parallel.sp)" if parallel.sp else "")
    for i, phase in enumerate(phases):
        tokens = phase.seq_len * train.micro_batch_size
        problems += find_broken_rules(phase, f"data.phases.{i}", (
            tokens % (row_parts * multiple) == 0, "seq_len",
            f"x train.micro_batch_size {train.micro_batch_size}{divided} = {tokens / row_parts:g} tokens on "
            f"each process; train.fp8 = {train.fp8} needs a multiple of {multiple}"))
    multiple = RECIPES[train.fp8].width_multiple
    smaller = " or a smaller parallel.tp" if parallel.tp > 1 else ""
    return problems + find_broken_rules(train, "train", *(
        (width % multiple == 0, "fp8", f"needs a multiple of {multiple}, and {name} = {width:g}",
         f"choose another recipe{smaller}") for name, width in _quantized_widths(train, model, parallel)))


def _quantized_widths(train: TrainConfig, model: ModelConfig,
                      parallel: ParallelConfig) -> list[tuple[str, float]]:
    """Return name and size per process of both dimensions of every quantised weight."""
    # With nvfp4, Megatron-Core keeps the prediction layer in bf16.
    quantizes_mtp = bool(model.num_mtp_layers) and train.fp8 != "nvfp4"
    tp, divided = parallel.tp, f" / parallel.tp {parallel.tp}" if parallel.tp > 1 else ""
    shared = model.num_shared_experts * model.expert_ffn_dim if model.num_moe_layers() else 0
    widths = [("model.hidden_size", float(model.hidden_size)), *_attention_widths(model, tp, divided)]
    if (model.num_dense_layers > train.fp8_bf16_layers_at_start or not model.num_moe_layers()
            or (quantizes_mtp and not model.mtp_experts)):
        widths.append((f"model.dense_ffn_dim {model.dense_ffn_dim}{divided}", model.dense_ffn_dim / tp))
    if model.num_moe_layers():
        etp = f" / parallel.etp {parallel.etp}" if parallel.etp > 1 else ""
        widths.append((f"model.expert_ffn_dim {model.expert_ffn_dim}{etp}",
                       model.expert_ffn_dim / parallel.etp))
    if shared:
        widths.append((f"model.num_shared_experts {model.num_shared_experts} x model.expert_ffn_dim "
                       f"{model.expert_ffn_dim}{divided}", shared / tp))
    if quantizes_mtp:
        widths.append((f"model.hidden_size {model.hidden_size}{divided} (prediction layer's projection)",
                       model.hidden_size / tp))
    return widths


def _attention_widths(model: ModelConfig, tp: int, divided: str) -> list[tuple[str, float]]:
    """Return name and size per process of attention weights."""
    heads, kv_heads, head_dim, latent = (model.num_heads, model.num_kv_heads, model.head_dim,
                                         model.latent_attention)
    if latent is None:
        linear, prefix = model.linear_attention, "model.linear_attention"
        linear_widths = [] if linear is None else [
            (f"{prefix}.num_key_heads {linear.num_key_heads} x {sum(linear.projected)} projected channels"
             f"{divided}", linear.num_key_heads * sum(linear.projected) / tp),
            (f"{prefix}.num_value_heads {linear.num_value_heads} x value_head_dim {linear.value_head_dim}"
             f"{divided}", linear.num_value_heads * linear.value_head_dim / tp)]
        twice, query_heads = ("2 x ", 2 * heads) if model.attention_output_gate else ("", heads)
        return [*linear_widths,
                (f"({twice}model.num_heads {heads} + 2 x model.num_kv_heads {kv_heads}) x model.head_dim "
                 f"{head_dim}{divided}", (query_heads + 2 * kv_heads) * head_dim / tp),
                (f"model.num_heads {heads} x model.head_dim {head_dim}{divided}", heads * head_dim / tp)]
    whole = {"q_lora_rank": latent.q_lora_rank, "kv_lora_rank": latent.kv_lora_rank,
             "kv_lora_rank + qk_rope_head_dim": latent.cached_dim}
    by_head = {"head_dim": head_dim, "latent_attention.v_head_dim": latent.v_head_dim,
               "latent_attention.(qk_nope_head_dim + v_head_dim)":
                   latent.qk_nope_head_dim + latent.v_head_dim}
    return [*((f"model.latent_attention.{name}", size) for name, size in whole.items() if size),
            *((f"model.num_heads {heads} x model.{name} {size}{divided}", heads * size / tp)
              for name, size in by_head.items())]


def _can_divide_heads(model: ModelConfig, parallel: ParallelConfig) -> bool:
    """Return whether context parallel processes can divide the heads with their keys and values."""
    heads, kv_heads = model.num_heads // parallel.tp, model.num_kv_heads // parallel.tp
    return (heads % parallel.cp == 0 and (kv_heads % parallel.cp == 0 or parallel.cp % kv_heads == 0)
            and model.latent_attention is None)


@dataclass(frozen=True)
class GpuConfig:
    """GPU settings (docs/gpu.md). `auto` uses a feature if machine, model and layout support it; `on` fails
    if they do not."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        "linear_attention": is_set("model.linear_attention"),
        "router_fusion permute_fusion shared_expert_overlap cuda_graphs expert_imbalance expert_spill "
        "force_even_routing": is_set("model.num_experts"),
        "shared_expert_overlap": is_set("model.num_shared_experts"),
        "exchange_sms": is_one_of("parallel.expert_dispatcher", "deepep", "hybridep"),
        "grad_dtype": is_one_of("train.precision", "bf16"),
        "profile_last_step profiler": is_set(".profile_first_step")}

    attention: Literal["auto", "fused", "flash", "unfused", "local"] = "auto"
    """Attention kernel. auto: Transformer Engine's choice; fused: cuDNN; flash: FlashAttention; unfused:
    Transformer Engine in plain torch; local: this framework's kernel. auto falls back to local without
    Transformer Engine, with `train.deterministic`, under context parallelism, and for head sizes whose packed
    rows Transformer Engine has no kernel for. Under context parallelism, a kernel set by name gets whole rows
    for some of the heads."""
    linear_attention: Literal["auto", "torch", "fla"] = "auto"
    """Kernels for linear attention in training. torch: plain torch; fla: Triton kernels from
    flash-linear-attention 0.6 or newer, for up to 256 key channels, not bit-reproducible; auto: fla in bf16
    on GPUs if installed and without `train.deterministic`, else torch. Generation uses torch. `plan` counts
    torch's memory unless you set fla."""
    rope_fusion: Switch = "auto"
    """Rotate queries and keys in one kernel."""
    router_fusion: Switch = "auto"
    """Choose experts by Transformer Engine's kernels, for routers with a supported formula. The kernels
    compute in float32 and recover chosen scores from biased scores, so weights differ in the last bits."""
    permute_fusion: Switch = "auto"
    """Sort tokens by expert, and back, in one kernel."""
    swiglu_fusion: Switch = "auto"
    """Compute SwiGLU in one kernel."""
    grad_accumulation_fusion: Switch = "auto"
    """Add weight gradients to accumulated gradients inside the matrix product."""
    recompute_modules: tuple[RecomputeModule, ...] = ()
    """Modules recomputed in the backward pass with `train.recompute=selective`: core_attn, layernorm (before
    experts), mlp (dense layers), moe (the whole expert layer), moe_act (expert activation),
    shared_experts."""
    offload_modules: tuple[OffloadModule, ...] = ()
    """Modules whose inputs are moved to host memory between forward and backward pass."""
    cuda_graphs: tuple[GraphedPart, ...] = ()
    """Expert layer parts captured as CUDA graphs. moe_router: norm, router and shared experts; moe_preprocess
    (only together with moe_router): also the steps up to the token exchange."""
    expert_imbalance: Annotated[float, Ge(1)] = 2.0
    """Tokens on the busiest expert parallel process, relative to the mean, for which GPU memory must suffice.
    `plan`, `submit` and a run's start refuse layouts with less memory, and a run warns of more tokens."""
    expert_spill: NotNegative = 0.0
    """Tokens per expert layer on a process, relative to the mean, whose activations may wait in GPU memory
    for the backward pass; activations of further layers wait in host memory, which is slow. 0: all wait in
    GPU memory. No effect on recomputed expert layers."""
    force_even_routing: Literal["on", "off"] = "off"
    """Route tokens by random logits, as published MoE benchmarks do; refused by training."""
    shared_expert_overlap: Literal["on", "off"] = "off"
    """Compute shared experts during the routed experts' token exchange."""
    exchange_sms: Annotated[int, Ge(0), Le(256)] = 0
    """Streaming multiprocessors for `parallel.expert_dispatcher` = deepep or hybridep; an even number. 0: the
    kernels' default."""
    grad_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype in which a bf16 model accumulates and reduces gradients. bf16 halves memory and messages, rounds
    at every addition, and is refused above 8 micro-batches per step."""
    moment_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype for AdamW's two moments for a bf16 model with ZeRO-1. bf16 saves 4 bytes per weight updated by a
    process, and rounds at every update."""
    optimizer_offload: Share = 0.0
    """Share of AdamW's master weights, moments and update placed on the CPU and in host memory, for a bf16
    model with ZeRO-1. 0: none; 1: all. Every offloaded weight saves 12 bytes in GPU memory."""
    pad_buckets: Literal["on", "off"] = "off"
    """Pad ZeRO-1 buckets to a multiple of 65,536 elements over all processes, a size for which NCCL's rings
    are fast."""
    nccl_user_buffers: Literal["on", "off"] = "off"
    """Allocate gradients and parameters in buffers registered with NCCL, so that reductions need fewer
    streaming multiprocessors."""
    gc_every_steps: Steps = 0
    """Steps between garbage collections in Python, on all processes at the same time. 0: Python decides, and
    processes wait for whichever process collects."""
    profile_first_step: Steps = 0
    """First profiled step; process 0 writes a trace into RUN/profile. 0: no profile."""
    profile_last_step: Steps = 0
    """Last profiled step."""
    profiler: Literal["torch", "nsys"] = "torch"
    """torch: PyTorch's profiler; nsys: NVIDIA Nsight Systems, for a command started by `nsys profile
    --capture-range=cudaProfilerApi`. The trace names each phase in a step."""
    peak_tflops: NotNegative = 0.0
    """Peak dense TFLOP/s per GPU for the MFU (model FLOPs utilisation). 0: the GPU's known bf16 peak, also
    for FP8 and FP4."""

    def problems(self, model: ModelConfig, parallel: ParallelConfig, train: TrainConfig,
                 optim: OptimConfig) -> list[SettingsProblem]:
        """Return every violated rule that does not depend on the machine."""
        first, last = self.profile_first_step, self.profile_last_step
        dispatcher, has_experts = parallel.expert_dispatcher, model.num_moe_layers() > 0
        problems = self._recompute_problems(model, train) + find_broken_rules(
            self, "gpu",
            (first == last == 0 or 0 < first <= last, "profile_first_step",
             f"and gpu.profile_last_step = {last} must both be 0, or steps from 1 in ascending order"))
        problems += self._exchange_problems(model, parallel, train)
        problems += self._optimizer_problems(parallel, train, optim)
        problems += self._graph_problems(model, parallel, train)
        return problems + find_broken_rules(
            self, "gpu",
            (self.grad_dtype == "fp32" or train.precision == "bf16", "grad_dtype",
             f"needs train.precision = bf16, not {train.precision}", "leave it out"),
            (self.rope_fusion != "on" or parallel.cp == 1, "rope_fusion",
             f"does not support rows divided by parallel.cp = {parallel.cp}",
             "set gpu.rope_fusion to auto, or parallel.cp to 1"),
            (parallel.cp == 1 or self.attention in ("auto", "local") or _can_divide_heads(model, parallel),
             "attention", f"divides heads over parallel.cp = {parallel.cp} processes, which must divide the "
             f"heads per parallel.tp = {parallel.tp} process; latent attention is not supported",
             "set gpu.attention to auto or local, or parallel.cp to 1"),
            (not self.expert_spill or self.expert_spill >= 1, "expert_spill",
             "must be 0, or at least 1: with an even load every layer would wait in host memory", "set 1.2"),
            (not (self.expert_spill and {"expert_fc1", "moe_act"} & {*self.offload_modules}), "expert_spill",
             "cannot be used with expert_fc1 or moe_act in gpu.offload_modules, which move the same "
             "activations", "leave one of them out"),
            (self.shared_expert_overlap == "off" or (has_experts and model.num_shared_experts > 0),
             "shared_expert_overlap", "needs a model with shared experts", "leave it out"),
            (self.shared_expert_overlap == "off" or dispatcher == "alltoall", "shared_expert_overlap",
             f"needs parallel.expert_dispatcher = alltoall, not {dispatcher}", "change one of them"),
            (self.pad_buckets == "off" or parallel.zero1, "pad_buckets",
             "needs parallel.zero1 = true, whose buckets it pads", "set it, or leave gpu.pad_buckets out"))

    def _recompute_problems(self, model: ModelConfig, train: TrainConfig) -> list[SettingsProblem]:
        recomputed, offloaded = self.recompute_modules, self.offload_modules
        parts_of_moe = [part for part in ("moe_act", "shared_experts") if part in recomputed]
        return find_broken_rules(
            self, "gpu",
            ((train.recompute == "selective") == bool(recomputed), "recompute_modules",
             f"must be set exactly when train.recompute = selective, and it is {train.recompute}",
             'set both, e.g. train.recompute=selective and gpu.recompute_modules=["layernorm"]'),
            *_missing_modules("recompute_modules", recomputed, model),
            (not parts_of_moe or "moe" not in recomputed, "recompute_modules",
             f"names moe and {' and '.join(parts_of_moe)}, a part of moe", "leave one out"),
            (not ("shared_experts" in recomputed and self.shared_expert_overlap == "on"), "recompute_modules",
             "names shared_experts, which gpu.shared_expert_overlap = on cannot recompute",
             "leave one of them out"),
            ("mlp" not in recomputed or model.has_dense_layers(), "recompute_modules",
             "names mlp, and the model has no dense layer", "leave it out, or name moe"),
            *_missing_modules("offload_modules", offloaded, model),
            (not offloaded or train.recompute is not True, "offload_modules",
             "needs stored activations, and train.recompute = true stores none",
             "set train.recompute to selective or false, or leave gpu.offload_modules out"),
            ("attn_proj" not in offloaded or "core_attn" in offloaded, "offload_modules",
             "names attn_proj without core_attn, whose output is attn_proj's input and would stay on the GPU",
             "name both"))

    def _exchange_problems(self, model: ModelConfig, parallel: ParallelConfig,
                           train: TrainConfig) -> list[SettingsProblem]:
        """Check token exchange kernels, and the overlap of layers with token exchange."""
        problems = find_broken_rules(
            self, "gpu", (self.exchange_sms % 2 == 0, "exchange_sms", "must be even", "add one"))
        if parallel.expert_dispatcher in ("deepep", "hybridep"):
            problems += find_broken_rules(
                parallel, "parallel",
                (parallel.ep * parallel.etp > 1, "expert_dispatcher", "needs parallel.ep x parallel.etp > 1: "
                 "with 1 no token is sent to another process", "use alltoall"),
                (train.precision == "bf16", "expert_dispatcher",
                 f"sends bf16 only, and train.precision = {train.precision}", "use alltoall"))
        if parallel.expert_overlap != "micro_batches":
            return problems
        return problems + find_broken_rules(
            parallel, "parallel",
            (train.recompute is not True and "moe" not in self.recompute_modules, "expert_overlap",
             "computes layers in pieces, and train.recompute recomputes whole layers",
             "use selective recomputation without moe, or leave it out"),
            (self.shared_expert_overlap == "off" and not self.offload_modules, "expert_overlap",
             "cannot be used with gpu.shared_expert_overlap or gpu.offload_modules", "leave one out"),
            (model.linear_attention is None, "expert_overlap", "calls backward_dw of each layer's attention, "
             "which layers with linear attention lack", "leave it out"))

    def _graph_problems(self, model: ModelConfig, parallel: ParallelConfig,
                        train: TrainConfig) -> list[SettingsProblem]:
        """Check CUDA graphs: captured code must not synchronise with the host or run Python hooks."""
        if not self.cuda_graphs:
            return []
        permutes = "moe_preprocess" in self.cuda_graphs
        recomputed = self.recompute_modules
        syncs_to_permute = parallel.expert_dispatcher == "alltoall" and self.permute_fusion == "off"
        return find_broken_rules(
            self, "gpu",
            (model.num_moe_layers() > 0, "cuda_graphs", "need a model with experts", "leave it out"),
            ("moe_router" in self.cuda_graphs, "cuda_graphs", "names moe_preprocess without moe_router, and "
             "Megatron-Core captures them together", "name both"),
            (train.recompute is not True and "moe" not in recomputed, "cuda_graphs",
             "cannot be used if whole layers are recomputed: the first forward pass stores nothing for the "
             "graph's backward pass", "use selective recomputation without moe, or leave it out"),
            ("shared_experts" not in recomputed or train.fp8 == "none", "cuda_graphs",
             "cannot capture shared_experts of gpu.recompute_modules with train.fp8: recomputation restores "
             "the random state", "take shared_experts out, or leave it out"),
            (train.fp8 != "nvfp4" or not model.num_mtp_moe_layers(), "cuda_graphs",
             "would quantise the prediction layer's shared experts, which train.fp8 = nvfp4 leaves in bf16",
             "use another format, or leave it out"),
            (not model.num_mtp_moe_layers() or model.mtp_depths == 1, "cuda_graphs",
             f"replay a layer once per pass, and model.mtp_depths = {model.mtp_depths} applies the "
             "prediction layer repeatedly", "leave it out"),
            (not self.offload_modules, "cuda_graphs", "cannot be used with gpu.offload_modules, whose copies "
             "start in Python hooks", "leave one out"),
            (not permutes or parallel.expert_overlap != "weight_gradients", "cuda_graphs", "names "
             "moe_preprocess, whose backward pass starts the products of parallel.expert_overlap = "
             "weight_gradients outside of the graph", "name only moe_router, or leave one out"),
            (not permutes or self.shared_expert_overlap == "off", "cuda_graphs", "names moe_preprocess, and "
             "gpu.shared_expert_overlap = on starts kernels inside of it that end outside",
             "name only moe_router, or set it off"),
            (not permutes or not train.fp8_pad_routed_tokens, "cuda_graphs", "names moe_preprocess, in which "
             "train.fp8_pad_routed_tokens reads the number of padded tokens on the host",
             "name only moe_router, or leave train.fp8_pad_routed_tokens out"),
            (not permutes or not syncs_to_permute, "cuda_graphs", "names moe_preprocess, in which permuting "
             "without gpu.permute_fusion reads the number of tokens on the host",
             "name only moe_router, or set gpu.permute_fusion to auto"))

    def _optimizer_problems(self, parallel: ParallelConfig, train: TrainConfig,
                            optim: OptimConfig) -> list[SettingsProblem]:
        """Check optimizer offloading and moment dtype."""
        share, is_sharded = self.optimizer_offload, train.precision == "bf16" and parallel.zero1
        # Transformer Engine's queue of delayed gradients has no entry for frozen weights and raises.
        delays_frozen = parallel.delay_weight_grads and any(group.frozen for group in optim.groups)
        needs = ("needs train.precision = bf16 and parallel.zero1 = true, which are "
                 f"{train.precision} and {str(parallel.zero1).lower()}", "set both, or leave it out")
        return find_broken_rules(
            self, "gpu", (self.moment_dtype == "fp32" or is_sharded, "moment_dtype", *needs),
            (not share or is_sharded, "optimizer_offload", *needs),
            (not share or self.moment_dtype == "fp32", "optimizer_offload",
             "keeps moments in float32, and gpu.moment_dtype = bf16", "leave one of them out"),
            (not share or "muon" not in (optim.name, *(group.optimizer for group in optim.groups)),
             "optimizer_offload", "supports AdamW, and optim selects muon, whose matrix products are too "
             "slow on the CPU", "leave it out, or set adamw")) + find_broken_rules(parallel, "parallel", (
            not delays_frozen, "delay_weight_grads", "cannot be used if optim.groups freeze weights",
            "leave it out"))


DEFAULT_GPU = GpuConfig()


def _missing_modules(setting: str, chosen: tuple[str, ...], model: ModelConfig
                     ) -> list[tuple[bool, str, str, str]]:
    if not model.num_moe_layers():
        return [(name not in EXPERT_MODULES, setting, f"names {name}, and the model has no experts "
                 f"(model.num_experts = {model.num_experts})", "leave it out") for name in chosen]
    return [("shared_experts" not in chosen or model.num_shared_experts > 0, setting,
             "names shared_experts, and model.num_shared_experts = 0", "leave it out")]
