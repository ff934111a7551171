"""Live import is the inverse of live export, at every layout."""

from __future__ import annotations

import zlib
from typing import Any

import pytest

LAYOUTS = [("tiny-k-exaone", 2, {"tp": 2, "sp": True}, "fp32"), ("tiny-solar-open", 2, {"ep": 2}, "bf16"),
           ("tiny-gpt-oss", 2, {"ep": 2}, "bf16"),
           ("tiny-qwen2", 2, {"pp": 2}, "fp32"), ("tiny-k-exaone", 2, {"pp": 2, "vpp": 2}, "bf16")]
"""tiny-qwen2's head is its embedding, of which each end of a pipeline has a copy."""


def taken_in(recipe: str, layout: dict[str, Any], precision: str) -> dict[str, Any]:
    """Return what one model holds that has taken in another's tensors, and what it refuses."""
    import torch

    from megatron_sov import recipes
    from megatron_sov.config import ParallelConfig, apply_settings
    from megatron_sov.convert import SentWeights, export_weights, import_weights
    from megatron_sov.convert.live_import import LiveImport
    from megatron_sov.errors import UserError
    from megatron_sov.mcore.model import init
    from megatron_sov.mcore.model.language_model import build
    from megatron_sov.mcore.model.local_shards import local_shards
    from megatron_sov.mcore.parallel import world

    sizes = ["model.vocab_size=95", "model.hidden_size=32", "model.head_dim=8"]
    if recipes.get(recipe).model.num_experts:
        sizes += ["model.expert_ffn_dim=16", "model.num_experts=4"]
    config = apply_settings(recipes.get(recipe), [*sizes, f"train.precision={precision}"])
    world.join(ParallelConfig(**layout))
    models = []
    for seed in (1, 2):
        models.append(build(config.model, ParallelConfig(**layout), config.train))
        init.initialise(models[-1], config.model, seed)
    source, target = models
    for block in local_shards(source):
        if block.key.endswith("expert_bias"):
            block.data.copy_(torch.arange(block.data.numel()) / 7)

    def same() -> list[bool]:
        return [torch.equal(a.data, b.data)
                for a, b in zip(local_shards(source), local_shards(target), strict=True)]

    @torch.no_grad()
    def drift() -> None:
        for block in local_shards(source):  # copies of one block drift alike
            torch.manual_seed(zlib.crc32(repr((block.key, block.offset)).encode()))
            block.data.add_(torch.randn(block.data.shape).to(block.data), alpha=1e-4)

    result: dict[str, Any] = {"before": all(same())}
    weights, sent, way = dict(export_weights(source, everywhere=True)), SentWeights(), LiveImport(target)
    way.whole(sent.whole(weights.items()))
    result["after"] = all(same())
    drift()
    result["drifted"] = all(same())
    way.changed(sent.changed(export_weights(source, everywhere=True)))
    result["changed"] = all(same())
    result["refused"] = []
    some = next(name for name in weights if "k_proj" in name)
    for spoilt in ([(n, t) for n, t in weights.items() if n != some],
                   [(n, t[:3] if n == some else t) for n, t in weights.items()],
                   [*weights.items(), (some, weights[some])], [("model.odd", weights[some])]):
        try:
            import_weights(target, iter(spoilt))
        except UserError as e:
            result["refused"].append(str(e))
    world.leave()
    return result


@pytest.mark.distributed
def test_a_model_takes_in_what_another_exports(ranks, job) -> None:
    found = ranks(*(job(__file__, "taken_in", n, {"recipe": recipe, "layout": x, "precision": precision})
                    for recipe, n, x, precision in LAYOUTS))
    for where, per_rank in zip(LAYOUTS, found, strict=True):
        for result in per_rank:
            assert (result["before"], result["after"]) == (False, True), where
            assert (result["drifted"], result["changed"]) == (False, True), where
            missing, shape, twice, unknown = result["refused"]
            assert "1 missing (model.layers.0.self_attn.k_proj" in missing and "of another shape" in shape
            assert "comes twice" in twice and "1 unexpected (model.odd)" in unknown


def test_a_model_with_an_adapter_takes_nothing_in() -> None:
    """What an export gives has its adapter inside: it would be added twice."""
    from types import SimpleNamespace

    from megatron_sov.config import LoraConfig
    from megatron_sov.errors import UserError
    from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron

    prepare_megatron()
    from megatron_sov.convert import import_weights

    adapted: Any = SimpleNamespace(lora=LoraConfig(4))
    with pytest.raises(UserError, match=r"^lora\.rank = 4: .* would add its own to them"):
        import_weights(adapted, [])
