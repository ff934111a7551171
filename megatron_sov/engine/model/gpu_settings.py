"""Maps `gpu.*` and `train.fp8` to Megatron-Core's config fields, resolves `auto`, and refuses settings that
this process cannot use."""

from __future__ import annotations

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
from megatron_sov.engine import router
from megatron_sov.engine.model.attention_kernels import (
    TE_ATTENTION_VARIABLES, find_kernel_problem, get_head_sizes)
from megatron_sov.engine.parallel.device import (
    BLACKWELL, DEEP_EP_NAMES, HOPPER, MIN_CUDNN_DETERMINISTIC, find_deep_ep_problem, find_fla_problem,
    find_fp8_problems, on_gpu)
from megatron_sov.model.config import GpuConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_sov.model.config.gpu import fp8_format

# FP8 and FP4 matrix products by Transformer Engine (`train.fp8`).

QUANTIZATION_FIELDS = ("fp8", "fp4", "moe_router_padding_for_quantization")
"""Fields by which Megatron-Core's forward passes decide whether to quantize."""


def fp8_settings(train: TrainConfig) -> dict[str, Any]:
    """Return the `TransformerConfig` fields for `train.fp8`."""
    if train.fp8 == "none":
        return {}
    scaling = ({"fp4": "e2m1", "fp4_recipe": "nvfp4"} if train.fp8 == "nvfp4"
               else {"fp8": fp8_format(train), "fp8_recipe": train.fp8})
    return {**scaling, "moe_router_padding_for_quantization": train.fp8_pad_routed_tokens,
            "fp8_param": train.fp8_weights}


def keep_ends_in_bf16(config: Any, train: TrainConfig) -> None:
    """Set the trunk layers that stay in bf16, on a validated `TransformerConfig`.

    The validation limits both ends to num_layers // pp layers, which unequal stages do not need:
    `is_first_last_bf16_layer` looks up layers by their number in the whole model.
    """
    start, end = train.fp8_bf16_layers_at_start, train.fp8_bf16_layers_at_end
    config.first_last_layers_bf16 = start + end > 0
    config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16 = start, end


def check_fp8_support(train: TrainConfig, serves: bool) -> None:
    """Raise an error if this process cannot compute `train.fp8`.

    Args:
        train: training settings.
        serves: whether models use Transformer Engine modules here.

    Raises:
        UserError: no GPU with Transformer Engine, or the GPU lacks the recipe.
    """
    if train.fp8 == "none":
        return
    if not serves:
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
    """Architecture."""
    parallel: ParallelConfig
    """Layout."""


@dataclass(frozen=True)
class Fusion:
    """A fused kernel, enabled if possible unless the `GpuConfig` field is off."""

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
    # the softmax scale contains YaRN's factor, so the kernel only rotates
    Fusion("rope_fusion", "apply_rope_fusion", lambda context: context.parallel.cp == 1
           # the latent attention kernel would need a table of cosines and sines
           and context.model.latent_attention is None),
    Fusion("router_fusion", "moe_router_fusion", lambda context: context.model.num_moe_layers() > 0,
           lambda model: not router.find_fusion_problem(model)),
    Fusion("permute_fusion", "moe_permute_fusion", lambda context: context.model.num_moe_layers() > 0),
    Fusion("swiglu_fusion", "bias_activation_fusion",
           lambda context: context.model.activation != "gelu_tanh"),
    Fusion("grad_accumulation_fusion", "gradient_accumulation_fusion", lambda context: True),
)
OVERLAP_FIELDS = ("overlap_moe_expert_parallel_comm", "delay_wgrad_compute")
"""Fields set after the config's validation."""
DISPATCH_OVERLAP_FIELD = "overlap_dispatch_backward_with_experts_wgrad"
"""Field for `parallel.expert_overlap` = weight_gradients."""
TE_RECOMPUTE_MODULES = {"layernorm": "core_attn, mlp or moe", "moe_act": "moe"}
"""Modules whose recomputation needs Transformer Engine -> modules to name without it."""
MIN_CUDNN_HEAD_256 = 92500
"""First cuDNN version that trains packed rows with head size 256 on Blackwell."""
NEEDS_TE = "needs Transformer Engine on a GPU, and a bf16 model"
ALLOCATOR, EXPANDABLE = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"), "expandable_segments:True"
"""Both names of torch's allocator variable, and the option that conflicts with NCCL's registration."""


def transformer_settings(gpu: GpuConfig, train: TrainConfig, context: KernelContext) -> dict[str, Any]:
    """Return the `TransformerConfig` fields for kernels, recomputation, offloading and CUDA graphs.

    Settings that this process cannot use are off: `check_gpu_settings` has rejected training with them, so
    the model is only inspected (by `plan`).
    """
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
    return {"use_precision_aware_optimizer": True, "exp_avg_dtype": torch.bfloat16,
            "exp_avg_sq_dtype": torch.bfloat16, "store_param_remainders": False,
            # any recipe but None and delayed keeps float32 masters and gradients
            # (`use_precision_aware_optimizer_no_fp8_or_ds_fp8`); with bf16 weights nothing else reads it
            "fp8_recipe": "tensorwise"}


def resolve_auto_settings(config: RunConfig, te: bool) -> dict[str, Any]:
    """Return the effective value per setting that may be `auto`: on or off, or the attention."""
    context = KernelContext(te, config.model, config.parallel)
    own_attention = uses_document_attention(context, config.gpu.attention, config.train.deterministic)
    by_name = exchanges_heads(context, config.gpu.attention) or not own_attention
    return {**{fusion.setting: fusion.value(config.gpu, context) for fusion in FUSIONS},
            "linear_attention": uses_delta_kernels(context, config.gpu, config.train.deterministic),
            "attention": config.gpu.attention if by_name else "local"}


def uses_document_attention(context: KernelContext, attention: str, deterministic: bool) -> bool:
    """Return whether `DocumentAttention` is used.

    Under `auto` it is used if Transformer Engine has no suitable kernel: on Hopper the fused kernel is
    deterministic only for short rows, and some cuDNN versions lack a kernel for packed rows.

    Args:
        context: model, layout and modules.
        attention: `gpu.attention`.
        deterministic: `train.deterministic`.
    """
    model = context.model
    if not context.te or context.parallel.cp > 1 or attention == "local":
        return True
    if attention != "auto":
        return False
    return deterministic or bool(
        _find_head_size_problem(model) or find_kernel_problem(model, context.parallel.tp, attention))


MAX_FLA_KEY_DIM = 256
"""Maximum key head size in flash-linear-attention's kernels."""


def uses_delta_kernels(context: KernelContext, gpu: GpuConfig, deterministic: bool) -> bool:
    """Return whether `LinearAttention` layers train with flash-linear-attention's kernels.

    Triton autotunes kernels in each process, so results are not deterministic.

    Args:
        context: model, layout and modules.
        gpu: GPU settings.
        deterministic: `train.deterministic`.
    """
    linear = context.model.linear_attention
    return (context.te and linear is not None and not deterministic and gpu.linear_attention != "torch"
            and linear.key_head_dim <= MAX_FLA_KEY_DIM and not find_fla_problem())


def exchanges_heads(context: KernelContext, attention: str) -> bool:
    """Return whether context parallelism exchanges heads (all-to-all), for attention selected by name;
    otherwise it gathers keys and values."""
    return context.te and context.parallel.cp > 1 and attention not in ("auto", "local")


def _find_head_size_problem(model: ModelConfig) -> str:
    """Return why cuDNN has no fused kernel for this head size here, or "" (from
    `nvte_get_fused_attn_backend` of Transformer Engine 2.20.2)."""
    size = get_head_sizes(model)
    if max(size) <= 128 or not on_gpu() or torch.cuda.get_device_capability()[0] < BLACKWELL:
        return ""
    needed = {(192, 128): 91100, (256, 256): MIN_CUDNN_HEAD_256}.get(size)
    version = torch.backends.cudnn.version() or 0
    if needed is None:
        return f"no fused kernel of cuDNN trains heads of {size[0]} on this GPU"
    if version >= needed:
        return ""
    return f"no fused kernel of cuDNN {version} trains heads of {size[0]} on this GPU before {needed}"


def _find_nondeterminism() -> str:
    """Return where cuDNN's fused attention is not deterministic, or ""."""
    capability = torch.cuda.get_device_capability() if on_gpu() else (0, 0)
    if capability[0] == HOPPER:
        return "in every row on this GPU"
    if capability[0] >= BLACKWELL and (torch.backends.cudnn.version() or 0) < MIN_CUDNN_DETERMINISTIC:
        return f"on this GPU before cuDNN {MIN_CUDNN_DETERMINISTIC}"
    return ""


def check_gpu_settings(config: RunConfig, te: bool) -> None:
    """Raise `SettingsError` for settings that this process cannot use.

    Args:
        config: valid run settings.
        te: whether the model uses Transformer Engine modules.

    Raises:
        SettingsError: one sentence per setting.
    """
    gpu, context = config.gpu, KernelContext(te, config.model, config.parallel)
    dispatcher = config.parallel.expert_dispatcher
    routes = gpu.router_fusion == "on" and te and config.model.num_moe_layers() > 0
    router_problem = router.find_fusion_problem(config.model) if routes else ""
    problems = find_broken_rules(
        gpu, "gpu",
        *((getattr(gpu, fusion.setting) != "on" or fusion.value(gpu, context), fusion.setting,
           "has nothing to do in this model and layout" if te else NEEDS_TE, "leave it out")
          for fusion in FUSIONS),
        (not router_problem, "router_fusion", router_problem),
        (gpu.shared_expert_overlap == "off" or te, "shared_expert_overlap", NEEDS_TE, "leave it out"),
        *_attention_rules(config, context),
        *_linear_attention_rules(config, context),
        *((te or module not in gpu.recompute_modules, "recompute_modules",
           f"names {module}, which {NEEDS_TE}", f"name {instead}")
          for module, instead in TE_RECOMPUTE_MODULES.items()),
        (te or not gpu.offload_modules, "offload_modules", NEEDS_TE, "leave it out"),
        # Transformer Engine's newer path offloads weights too; the library supports the older one
        (not te or not gpu.offload_modules or os.environ.get("NVTE_CPU_OFFLOAD_V1") == "1", "offload_modules",
         "needs the variable NVTE_CPU_OFFLOAD_V1 = 1 before Transformer Engine is imported",
         "set it for all processes"),
        (te or not gpu.cuda_graphs, "cuda_graphs", NEEDS_TE, "leave it out"),
        *((not gpu.cuda_graphs or EXPANDABLE not in os.environ.get(name, "")
           or os.environ.get("NCCL_GRAPH_REGISTER") == "0",
           "cuda_graphs", f"cannot be with {name} = {os.environ.get(name)}, whose segments NCCL would "
           "register for graphs", "set the variable NCCL_GRAPH_REGISTER = 0, or take it out")
          for name in ALLOCATOR),
        (te or gpu.moment_dtype == "fp32", "moment_dtype", NEEDS_TE, "leave it out"),
        (te or not gpu.optimizer_offload, "optimizer_offload", NEEDS_TE, "leave it out"),
        (gpu.nccl_user_buffers == "off" or on_gpu(), "nccl_user_buffers", "needs GPUs", "leave it out"),
        (gpu.profiler == "torch" or on_gpu(), "profiler", "= nsys needs GPUs", "leave it out"),
        *((gpu.nccl_user_buffers == "off" or EXPANDABLE not in os.environ.get(name, ""),
           "nccl_user_buffers", f"cannot be with {name} = {os.environ.get(name)}, whose segments NCCL does "
           "not register", "take it out, or leave the setting out")
          for name in ALLOCATOR))
    problems += find_broken_rules(config.parallel, "parallel", *_overlap_rules(config, te))
    if dispatcher in DEEP_EP_NAMES:
        problems += find_broken_rules(
            config.parallel, "parallel",
            (on_gpu(), "expert_dispatcher", "needs GPUs", "use alltoall"),
            (not on_gpu() or not find_deep_ep_problem(dispatcher), "expert_dispatcher",
             f"cannot be: DeepEP does not import ({find_deep_ep_problem(dispatcher)})",
             "install the commit that "
             "containers/install.sh names, or use alltoall"))
    if problems:
        raise SettingsError(f"recipe {config.recipe}", problems)


def _linear_attention_rules(config: RunConfig, context: KernelContext) -> list[tuple[bool, str, str, str]]:
    """Return the rules for `gpu.linear_attention` = fla as (holds, setting, fault, fix)."""
    if config.gpu.linear_attention != "fla":
        return []
    sizes = context.model.linear_attention
    linear = sizes is not None
    reason = find_fla_problem() if context.te and sizes is not None else ""
    return [
        (linear, "linear_attention", "has nothing to do in this model", "leave it out"),
        (context.te or not linear, "linear_attention", NEEDS_TE, "set it to torch"),
        (not config.train.deterministic, "linear_attention",
         "does not repeat its bits (train.deterministic)", "set it to torch"),
        (sizes is None or sizes.key_head_dim <= MAX_FLA_KEY_DIM, "linear_attention",
         f"takes keys of up to {MAX_FLA_KEY_DIM} channels", "set it to torch"),
        (not reason or not linear, "linear_attention",
         f"cannot be: flash-linear-attention does not serve ({reason})",
         "install fla-core 0.6.0, or set it to torch")]


def _overlap_rules(config: RunConfig, te: bool) -> list[tuple[bool, str, str, str]]:
    """Return the rules for `parallel.expert_overlap` and `delay_weight_grads`."""
    parallel, train = config.parallel, config.train
    passes = parallel.expert_overlap == "micro_batches"
    spreads = parallel.expert_overlap == "weight_gradients"
    has_bf16_ends = train.fp8 != "none" and train.fp8_bf16_layers_at_start + train.fp8_bf16_layers_at_end > 0
    return [
        (te or not parallel.delay_weight_grads, "delay_weight_grads", NEEDS_TE, "leave it out"),
        (te or not spreads, "expert_overlap", f"= weight_gradients {NEEDS_TE}", "use micro_batches"),
        # the library's plan frees the experts' output in every layer of an FP8 run; a bf16 layer still needs
        # it, and this dispatcher returns the same tensor
        (not passes or parallel.expert_dispatcher != "hybridep" or not has_bf16_ends,
         "expert_overlap", "= micro_batches frees what layers in bf16 (train.fp8_bf16_layers_at_start and "
         "_at_end) still need, with parallel.expert_dispatcher = hybridep", "use deepep, or set both to 0")]


def _attention_rules(config: RunConfig, context: KernelContext) -> list[tuple[bool, str, str, str]]:
    """Return the violated rules for `gpu.attention`."""
    rules: list[tuple[str, str]] = []
    attention = config.gpu.attention
    if attention not in ("auto", "local") and not context.te:
        rules.append((NEEDS_TE, "set it to auto or local"))
    elif attention == "fused" and (
            why := _find_head_size_problem(context.model)
            or find_kernel_problem(context.model, context.parallel.tp, attention)):
        rules.append((f"cannot be: {why}", "install a newer one, or set it to auto or local"))
    elif attention == "fused" and config.train.deterministic and (why := _find_nondeterminism()):
        rules.append((f"cannot be with train.deterministic = true: Transformer Engine's fused attention does "
                      f"not repeat its bits {why}", "set it to auto or local"))
    elif attention == "flash" and not any(map(importlib.util.find_spec,
                                              ("flash_attn", "flash_attn_3", "flash_attn_interface"))):
        rules.append(("cannot be: FlashAttention is not installed", "install flash-attn, or set auto"))
    for kernel, name in TE_ATTENTION_VARIABLES.items() if context.te else ():
        # the library raises an error if these variables contradict the setting
        value, wanted = os.environ.get(name), str(int(attention in ("auto", kernel)))
        if value not in (None, wanted):
            rules.append((f"needs the variable {name} = {wanted} or none, and the environment has {value}",
                          "unset it"))
    return [(False, "attention", *rule) for rule in rules]

