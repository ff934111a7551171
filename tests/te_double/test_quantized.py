"""FP8 and FP4 training on a CPU: Megatron-Core's contexts choose the quantized products, the double quantizes
with the reference quantizers, and runs repeat exactly."""

from pathlib import Path
from typing import Any

import pytest

RUN = str(Path(__file__).with_name("quantized_run.py"))
CLASSES = {"tensorwise": "Float8CurrentScaling", "blockwise": "Float8BlockScaling",
           "mxfp8": "MXFP8BlockScaling", "nvfp4": "NVFP4BlockScaling"}
EXPERTS, MICRO_BATCHES = 8, 2
ATTENTION, MLP = 2, 2
"""Linear layers of attention (QKV, output projection) and of an MLP (gate-and-up, down projection)."""
DENSE_LAYER = ATTENTION + MLP
MOE_LAYER = ATTENTION + (EXPERTS + 1) * MLP
"""Linear layers of a layer with routed experts and a shared expert."""
PREDICTION_LAYER = 1 + DENSE_LAYER
"""Linear layers of the MTP layer: a projection of two states to one, and a dense layer."""


@pytest.mark.distributed
def test_which_products_are_quantised(te_ranks: Any, job: Any, packed_data: Any) -> None:
    """All linear layers are quantized except those of the bf16 layers at both ends, in the forward and both
    backward products; never norms, router, attention, embedding or head.

    Cases: numbers of linear layers (in bf16 at the start, quantized, in bf16 at the end).
    """
    cases = {("tiny-k-exaone", "blockwise"): (DENSE_LAYER, 2 * MOE_LAYER + PREDICTION_LAYER, MOE_LAYER),
             ("tiny-k-exaone", "nvfp4"): (DENSE_LAYER + PREDICTION_LAYER, 2 * MOE_LAYER, MOE_LAYER)}
    settings = ["train.fp8_bf16_layers_at_start=1", "train.fp8_bf16_layers_at_end=1"]
    result = te_ranks(*(job(RUN, "train_losses", 1,
                            {"recipe": recipe, "settings": [*settings, f"train.fp8={fp8}"],
                             "path": str(packed_data.text), "steps": 1})
                        for recipe, fp8 in cases))
    for ((_, fp8), (at_start, quantised, at_end)), (rank,) in zip(cases.items(), result, strict=True):
        assert rank["products"] == {
            f"{kind}{recipe}": MICRO_BATCHES * count for kind in ("fprop", "dgrad", "wgrad")
            for recipe, count in ((f" {CLASSES[fp8]}", quantised), ("", at_start + at_end))}


@pytest.mark.distributed
@pytest.mark.parametrize("kinds", [("mxfp8",), pytest.param((*CLASSES,), marks=pytest.mark.deep)],
                         ids=["mxfp8", "all"])
def test_losses_follow_bf16(te_ranks: Any, job: Any, packed_data: Any, kinds: tuple[str, ...]) -> None:
    result = te_ranks(*(job(RUN, "train_losses", 1, {
        "recipe": "tiny-solar-open", "path": str(packed_data.text), "steps": 2,
        "settings": [f"train.fp8={fp8}", "model.num_layers=2"]}) for fp8 in ("none", *kinds)))
    bf16, *others = (rank["losses"] for (rank,) in result)
    for fp8, losses in zip(kinds, others, strict=True):
        differences = [abs(a / b - 1) for a, b in zip(losses, bf16, strict=True)]
        limit = 0.02 if fp8 == "nvfp4" else 0.01
        assert 0 < max(differences) < limit, (fp8, differences)


@pytest.mark.distributed
@pytest.mark.deep  # test_weights.py resumes a run in 8 bits
@pytest.mark.parametrize("fp8", ["tensorwise", "nvfp4"])
def test_a_resumed_run_has_the_same_bits(te_ranks: Any, job: Any, packed_data: Any, tmp_path: Path,
                                         fp8: str) -> None:
    """Checkpoints contain expert weights although their recipe has no state. Evaluation with rows of any
    length is not quantized. Stochastic rounding draws the same numbers after a resume."""
    (found,), = te_ranks(job(RUN, "resume_and_compare", 1, {
        "recipe": "tiny-k-exaone",
        "settings": [f"train.fp8={fp8}", "train.recompute=true", "model.num_layers=2"],
        "path": str(packed_data.text), "run": str(tmp_path / "run")}))
    assert found["resumed"] == found["straight"][2:]
    assert found["resumed ends"] == found["straight ends"]
    assert list(found["products of the evaluation"]) == ["fprop"]


@pytest.mark.distributed
def test_weights_are_quantized_again_in_each_step(te_ranks: Any, job: Any, packed_data: Any) -> None:
    """Transformer Engine reuses quantized weights until the library reports an update."""
    ((found,),) = te_ranks(job(RUN, "record_weight_quantization", 1, {
        "recipe": "tiny-solar-open", "path": str(packed_data.text),
        "settings": ["train.fp8=blockwise", "model.num_layers=2"]}))
    assert found == [True, False] * 2


@pytest.mark.distributed
@pytest.mark.essential
@pytest.mark.parametrize("cases", [
    [("tiny-solar-open", ["train.fp8=mxfp8"])],
    pytest.param([
        ("tiny-k-exaone", ["parallel.zero1=true", "gpu.optimizer_offload=0.5", "gpu.router_fusion=on"]),
        ("tiny-qwen3-moe", ["parallel.expert_dispatcher=allgather"])], marks=pytest.mark.deep)],
    ids=["8 bits", "offloaded, gathered experts"])
def test_host_tensors_in_gpu_operations_are_refused(te_ranks: Any, job: Any, packed_data: Any, tmp_path: Path,
                                                    cases: list[tuple[str, list[str]]]) -> None:
    """A host tensor in a GPU kernel or in a torch operation with GPU tensors raises an error; a whole
    training run creates more than 1,000 host tensors and raises none."""
    quick = ["model.num_layers=2", "train.global_batch_size=1", "data.heldout_tokens=128"]
    arguments = {"cases": [(recipe, [*quick, *more]) for recipe, more in cases],
                 "path": str(packed_data.text), "run": str(tmp_path / "run")}
    unsent = arguments | {"cases": arguments["cases"][:1], "sends": False}
    (host_tensors,), (errors,) = te_ranks(job(RUN, "check_placement", 1, arguments),
                                          job(RUN, "check_placement", 1, unsent))
    assert all(isinstance(found, int) and found > 1000 for found in host_tensors), host_tensors
    assert "Expected all tensors to be on the same device" in errors[0]
