"""Every recommended layout, as far as one process has it, in bf16 and each recipe of low precision: what is
computed again has the bits of what was kept."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.model import recipes
from megatron_sov.model.config import RunConfig, apply_settings
from megatron_sov.model.config.gpu import AUTO, RECIPES
from megatron_sov.plan.search.recommended import RECOMMENDED

RUN = str(Path(__file__).with_name("quantized_run.py"))
TINY = {"solar_open": "tiny-solar-open", "solar_open2": "tiny-solar-open2", "exaone_moe": "tiny-k-exaone",
        "qwen2": "tiny-qwen2", "qwen3": "tiny-qwen3", "qwen3_moe": "tiny-qwen3-moe"}
"""Family -> recipe that stands for its large ones."""
FIRST = {"tiny-solar-open": ("mxfp8",), "tiny-k-exaone": ("none", "mxfp8"), "tiny-solar-open2": ("none",)}
"""Recipe -> precisions in `make test`.  All other pairs are deep."""
QUICK = ("model.num_layers=2", "train.global_batch_size=1")
SELECTIVE = ("train.recompute=selective", 'gpu.recompute_modules=["layernorm", "moe_act"]')
OVERLAPPED = ("parallel.zero1=true", "parallel.overlap_grad_reduce=true",
              "parallel.overlap_param_gather=true")


def _written(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else value


def _of_one_process(config: RunConfig) -> tuple[str, ...]:
    """Return the settings of a run that one process has, too; which attention serves rows that are cut is
    none of them."""
    gpu = [f"gpu.{f.name}={_written(getattr(config.gpu, f.name))}" for f in fields(config.gpu)
           if f.name != "attention" and getattr(config.gpu, f.name) != getattr(AUTO, f.name)]
    parallel = [f"parallel.{name}={_written(getattr(config.parallel, name))}"
                for name in ("zero1", "overlap_grad_reduce", "overlap_param_gather")]
    return (f"train.recompute={_written(config.train.recompute)}", *gpu, *parallel)


def layouts_of_one_process() -> dict[str, set[tuple[str, ...]]]:
    """Return tiny recipe -> settings that differ among its recommended layouts."""
    found: dict[str, set[tuple[str, ...]]] = {}
    for name, by_gpu in RECOMMENDED.items():
        config = recipes.get(name)
        for layout in {layout for layouts in by_gpu.values() for layout in layouts}:
            found.setdefault(TINY[config.model.family], set()).add(
                _of_one_process(apply_settings(config, list(layout))))
    return found


LAYOUTS = layouts_of_one_process()


def _stored(settings: tuple[str, ...]) -> tuple[str, ...]:
    """Return the settings without recomputation."""
    kept = [s for s in settings if not s.startswith(("train.recompute", "gpu.recompute_modules"))]
    return (*kept, "train.recompute=false")


def _compared(te_ranks: Any, job: Any, path: Path, cases: list[tuple[str, tuple[str, ...]]]) -> None:
    """Hold each case against the same without recomputation."""
    wanted = list(dict.fromkeys([*cases, *((recipe, _stored(settings)) for recipe, settings in cases)]))
    (found,), = te_ranks(job(RUN, "each", 1, {"cases": [(recipe, [*QUICK, *settings])
                                                        for recipe, settings in wanted], "path": str(path)}))
    results = dict(zip(wanted, found, strict=True))
    for recipe, settings in cases:
        ours, kept = results[recipe, settings], results[recipe, _stored(settings)]
        assert (ours["loss"], ours["weights"]) == (kept["loss"], kept["weights"]), (recipe, settings)
        more = sum(ours["products"].values()) > sum(kept["products"].values())
        assert (more or ours["again"] > 0) == ("train.recompute=false" not in settings), (recipe, settings)
        assert not kept["again"]


@pytest.mark.distributed
@pytest.mark.parametrize(("recipe", "precisions"), [
    *FIRST.items(),
    *(pytest.param(recipe, tuple(name for name in ("none", *RECIPES) if name not in FIRST.get(recipe, ())),
                   marks=pytest.mark.deep) for recipe in sorted(LAYOUTS))])
def test_every_recommended_layout_in_every_precision(te_ranks: Any, job: Any, packed_data: Any,
                                                     recipe: str, precisions: tuple[str, ...]) -> None:
    _compared(te_ranks, job, packed_data.text, [
        (recipe, (*settings, f"train.fp8={fp8}")) for settings in sorted(LAYOUTS[recipe])
        for fp8 in precisions])


@pytest.mark.distributed
@pytest.mark.parametrize("cases", [
    [("tiny-solar-open", (*SELECTIVE, "train.fp8=mxfp8", *more)) for more in (
        ("train.fp8_pad_routed_tokens=true", *OVERLAPPED, "gpu.router_fusion=on"),
        ("gpu.grad_dtype=bf16", "parallel.expert_dispatcher=allgather"))],
    pytest.param([
        ("tiny-solar-open", (*SELECTIVE, "train.fp8=mxfp8", "gpu.shared_expert_overlap=on")),
        *(("tiny-qwen3-moe", (*SELECTIVE, f"train.fp8={name}")) for name in ("none", *RECIPES))],
        marks=pytest.mark.deep)], ids=["mxfp8", "every precision"])
def test_selective_recomputation_beside_other_settings(te_ranks: Any, job: Any, packed_data: Any, cases: Any
                                                       ) -> None:
    _compared(te_ranks, job, packed_data.text, cases)


@pytest.mark.distributed
def test_shared_experts_beside_the_messages_of_the_routed_ones(te_ranks: Any, job: Any,
                                                               packed_data: Any) -> None:
    """They are added in another order."""
    (found,), = te_ranks(job(RUN, "each", 1, {"path": str(packed_data.text), "cases": [
        ("tiny-solar-open", [*QUICK, *SELECTIVE, "train.precision=fp64",
                             f"gpu.shared_expert_overlap={switch}"])
        for switch in ("off", "on")]}))
    apart, beside = (case["loss"] for case in found)
    assert apart == pytest.approx(beside, rel=1e-12)
    assert all(case["again"] for case in found)
