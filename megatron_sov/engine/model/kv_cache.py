"""Attention that keeps keys and values, so that a sequence can be read span by span and
continued token by token.

A cache has slots, one for each sequence that is being read; a process keeps its own layers and key/value
heads of them.  Global layers keep every token.  Sliding layers keep a ring: a token's place is its position
modulo the size of the ring, which is the window and, for tokens that may be taken back, the longest step.  To
take tokens back is to read the next ones at their positions: what stands further on is never seen.

Latent attention, which exists for its small cache, keeps the narrow vectors that keys and values are made of.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings import apply_rotary_pos_emb
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch.nn.functional import pad, rms_norm, scaled_dot_product_attention

from megatron_sov.engine.model.added_parts import adapted_weight
from megatron_sov.engine.model.attention import DocumentAttention, PackedDocuments, attend, attend_whole
from megatron_sov.engine.model.cache_rows import CacheGroup, CacheSize, PackedSpans
from megatron_sov.engine.model.linear_attention import KeptState, LinearAttention, WholeLinear
from megatron_sov.engine.model.rotary import softmax_scale
from megatron_sov.model.config import ModelConfig


class CachedAttention(torch.nn.Module):
    """Core attention of one layer with what it keeps; takes the place of any other while `keep` holds."""

    def __init__(self, size: CacheSize, softmax_scale: float, window_tokens: int) -> None:
        """Take another attention's place.

        Args:
            size: how much is kept.
            softmax_scale: factor on the products of queries and keys.
            window_tokens: sliding window, the current token included; 0: every token before.
        """
        super().__init__()
        self.size, self.softmax_scale, self.window_tokens = size, softmax_scale, window_tokens
        whole = size.max_tokens + size.step_tokens
        # a step of drafts may be taken back: what they overwrote must not have been in any window
        self.capacity = min(whole, window_tokens - 1 + size.step_tokens) if window_tokens else whole
        self.stored: tuple[torch.Tensor, ...] | None = None
        """Keys and values [slots, kv_heads, capacity, head_dim], once where they are the same; None before
        the first token."""
        self.up_weight: torch.Tensor | None = None
        """Of latent attention, the weight that makes keys and values, with its adapter inside: weights stay
        while `keep` holds, so it is made once; None before the first token."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None,
                attn_mask_type: Any = None, attention_bias: None = None,
                packed_seq_params: PackedSpans | None = None) -> torch.Tensor:
        """Keep the new keys and values and attend to them and to those kept before.

        Args:
            query: [tokens, heads, head_dim]; key, value: [tokens, kv_heads, head_dim]; one tensor for both
                is kept once.
            packed_seq_params: the row's spans.

        Returns:
            [tokens, heads * head_dim]; zeros at padding.
        """
        assert packed_seq_params is not None
        if self.stored is None:
            shape = (self.size.slots, key.shape[1], self.capacity, key.shape[2])
            # zeros: what is masked still must be finite
            self.stored = tuple(t.new_zeros(shape) for t in ((key,) if value is key else (key, value)))
        out = query.new_zeros(*query.shape[:2], value.shape[2])
        for group in packed_seq_params.groups:
            here = slice(group.start, group.start + len(group.past) * group.length)
            q, k, v = (t[here].unflatten(0, (len(group.past), group.length)) for t in (query, key, value))
            if group.length <= self.size.step_tokens:
                out[here] = self._step(group, q, k, v).flatten(0, 1)
            elif not any(group.past) and not 0 < self.window_tokens < group.length:
                out[here] = self._first(group, q, k, v).flatten(0, 1)
            else:
                out[here] = torch.cat([self._piece(group.slot + i, past, q[i], k[i], v[i])
                                       for i, past in enumerate(group.past)])
        return out.flatten(1)

    def _step(self, group: CacheGroup, query: torch.Tensor, key: torch.Tensor,
              value: torch.Tensor) -> torch.Tensor:
        """Attend from a few new tokens of many sequences at once: [sequences, new, heads, head_dim]."""
        assert self.stored is not None
        device, count = query.device, len(group.past)
        past = torch.tensor(group.past, device=device)[:, None]
        positions = past + torch.arange(group.length, device=device)
        rows = torch.arange(group.slot, group.slot + count, device=device)[:, None]
        for kept, new in zip(self.stored, (key, value), strict=False):
            kept[rows, :, positions % self.capacity] = new
        # new tokens are written before the query reads: they see one another, and places behind the longest
        # sequence are never touched
        filled = min(self.capacity, max(group.past) + group.length)
        keys, values = (kept[group.slot:group.slot + count, :, :filled]
                        for kept in (self.stored[0], self.stored[-1]))
        last = past + group.length - 1
        # position at each place; negative: none yet
        # `last` is the newest position; place p of the ring holds the newest position that is p modulo its
        # size
        held = last - (last - torch.arange(filled, device=device)) % self.capacity
        distance = positions[:, :, None] - held[:, None]
        visible = (held[:, None] >= 0) & (distance >= 0)
        if self.window_tokens:
            visible &= distance < self.window_tokens
        # query heads of one key head become further queries: [sequences, kv_heads, heads / kv_heads x new,
        # head_dim]
        heads = query.shape[2] // keys.shape[1]
        grouped = query.unflatten(2, (keys.shape[1], heads)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        mask = visible[:, None, None].expand(-1, -1, heads, -1, -1).flatten(2, 3)
        out = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=self.softmax_scale)
        return out.unflatten(2, (heads, group.length)).permute(0, 3, 1, 2, 4).flatten(2, 3)

    def _first(self, group: CacheGroup, query: torch.Tensor, key: torch.Tensor,
               value: torch.Tensor) -> torch.Tensor:
        """Attend from the first tokens of sequences at once: [sequences, new, heads, head_dim]."""
        assert self.stored is not None
        for kept, new in zip(self.stored, (key, value), strict=False):
            kept[group.slot:group.slot + len(group.past), :, :group.length] = new.transpose(1, 2)
        return attend_whole(query, key, value, self.softmax_scale)

    def _piece(self, slot: int, past: int, query: torch.Tensor, key: torch.Tensor,
               value: torch.Tensor) -> torch.Tensor:
        """Attend from a span of one sequence, longer than a step: [new, heads, head_dim]."""
        assert self.stored is not None
        kept = [stored[slot] for stored in self.stored]
        # read before the span is written: in a ring the new tokens take the places of those that the first
        # query still sees
        before = torch.arange(max(0, past - self.window_tokens + 1) if self.window_tokens else 0, past,
                              device=query.device)
        keys, values = (torch.cat([k[:, before % self.capacity].transpose(0, 1), new])
                        for k, new in zip((kept[0], kept[-1]), (key, value), strict=True))
        out = attend(query, keys, values, self.softmax_scale, self.window_tokens)
        # of a span longer than the ring only its end stays, or two tokens would be written to one place
        stays = min(len(key), self.capacity)
        places = torch.arange(past + len(key) - stays, past + len(key), device=query.device) % self.capacity
        for k, new in zip(kept, (key, value), strict=False):
            k[:, places] = new[-stays:].transpose(0, 1)
        return out

    def copy(self, source: int, targets: Sequence[int]) -> None:
        for kept in self.stored or ():
            kept[list(targets)] = kept[source].clone()  # they share memory


@contextlib.contextmanager
def keep(model: Any, size: CacheSize) -> Iterator[list[CachedAttention | KeptState]]:
    """Have all attention of a `LanguageModel` keep keys and values, or its state; gives each layer's,
    and puts back what was there before."""
    config, architecture = model.config, model.architecture
    kinds = architecture.layer_types() + [architecture.mtp_layer_type()] * architecture.num_mtp_layers
    windows = [*architecture.windows(), architecture.mtp_window()]
    found = [m for chunk in model.chunks for m in chunk.modules() if isinstance(m, Attention)]
    linear = [m for chunk in model.chunks for m in chunk.modules() if isinstance(m, LinearAttention)]
    replaced = [(m, m.core_attention) for m in found]
    # the fused kernel wants positions on the GPU and starts each sequence at 0
    fused, config.apply_rope_fusion = config.apply_rope_fusion, False
    try:
        for module in found:
            kind = kinds[module.layer_number - 1]
            module.core_attention = CachedAttention(size, softmax_scale(architecture, kind),
                                                    windows[module.layer_number - 1])
        for layer in linear:
            layer.kept = KeptState(size, layer)
        yield [m.core_attention for m in found] + [layer.kept for layer in linear]
    finally:
        for layer in linear:
            layer.kept = None
        config.apply_rope_fusion = fused
        for module, attention in replaced:
            module.core_attention = attention


# Multi-head latent attention: the library's module for rows of packed documents, at every layout, and
# with a cache of what keys and values are made of.
#
# The library has angles of its own, in float32, for rows of one document; here each token is given
# those of its position, as in all other layers. Its unfused module cuts the projections to the narrow
# vectors over the tensor-parallel group, and of the rotated key's gradient each process keeps what
# its own heads found (`_GatherFromModelParallelRegion.backward`); here every process has them
# whole, as with Transformer Engine.

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
            # of "rope" cosine and sine have no factor
            "rope_type": "rope"}


class TokenAngles(torch.nn.Module):
    """Stands where the library makes angles: gives those of a row's tokens."""

    def __init__(self) -> None:
        """Wait for angles."""
        super().__init__()
        self.angles: torch.Tensor | None = None

    def get_rotary_seq_len(self, *args: Any) -> None:
        """Return nothing: each token has its angles."""

    def forward(self, seq_len: None, *, packed_seq: bool) -> Any:
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
        assert rotary_pos_emb is not None
        self.rotary_pos_emb.angles = rotary_pos_emb if self._rotates else rotary_pos_emb[..., :0]
        output: tuple[torch.Tensor, None] = super().forward(
            hidden_states, attention_mask, packed_seq_params=packed_seq_params, **kwargs)
        return output

    @property
    def _rotates(self) -> bool:
        """Return whether the layer has positions; where it has none, what would rotate stays as it is."""
        plain = self.config.no_rope_freq
        return not (plain and plain[self.layer_number - 1])

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        # where queries are made without a narrow vector the library would normalise their input, or refuse
        if self.config.q_lora_rank is not None:
            return dict(super()._resolve_qk_norm_config(submodules))
        self.config.q_lora_rank = self.config.kv_lora_rank
        try:
            found = super()._resolve_qk_norm_config(submodules)
        finally:
            self.config.q_lora_rank = None
        return {**found, "linear_q_proj": submodules.linear_q_proj, "linear_q_up_proj": IdentityOp,
                "q_layernorm": IdentityOp}

    def _run_core_attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                            attention_mask: None, packed_seq_params: Any = None, attn_mask_type: Any = None,
                            **kwargs: Any) -> torch.Tensor:
        # the library pads values and cuts the result, which ours does by itself, and of values that are wider
        # than queries it would cut channels
        attend = super()._run_core_attention
        if isinstance(self.core_attention, DocumentAttention) or value.shape[-1] > query.shape[-1]:
            attend = self.core_attention
        attended: torch.Tensor = attend(
            query, key, value, attention_mask, packed_seq_params=packed_seq_params,
            attn_mask_type=attn_mask_type or self.attn_mask_type, **kwargs)
        return attended

    def _read(self, hidden: torch.Tensor, angles: torch.Tensor,
              spans: PackedSpans) -> tuple[torch.Tensor, None]:
        """Attend to narrow vectors that the cache keeps: the projections to keys and from values meet the
        query and the output instead (arXiv 2405.04434, section 2.1.2)."""
        config, heads, cached = self.config, self.num_attention_heads_per_partition, self.core_attention
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
        # q (W c) = (W^T q) c: the query meets the narrow vector, so the cache holds kv_lora_rank + rotated
        # channels for each token and not a key and a value for each head
        if cached.up_weight is None:
            cached.up_weight = adapted_weight(self.linear_kv_up_proj).detach()  # no parameter of the cache's
        to_keys, to_values = cached.up_weight.unflatten(0, (heads, -1)).split(
            [config.qk_head_dim, config.v_head_dim], dim=1)
        query = torch.cat([torch.einsum("thd,hdk->thk", plain, to_keys),
                           self._turned(turned, angles, spans)], dim=-1)
        # one key/value head for all query heads; values are its first kv_lora_rank channels
        one = torch.cat([latent[:, None], self._turned(key[:, None], angles, spans)], dim=-1)
        attended = cached(query, one, one, None, packed_seq_params=spans)
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
        if not self._rotates:
            return channels
        turned: torch.Tensor = apply_rotary_pos_emb(
            channels, angles, self.config, cu_seqlens=spans.cu_seqlens_q,
            cp_group=parallel_state.get_context_parallel_group(), mla_rotary_interleaved=True)
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
        # zeros add nothing to products, and what they make of values is cut off again
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
