"""Selective recomputation and overlapped shared experts, in bf16 and each FP8 recipe: recomputed activations
have the bits of stored ones."""

from pathlib import Path
from typing import Any

import pytest

from megatron_sov.model.config.gpu import RECIPES

RUN = str(Path(__file__).with_name("quantized_run.py"))
QUICK = ("model.num_layers=2", "train.global_batch_size=1")
SELECTIVE = ("train.recompute=selective", 'gpu.recompute_modules=["layernorm", "moe_act"]')
OVERLAPPED = ("parallel.zero1=true", "parallel.overlap_grad_reduce=true",
              "parallel.overlap_param_gather=true")


def _stored(settings: tuple[str, ...]) -> tuple[str, ...]:
    """Return the settings without recomputation."""
    kept = [s for s in settings if not s.startswith(("train.recompute", "gpu.recompute_modules"))]
    return (*kept, "train.recompute=false")


def _compared(te_ranks: Any, job: Any, path: Path, cases: list[tuple[str, tuple[str, ...]]]) -> None:
    """Compare each case with the same case without recomputation."""
    wanted = list(dict.fromkeys([*cases, *((recipe, _stored(settings)) for recipe, settings in cases)]))
    (found,), = te_ranks(job(RUN, "train_cases", 1, {"cases": [(recipe, [*QUICK, *settings])
                                                        for recipe, settings in wanted], "path": str(path)}))
    results = dict(zip(wanted, found, strict=True))
    for recipe, settings in cases:
        ours, kept = results[recipe, settings], results[recipe, _stored(settings)]
        assert (ours["loss"], ours["weights"]) == (kept["loss"], kept["weights"]), (recipe, settings)
        more = sum(ours["products"].values()) > sum(kept["products"].values())
        assert (more or ours["again"] > 0) == ("train.recompute=false" not in settings), (recipe, settings)
        assert not kept["again"]


@pytest.mark.deep
@pytest.mark.distributed
@pytest.mark.parametrize("cases", [
    [("tiny-solar-open", (*SELECTIVE, "train.fp8=mxfp8", *more)) for more in (
        ("train.fp8_pad_routed_tokens=true", *OVERLAPPED, "gpu.router_fusion=on"),
        ("gpu.grad_dtype=bf16", "parallel.expert_dispatcher=allgather"))],
    pytest.param([
        ("tiny-solar-open", (*SELECTIVE, "train.fp8=mxfp8", "gpu.shared_expert_overlap=on")),
        *(("tiny-qwen3-moe", (*SELECTIVE, f"train.fp8={name}")) for name in ("none", *RECIPES))])],
    ids=["mxfp8", "every precision"])
def test_selective_recomputation_with_other_settings(te_ranks: Any, job: Any, packed_data: Any,
                                                     cases: Any) -> None:
    _compared(te_ranks, job, packed_data.text, cases)


@pytest.mark.distributed
def test_overlapped_shared_experts_equal_sequential_ones(te_ranks: Any, job: Any, packed_data: Any) -> None:
    """Shared experts' outputs are added in another order."""
    (found,), = te_ranks(job(RUN, "train_cases", 1, {"path": str(packed_data.text), "cases": [
        ("tiny-solar-open", [*QUICK, *SELECTIVE, "train.precision=fp64",
                             f"gpu.shared_expert_overlap={switch}"])
        for switch in ("off", "on")]}))
    apart, beside = (case["loss"] for case in found)
    assert apart == pytest.approx(beside, rel=1e-12)
    assert all(case["again"] for case in found)
