"""What recomputing and offloading leave of a layer, against sums by hand."""

from __future__ import annotations

import pytest

from megatron_sov import recipes
from megatron_sov.config import apply_settings
from megatron_sov.plan.activations import kept, saved

TOKENS, HIDDEN, FFN, ROUTED = 4096, 4096, 1280, 8
"""Of Solar Open 102B: 64 heads and 8 key/value heads of 128."""
QUERIES, KEYS = 64 * 128, 8 * 128
NORMS, ATTENTION = 4 * HIDDEN, HIDDEN + (QUERIES + 2 * KEYS) + (QUERIES + KEYS) + QUERIES
EXPERTS, SHARED = ROUTED * (4 * HIDDEN + 3 * FFN), HIDDEN + 3 * FFN


@pytest.mark.parametrize(("recomputed", "offloaded", "per_token"), [
    ([], [], NORMS + ATTENTION + EXPERTS + SHARED),
    (["layernorm"], [], NORMS - 2 * HIDDEN + ATTENTION + EXPERTS + SHARED),
    (["moe_act"], [], NORMS + ATTENTION + EXPERTS - ROUTED * FFN + SHARED),
    (["shared_experts"], [], NORMS + ATTENTION + EXPERTS),
    (["moe"], [], NORMS + ATTENTION),
    (["core_attn"], [], NORMS + ATTENTION + EXPERTS + SHARED),
    ([], ["core_attn", "attn_proj"], NORMS + ATTENTION - (QUERIES + 2 * KEYS) - QUERIES + EXPERTS + SHARED),
    ([], ["mlp_norm", "qkv_linear"], NORMS - HIDDEN + ATTENTION - HIDDEN + EXPERTS + SHARED),
    ([], ["expert_fc1", "moe_act"], NORMS + ATTENTION + EXPERTS - ROUTED * (HIDDEN + 2 * FFN) + SHARED),
])
def test_what_stays_until_the_backward_pass(recomputed: list[str], offloaded: list[str],
                                            per_token: int) -> None:
    names = [f'gpu.{setting}={str(chosen).replace(chr(39), chr(34))}' for setting, chosen in
             (("recompute_modules", recomputed), ("offload_modules", offloaded))]
    config = apply_settings(recipes.get("solar-open-102b"), ["parallel.ep=1", *names])
    assert kept(config, TOKENS) == TOKENS * per_token
    assert saved(config, TOKENS).total == TOKENS * (NORMS + ATTENTION + EXPERTS + SHARED)
