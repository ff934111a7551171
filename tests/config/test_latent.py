"""Sizes of latent attention: their rules, and how many weights they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_sov.config import LatentAttentionConfig, ModelConfig, ParallelConfig, YarnConfig, apply_settings
from megatron_sov.recipes import get


def changed(latent: dict[str, Any], **model: Any) -> ModelConfig:
    """Return the tiny DeepSeek with other sizes."""
    base = get("tiny-deepseek-v3").model
    assert base.latent_attention is not None
    return replace(base, latent_attention=replace(base.latent_attention, **latent), **model)


@pytest.mark.parametrize(("model", "sentence"), [
    (changed({"kv_lora_rank": 0}), "model.latent_attention.kv_lora_rank = 0 must be positive"),
    (changed({"q_lora_rank": -1}), "model.latent_attention.q_lora_rank = -1 must be positive"),
    (changed({"qk_rope_head_dim": 5, "qk_nope_head_dim": 27}),
     "model.latent_attention.qk_rope_head_dim = 5 must be even"),
    (changed({}, head_dim=30), "model.head_dim = 30 must be model.latent_attention.qk_nope_head_dim 16 + "),
    (changed({}, num_kv_heads=2), "model.num_kv_heads = 2 must be model.num_heads = 4 under"),
    (changed({}, attention_pattern="LG", sliding_window_tokens=8), "model.latent_attention has no sliding"),
    (changed({}, qk_norm=True), "model.qk_norm = True is not built for model.latent_attention; set it to "),
    (changed({}, attention_multiplier=0.5), "model.attention_multiplier = 0.5 is not built for"),
    (changed({}, yarn=YarnConfig(mscale=0.0)), "model.yarn.mscale = 0.0 must be positive"),
    (replace(get("tiny-solar-open").model, yarn=YarnConfig(mscale=0.5)), "model.yarn.mscale = 0.5 needs"),
])
def test_rules(model: ModelConfig, sentence: str) -> None:
    (problem,) = model.problems()
    assert problem.startswith(sentence)


def test_weights_are_counted_matrix_by_matrix() -> None:
    """With the sizes of DeepSeek-V3 (arXiv 2412.19437, section 4.2)."""
    v3 = LatentAttentionConfig(512, 128, 64, 128, 1536)
    down, up = 7168 * (1536 + 576), 1536 * 128 * 192 + 512 * 128 * 256
    assert v3.num_params(7168, 128) == down + up + 128 * 128 * 7168 + 1536 + 512
    whole = replace(v3, q_lora_rank=None)
    assert whole.num_params(7168, 128) == 7168 * (128 * 192 + 576) + 512 * 128 * 256 + 128 * 128 * 7168 + 512


def test_tensor_parallelism_cuts_the_sequence_too() -> None:
    (problem, *_) = ParallelConfig(tp=2).problems(get("tiny-deepseek-v3").model, 2)
    assert problem == "parallel.sp = False must be true when model.latent_attention meets parallel.tp = 2 > 1"


@pytest.mark.parametrize(("settings", "said"), [
    ([], ""),
    (["model.latent_attention.kv_lora_rank=500"],
     "model.latent_attention.kv_lora_rank = 500 must be a multiple of 16"),
    (["model.latent_attention.v_head_dim=97", "parallel.tp=32"],
     "model.num_heads 128 x model.latent_attention.v_head_dim 97 / parallel.tp 32 = 388 must be a multiple "),
])
def test_quantised_sizes_are_those_of_its_weights(settings: list[str], said: str) -> None:
    problems = apply_settings(get("deepseek-v3"), ["train.fp8=tensorwise", *settings]).problems()
    found = [p for p in problems if "must be a multiple of 16" in p]
    assert any(p.startswith(said) for p in found) if said else not found
