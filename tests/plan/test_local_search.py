"""The layout that a plan finds by default: as fast as a sweep's, with spare memory, within user settings."""

import dataclasses

import pytest

from megatron_sov import recipes
from megatron_sov.model.config import apply_settings
from megatron_sov.model.recipes.requested import RecipeRequest
from megatron_sov.plan.footprint.gpu_capacity import find_fullest_stage
from megatron_sov.plan.pricing import list_run_stages, load_machines
from megatron_sov.plan.search.local_search import SPARE_SHARE, LocalSearch, find_layout, leaves_layout_open
from megatron_sov.plan.search.recommended_layouts import GRAPHS
from megatron_sov.plan.search.sweep import search_layouts
from tests.plan.test_quotes import get_pricing


@pytest.mark.deep
@pytest.mark.parametrize(("recipe", "gpu", "settings"), [
    ("qwen3-8b", "h100", ()), ("qwen3-8b", "b200", ("train.fp8=mxfp8",)), ("llama-3.1-8b", "h200", ()),
    ("qwen3-4b", "h100", ("train.global_batch_size=48",)), ("vibethinker-1.5b", "h100", ()),
    ("gemma-3-1b", "a100", ()), ("tiny-solar-open", "h100", ()), ("tiny-qwen3-moe", "b200", ())])
def test_default_layout_is_as_fast_as_a_sweep_with_spare_memory(recipe: str, gpu: str,
                                                                settings: tuple[str, ...]) -> None:
    config, where = apply_settings(recipes.get(recipe), list(settings)), load_machines(gpu, 1)
    prices, found = get_pricing(where), find_layout(config, where, settings)
    assert found is not None
    swept = search_layouts(LocalSearch(config, prices, settings).config, prices)
    roomy = [result for result in swept.best
             if result.needs_bytes <= (1 - SPARE_SHARE) * prices.limit_bytes]
    fastest = (roomy or swept.best)[0]
    slow_seconds = sum(result.slow_step_s * sweep.stage.steps
                       for result, sweep in zip(fastest.results, swept.sweeps, strict=True))
    assert found.slow_seconds <= 1.05 * slow_seconds
    assert found.num_priced < swept.num_looked_at
    chosen = apply_settings(config, list(found.settings))
    needs = find_fullest_stage(chosen, where.num_ranks)[1].total
    assert not chosen.problems(where.num_ranks)
    assert needs <= (1 - SPARE_SHARE if roomy else 1) * prices.limit_bytes
    assert len({setting.partition("=")[0] for setting in found.settings}) == len(found.settings)
    assert find_layout(config, where, settings) == found


@pytest.mark.deep
def test_a_recipe_whose_own_layout_needs_more_processes_gets_one() -> None:
    result = find_layout(recipes.get("k-exaone2-750b-extend"), load_machines("h200", 16))
    assert result is not None and result.own_spare_share < 0 and "own does not fit" in result.format_line()


@pytest.mark.deep
@pytest.mark.parametrize("settings", [
    ("parallel.expert_dispatcher=alltoall",), ("train.fp8=none",), ("gpu.attention=local",)])
def test_kernels_that_the_user_chose_stay(settings: tuple[str, ...]) -> None:
    config = apply_settings(recipes.get("qwen3-moe-30b"), list(settings))
    result = find_layout(config, load_machines("h100", 2), settings)
    assert result is not None
    assert apply_settings(apply_settings(config, list(result.settings)), list(settings)) == apply_settings(
        config, list(result.settings))


@pytest.mark.deep
@pytest.mark.parametrize("num_nodes", [4, 64])
def test_a_model_that_fills_the_gpus_gets_the_fastest_layout_that_fits(num_nodes: int) -> None:
    """The search prices CUDA graphs with their memory: they pay on 512 H100, not on 32."""
    config = apply_settings(recipes.get("solar-open-102b"), ["parallel.expert_dispatcher=alltoall"])
    where = load_machines("h100", num_nodes)
    profile = dataclasses.replace(where.profile, cuda_graphs=("moe_router",))
    result = find_layout(config, dataclasses.replace(where, profile=profile))
    prices = get_pricing(where)
    if result is None:
        assert not search_layouts(config, prices).best
    else:
        chosen = apply_settings(config, list(result.settings))
        assert find_fullest_stage(chosen, where.num_ranks)[1].total <= prices.limit_bytes
        assert (GRAPHS in result.settings) == (num_nodes == 64) and result.spare_share >= SPARE_SHARE
        eager = find_layout(config, where)
        assert eager is not None and result.slow_seconds <= eager.slow_seconds


@pytest.mark.deep
def test_layouts_are_chosen_for_a_slow_host() -> None:
    """The layout that is fastest with the fitted host waits for a slow host during each step."""
    where = load_machines("h100", 64)
    prices, result = get_pricing(where), find_layout(recipes.get("solar-open-102b"), where)
    fast = ["train.micro_batch_size=1", 'gpu.recompute_modules=["layernorm", "moe_act"]',
            "gpu.expert_spill=1.2"]
    assert result is not None
    chosen = apply_settings(recipes.get("solar-open-102b"), list(result.settings))
    chosen_stage, fast_stage = (list_run_stages(apply_settings(chosen, changes), where.num_ranks)[0]
                                for changes in ([], fast))
    assert prices.time_step(fast_stage).total_s < prices.time_step(chosen_stage).total_s
    assert prices.time_slow_host(chosen_stage).total_s < 0.9 * prices.time_slow_host(fast_stage).total_s


@pytest.mark.each(("recipe", "cluster"), [("qwen3-8b", "local"), ("vibethinker-1.5b-code", "h100")])
def test_unknown_gpus_and_rounds_have_no_search(recipe: str, cluster: str) -> None:
    assert find_layout(recipes.get(recipe), load_machines(cluster, 1)) is None


def test_rounds_get_a_layout_that_keeps_all_rules() -> None:
    config, where = recipes.get("tiny-typhoon-s-opd"), load_machines("h100", 1)
    result = find_layout(config, where)
    assert config.problems(where.num_ranks) and result is not None
    assert not apply_settings(config, list(result.settings)).problems(where.num_ranks)


@pytest.mark.each(("recipe", "settings", "from_file", "layout", "is_open"), [
    ("solar-open-102b", (), False, {}, True), ("qwen3-8b", (), False, {}, True),
    ("solar-open-102b", ("parallel.expert_dispatcher=alltoall",), False, {}, True),
    ("solar-open-102b", ("train.steps=5",), False, {}, True),
    ("solar-open-102b", ("parallel.ep=16",), False, {}, False),
    ("solar-open-102b", ("train.recompute=false",), False, {}, False),
    ("solar-open-102b", ("train.micro_batch_size=2",), False, {}, False),
    ("deepseek-v3", (), False, {}, True), ("mine", (), False, {}, True),
    ("mine", (), False, {"tp": 2}, False),
    ("solar-open-102b", (), True, {}, False), ("solar-open-102b", (), False, {"ep": 16}, False)])
def test_a_layout_is_open_if_the_user_set_none(recipe: str, settings: tuple[str, ...], from_file: bool,
                                               layout: dict[str, int], is_open: bool) -> None:
    if recipe == "mine":
        base = dataclasses.replace(recipes.get("qwen3-8b"), recipe="mine")
        base = dataclasses.replace(base, parallel=type(base.parallel)())
    else:
        base = recipes.get(recipe)
    base = dataclasses.replace(base, parallel=dataclasses.replace(base.parallel, **layout))
    assert leaves_layout_open(RecipeRequest(base, settings, from_file)) == is_open
