"""From a family's declaration to a megatron-core model: the only place that knows the library's
configuration names."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import get_submodules
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.nn.functional import dropout, gelu, rms_norm, silu

from megatron_sov.base.errors import UserError, told_in_a_line
from megatron_sov.engine.model.attention_kernels import keep_attention_decisions
from megatron_sov.engine.model.gpu_settings import (
    OVERLAP, Here, exchanges_heads, expert_settings, keep_ends_in_bf16, library_settings,
    own_attention_serves, transformer_settings, uses_delta_kernels)
from megatron_sov.engine.model.graphs import graphed
from megatron_sov.engine.model.rotary import local_turns, softmax_scale
from megatron_sov.engine.parallel import context
from megatron_sov.engine.parallel.device import PRECISION as PRECISION, on_gpu
from megatron_sov.engine.router import BalancedRouter, RoutingStep
from megatron_sov.model.config import GpuConfig, ModelConfig, ParallelConfig, TrainConfig, YarnConfig
from megatron_sov.model.config.gpu import AUTO

gelu_tanh = partial(gelu, approximate="tanh")
"""GELU by its tanh approximation (arXiv 1606.08415, section 2)."""


# Parts of layers that the library has not: what a block adds to the residual, its output normalised and
# multiplied where the architecture says so; norms by 1 + weight; layers that rotate at a speed of their
# own. The first takes the place of the library's bias-dropout-add, which is where a layer hands over a
# block's output together with the residual.


class BlockOutput(torch.nn.Module):
    """Residual + multiplier x dropout(norm(output))."""

    norm: torch.nn.Module | None
    """RMSNorm of the output; None: there is none."""

    def __init__(self, config: Any, norm: Any, multiplier: float) -> None:
        """Make the norm.

        Args:
            config: the library's TransformerConfig.
            norm: class of the norm; None: the output is not normalised.
            multiplier: factor on what is added.
        """
        super().__init__()
        self.norm = norm and norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        self._multiplier = multiplier

    def forward(self, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        """Return what adds a block's (output, bias) to the residual, as the library asks for it; there is no
        fused form."""
        def added(output_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor,
                  share_dropped: float) -> torch.Tensor:
            output, _ = output_with_bias  # no matrix before it has a bias
            if self.norm is not None:
                output = self.norm(output)
            output = dropout(output, share_dropped, training)
            return residual + (output if self._multiplier == 1 else output * self._multiplier)

        return added


class ZeroCenteredNorm(torch.nn.Module):
    """RMSNorm that multiplies by 1 + weight (Gemma), which torch does not have."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(hidden_size))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self._eps = eps

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> [..., hidden]."""
        return rms_norm(states, self.weight.shape, 1 + self.weight, self._eps)


class GatedAttention(SelfAttention):
    """Attention whose heads' outputs are gated, in float64 too, where the library gates in float32."""

    def _apply_output_gate(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return (x * torch.sigmoid(gate.to(wide)).reshape(x.shape)).to(x.dtype)


class OwnLayer(TransformerLayer):
    """A layer with residual sums of our own, which may rotate at another speed than the others.

    The library switches gradients on for its residual sums; with a norm's weight there that would keep a
    graph of every forward pass that wants none.
    """

    def __init__(self, *args: Any, turns: Sequence[float] | None, **kwargs: Any) -> None:
        """Make the layer.

        Args:
            turns: for each rotated channel, how often it turns while it turns once in other layers; None: as
                often.
        """
        super().__init__(*args, **kwargs)
        self.bias_dropout_add_exec_handler = contextlib.nullcontext
        self._turns = turns
        self._kept: torch.Tensor | None = None  # no buffer: the library rounds those to the weights' dtype

    def _turns_beside(self, angles: torch.Tensor) -> torch.Tensor:
        """Return the turns where the angles are; a copy to a GPU in each pass would wait for it."""
        if self._kept is None or (self._kept.device, self._kept.dtype) != (angles.device, angles.dtype):
            self._kept = angles.new_tensor(self._turns)
        return self._kept

    def _forward_attention(self, *args: Any, **kwargs: Any) -> Any:
        if self._turns is not None:
            angles = kwargs["rotary_pos_emb"]
            kwargs["rotary_pos_emb"] = angles * self._turns_beside(angles)
        return super()._forward_attention(*args, **kwargs)


def transformer_engine_serves(dtype: torch.dtype) -> bool:
    """Return whether a model of this parameter dtype is to be made of Transformer Engine's modules.

    They are, on GPUs, in 16 bit alone: they know no float64, and in float32 its fused and flash attention do
    not serve, which leaves one whose memory grows with the square of a row's length.
    """
    return on_gpu() and dtype == torch.bfloat16


@cache
def transformer_engine_error() -> str:
    """Return why Transformer Engine does not import, in its own words; empty: it does."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    # it fails in many ways: not installed, missing libraries, wrong CUDA, the bare package's RuntimeError
    except Exception as e:
        return told_in_a_line(e)
    return ""


def uses_transformer_engine(dtype: torch.dtype) -> bool:
    """Return whether a model of this parameter dtype is made of Transformer Engine's modules.

    Raises:
        UserError: it is to be, and Transformer Engine does not import.
    """
    if not transformer_engine_serves(dtype):
        return False
    if error := transformer_engine_error():
        raise UserError(f"train.precision = bf16 on a GPU: Transformer Engine does not import ({error}); "
                        "install it (`megatron-sov doctor` says how), or set train.precision=fp32, which is "
                        "many times slower")
    return True


def transformer_config(model: ModelConfig, parallel: ParallelConfig, train: TrainConfig,
                       gpu: GpuConfig = AUTO) -> Any:
    """Return the library's `TransformerConfig` for a model, a layout, a precision and a use of GPUs."""
    dtype = PRECISION[train.precision]
    te = uses_transformer_engine(dtype)
    here = Here(te, model, parallel)
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
        # interleaved pipelines send a peer two messages at a time: in a batch, gloo swaps them silently
        "batch_p2p_comm": on_gpu() and parallel.vpp == 1, "overlap_p2p_comm": parallel.vpp > 1,
        # losses are sums divided once by global counts; must stand here before the model is wrapped
        "calculate_per_token_loss": True, "deterministic_mode": train.deterministic,
        "masked_softmax_fusion": False, "bias_dropout_fusion": te,
        # every message would have the host wait, for the sake of an older torch
        "hetereogenous_dist_checkpoint": True, "cuda_graph_modules": [], "batch_p2p_sync": False,
        **transformer_settings(gpu, train, here),
    }
    if not te and not on_gpu():
        settings["bias_activation_fusion"] = model.activation == "silu"  # `gated` stands for the kernel
    if parallel.pipeline_layout:
        settings["pipeline_model_parallel_layout"] = _pipeline_layout(model, parallel)
    if model.sliding_window_tokens:
        # the library's window is (keys to the left, to the right), the current token not counted
        settings["window_size"] = (model.sliding_window_tokens - 1, 0)
    if model.num_mtp_layers:
        settings |= {"mtp_num_layers": model.num_mtp_layers, "mtp_loss_scaling_factor": model.mtp_loss_coeff}
    if model.num_moe_layers():
        settings |= _moe_settings(model, te) | expert_settings(gpu, here)
        settings["moe_router_dtype"] = "fp64" if dtype == torch.float64 else "fp32"
    # elsewhere models are only looked at, as `plan` does: training has been refused
    settings |= library_settings(train) if te else {}
    config = _library_config(model, settings)
    if te and train.fp8 != "none":
        keep_ends_in_bf16(config, train)
    _per_layer_lists(config, model, parallel)
    if model.yarn is not None or model.attention_multiplier is not None:
        config.softmax_scale = softmax_scale(model, "sliding_attention")
    config.own_attention, config.exchanges_heads = (
        own_attention_serves(here, gpu.attention, train.deterministic), exchanges_heads(here, gpu.attention))
    config.delta_kernels = uses_delta_kernels(here, gpu, train.deterministic)
    config.routing_step = RoutingStep()
    for name in ("norm_topk_prob", "logits_multiplier", "mtp_depths", "zero_centered_norms"):
        setattr(config, name, getattr(model, name))
    return config


def _library_config(model: ModelConfig, settings: dict[str, Any]) -> Any:
    """Return the library's configuration of these settings, of the kind that the model's attention has."""
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    from megatron_sov.engine.model.kv_cache import latent_settings

    latent = latent_settings(model)
    # its validation refuses float32, and prediction layers, which `OverlappedPasses` computes otherwise
    overlap = {name: settings.pop(name) for name in OVERLAP if name in settings}
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
        "moe_router_bias_update_rate": model.router_bias_update_rate,
        # the choice of experts is the same before and after a softmax; without this the library refuses a
        # single one
        "moe_router_pre_softmax": model.router_score == "softmax",
        "moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": model.seq_aux_loss_coeff,
        "moe_grouped_gemm": te,
        "moe_layer_freq": [0] * model.num_dense_layers + [1] * model.num_moe_layers(),
        **({"moe_router_num_groups": model.num_expert_groups,
            "moe_router_group_topk": model.num_groups_per_token} if model.num_expert_groups > 1 else {}),
    }


def _pipeline_layout(model: ModelConfig, parallel: ParallelConfig) -> list[list[str]]:
    """Return what each run of layers holds, in the library's words and order."""
    runs = [["decoder"] * layers for layers in parallel.pipeline_layout]
    runs[0].insert(0, "embedding")
    runs[-1] += [*["mtp"] * model.num_mtp_layers, "loss"]
    return runs


def _per_layer_lists(config: Any, model: ModelConfig, parallel: ParallelConfig) -> None:
    """Spell out per layer what slides and what rotates, with one entry more for the
    multi-token prediction layer, and how rotations are scaled.

    The library looks both up by layer number, and that layer's number is num_layers + 1; its own validation
    allows only num_layers entries, so the lists are set after it.
    """
    kinds = list(model.layer_types()) + [model.mtp_layer_type()] * model.num_mtp_layers
    if model.sliding_window_tokens:
        config.window_attn_skip_freq = [int(k == "sliding_attention") for k in kinds]
    if not model.rope_on_global:
        config.no_rope_freq = [int(k == "full_attention") for k in kinds]
    _yarn(config, model, parallel)


def _yarn(config: Any, model: ModelConfig, parallel: ParallelConfig) -> None:
    yarn = model.yarn
    if yarn is None and model.latent_attention is not None:
        # the library makes a model no angles for latent attention but YaRN's: those with a factor of 1, and a
        # ramp of no width
        yarn = YarnConfig(1.0, 2 * parallel.cp, 1.0, 1.0)
    if yarn is not None:
        config.yarn_rotary_scaling_factor = yarn.factor
        config.yarn_original_max_position_embeddings = yarn.original_max_position_tokens
        config.yarn_beta_fast, config.yarn_beta_slow = yarn.beta_fast, yarn.beta_slow
        # equal, so that the library's factor on cosine and sine is 1: ours is in the scale of the softmax
        config.yarn_mscale = config.yarn_mscale_all_dim = 1.0
        config.yarn_correction_range_round_to_int = True


def layer_specs(config: Any, model: ModelConfig) -> list[Any]:
    """Return the library's module spec of every trunk layer, with our router and,
    where it serves, our attention."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_layer_specs

    specs = _own_copies(get_gpt_decoder_layer_specs(config,
                                                    uses_transformer_engine(config.params_dtype), "RMSNorm"))
    return [_finish_spec(config, spec, kind, window, model)
            for spec, kind, window in zip(specs, model.layer_types(), model.windows(), strict=True)]


def mtp_layer_spec(config: Any, model: ModelConfig) -> Any:
    """Return the spec of the transformer layer inside a multi-token prediction layer: dense, or as the
    trunk's last one."""
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_layer_specs, get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec)

    te = uses_transformer_engine(config.params_dtype)
    if model.mtp_experts:
        spec = _own_copies(get_gpt_decoder_layer_specs(config, te, "RMSNorm")[-1:])[0]
    elif te:
        spec = get_gpt_layer_with_transformer_engine_spec(
            qk_layernorm=config.qk_layernorm, multi_latent_attention=config.multi_latent_attention)
    else:
        spec = get_gpt_layer_local_spec(
            qk_layernorm=config.qk_layernorm, multi_latent_attention=config.multi_latent_attention,
            normalization="RMSNorm")
    spec = _finish_spec(config, spec, model.mtp_layer_type(), model.mtp_window(), model)
    spec.module = _numbered_after_trunk(spec.module)
    spec.module = _told_of_padding(spec.module)
    return spec


def _numbered_after_trunk(layer: Any) -> Any:
    """Return the class of a prediction layer's transformer layer whose number follows those of the trunk.

    The library counts prediction layers from 1 and looks windows and rotations up by that number, in lists
    whose entry of the prediction layer follows the trunk's: the layer would get the first layer's attention
    without any error.
    """
    class NumberedAfterTrunk(layer):
        def __init__(self, config: Any, *args: Any, layer_number: int, **kwargs: Any) -> None:
            super().__init__(config, *args, layer_number=config.num_layers + layer_number, **kwargs)

    return NumberedAfterTrunk


def _told_of_padding(layer: Any) -> Any:
    """Return the class of a layer that gets the padding of its row, which comes with the row's documents,
    also when it is computed again."""
    class PaddedLayer(layer):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            # a capture hands over the mask itself
            if "packed_seq_params" in kwargs:
                kwargs["padding_mask"] = getattr(kwargs["packed_seq_params"], "padding", None)
            return super().__call__(*args, **kwargs)

    return PaddedLayer


def _own_copies(specs: list[Any]) -> list[Any]:
    """The library returns the same object for layers of one kind; each layer needs its own to
    differ in attention."""
    import copy

    return [copy.deepcopy(spec) for spec in specs]


def _finish_spec(config: Any, spec: Any, kind: str, window: int, model: ModelConfig) -> Any:
    if kind == "linear_attention":
        from megatron_sov.engine.model.linear_attention import attend_linearly

        assert model.linear_attention is not None, "a rule of the settings: D layers have sizes"
        attend_linearly(config, spec, model.linear_attention, uses_transformer_engine(config.params_dtype))
    else:
        _finish_attention(config, spec, kind, window, model)
    _place_norms(config, spec, kind, model)
    if has_experts(spec):
        get_submodules(spec.submodules.mlp).router = BalancedRouter
        if config.cuda_graph_impl != "none":
            spec.module = graphed(spec.module)
        # with Transformer Engine this norm keeps its own name in checkpoints; one name for both
        spec.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    return spec


def _finish_attention(config: Any, spec: Any, kind: str, window: int, model: ModelConfig) -> None:
    """Have a layer attend as it does in this model."""
    from megatron.core.transformer.spec_utils import ModuleSpec

    from megatron_sov.engine.model.attention import DocumentAttention
    from megatron_sov.engine.model.kv_cache import LatentDocumentAttention, latent_specs

    attention, latent = spec.submodules.self_attention.submodules, model.latent_attention is not None
    if config.exchanges_heads:
        attention.core_attention = exchanged(attention.core_attention)
    elif config.own_attention:
        module = LatentDocumentAttention if latent else DocumentAttention
        attention.core_attention = ModuleSpec(module=module, params={"window_tokens": window})
    if uses_transformer_engine(config.params_dtype) and (config.exchanges_heads or not config.own_attention):
        from transformer_engine.pytorch.attention.dot_product_attention import utils

        keep_attention_decisions(utils)
    if window not in (0, model.sliding_window_tokens) and not config.own_attention:
        attention.core_attention = _with_window(attention.core_attention, window)
    if latent:
        latent_specs(spec)
    # the library computes another one for latent attention
    if latent or config.softmax_scale not in (None, softmax_scale(model, kind)):
        attention.core_attention = _with_scale(attention.core_attention, softmax_scale(model, kind))
    if model.attention_output_gate:
        spec.submodules.self_attention.module = GatedAttention


def exchanged(core_attention: Any) -> Any:
    """Return the spec of Transformer Engine's attention for rows that are cut over processes: each gets the
    whole row of its share of the heads, and attends as if nothing were cut.  Where there are fewer heads of
    keys than processes, some get the same ones.  Never run on a GPU here."""
    import copy

    from megatron.core.transformer.spec_utils import ModuleSpec, get_module

    class ExchangedAttention(get_module(core_attention)):  # type: ignore[misc]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            c, tp, part = context.size(), config.tensor_model_parallel_size, copy.copy(config)
            part.context_parallel_size = 1
            part.num_attention_heads = config.num_attention_heads // c
            part.num_query_groups = max(tp, config.num_query_groups // c)
            super().__init__(part, *args, **kwargs)

        def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None,
                    attn_mask_type: Any = None, attention_bias: None = None,
                    packed_seq_params: Any = None) -> torch.Tensor:
            """Attend; shapes as of `DocumentAttention`."""
            copies = max(1, context.size() // key.shape[1])
            if copies > 1:
                key, value = (t.repeat_interleave(copies, dim=1) for t in (key, value))
            row = super().forward(*(context.exchange_tokens(t) for t in (query, key, value)), attention_mask,
                                  attn_mask_type, attention_bias, packed_seq_params.whole)
            return context.exchange_heads(row.unflatten(-1, (-1, value.shape[-1]))).flatten(1)

    return ModuleSpec(module=ExchangedAttention, params=getattr(core_attention, "params", {}))


def _with_scale(core_attention: Any, scale: float) -> Any:
    """Return the spec of a core attention with a scale of its own, whatever the one scale is that the library
    gives to all layers."""
    from megatron.core.transformer.spec_utils import ModuleSpec, get_module

    class OwnScale(get_module(core_attention)):  # type: ignore[misc]
        def __init__(self, *args: Any, softmax_scale: float | None, **kwargs: Any) -> None:
            super().__init__(*args, softmax_scale=scale, **kwargs)

    return ModuleSpec(module=OwnScale, params=getattr(core_attention, "params", {}))


def _with_window(core_attention: Any, window: int) -> Any:
    """Return the spec of the library's core attention with a window of its own, in tokens, where the library
    knows one for all layers that slide.  Never run on a GPU here."""
    import copy

    from megatron.core.transformer.spec_utils import ModuleSpec, get_module

    class OwnWindow(get_module(core_attention)):  # type: ignore[misc]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            own = copy.copy(config)
            own.window_size = (window - 1, 0)
            super().__init__(own, *args, **kwargs)

    return ModuleSpec(module=OwnWindow, params=getattr(core_attention, "params", {}))


def _place_norms(config: Any, spec: Any, kind: str, model: ModelConfig) -> None:
    """Have a layer normalise where the model does, and rotate and add to the residual what it does."""
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.spec_utils import ModuleSpec

    layer, te = spec.submodules, uses_transformer_engine(config.params_dtype)
    if model.block_norms == "post":
        layer.input_layernorm = layer.pre_mlp_layernorm = IdentityOp
        if te:
            _without_norm_inside(layer)
    if model.zero_centered_norms and not te:
        attention = layer.self_attention.submodules
        for part, name in ((layer, "input_layernorm"), (layer, "pre_mlp_layernorm"),
                           (attention, "q_layernorm"), (attention, "k_layernorm")):
            if getattr(part, name, IdentityOp) is not IdentityOp:  # linear attention has no such parts
                setattr(part, name, ZeroCenteredNorm)
    turns = local_turns(model) if kind == "sliding_attention" else None
    behind = model.block_norms in ("post", "both")
    if turns is None and not behind and model.residual_multiplier == 1:
        return
    spec.module, spec.params = OwnLayer, {"turns": turns}
    layer.self_attn_bda, layer.mlp_bda = (ModuleSpec(module=BlockOutput, params={
        "config": config, "multiplier": model.residual_multiplier,
        "norm": block_norm(config) if behind else None}) for _ in range(2))


def has_experts(spec: Any) -> bool:
    """Return whether a layer's feed-forward network has experts."""
    from megatron.core.transformer.moe.moe_layer import MoESubmodules

    return isinstance(get_submodules(spec.submodules.mlp), MoESubmodules)


def _without_norm_inside(layer: Any) -> None:
    """Replace Transformer Engine's linear layers that begin with a norm by those that do not."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules

    layer.self_attention.submodules.linear_qkv = TEColumnParallelLinear
    block = get_submodules(layer.mlp)
    if isinstance(block, MLPSubmodules):  # before experts the norm stands by itself
        block.linear_fc1 = TEColumnParallelLinear


def block_norm(config: Any) -> Any:
    """Return the module of an RMSNorm over the residual's width."""
    from megatron.core.models.backends import LocalSpecProvider

    if uses_transformer_engine(config.params_dtype):
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    return ZeroCenteredNorm if config.zero_centered_norms else LocalSpecProvider().layer_norm(rms_norm=True)


# A bound on what goes into the gate, layer by layer: the library has one for all layers, and forgets it where
# shared experts are computed beside the exchange of tokens.


def bound_gates(chunk: Any, model: ModelConfig) -> None:
    """Have the layers with a bound (`ModelConfig.swiglu_limits`) keep gate and up projections within it,
    those of experts included; called when adapters, which are bounded with them, are in their places."""
    limits = model.limits()
    for layer in chunk.decoder.layers:
        limit = limits[layer.layer_number - 1]
        for name, module in layer.mlp.named_modules() if limit else ():
            if name.endswith("linear_fc1"):
                module.register_forward_hook(_bounded(limit))


def _bounded(limit: float) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """Return the hook of a linear whose outputs are a gate and, behind it, what is multiplied with it."""
    def hook(module: Any, inputs: Any, outputs: tuple[torch.Tensor, torch.Tensor | None]
             ) -> tuple[torch.Tensor, torch.Tensor | None]:
        gate, up = outputs[0].chunk(2, dim=-1)
        return torch.cat([gate.clamp(max=limit), up.clamp(-limit, limit)], dim=-1), outputs[1]

    return hook
