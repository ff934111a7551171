"""Megatron-Core's own model, optimizer and scheduler continue from a written `torch_dist` checkpoint."""

from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.convert.megatron_export import to_megatron
from megatron_sov.model import recipes
from megatron_sov.model.counterparts.architecture import (
    describe_model, infer_architecture, normalize_arguments)
from tests.packing import Packed

JOBS = str(Path(__file__).with_name("stock_training.py"))
DENSE, EXPERTS = "tiny-qwen3", "tiny-solar-open"
FIRST, STEPS = 4, 20
TP2, PP2, EP2 = {"tp": 2, "sp": True}, {"pp": 2}, {"ep": 2}


class Case:
    """A run of our trainer, and continuations of its checkpoint."""

    def __init__(self, job: Any, data: Packed, folder: Path, recipe: str, precision: str) -> None:
        self._job, self.folder, self._model = job, folder, {"recipe": recipe, "precision": precision}
        self.training = job(JOBS, "train_ours", 1, {"data": str(data.text), "run": str(folder), **self._model,
                                                    "first": FIRST, "steps": STEPS})

    def export(self, out: str, **options: bool) -> None:
        report = to_megatron(self.folder / f"checkpoints/step-{FIRST}", self.folder / out, **options)
        assert (report.step, report.num_updates, report.schedule_problem) == (FIRST, FIRST, "")

    def continue_from(self, out: str, num_ranks: int, layout: dict[str, Any], *, distributed: bool) -> Any:
        return self._job(JOBS, "continue_stock", num_ranks, {
            "folder": str(self.folder / out), "batches": str(self.folder / "batches.pt"), **self._model,
            "layout": layout, "distributed": distributed})


@pytest.mark.distributed
def test_stock_training_continues_with_our_losses(ranks: Any, job: Any, packed_data: Packed,
                                                  tmp_path: Path) -> None:
    case = Case(job, packed_data, tmp_path / "run", DENSE, "fp64")
    (expected,), = ranks(case.training)
    case.export("out")
    (losses,), = ranks(case.continue_from("out", 1, {}, distributed=False))
    assert len(losses) == STEPS and max(expected) - min(expected) > 0.5
    assert losses == pytest.approx(expected, rel=1e-12)


@pytest.mark.distributed
@pytest.mark.deep
def test_stock_training_continues_at_other_layouts(ranks: Any, job: Any, packed_data: Packed,
                                                   tmp_path: Path) -> None:
    """With experts the library computes routing scores in float32, whatever the model's dtype."""
    dense, experts = (Case(job, packed_data, tmp_path / recipe, recipe, "fp64")
                      for recipe in (DENSE, EXPERTS))
    (of_dense,), (of_experts,) = ranks(dense.training, experts.training)
    dense.export("out")
    experts.export("out")
    experts.export("one", one_optimizer=True)
    layouts = (TP2, PP2, {})
    for losses in ranks(*(dense.continue_from("out", 2, layout, distributed=False) for layout in layouts)):
        assert losses[0] == pytest.approx(of_dense, rel=1e-12)
    for losses in ranks(*(experts.continue_from("out", 2, layout, distributed=False)
                          for layout in (EP2, TP2)),
                        *(experts.continue_from("one", 2, layout, distributed=False)
                          for layout in (PP2, {}))):
        assert losses[0] == pytest.approx(of_experts, rel=1e-8)


@pytest.mark.distributed
@pytest.mark.deep
def test_distributed_optimizer_continues_with_our_losses(ranks: Any, te_ranks: Any, job: Any,
                                                         packed_data: Packed, tmp_path: Path) -> None:
    """Its state is float32. Without Transformer Engine it cannot load its own checkpoints: torch's AdamW
    counts steps in tensors that its files lack."""
    dense, experts = (Case(job, packed_data, tmp_path / recipe, recipe, "fp32")
                      for recipe in (DENSE, EXPERTS))
    (of_dense,), (of_experts,) = ranks(dense.training, experts.training)
    dense.export("out")
    experts.export("out")
    for losses in te_ranks(*(dense.continue_from("out", 2, layout, distributed=True)
                             for layout in (TP2, PP2, {}))):
        assert losses[0] == pytest.approx(of_dense, rel=1e-6)
    (losses, _), = te_ranks(experts.continue_from("out", 2, EP2, distributed=True))
    assert losses == pytest.approx(of_experts, rel=1e-6)


@pytest.mark.each("recipe", ["tiny-qwen2", "tiny-qwen3", "tiny-qwen3-moe", "tiny-solar-open", "llama-3.1-8b",
                             "solar-open-102b", "qwen3-30b-a3b-2507"])
def test_arguments_describe_the_model(recipe: str) -> None:
    model = recipes.get(recipe).model
    again = infer_architecture(normalize_arguments(describe_model(model)), model.family)
    assert (again.num_layers, again.rope_theta, again.llama3_rope) == (
        model.num_layers, model.rope_theta, model.llama3_rope)


@pytest.mark.each(("recipe", "field"), [
    ("tiny-gemma3", "embedding_multiplier"), ("tiny-exaone4", "block_norms"),
    ("tiny-hyperclovax", "attention_multiplier"), ("tiny-solar-open2", "linear_attention"),
    ("tiny-deepseek-v3", "latent_attention"), ("tiny-hyperclova-omni", "vision_config")])
def test_models_beyond_gpt_model_are_refused(recipe: str, field: str) -> None:
    with pytest.raises(UserError, match=f"Megatron-Core's GPTModel cannot be this model.*{field}"):
        describe_model(recipes.get(recipe).model)
