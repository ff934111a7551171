"""Sizes of latent attention: their rules, and how many weights they are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_sov.config import LatentAttentionConfig, apply_settings
from megatron_sov.recipes import get


def test_weights_are_counted_matrix_by_matrix() -> None:
    """With the sizes of DeepSeek-V3 (arXiv 2412.19437, section 4.2)."""
    v3 = LatentAttentionConfig(512, 128, 64, 128, 1536)
    down, up = 7168 * (1536 + 576), 1536 * 128 * 192 + 512 * 128 * 256
    assert v3.num_params(7168, 128) == down + up + 128 * 128 * 7168 + 1536 + 512
    whole = replace(v3, q_lora_rank=None)
    assert whole.num_params(7168, 128) == 7168 * (128 * 192 + 576) + 512 * 128 * 256 + 128 * 128 * 7168 + 512


@pytest.mark.parametrize(("settings", "said"), [
    ([], ""),
    (["model.latent_attention.kv_lora_rank=500"],
     "needs a multiple of 16, and model.latent_attention.kv_lora_rank = 500"),
    (["model.latent_attention.v_head_dim=97", "parallel.tp=32"],
     "needs a multiple of 16, and model.num_heads 128 x model.latent_attention.v_head_dim 97 / parallel.tp "
     "32 = 388"),
])
def test_quantised_sizes_are_those_of_its_weights(settings: list[str], said: str) -> None:
    problems = apply_settings(get("deepseek-v3"), ["train.fp8=tensorwise", *settings]).problems()
    found = [problem.rule for problem in problems if problem.key == "train.fp8"]
    assert said in found if said else not found
