"""Weights of a live model: exports equal to-hf, and imports are the inverse, at every layout."""

import hashlib
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_sov import convert, recipes
from megatron_sov.base.errors import UserError
from megatron_sov.checkpoint import initial_weights
from megatron_sov.convert import export_weights, import_weights
from megatron_sov.convert.live_import import LiveImport
from megatron_sov.engine.model.language_model import build_model
from megatron_sov.engine.model.local_shards import list_local_shards
from megatron_sov.model.config import LoraConfig, RunConfig
from tests.checkpoints import save_checkpoint
from tests.tiny import tiny_model

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
"""Recipe -> precision and layouts. tiny-qwen2 ties its head to its embedding: the first and the last pipeline
stage each have a copy."""


def describe_tensor(tensor: Any) -> str:
    """Return dtype, shape and hash of a tensor."""
    raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"


def build_random_model(recipe: str, precision: str, layout: dict[str, Any]) -> tuple[RunConfig, Any]:
    """Inside ranks: return the config of a tiny model, and the model with router biases other than zero."""
    experts = ["model.num_experts=4"] if recipes.get(recipe).model.num_experts else []
    config, model = tiny_model(recipe, "model.vocab_size=95", *experts, f"train.precision={precision}",
                               layout=layout)
    for block in list_local_shards(model):
        if block.key.endswith("expert_bias"):
            block.data.copy_(torch.arange(block.data.numel()) / 7)
    return config, model


def export_live_weights(recipe: str, precision: str, layout: dict[str, Any], path: str) -> dict[str, Any]:
    """Inside ranks: save a random model, and export it without files: to rank 0 ("main"), to all ranks
    ("everywhere"), in bfloat16, and until three tensors ("early"). "own memory": exports are copies."""
    config, model = build_random_model(recipe, precision, layout)
    save_checkpoint(Path(path), model, None, {"step": 1, "tokens": 1}, config.to_dict(), None)
    result = {"main": {name: describe_tensor(t) for name, t in export_weights(model)},
              "bf16": {name: str(t.dtype) for name, t in export_weights(model, "bfloat16")}}
    interrupted = export_weights(model)
    result["early"] = [name for _, (name, _) in zip(range(3), interrupted, strict=False)]
    interrupted.close()
    exported = dict(export_weights(model, everywhere=True))
    result["everywhere"] = {name: describe_tensor(t) for name, t in exported.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    result["own memory"] = {name: describe_tensor(t) for name, t in exported.items()} == result["everywhere"]
    dist.barrier()
    return result


@pytest.mark.essential
@pytest.mark.distributed
@pytest.mark.parametrize("layouts_by_recipe", [
    {"tiny-k-exaone": ("one", "EP2 x PP2 of two chunks", "TP2+SP x EP2 x PP2"), "tiny-qwen2": ("PP2",)},
    pytest.param({recipe: names for recipe, (_, names) in RECIPES.items()}, marks=pytest.mark.deep)],
    ids=["all at once", "each"])
def test_live_export_equals_file_export(ranks, job, tmp_path: Path,
                                        layouts_by_recipe: dict[str, tuple[str, ...]]) -> None:
    cases = [(recipe, RECIPES[recipe][0], name) for recipe, names in layouts_by_recipe.items()
             for name in names]
    results = ranks(*(job(__file__, "export_live_weights", LAYOUTS[name][0], {
        "recipe": recipe, "precision": precision, "layout": LAYOUTS[name][1],
        "path": str(tmp_path / f"{recipe}-{name}")})
                      for recipe, precision, name in cases))
    for (recipe, _, name), per_rank in zip(cases, results, strict=True):
        convert.to_hf(tmp_path / f"{recipe}-{name}", tmp_path / f"{recipe}-{name}-hf")
        file_tensors = {key: describe_tensor(t)
                        for key, t in load_file(tmp_path / f"{recipe}-{name}-hf/model.safetensors").items()}
        assert per_rank[0]["main"] == file_tensors, name
        assert all(result["main"] == {} for result in per_rank[1:]), name
        assert all(result["everywhere"] == file_tensors and result["own memory"] for result in per_rank), name
        assert ({dtype for key, dtype in per_rank[0]["bf16"].items() if "correction" not in key}
                == {"torch.bfloat16"})
        assert all(dtype == "torch.float32" for key, dtype in per_rank[0]["bf16"].items()
                   if "correction" in key)
        assert [len(result["early"]) for result in per_rank] == [3] + [0] * (len(per_rank) - 1), name
    expected = results[0][0]["main"]
    assert all(per_rank[0]["main"] == expected for (recipe, *_), per_rank in zip(cases, results, strict=True)
               if recipe == "tiny-k-exaone"), ("initial weights are the same at every layout, "
                                               "and so are exports")
    assert len(expected) > 100


# Live import is the inverse of live export, at every layout.


IMPORT_CASES = [("tiny-k-exaone", 2, {"tp": 2, "sp": True}, "fp32"),
                ("tiny-solar-open", 2, {"ep": 2}, "bf16"),
                ("tiny-qwen2", 2, {"pp": 2}, "fp32"), ("tiny-k-exaone", 2, {"pp": 2, "vpp": 2}, "bf16")]
"""tiny-qwen2 ties its head to its embedding: first and last pipeline stage have a copy."""


def import_live_weights(recipe: str, layout: dict[str, Any], precision: str) -> dict[str, Any]:
    """Inside ranks: import the exported weights of one model into another, change the first, and import
    again.

    Returns whether the weights agree at each point, and the errors of invalid imports.
    """
    config, source = build_random_model(recipe, precision, layout)
    target = build_model(config.model, config.parallel, config.train)
    initial_weights.initialize_weights(target, config.model, 2)

    def compare_shards() -> list[bool]:
        return [torch.equal(a.data, b.data)
                for a, b in zip(list_local_shards(source), list_local_shards(target), strict=True)]

    @torch.no_grad()
    def change_source() -> None:
        for block in list_local_shards(source):  # seeded by name: replicas of a shard change equally
            torch.manual_seed(zlib.crc32(repr((block.key, block.offset)).encode()))
            block.data.add_(torch.randn(block.data.shape).to(block.data), alpha=1e-4)

    result: dict[str, Any] = {"before": all(compare_shards())}
    weights, live_import = dict(export_weights(source, everywhere=True)), LiveImport(target)
    live_import.import_all(weights.items())
    result["after"] = all(compare_shards())
    change_source()
    result["after_change"] = all(compare_shards())
    live_import.import_all(export_weights(source, everywhere=True))
    result["after_second_import"] = all(compare_shards())
    result["errors"] = []
    one_name = next(name for name in weights if "k_proj" in name)
    for invalid_weights in (
            [(name, tensor) for name, tensor in weights.items() if name != one_name],
            [(name, tensor[:3] if name == one_name else tensor) for name, tensor in weights.items()],
            [*weights.items(), (one_name, weights[one_name])], [("model.odd", weights[one_name])]):
        try:
            import_weights(target, iter(invalid_weights))
        except UserError as e:
            result["errors"].append(str(e))
    return result


@pytest.mark.deep
@pytest.mark.distributed
def test_live_import_equals_live_export(ranks, job) -> None:
    results = ranks(*(job(__file__, "import_live_weights", n,
                          {"recipe": recipe, "layout": x, "precision": precision})
                      for recipe, n, x, precision in IMPORT_CASES))
    for case, per_rank in zip(IMPORT_CASES, results, strict=True):
        for result in per_rank:
            assert (result["before"], result["after"]) == (False, True), case
            assert (result["after_change"], result["after_second_import"]) == (False, True), case
            missing, shape, repeated, unknown = result["errors"]
            assert "1 missing (model.layers.0.self_attn.k_proj" in missing and "of another shape" in shape
            assert "is given twice" in repeated and "1 unexpected (model.odd)" in unknown


def test_live_import_rejects_a_model_with_adapter() -> None:
    """Exports contain the merged adapter, which would be applied twice."""
    from types import SimpleNamespace

    adapted: Any = SimpleNamespace(lora=LoraConfig(4))
    with pytest.raises(UserError, match=r"^lora\.rank = 4:"):
        import_weights(adapted, [])
