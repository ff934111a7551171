"""Recipes in Megatron-Core's config: sliding windows, rotation, MoE layers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sov import recipes
from megatron_sov.base.errors import UserError
from megatron_sov.engine.model import specs
from megatron_sov.engine.router import BalancedRouter
from megatron_sov.model.config import ParallelConfig, apply_settings


def list_layer_settings(recipe: str, changes: list[str]) -> dict[str, Any]:
    """Return each layer's settings in Megatron-Core's config and specs."""
    from megatron.core.transformer.spec_utils import get_submodules

    config = apply_settings(recipes.get(recipe), changes)
    megatron_config = specs.build_transformer_config(config.model, ParallelConfig(), config.train)
    layers = specs.build_layer_specs(megatron_config, config.model)
    if config.model.num_mtp_layers:
        layers.append(specs.build_mtp_layer_spec(megatron_config, config.model))
    routers = [getattr(get_submodules(s.submodules.mlp), "router", None) for s in layers]
    names = ("window_attn_skip_freq", "no_rope_freq", "window_size", "moe_layer_freq", "qk_layernorm",
             "moe_router_topk_scaling_factor", "moe_shared_expert_intermediate_size",
             "calculate_per_token_loss", "batch_p2p_comm", "recompute_granularity",
             "yarn_rotary_scaling_factor", "yarn_original_max_position_embeddings", "mtp_num_layers", "bf16")
    return {**{n: getattr(megatron_config, n, None) for n in names},
            "dtype": str(megatron_config.params_dtype),
            "windows": [s.submodules.self_attention.submodules.core_attention.params["window_tokens"]
                        for s in layers],
            "routers": [r is BalancedRouter for r in routers],
            "te": specs.uses_transformer_engine(megatron_config.params_dtype)}


@pytest.mark.distributed
def test_a_recipes_structure_reaches_megatron(ranks, job) -> None:
    (exaone,), (solar,) = ranks(
        job(__file__, "list_layer_settings", 1,
            {"recipe": "tiny-k-exaone", "changes": ["model.num_layers=6", "train.recompute=true"]}),
        job(__file__, "list_layer_settings", 1, {"recipe": "tiny-solar-open", "changes": [
            "train.precision=bf16", 'model.yarn={"factor": 4.0, "original_max_position_tokens": 512}']}))
    # LLLG and a global MTP layer; global layers do not rotate
    assert exaone["windows"] == [32, 32, 32, 0, 32, 32, 0]
    assert exaone["window_attn_skip_freq"] == [1, 1, 1, 0, 1, 1, 0]
    assert exaone["no_rope_freq"] == [0, 0, 0, 1, 0, 0, 1]
    assert exaone["window_size"] == [31, 0]
    assert exaone["moe_layer_freq"] == [0, 1, 1, 1, 1, 1]
    assert exaone["routers"] == [False, True, True, True, True, True, False]
    assert exaone["qk_layernorm"]
    assert exaone["moe_router_topk_scaling_factor"] == 2.5
    assert exaone["mtp_num_layers"] == 1
    assert exaone["recompute_granularity"] == "full" and exaone["dtype"] == "torch.float32"
    assert exaone["calculate_per_token_loss"] and not exaone["batch_p2p_comm"] and not exaone["te"]
    assert solar["windows"] == [0] * 4 and solar["window_size"] is None and solar["moe_layer_freq"] == [1] * 4
    assert solar["moe_shared_expert_intermediate_size"] == 128
    assert (solar["yarn_rotary_scaling_factor"], solar["yarn_original_max_position_embeddings"]) == (4.0, 512)
    assert solar["bf16"] and solar["dtype"] == "torch.bfloat16"


def test_on_gpus_16_bit_alone_takes_transformer_engine(monkeypatch: pytest.MonkeyPatch,
                                                       tmp_path: Path) -> None:
    """A broken installation is reported with its own error; float32 and float64 do not need it."""
    broken = tmp_path / "transformer_engine"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise OSError('libcublas.so.13: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(specs, "on_gpu", lambda: True)
    specs.find_transformer_engine_error.cache_clear()
    try:
        with pytest.raises(UserError, match=r"^train\.precision = bf16"):
            specs.uses_transformer_engine(torch.bfloat16)
        for dtype in (torch.float32, torch.float64):
            assert not specs.uses_transformer_engine(dtype)
        monkeypatch.setattr(specs, "find_transformer_engine_error", lambda: "")
        assert specs.uses_transformer_engine(torch.bfloat16)
    finally:
        monkeypatch.undo()
        specs.find_transformer_engine_error.cache_clear()
