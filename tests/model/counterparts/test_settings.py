"""Convert settings of Megatron-LM and other programs to ours: files are never executed, and no setting is
dropped silently."""

from typing import Any

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.model.counterparts.architecture import infer_architecture, infer_model_fields

LLAMA = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 48,
         "vocab_size": 96, "gated_linear_unit": True, "normalization": "RMSNorm", "seq_length": 64}


@pytest.mark.each(("stated", "message"), [
    ({"normalization": "LayerNorm"}, "normalization = 'LayerNorm': only 'RMSNorm' is read"),
    ({"vocab_size": None}, "model.vocab_size is missing; pass --set model.vocab_size=N"),
    ({"moe_layer_freq": 2, "num_moe_experts": 4}, "all dense layers must come before layers with experts"),
    ({"window_size": [7, 0], "window_attn_skip_freq": 0}, "must be at least 1"),
    ({"moe_layer_freq": "__import__('os').system('x')", "num_moe_experts": 4}, "is not a list of numbers"),
    ({"moe_layer_freq": "[1]*999999999999", "num_moe_experts": 4}, "is not a list of numbers"),
    ({"num_layers": "many"}, "num_layers = 'many': must be a whole number"),
    ({"mtp_num_layers": 10**30}, "must be a whole number from 0 to 10,000"),
    ({"add_bias_linear": True}, "add_bias_linear = True: only False is read"),
])
def test_an_unsupported_architecture_is_refused(stated: dict[str, Any], message: str) -> None:
    assert infer_architecture(LLAMA).family == "llama"
    with pytest.raises(UserError) as error:
        infer_architecture(LLAMA | stated)
    assert message in str(error.value)


def test_positions_divided_by_a_factor_are_read() -> None:
    assert infer_architecture(LLAMA | {"seq_len_interpolation_factor": 4}).linear_rope_factor == 4.0
    assert infer_architecture(LLAMA | {"seq_len_interpolation_factor": None}).linear_rope_factor is None


def test_windows_and_layers_without_rotation_are_a_pattern() -> None:
    model = infer_architecture(LLAMA | {
        "num_layers": 8, "num_moe_experts": 4, "moe_ffn_hidden_size": 24, "moe_layer_freq": "[0]*1+[1]*7",
        "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True,
        "moe_shared_expert_intermediate_size": 24, "moe_router_topk_scaling_factor": 2.5,
        "qk_layernorm": True, "share_embeddings_and_output_weights": False, "window_size": [127, 0],
        "window_attn_skip_freq": 4, "no_rope_freq": 4}, "exaone_moe")
    assert (model.attention_pattern, model.sliding_window_tokens) == ("LLLG", 128)
    assert not model.rope_on_global
    assert (model.num_dense_layers, model.num_shared_experts, model.routed_scaling_factor) == (1, 1, 2.5)


def test_yarns_ramp_between_channels_is_refused() -> None:
    stated = {"position_embedding_type": "yarn", "yarn_rotary_scaling_factor": 32.0}
    assert infer_model_fields(stated)[0]["yarn"] == {"factor": 32.0}
    _, problems = infer_model_fields(stated | {"yarn_correction_range_round_to_int": False})
    assert problems == ["yarn_correction_range_round_to_int = False: only True or None is read"]
