"""Models of Transformer Engine modules compute the same as "local" models of torch modules, at every layout.

A double replaces Transformer Engine: the tests cover assembly, splitting, wrapping, updates and checkpoints
of models configured as on a GPU, not the real kernels.
"""

from pathlib import Path
from typing import Any

import pytest

from megatron_sov.checkpoint.sharded_tensors import TensorReader
from tests.layouts.test_agreement import compare_runs, compute_difference

TE_RUN = str(Path(__file__).with_name("te_run.py"))
LAYOUT_RUN = str(Path(__file__).parents[1] / "layouts" / "layout_run.py")
TP2 = ["parallel.tp=2", "parallel.sp=true"]
LAYOUTS = {"TP2+SP x EP2": (2, [*TP2, "parallel.ep=2"])}
"""Name -> (number of processes, settings)."""
FURTHER = {
    "EP2 x ZeRO-1, passes overlapped": (2, [
        "parallel.ep=2", "parallel.zero1=true", "parallel.expert_overlap=micro_batches",
        "parallel.delay_weight_grads=true", "train.micro_batch_size=2", "train.recompute=selective",
        'gpu.recompute_modules=["layernorm", "moe_act"]']),
    "PP2 VPP2 x EP2, passes overlapped": (4, [
        "parallel.pp=2", "parallel.vpp=2", "parallel.ep=2", "parallel.expert_overlap=micro_batches",
        "train.micro_batch_size=1"]),
    # context parallelism by exchange: each process attends over whole rows with half of the heads
    "CP2, exchanged, recomputed": (2, ["parallel.cp=2", "gpu.attention=unfused", "train.recompute=true"]),
    "CP2, recomputed": (2, ["parallel.cp=2", "train.recompute=true"]),
    "ETP2": (2, ["parallel.etp=2"]),
    "CP4, exchanged": (4, ["parallel.cp=4", "gpu.attention=unfused"]),
}
EXAONE = ["model.num_layers=4", "model.num_experts=4", "train.micro_batch_size=4"]
"""Settings of tiny-k-exaone: sliding windows, a layer without rotary embedding, multi-token prediction."""
SOLAR = ["model.num_layers=2", "model.num_experts=4"]
"""Settings of tiny-solar-open, with YaRN."""
FP64 = ["train.precision=fp64"]


@pytest.mark.distributed
def test_models_consist_of_transformer_engine_modules(te_ranks: Any, job: Any, packed_data: Any) -> None:
    (found,), = te_ranks(job(TE_RUN, "count_modules_and_products", 1, {
        "recipe": "tiny-k-exaone", "settings": ["model.num_layers=3", "model.num_experts=4"],
        "paths": [str(packed_data.text)]}))
    # one dense layer, two MoE layers, and a dense MTP layer
    assert found["modules"]["TEDotProductAttention"] == 4
    assert found["modules"]["TEColumnParallelGroupedLinear"] == 2
    assert found["optimizers"] == ["FusedAdam"]
    # Each of 4 micro-batches has two products in every attention and in every dense MLP: 2 * 4 in the dense
    # layer and the MTP layer, 2 * (2 + 4 * 2) in two MoE layers of 4 experts, 2 * 2 in their shared experts;
    # and one in the MTP projection.
    products = 4 * (2 * 4 + 2 * (2 + 4 * 2) + 2 * 2 + 1)
    assert found["products"] == {"fprop": products, "dgrad": products, "wgrad": products}


@pytest.mark.distributed
def test_a_process_whose_experts_get_no_token_gives_zeros(te_ranks: Any, job: Any) -> None:
    (found,) = te_ranks(job(TE_RUN, "compare_permutations_without_tokens", 2, {}))
    # fused permutations sum in float32 and round once, unfused ones sum in bf16
    assert all(output < 0.01 and gradient < 0.01 for output, gradient in found), found


@pytest.mark.distributed
def test_overloaded_experts_spill_to_the_host_with_equal_losses(te_ranks: Any, job: Any,
                                                                packed_data: Any) -> None:
    """A router that sends all tokens to one process, under overlapped passes and recomputed activations."""
    settings = ["parallel.ep=2", "model.num_layers=2", "model.num_experts=4", "train.precision=bf16",
                "model.router_bias_update_rate=0", "parallel.zero1=true", "train.recompute=selective",
                'gpu.recompute_modules=["layernorm", "moe_act"]', "parallel.expert_overlap=micro_batches"]
    stored, spilled = te_ranks(*(job(TE_RUN, "train_overloaded", 2, {
        "settings": [*settings, *more], "paths": [str(packed_data.text)]})
        for more in ([], ["gpu.expert_spill=1.5"])))
    for without_spill, with_spill in zip(stored, spilled, strict=True):
        losses_and_weights, num_spilled, is_overloaded = with_spill[:2], *with_spill[2:]
        assert without_spill[:2] == losses_and_weights
        assert without_spill[2] == [0, 0]
        assert all((count > 0) == is_overloaded for count in num_spilled)


@pytest.mark.distributed
def test_a_router_multiplies_in_transformer_engine(te_ranks: Any, job: Any, packed_data: Any) -> None:
    """bf16 operands, float32 logits and float32 gradients."""
    (found,), = te_ranks(job(TE_RUN, "count_modules_and_products", 1, {
        "recipe": "tiny-qwen3-moe", "paths": [str(packed_data.text)],
        "settings": ["train.precision=bf16", "model.num_layers=2", "model.num_experts=4"]}))
    rows = 2 * 4  # routers, micro-batches
    assert {kind: n for kind, n in found["products"].items() if kind.startswith("general")} == {
        "general TN": rows, "general NN": rows, "general NT": rows}


@pytest.mark.distributed
@pytest.mark.essential
@pytest.mark.parametrize("layouts", [LAYOUTS, pytest.param(FURTHER, marks=pytest.mark.deep)],
                         ids=["tensors and experts", "further"])
def test_every_layout_and_either_checkpoint(ranks: Any, te_ranks: Any, job: Any, packed_data: Any,
                                            tmp_path: Path, layouts: dict[str, Any]) -> None:
    """Local and Transformer Engine models agree in losses, gradient norms, weights and moments: in two steps
    from the same weights, and in a step from the other model's checkpoint."""

    def build_job(reference: str, *layout: str, nproc: int = 1, is_reference: bool = False) -> Any:
        return job(LAYOUT_RUN, "train_and_continue", nproc, {
            "recipe": "tiny-k-exaone", "settings": [*FP64, *EXAONE, *layout], "is_reference": is_reference,
            "paths": [str(packed_data.text)], "reference": str(tmp_path / reference)})

    (local,), = ranks(build_job("local", is_reference=True))
    others = dict(zip(layouts, te_ranks(*(build_job("local", *settings, nproc=nproc)
                                          for nproc, settings in layouts.values())), strict=True))
    if layouts == FURTHER:
        te_ranks(build_job("te", *TP2, nproc=2, is_reference=True))
        others["local, from the checkpoint of te"], = ranks(build_job("te"))
    assert local["scratch"][0]["loss"] > local["scratch"][-1]["loss"]
    problems = [problem for name, per_rank in others.items()
                for problem in compare_runs(name, per_rank, local)[1]]
    assert not problems


@pytest.mark.distributed
@pytest.mark.parametrize(("recipe", "settings"), [
    ("tiny-k-exaone", EXAONE),
    pytest.param("tiny-deepseek-v3", ["model.num_layers=2", "model.num_dense_layers=1"],
                 marks=pytest.mark.deep),
    pytest.param("tiny-solar-open", SOLAR, marks=pytest.mark.deep),
    pytest.param("tiny-qwen2", ["model.num_layers=2"], marks=pytest.mark.deep)])
def test_every_gradient_and_every_name(ranks: Any, te_ranks: Any, job: Any, packed_data: Any, tmp_path: Path,
                                       recipe: str, settings: list[str]) -> None:
    """Compare the gradient and the name of every weight; tiny-qwen2 has biases and no experts."""
    arguments = {"recipe": recipe, "paths": [str(packed_data.text)], "objective": "lm"}
    losses = []
    for kind, run, nproc, layout in (("local", ranks, 1, []), ("te", te_ranks, 2, TP2)):
        out = str(tmp_path / kind)
        losses.append(run(job(LAYOUT_RUN, "compute_first_batch", nproc, {
            **arguments, "settings": [*FP64, *settings, *layout], "out": out}))[0][0]["loss"])
    assert compute_difference(*losses) < 1e-12
    for part in ("weights", "gradients"):
        local, te = (TensorReader(tmp_path / kind / part, "model") for kind in ("local", "te"))
        keys = list(local.keys())
        assert sorted(te.keys()) == sorted(keys)
        differences = {key: compute_difference(te.read(key).numpy(), local.read(key).numpy()) for key in keys}
        assert max(differences.values()) < 1e-12, differences
