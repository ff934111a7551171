"""Multi-head latent attention (arXiv 2405.04434) for rows of packed documents, with a cache of the compressed
vectors from which keys and values are computed.

Megatron-Core computes float32 angles for rows with one document; `LatentAttention` takes per-token angles.
Megatron-Core's unfused module splits the down projections over the tensor-parallel group, and a process would
keep only the part of the rotated key's gradient that comes from its heads
(`_GatherFromModelParallelRegion.backward`); here, as with Transformer Engine, the projections are replicated.
"""

from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings import apply_rotary_pos_emb
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch.nn.functional import pad, rms_norm

from megatron_sov.engine.model.adapters import get_effective_weight
from megatron_sov.engine.model.attention import DocumentAttention, PackedDocuments
from megatron_sov.engine.model.cache_rows import PackedSpans
from megatron_sov.engine.model.kv_cache import CachedAttention
from megatron_sov.engine.model.linear_attention import ReplicatedLinear
from megatron_sov.model.config import ModelConfig

NORM_EPS = 1e-6
"""Epsilon for both latent norms, not the model's `norm_eps` (transformers' `DeepseekV3RMSNorm`)."""


class LatentAttention(MLASelfAttention):
    """Megatron-Core's latent attention with per-token angles. Tensor parallelism requires sequence
    parallelism (`ParallelConfig.problems`)."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.rotary_pos_emb = TokenAngles()
        for name, outputs in (("linear_q_down_proj", config.q_lora_rank),
                              ("linear_kv_down_proj", config.kv_lora_rank + config.qk_pos_emb_head_dim)):
            if isinstance(getattr(self, name, None), ColumnParallelLinear):
                setattr(self, name, ReplicatedLinear(config.hidden_size, outputs, config))
            elif hasattr(self, name):
                # Transformer Engine marks every weight as split, and each process would count the replicated
                # weight in the gradient norm
                getattr(self, name).weight.tensor_model_parallel = False
        # Transformer Engine fuses the norms into the up projections
        for name in ("q_layernorm", "kv_layernorm", "linear_q_up_proj", "linear_kv_up_proj"):
            if hasattr(getattr(self, name, None), "eps"):
                getattr(self, name).eps = NORM_EPS

    def forward(self, hidden_states: torch.Tensor, attention_mask: None,
                rotary_pos_emb: torch.Tensor | None = None,
                packed_seq_params: PackedDocuments | PackedSpans | None = None,
                **kwargs: Any) -> tuple[torch.Tensor, None]:
        """Compute attention and the output projection.

        Args:
            hidden_states: [tokens / sequence-parallel size, 1, hidden].
            rotary_pos_emb: [tokens, 1, 1, rotated channels].
            packed_seq_params: documents of the row, or spans of cached sequences.

        Returns:
            [tokens / sequence-parallel size, 1, hidden], and None for the bias.
        """
        if isinstance(self.core_attention, CachedAttention):
            assert isinstance(packed_seq_params, PackedSpans) and rotary_pos_emb is not None
            return self._attend_cached(hidden_states, rotary_pos_emb, packed_seq_params)
        assert rotary_pos_emb is not None
        self.rotary_pos_emb.angles = rotary_pos_emb if self._has_rotation else rotary_pos_emb[..., :0]
        output: tuple[torch.Tensor, None] = super().forward(
            hidden_states, attention_mask, packed_seq_params=packed_seq_params, **kwargs)
        return output

    @property
    def _has_rotation(self) -> bool:
        """Whether the layer applies rotary positions."""
        plain = self.config.no_rope_freq
        return not (plain and plain[self.layer_number - 1])

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        # without a query down projection Megatron-Core would normalize the query input, or refuse
        if self.config.q_lora_rank is not None:
            return dict(super()._resolve_qk_norm_config(submodules))
        self.config.q_lora_rank = self.config.kv_lora_rank
        try:
            resolved = super()._resolve_qk_norm_config(submodules)
        finally:
            self.config.q_lora_rank = None
        return {**resolved, "linear_q_proj": submodules.linear_q_proj, "linear_q_up_proj": IdentityOp,
                "q_layernorm": IdentityOp}

    def _run_core_attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                            attention_mask: None, packed_seq_params: Any = None, attn_mask_type: Any = None,
                            **kwargs: Any) -> torch.Tensor:
        # Megatron-Core pads values and slices the result; `LatentDocumentAttention` does both itself, and for
        # values wider than queries Megatron-Core would slice off channels
        attend = super()._run_core_attention
        if isinstance(self.core_attention, DocumentAttention) or value.shape[-1] > query.shape[-1]:
            attend = self.core_attention
        attended: torch.Tensor = attend(
            query, key, value, attention_mask, packed_seq_params=packed_seq_params,
            attn_mask_type=attn_mask_type or self.attn_mask_type, **kwargs)
        return attended

    def _attend_cached(self, hidden: torch.Tensor, angles: torch.Tensor,
                       spans: PackedSpans) -> tuple[torch.Tensor, None]:
        """Attend to cached compressed vectors, with the key and value up projections absorbed into query and
        output (arXiv 2405.04434, section 2.1.2)."""
        config, heads, cached = self.config, self.num_attention_heads_per_partition, self.core_attention
        compressed = hidden
        if config.q_lora_rank is not None:
            compressed = self.linear_q_down_proj(hidden)[0]
            if not hasattr(self.linear_q_up_proj, "layer_norm_weight"):
                compressed = self.q_layernorm(compressed)
        project = self.linear_q_proj if config.q_lora_rank is None else self.linear_q_up_proj
        queries = project(compressed)[0].squeeze(1).unflatten(-1, (heads, self.q_head_dim))
        down_projected = self.linear_kv_down_proj(hidden)[0]
        if config.sequence_parallel:
            down_projected = tensor_parallel.gather_from_sequence_parallel_region(down_projected)
        latent, key = down_projected.squeeze(1).split(
            [config.kv_lora_rank, config.qk_pos_emb_head_dim], dim=-1)
        fused = getattr(self.linear_kv_up_proj, "layer_norm_weight", None)
        norm_weight = self.kv_layernorm.weight if fused is None else fused
        latent = rms_norm(latent, latent.shape[-1:], norm_weight, NORM_EPS)
        plain, rotated = queries.split([config.qk_head_dim, config.qk_pos_emb_head_dim], dim=-1)
        # q (W c) = (W^T q) c: absorb W into the query, so that the cache holds kv_lora_rank + rotated
        # channels per token, not a key and a value per head
        if cached.up_weight is None:
            # detached: the cache must not register a parameter
            cached.up_weight = get_effective_weight(self.linear_kv_up_proj).detach()
        to_keys, to_values = cached.up_weight.unflatten(0, (heads, -1)).split(
            [config.qk_head_dim, config.v_head_dim], dim=1)
        query = torch.cat([torch.einsum("thd,hdk->thk", plain, to_keys),
                           self._rotate_channels(rotated, angles, spans)], dim=-1)
        # one key/value head serves all query heads; the values are its first kv_lora_rank channels
        key_value = torch.cat([latent[:, None], self._rotate_channels(key[:, None], angles, spans)], dim=-1)
        attended = cached(query, key_value, key_value, None, packed_seq_params=spans)
        values = attended.unflatten(-1, (heads, -1))[..., :config.kv_lora_rank]
        output: tuple[torch.Tensor, None] = self.linear_proj(
            torch.einsum("thk,hvk->thv", values, to_values).flatten(1)[:, None])
        return output

    def _rotate_channels(self, channels: torch.Tensor, angles: torch.Tensor,
                         spans: PackedSpans) -> torch.Tensor:
        """Apply rotary positions to [tokens, heads, rotated channels]."""
        if not self._has_rotation:
            return channels
        rotated: torch.Tensor = apply_rotary_pos_emb(
            channels, angles, self.config, cu_seqlens=spans.cu_seqlens_q,
            cp_group=parallel_state.get_context_parallel_group(), mla_rotary_interleaved=True)
        return rotated


class TokenAngles(torch.nn.Module):
    """Replaces Megatron-Core's rotary module: returns the angles that `LatentAttention.forward` sets."""

    def __init__(self) -> None:
        super().__init__()
        self.angles: torch.Tensor | None = None

    def get_rotary_seq_len(self, *args: Any) -> None:
        """Return None: the angles are already per token."""

    def forward(self, seq_len: None, *, packed_seq: bool) -> Any:
        """Return [tokens, 1, 1, rotated channels]."""
        assert self.angles is not None and packed_seq
        return self.angles


class LatentDocumentAttention(DocumentAttention):
    """Document attention with different query and value sizes: the smaller is padded with zeros, because the
    kernels require equal sizes."""

    def __init__(self, config: Any, *args: Any, k_channels: int = 0, v_channels: int = 0,
                 **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        # ignore k_channels and v_channels: Megatron-Core constructs the module once without them, then again
        self.value_width = config.v_head_dim
        self.width = max(config.qk_head_dim + config.qk_pos_emb_head_dim, self.value_width)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any,
                **kwargs: Any) -> torch.Tensor:
        """Call `DocumentAttention.forward` on padded values; returns [local tokens, heads * value size]."""
        # zero channels do not change the products, and the padded value channels are sliced off
        query, key, value = (pad(t, (0, self.width - t.shape[-1])) for t in (query, key, value))
        attended = super().forward(query, key, value, *args, **kwargs)
        return attended.unflatten(-1, (-1, self.width))[..., :self.value_width].flatten(1)


def get_latent_settings(model: ModelConfig) -> dict[str, Any]:
    """Return the latent-attention fields of `MLATransformerConfig`, or {} for other attention."""
    latent = model.latent_attention
    if latent is None:
        return {}
    return {"multi_latent_attention": True, "q_lora_rank": latent.q_lora_rank,
            "kv_lora_rank": latent.kv_lora_rank, "qk_head_dim": latent.qk_nope_head_dim,
            "qk_pos_emb_head_dim": latent.qk_rope_head_dim, "v_head_dim": latent.v_head_dim,
            # width of the rotary table
            "kv_channels": latent.qk_rope_head_dim, "qk_layernorm": True,
            # "rope" puts no factor on cosine and sine
            "rope_type": "rope"}


def set_latent_attention(spec: Any) -> None:
    """Set `LatentAttention` in a layer spec, with checkpoint names for the fused modules."""
    spec.submodules.self_attention.module = LatentAttention
    spec.submodules.sharded_state_dict_keys_map |= {
        "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
        "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
