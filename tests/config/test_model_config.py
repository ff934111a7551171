"""Rules of an architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megatron_sov.config import RunConfig, YarnConfig

Small = Callable[..., RunConfig]


@pytest.mark.parametrize(("model", "sentence"), [
    ({"vocab_size": 0}, "model.vocab_size = 0 must be positive"),
    ({"num_dense_layers": 5, "dense_ffn_dim": 1},
     "model.num_dense_layers = 5 must lie between 0 and num_layers = 4"),
    ({"num_dense_layers": 1}, "model.dense_ffn_dim = 0 must be positive"),
    ({"local_rope_theta": 1e4, "yarn": YarnConfig()}, "model.local_rope_theta = 10000.0 needs plain rot"),
    ({"linear_rope_factor": 0.5}, "model.linear_rope_factor = 0.5 must be at least 1"),
    ({"linear_rope_factor": 2.0, "yarn": YarnConfig()}, "model.linear_rope_factor = 2.0 stands beside"),
    ({"attention_softcap": 0.0}, "model.attention_softcap = 0.0 must be positive"),
    ({"logits_softcap": float("inf")}, "model.logits_softcap = inf must be positive"),
    ({"attention_sinks": True, "attention_softcap": 5.0}, "model.attention_sinks = True cannot be with"),
    ({"linear_bias": True, "num_shared_experts": 0}, "model.linear_bias = True needs model.qkv_bias = True"),
    ({"linear_bias": True, "qkv_bias": True}, "model.linear_bias = True needs model.num_shared_experts = 0"),
    ({"rope_share": 0.0}, "model.rope_share = 0.0 must be in"),
    ({"rope_share": 0.3}, "model.rope_share = 0.3 must be in"),
    ({"rope_share": 0.5, "yarn": YarnConfig()}, "model.yarn needs model.rope_share = 1, it is 0.5"),
    ({"rope_theta": -1e4}, "model.rope_theta = -10000.0 must be positive"),
    ({"norm_eps": float("nan")}, "model.norm_eps = nan must be positive"),
    ({"routed_scaling_factor": 0.0}, "model.routed_scaling_factor = 0.0 must be positive"),
    ({"seq_aux_loss_coeff": -1.0}, "model.seq_aux_loss_coeff = -1.0 must be 0 or more"),
    ({"yarn": YarnConfig(factor=0.0)}, "model.yarn.factor = 0.0 must be positive"),
    ({"yarn": YarnConfig(beta_fast=float("nan"))}, "model.yarn.beta_fast = nan must be positive"),
    ({"yarn": YarnConfig(), "rope_theta": 1.0}, "model.yarn needs model.rope_theta above 1, it is 1.0"),
    ({"logits_multiplier": -1.0}, "model.logits_multiplier = -1.0 must be positive"),
    ({"attention_multiplier": float("nan")}, "model.attention_multiplier = nan must be positive"),
    ({"num_mtp_layers": 2, "dense_ffn_dim": 1}, "model.num_mtp_layers = 2 must be 0 or 1"),
    ({"attention_pattern": "LG"}, "model.sliding_window_tokens = 0 must be positive"),
    ({"sliding_window_tokens": 8}, "model.sliding_window_tokens = 8 must be positive exactly when"),
])
def test_rules_of_the_architecture(model: dict[str, Any], sentence: str, small: Small) -> None:
    (problem,) = small(**model).problems()
    assert problem.startswith(sentence)
