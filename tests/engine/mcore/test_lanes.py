"""Versions of the library number and describe layers differently, and some differences raise nothing: every
layer has the number of its entry in our lists, and our router."""

from __future__ import annotations

from typing import Any

import pytest


def layers_built() -> dict[str, Any]:
    """Build a model whose layers are of two kinds, its prediction layer with experts, and say what each is;
    then what is said of a wrong number, and of the library's own router."""
    from unittest import mock

    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_sov import recipes
    from megatron_sov.engine.mcore.model import language_model, specs
    from megatron_sov.engine.mcore.parallel import world
    from megatron_sov.model.config import ParallelConfig, apply_settings

    config = apply_settings(recipes.get("tiny-k-exaone"), ["model.mtp_experts=true"])
    world.join(ParallelConfig())
    model, (chunk,) = config.model, language_model.build_configured(config).chunks
    layers = [*chunk.decoder.layers, chunk.mtp.layers[0].transformer_layer]
    found = [{"number": layer.layer_number, "attention": layer.self_attention.layer_number,
              "router": layer.mlp.router.layer_number if layer.is_moe_layer else None,
              "window": layer.self_attention.core_attention.window_tokens}
             for layer in layers]
    kinds = [*model.layer_types(), model.mtp_layer_type()]
    wanted = [{"number": n, "attention": n, "router": n if n > model.num_dense_layers else None,
               "window": model.window_tokens(kind)} for n, kind in enumerate(kinds, 1)]
    stands_still = [bool(chunk.config.no_rope_freq[layer.layer_number - 1]) for layer in layers]
    refusals = []
    layers[-1].mlp.router.layer_number = 1
    with pytest.raises(RuntimeError) as told:
        language_model.check_layers(chunk, 0)
    refusals.append(str(told.value))
    with mock.patch.object(specs, "BalancedRouter", TopKRouter), pytest.raises(RuntimeError) as told:
        language_model.build_configured(config)
    return {"found": found, "wanted": wanted, "stands_still": stands_still, "kinds": kinds,
            "parameters": [n for n, _ in chunk.named_parameters() if n.startswith("mtp.")],
            "refusals": [*refusals, str(told.value)]}


@pytest.mark.distributed
def test_every_layer_has_the_number_of_its_entry_in_our_lists(ranks: Any, job: Any) -> None:
    (built,), = ranks(job(__file__, "layers_built", 1))
    assert built["found"] == built["wanted"]
    assert built["stands_still"] == [kind == "full_attention" for kind in built["kinds"]]
    assert built["kinds"][0] != built["kinds"][-1]  # a prediction layer numbered 1 would be seen
    # the names of weights in checkpoints, between those of the norms, as they were with 0.16
    inside = ["transformer_layer" in name for name in built["parameters"]]
    assert inside == [*sorted(inside[:-1]), False] and any(inside)
    last = len(built["kinds"])
    assert built["refusals"] == [f"layer {last}: BalancedRouter has number 1",
                                 "layer 2: its router is the library's TopKRouter"]
