# What: Kimi Linear 48B-A3B: Kimi Delta Attention in three layers of four, latent attention without positions.
# Run:  megatron-sov convert from-hf kimi-linear kimi-ckpt --plugin examples/families/kimi_linear.py:KIMI_LINEAR
# See:  a checkpoint for `pretrain examples/families/kimi_linear.py:kimi_linear_48b --from kimi-ckpt`.

from dataclasses import asdict, dataclass, replace

from megatron_sov import Family
from megatron_sov.base.errors import UserError
from megatron_sov.model.config import LinearAttentionConfig, ModelConfig, ParallelConfig
from megatron_sov.model.families.family import DECODER_CONFIG, EXPERT_GROUPS, MAX_POSITIONS
from megatron_sov.model.families.hf_config import Fixed, Renamed, Unused
from megatron_sov.model.families.hf_layers import LeadingDenseLayers, read_num_layers
from megatron_sov.model.families.latent import (
    DIRECT_QUERIES, LATENT_ATTENTION, LATENT_QUERIES, STRUCTURE, LatentHeads)
from megatron_sov.model.families.linear_layers import (
    KIMI_DELTA, check_integer, parse_layer_pattern, read_delta_sizes)
from megatron_sov.model.families.weights import (
    DENSE_FFN, EMBEDDINGS_AND_HEAD, Experts, GateUp, Same, router_bias_entry, trunk_section)
from megatron_sov.model.recipes.open_models import LATENT, continue_pretraining


@dataclass(frozen=True)
class KimiLayers:
    """Layers with Kimi Delta Attention, and its sizes: from `linear_attn_config` of config.json, which counts
    layers from 1, or from the fields of transformers."""

    sizes: tuple[str, ...] = ("num_heads", "head_dim", "short_conv_kernel_size")
    """Fields of `linear_attn_config`."""
    top_level: tuple[str, ...] = ("linear_num_heads", "linear_head_dim", "linear_conv_kernel_dim")
    """The same sizes as fields of transformers."""
    defaults: tuple[int, ...] = (32, 128, 4)
    lists: tuple[tuple[str, str], ...] = (("full_attn_layers", "full_attention"),
                                          ("kda_layers", "linear_attention"))

    @property
    def names(self):
        return ("linear_attn_config", "layer_types", *self.top_level)

    def write(self, model):
        """Return both forms; raise `UserError` if heads differ, or gates have another rank."""
        sizes, types = read_delta_sizes(model, negative=False), model.layer_types()
        lists = {name: [i + 1 for i, layer_type in enumerate(types) if layer_type == kind]
                 for name, kind in self.lists}
        return {"linear_attn_config": lists | dict(zip(self.sizes, sizes, strict=True)), "layer_types": types,
                **dict(zip(self.top_level, sizes, strict=True))}

    def read(self, config):
        """Return the shortest pattern of the layers, and the sizes; raise `UserError` if two fields disagree,
        or a layer has no type or two types."""
        part = dict(config.get("linear_attn_config", {}))
        sizes = []
        for name, other, default in zip(self.sizes, self.top_level, self.defaults, strict=True):
            size = part.pop(name, config.get(other, default))
            if config.get(other, size) != size:
                raise UserError(f"config.json: linear_attn_config.{name} = {size} and {other} = "
                                f"{config[other]} disagree; remove the latter")
            sizes.append(check_integer(f"linear_attn_config.{name}", size))
        lists = {kind: part.pop(name) for name, kind in self.lists if name in part}
        if part:
            raise UserError(f"config.json: linear_attn_config has unknown fields: {', '.join(part)}")
        heads, width, taps = sizes
        return {**self._layers(config, lists), "linear_attention": asdict(
            LinearAttentionConfig(heads, heads, width, width, width, taps))}

    def _layers(self, config, lists):
        count = read_num_layers(config)
        default = ["full_attention" if i and i % 4 == 0 else "linear_attention" for i in range(count)]
        types = config.get("layer_types", default)
        if len(lists) == 2:
            type_of_layer = {i: kind for kind, numbers in lists.items() for i in numbers}
            listed = [type_of_layer.get(i, "") for i in range(1, count + 1)]
            numbers = sorted(i for layers in lists.values() for i in layers)
            if numbers != [*range(1, count + 1)] or config.get("layer_types", listed) != listed:
                raise UserError(f"config.json: linear_attn_config has {lists}; full_attn_layers and "
                                f"kda_layers must list each of {count} layers once, counted from 1, and "
                                "agree with layer_types")
            types = listed
        return parse_layer_pattern(types, count)


BLOCK = "block_sparse_moe"
EXPERTS = (
    Same("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "H"),
    Same("mlp.router.weight", f"{BLOCK}.gate.weight", "E H"),
    router_bias_entry(f"{BLOCK}.gate.e_score_correction_bias"),
    Experts(GateUp("mlp.experts.experts.linear_fc1.weight", f"{BLOCK}.experts.{{e}}.w1.weight",
                   f"{BLOCK}.experts.{{e}}.w3.weight", "I H")),
    Experts(Same("mlp.experts.experts.linear_fc2.weight", f"{BLOCK}.experts.{{e}}.w2.weight", "H I")),
    GateUp("mlp.shared_experts.linear_fc1.weight", f"{BLOCK}.shared_experts.gate_proj.weight",
           f"{BLOCK}.shared_experts.up_proj.weight", "S H"),
    Same("mlp.shared_experts.linear_fc2.weight", f"{BLOCK}.shared_experts.down_proj.weight", "H S"),
)

KIMI_LINEAR = Family(
    name="kimi_linear",
    hf_classes=("KimiLinearForCausalLM",),
    weights=(
        *EMBEDDINGS_AND_HEAD, trunk_section("linear layers", KIMI_DELTA),
        trunk_section("other layers", LATENT_ATTENTION),
        trunk_section("other layers", LATENT_QUERIES, when="has_query_latent"),
        trunk_section("other layers", DIRECT_QUERIES, when="has_whole_queries"),
        trunk_section("dense layers", DENSE_FFN), trunk_section("moe layers", EXPERTS),
    ),
    config=(
        *(item for item in DECODER_CONFIG if item is not MAX_POSITIONS),
        Renamed("model_max_length", "max_position_tokens", 1048576, aliases=("max_position_embeddings",)),
        Renamed("num_experts", "num_experts", 256, aliases=("num_local_experts",)),
        Renamed("num_experts_per_token", "num_experts_per_token", 8, aliases=("num_experts_per_tok",)),
        Renamed("num_shared_experts", "num_shared_experts", 1, aliases=("n_shared_experts",)),
        Renamed("num_expert_group", "num_expert_groups", 1, aliases=("n_group",)),
        Renamed("topk_group", "num_groups_per_token", 1),
        Renamed("moe_intermediate_size", "expert_ffn_dim", 1024),
        Renamed("intermediate_size", "dense_ffn_dim", 9216), Renamed("rms_norm_eps", "norm_eps", 1e-5),
        Renamed("routed_scaling_factor", "routed_scaling_factor", 2.446),
        Fixed("tie_word_embeddings", False), Fixed("attention_bias", False, written=False),
        Fixed("moe_renormalize", True), Fixed("norm_topk_prob", True, written=False),
        Fixed("moe_router_activation_func", "sigmoid"), Fixed("mla_use_nope", True),
        Fixed("moe_layer_freq", 1, written=False), Fixed("num_nextn_predict_layers", 0, written=False),
        LatentHeads(checks_head_dim=False), KimiLayers(), LeadingDenseLayers(default=1),
        # no channel rotates, and the router selects groups whenever there are several
        Unused(("rope_theta", "rope_scaling", "rope_parameters", "use_grouped_topk", "topk_method",
                "pretraining_tp")),
    ),
    structure={**STRUCTURE, "rope_on_global": False, "rope_theta": 10_000.0, "yarn": None,
               "llama3_rope": None, "linear_rope_factor": None, "num_mtp_layers": 0},
    varies=("latent_attention", "linear_attention", *EXPERT_GROUPS),
    training={"router_bias_update_rate": 1e-3},
    needs_shared_expert=True,
    respelt=((f".{BLOCK}.", ".mlp."),),
    in_memory=((f".{BLOCK}", ".mlp"), (".self_attn.f_", ".self_attn.forget_gate.f_")),
)


def kimi_linear_48b():
    """Kimi Linear 48B-A3B: 20 layers of 27 attend linearly, 8 of 256 experts, one shared, 1M."""
    return continue_pretraining("kimi-linear-48b", ModelConfig(
        family="kimi_linear.py:KIMI_LINEAR", vocab_size=163840, hidden_size=2304, num_layers=27, num_heads=32,
        num_kv_heads=32, head_dim=192, latent_attention=replace(LATENT, q_lora_rank=None),
        linear_attention=LinearAttentionConfig(32, 32, 128, 128, 128),
        attention_pattern="DDDG" * 6 + "DDG", rope_on_global=False, rope_theta=10_000.0, num_dense_layers=1,
        dense_ffn_dim=9216, num_experts=256, num_experts_per_token=8, num_shared_experts=1,
        expert_ffn_dim=1024, routed_scaling_factor=2.446, norm_eps=1e-5, max_position_tokens=1048576),
        ParallelConfig(pp=3, ep=8, zero1=True))
