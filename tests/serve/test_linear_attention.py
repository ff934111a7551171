"""What layers of linear attention keep of a served sequence does not grow with its length."""

from __future__ import annotations

from typing import Any

import pytest


def kept(longest: list[int]) -> list[dict[str, int]]:
    """Return the numbers that layers of each kind keep of two sequences, for caches of several lengths."""
    import torch

    from megatron_sov.engine.decode.cached_decoder import CachedDecoder
    from megatron_sov.engine.decode.forward_only import ForwardModel
    from megatron_sov.engine.model.cache_rows import CacheSize, CacheSpan
    from megatron_sov.engine.model.kv_cache import CachedAttention
    from megatron_sov.engine.parallel import world
    from tests.tiny import tiny_model

    _, model = tiny_model("tiny-solar-open2", "model.num_experts=4", layout={})
    found = []
    for tokens in longest:
        with CachedDecoder(ForwardModel(model, 50), CacheSize(2, tokens)) as decoder:
            for past, length in ((0, 7), (7, 1), (8, 1)):
                spans = [CacheSpan(slot, past, [5] * length) for slot in range(2)]
                decoder.read(spans, decoder.agree_row_tokens(2 * length))
            sizes = {"linear": 0, "attention": 0}
            for layer in decoder._layers:
                kind = "attention" if isinstance(layer, CachedAttention) else "linear"
                tensors = layer.stored or () if isinstance(layer, CachedAttention) else vars(layer).values()
                sizes[kind] += sum(t.numel() for t in tensors if isinstance(t, torch.Tensor))
            found.append(sizes)
    world.leave_world()
    return found


@pytest.mark.distributed
def test_what_linear_layers_keep_is_constant_in_length(ranks: Any, job: Any) -> None:
    ((short, long),) = ranks(job(__file__, "kept", 1, {"longest": [64, 4096]}))[0]
    assert short["linear"] == long["linear"] > 0
    assert long["attention"] == short["attention"] * (4096 + 1) // (64 + 1)
