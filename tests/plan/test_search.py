"""Searches of layouts: their space, results and report, uneven pipelines, and the fewest nodes that fit."""

import dataclasses
import itertools
import math
import random
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from megatron_sov import recipes
from megatron_sov.base.settings import ProblemCode, SettingsProblem
from megatron_sov.commands.operate.submit.stage_parsers import STAGE_PARSERS
from megatron_sov.model.config import ParallelConfig, apply_settings
from megatron_sov.operate.slurm.stages import build_stage_work
from megatron_sov.plan.pages.layout_report import (
    MAX_RULES, SweepReport, describe_broken_rules, describe_too_large, format_layout, format_set_options,
    format_submit_command)
from megatron_sov.plan.pricing import Pricing, RunStage, list_run_stages, load_machines
from megatron_sov.plan.search.space import (
    LEAST_GAIN, LayoutChoice, LayoutSpace, build_space, find_uneven_split, get_current_choice, iter_choices,
    iter_layouts)
from megatron_sov.plan.search.sweep import (
    Sweep, SweepResult, SweepSearch, find_common_layouts, find_fewest_nodes, format_node_advice,
    has_fitting_layout, search_layouts, sweep_stage)
from megatron_sov.work.clusters.units import GIB
from tests.plan.test_quotes import get_pricing


@pytest.mark.each(("nodes", "message"), [
    (6, "the fewest nodes that it fits are 6: --nodes 6"), (48, "48 nodes are enough: --nodes 48"),
    (None, "no number of nodes up to 4,096 is enough")])
def test_nodes_in_words(nodes: int | None, message: str) -> None:
    assert format_node_advice(nodes).startswith(message)


@pytest.mark.deep
def test_fewest_nodes_are_minimal() -> None:
    config = recipes.get("k-exaone-236b")
    assert find_fewest_nodes(config, get_pricing(load_machines("h100", 2))) == 8
    assert has_fitting_layout(config, get_pricing(load_machines("h100", 8)))
    assert not has_fitting_layout(config, get_pricing(load_machines("h100", 2)))
    in_bf16 = apply_settings(config, ["train.fp8=none"])  # without quantized copies of weights
    assert find_fewest_nodes(in_bf16, get_pricing(load_machines("h100", 2))) == 6


# The command that a plan proposes is accepted by `submit`.

@pytest.mark.each(("recipe", "stage"), [
    ("tiny-solar-open", "pretrain"), ("tiny-k-exaone-extend", "extend"), ("tiny-typhoon-s", "sft"),
    ("tiny-solar-open-dpo", "prefer"), ("tiny-typhoon-s-opd", "rl-run"),
    ("tiny-solar-open-rl", "rl-train")])
def test_submit_accepts_the_proposed_command_of_every_objective(recipe: str, stage: str) -> None:
    config = apply_settings(recipes.get(recipe), ["parallel.tp=2"])
    line = format_submit_command(config, load_machines("b200", 2), [recipe], [
                                 "parallel.tp=2", "parallel.sp=true"])
    program, command, submitted_stage, *words = shlex.split(line)
    assert (program, command, submitted_stage) == ("megatron-sov", "submit", stage)
    assert words[:6] == ["--cluster", "b200", "--nodes", "2", "--account", "ACCOUNT"]
    work = build_stage_work(stage, words[6:], STAGE_PARSERS)
    assert work.config is not None and work.config.parallel.tp == 2


def test_settings_are_quoted_for_a_shell() -> None:
    options = format_set_options(['gpu.recompute_modules=["moe"]', "parallel.tp=2"])
    assert shlex.split(options) == ["--set", 'gpu.recompute_modules=["moe"]', "--set", "parallel.tp=2"]
    assert format_set_options([]) == ""


# The report of a search.

CONFIG = recipes.get("qwen3-8b")
PLAIN = LayoutChoice(ParallelConfig(zero1=True), 1, (False, ()))
STAGE = list_run_stages(CONFIG, 8)[0]


def build_report(*layouts: tuple[LayoutChoice, int, float]) -> SweepReport:
    """Return the report of a single-stage search with (layout, bytes, seconds per step) results."""
    sweep = Sweep(STAGE, num_looked_at=9,
                  ranked=[SweepResult(choice, needs, {"dense": s}, s, 2 * s, 2.1 * s)
                          for choice, needs, s in layouts])
    search = SweepSearch(CONFIG, [sweep], ["pretrain"], find_common_layouts([sweep]))
    return SweepReport(search, load_machines("h100", 1), [], "megatron-sov submit")


def test_speed_in_table_and_json_follows_from_the_step_time() -> None:
    report = build_report((PLAIN, 60 * GIB, 2.0))
    assert report.list_lines() == ["looked at 9 layouts on 8 GPUs: 1 fit"]
    (sweep,) = report.search.sweeps
    tokens = sweep.stage.global_batch_size * sweep.stage.phase.seq_len
    assert report.compute_token_rate(sweep, sweep.ranked[0]) == tokens / 2.0 / 8
    json_report = report.to_json()
    assert json_report["kinds"][0]["fastest"][0]["tokens_per_s_per_gpu"] == tokens / 16
    assert json_report["best"][0]["seconds"] == 2.0 * sweep.stage.steps
    assert f"{tokens / 16:,.0f}" in report.build_table().rows[0]


# Layouts in words, and reasons for excluding others.

def change_layout(**changes: int) -> LayoutChoice:
    """Return `PLAIN` with changed sizes of parallelism."""
    return replace(PLAIN, parallel=replace(PLAIN.parallel, **changes))


def test_a_layout_in_words() -> None:
    assert PLAIN.parallel.format_sizes() == "data parallel alone, ZeRO-1"
    assert change_layout(tp=4, pp=2).parallel.format_sizes() == "tp 4, pp 2, ZeRO-1"
    assert format_layout(PLAIN) == "data parallel alone, ZeRO-1, micro-batch 1, recomputes nothing"
    recomputed = LayoutChoice(ParallelConfig(tp=2), 4, (True, ()))
    assert format_layout(recomputed) == "tp 2, micro-batch 4, recomputes layers"
    uneven = ParallelConfig(pp=2, vpp=2, zero1=True, pipeline_layout=(3, 3, 3, 1))
    assert format_layout(LayoutChoice(uneven, 1, (False, ()))).startswith(
        "pp 2, vpp 2, ZeRO-1, 4 layers on the last stage, micro-")
    assert format_layout(replace(PLAIN, recompute=("selective", ("moe", "layernorm")))).endswith(
        "recomputes moe + layernorm")


def test_a_failed_search_names_the_nearest_layout() -> None:
    sweep = Sweep(STAGE)
    assert describe_too_large(sweep) == []
    sweep.record_too_large(change_layout(tp=2), 3 * GIB)
    sweep.record_too_large(change_layout(tp=4), GIB)
    assert describe_too_large(sweep) == [
        "2 do not fit: the nearest lacks 1.0 GiB (tp 4, ZeRO-1, micro-batch 1, recomputes nothing)"]


def test_rare_rules_are_counted_together() -> None:
    sweep = Sweep(STAGE)
    counts = dict(zip("abcdefgh", range(80, 0, -10), strict=True))
    for letter, count in counts.items():
        sweep.record_broken(SettingsProblem(ProblemCode.RULE, "", f"rule {letter} is broken",
                                            way_out="change it"), count)
    lines = describe_broken_rules([sweep])
    assert lines[0] == "80 break a rule, as: rule a is broken"
    assert len(lines) == MAX_RULES + 1 and lines[-1] == "30 break one of 2 other rules"
    assert sweep.broken == Counter({f"rule {letter} is broken": n for letter, n in counts.items()})


# The grid contains the run's own layout, and the proposed --set values reproduce the searched layout.

@pytest.mark.each("recipe", ["solar-open-102b", "k-exaone-236b-extend", "qwen3-8b", "tiny-k-exaone"])
def test_proposed_settings_reproduce_the_layout(recipe: str) -> None:
    config = recipes.get(recipe)
    choices = list(iter_choices(config, build_space(config, 512, 8)))
    assert len(choices) == len(set(choices)) > 500
    for choice in random.Random(recipe).sample(choices, 12):
        assert apply_settings(config, choice.list_settings(config)) == choice.apply_to(config)


def test_the_grid_contains_the_layout_of_the_run() -> None:
    for recipe in ("solar-open-102b", "k-exaone-236b-extend", "qwen3-8b", "solar-open-102b-dpo"):
        config = recipes.get(recipe)
        assert get_current_choice(config) in set(iter_choices(config, build_space(config, 512, 8))), recipe
    uneven = apply_settings(recipes.get("k-exaone-236b"), [
        "parallel.pp=4", "parallel.pipeline_layout=[13,12,12,11]"])
    result = list(iter_layouts(uneven, build_space(uneven, 512, 8)))
    assert uneven.parallel in result
    assert {p.pipeline_layout for p in result if p.pp == 4} == {(), (13, 12, 12, 11)}


def test_uneven_pipelines_are_searched_if_the_last_stage_is_slower() -> None:
    config = recipes.get("k-exaone-236b")
    space = build_space(config, 512, 8, extra_layers=(3.2,))
    proposed = {p.pipeline_layout for p in iter_layouts(config, space)}
    assert (6, 6, 6, 6, 7, 7, 7, 3) in proposed and (13, 13, 13, 9) in proposed and () in proposed
    fixed = ("parallel.pipeline_layout",)
    assert {p.pipeline_layout for p in iter_layouts(
        config, build_space(config, 512, 8, fixed, (3.2,)))} == {()}
    # 36 layers do not divide into 8 equal stages
    dense = recipes.get("qwen3-8b")
    assert {p.pipeline_layout for p in iter_layouts(dense, build_space(dense, 64, 8, extra_layers=(2.0,)))
            if (p.pp, p.vpp) == (8, 1)} == {(4, 4, 5, 5, 5, 5, 5, 3)}


def test_search_keeps_tp_inside_a_node_and_rows_long_enough() -> None:
    config = recipes.get("solar-open-102b")
    space = build_space(config, 512, 4)
    assert space.tp == (1, 2, 4) and space.cp == (1, 2)
    longer = apply_settings(config, ['data.phases=[{"name": "long", "seq_len": 131072, "tokens": 1000000}]'])
    assert build_space(longer, 512, 8).cp == (1, 2, 4, 8, 16, 32, 64)


# Uneven pipelines against every possible split of the layers.

MODEL = recipes.get("k-exaone-236b").model


def find_slowest_stage(stages: Sequence[int], extra: float) -> float:
    """Return the cost of the slowest stage in layers; the head adds `extra` layers to the last stage."""
    return max(*stages[:-1], stages[-1] + extra)


@pytest.mark.each("extra", [0.0, 0.4, 1.7, 3.0, 6.5])
def test_no_other_split_has_a_faster_slowest_stage(extra: float) -> None:
    for layers, pp in itertools.product(range(2, 11), (2, 3, 4)):
        splits = [split for split in itertools.product(range(1, layers + 1), repeat=pp)
                  if sum(split) == layers]
        if not splits:
            continue
        fastest = min(find_slowest_stage(split, extra) for split in splits)
        result = find_uneven_split(layers, pp, 1, extra)
        if result:
            assert find_slowest_stage(result, extra) == fastest
            assert sorted(result[:-1]) == list(result[:-1]), "larger stages come late"
        else:  # equal stages are nearly as fast
            assert fastest >= (1 - LEAST_GAIN) * (layers // pp + extra)


def order_passes(stage: int, pp: int, vpp: int, num_micro_batches: int) -> list[tuple[int, int, int]]:
    """Return a stage's passes as (0 forward or 1 backward, layer run, micro-batch), in the order of
    `megatron.core.pipeline_parallel.schedules` 0.19.2."""
    total = num_micro_batches * vpp
    warm_up = pp - stage - 1 if vpp == 1 else 2 * (pp - stage - 1) + (vpp - 1) * pp
    warm_up = min(warm_up, total)
    forward = [(0, run, micro_batch) for group in range(0, num_micro_batches, pp) for run in range(vpp)
               for micro_batch in range(group, group + pp)]
    backward = [(1, vpp - 1 - run, micro_batch) for _, run, micro_batch in forward]
    steady = [step for pair in zip(forward[warm_up:], backward, strict=False) for step in pair]
    return [*forward[:warm_up], *steady, *backward[total - warm_up:]]


def simulate_step(pp: int, vpp: int, runs: Sequence[int], extra: float, num_micro_batches: int) -> float:
    """Return the duration of a step in units of a layer's forward pass; a backward pass takes 2. Each pass
    starts when its stage is free and its input has arrived."""
    orders: list[Iterator[tuple[int, int, int]]] = [
        iter(order_passes(stage, pp, vpp, num_micro_batches)) for stage in range(pp)]
    last = pp * vpp - 1
    end_of: dict[tuple[int, int, int], float] = {}
    now, waiting = [0.0] * pp, [next(order, None) for order in orders]
    while any(waiting):
        for stage in range(pp):
            while (current := waiting[stage]) is not None:
                is_backward, run, micro_batch = current
                place = run * pp + stage
                needs = (1, place + 1, micro_batch) if is_backward else (0, place - 1, micro_batch)
                if is_backward and place == last:
                    needs = (0, place, micro_batch)
                if needs[1] >= 0 and needs not in end_of:
                    break
                layers = runs[place] + (extra if place == last else 0.0)
                now[stage] = max(now[stage], end_of.get(needs, 0.0)) + (1 + is_backward) * layers
                end_of[is_backward, place, micro_batch] = now[stage]
                waiting[stage] = next(orders[stage], None)
    return max(now)


@pytest.mark.each(("pp", "vpp", "extra"), [(8, 1, 3.2), (8, 2, 3.2), (4, 2, 3.2), (4, 4, 3.2),
                                           (2, 4, 2.2), (16, 1, 2.0)])
def test_simulated_pipeline_schedule_equals_the_plan(pp: int, vpp: int, extra: float) -> None:
    """The slowest stage per micro-batch, plus the bubble: (pp - 1) / vpp times the mean stage."""
    runs = find_uneven_split(48, pp, vpp, extra)
    for layers in filter(None, (runs, (48 // pp // vpp,) * (pp * vpp))):
        stages: list[float] = [sum(layers[stage::pp]) for stage in range(pp)]
        stages[-1] += extra
        planned = 3 * (64 * max(stages) + (pp - 1) / vpp * sum(stages) / pp)
        assert simulate_step(pp, vpp, layers, extra, 64) == pytest.approx(planned, rel=0.015)


def test_runs_of_very_different_lengths_are_not_proposed() -> None:
    """A step with runs of one and of two layers takes a fifth longer than planned."""
    assert find_uneven_split(48, 16, 2, 2.0) == () and find_uneven_split(48, 8, 4, 3.2) == ()
    runs, stages = (1,) * 15 + (1,) + (2,) * 14 + (3, 1), [3.0] * 14 + [4.0, 4.0]
    assert simulate_step(16, 2, runs, 2.0, 64) > 1.1 * 3 * (64 * max(stages) + 15 / 2 * sum(stages) / 16)


@pytest.mark.each(("pp", "vpp", "extra"), [(8, 1, 4.5), (4, 2, 2.2), (5, 1, 0.0), (4, 4, 3.0)])
def test_training_accepts_proposed_layouts(pp: int, vpp: int, extra: float) -> None:
    parallel = ParallelConfig(pp=pp, vpp=vpp, pipeline_layout=find_uneven_split(48, pp, vpp, extra))
    assert parallel.pipeline_layout and parallel.problems(replace(MODEL, num_layers=48), pp) == []
    stages = [len(parallel.stage_layers(stage, 48)) for stage in range(pp)]
    assert find_slowest_stage(stages, extra) <= math.ceil(48 / pp) + extra


def test_the_head_is_on_the_last_run_of_the_last_stage() -> None:
    # 10 layers and a head worth 2.2 layers: 6, and 4 with the head
    assert find_uneven_split(48, 4, 2, 2.2) == (6, 6, 6, 6, 6, 7, 7, 4)


def test_equal_stages_without_gain_from_uneven_ones() -> None:
    assert find_uneven_split(48, 4, 1, 0.0) == () and find_uneven_split(48, 4, 2, 0.05) == ()
    assert find_uneven_split(4, 8, 1, 1.0) == (), "fewer layers than stages"


# A search equals trying every combination, proposes only accepted layouts, and counts excluded ones.

SMALL_SPACE = LayoutSpace(
    tp=(1, 2), pp=(1, 2, 3), vpp=(1, 2), cp=(1, 2), ep=(8, 16), etp=(1, 2), zero1=(False, True),
    micro_batch_size=(1, 3), recompute=((False, ()), (True, ()), ("selective", ("moe",))),
    expert_overlap=("none", "micro_batches"))


def try_all_layouts(stage: RunStage, pricing: Pricing) -> dict[Any, tuple[float, float]]:
    """Return layout -> (`compute_rank_s`, bytes) for all combinations of `SMALL_SPACE` that are valid and
    fit, computed independently of the search."""
    layouts = {}
    values = [getattr(SMALL_SPACE, field.name) for field in dataclasses.fields(SMALL_SPACE)
              if field.name != "uneven"]
    for tp, pp, vpp, cp, ep, etp, zero1, size, (recompute, modules), overlap in itertools.product(*values):
        if (pp == 1 and vpp > 1) or etp not in (1, tp):
            continue
        parallel = dataclasses.replace(
            stage.config.parallel, tp=tp, sp=tp > 1, pp=pp, vpp=vpp, cp=cp, ep=ep, etp=etp, zero1=zero1,
            overlap_param_gather=zero1, expert_overlap=overlap)
        gpu = dataclasses.replace(stage.config.gpu, recompute_modules=modules)
        config = dataclasses.replace(
            stage.config, parallel=parallel, gpu=gpu,
            train=dataclasses.replace(stage.config.train, micro_batch_size=size, recompute=recompute))
        candidate = stage.with_config(config)
        if not config.problems(pricing.num_ranks) and pricing.count_bytes(candidate) <= pricing.limit_bytes:
            layouts[config.parallel, size, recompute] = (pricing.compute_rank_s(candidate),
                                                         pricing.count_bytes(candidate))
    return layouts


@pytest.mark.parametrize(("cluster", "nodes"), [
    ("h100", 12), pytest.param("b200", 4, marks=pytest.mark.deep)])
def test_the_best_layout_is_the_best_of_all_combinations(cluster: str, nodes: int) -> None:
    pricing = get_pricing(load_machines(cluster, nodes))
    stage = list_run_stages(recipes.get("solar-open-102b"), pricing.num_ranks)[0]
    sweep, expected = sweep_stage(stage, SMALL_SPACE, pricing), try_all_layouts(stage, pricing)
    assert len(expected) > 20
    ranked = {(result.choice.parallel, result.choice.micro_batch_size, result.choice.recompute[0])
              for result in sweep.ranked}
    assert ranked == set(expected)
    first = sweep.ranked[0]
    assert (first.rank_s, first.needs_bytes) == pytest.approx(min(expected.values()))
    assert [result.rank_s for result in sweep.ranked] == sorted(result.rank_s for result in sweep.ranked)
    assert sweep.num_looked_at == len(sweep.ranked) + sweep.num_too_large + sum(sweep.broken.values())
    assert sweep.nearest is not None
    lacks, nearest = sweep.nearest
    nearest_stage = stage.with_config(nearest.apply_to(stage.config))
    assert pricing.count_bytes(nearest_stage) == lacks + pricing.limit_bytes


@pytest.mark.parametrize(("recipe", "cluster", "nodes"), [
    ("tiny-k-exaone-extend", "h100", 1), ("qwen3-8b", "h100", 2), ("tiny-solar-open", "gb200", 2),
    pytest.param("qwen3-moe-30b", "b200", 1, marks=pytest.mark.deep)])
def test_training_accepts_every_proposed_layout(recipe: str, cluster: str, nodes: int) -> None:
    pricing, config = get_pricing(load_machines(cluster, nodes)), recipes.get(recipe)
    result = search_layouts(config, pricing)
    assert result.best
    for proposal in result.best[::max(1, len(result.best) // 10)]:
        proposed = apply_settings(config, proposal.choice.list_settings(config))
        proposed.check(pricing.num_ranks)
        for stage in list_run_stages(proposed, pricing.num_ranks, micro_batch_set=True):
            stage.config.check(pricing.num_ranks)
            assert pricing.count_bytes(stage) <= proposal.needs_bytes <= pricing.limit_bytes


def test_each_broken_rule_is_reported_once() -> None:
    pricing = get_pricing(load_machines("h100", 12))
    result = sweep_stage(list_run_stages(recipes.get("solar-open-102b"), pricing.num_ranks)[0], SMALL_SPACE,
                         pricing)
    assert sum(result.broken.values()) > 100
    lines = describe_broken_rules([result, result])
    assert len(lines) == len(result.broken)
    assert len([line for line in lines if "number of processes" in line]) == 1
    assert f"{2 * result.broken.most_common()[0][1]:,} break a rule" in lines[0]


def test_set_values_are_kept() -> None:
    pricing = get_pricing(load_machines("h100", 2))
    config = apply_settings(recipes.get("qwen3-8b"), ["parallel.tp=4", "parallel.sp=true",
                                                      "train.recompute=true"])
    result = search_layouts(config, pricing, {"parallel.tp", "train.recompute"})
    assert {c.choice.parallel.tp for c in result.best} == {4}
    assert {c.choice.recompute for c in result.best} == {(True, ())}
    assert len({c.choice.parallel.pp for c in result.best}) > 1
