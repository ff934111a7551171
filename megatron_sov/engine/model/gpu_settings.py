"""Maps `gpu.*` and `train.fp8` to Megatron-Core's config fields, resolves `auto`, and refuses settings that
this process cannot use."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.enums import AttnBackend

from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import SettingsError, find_broken_rules
from megatron_sov.engine import fused_routing
from megatron_sov.engine.model.attention_kernels import (
    TE_ATTENTION_VARIABLES, find_kernel_problem, get_head_sizes)
from megatron_sov.engine.parallel.device import on_gpu
from megatron_sov.engine.parallel.gpu_libraries import (
    DEEP_EP_NAMES, find_deep_ep_problem, find_fla_problem, find_fp8_problems)
from megatron_sov.model.config import GpuConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_sov.model.config.gpu import fp8_format

QUANTIZATION_FIELDS = ("fp8", "fp4", "moe_router_padding_for_quantization")
"""Fields by which Megatron-Core's forward passes decide whether to quantize."""
OVERLAP_FIELDS = ("overlap_moe_expert_parallel_comm", "delay_wgrad_compute")
"""Fields to set after the config's validation, which refuses them with float32 and with MTP layers."""
DISPATCH_OVERLAP_FIELD = "overlap_dispatch_backward_with_experts_wgrad"
"""Field for `parallel.expert_overlap` = weight_gradients."""
TE_RECOMPUTE_MODULES = {"layernorm": "core_attn, mlp or moe", "moe_act": "moe"}
"""Module whose recomputation needs Transformer Engine -> modules that can be recomputed without it."""
HOPPER, BLACKWELL = 9, 10
"""Major compute capabilities."""
MIN_CUDNN_DETERMINISTIC = 91801
"""First cuDNN version (as torch counts) with deterministic packed attention on Blackwell. On Hopper,
Transformer Engine disables the deterministic kernel if documents x heads x longest document squared >=
2**30, and the number of documents per row is unbounded."""
MIN_CUDNN_HEAD_256 = 92500
"""First cuDNN version that trains packed rows with head size 256 on Blackwell."""
NEEDS_TE = "needs Transformer Engine on a GPU, and a bf16 model"
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Environment variables with options of torch's allocator: the old name and the new name."""
EXPANDABLE = "expandable_segments:True"
"""Option in `ALLOCATOR` that conflicts with NCCL's registration."""
MAX_FLA_KEY_DIM = 256
"""Maximum key head size in flash-linear-attention's kernels."""
Rule = tuple[bool, str, str, str]
"""(whether the rule holds, setting, fault if it does not, fix), for `find_broken_rules`: the setting, its
value, the fault and the fix form the sentence of the error."""


def fp8_settings(train: TrainConfig) -> dict[str, Any]:
    """Return the `TransformerConfig` fields for `train.fp8`: FP8 or FP4 matrix products."""
    if train.fp8 == "none":
        return {}
    scaling = ({"fp4": "e2m1", "fp4_recipe": "nvfp4"} if train.fp8 == "nvfp4"
               else {"fp8": fp8_format(train), "fp8_recipe": train.fp8})
    return {**scaling, "moe_router_padding_for_quantization": train.fp8_pad_routed_tokens,
            "fp8_param": train.fp8_weights}


def keep_ends_in_bf16(config: Any, train: TrainConfig) -> None:
    """Set how many layers at both ends of the trunk stay in bf16, on a validated `TransformerConfig`.

    The validation would limit each end to num_layers // pp layers, and with unequal stages more is valid:
    `is_first_last_bf16_layer` looks up layers by their number in the whole model."""
    start, end = train.fp8_bf16_layers_at_start, train.fp8_bf16_layers_at_end
    config.first_last_layers_bf16 = start + end > 0
    config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16 = start, end


def check_fp8_support(train: TrainConfig, te: bool) -> None:
    """Raise `UserError` if this process cannot compute `train.fp8`: it has no GPU with Transformer Engine
    (`te` is False), or the GPU lacks the recipe."""
    if train.fp8 == "none":
        return
    if not te:
        raise UserError(f"train.fp8 = {train.fp8} needs an NVIDIA GPU with Transformer Engine, and this "
                        "process has none; set train.fp8=none, or run it where `megatron-sov doctor` "
                        "finds both")
    reasons = find_fp8_problems()
    if reason := reasons[train.fp8]:
        others = [fp8 for fp8, why in reasons.items() if not why]
        raise UserError(f"train.fp8 = {train.fp8} cannot run on this GPU (Transformer Engine: {reason}); set "
                        f"train.fp8 to {' or '.join([*others, 'none'])}")


@contextmanager
def disable_quantization(config: Any) -> Iterator[None]:
    """Disable quantization inside the context: rows may then have any length, and outputs match the exported
    bf16 weights."""
    previous = {name: getattr(config, name) for name in QUANTIZATION_FIELDS}
    config.fp8 = config.fp4 = None
    config.moe_router_padding_for_quantization = False
    try:
        yield
    finally:
        for name, value in previous.items():
            setattr(config, name, value)


@dataclass(frozen=True)
class KernelContext:
    """Model, layout and `te`, which decide the usable `GpuConfig` settings."""

    te: bool
    """Whether the model uses Transformer Engine modules."""
    model: ModelConfig
    parallel: ParallelConfig


@dataclass(frozen=True)
class Fusion:
    """A fused kernel: "on" enables it where it is possible, "auto" only where it is also correct."""

    setting: str
    """`GpuConfig` field."""
    field: str
    """`TransformerConfig` field."""
    is_possible: Callable[[KernelContext], bool]
    """Whether the kernel can be enabled in this model and layout."""
    is_correct: Callable[[ModelConfig], bool] = lambda model: True
    """Whether `auto` enables the kernel: it computes this model correctly. Called only if `is_possible`."""

    def value(self, gpu: GpuConfig, context: KernelContext) -> bool:
        """Return the value for `field` in `TransformerConfig`."""
        chosen = getattr(gpu, self.setting)
        return (chosen != "off" and context.te and self.is_possible(context)
                and (chosen == "on" or self.is_correct(context.model)))


FUSIONS = (
    # YaRN is no obstacle: the kernel only rotates, and YaRN's factor is in the softmax scale. Latent
    # attention has a kernel of its own, which would need a table of cosines and sines
    Fusion("rope_fusion", "apply_rope_fusion",
           lambda context: context.parallel.cp == 1 and context.model.latent_attention is None),
    Fusion("router_fusion", "moe_router_fusion", lambda context: context.model.num_moe_layers() > 0,
           lambda model: not fused_routing.find_fusion_problem(model)),
    Fusion("permute_fusion", "moe_permute_fusion", lambda context: context.model.num_moe_layers() > 0),
    Fusion("swiglu_fusion", "bias_activation_fusion",
           lambda context: context.model.activation != "gelu_tanh"),
    Fusion("grad_accumulation_fusion", "gradient_accumulation_fusion", lambda context: True),
)


def transformer_settings(gpu: GpuConfig, train: TrainConfig, context: KernelContext) -> dict[str, Any]:
    """Return the `TransformerConfig` fields for kernels, recomputation, offloading and CUDA graphs.

    Settings that this process cannot use are off. `check_gpu_settings` refuses to train with them, so here
    the model is only inspected (by `plan`)."""
    settings: dict[str, Any] = {fusion.field: fusion.value(gpu, context) for fusion in FUSIONS}
    settings["attention_backend"] = AttnBackend[gpu.attention if context.te else "auto"]
    if train.recompute is True:
        settings |= {"recompute_granularity": "full", "recompute_method": "uniform",
                     "recompute_num_layers": 1}
    elif train.recompute == "selective":
        settings |= {"recompute_granularity": "selective", "recompute_modules": [
            m for m in gpu.recompute_modules if context.te or m not in TE_RECOMPUTE_MODULES]}
    if gpu.offload_modules and context.te:
        settings |= {"fine_grained_activation_offloading": True, "offload_modules": list(gpu.offload_modules)}
    if gpu.cuda_graphs and context.te:
        # graphs are captured before the first step, and the capture includes its own warm-up
        settings |= {"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": list(gpu.cuda_graphs),
                     "cuda_graph_warmup_steps": 0}
    return settings


def expert_settings(gpu: GpuConfig, context: KernelContext) -> dict[str, Any]:
    """Return the `TransformerConfig` fields for models with experts."""
    parallel, dispatcher = context.parallel, context.parallel.expert_dispatcher
    overlap = {"moe_shared_expert_overlap": gpu.shared_expert_overlap == "on" and context.te,
               "overlap_moe_expert_parallel_comm": parallel.expert_overlap == "micro_batches",
               "delay_wgrad_compute": parallel.delay_weight_grads and context.te,
               "moe_router_force_load_balancing": gpu.force_even_routing == "on",
               **({"moe_flex_dispatcher_num_sms": gpu.exchange_sms} if gpu.exchange_sms else {})}
    if parallel.expert_overlap == "weight_gradients" and context.te:
        overlap[DISPATCH_OVERLAP_FIELD] = True
    if dispatcher in DEEP_EP_NAMES:
        if not context.te:
            return overlap | {"moe_token_dispatcher_type": "alltoall"}
        return overlap | {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": dispatcher}
    return overlap | {"moe_token_dispatcher_type": dispatcher}


def gradient_settings(gpu: GpuConfig, parallel: ParallelConfig, *, bf16: bool) -> dict[str, Any]:
    """Return `DistributedDataParallelConfig` fields; `bf16`: parameters are bf16."""
    # the wrapper must wait for delayed weight gradients before it reduces them
    delayed = parallel.delay_weight_grads or parallel.expert_overlap == "weight_gradients"
    return {"delay_wgrad_compute": delayed,
            "grad_reduce_in_fp32": bf16 and gpu.grad_dtype == "fp32",
            "pad_buckets_for_high_nccl_busbw": gpu.pad_buckets == "on",
            "nccl_ub": gpu.nccl_user_buffers == "on" and on_gpu()}


def moment_settings(gpu: GpuConfig) -> dict[str, Any]:
    """Return the `OptimizerConfig` fields for `gpu.moment_dtype`."""
    if gpu.moment_dtype == "fp32":
        return {}
    # `fp8_recipe` enables no FP8 here: with any value but None and "delayed", the optimizer keeps float32
    # masters and gradients (`use_precision_aware_optimizer_no_fp8_or_ds_fp8`). With bf16 weights nothing else
    # reads it.
    return {"use_precision_aware_optimizer": True, "exp_avg_dtype": torch.bfloat16,
            "exp_avg_sq_dtype": torch.bfloat16, "store_param_remainders": False, "fp8_recipe": "tensorwise"}


def resolve_auto_settings(config: RunConfig, te: bool) -> dict[str, Any]:
    """Return the effective value of each setting that may be `auto`: a bool, or the attention's name."""
    context = KernelContext(te, config.model, config.parallel)
    uses_local = (uses_document_attention(context, config.gpu.attention, config.train.deterministic)
                  and not exchanges_heads(context, config.gpu.attention))
    return {**{fusion.setting: fusion.value(config.gpu, context) for fusion in FUSIONS},
            "linear_attention": uses_delta_kernels(context, config.gpu, config.train.deterministic),
            "attention": "local" if uses_local else config.gpu.attention}


def uses_document_attention(context: KernelContext, attention: str, deterministic: bool) -> bool:
    """Return whether our own attention is used: `DocumentAttention`, or the exchange of heads in its place
    (`exchanges_heads`).

    Under `auto` it is used if Transformer Engine has no suitable kernel: on Hopper the fused kernel is
    deterministic only for short rows, and some cuDNN versions lack a kernel for packed rows."""
    model = context.model
    # context parallelism always uses our own attention; `exchanges_heads` selects its method
    if not context.te or context.parallel.cp > 1 or attention == "local":
        return True
    if attention != "auto":
        return False
    return deterministic or bool(
        _find_head_size_problem(model) or find_kernel_problem(model, context.parallel.tp, attention))


def uses_delta_kernels(context: KernelContext, gpu: GpuConfig, deterministic: bool) -> bool:
    """Return whether `LinearAttention` layers train with flash-linear-attention's kernels; Triton autotunes
    the kernels in each process, so results are not deterministic."""
    linear = context.model.linear_attention
    return (context.te and linear is not None and not deterministic and gpu.linear_attention != "torch"
            and linear.key_head_dim <= MAX_FLA_KEY_DIM and not find_fla_problem())


def exchanges_heads(context: KernelContext, attention: str) -> bool:
    """Return whether context parallelism exchanges heads by all-to-all, because `attention` names a kernel of
    Transformer Engine. Under "auto" and "local" it gathers keys and values."""
    return context.te and context.parallel.cp > 1 and attention not in ("auto", "local")


def _find_head_size_problem(model: ModelConfig) -> str:
    """Return why cuDNN has no fused kernel for this head size here, or "" (from
    `nvte_get_fused_attn_backend` of Transformer Engine 2.20.2)."""
    size = get_head_sizes(model)
    if max(size) <= 128 or not on_gpu() or torch.cuda.get_device_capability()[0] < BLACKWELL:
        return ""
    # (query and key, value) head size -> first cuDNN version that trains it; 91100 is 9.11.0
    needed = {(192, 128): 91100, (256, 256): MIN_CUDNN_HEAD_256}.get(size)
    version = torch.backends.cudnn.version() or 0
    if needed is None:
        return f"no fused kernel of cuDNN trains heads of {size[0]} on this GPU"
    if version >= needed:
        return ""
    return f"no fused kernel of cuDNN {version} trains heads of {size[0]} on this GPU before {needed}"


def _find_nondeterminism() -> str:
    """Return in which rows or cuDNN versions fused attention is not deterministic here; "": in none."""
    capability = torch.cuda.get_device_capability() if on_gpu() else (0, 0)
    if capability[0] == HOPPER:
        return "in every row on this GPU"
    if capability[0] >= BLACKWELL and (torch.backends.cudnn.version() or 0) < MIN_CUDNN_DETERMINISTIC:
        return f"on this GPU before cuDNN {MIN_CUDNN_DETERMINISTIC}"
    return ""


def check_gpu_settings(config: RunConfig, te: bool) -> None:
    """Raise `SettingsError` with a sentence per unusable setting; `te`: Transformer Engine is used."""
    context = KernelContext(te, config.model, config.parallel)
    problems = find_broken_rules(
        config.gpu, "gpu", *_fusion_rules(config.gpu, context), *_attention_rules(config, context),
        *_linear_attention_rules(config, context), *_memory_rules(config.gpu, te))
    problems += find_broken_rules(config.parallel, "parallel", *_overlap_rules(config, te),
                                  *_dispatcher_rules(config.parallel.expert_dispatcher))
    if problems:
        raise SettingsError(f"recipe {config.recipe}", problems)


def _require_te(setting: str, te: bool, is_requested: bool) -> Rule:
    """Return the rule that a requested setting needs Transformer Engine."""
    return te or not is_requested, setting, NEEDS_TE, "leave it out"


def _fusion_rules(gpu: GpuConfig, context: KernelContext) -> list[Rule]:
    """Return the rules for fused kernels and overlapped shared experts."""
    rules: list[Rule] = []
    for fusion in FUSIONS:
        is_unusable = getattr(gpu, fusion.setting) == "on" and not fusion.value(gpu, context)
        fault = "has no effect in this model and layout" if context.te else NEEDS_TE
        rules.append((not is_unusable, fusion.setting, fault, "leave it out"))
    fuses_router = gpu.router_fusion == "on" and context.te and context.model.num_moe_layers() > 0
    router_problem = fused_routing.find_fusion_problem(context.model) if fuses_router else ""
    return [*rules, (not router_problem, "router_fusion", router_problem, ""),
            _require_te("shared_expert_overlap", context.te, gpu.shared_expert_overlap != "off")]


def _memory_rules(gpu: GpuConfig, te: bool) -> list[Rule]:
    """Return the rules for recomputation, offloading, CUDA graphs, the optimizer, NCCL and the profiler."""
    # torch's allocator variables whose value conflicts with NCCL's registration
    expandable = [name for name in ALLOCATOR if EXPANDABLE in os.environ.get(name, "")]
    registers_graphs = bool(gpu.cuda_graphs) and os.environ.get("NCCL_GRAPH_REGISTER") != "0"
    # Transformer Engine's newer path offloads weights too; Megatron-Core supports the older path
    can_offload = not gpu.offload_modules or os.environ.get("NVTE_CPU_OFFLOAD_V1") == "1"
    recompute_rules = [(te or module not in gpu.recompute_modules, "recompute_modules",
                        f"names {module}, which {NEEDS_TE}", f"name {instead}")
                       for module, instead in TE_RECOMPUTE_MODULES.items()]
    graph_rules, buffer_rules = list[Rule](), list[Rule]()
    for name in expandable:
        conflict = f"cannot be with {name} = {os.environ[name]}, whose segments NCCL"
        graph_rules.append((not registers_graphs, "cuda_graphs", f"{conflict} would register for graphs",
                            "set the variable NCCL_GRAPH_REGISTER = 0, or take it out"))
        buffer_rules.append((gpu.nccl_user_buffers == "off", "nccl_user_buffers",
                             f"{conflict} does not register", "take it out, or leave the setting out"))
    return [
        *recompute_rules, _require_te("offload_modules", te, bool(gpu.offload_modules)),
        (not te or can_offload, "offload_modules",
         "needs the variable NVTE_CPU_OFFLOAD_V1 = 1 before Transformer Engine is imported",
         "set it for all processes"),
        _require_te("cuda_graphs", te, bool(gpu.cuda_graphs)), *graph_rules,
        _require_te("moment_dtype", te, gpu.moment_dtype != "fp32"),
        _require_te("optimizer_offload", te, bool(gpu.optimizer_offload)),
        (gpu.nccl_user_buffers == "off" or on_gpu(), "nccl_user_buffers", "needs GPUs", "leave it out"),
        (gpu.profiler == "torch" or on_gpu(), "profiler", "= nsys needs GPUs", "leave it out"), *buffer_rules]


def _dispatcher_rules(dispatcher: str) -> list[Rule]:
    if dispatcher not in DEEP_EP_NAMES:
        return []
    problem = find_deep_ep_problem(dispatcher)
    return [(on_gpu(), "expert_dispatcher", "needs GPUs", "use alltoall"),
            (not on_gpu() or not problem, "expert_dispatcher",
             f"cannot be: DeepEP does not import ({problem})",
             "install the commit that containers/install.sh names, or use alltoall")]


def _linear_attention_rules(config: RunConfig, context: KernelContext) -> list[Rule]:
    if config.gpu.linear_attention != "fla":
        return []
    linear, is_deterministic = context.model.linear_attention, config.train.deterministic
    reason = find_fla_problem() if context.te and linear is not None else ""
    return [
        (linear is not None, "linear_attention", "has no effect in this model", "leave it out"),
        (context.te or linear is None, "linear_attention", NEEDS_TE, "set it to torch"),
        (not is_deterministic, "linear_attention", "is not deterministic (train.deterministic)",
         "set it to torch"),
        (linear is None or linear.key_head_dim <= MAX_FLA_KEY_DIM, "linear_attention",
         f"takes keys of up to {MAX_FLA_KEY_DIM} channels", "set it to torch"),
        (not reason, "linear_attention", f"cannot be: flash-linear-attention does not work here ({reason})",
         "install fla-core 0.6.0, or set it to torch")]


def _overlap_rules(config: RunConfig, te: bool) -> list[Rule]:
    """Return the rules for `parallel.expert_overlap` and `delay_weight_grads`."""
    parallel, train = config.parallel, config.train
    overlaps_weight_gradients = parallel.expert_overlap == "weight_gradients"
    num_bf16_layers = train.fp8_bf16_layers_at_start + train.fp8_bf16_layers_at_end
    has_bf16_layers = train.fp8 != "none" and num_bf16_layers > 0
    # Megatron-Core's micro-batch plan frees the experts' output in every layer of an FP8 run. With hybridep a
    # bf16 layer still needs that output, because the dispatcher returns the same tensor.
    keeps_needed_output = (parallel.expert_overlap != "micro_batches" or not has_bf16_layers
                           or parallel.expert_dispatcher != "hybridep")
    return [
        _require_te("delay_weight_grads", te, parallel.delay_weight_grads),
        (te or not overlaps_weight_gradients, "expert_overlap", f"= weight_gradients {NEEDS_TE}",
         "use micro_batches"),
        (keeps_needed_output, "expert_overlap", "= micro_batches frees tensors that layers in bf16 "
         "(train.fp8_bf16_layers_at_start and _at_end) still need, with parallel.expert_dispatcher = "
         "hybridep", "use deepep, or set both to 0")]


def _attention_rules(config: RunConfig, context: KernelContext) -> list[Rule]:
    """Return the rules that `gpu.attention` breaks; the other functions also return rules that hold."""
    rules: list[tuple[str, str]] = []  # (fault, fix)
    attention = config.gpu.attention
    if attention not in ("auto", "local") and not context.te:
        rules.append((NEEDS_TE, "set gpu.attention=auto or local"))
    elif attention == "fused" and (
            why := _find_head_size_problem(context.model)
            or find_kernel_problem(context.model, context.parallel.tp, attention)):
        rules.append((f"cannot be: {why}", "install a newer one, or set gpu.attention=auto or local"))
    elif attention == "fused" and config.train.deterministic and (why := _find_nondeterminism()):
        rules.append((f"cannot be with train.deterministic = true: Transformer Engine's fused attention is "
                      f"not deterministic {why}", "set gpu.attention=auto or local"))
    elif attention == "flash" and not any(map(importlib.util.find_spec,
                                              ("flash_attn", "flash_attn_3", "flash_attn_interface"))):
        rules.append(("cannot be: FlashAttention is not installed", "install flash-attn, or set auto"))
    # Transformer Engine raises an error if these variables contradict the setting
    variables = TE_ATTENTION_VARIABLES if context.te else {}
    for kernel, name in variables.items():
        wanted = "1" if attention in ("auto", kernel) else "0"
        value = os.environ.get(name, wanted)
        if value != wanted:
            rules.append((f"needs the variable {name} = {wanted} or none, and the environment has {value}",
                          "unset it"))
    return [(False, "attention", fault, fix) for fault, fix in rules]
