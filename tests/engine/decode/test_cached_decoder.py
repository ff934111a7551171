"""Linear layers of the decoder: plain products with the bits of Megatron-Core's layers."""

from typing import Any
from unittest import mock

import torch

from megatron_sov.engine.decode import cached_decoder
from megatron_sov.engine.decode.cached_decoder import CachedDecoder
from megatron_sov.engine.decode.forward_only import ForwardModel
from megatron_sov.engine.model.cache_rows import CacheSize, CacheSpan
from tests.tiny import tiny_model


def read_prompt(recipe: str) -> dict[str, Any]:
    """Decode a prompt with plain products, then with Megatron-Core's layers; count the latter's calls."""
    from megatron.core.tensor_parallel import layers

    _, model = tiny_model(recipe, "model.qkv_bias=true", layout={})
    for name, weight in model.named_parameters():
        if name.endswith("qkv.bias"):
            torch.nn.init.normal_(weight)
    calls: list[int] = []

    def decode() -> list[Any]:
        megatron_linear = layers.linear_with_grad_accumulation_and_async_allreduce
        with (mock.patch.object(layers, megatron_linear.__name__, wraps=megatron_linear) as wrapped,
              CachedDecoder(ForwardModel(model, 50), CacheSize(1, 8)) as decoder):
            hidden = decoder.read([CacheSpan(0, 0, [5, 9, 2])], 3).hidden
            calls.append(wrapped.call_count)
        return hidden.tolist()

    plain_states = decode()
    cached_decoder.ColumnParallelLinear = cached_decoder.RowParallelLinear = mock.Mock  # finds no layer
    return {"equal": plain_states == decode(), "calls": calls}


def test_unsplit_layers_are_plain_products(ranks: Any, job: Any) -> None:
    ((result,),) = ranks(job(__file__, "read_prompt", 1, {"recipe": "tiny-solar-open"}))
    plain_calls, megatron_calls = result["calls"]
    assert plain_calls == 0 < megatron_calls
    assert result["equal"], "both give the same bits"
