"""Live export gives, at every layout, the bits that to-hf writes of a checkpoint of the same moment."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

LAYOUTS = {
    "one": (1, {}),
    "TP2+SP": (2, {"tp": 2, "sp": True}),
    "EP2": (2, {"ep": 2}),
    "PP2": (2, {"pp": 2}),
    "EP2 x PP2 of two chunks": (4, {"ep": 2, "pp": 2, "vpp": 2}),
    "TP2+SP x EP2 x PP2": (4, {"tp": 2, "sp": True, "pp": 2, "ep": 2}),
}
RECIPES = {"tiny-k-exaone": ("bf16", tuple(LAYOUTS)), "tiny-solar-open": ("fp32", ("TP2+SP",)),
           "tiny-qwen2": ("bf16", ("TP2+SP", "PP2"))}
"""Recipe -> precision and layouts; tiny-qwen2's head is its embedding, of which each end of a
pipeline has a copy."""


def bits(tensor: Any) -> str:
    """Return dtype, shape and hash of a tensor."""
    import torch

    raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"


def exported(recipe: str, precision: str, layout: dict[str, Any], path: str) -> dict[str, Any]:
    """Write a checkpoint and return what live export gives: to rank 0, everywhere, in another dtype,
    and stopped early."""
    import torch
    import torch.distributed as dist

    from megatron_sov import recipes
    from megatron_sov.config import ParallelConfig, apply_settings
    from megatron_sov.convert import export_weights
    from megatron_sov.mcore.checkpoint import load
    from megatron_sov.mcore.model import init
    from megatron_sov.mcore.model.language_model import build
    from megatron_sov.mcore.model.local_shards import local_shards
    from megatron_sov.mcore.parallel import world

    sizes = ["model.vocab_size=95", "model.hidden_size=32", "model.head_dim=8"]
    if recipes.get(recipe).model.num_experts:
        sizes += ["model.expert_ffn_dim=16", "model.num_experts=4"]
    config = apply_settings(recipes.get(recipe), [*sizes, f"train.precision={precision}"])
    world.join(ParallelConfig(**layout))
    model = build(config.model, ParallelConfig(**layout), config.train)
    init.initialise(model, config.model, 1)
    for block in local_shards(model):
        if block.key.endswith("expert_bias"):
            block.data.copy_(torch.arange(block.data.numel()) / 7)
    load.save(Path(path), model, None, {"step": 1, "tokens": 1}, config.to_dict(), None)
    result = {"main": {name: bits(t) for name, t in export_weights(model)},
              "bf16": {name: str(t.dtype) for name, t in export_weights(model, "bfloat16")}}
    early = export_weights(model)
    result["early"] = [name for _, (name, _) in zip(range(3), early, strict=False)]
    early.close()
    kept = dict(export_weights(model, everywhere=True))
    result["everywhere"] = {name: bits(t) for name, t in kept.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    result["own memory"] = {name: bits(t) for name, t in kept.items()} == result["everywhere"]
    dist.barrier()
    world.leave()
    return result


@pytest.mark.distributed
def test_live_export_is_file_export(ranks, job, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from megatron_sov import convert

    cases = [(recipe, precision, name) for recipe, (precision, names) in RECIPES.items() for name in names]
    results = ranks(*(job(__file__, "exported", LAYOUTS[name][0], {
        "recipe": recipe, "precision": precision, "layout": LAYOUTS[name][1],
        "path": str(tmp_path / f"{recipe}-{name}")})
        for recipe, precision, name in cases))
    for (recipe, _, name), per_rank in zip(cases, results, strict=True):
        convert.to_hf(tmp_path / f"{recipe}-{name}", tmp_path / f"{recipe}-{name}-hf")
        written = {key: bits(t)
                   for key, t in load_file(tmp_path / f"{recipe}-{name}-hf/model.safetensors").items()}
        assert per_rank[0]["main"] == written, name
        assert all(result["main"] == {} for result in per_rank[1:]), name
        assert all(result["everywhere"] == written and result["own memory"] for result in per_rank), name
        assert ({dtype for key, dtype in per_rank[0]["bf16"].items() if "correction" not in key}
                == {"torch.bfloat16"})
        assert all(dtype == "torch.float32" for key, dtype in per_rank[0]["bf16"].items()
                   if "correction" in key)
        assert [len(result["early"]) for result in per_rank] == [3] + [0] * (len(per_rank) - 1), name
    first = results[0][0]["main"]
    assert all(per_rank[0]["main"] == first for (recipe, *_), per_rank in zip(cases, results, strict=True)
               if recipe == "tiny-k-exaone"), ("initial weights are the same at every layout, "
                                               "and so are exports")
    assert len(first) > 100
