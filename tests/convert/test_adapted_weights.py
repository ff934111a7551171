"""An adapter inside its base's weights."""

from __future__ import annotations

import torch

from megatron_sov.config import apply_settings
from megatron_sov.convert.adapted_weights import merged
from megatron_sov.models.adapters import MAGNITUDE, A, B, places
from megatron_sov.recipes import get


def test_lengths_that_were_not_trained_leave_a_weight_as_it_is() -> None:
    """In bf16 too, where a trained length is rounded and that of the row is not."""
    config = apply_settings(get("tiny-qwen2"), ["lora.rank=2", "lora.dora=true"])
    place = places(config.model, config.lora)["model.layers.0.self_attn.q_proj.weight"]
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(place.of.out_features, place.of.in_features, generator=generator).bfloat16()
    tensors = {place.of.key(A): torch.randn(2, place.of.in_features, generator=generator).bfloat16(),
               place.of.key(B): torch.zeros(place.of.out_features, 2).bfloat16(),
               place.of.key(MAGNITUDE): torch.linalg.vector_norm(weight.float(), dim=1).bfloat16()}
    assert merged(weight, place, tensors, config.lora).equal(weight)
    tensors[place.of.key(MAGNITUDE)] *= 2
    assert merged(weight, place, tensors, config.lora).equal(2 * weight)
