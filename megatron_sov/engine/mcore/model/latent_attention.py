"""Multi-head latent attention: the library's module for rows of packed documents, at every layout, and with a
cache of what keys and values are made of.

The library has angles of its own, in float32, for rows of one document; here each token is given those of its
position, as in all other layers.  Its unfused module cuts the projections to the narrow vectors over the
tensor-parallel group, and of the rotated key's gradient each process keeps what its own heads found (0.16.1,
`_GatherFromModelParallelRegion.backward`); here every process has them whole, as with Transformer Engine.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings import apply_rotary_pos_emb
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch.nn.functional import linear, pad, rms_norm

from megatron_sov.engine.mcore.model.attention import DocumentAttention, PackedDocuments
from megatron_sov.engine.mcore.model.kv_cache import CachedAttention, PackedSpans
from megatron_sov.model.config import ModelConfig

NORM_EPS = 1e-6
"""Of the norms of both vectors, whatever that of all others is (transformers' `DeepseekV3RMSNorm`)."""


def latent_settings(model: ModelConfig) -> dict[str, Any]:
    """Return the fields of the library's configuration that latent attention has; empty: attention is not."""
    latent = model.latent_attention
    if latent is None:
        return {}
    return {"multi_latent_attention": True, "q_lora_rank": latent.q_lora_rank,
            "kv_lora_rank": latent.kv_lora_rank, "qk_head_dim": latent.qk_nope_head_dim,
            "qk_pos_emb_head_dim": latent.qk_rope_head_dim, "v_head_dim": latent.v_head_dim,
            # the model's own angles take this width from here
            "kv_channels": latent.qk_rope_head_dim, "qk_layernorm": True,
            # which has no factor on cosine and sine
            "rope_type": "rope"}


class WholeLinear(torch.nn.Module):
    """A projection that every tensor-parallel process has whole, and applies to the tokens that it has."""

    def __init__(self, inputs: int, outputs: int, config: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype))
        # what each process finds for its own tokens is summed, as of a norm
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the product, and no bias."""
        return linear(hidden, self.weight), None


class TokenAngles(torch.nn.Module):
    """Stands where the library makes angles: gives those of a row's tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.angles: torch.Tensor | None = None

    def get_rotary_seq_len(self, *args: Any) -> None:
        """Return nothing: each token has its angles."""

    def forward(self, seq_len: None, *, packed_seq: bool) -> torch.Tensor:
        """Return [tokens, 1, 1, rotated channels]."""
        assert self.angles is not None and packed_seq
        return self.angles


class LatentAttention(MLASelfAttention):
    """The library's latent attention with the angles that it is given; under tensor parallelism it needs
    sequence parallelism (`ParallelConfig.problems`)."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.rotary_pos_emb = TokenAngles()
        for name, outputs in (("linear_q_down_proj", config.q_lora_rank),
                              ("linear_kv_down_proj", config.kv_lora_rank + config.qk_pos_emb_head_dim)):
            if isinstance(getattr(self, name, None), ColumnParallelLinear):
                setattr(self, name, WholeLinear(config.hidden_size, outputs, config))
            elif hasattr(self, name):
                # Transformer Engine marks every weight as cut, and each process would count it in the norm of
                # gradients
                getattr(self, name).weight.tensor_model_parallel = False
        # with Transformer Engine the norms are in the projections behind them
        for name in ("q_layernorm", "kv_layernorm", "linear_q_up_proj", "linear_kv_up_proj"):
            if hasattr(getattr(self, name, None), "eps"):
                getattr(self, name).eps = NORM_EPS

    def forward(self, hidden_states: torch.Tensor, attention_mask: None,
                rotary_pos_emb: torch.Tensor | None = None,
                packed_seq_params: PackedDocuments | PackedSpans | None = None,
                **kwargs: Any) -> tuple[torch.Tensor, None]:
        """Attend.

        Args:
            hidden_states: [tokens / sequence-parallel size, 1, hidden].
            rotary_pos_emb: [tokens, 1, 1, rotated channels].
            packed_seq_params: the row's documents, or the spans of sequences that a cache holds.

        Returns:
            [tokens / sequence-parallel size, 1, hidden], and no bias.
        """
        if isinstance(self.core_attention, CachedAttention):
            assert isinstance(packed_seq_params, PackedSpans) and rotary_pos_emb is not None
            return self._read(hidden_states, rotary_pos_emb, packed_seq_params)
        self.rotary_pos_emb.angles = rotary_pos_emb
        output: tuple[torch.Tensor, None] = super().forward(
            hidden_states, attention_mask, packed_seq_params=packed_seq_params, **kwargs)
        return output

    def _read(self, hidden: torch.Tensor, angles: torch.Tensor,
              spans: PackedSpans) -> tuple[torch.Tensor, None]:
        """Attend to narrow vectors that the cache keeps: the projections to keys and from values meet the
        query and the output instead (arXiv 2405.04434, section 2.1.2)."""
        config, heads = self.config, self.num_attention_heads_per_partition
        compressed = hidden
        if config.q_lora_rank is not None:
            compressed = self.linear_q_down_proj(hidden)[0]
            if not hasattr(self.linear_q_up_proj, "layer_norm_weight"):
                compressed = self.q_layernorm(compressed)
        project = self.linear_q_proj if config.q_lora_rank is None else self.linear_q_up_proj
        queries = project(compressed)[0].squeeze(1).unflatten(-1, (heads, self.q_head_dim))
        kept = self.linear_kv_down_proj(hidden)[0]
        if config.sequence_parallel:
            kept = tensor_parallel.gather_from_sequence_parallel_region(kept)
        latent, key = kept.squeeze(1).split([config.kv_lora_rank, config.qk_pos_emb_head_dim], dim=-1)
        latent = rms_norm(latent, latent.shape[-1:], self._norm_weight(), NORM_EPS)
        plain, turned = queries.split([config.qk_head_dim, config.qk_pos_emb_head_dim], dim=-1)
        to_keys, to_values = self.linear_kv_up_proj.weight.unflatten(
            0, (heads, -1)).split([config.qk_head_dim, config.v_head_dim], dim=1)
        query = torch.cat([torch.einsum("thd,hdk->thk", plain, to_keys),
                           self._turned(turned, angles, spans)], dim=-1)
        one = torch.cat([latent[:, None], self._turned(key[:, None], angles, spans)], dim=-1)
        attended = self.core_attention(query, one, one, None, packed_seq_params=spans)
        values = attended.unflatten(-1, (heads, -1))[..., :config.kv_lora_rank]
        output: tuple[torch.Tensor, None] = self.linear_proj(
            torch.einsum("thk,hvk->thv", values, to_values).flatten(1)[:, None])
        return output

    def _norm_weight(self) -> torch.Tensor:
        """Return the weight of the norm of what keys and values are made of."""
        fused = getattr(self.linear_kv_up_proj, "layer_norm_weight", None)
        weight: torch.Tensor = self.kv_layernorm.weight if fused is None else fused
        return weight

    def _turned(self, channels: torch.Tensor, angles: torch.Tensor, spans: PackedSpans) -> torch.Tensor:
        """Rotate [tokens, heads, rotated channels]."""
        turned: torch.Tensor = apply_rotary_pos_emb(
            channels, angles, self.config, cu_seqlens=spans.cu_seqlens_q,
            cp_group=parallel_state.get_context_parallel_group())
        return turned


class LatentDocumentAttention(DocumentAttention):
    """Attention inside documents whose values are narrower or wider than queries and keys: the narrower are
    filled up with zeros, since kernels want one width."""

    def __init__(self, config: Any, *args: Any, k_channels: int = 0, v_channels: int = 0,
                 **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        # not the arguments: the library builds it once without them, and again
        self.value_width = config.v_head_dim
        self.width = max(config.qk_head_dim + config.qk_pos_emb_head_dim, self.value_width)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any,
                **kwargs: Any) -> torch.Tensor:
        """Attend; as `DocumentAttention.forward`, to [local tokens, heads * value channels]."""
        query, key, value = (pad(t, (0, self.width - t.shape[-1])) for t in (query, key, value))
        attended = super().forward(query, key, value, *args, **kwargs)
        return attended.unflatten(-1, (-1, self.width))[..., :self.value_width].flatten(1)


def latent_specs(spec: Any) -> None:
    """Have a layer attend by `LatentAttention`, with the names of the fused modules in checkpoints."""
    spec.submodules.self_attention.module = LatentAttention
    spec.submodules.sharded_state_dict_keys_map |= {
        "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
        "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
