"""Weights and config items for multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), and
the family `deepseek_v3`."""

from dataclasses import dataclass, replace
from typing import Any

from megatron_sov.base.errors import UserError
from megatron_sov.model.config import LatentAttentionConfig, ModelConfig
from megatron_sov.model.families.family import (
    DECODER_CONFIG, DEEPSEEK_ROUTER, EXPERT_GROUPS, EXPERTS_CONFIG, Family)
from megatron_sov.model.families.hf_config import ConfigItem, Fixed, Renamed, Rope, Unused
from megatron_sov.model.families.hf_layers import LeadingDenseLayers, PredictionAfterTrunk
from megatron_sov.model.families.weights import (
    DEEPSEEK_EXPERTS, DENSE_FFN, EMBEDDINGS_AND_HEAD, PREDICTION_AFTER_TRUNK, PREDICTION_COPIES, Same,
    WeightEntry, get_latent_attention, prediction_layer_section, trunk_section)

_SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


@dataclass(frozen=True)
class LatentHeads:
    """Sizes of latent attention. All are required, because transformers has defaults for them and other
    programs do not."""

    names: tuple[str, ...] = (*_SIZES, "q_lora_rank", "num_key_value_heads", "head_dim", "qk_head_dim")
    null_tells: tuple[str, ...] = ("q_lora_rank",)
    """null: no query latent; if absent, transformers assumes 1536."""
    checks_head_dim: bool = True
    """Whether `head_dim` must equal `qk_rope_head_dim`; False if the family does not use `head_dim`."""

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return the sizes, with equal numbers of query and key/value heads."""
        latent = get_latent_attention(model)
        return {**{name: getattr(latent, name) for name in _SIZES}, "q_lora_rank": latent.q_lora_rank,
                "num_key_value_heads": model.num_kv_heads}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the sizes; `UserError` for missing or contradictory sizes."""
        missing = [name for name in (*_SIZES, "q_lora_rank") if name not in config]
        if missing:
            raise UserError(f"config.json: lacks {', '.join(missing)}; add them (q_lora_rank may be null)")
        sizes = {name: int(config[name]) for name in _SIZES}
        rank = config["q_lora_rank"]
        latent = LatentAttentionConfig(q_lora_rank=None if rank is None else int(rank), **sizes)
        heads = int(config.get("num_attention_heads", 0))
        # transformers' `head_dim` is the number of rotated channels
        for name, follows in (("num_key_value_heads", heads), ("head_dim", latent.qk_rope_head_dim),
                              ("qk_head_dim", latent.query_dim)):
            if config.get(name, follows) != follows and (name != "head_dim" or self.checks_head_dim):
                raise UserError(f"config.json: {name} = {config[name]}, but only {follows} is supported: it "
                                "follows from num_attention_heads, qk_nope_head_dim and qk_rope_head_dim")
        return {"latent_attention": latent, "num_kv_heads": heads, "head_dim": latent.query_dim}


@dataclass(frozen=True)
class LatentRope(Rope):
    """RoPE whose YaRN factor is stored as `mscale` and `mscale_all_dim`. Equal values leave cosine and sine
    unscaled and scale the softmax."""

    def write(self, model: ModelConfig) -> dict[str, Any]:
        written = super().write(model)
        if model.yarn is not None:
            written["rope_parameters"] |= {"mscale": model.yarn.mscale, "mscale_all_dim": model.yarn.mscale}
        return written

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return theta and YaRN; `UserError` for unequal factors, and for other scalings with these factors,
        which transformers would apply too."""
        config = dict(config)
        factors: set[tuple[Any, Any]] = set()
        for name in ("rope_parameters", "rope_scaling"):
            if config.get(name):
                rope = config[name] = dict(config[name])
                if rope.get("rope_type", rope.get("type")) != "yarn":
                    continue
                # Equal factors in both spellings leave one element in the set.
                scales = [rope.pop(factor, None) for factor in ("mscale", "mscale_all_dim")]
                if scales[0] is None and scales[1]:
                    raise UserError(f"config.json: mscale_all_dim = {scales[1]} without mscale: transformers "
                                    "and vLLM compute different rotations; add mscale")
                factors.add((1.0 if scales[0] is None else scales[0], scales[1] or 0.0))
                if scales[1] and rope.pop("attention_factor", None) not in (None, 1.0):
                    raise UserError("config.json: attention_factor: with mscale and mscale_all_dim only 1.0 "
                                    "is supported; leave it out")
        fields = super().read(config)
        if not factors:
            return fields
        mscale, mscale_all_dim = factors.pop()
        if factors or mscale != mscale_all_dim or not mscale:
            raise UserError("config.json: rope_type 'yarn' needs equal mscale and mscale_all_dim, not 0: "
                            "latent attention supports no other values")
        return fields | {"yarn": replace(fields["yarn"], mscale=float(mscale))}


LATENT_ATTENTION: tuple[WeightEntry, ...] = (
    Same("input_layernorm.weight", "input_layernorm.weight", "H"),
    Same("self_attention.linear_kv_down_proj.weight", "self_attn.kv_a_proj_with_mqa.weight", "C H"),
    Same("self_attention.linear_kv_up_proj.layer_norm_weight", "self_attn.kv_a_layernorm.weight", "K"),
    Same("self_attention.linear_kv_up_proj.weight", "self_attn.kv_b_proj.weight", "B K"),
    Same("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "H O"))
"""Latent attention without queries."""
LATENT_QUERIES: tuple[WeightEntry, ...] = (
    Same("self_attention.linear_q_down_proj.weight", "self_attn.q_a_proj.weight", "Q H"),
    Same("self_attention.linear_q_up_proj.layer_norm_weight", "self_attn.q_a_layernorm.weight", "Q"),
    Same("self_attention.linear_q_up_proj.weight", "self_attn.q_b_proj.weight", "A Q"))
DIRECT_QUERIES: tuple[WeightEntry, ...] = (
    Same("self_attention.linear_q_proj.weight", "self_attn.q_proj.weight", "A H"),
)


_CONFIG: tuple[ConfigItem, ...] = (
    *DECODER_CONFIG, *EXPERTS_CONFIG, Fixed("norm_topk_prob", True),
    Fixed("scoring_func", "sigmoid", written=False), Fixed("moe_layer_freq", 1, written=False),
    Fixed("tie_word_embeddings", False), Fixed("rope_interleave", True),
    # Defaults of transformers' classes.
    Renamed("n_group", "num_expert_groups", 8), Renamed("topk_group", "num_groups_per_token", 4),
    Renamed("rms_norm_eps", "norm_eps", 1e-6), Renamed("intermediate_size", "dense_ffn_dim", 18432),
    Renamed("n_shared_experts", "num_shared_experts", 1),
    Renamed("routed_scaling_factor", "routed_scaling_factor", 2.5), LatentRope(default_theta=10_000.0),
    # Balancing losses, and launch options of the released programs.
    Unused(("aux_loss_alpha", "seq_aux", "ep_size", "pretraining_tp")),
)
STRUCTURE: dict[str, Any] = {
    **DEEPSEEK_ROUTER, "sliding_window_tokens": 0, "tied_embeddings": False, "qkv_bias": False,
    "qk_norm": False}


# DeepSeek-V3 and R1, Kimi K2 (`deepseek_v3`): leading dense layers, DeepSeek-V3's router, a shared expert.
# Folders store the prediction layer (with experts) as an additional layer, with copies of embedding and
# output head. transformers' model drops the layer on loading; its `MtpModel` and vLLM read it.

DEEPSEEK_V3 = Family(
    name="deepseek_v3", hf_classes=("DeepseekV3ForCausalLM",),
    weights=(
        *EMBEDDINGS_AND_HEAD, trunk_section("every layer", LATENT_ATTENTION),
        trunk_section("every layer", LATENT_QUERIES, when="has_query_latent"),
        trunk_section("every layer", DIRECT_QUERIES, when="has_whole_queries"),
        trunk_section("dense layers", DENSE_FFN), trunk_section("moe layers", DEEPSEEK_EXPERTS),
        PREDICTION_AFTER_TRUNK, prediction_layer_section(LATENT_ATTENTION, DEEPSEEK_EXPERTS),
        prediction_layer_section(LATENT_QUERIES, when="has_query_latent"),
        prediction_layer_section(DIRECT_QUERIES, when="has_whole_queries")),
    config=(
        *_CONFIG, LatentHeads(), Renamed("n_routed_experts", "num_experts", 256),
        Fixed("topk_method", "noaux_tc", written=False), LeadingDenseLayers(default=3),
        PredictionAfterTrunk()),
    structure={**STRUCTURE, "attention_pattern": "G", "rope_on_global": True},
    varies=("latent_attention", "mtp_experts", *EXPERT_GROUPS),
    training={"router_bias_update_rate": 1e-3, "mtp_loss_coeff": 0.1}, needs_shared_expert=True,
    copies=PREDICTION_COPIES)


