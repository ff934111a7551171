"""Selective recomputation gives the same bits as stored activations, in bf16 and each FP8 recipe; overlapped
shared experts give the same loss as sequential ones."""

from pathlib import Path
from typing import Any

import pytest

from megatron_sov.model.config.gpu import RECIPES

RUN = str(Path(__file__).with_name("quantized_run.py"))
QUICK = ("model.num_layers=2", "train.global_batch_size=1")
SELECTIVE = ("train.recompute=selective", 'gpu.recompute_modules=["layernorm", "moe_act"]')
OVERLAPPED = ("parallel.zero1=true", "parallel.overlap_grad_reduce=true",
              "parallel.overlap_param_gather=true")


def store_activations(settings: tuple[str, ...]) -> tuple[str, ...]:
    """Return the settings without recomputation."""
    others = [s for s in settings if not s.startswith(("train.recompute", "gpu.recompute_modules"))]
    return (*others, "train.recompute=false")


def check_cases(te_ranks: Any, job: Any, path: Path, cases: list[tuple[str, tuple[str, ...]]]) -> None:
    """Assert that each case recomputes and gives bit-identical loss and weights without recomputation."""
    references = [(recipe, store_activations(settings)) for recipe, settings in cases]
    unique = list(dict.fromkeys([*cases, *references]))
    arguments = {"cases": [(recipe, [*QUICK, *settings]) for recipe, settings in unique], "path": str(path)}
    (outcomes,), = te_ranks(job(RUN, "train_cases", 1, arguments))
    results = dict(zip(unique, outcomes, strict=True))
    for case, reference in zip(cases, references, strict=True):
        recomputed, stored = results[case], results[reference]
        assert (recomputed["loss"], recomputed["weights"]) == (stored["loss"], stored["weights"]), case
        has_more_products = sum(recomputed["products"].values()) > sum(stored["products"].values())
        does_recompute = has_more_products or recomputed["again"] > 0
        assert does_recompute == ("train.recompute=false" not in case[1]), case
        assert not stored["again"]


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
    check_cases(te_ranks, job, packed_data.text, cases)


@pytest.mark.distributed
def test_overlapped_shared_experts_equal_sequential_ones(te_ranks: Any, job: Any, packed_data: Any) -> None:
    """Up to rounding: the outputs of shared experts are added in another order."""
    (results,), = te_ranks(job(RUN, "train_cases", 1, {"path": str(packed_data.text), "cases": [
        ("tiny-solar-open", [*QUICK, *SELECTIVE, "train.precision=fp64",
                             f"gpu.shared_expert_overlap={switch}"])
        for switch in ("off", "on")]}))
    sequential, overlapped = (result["loss"] for result in results)
    assert sequential == pytest.approx(overlapped, rel=1e-12)
    assert all(result["again"] for result in results), "no activations were recomputed"
