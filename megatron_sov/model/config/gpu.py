"""How a GPU's kernels, memory and messages are used: what changes no result beyond rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Le

from megatron_sov.base.settings import (
    ActsWhen, NotNegative, SettingsProblem, Share, find_broken, is_one_of, is_set)
from megatron_sov.model.config.bounds import Steps
from megatron_sov.model.config.data import PhaseConfig
from megatron_sov.model.config.layout import ParallelConfig
from megatron_sov.model.config.model import ModelConfig
from megatron_sov.model.config.train import OptimConfig, TrainConfig

# What matrix products in 8 or 4 bits ask of precision, model, layout and rows: the rules of Transformer
# Engine 2.20 and megatron-core, told before anything starts.

@dataclass(frozen=True)
class Fp8Recipe:
    """A way to scale the operands of matrix products, as `train.fp8` names it."""

    row_multiple: int
    """What the tokens of a row on each process must be a multiple of; each expert's are padded to it."""
    width_multiple: int
    """What both sizes of every quantised weight must be a multiple of, on each process."""
    auto_format: str
    """The 8-bit format where `train.fp8_format` is auto; "" where the recipe has its own."""


RECIPES = {
    # rows: `get_fp8_align_size` and `get_fp4_align_size` of megatron-core; widths: the leading dimension of
    # an FP8 product is a multiple of 16 (cublaslt_gemm.cu), whole MX blocks are 32 (quantizer.cpp), and
    # 16 bytes of FP4 are 32 values (fp4_utils.py)
    "tensorwise": Fp8Recipe(16, 16, "hybrid"),
    "blockwise": Fp8Recipe(16, 16, "e4m3"),
    "mxfp8": Fp8Recipe(32, 32, "e4m3"),
    "nvfp4": Fp8Recipe(128, 32, ""),
}


def fp8_format(train: TrainConfig) -> str:
    """Return the library's name of the 8-bit format."""
    return RECIPES[train.fp8].auto_format if train.fp8_format == "auto" else train.fp8_format


def weight_problems(train: TrainConfig, parallel: ParallelConfig, optim: OptimConfig,
                    gpu: GpuConfig) -> list[SettingsProblem]:
    """Return every rule that `train.fp8_weights` breaks with what it meets."""
    if not train.fp8_weights:
        return []
    return find_broken(
        train, "train",
        (train.fp8 not in ("none", "nvfp4"), "fp8_weights",
         f"is for recipes of 8 bits, and train.fp8 = {train.fp8}",
         "choose another recipe, or leave it out"),
        (parallel.zero1, "fp8_weights", "needs parallel.zero1 = true, whose optimizer makes weights of their "
         "masters", "set it, or leave this out"),
        (not any(group.frozen for group in optim.groups), "fp8_weights",
         "does not go with frozen optim.groups: a frozen weight has no master to write into checkpoints",
         "leave one of them out"),
        (not gpu.cuda_graphs, "fp8_weights", "does not go with gpu.cuda_graphs: whether graphs see weights "
         "that are made anew is not tried", "leave one of them out"),
        (not gpu.optimizer_offload, "fp8_weights", "does not go with gpu.optimizer_offload: masters in host "
         "memory cannot be quantised on the GPU", "leave one of them out"))


def quantization_problems(train: TrainConfig, model: ModelConfig, parallel: ParallelConfig,
                          phases: Sequence[PhaseConfig]) -> list[SettingsProblem]:
    """Return every rule that `train.fp8` breaks with what it meets."""
    if train.fp8 == "none":
        return []
    if train.fp8 == "delayed":
        return find_broken(train, "train", (
            False, "fp8", "is not to be had: its scales follow from the largest values of earlier steps, "
            "which are in no checkpoint here, so that a resumed run would differ", "use tensorwise, which "
            "scales each tensor by its own largest value"))
    start, end = train.fp8_bf16_layers_at_start, train.fp8_bf16_layers_at_end
    pads = train.fp8_pad_routed_tokens
    p = find_broken(
        train, "train",
        (train.precision == "bf16", "fp8", f"needs train.precision = bf16, it is {train.precision}: what is "
         "not quantised stays in bf16"),
        (start + end < model.num_layers, "fp8_bf16_layers_at_start",
         f"and train.fp8_bf16_layers_at_end = {end} leave none of the {model.num_layers} layers to train.fp8 "
         f"= {train.fp8}", "lower one or set train.fp8=none"),
        (not pads or parallel.expert_dispatcher != "allgather" or not model.num_moe_layers(),
         "fp8_pad_routed_tokens", "does not go with parallel.expert_dispatcher = allgather",
         "use alltoall or leave it out"))
    multiple = RECIPES[train.fp8].row_multiple
    # Kernels want multiples on each process, so the row is divided before it is checked.
    parts = parallel.cp * (parallel.tp if parallel.sp else 1)
    shared = (f" / parallel.cp {parallel.cp}" if parallel.cp > 1 else "") + (
        f" / parallel.tp {parallel.tp} (parallel.sp)" if parallel.sp else "")
    for i, phase in enumerate(phases):
        tokens = phase.seq_len * train.micro_batch_size
        p += find_broken(phase, f"data.phases.{i}", (
            tokens % (parts * multiple) == 0, "seq_len", f"x train.micro_batch_size {train.micro_batch_size}"
            f"{shared} = {tokens / parts:g} tokens on each process, which train.fp8 = {train.fp8} wants to "
            f"be a multiple of {multiple}"))
    multiple = RECIPES[train.fp8].width_multiple
    smaller = " or a smaller parallel.tp" if parallel.tp > 1 else ""
    return p + find_broken(train, "train", *(
        (width % multiple == 0, "fp8", f"needs a multiple of {multiple}, and {name} = {width:g}",
         f"choose another recipe{smaller}") for name, width in _widths(train, model, parallel)))


def _widths(train: TrainConfig, model: ModelConfig, parallel: ParallelConfig) -> list[tuple[str, float]]:
    """Return both sizes of every weight that is quantised, as each process holds it."""
    # under nvfp4 the library keeps the prediction layer in bf16
    predicts = bool(model.num_mtp_layers) and train.fp8 != "nvfp4"
    tp, cut = parallel.tp, f" / parallel.tp {parallel.tp}" if parallel.tp > 1 else ""
    shared = model.num_shared_experts * model.expert_ffn_dim if model.num_moe_layers() else 0
    widths = [("model.hidden_size", float(model.hidden_size)), *_attention_widths(model, tp, cut)]
    dense_prediction = predicts and not model.mtp_experts
    if (model.num_dense_layers > train.fp8_bf16_layers_at_start or not model.num_moe_layers()
            or dense_prediction):
        widths.append((f"model.dense_ffn_dim {model.dense_ffn_dim}{cut}", model.dense_ffn_dim / tp))
    if model.num_moe_layers():
        etp = f" / parallel.etp {parallel.etp}" if parallel.etp > 1 else ""
        widths.append((f"model.expert_ffn_dim {model.expert_ffn_dim}{etp}",
                       model.expert_ffn_dim / parallel.etp))
    if shared:
        widths.append((f"model.num_shared_experts {model.num_shared_experts} x model.expert_ffn_dim "
                       f"{model.expert_ffn_dim}{cut}", shared / tp))
    if predicts:
        widths.append((f"model.hidden_size {model.hidden_size}{cut}, of the prediction layer's projection,",
                       model.hidden_size / tp))
    return widths


def _attention_widths(model: ModelConfig, tp: int, cut: str) -> list[tuple[str, float]]:
    """Return the sizes of attention's weights, each with its name."""
    heads, kv_heads, head_dim, latent = (model.num_heads, model.num_kv_heads, model.head_dim,
                                         model.latent_attention)
    if latent is None:
        linear, at = model.linear_attention, "model.linear_attention"
        own = [] if linear is None else [
            (f"{at}.num_key_heads {linear.num_key_heads} x what is projected for each "
             f"{sum(linear.projected)}{cut}", linear.num_key_heads * sum(linear.projected) / tp),
            (f"{at}.num_value_heads {linear.num_value_heads} x value_head_dim {linear.value_head_dim}{cut}",
             linear.num_value_heads * linear.value_head_dim / tp)]
        twice, of_heads = ("2 x ", 2 * heads) if model.attention_output_gate else ("", heads)
        return [*own,
                (f"({twice}model.num_heads {heads} + 2 x model.num_kv_heads {kv_heads}) x model.head_dim "
                 f"{head_dim}{cut}", (of_heads + 2 * kv_heads) * head_dim / tp),
                (f"model.num_heads {heads} x model.head_dim {head_dim}{cut}", heads * head_dim / tp)]
    at = "model.latent_attention"
    whole = {"q_lora_rank": latent.q_lora_rank, "kv_lora_rank": latent.kv_lora_rank,
             "kv_lora_rank + qk_rope_head_dim": latent.cached_dim}
    by_head = {"head_dim": head_dim, "latent_attention.v_head_dim": latent.v_head_dim,
               "latent_attention.(qk_nope_head_dim + v_head_dim)":
                   latent.qk_nope_head_dim + latent.v_head_dim}
    return [*((f"{at}.{name}", size) for name, size in whole.items() if size),
            *((f"model.num_heads {heads} x model.{name} {size}{cut}", heads * size / tp)
              for name, size in by_head.items())]


def _heads_divide(model: ModelConfig, parallel: ParallelConfig) -> bool:
    """Return whether processes that share a row can each take some heads of it, with their keys."""
    heads, of_keys = model.num_heads // parallel.tp, model.num_kv_heads // parallel.tp
    return (heads % parallel.cp == 0 and (of_keys % parallel.cp == 0 or parallel.cp % of_keys == 0)
            and model.latent_attention is None)


Switch = Literal["auto", "on", "off"]
RecomputeModule = Literal["core_attn", "layernorm", "mlp", "moe", "moe_act", "shared_experts"]
OffloadModule = Literal["qkv_linear", "core_attn", "attn_proj", "mlp_norm", "expert_fc1", "moe_act"]
GraphedPart = Literal["moe_router", "moe_preprocess"]
OF_EXPERTS = ("layernorm", "moe", "moe_act", "shared_experts", "mlp_norm", "expert_fc1")
"""Modules that only layers with experts have.  Norms are among them: all others are a part of Transformer
Engine's linear layer behind them."""


@dataclass(frozen=True)
class GpuConfig:
    """How GPUs are used (docs/gpu.md): `auto` is on where the machine, the model and the layout can;
    `on` where they cannot is refused."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        "linear_attention": is_set("model.linear_attention"),
        "router_fusion permute_fusion shared_expert_overlap cuda_graphs": is_set("model.num_experts"),
        "shared_expert_overlap": is_set("model.num_shared_experts"),
        "exchange_sms": is_one_of("parallel.expert_dispatcher", "deepep", "hybridep"),
        "grad_dtype": is_one_of("train.precision", "bf16"),
        "profile_last_step profiler": is_set(".profile_first_step")}

    attention: Literal["auto", "fused", "flash", "unfused", "local"] = "auto"
    """Attention kernel: Transformer Engine's choice (auto), its cuDNN (fused), FlashAttention or plain torch
    (unfused) one, or this framework's own (local). Under context parallelism auto is local, and a named one
    gets whole rows of its share of the heads. Ours serves anyway without Transformer Engine; under
    auto also with `train.deterministic`, and where Transformer Engine, which is asked, has no kernel for
    packed rows of such heads on this GPU."""
    linear_attention: Literal["auto", "torch", "fla"] = "auto"
    """What trains layers with linear attention: plain torch, or the Triton kernels of flash-linear-attention
    (fla), version 0.6 or newer, which repeat no bits and take keys of up to 256 channels; auto: those where
    they import, on GPUs in bf16 without `train.deterministic`. Sequences that are generated are read in
    torch. `plan` counts what torch keeps, and what the kernels do where they are named."""
    rope_fusion: Switch = "auto"
    """Rotate queries and keys in one kernel."""
    router_fusion: Switch = "auto"
    """Choose experts in Transformer Engine's kernels where their formula is the model's; they compute in
    float32 and take a chosen score from its biased one, so that weights differ in their last bits."""
    permute_fusion: Switch = "auto"
    """Sort tokens by expert, and back, in one kernel."""
    swiglu_fusion: Switch = "auto"
    """Compute SwiGLU in one kernel."""
    grad_accumulation_fusion: Switch = "auto"
    """Add weight gradients to the accumulated ones inside the matrix product, not behind it."""
    recompute_modules: tuple[RecomputeModule, ...] = ()
    """What `train.recompute=selective` computes again in the backward pass: core_attn, layernorm (before
    experts), mlp (dense layers), moe (all of a layer with experts), moe_act (their activation),
    shared_experts."""
    offload_modules: tuple[OffloadModule, ...] = ()
    """Modules whose inputs wait in host memory between forward and backward pass."""
    cuda_graphs: tuple[GraphedPart, ...] = ()
    """Parts of layers with experts whose kernels are launched as one CUDA graph: moe_router (their norm,
    router and shared experts), and with it moe_preprocess (what follows up to the exchange of tokens)."""
    shared_expert_overlap: Literal["on", "off"] = "off"
    """Compute shared experts while tokens travel to the routed ones."""
    exchange_sms: Annotated[int, Ge(0), Le(256)] = 0
    """Multiprocessors that the kernels of `parallel.expert_dispatcher` = deepep or hybridep take, an even
    number; 0: the kernels' own."""
    grad_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype in which a bf16 model's gradients are accumulated and summed over processes; bf16 halves memory
    and messages, and rounds at each addition."""
    moment_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype in which a bf16 model's AdamW keeps its two moments between updates, under ZeRO-1; bf16 saves 4
    bytes of each weight that a process updates, and rounds at each update."""
    optimizer_offload: Share = 0.0
    """Share of a bf16 model's AdamW that lies in host memory and is computed there, under ZeRO-1: master
    weights, moments and update; 0: none, 1: all of it.  Each weight of it frees 12 bytes of the GPU."""
    pad_buckets: Literal["on", "off"] = "off"
    """Make each bucket of ZeRO-1 a multiple of 65,536 elements over all processes together, a size that
    NCCL's rings are fast at."""
    nccl_user_buffers: Literal["on", "off"] = "off"
    """Keep gradients and parameters in memory that NCCL has registered, so that sums need fewer of the
    GPU's multiprocessors."""
    gc_every_steps: Steps = 0
    """Collect Python's garbage after every so many steps, on all processes at once, and never between;
    0: whenever Python wants to, which makes processes wait for one another."""
    profile_first_step: Steps = 0
    """First step of which process 0 writes a trace into RUN/profile; 0: none."""
    profile_last_step: Steps = 0
    """Last step of the trace."""
    profiler: Literal["torch", "nsys"] = "torch"
    """What watches these steps: torch's profiler, or NVIDIA's, with which you start the command
    (`nsys profile --capture-range=cudaProfilerApi`); parts of each pass have names in its trace."""
    peak_tflops: NotNegative = 0.0
    """Peak of one GPU in dense TFLOP/s that MFU is counted against; 0: the known one of the GPU in bf16,
    also where products are in 8 or 4 bits."""

    def problems(self, model: ModelConfig, parallel: ParallelConfig, train: TrainConfig,
                 optim: OptimConfig) -> list[SettingsProblem]:
        """Return every rule of the library that these settings break, on any machine."""
        recomputed, offloaded = self.recompute_modules, self.offload_modules
        first, last = self.profile_first_step, self.profile_last_step
        dispatcher, experts = parallel.expert_dispatcher, model.num_moe_layers() > 0
        parts_of_moe = [part for part in ("moe_act", "shared_experts") if part in recomputed]
        p = find_broken(
            self, "gpu",
            ((train.recompute == "selective") == bool(recomputed), "recompute_modules",
             f"must name modules exactly when train.recompute = selective, and it is {train.recompute}",
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
             "names attn_proj without core_attn, whose output is attn_proj's input and stays for its own "
             "backward pass", "name both"),
            (first == last == 0 or 0 < first <= last, "profile_first_step",
             f"and gpu.profile_last_step = {last} must be steps in order, both from 1 on, or both 0"))
        return p + self._exchange_problems(parallel, train) + self._optimizer_problems(
            parallel, train, optim) + self._graph_problems(model, parallel, train) + find_broken(
            self, "gpu",
            (self.grad_dtype == "fp32" or train.precision == "bf16", "grad_dtype",
             f"needs train.precision = bf16, which is {train.precision}", "leave it out"),
            (self.rope_fusion != "on" or parallel.cp == 1, "rope_fusion",
             f"knows no rows that are cut as by parallel.cp = {parallel.cp}",
             "set gpu.rope_fusion to auto, or parallel.cp to 1"),
            (parallel.cp == 1 or self.attention in ("auto", "local") or _heads_divide(model, parallel),
             "attention", f"gives each process of parallel.cp = {parallel.cp} its share of the heads, which "
             f"must divide those of parallel.tp = {parallel.tp}, without latent attention",
             "set gpu.attention to auto or local, or parallel.cp to 1"),
            (self.shared_expert_overlap == "off" or (experts and model.num_shared_experts > 0),
             "shared_expert_overlap", "needs a shared expert, and the model has none", "leave it out"),
            (self.shared_expert_overlap == "off" or dispatcher == "alltoall", "shared_expert_overlap",
             f"needs parallel.expert_dispatcher = alltoall, which is {dispatcher}",
             "set one of them otherwise"),
            (self.pad_buckets == "off" or parallel.zero1, "pad_buckets",
             "needs parallel.zero1 = true, whose buckets it pads", "set it, or leave gpu.pad_buckets out"))

    def _exchange_problems(self, parallel: ParallelConfig, train: TrainConfig) -> list[SettingsProblem]:
        """Tell what does not go with kernels that carry tokens, and with layers that are cut where tokens
        travel."""
        dispatcher = parallel.expert_dispatcher
        is_kernel = dispatcher in ("deepep", "hybridep")
        p = find_broken(
            self, "gpu",
            (self.exchange_sms % 2 == 0, "exchange_sms", "must be even", "add one"))
        if is_kernel:
            p += find_broken(
                parallel, "parallel",
                (parallel.ep * parallel.etp > 1, "expert_dispatcher", "needs parallel.ep x parallel.etp > 1, "
                 "and nothing travels at 1", "use alltoall"),
                (train.precision == "bf16", "expert_dispatcher",
                 f"carries bf16 alone, and train.precision = {train.precision}", "use alltoall"))
        if parallel.expert_overlap != "micro_batches":
            return p
        return p + find_broken(
            parallel, "parallel",
            (train.recompute is not True and "moe" not in self.recompute_modules, "expert_overlap",
             "cuts layers in pieces, and cannot be where train.recompute computes a whole one again",
             "use selective recomputation without moe, or leave it out"),
            (self.shared_expert_overlap == "off" and not self.offload_modules, "expert_overlap",
             "does not go with gpu.shared_expert_overlap and gpu.offload_modules", "leave one out"))

    def _graph_problems(self, model: ModelConfig, parallel: ParallelConfig,
                        train: TrainConfig) -> list[SettingsProblem]:
        """Tell what graphs cannot hold: what asks the host, or runs Python in each pass."""
        if not self.cuda_graphs:
            return []
        permutes, dispatcher = "moe_preprocess" in self.cuda_graphs, parallel.expert_dispatcher
        recomputed = self.recompute_modules
        no_fusion = dispatcher == "alltoall" and self.permute_fusion == "off"
        return find_broken(
            self, "gpu",
            (model.num_moe_layers() > 0, "cuda_graphs", "are of layers with experts, and the model has none",
             "leave it out"),
            ("moe_router" in self.cuda_graphs, "cuda_graphs", "names moe_preprocess alone, which the library "
             "captures with the router", "name both"),
            (train.recompute is not True and "moe" not in recomputed, "cuda_graphs",
             "cannot be in layers that are computed again as a whole: their first pass keeps nothing that a "
             "graph could go back through", "use selective recomputation without moe, or leave it out"),
            ("layernorm" not in recomputed or (permutes and dispatcher == "alltoall"), "cuda_graphs",
             "hand on the norm's output, which gpu.recompute_modules frees, where they do not permute tokens "
             "for parallel.expert_dispatcher = alltoall", "name moe_preprocess too, or take layernorm out"),
            ("shared_experts" not in recomputed or train.fp8 == "none", "cuda_graphs",
             "hold shared_experts of gpu.recompute_modules, which train.fp8 computes again with the state of "
             "random numbers, that a capture refuses", "take shared_experts out, or leave it out"),
            (train.fp8 != "nvfp4" or not model.num_mtp_moe_layers(), "cuda_graphs",
             "would quantise the prediction layer's shared experts, which train.fp8 = nvfp4 leaves in bf16",
             "use another format, or leave it out"),
            (not model.num_mtp_moe_layers() or model.mtp_depths == 1, "cuda_graphs",
             f"replay each layer once in a pass, and model.mtp_depths = {model.mtp_depths} applies one with "
             "experts more often", "leave it out"),
            (not self.offload_modules, "cuda_graphs", "do not go with gpu.offload_modules, whose copies "
             "begin in hooks of Python", "leave one out"),
            (parallel.expert_overlap != "micro_batches", "cuda_graphs",
             "do not go with parallel.expert_overlap = micro_batches, whose order of layers is not built for "
             "them", "leave one out"),
            (not permutes or parallel.expert_overlap != "weight_gradients", "cuda_graphs", "names "
             "moe_preprocess, whose way back begins the products of parallel.expert_overlap = "
             "weight_gradients, which no graph would repeat", "name moe_router alone, or leave one out"),
            (not permutes or self.shared_expert_overlap == "off", "cuda_graphs", "names moe_preprocess, "
             "inside of which gpu.shared_expert_overlap = on begins what ends outside",
             "name moe_router alone, or set it off"),
            (not permutes or not train.fp8_pad_routed_tokens, "cuda_graphs", "names moe_preprocess, where "
             "train.fp8_pad_routed_tokens asks for the number of padded tokens", "name moe_router alone, or "
             "leave train.fp8_pad_routed_tokens out"),
            (not permutes or not no_fusion, "cuda_graphs", "names moe_preprocess, and permuting without "
             "gpu.permute_fusion asks for the number of tokens", "name moe_router alone, or set "
             "gpu.permute_fusion to auto"))

    def _optimizer_problems(self, parallel: ParallelConfig, train: TrainConfig,
                            optim: OptimConfig) -> list[SettingsProblem]:
        """Tell which optimizers cannot keep their state elsewhere, or in other numbers."""
        share, sharded = self.optimizer_offload, train.precision == "bf16" and parallel.zero1
        # Transformer Engine's queue of such gradients has none for frozen weights, and ends where it is asked
        frozen = parallel.delay_weight_grads and any(group.frozen for group in optim.groups)
        needs = ("needs train.precision = bf16 and parallel.zero1 = true, which are "
                 f"{train.precision} and {str(parallel.zero1).lower()}", "set both, or leave it out")
        return find_broken(
            self, "gpu",
            (self.moment_dtype == "fp32" or sharded, "moment_dtype", *needs),
            (not share or sharded, "optimizer_offload", *needs),
            (not share or self.moment_dtype == "fp32", "optimizer_offload",
             "keeps moments in float32, and gpu.moment_dtype = bf16", "leave one of them out"),
            (not share or "muon" not in (optim.name, *(group.optimizer for group in optim.groups)),
             "optimizer_offload", "is for AdamW, and the settings under optim name muon, whose matrix "
             "products the host is too slow for", "leave it out, or set adamw")
        ) + find_broken(parallel, "parallel", (
            not frozen, "delay_weight_grads", "cannot be where optim.groups freeze weights", "leave it out"))


AUTO = GpuConfig()
"""Everything as the machine can."""


def _missing_modules(setting: str, chosen: tuple[str, ...], model: ModelConfig
                     ) -> list[tuple[bool, str, str, str]]:
    if not model.num_moe_layers():
        return [(name not in OF_EXPERTS, setting, f"names {name}, and the model has no experts "
                 f"(model.num_experts = {model.num_experts})", "leave it out") for name in chosen]
    return [("shared_experts" not in chosen or model.num_shared_experts > 0, setting,
             "names shared_experts, and model.num_shared_experts = 0", "leave it out")]
