# What: GLM-4.5, 4.5-Air and 4.6: half of each head rotates; DeepSeek-V3's router; a prediction layer with experts.
# Run:  megatron-sov convert from-hf glm-4.5-air glm-ckpt --plugin examples/families/glm4_moe.py:GLM4_MOE
# See:  a checkpoint for `pretrain examples/families/glm4_moe.py:glm_4_5_air --from glm-ckpt`.

from dataclasses import dataclass

from megatron_sov import Family
from megatron_sov.base.errors import UserError
from megatron_sov.model.config import ModelConfig, ParallelConfig
from megatron_sov.model.families.family import (
    DECODER_CONFIG, DEEPSEEK_ROUTER, DEEPSEEK_ROUTER_CONFIG, EXPERT_GROUPS, KV_HEADS)
from megatron_sov.model.families.hf_config import Fixed, Renamed, Rope, hidden_over_heads
from megatron_sov.model.families.hf_layers import LeadingDenseLayers, PredictionAfterTrunk
from megatron_sov.model.families.weights import (
    ATTENTION, DEEPSEEK_EXPERTS, DENSE_FFN, EMBEDDINGS_AND_HEAD, PREDICTION_AFTER_TRUNK, PREDICTION_COPIES,
    QK_NORM, QKV_BIAS, prediction_layer_section, trunk_section)
from megatron_sov.model.recipes.open_models import continue_pretraining


@dataclass(frozen=True)
class PartialRope(Rope):
    """Rotary frequencies of the first channels of each head: `partial_rotary_factor`."""

    default_share: float = 0.5
    """Share of rotating channels if config.json has no field, as in transformers."""

    @property
    def names(self):
        return (*super().names, "partial_rotary_factor")

    def write(self, model):
        rope = super().write(model)["rope_parameters"]
        return {"rope_parameters": rope | {"partial_rotary_factor": model.rope_share}}

    def read(self, config):
        """Return theta, scaling and share; raise `UserError` if config.json has two different shares."""
        config, shares = dict(config), []
        for name in ("rope_parameters", "rope_scaling"):
            if config.get(name):
                config[name] = dict(config[name])
                shares.append(config[name].pop("partial_rotary_factor", None))
        shares.append(config.pop("partial_rotary_factor", None))
        shares = [share for share in shares if share is not None]
        if len({*shares}) > 1:
            raise UserError(f"config.json: partial_rotary_factor = {shares[1]}, and {shares[0]} in "
                            "rope_parameters; make them agree")
        return super().read(config) | {"rope_share": float(shares[0] if shares else self.default_share)}


# A Hugging Face folder has the prediction layer as an additional last layer of the trunk, with copies of
# embedding and head. transformers' model ignores it on loading; its `MtpModel` and vLLM read it.
GLM4_MOE = Family(
    name="glm4_moe",
    hf_classes=("Glm4MoeForCausalLM",),
    weights=(
        *EMBEDDINGS_AND_HEAD,
        trunk_section("every layer", ATTENTION),
        trunk_section("every layer", QKV_BIAS, when="qkv_bias"),
        trunk_section("every layer", QK_NORM, when="qk_norm"),
        trunk_section("dense layers", DENSE_FFN),
        trunk_section("moe layers", DEEPSEEK_EXPERTS),
        PREDICTION_AFTER_TRUNK, prediction_layer_section(ATTENTION, DEEPSEEK_EXPERTS),
        prediction_layer_section(QKV_BIAS, when="qkv_bias"), prediction_layer_section(QK_NORM, when="qk_norm"),
    ),
    config=(
        *DECODER_CONFIG, KV_HEADS, *DEEPSEEK_ROUTER_CONFIG, Fixed("tie_word_embeddings", False),
        Renamed("num_experts_per_tok", "num_experts_per_token", 8),
        Renamed("moe_intermediate_size", "expert_ffn_dim", 1408),
        Renamed("attention_bias", "qkv_bias", False), Renamed("use_qk_norm", "qk_norm", False),
        Renamed("rms_norm_eps", "norm_eps", 1e-5),
        Renamed("head_dim", "head_dim", hidden_over_heads), Renamed("intermediate_size", "dense_ffn_dim"),
        Renamed("n_routed_experts", "num_experts", 128), Renamed("n_shared_experts", "num_shared_experts", 1),
        Renamed("routed_scaling_factor", "routed_scaling_factor", 1.0),
        PartialRope(default_theta=10_000.0), LeadingDenseLayers(default=1), PredictionAfterTrunk(),
    ),
    structure={**DEEPSEEK_ROUTER, "attention_pattern": "G", "sliding_window_tokens": 0,
               "rope_on_global": True, "tied_embeddings": False},
    varies=("rope_share", "mtp_experts", *EXPERT_GROUPS),
    training={"router_bias_update_rate": 1e-3, "mtp_loss_coeff": 0.1},
    needs_shared_expert=True,
    copies=PREDICTION_COPIES,
)


def glm_4_5_air():
    """GLM-4.5-Air: 8 of 128 experts, one shared, one prediction layer with experts, 128K."""
    return continue_pretraining("glm-4.5-air", ModelConfig(
        family="glm4_moe.py:GLM4_MOE", vocab_size=151552, hidden_size=4096, num_layers=46, num_heads=96,
        num_kv_heads=8, head_dim=128, num_dense_layers=1, dense_ffn_dim=10944, num_experts=128,
        num_experts_per_token=8, num_shared_experts=1, expert_ffn_dim=1408, routed_scaling_factor=1.0,
        rope_theta=1e6, rope_share=0.5, qkv_bias=True, norm_eps=1e-5, num_mtp_layers=1, mtp_experts=True,
        mtp_loss_coeff=0.1, max_position_tokens=131072), ParallelConfig(tp=2, sp=True, ep=8))
