"""FP8 weights (`train.fp8_weights`): training, checkpoints and exports have the same bits as with bf16
weights, since both quantize the same bf16 values."""

from pathlib import Path
from typing import Any

import pytest

from megatron_sov.model import recipes
from megatron_sov.model.config import apply_settings
from megatron_sov.plan.footprint import stage_parameters
from tests.te_double import quantized_run

RUN = str(Path(__file__).with_name("quantized_run.py"))
IN_8_BITS = "train.fp8_weights=true"
OVERLAP = ["parallel.overlap_param_gather=true", "parallel.overlap_grad_reduce=true"]


@pytest.mark.distributed
@pytest.mark.deep  # the next test compares losses at one layout
@pytest.mark.parametrize("cases", [
    [("tiny-k-exaone", ["train.fp8=blockwise", "parallel.tp=2", "parallel.sp=true", "parallel.ep=2",
                        "model.num_layers=2"])],
    [("tiny-solar-open", ["train.fp8=blockwise", "parallel.pp=2", "model.num_layers=2", "optim.name=muon"]),
     ("tiny-solar-open", ["train.fp8=mxfp8", "parallel.ep=2", "gpu.moment_dtype=bf16"])]],
    ids=["tensors and experts", "stages, further moments"])
def test_losses_are_those_of_bf16_weights(te_ranks: Any, job: Any, packed_data: Any,
                                          cases: list[tuple[str, list[str]]]) -> None:
    """With tensor, expert and pipeline parallelism."""
    result = te_ranks(*(job(RUN, "train_losses", 2,
                            {"recipe": recipe, "path": str(packed_data.text), "steps": 2,
                             "settings": [*settings, "parallel.zero1=true", *more]})
                        for recipe, settings in cases for more in ([], [IN_8_BITS])))
    for case, bf16, in_8_bits in zip(cases, result[::2], result[1::2], strict=True):
        assert in_8_bits == bf16, case


@pytest.mark.distributed
@pytest.mark.deep
@pytest.mark.parametrize(("recipe", "nproc", "settings"), [
    ("tiny-k-exaone", 1, ["train.fp8=mxfp8", *OVERLAP, "model.num_layers=2",
                          "train.fp8_bf16_layers_at_end=1"]),
    ("tiny-solar-open", 2, ["train.fp8=tensorwise", *OVERLAP])])
def test_checkpoints_and_exports_equal_those_of_bf16_weights(te_ranks: Any, job: Any, packed_data: Any,
                                                             tmp_path: Path, recipe: str, nproc: int,
                                                             settings: list[str]) -> None:
    """A checkpoint loads at any layout, with and without the setting, and a resumed run is exact."""
    bf16, in_8_bits = te_ranks(*(job(RUN, "resume_and_compare", nproc, {
        "recipe": recipe, "path": str(packed_data.text), "run": str(tmp_path / str(len(more))),
        "settings": [*settings, "parallel.zero1=true", "train.global_batch_size=4", *more]})
        for more in ([], [IN_8_BITS])))
    config = quantized_run.build_config(recipe, [*settings, "parallel.zero1=true", IN_8_BITS], "")
    counted = sum(part.count * part.numel for part in stage_parameters.iter_quantized(config, 0))
    for before, after in zip(bf16, in_8_bits, strict=True):
        assert after["straight"] == before["straight"]
        assert after["resumed"] == after["straight"][2:]
        assert after["resumed ends"] == after["straight ends"]
        assert (after["saved"], after["exported"]) == (before["saved"], before["exported"])
        assert (after["differing"], list(after["products of the evaluation"])) == ([], ["fprop"])
        assert (before["in 8 bits"], after["in 8 bits"]) == (0, counted)


@pytest.mark.each(("settings", "message"), [
    (["train.fp8=none"], "needs an 8-bit recipe"), (["train.fp8=nvfp4"], "needs an 8-bit recipe"),
    (["parallel.zero1=false", *(f"{s.partition('=')[0]}=false" for s in OVERLAP)],
     "needs parallel.zero1 = true"),
    (['optim.groups=[{"pattern": "*.layers.0.*", "frozen": true}]'], "frozen weight has no master"),
    (['gpu.cuda_graphs=["moe_router"]'], "reallocated"),
    (["gpu.optimizer_offload=1"], "masters in host memory")])
def test_settings_incompatible_with_fp8_weights_are_refused(settings: list[str], message: str) -> None:
    config = apply_settings(recipes.get("solar-open-102b"), [
        "train.fp8=blockwise", "parallel.zero1=true", IN_8_BITS, *settings])
    problems = [p for p in config.problems(480) if p.key == "train.fp8_weights"]
    assert any(message in str(p) for p in problems), problems
