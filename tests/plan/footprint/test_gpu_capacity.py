"""Layouts that exceed a GPU's memory are refused with one that fits; recommended layouts of recipes fit."""

import dataclasses
import itertools
from typing import Any

import pytest

from megatron_sov import recipes
from megatron_sov.base.errors import UserError
from megatron_sov.model.config import ParallelConfig, RunConfig, apply_settings
from megatron_sov.model.families.count import TABLES, count_params
from megatron_sov.plan.footprint.gpu_capacity import (
    can_run, find_fullest_stage, find_imbalance_limit, find_nearest_layout, get_usable_bytes,
    list_changed_settings, refuse_too_large)
from megatron_sov.plan.footprint.stage_parameters import list_stage_parameters
from megatron_sov.plan.pricing import list_run_stages, load_machines
from megatron_sov.plan.search.local_search import get_cluster_recommendation
from megatron_sov.plan.search.recommended_layouts import GRAPHS, RECOMMENDED, find_recommended, sets_layout
from megatron_sov.work.clusters.chips import CHIPS, Gpu
from megatron_sov.work.clusters.units import GIB
from tests.plan.stage_counts import count_stage_params
from tests.plan.test_quotes import get_pricing

LARGE = [name for name in RECOMMENDED if count_params(recipes.get(name).model).total > 1e11]
"""Recipes of more than 100 B parameters."""
SIZES = (512, 1024)
"""Numbers of GPUs for them."""


def test_an_oversized_run_is_refused_with_the_nearest_fitting_layout() -> None:
    """33.7 GiB of weights and 67.4 GiB of gradients on each of 480 processes exceed an H100."""
    solar = apply_settings(recipes.get("solar-open-102b"), ["train.fp8=none"])
    with pytest.raises(UserError, match=r"^solar-open-102b on 480 processes: ep 8, ZeRO-1 "
                       r"needs 111\.3 GiB on each process \(weights 33\.7, gradients 67\.4, "
                       r".*75\.0 GiB of a H100-80GB with 79\.0 GiB; the nearest layout that "
                       r"fits: --set parallel\.pp=2$"):
        refuse_too_large(solar, 480, CHIPS["h100"])
    refuse_too_large(solar, 480, CHIPS["h200"])
    with pytest.raises(UserError, match="no layout fits so many processes: use more GPUs"):
        refuse_too_large(solar, 16, CHIPS["h100"])


def test_the_nearest_layout_is_the_one_with_fewest_doublings() -> None:
    """By brute force over changeable settings, on a GPU that is too small for the recipe's layout."""
    config, gpu = recipes.get("k-exaone-236b"), CHIPS["h100"]
    result = find_nearest_layout(config, 512, gpu)
    assert result is not None and list_changed_settings(config.parallel, result) == ["parallel.pp=4"]
    for change in ({"pp": 2}, {"ep": 32}, {"ep": 8}, {"tp": 2, "sp": True}, {"ep": 8, "pp": 2}, {"ep": 64},
                   {"pp": 2, "ep": 32}):
        other = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, **change))
        if not can_run(other, 512, get_usable_bytes(gpu)):
            continue
        _, account = find_fullest_stage(other, 512)
        _, nearest_account = find_fullest_stage(dataclasses.replace(config, parallel=result), 512)
        assert account.total > nearest_account.total, change


def test_nearest_layout_keeps_or_replaces_an_uneven_pipeline() -> None:
    """Changing the number of experts per process is one step, and so is a change to equal stages."""
    def solar(layers: str) -> RunConfig:
        return apply_settings(recipes.get("solar-open-102b"), [
            "parallel.pp=4", f"parallel.pipeline_layout={layers}", "parallel.ep=4", "train.fp8=none"])

    for layers, gib, changed in (("[11,13,13,11]", 60, []), ("[11,13,13,11]", 46, ["parallel.ep=8"]),
                                 ("[1,1,1,45]", 66, ["parallel.pipeline_layout=[]"])):
        config = solar(layers)
        result = find_nearest_layout(config, 512, Gpu("one", gib * GIB))
        assert result is not None and list_changed_settings(config.parallel, result) == changed, layers
        assert apply_settings(config, changed).parallel == result
    with pytest.raises(UserError, match=r"that fits: --set 'parallel\.pipeline_layout=\[\]'"):
        refuse_too_large(solar("[1,1,1,45]"), 512, Gpu("one", 66 * GIB))


@pytest.mark.parametrize("recipe", list(RECOMMENDED))
def test_every_recommended_layout_is_valid_and_fits(recipe: str) -> None:
    """Large recipes are tested at both sizes; other recipes on one and on eight nodes."""
    config = recipes.get(recipe)
    for gpu in RECOMMENDED[recipe]:
        for num_ranks in SIZES if recipe in LARGE else (8, 64):
            layout = find_recommended(config, num_ranks, gpu)
            assert layout is not None, (gpu, num_ranks)
            assert sets_layout(layout) or layout in ((), ("gpu.attention=fused",))
            run = apply_settings(config, list(layout))
            assert not run.problems(num_ranks)
            refuse_too_large(run, num_ranks, CHIPS[gpu])


@pytest.mark.each(("settings", "has_graphs"), [
    ([], True), (["gpu.cuda_graphs=[]"], False), (["train.recompute=true"], False)])
def test_recommended_layouts_have_router_graphs_if_valid(settings: list[str], has_graphs: bool) -> None:
    config = apply_settings(recipes.get("solar-open-102b"), settings)
    layout = find_recommended(config, 480, "b200", settings)
    assert layout and (GRAPHS in layout) == has_graphs


def test_a_layout_without_memory_for_uneven_experts_is_refused_unless_allowed() -> None:
    """K-EXAONE's layout of 512 H100 runs out of memory at 1.7 times the mean tokens on an expert process."""
    config, gpu = recipes.get("k-exaone-236b"), CHIPS["h100"]
    *layout, spill = find_recommended(config, 512, "h100", ["gpu.cuda_graphs=[]"]) or ()
    assert spill == "gpu.expert_spill=1.2"
    config = apply_settings(config, layout)
    limit = find_imbalance_limit(config, 512, gpu)
    loads = [1 + 0.05 * step for step in range(301)]
    fitting = [load for load in loads if can_run(
        apply_settings(config, [f"gpu.expert_imbalance={load}"]), 512, get_usable_bytes(gpu))]
    assert fitting == loads[:len(fitting)] and limit == pytest.approx(fitting[-1]) and 1.6 < limit < 1.7
    with pytest.raises(UserError, match=rf"on each process of pipeline stage 1 at gpu\.expert_imbalance = 2, "
                       rf"up to {limit} fits .*; it fits with: --set gpu\.expert_spill=1\.2$"):
        refuse_too_large(config, 512, gpu)
    refuse_too_large(apply_settings(config, [f"gpu.expert_imbalance={limit}"]), 512, gpu)
    refuse_too_large(apply_settings(config, [spill]), 512, gpu)
    assert find_imbalance_limit(apply_settings(config, [spill]), 512, gpu) > 8


@pytest.mark.parametrize(("recipe", "gpu", "nodes", "share"), [
    ("solar-open-102b", "b200", 60, 0.36), ("k-exaone-236b", "h100", 64, 0.40)])
def test_recommended_layouts_hide_messages_and_reach_their_share_of_the_peak(recipe: str, gpu: str,
                                                                             nodes: int,
                                                                             share: float) -> None:
    """With the default account; without HybridEP a layout without it is recommended."""
    where = load_machines(gpu, nodes)
    prices = get_pricing(where)
    reached = []
    for settings, dispatcher in (([], "hybridep"), (["parallel.expert_dispatcher=alltoall"], "alltoall")):
        config = apply_settings(recipes.get(recipe), settings)
        run = apply_settings(config, [*(find_recommended(config, where.num_ranks, gpu, settings) or ())])
        assert run.parallel.expert_overlap == "micro_batches"
        assert run.train.fp8 == ("mxfp8" if gpu == "b200" else "blockwise"), "Blackwell emulates blockwise"
        assert run.parallel.expert_dispatcher == dispatcher
        reached.append(prices.time_step(list_run_stages(run, where.num_ranks, micro_batch_set=True)[0]).mfu)
    assert reached[0] > share > reached[1]


def test_a_profile_decides_about_hybridep_and_graphs() -> None:
    config, where = recipes.get("k-exaone-236b"), load_machines("h100", 64)
    hybrid, graphed, plain = (get_cluster_recommendation(config, dataclasses.replace(
        where, profile=dataclasses.replace(where.profile, **fields)), ()) for fields in (
            {"dispatchers": ("alltoall", "hybridep")}, {"cuda_graphs": ("moe_router",)}, {}))
    assert "parallel.expert_dispatcher=hybridep" in hybrid and GRAPHS not in hybrid
    assert GRAPHS in graphed and plain == tuple(setting for setting in graphed if setting != GRAPHS)
    assert not any(setting.startswith("parallel.expert_dispatcher") for setting in plain)


def test_user_settings_stay_under_a_recommended_layout() -> None:
    config = recipes.get("solar-open-102b-mid")
    assert "gpu.attention=fused" in (find_recommended(config, 480, "b200") or ())
    settings = ["gpu.attention=local"]
    own = find_recommended(apply_settings(config, settings), 480, "b200", settings)
    assert own and not any(setting.startswith("gpu.attention") for setting in own)


def test_a_recipe_without_recommendations_keeps_its_layout() -> None:
    tiny = recipes.get("tiny-solar-open")
    assert find_recommended(tiny, 8, "h100") == find_recommended(tiny, 8, "") is None
    assert can_run(tiny, 1, 1 * GIB)


def list_large_runs(every: bool) -> list[tuple[RunConfig, list[tuple[int, int]]]]:
    """Return runs of large recipes, each with the pairs (number of processes, stage) to build.

    Args:
        every: Take all recommended layouts instead of every fourth.

    Returns:
        A run per model family and layout, with one stage of each kind; the stages take turns in `SIZES`.
    """
    sizes: dict[tuple[str, str], list[int]] = {}
    runs: dict[tuple[str, str], RunConfig] = {}
    for name in LARGE:
        config = recipes.get(name)
        for gpu, num_ranks in itertools.product(RECOMMENDED[name], SIZES):
            layout = find_recommended(config, num_ranks, gpu)
            assert layout is not None
            run = apply_settings(config, list(layout))
            key = (config.model.family, str(run.parallel))
            runs[key] = run
            sizes[key] = sorted({num_ranks, *sizes.get(key, [])})
    found = []
    for key, run in runs.items():
        stages = sorted({get_stage_kind(run, stage): stage
                         for stage in reversed(range(run.parallel.pp))}.values())
        found.append((run, [(n, stage) for i, n in enumerate(sizes[key])
                            for stage in stages[i::len(sizes[key])] or stages]))
    chosen = found if every else found[1::4]
    assert chosen
    return chosen


def get_stage_kind(run: RunConfig, stage: int) -> tuple[int, int, bool, bool]:
    """Return what determines a stage's size: layers, layers with linear attention, whether first or last."""
    layers = run.parallel.stage_layers(stage, run.model.num_layers)
    types = run.model.layer_types()
    num_linear = sum(types[layer] == "linear_attention" for layer in layers)
    return len(layers), num_linear, stage == 0, stage == run.parallel.pp - 1


def measure_stages(large: bool, every: bool) -> list[list[Any]]:
    """Build the stages of `list_large_runs(every)` or of `SMALL_RUNS` on meta tensors; return the parameters
    ("params" of a process, "whole" of the unsharded stage) of each stage."""
    from tests.meta_memory import count_stage_parameters

    return [[dataclasses.asdict(count_stage_parameters(run, num_ranks, stage)) for num_ranks, stage in places]
            for run, places in (list_large_runs(every) if large else SMALL_RUNS)]


SMALL_RUNS = [(dataclasses.replace(recipes.get(name), parallel=layout), [(8, i) for i in range(layout.pp)])
              for name, layout in (
    ("tiny-k-exaone", ParallelConfig(pp=2, vpp=2, tp=2, sp=True, ep=2, etp=2)),
    ("tiny-qwen2", ParallelConfig(tp=2, sp=True, pp=2)), ("tiny-qwen2", ParallelConfig()),
    ("tiny-qwen3-moe", ParallelConfig(ep=4, pp=2)))]


@pytest.mark.distributed
@pytest.mark.deep
@pytest.mark.parametrize("every", [False, True], ids=["some", "every"])
def test_full_size_modules_match_the_account(ranks: Any, job: Any, every: bool) -> None:
    """Compares Megatron-Core's modules in a fake group of all ranks with formulas and the unsharded model."""
    (large,), (small,) = ranks(*(job(__file__, "measure_stages", 1, {"large": is_large, "every": every})
                                 for is_large in (True, False)))
    for (run, places), stages in zip([*list_large_runs(every), *SMALL_RUNS], [*large, *small], strict=True):
        predicted, p, count = count_stage_params(run), run.parallel, count_params(run.model)
        assert [measured["params"] for measured in stages] == [
            dataclasses.asdict(predicted[stage]) for _, stage in places], p
        whole = {get_stage_kind(run, stage): measured["whole"]
                 for (_, stage), measured in zip(places, stages, strict=True)}
        # later stages with embedding, head or prediction layer have copies of the first stage's table
        tables = sum(part.key in TABLES for stage in range(p.pp) for runs in list_stage_parameters(run, stage)
                     for _, parts in runs for part in parts) - 2 + run.model.tied_embeddings
        copies = tables * run.model.vocab_size * run.model.hidden_size
        assert sum(whole[get_stage_kind(run, stage)] for stage in range(p.pp)) == (
            count.total + count.mtp + copies), p
