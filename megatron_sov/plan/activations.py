"""What a layer stores for its backward pass, module by module, and what recomputing or offloading leaves."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sov.config import RunConfig


@dataclass(frozen=True)
class Saved:
    """Numbers (not bytes) that a layer on one process saves; routing is even."""

    residuals: int
    """Inputs of its two norms, the first of which is the layer's own."""
    norm_outputs: int
    """What the two norms give."""
    qkv_input: int
    """Norm output, gathered for the projection."""
    qkv: int
    """Queries, keys and values."""
    rotated: int
    """Queries and keys once more, rotated."""
    attended: int
    """Attention's output."""
    gathered: int
    """Keys and values of the whole row, under context parallelism."""
    expert_inputs: int
    """Routed tokens, in both orders, before and behind their expert."""
    expert_hidden: int
    """Gate and up projection of routed experts."""
    expert_activated: int
    """Their product, which the down projection takes."""
    shared: int
    """All of the shared experts."""
    dense: int
    """All of a dense feed-forward network."""

    @property
    def routed(self) -> int:
        """All of the routed experts."""
        return self.expert_inputs + self.expert_hidden + self.expert_activated

    @property
    def total(self) -> int:
        """Of a layer with experts or of a dense one, whichever saves more."""
        attention = self.qkv_input + self.qkv + self.rotated + self.attended + self.gathered
        return self.residuals + self.norm_outputs + attention + max(self.shared + self.routed, self.dense)


def saved(config: RunConfig, row_tokens: int) -> Saved:
    """Return what a layer saves where nothing is recomputed.

    Args:
        config: model, layout.
        row_tokens: tokens of a micro-batch, before it is cut over processes.
    """
    m, p = config.model, config.parallel
    local = row_tokens // p.cp
    share = local // (p.tp if p.sp else 1)
    heads, kv = m.num_heads * m.head_dim // p.tp, m.num_kv_heads * m.head_dim // p.tp
    routed, ffn = (share * m.num_experts_per_token, m.expert_ffn_dim // p.etp) if m.num_experts else (0, 0)
    has_dense = m.num_dense_layers or not m.num_experts
    return Saved(
        residuals=2 * share * m.hidden_size, norm_outputs=2 * share * m.hidden_size,
        qkv_input=local * m.hidden_size, qkv=local * (heads + 2 * kv), rotated=local * (heads + kv),
        attended=local * heads, gathered=row_tokens * 2 * kv if p.cp > 1 else 0,
        expert_inputs=4 * routed * m.hidden_size, expert_hidden=2 * routed * ffn,
        expert_activated=routed * ffn,
        shared=(local * (m.hidden_size + 3 * m.num_shared_experts * m.expert_ffn_dim // p.tp)
                if m.num_experts else 0),
        dense=local * (m.hidden_size + 3 * m.dense_ffn_dim // p.tp) if has_dense else 0)


def kept(config: RunConfig, row_tokens: int) -> int:
    """Return how many numbers of a layer stay on the device until its backward pass, under
    `train.recompute` false or selective, and `gpu.offload_modules`."""
    recomputed, offloaded = config.gpu.recompute_modules, config.gpu.offload_modules
    s = saved(config, row_tokens)
    norms = s.residuals + s.norm_outputs * ("layernorm" not in recomputed)
    norms -= s.residuals // 2 * ("mlp_norm" in offloaded)
    attention = s.gathered + s.rotated
    attention += s.qkv_input * ("qkv_linear" not in offloaded) + s.qkv * ("core_attn" not in offloaded)
    attention += s.attended * ("attn_proj" not in offloaded)
    routed = s.routed - s.expert_activated * ("moe_act" in recomputed)
    # the first of the four copies of a routed token is what the experts take
    routed -= s.expert_inputs // 4 * ("expert_fc1" in offloaded) + s.expert_hidden * ("moe_act" in offloaded)
    experts = 0 if "moe" in recomputed else routed + s.shared * ("shared_experts" not in recomputed)
    return norms + attention + max(experts, s.dense * ("mlp" not in recomputed))
