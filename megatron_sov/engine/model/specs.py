"""Builds Megatron-Core configs and layer specs from a `ModelConfig`."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_layer_specs, get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec)
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec, get_module, get_submodules
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.nn.functional import dropout, gelu, rms_norm, silu

from megatron_sov.base.errors import UserError, format_error
from megatron_sov.engine.model.attention import DocumentAttention
from megatron_sov.engine.model.attention_kernels import cache_attention_decisions, load_attention_utils
from megatron_sov.engine.model.gpu_settings import (
    OVERLAP_FIELDS, KernelContext, exchanges_heads, expert_settings, fp8_settings, keep_ends_in_bf16,
    transformer_settings, uses_delta_kernels, uses_document_attention)
from megatron_sov.engine.model.graphs import build_graphed_layer
from megatron_sov.engine.model.latent_attention import (
    LatentDocumentAttention, get_latent_settings, set_latent_attention)
from megatron_sov.engine.model.linear_attention import set_linear_attention
from megatron_sov.engine.model.rotary import compute_frequency_ratios, compute_softmax_scale
from megatron_sov.engine.parallel import context
from megatron_sov.engine.parallel.device import PRECISION as PRECISION, on_gpu
from megatron_sov.engine.router import BalancedRouter, RoutingStep
from megatron_sov.model.config import GpuConfig, ModelConfig, ParallelConfig, TrainConfig, YarnConfig
from megatron_sov.model.config.gpu import DEFAULT_GPU

gelu_tanh = partial(gelu, approximate="tanh")
"""GELU by its tanh approximation (arXiv 1606.08415, section 2)."""
OWN_FIELDS = ("norm_topk_prob", "router_bias_update", "logits_multiplier", "mtp_depths",
              "zero_centered_norms")
"""Fields of `ModelConfig` that our modules read from the library's config."""


# Layer parts that Megatron-Core lacks. `BlockOutput` takes the place of the bias-dropout-add, where a layer
# passes a block's output together with the residual.


class BlockOutput(torch.nn.Module):
    """Residual addition: ``residual + multiplier * dropout(norm(output))``."""

    norm: torch.nn.Module | None
    """RMSNorm on the block's output. None: no norm."""

    def __init__(self, config: Any, norm: Any, multiplier: float) -> None:
        """Create the norm.

        Args:
            config: Megatron-Core's `TransformerConfig`.
            norm: class of the norm. None: no norm.
            multiplier: factor on the block's output.
        """
        super().__init__()
        self.norm = norm and norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        self._multiplier = multiplier

    def forward(self, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        """Return the function that adds (output, bias) to the residual; `fused` changes nothing."""
        def add_to_residual(output_with_bias: tuple[torch.Tensor, torch.Tensor | None],
                            residual: torch.Tensor, share_dropped: float) -> torch.Tensor:
            output, _ = output_with_bias  # the linear layer before has no bias
            if self.norm is not None:
                output = self.norm(output)
            output = dropout(output, share_dropped, training)
            return residual + (output if self._multiplier == 1 else output * self._multiplier)

        return add_to_residual


class ZeroCenteredNorm(torch.nn.Module):
    """RMSNorm that multiplies by 1 + weight (Gemma)."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(hidden_size))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self._eps = eps

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> [..., hidden]."""
        return rms_norm(states, self.weight.shape, 1 + self.weight, self._eps)


class GatedAttention(SelfAttention):
    """Self-attention with output gates, in float64 as well: Megatron-Core computes gates in float32."""

    def _apply_output_gate(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return (x * torch.sigmoid(gate.to(wide)).reshape(x.shape)).to(x.dtype)


class BlockOutputLayer(TransformerLayer):
    """Transformer layer with `BlockOutput` residuals and its own rotary frequencies.

    Megatron-Core enables gradients around residual additions; with a norm weight inside, that would keep the
    graph of every forward pass under `torch.no_grad`."""

    def __init__(self, *args: Any, frequency_ratios: Sequence[float] | None, **kwargs: Any) -> None:
        """Create the layer.

        Args:
            frequency_ratios: per rotated channel, ratio between this layer's rotary frequency and the other
                layers'. None: 1.
        """
        super().__init__(*args, **kwargs)
        self.bias_dropout_add_exec_handler = contextlib.nullcontext
        self._frequency_ratios = frequency_ratios
        # not a buffer: Megatron-Core casts buffers to the weights' dtype
        self._cached_ratios: torch.Tensor | None = None

    def _get_frequency_ratios(self, angles: torch.Tensor) -> torch.Tensor:
        """Return `frequency_ratios` in the dtype and on the device of `angles`; cached, as a copy blocks."""
        cached = self._cached_ratios
        if cached is None or (cached.device, cached.dtype) != (angles.device, angles.dtype):
            cached = self._cached_ratios = angles.new_tensor(self._frequency_ratios)
        return cached

    def _forward_attention(self, *args: Any, **kwargs: Any) -> Any:
        if self._frequency_ratios is not None:
            angles = kwargs["rotary_pos_emb"]
            kwargs["rotary_pos_emb"] = angles * self._get_frequency_ratios(angles)
        return super()._forward_attention(*args, **kwargs)


def needs_transformer_engine(dtype: torch.dtype) -> bool:
    """Return whether a model with this parameter dtype uses Transformer Engine modules: bf16 on GPUs.

    The modules do not support float64. In float32 the fused and flash attention are unavailable, and the
    remaining kernel needs memory quadratic in the row length."""
    return on_gpu() and dtype == torch.bfloat16


@cache
def find_transformer_engine_error() -> str:
    """Return the error that importing Transformer Engine raises, or an empty string."""
    try:
        # optional package, and only GPUs need it
        import transformer_engine.pytorch  # noqa: F401
    # many errors occur: not installed, missing libraries, wrong CUDA, RuntimeError of the bare package
    except Exception as e:
        return format_error(e)
    return ""


def uses_transformer_engine(dtype: torch.dtype) -> bool:
    """Return `needs_transformer_engine(dtype)` and check that Transformer Engine imports. Raises `UserError`:
    the model needs Transformer Engine, and the import fails."""
    if not needs_transformer_engine(dtype):
        return False
    if error := find_transformer_engine_error():
        raise UserError(f"train.precision = bf16 on a GPU: Transformer Engine does not import ({error}); "
                        "install it (`megatron-sov doctor` says how), or set train.precision=fp32, which is "
                        "many times slower")
    return True


def build_transformer_config(model: ModelConfig, parallel: ParallelConfig, train: TrainConfig,
                             gpu: GpuConfig = DEFAULT_GPU) -> Any:
    """Build Megatron-Core's `TransformerConfig` from model, layout, training and GPU settings."""
    dtype = PRECISION[train.precision]
    te = uses_transformer_engine(dtype)
    kernel_context = KernelContext(te, model, parallel)
    settings: dict[str, Any] = {
        "num_layers": model.num_layers, "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_heads, "num_query_groups": model.num_kv_heads,
        "kv_channels": model.head_dim, "ffn_hidden_size": model.dense_ffn_dim or model.expert_ffn_dim,
        "normalization": "RMSNorm", "layernorm_epsilon": model.norm_eps, "gated_linear_unit": True,
        "activation_func": {"silu": silu, "gelu_tanh": gelu_tanh}[model.activation],
        "layernorm_zero_centered_gamma": te and model.zero_centered_norms,
        "add_bias_linear": False, "add_qkv_bias": model.qkv_bias,
        "qk_layernorm": model.qk_norm, "attention_output_gate": model.attention_output_gate,
        "hidden_dropout": train.hidden_dropout, "attention_dropout": 0.0,  # our attention has none
        "perform_initialization": False, "use_cpu_initialization": not on_gpu(),
        "params_dtype": dtype, "pipeline_dtype": dtype, "bf16": train.precision == "bf16",
        "tensor_model_parallel_size": parallel.tp, "sequence_parallel": parallel.sp,
        "pipeline_model_parallel_size": parallel.pp,
        "virtual_pipeline_model_parallel_size": parallel.vpp if parallel.vpp > 1 else None,
        "expert_model_parallel_size": parallel.ep,
        "expert_tensor_parallel_size": parallel.etp, "context_parallel_size": parallel.cp,
        # interleaved pipelines send two messages to a peer at a time: in a batch, gloo swaps them silently
        "batch_p2p_comm": on_gpu() and parallel.vpp == 1, "overlap_p2p_comm": parallel.vpp > 1,
        # losses are sums divided once by global counts; the wrapper reads this when it wraps the model
        "calculate_per_token_loss": True, "deterministic_mode": train.deterministic,
        "masked_softmax_fusion": False, "bias_dropout_fusion": te,
        # Megatron-Core would synchronize with the host at every message to support an older torch
        "hetereogenous_dist_checkpoint": True, "cuda_graph_modules": [], "batch_p2p_sync": False,
        **transformer_settings(gpu, train, kernel_context),
    }
    if not te and not on_gpu():
        settings["bias_activation_fusion"] = model.activation == "silu"  # patched by `patch_swiglu_kernels`
    if parallel.pipeline_layout:
        settings["pipeline_model_parallel_layout"] = _build_pipeline_layout(model, parallel)
    if model.sliding_window_tokens:
        # Megatron-Core's window is (keys to the left, keys to the right) without the current token
        settings["window_size"] = (model.sliding_window_tokens - 1, 0)
    if model.num_mtp_layers:
        settings |= {"mtp_num_layers": model.num_mtp_layers, "mtp_loss_scaling_factor": model.mtp_loss_coeff}
    if model.num_moe_layers():
        settings |= _moe_settings(model, te) | expert_settings(gpu, kernel_context)
        settings["moe_router_dtype"] = "fp64" if dtype == torch.float64 else "fp32"
    # without Transformer Engine the settings are ignored: `check_gpu_settings` rejects training, `plan` only
    # inspects
    settings |= fp8_settings(train) if te else {}
    config = _create_library_config(model, settings)
    if te and train.fp8 != "none":
        keep_ends_in_bf16(config, train)
    _set_per_layer_lists(config, model, parallel)
    if model.yarn is not None or model.attention_multiplier is not None:
        config.softmax_scale = compute_softmax_scale(model, "sliding_attention")
    config.own_attention = uses_document_attention(kernel_context, gpu.attention, train.deterministic)
    config.exchanges_heads = exchanges_heads(kernel_context, gpu.attention)
    config.delta_kernels = uses_delta_kernels(kernel_context, gpu, train.deterministic)
    config.routing_step = RoutingStep()
    for name in OWN_FIELDS:
        setattr(config, name, getattr(model, name))
    return config


def _create_library_config(model: ModelConfig, settings: dict[str, Any]) -> Any:
    """Construct `TransformerConfig`, or `MLATransformerConfig` for latent attention."""
    latent = get_latent_settings(model)
    # the config's validation refuses float32, and MTP layers, which `OverlappedPasses` runs separately
    overlap = {name: settings.pop(name) for name in OVERLAP_FIELDS if name in settings}
    config = MLATransformerConfig(**settings | latent) if latent else TransformerConfig(**settings)
    for name, value in overlap.items():
        setattr(config, name, value)
    return config


def _moe_settings(model: ModelConfig, te: bool) -> dict[str, Any]:
    return {
        "num_moe_experts": model.num_experts, "moe_router_topk": model.num_experts_per_token,
        "moe_ffn_hidden_size": model.expert_ffn_dim,
        "moe_shared_expert_intermediate_size": model.expert_ffn_dim * model.num_shared_experts or None,
        "moe_router_score_function": model.router_score,
        "moe_router_topk_scaling_factor": model.routed_scaling_factor,
        "moe_router_enable_expert_bias": model.router_bias,
        "moe_router_bias_update_rate": model.router_bias_update_rate * (model.router_bias_update == "sign"),
        # a softmax does not change the top-k; without pre-softmax Megatron-Core refuses top-1 routing
        "moe_router_pre_softmax": model.router_score == "softmax",
        "moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": model.seq_aux_loss_coeff,
        "moe_grouped_gemm": te,
        "moe_layer_freq": [0] * model.num_dense_layers + [1] * model.num_moe_layers(),
        **({"moe_router_num_groups": model.num_expert_groups,
            "moe_router_group_topk": model.num_groups_per_token} if model.num_expert_groups > 1 else {}),
    }


def _build_pipeline_layout(model: ModelConfig, parallel: ParallelConfig) -> list[list[str]]:
    """Return each chunk's contents in the terms of `pipeline_model_parallel_layout`."""
    chunks = [["decoder"] * layers for layers in parallel.pipeline_layout]
    chunks[0].insert(0, "embedding")
    chunks[-1] += [*["mtp"] * model.num_mtp_layers, "loss"]
    return chunks


def _set_per_layer_lists(config: Any, model: ModelConfig, parallel: ParallelConfig) -> None:
    """Set sliding windows, rotation and YaRN per layer, with an extra entry for the MTP layer.

    Megatron-Core looks both lists up by layer number, and the MTP layer has number num_layers + 1. Its
    validation allows only num_layers entries, so the lists are set after it."""
    kinds = list(model.layer_types()) + [model.mtp_layer_type()] * model.num_mtp_layers
    if model.sliding_window_tokens:
        config.window_attn_skip_freq = [int(k == "sliding_attention") for k in kinds]
    if not model.rope_on_global:
        config.no_rope_freq = [int(k == "full_attention") for k in kinds]
    _set_yarn(config, model, parallel)


def _set_yarn(config: Any, model: ModelConfig, parallel: ParallelConfig) -> None:
    yarn = model.yarn
    if yarn is None and model.latent_attention is not None:
        # Megatron-Core supports only YaRN angles for latent attention: factor 1 and an empty ramp leave
        # plain frequencies; the first rotary table has as few positions as context parallelism can split
        yarn = YarnConfig(factor=1.0, original_max_position_tokens=2 * parallel.cp, beta_fast=1.0,
                          beta_slow=1.0)
    if yarn is not None:
        config.yarn_rotary_scaling_factor = yarn.factor
        config.yarn_original_max_position_embeddings = yarn.original_max_position_tokens
        config.yarn_beta_fast, config.yarn_beta_slow = yarn.beta_fast, yarn.beta_slow
        # equal values make Megatron-Core's factor on cosine and sine 1; our softmax scale contains the factor
        config.yarn_mscale = config.yarn_mscale_all_dim = 1.0
        config.yarn_correction_range_round_to_int = True


def build_layer_specs(config: Any, model: ModelConfig) -> list[Any]:
    """Return the trunk layers' specs, with `BalancedRouter` and, if enabled, `DocumentAttention`."""
    specs = _copy_specs(get_gpt_decoder_layer_specs(config,
                                                    uses_transformer_engine(config.params_dtype), "RMSNorm"))
    return [_finish_spec(config, spec, kind, window, model)
            for spec, kind, window in zip(specs, model.layer_types(), model.windows(), strict=True)]


def build_mtp_layer_spec(config: Any, model: ModelConfig) -> Any:
    """Return the spec of the transformer layer inside an MTP layer: dense, or like the last trunk layer."""
    te = uses_transformer_engine(config.params_dtype)
    if model.mtp_experts:
        spec = _copy_specs(get_gpt_decoder_layer_specs(config, te, "RMSNorm")[-1:])[0]
    elif te:
        spec = get_gpt_layer_with_transformer_engine_spec(
            qk_layernorm=config.qk_layernorm, multi_latent_attention=config.multi_latent_attention)
    else:
        spec = get_gpt_layer_local_spec(
            qk_layernorm=config.qk_layernorm, multi_latent_attention=config.multi_latent_attention,
            normalization="RMSNorm")
    spec = _finish_spec(config, spec, model.mtp_layer_type(), model.mtp_window(), model)
    spec.module = _number_after_trunk(spec.module)
    return spec


def _number_after_trunk(layer: Any) -> Any:
    """Return a subclass of the MTP layer's transformer layer that counts from `num_layers` + 1.

    Megatron-Core numbers MTP layers from 1 and looks up windows and rotations by that number, in lists with
    the MTP layer's entry last: the layer would silently use the attention of the first trunk layer."""
    class NumberedAfterTrunk(layer):
        def __init__(self, config: Any, *args: Any, layer_number: int, **kwargs: Any) -> None:
            super().__init__(config, *args, layer_number=config.num_layers + layer_number, **kwargs)

    return NumberedAfterTrunk


def _copy_specs(specs: list[Any]) -> list[Any]:
    """Copy specs: Megatron-Core shares one object between equal layers, and ours differ in attention."""
    return [copy.deepcopy(spec) for spec in specs]


def _finish_spec(config: Any, spec: Any, kind: str, window: int, model: ModelConfig) -> Any:
    """Set attention, norms, router and graphs in a layer's spec, and return the spec."""
    if kind == "linear_attention":
        assert model.linear_attention is not None, "settings rule: D layers have sizes"
        set_linear_attention(config, spec, model.linear_attention,
                             uses_transformer_engine(config.params_dtype))
    else:
        _finish_attention(config, spec, kind, window, model)
    _set_norms(config, spec, kind, model)
    if has_experts(spec):
        get_submodules(spec.submodules.mlp).router = BalancedRouter
        if config.cuda_graph_impl != "none":
            spec.module = build_graphed_layer(spec.module)
        # Transformer Engine keeps the norm's own name in checkpoints; use the same name for both
        spec.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    return spec


def _finish_attention(config: Any, spec: Any, kind: str, window: int, model: ModelConfig) -> None:
    """Set a layer's core attention, window, softmax scale and output gate."""
    attention, latent = spec.submodules.self_attention.submodules, model.latent_attention is not None
    if config.exchanges_heads:
        attention.core_attention = build_exchanged_attention(attention.core_attention)
    elif config.own_attention:
        module = LatentDocumentAttention if latent else DocumentAttention
        attention.core_attention = ModuleSpec(module=module, params={"window_tokens": window})
    if uses_transformer_engine(config.params_dtype) and (config.exchanges_heads or not config.own_attention):
        cache_attention_decisions(load_attention_utils())
    if window not in (0, model.sliding_window_tokens) and not config.own_attention:
        attention.core_attention = _set_window(attention.core_attention, window)
    if latent:
        set_latent_attention(spec)
    # Megatron-Core computes a different scale for latent attention
    if latent or config.softmax_scale not in (None, compute_softmax_scale(model, kind)):
        attention.core_attention = _set_softmax_scale(attention.core_attention,
                                                      compute_softmax_scale(model, kind))
    if model.attention_output_gate:
        spec.submodules.self_attention.module = GatedAttention


def build_exchanged_attention(core_attention: Any) -> Any:
    """Return a spec that exchanges heads around Transformer Engine's attention (context parallelism).

    Each process receives all tokens of its share of heads. With fewer key heads than processes, several
    processes receive the same key heads. Never run on a GPU by this project."""
    class ExchangedAttention(get_module(core_attention)):  # type: ignore[misc]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            cp, tp, local_config = context.get_cp_size(), config.tensor_model_parallel_size, copy.copy(config)
            local_config.context_parallel_size = 1
            local_config.num_attention_heads = config.num_attention_heads // cp
            local_config.num_query_groups = max(tp, config.num_query_groups // cp)
            super().__init__(local_config, *args, **kwargs)

        def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None,
                    attn_mask_type: Any = None, attention_bias: None = None,
                    packed_seq_params: Any = None) -> torch.Tensor:
            """Attend; shapes as in `DocumentAttention`."""
            copies = max(1, context.get_cp_size() // key.shape[1])
            if copies > 1:
                key, value = (t.repeat_interleave(copies, dim=1) for t in (key, value))
            row = super().forward(*(context.exchange_tokens(t) for t in (query, key, value)), attention_mask,
                                  attn_mask_type, attention_bias, packed_seq_params.unsplit)
            return context.exchange_heads(row.unflatten(-1, (-1, value.shape[-1]))).flatten(1)

    return ModuleSpec(module=ExchangedAttention, params=getattr(core_attention, "params", {}))


def _set_softmax_scale(core_attention: Any, scale: float) -> Any:
    """Return a core attention's spec with another softmax scale than `config.softmax_scale`."""
    class ScaledAttention(get_module(core_attention)):  # type: ignore[misc]
        def __init__(self, *args: Any, softmax_scale: float | None, **kwargs: Any) -> None:
            super().__init__(*args, softmax_scale=scale, **kwargs)

    return ModuleSpec(module=ScaledAttention, params=getattr(core_attention, "params", {}))


def _set_window(core_attention: Any, window: int) -> Any:
    """Return a core attention's spec with another window, in tokens; Megatron-Core has one `window_size` for
    all layers. Never run on a GPU by this project."""
    class WindowedAttention(get_module(core_attention)):  # type: ignore[misc]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            own_config = copy.copy(config)
            own_config.window_size = (window - 1, 0)
            super().__init__(own_config, *args, **kwargs)

    return ModuleSpec(module=WindowedAttention, params=getattr(core_attention, "params", {}))


def _set_norms(config: Any, spec: Any, kind: str, model: ModelConfig) -> None:
    """Set a layer's norms, rotary frequencies and residual additions."""
    layer, te = spec.submodules, uses_transformer_engine(config.params_dtype)
    if model.block_norms == "post":
        layer.input_layernorm = layer.pre_mlp_layernorm = IdentityOp
        if te:
            _unfuse_norms(layer)
    if model.zero_centered_norms and not te:
        attention = layer.self_attention.submodules
        for part, name in ((layer, "input_layernorm"), (layer, "pre_mlp_layernorm"),
                           (attention, "q_layernorm"), (attention, "k_layernorm")):
            if getattr(part, name, IdentityOp) is not IdentityOp:  # linear attention lacks these submodules
                setattr(part, name, ZeroCenteredNorm)
    frequency_ratios = compute_frequency_ratios(model) if kind == "sliding_attention" else None
    norm_output = model.block_norms in ("post", "both")
    if frequency_ratios is None and not norm_output and model.residual_multiplier == 1:
        return
    spec.module, spec.params = BlockOutputLayer, {"frequency_ratios": frequency_ratios}
    layer.self_attn_bda, layer.mlp_bda = (ModuleSpec(module=BlockOutput, params={
        "config": config, "multiplier": model.residual_multiplier,
        "norm": get_norm_class(config) if norm_output else None}) for _ in range(2))


def has_experts(spec: Any) -> bool:
    """Return whether the layer's feed-forward network has experts."""
    return isinstance(get_submodules(spec.submodules.mlp), MoESubmodules)


def _unfuse_norms(layer: Any) -> None:
    """Replace Transformer Engine's fused norm-and-linear layers by plain linear layers."""
    layer.self_attention.submodules.linear_qkv = TEColumnParallelLinear
    block = get_submodules(layer.mlp)
    if isinstance(block, MLPSubmodules):  # MoE layers have a separate norm
        block.linear_fc1 = TEColumnParallelLinear


def get_norm_class(config: Any) -> Any:
    """Return the RMSNorm class for the residual stream."""
    if uses_transformer_engine(config.params_dtype):
        return TENorm
    return ZeroCenteredNorm if config.zero_centered_norms else LocalSpecProvider().layer_norm(rms_norm=True)


# Megatron-Core has a single clamp for all layers, and skips the clamp if shared experts overlap with the
# dispatch.


def clamp_gates(chunk: Any, model: ModelConfig) -> None:
    """Clamp gate and up projections of layers with a limit (`ModelConfig.swiglu_limits`), experts included.

    Call it after the adapters are attached: the clamp includes their output."""
    layer_limits = model.limits()
    for layer in chunk.decoder.layers:
        limit = layer_limits[layer.layer_number - 1]
        if not limit:
            continue
        for name, module in layer.mlp.named_modules():
            if name.endswith("linear_fc1"):
                module.register_forward_hook(_build_clamp_hook(limit))


def _build_clamp_hook(limit: float) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """Return the forward hook that clamps a linear layer's output [gate, up] to `limit`."""
    def clamp_output(module: Any, inputs: Any, outputs: tuple[torch.Tensor, torch.Tensor | None]
                     ) -> tuple[torch.Tensor, torch.Tensor | None]:
        gate, up = outputs[0].chunk(2, dim=-1)
        return torch.cat([gate.clamp(max=limit), up.clamp(-limit, limit)], dim=-1), outputs[1]

    return clamp_output
