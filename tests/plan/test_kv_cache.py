"""Keys and values of a sequence, against sums by hand and against what the cached decoder keeps."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_sov import recipes
from megatron_sov.config import ParallelConfig
from megatron_sov.plan.kv_cache import kv_bytes, kv_cuts
from megatron_sov.plan.speed.shape import ModelShape, of_model


@pytest.mark.parametrize(("recipe", "tokens", "sizes", "by_hand"), [
    # 48 global layers of 8 key/value heads of 128, keys and values in two bytes
    ("solar-open-102b", 1000, {}, 1000 * 48 * 2 * 8 * 128 * 2),
    ("solar-open-102b", 1000, {"item_bytes": 1}, 1000 * 48 * 2 * 8 * 128),
    # three of four layers keep a window of 128 of 48
    ("k-exaone-236b", 10_000, {}, (12 * 10_000 + 36 * 128) * 2 * 8 * 128 * 2),
    ("k-exaone-236b", 100, {}, 48 * 100 * 2 * 8 * 128 * 2),
    # one vector of 512 and a rotated key of 64 for all heads of each of 61 layers
    ("deepseek-v3", 1000, {}, 61 * 1000 * (512 + 64) * 2)])
def test_a_sequence_keeps_what_is_counted_by_hand(recipe: str, tokens: int, sizes: dict[str, Any],
                                                  by_hand: int) -> None:
    assert kv_bytes(of_model(recipes.get(recipe).model), tokens, **sizes) == by_hand


def test_latent_attention_keeps_one_vector_for_all_heads() -> None:
    latent = ModelShape(61, 7168, 128, 128, 128, 129280, kv_lora_rank=512, rope_head_dim=64)
    assert kv_bytes(latent, 1000) == 61 * (512 + 64) * 2 * 1000
    assert kv_cuts(latent, 8) == 1


def test_beyond_the_number_of_heads_each_process_keeps_a_whole_one() -> None:
    shape = of_model(recipes.get("solar-open-102b").model)
    assert [kv_cuts(shape, tp) for tp in (1, 4, 8, 16)] == [1, 4, 8, 8]


def kept_by_a_decoder(recipe: str, tokens: int) -> int:
    """Return the bytes that a model's attention keeps once it has read a sequence."""
    import torch

    from megatron_sov.config import TrainConfig
    from megatron_sov.mcore.model import init, kv_cache
    from megatron_sov.mcore.model.language_model import build
    from megatron_sov.mcore.parallel import world

    world.join(ParallelConfig())
    config = recipes.get(recipe)
    model = build(config.model, ParallelConfig(), TrainConfig(precision="fp32"))
    init.initialise(model, config.model, 1)
    model.eval()
    with kv_cache.keep(model, kv_cache.CacheSize(1, tokens - 1)) as layers, torch.no_grad():
        row = kv_cache.read_row([kv_cache.Span(0, 0, list(range(tokens - 1)))], tokens - 1,
                                torch.device("cpu"))
        model.chunks[0].read(row)
    trunk = layers[:config.model.num_layers]
    world.leave()
    return sum(part.nbytes for layer in trunk for part in layer.stored)


def test_a_cached_decoder_keeps_as_much(ranks: Any, job: Any) -> None:
    """Its slots are as long as the sequence with the token that is read."""
    tokens = 100
    names = ("tiny-k-exaone", "tiny-deepseek-v3")
    jobs = (job(__file__, "kept_by_a_decoder", 1, {"recipe": name, "tokens": tokens}) for name in names)
    for name, (found,) in zip(names, ranks(*jobs), strict=True):
        assert found == kv_bytes(of_model(recipes.get(name).model), tokens, item_bytes=4), name
