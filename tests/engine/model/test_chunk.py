"""Layers of a model chunk have their global numbers in per-layer settings; the chunk's output head."""

from typing import Any

import pytest
import torch

from megatron_sov import recipes
from megatron_sov.engine.model import language_model, specs
from megatron_sov.engine.model.chunk import OutputHead
from megatron_sov.engine.model.language_model import build_model
from megatron_sov.engine.parallel import world
from megatron_sov.model.config import ParallelConfig, apply_settings


def inspect_layers() -> dict[str, Any]:
    """Build a model with two kinds of layers and an MTP layer with experts; return the layers' kinds, and the
    errors for a wrong number and for Megatron-Core's own router."""
    from unittest import mock

    from megatron.core.transformer.moe.router import TopKRouter

    config = apply_settings(recipes.get("tiny-k-exaone"), ["model.mtp_experts=true"])
    world.join_world(ParallelConfig())
    model, (chunk,) = config.model, language_model.build_run_model(config).chunks
    layers = [*chunk.decoder.layers, chunk.mtp.layers[0].transformer_layer]
    layers_found = [{"number": layer.layer_number, "attention": layer.self_attention.layer_number,
                     "router": layer.mlp.router.layer_number if layer.is_moe_layer else None,
                     "window": layer.self_attention.core_attention.window_tokens}
                    for layer in layers]
    kinds = [*model.layer_types(), model.mtp_layer_type()]
    windows = [*model.windows(), model.mtp_window()]
    expected = [{"number": n, "attention": n, "router": n if n > model.num_dense_layers else None,
                 "window": window} for n, window in enumerate(windows, 1)]
    names, prefixed = (set(chunk.sharded_state_dict(prefix, metadata={})) for prefix in ("", "model."))
    skips_rope = [bool(chunk.config.no_rope_freq[layer.layer_number - 1]) for layer in layers]
    refusals = []
    layers[-1].mlp.router.layer_number = 1
    with pytest.raises(RuntimeError) as error:
        language_model.check_layers(chunk, 0)
    refusals.append(str(error.value))
    with mock.patch.object(specs, "BalancedRouter", TopKRouter), pytest.raises(RuntimeError) as error:
        language_model.build_run_model(config)
    return {"layers": layers_found, "expected": expected, "skips_rope": skips_rope, "kinds": kinds,
            "parameters": [n for n, _ in chunk.named_parameters() if n.startswith("mtp.")],
            "prefix": prefixed == {f"model.{name}" for name in names},
            "refusals": [*refusals, str(error.value)]}


@pytest.mark.distributed
def test_every_layer_has_the_number_of_its_entry_in_our_lists(ranks: Any, job: Any) -> None:
    (result,), = ranks(job(__file__, "inspect_layers", 1))
    assert result["layers"] == result["expected"] and result["prefix"]
    assert result["skips_rope"] == [kind == "full_attention" for kind in result["kinds"]]
    assert result["kinds"][0] != result["kinds"][-1]  # detects an MTP layer numbered 1
    # The transformer layer's parameters lie between those of the norms.
    is_inside = ["transformer_layer" in name for name in result["parameters"]]
    assert is_inside == [*sorted(is_inside[:-1]), False] and any(is_inside)
    num_layers = len(result["kinds"])
    assert result["refusals"] == [f"layer {num_layers}: BalancedRouter has number 1",
                                  "layer 2: its router is Megatron-Core's TopKRouter"]


# Megatron-Core's own output head refuses fused accumulation of weight gradients without APEX.

def compare_heads() -> list[Any]:
    """Return the fusion setting of our head and of the config, and Megatron-Core's error for its own head."""
    from megatron.core import tensor_parallel
    from megatron.core.transformer import TransformerConfig

    world.join_world(ParallelConfig())
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1,
                               use_cpu_initialization=True, perform_initialization=False,
                               gradient_accumulation_fusion=True)

    def build(head: Any) -> Any:
        return head(8, 16, config=config, init_method=torch.nn.init.zeros_, bias=False, skip_bias_add=False)

    head = build(OutputHead)
    try:
        build(tensor_parallel.ColumnParallelLinear)
    except RuntimeError as e:
        return [head.gradient_accumulation_fusion, config.gradient_accumulation_fusion, str(e)]
    return []


def get_head_type() -> list[Any]:
    """Return the type of a model's output head."""
    config = recipes.get("tiny-qwen3")
    world.join_world(ParallelConfig())
    return [type(build_model(config.model, ParallelConfig(), config.train).chunks[0].output_layer).__name__]


@pytest.mark.distributed
def test_the_output_head_has_its_own_config(ranks: Any, job: Any) -> None:
    ((head_fusion, model_fusion, refusal),), ((head_type,),) = ranks(job(__file__, "compare_heads", 1, {}),
                                                                     job(__file__, "get_head_type", 1, {}))
    assert (head_fusion, model_fusion, head_type) == (False, True, "OutputHead")
    assert "gradient_accumulation_fusion" in refusal and "APEX" in refusal
